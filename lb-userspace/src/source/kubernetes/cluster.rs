//! The services of a cluster, put together of objects that come in any order. A change touches the Service that it is about,
//! and no other.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::Arc,
    time::SystemTime,
};

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};

use super::convert::{self, Draft, ObjectName, Slice};
use crate::{
    model::{self, Desired, IpFamily},
    source::{Changes, Loaded, NodeObject},
};

/// Services, slices, and the node that this is.
#[derive(Debug, Default)]
pub struct Cluster {
    node_name: Option<Arc<str>>,
    node: NodeObject,
    /// The ports of each Service.
    services: BTreeMap<ObjectName, Vec<Draft>>,
    /// The slices of each Service, by their own names: it may not be there yet.
    slices: BTreeMap<ObjectName, BTreeMap<ObjectName, Slice>>,
    /// The Service of each slice.
    owners: BTreeMap<ObjectName, ObjectName>,
    /// What has been made of all that, but for what has changed since.
    desired: Desired,
    changed: BTreeSet<ObjectName>,
    /// What was told of each Service that could not be served.
    warnings: BTreeMap<ObjectName, Vec<String>>,
    new_warnings: Vec<String>,
    /// What has changed since it was told last, but for when that has begun.
    changes: Changes,
    /// When changes of the slices of each Service have begun.
    begun: BTreeMap<ObjectName, Vec<(IpFamily, SystemTime)>>,
}

impl Cluster {
    /// A cluster of which nothing is known but how this node is called.
    pub fn new(node_name: Option<Arc<str>>) -> Self {
        Self { node_name, ..Self::default() }
    }

    /// A Service is there, or has changed.
    pub fn set_service(&mut self, service: &Service) {
        let name = convert::object_name(&service.metadata);
        let mut warnings = Vec::new();
        let drafts = convert::drafts(service, &mut warnings);
        self.warn(&name, warnings);
        if drafts.is_empty() {
            self.forget_service(&name);
        } else if self.services.get(&name) != Some(&drafts) {
            self.retract(&name);
            self.services.insert(Arc::clone(&name), drafts);
            self.changed.insert(name);
            self.changes.services += 1;
        }
    }

    /// A Service is gone.
    pub fn remove_service(&mut self, service: &Service) {
        self.forget_service(&convert::object_name(&service.metadata));
    }

    /// There are no other Services than those with these names.
    pub(super) fn keep_services(&mut self, names: &BTreeSet<ObjectName>) {
        for name in absent(&self.services, names) {
            self.forget_service(&name);
        }
    }

    fn forget_service(&mut self, name: &ObjectName) {
        self.retract(name);
        if self.services.remove(name).is_some() {
            self.changes.services += 1;
        }
        self.warnings.remove(name);
        self.changed.remove(name);
    }

    /// Takes back what was made of a Service.
    fn retract(&mut self, name: &ObjectName) {
        for draft in self.services.get(name).into_iter().flatten() {
            self.desired.remove(&draft.name);
        }
    }

    /// A slice is there, or has changed; it may be another Service's now.
    pub fn set_slice(&mut self, object: &EndpointSlice) {
        let name = convert::object_name(&object.metadata);
        let Some(slice) = convert::slice(object) else { return self.forget_slice(&name) };
        let owner = Arc::clone(&slice.service);
        if self.owners.get(&name).is_some_and(|before| *before != owner) {
            self.forget_slice(&name);
        }
        let of_service = self.slices.entry(Arc::clone(&owner)).or_default();
        if of_service.get(&name) != Some(&slice) {
            if let Some(time) = convert::begun(object) {
                self.begun.entry(Arc::clone(&owner)).or_default().push((slice.family, time));
            }
            of_service.insert(Arc::clone(&name), slice);
            self.changed.insert(Arc::clone(&owner));
            self.changes.slices += 1;
        }
        self.owners.insert(name, owner);
    }

    /// A slice is gone.
    pub fn remove_slice(&mut self, slice: &EndpointSlice) {
        self.forget_slice(&convert::object_name(&slice.metadata));
    }

    /// There are no other slices than those with these names.
    pub(super) fn keep_slices(&mut self, names: &BTreeSet<ObjectName>) {
        for name in absent(&self.owners, names) {
            self.forget_slice(&name);
        }
    }

    fn forget_slice(&mut self, name: &ObjectName) {
        let Some(owner) = self.owners.remove(name) else { return };
        if let Some(slices) = self.slices.get_mut(&owner) {
            slices.remove(name);
            if slices.is_empty() {
                self.slices.remove(&owner);
            }
        }
        // What has begun before may have been undone by that.
        self.begun.remove(&owner);
        self.changed.insert(owner);
        self.changes.slices += 1;
    }

    /// A node is there, or has changed. Others than this one are of no concern.
    pub fn set_node(&mut self, node: &Node) {
        if self.is_this(node) {
            self.node = convert::node(node);
        }
    }

    /// A node is gone. If it is this one, it takes no new traffic from outside. Its zone stays.
    pub(super) fn remove_node(&mut self, node: &Node) {
        if self.is_this(node) {
            self.node.is_eligible = false;
        }
    }

    /// There are no other nodes than those with these names, of which this one should be.
    pub(super) fn keep_nodes(&mut self, names: &BTreeSet<ObjectName>) {
        let Some(name) = &self.node_name else { return };
        if !names.contains(&convert::join("", name)) {
            self.node.is_eligible = false;
            self.new_warnings.push(format!(
                "the cluster has no node of the name {name}, so this one is to have no new traffic from outside; see --node-name"
            ));
        }
    }

    fn is_this(&self, node: &Node) -> bool {
        let name = node.metadata.name.as_deref();
        name.is_some() && name == self.node_name.as_deref()
    }

    /// What is wanted now.
    pub fn loaded(&mut self) -> Loaded {
        self.make_changed();
        Loaded {
            desired: Arc::new(self.desired.clone()),
            node: self.node.clone(),
            warnings: mem::take(&mut self.new_warnings),
            changes: Changes {
                begun: mem::take(&mut self.begun).into_values().flatten().collect(),
                ..mem::take(&mut self.changes)
            },
            troubles: None,
        }
    }

    /// Makes everything anew of the objects that there are. Whether that is something else than what came of all their changes,
    /// which it should not be.
    pub(super) fn refresh(&mut self) -> bool {
        self.make_changed();
        let before = mem::take(&mut self.desired);
        self.changed = self.services.keys().cloned().collect();
        self.make_changed();
        let is_other = self.desired != before;
        if is_other {
            let remark =
                "the services were not what the objects of the cluster say, and are now; this is a bug in wharf";
            self.new_warnings.push(remark.to_owned());
        } else {
            // Of two states that share nothing all would have to be compared.
            self.desired = before;
        }
        is_other
    }

    fn make_changed(&mut self) {
        for name in mem::take(&mut self.changed) {
            self.make(&name);
        }
    }

    /// Makes services of a Service and its slices.
    fn make(&mut self, name: &ObjectName) {
        let mut warnings = Vec::new();
        for draft in self.services.get(name).into_iter().flatten() {
            let slices = self.slices.get(name).into_iter().flat_map(BTreeMap::values);
            let endpoints = convert::endpoints(draft, slices, &mut warnings);
            let service = model::Service { endpoints, ..draft.service.clone() };
            if self.desired.services().get(&draft.name).is_none_or(|before| **before != service) {
                self.desired.set(draft.name.clone(), Arc::new(service));
            }
        }
        if !warnings.is_empty() {
            self.warn(name, warnings);
        }
    }

    /// Says what was not said before.
    fn warn(&mut self, name: &ObjectName, warnings: Vec<String>) {
        let said = self.warnings.entry(Arc::clone(name)).or_default();
        for warning in warnings {
            if !said.contains(&warning) {
                said.push(warning.clone());
                self.new_warnings.push(warning);
            }
        }
        if said.is_empty() {
            self.warnings.remove(name);
        }
    }
}

/// The names that are known and should not be.
fn absent<T>(known: &BTreeMap<ObjectName, T>, names: &BTreeSet<ObjectName>) -> Vec<ObjectName> {
    known.keys().filter(|name| !names.contains(*name)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn what_is_made_anew_is_what_came_of_all_changes_and_else_it_is_told() {
        let mut cluster = Cluster::new(None);
        for (name, ip) in [("a", "10.96.0.1"), ("b", "10.96.0.2")] {
            let spec = json!({ "clusterIP": ip, "ports": [{ "port": 80 }] });
            let service = json!({ "metadata": { "namespace": "ns", "name": name }, "spec": spec });
            cluster.set_service(&from_value(service).unwrap());
        }
        assert!(!cluster.refresh(), "what was not told yet is no news");
        let whole = cluster.loaded().desired;
        assert!(!cluster.refresh());
        let same = cluster.loaded().desired;
        for (name, service) in whole.services() {
            assert!(Arc::ptr_eq(service, &same.services()[name]), "what is the same is shared");
        }
        let (name, service) = whole.services().get_min().unwrap();
        cluster.desired.remove(name);
        assert!(cluster.refresh());
        let Loaded { desired, warnings, .. } = cluster.loaded();
        assert!(desired == whole && warnings.iter().any(|it| it.contains("a bug in wharf")), "{warnings:?}");
        cluster.desired.set(model::ServiceName { name: "ns/gone".into(), ..name.clone() }, Arc::clone(service));
        assert!(cluster.refresh());
        assert_eq!(cluster.loaded().desired, whole);
    }
}
