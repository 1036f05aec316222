//! Kubernetes: Services and EndpointSlices, from an API server or from a file.
//!
//! `convert` makes of one object what the rules need of it, `cluster` puts objects together, whichever comes first, and
//! `watch` follows an API server. A file of objects goes the same way ([`read`]).
mod cluster;
mod convert;
mod object;
#[cfg(test)]
mod tests;
mod watch;

pub use self::{
    cluster::Cluster,
    object::Object,
    watch::{Connection, KubernetesError, watch},
};
use super::{Changes, Loaded};

/// What objects want, on the node that is called so.
pub fn read(objects: Vec<Object>, node_name: Option<&str>) -> Loaded {
    let mut cluster = Cluster::new(node_name.map(Into::into));
    for object in objects {
        add(&mut cluster, object);
    }
    // A file says what there is, and not what has changed.
    Loaded { changes: Changes::default(), ..cluster.loaded() }
}

fn add(cluster: &mut Cluster, object: Object) {
    match object {
        Object::Service(service) => cluster.set_service(&service),
        Object::EndpointSlice(slice) => cluster.set_slice(&slice),
        Object::Node(node) => cluster.set_node(&node),
        Object::List(objects) => objects.into_iter().for_each(|object| add(cluster, object)),
        Object::Other => {}
    }
}
