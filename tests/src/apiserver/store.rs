//! What the server has, and how it came to be so: objects, versions and what happened.

use std::{
    borrow::Cow,
    collections::{BTreeMap, VecDeque},
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use hyper::body::Bytes;
use serde_json::{Map, Value};

use super::{
    resource::{RESOURCES, Resource},
    status::Refusal,
};

/// How many changes of a kind are remembered at first: as many as a real server does at most.
const WINDOW: usize = 102_400;

/// An object at one version, as bytes that are written once.
#[derive(Debug)]
pub(super) struct Object {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) version: u64,
    /// Its JSON without `kind` and `apiVersion`, as the items of a list are.
    pub(super) body: Bytes,
}

/// Namespace and name.
pub(super) type Key = (String, String);

/// The objects of a kind.
pub(super) type Objects = BTreeMap<Key, Arc<Object>>;

/// A change of one object.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) old: Option<Arc<Object>>,
    pub(super) new: Option<Arc<Object>>,
    /// The old object with the version of this change, where somebody has asked for it.
    last: OnceLock<Bytes>,
}

/// All of a kind.
#[derive(Debug, Default)]
struct Shelf {
    objects: Objects,
    changes: VecDeque<Change>,
    /// All changes after this version are remembered.
    complete_since: u64,
}

/// All objects, with a version that counts the changes of all kinds.
#[derive(Debug)]
pub(super) struct Store {
    shelves: [Shelf; RESOURCES.len()],
    version: u64,
    /// What came until then is forgotten: one can begin there, but not before.
    compacted: u64,
    /// How many objects there have ever been.
    created: u64,
    /// How many changes of a kind are remembered.
    window: usize,
}

impl Default for Store {
    fn default() -> Self {
        // No cluster is new: what stands for itself would be confused with nothing, or with a count.
        Self { shelves: Default::default(), version: 1000, compacted: 0, created: 0, window: WINDOW }
    }
}

impl Store {
    /// The version of what there is now.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// What there is now.
    pub(super) fn objects(&self, resource: usize) -> &Objects {
        &self.shelves[resource].objects
    }

    /// What there was at this version.
    pub(super) fn objects_at(&self, resource: usize, version: u64) -> Result<Cow<'_, Objects>, Refusal> {
        if version > self.version {
            return Err(Refusal::too_large(version, self.version));
        }
        self.check_remembered(resource, version)?;
        let kept = &self.shelves[resource];
        let mut objects = Cow::Borrowed(&kept.objects);
        for change in kept.changes.iter().rev().take_while(|change| change.version > version) {
            match &change.old {
                Some(old) => objects.to_mut().insert(old.key(), Arc::clone(old)),
                None => objects.to_mut().remove(&change.object().key()),
            };
        }
        Ok(objects)
    }

    /// Whether all that came after this version can be told.
    pub(super) fn check_remembered(&self, resource: usize, version: u64) -> Result<(), Refusal> {
        let oldest = self.compacted.max(self.shelves[resource].complete_since);
        if version < oldest { Err(Refusal::too_old(version, oldest)) } else { Ok(()) }
    }

    /// What came after this version, to a watch that goes on: it loses nothing by a compaction, but `None` comes of being too slow.
    pub(super) fn changes_after(&self, resource: usize, version: u64) -> Option<impl Iterator<Item = &Change>> {
        let kept = &self.shelves[resource];
        let seen = kept.changes.partition_point(|change| change.version <= version);
        (version >= kept.complete_since).then(|| kept.changes.range(seen..))
    }

    /// Puts an object in place of the one of the same name, if there is one. What is no change is none.
    pub(super) fn put(&mut self, resource: usize, mut object: Value) -> Arc<Object> {
        let kind = &RESOURCES[resource];
        let key = name(kind, &mut object, self.version);
        let old = self.shelves[resource].objects.get(&key).cloned();
        match &old {
            Some(old) => keep_identity(&mut object, old),
            None => self.give_identity(&mut object, kind),
        }
        let same = old.as_ref().filter(|old| Object::new(&key, &mut object, old.version).body == old.body);
        if let Some(same) = same {
            return Arc::clone(same);
        }
        if old.is_some() && kind.counts_generations {
            let metadata = &mut object["metadata"];
            metadata["generation"] = (metadata["generation"].as_u64().unwrap_or(0) + 1).into();
        }
        let new = Arc::new(Object::new(&key, &mut object, self.version + 1));
        self.change(resource, old, Some(Arc::clone(&new)));
        self.shelves[resource].objects.insert(key, Arc::clone(&new));
        new
    }

    /// Whether there was one.
    pub(super) fn delete(&mut self, resource: usize, key: &Key) -> bool {
        let old = self.shelves[resource].objects.remove(key);
        let was_there = old.is_some();
        if was_there {
            self.change(resource, old, None);
        }
        was_there
    }

    /// Remembers this many changes of a kind from now on.
    pub(super) fn remember(&mut self, changes: usize) {
        self.window = changes;
    }

    /// Forgets all that was. Something else of the cluster has changed since, so that what is known to anyone is too old.
    pub(super) fn compact(&mut self) {
        self.version += 1;
        self.compacted = self.version;
    }

    fn change(&mut self, resource: usize, old: Option<Arc<Object>>, new: Option<Arc<Object>>) {
        self.version += 1;
        let kept = &mut self.shelves[resource];
        kept.changes.push_back(Change { version: self.version, old, new, last: OnceLock::new() });
        while kept.changes.len() > self.window
            && let Some(forgotten) = kept.changes.pop_front()
        {
            kept.complete_since = forgotten.version;
        }
    }

    fn give_identity(&mut self, object: &mut Value, kind: &Resource) {
        self.created += 1;
        let created = self.created;
        let metadata = &mut object["metadata"];
        metadata["uid"] = format!("{created:08x}-7768-4172-8066-{created:012x}").into();
        metadata["creationTimestamp"] = humantime::format_rfc3339_seconds(SystemTime::now()).to_string().into();
        if kind.counts_generations {
            metadata["generation"] = 1.into();
        }
    }
}

/// Gives the object a name where it has but the beginning of one; what it is found by.
fn name(kind: &Resource, object: &mut Value, version: u64) -> Key {
    let object = object.as_object_mut().expect("objects are objects");
    let metadata = object.entry("metadata").or_insert_with(|| Map::new().into());
    if let (None, Some(prefix)) = (metadata["name"].as_str(), metadata["generateName"].as_str()) {
        metadata["name"] = format!("{prefix}{:05x}", version & 0xF_FFFF).into();
    }
    let name = metadata["name"].as_str().expect("objects have names").to_owned();
    if !kind.namespaced {
        return (String::new(), name);
    }
    if metadata["namespace"].is_null() {
        metadata["namespace"] = "default".into();
    }
    (metadata["namespace"].as_str().expect("a namespace is a string").to_owned(), name)
}

/// Gives the object what the old one of that name keeps.
fn keep_identity(object: &mut Value, old: &Object) {
    let old: Value = serde_json::from_slice(&old.body).expect("the store wrote it");
    for field in ["uid", "creationTimestamp", "generation"] {
        if let Some(value) = old["metadata"].get(field) {
            object["metadata"][field] = value.clone();
        }
    }
}

impl Object {
    fn new((namespace, name): &Key, object: &mut Value, version: u64) -> Self {
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let map = object.as_object_mut().expect("objects are objects");
        map.remove("kind");
        map.remove("apiVersion");
        let labels = object["metadata"]["labels"].as_object().into_iter().flatten();
        let labels = labels.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect();
        let body = serde_json::to_vec(object).expect("a value is JSON").into();
        Self { namespace: namespace.clone(), name: name.clone(), labels, version, body }
    }

    /// What it is found by.
    pub(super) fn key(&self) -> Key {
        (self.namespace.clone(), self.name.clone())
    }
}

impl Change {
    /// The object as it is since, or as it was last.
    pub(super) fn object(&self) -> &Object {
        self.new.as_ref().or(self.old.as_ref()).expect("something has changed")
    }

    /// What those see to whom the object is gone: how it was, with the version of this change.
    pub(super) fn last(&self) -> &Bytes {
        self.last.get_or_init(|| {
            let old = self.old.as_ref().expect("what is gone was there");
            let mut value = serde_json::from_slice(&old.body).expect("the store wrote it");
            Object::new(&old.key(), &mut value, self.version).body
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, zone: &str) -> Value {
        json!({ "metadata": { "name": name, "labels": { "zone": zone } } })
    }

    #[test]
    fn what_there_was_is_known_until_it_is_compacted() {
        let mut store = Store::default();
        store.put(1, node("a", "1"));
        store.put(1, node("b", "1"));
        let before = store.version();
        store.put(1, node("a", "2"));
        store.delete(1, &(String::new(), "b".to_owned()));
        store.put(1, node("c", "1"));
        let then = store.objects_at(1, before).unwrap();
        let zones: Vec<_> = then.values().map(|it| (it.name.as_str(), it.labels["zone"].as_str())).collect();
        assert_eq!(zones, [("a", "1"), ("b", "1")]);
        assert_eq!(store.changes_after(1, before).unwrap().count(), 3);
        store.compact();
        assert_eq!(store.objects_at(1, before).unwrap_err().code, 410);
        assert_eq!(store.objects_at(1, store.version()).unwrap().len(), 2);
        assert_eq!(store.objects_at(1, store.version() + 1).unwrap_err().code, 504);
    }

    #[test]
    fn an_object_keeps_its_identity_until_it_is_deleted() {
        let mut store = Store::default();
        let uid = |object: &Object| serde_json::from_slice::<Value>(&object.body).unwrap()["metadata"]["uid"].clone();
        let first = store.put(1, node("a", "1"));
        let changed = store.put(1, node("a", "2"));
        assert!(uid(&first) == uid(&changed) && first.version < changed.version);
        assert_eq!(store.put(1, node("a", "2")).version, changed.version, "this changes nothing");
        store.delete(1, &changed.key());
        assert_ne!(uid(&store.put(1, node("a", "2"))), uid(&first));
    }

    #[test]
    fn a_watch_that_is_too_slow_is_told_nothing() {
        let mut store = Store::default();
        let start = store.version();
        store.remember(10);
        for number in 0..11 {
            store.put(1, node("a", &number.to_string()));
        }
        assert!(store.changes_after(1, start).is_none());
        assert_eq!(store.changes_after(1, start + 1).unwrap().count(), 10);
        assert_eq!(store.check_remembered(1, start).unwrap_err().code, 410);
    }
}
