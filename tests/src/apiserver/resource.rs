//! What kinds of objects there are, and under which paths.

use hyper::body::Bytes;
use serde_json::{Map, Value};

use super::store::Key;

/// A kind of objects.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Resource {
    /// What paths begin with.
    pub(super) root: &'static str,
    /// What paths and permissions call it.
    pub(super) plural: &'static str,
    pub(super) kind: &'static str,
    pub(super) api_version: &'static str,
    pub(super) namespaced: bool,
    /// Whether the server counts in `metadata.generation` how often an object was changed.
    pub(super) counts_generations: bool,
}

/// All kinds; an index in here stands for one.
pub(super) const RESOURCES: [Resource; 4] = [
    Resource {
        root: "/api/v1/",
        plural: "services",
        kind: "Service",
        api_version: "v1",
        namespaced: true,
        counts_generations: false,
    },
    Resource {
        root: "/api/v1/",
        plural: "nodes",
        kind: "Node",
        api_version: "v1",
        namespaced: false,
        counts_generations: false,
    },
    Resource {
        root: "/apis/discovery.k8s.io/v1/",
        plural: "endpointslices",
        kind: "EndpointSlice",
        api_version: "discovery.k8s.io/v1",
        namespaced: true,
        counts_generations: true,
    },
    Resource {
        root: "/apis/events.k8s.io/v1/",
        plural: "events",
        kind: "Event",
        api_version: "events.k8s.io/v1",
        namespaced: true,
        counts_generations: false,
    },
];

/// Where in the API a path leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) resource: usize,
    pub(super) namespace: Option<String>,
    pub(super) name: Option<String>,
}

impl Place {
    /// `None` where there is nothing.
    pub(super) fn of(path: &str) -> Option<Self> {
        RESOURCES.iter().enumerate().find_map(|(resource, it)| {
            let mut parts = path.strip_prefix(it.root)?.split('/');
            let mut part = parts.next()?;
            let mut namespace = None;
            if part == "namespaces" && it.namespaced {
                namespace = Some(parts.next()?.to_owned());
                part = parts.next()?;
            }
            let name = parts.next().map(str::to_owned);
            let is_here = part == it.plural
                && parts.next().is_none()
                && (namespace.is_some() || name.is_none() || !it.namespaced);
            is_here.then_some(Self { resource, namespace, name })
        })
    }

    /// What kind of objects are there.
    pub(super) fn resource(&self) -> &'static Resource {
        &RESOURCES[self.resource]
    }

    /// What the object there is found by, if one is named.
    pub(super) fn key(&self) -> Key {
        self.key_of(self.name.as_deref().unwrap_or_default())
    }

    /// What an object of this name would be found by there.
    pub(super) fn key_of(&self, name: &str) -> Key {
        (self.namespace.clone().unwrap_or_default(), name.to_owned())
    }
}

/// The index of a kind.
#[track_caller]
pub(super) fn index_of(kind: &str) -> usize {
    let index = RESOURCES.iter().position(|resource| resource.kind == kind);
    index.unwrap_or_else(|| panic!("the API server of tests has no {kind}"))
}

impl Resource {
    /// The API group, which is nothing for the first kinds that there were.
    pub(super) fn group(&self) -> &'static str {
        self.api_version.split_once('/').map_or("", |(group, _)| group)
    }

    /// An object's JSON, of which the items of lists lack what all have in common, with that.
    pub(super) fn write(&self, to: &mut Vec<u8>, body: &Bytes) {
        to.extend_from_slice(format!(r#"{{"kind":"{}","apiVersion":"{}","#, self.kind, self.api_version).as_bytes());
        to.extend_from_slice(&body[1..]);
    }

    /// [`Resource::write`] as a value.
    pub(super) fn value(&self, body: &Bytes) -> Value {
        let mut object: Map<_, _> = serde_json::from_slice(body).expect("the store wrote it");
        object.insert("kind".into(), self.kind.into());
        object.insert("apiVersion".into(), self.api_version.into());
        object.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lead_to_kinds_namespaces_and_objects() {
        let place = |path: &str| {
            let place = Place::of(path)?;
            Some((place.resource().plural, place.namespace, place.name))
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(place("/api/v1/services"), Some(("services", None, None)));
        assert_eq!(place("/api/v1/namespaces/a/services"), Some(("services", some("a"), None)));
        assert_eq!(place("/api/v1/namespaces/a/services/b"), Some(("services", some("a"), some("b"))));
        assert_eq!(place("/api/v1/nodes/n"), Some(("nodes", None, some("n"))));
        assert_eq!(place("/apis/discovery.k8s.io/v1/endpointslices"), Some(("endpointslices", None, None)));
        for nothing in ["/api/v1", "/api/v1/pods", "/api/v1/services/b", "/api/v1/namespaces/a/nodes", "/apis/a/v1/b"] {
            assert_eq!(place(nothing), None, "{nothing}");
        }
    }
}
