//! Kubernetes: Services and EndpointSlices, from an API server or from a file.
//!
//! `convert` makes of one object what the rules need of it, `cluster` puts objects together, whichever comes first, and
//! `watch` follows an API server. A file of objects goes the same way ([`read`]).
mod cluster;
mod convert;
#[cfg(test)]
mod tests;
mod watch;

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use serde::Deserialize;

pub use self::{
    cluster::Cluster,
    watch::{Connection, KubernetesError, watch},
};
use super::{Changes, Loaded};

/// An object of a file; what `kubectl get -o yaml` prints.
#[derive(Debug, Deserialize)]
#[serde(tag = "kind")]
pub enum Object {
    /// A Service.
    Service(Box<Service>),
    /// A part of a Service's endpoints.
    EndpointSlice(Box<EndpointSlice>),
    /// A node.
    Node(Box<Node>),
    /// Several objects.
    #[serde(alias = "ServiceList", alias = "EndpointSliceList", alias = "NodeList")]
    List {
        /// They.
        items: Vec<Object>,
    },
    /// Something that is of no concern here.
    #[serde(other)]
    Other,
}

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
        Object::List { items } => items.into_iter().for_each(|object| add(cluster, object)),
        Object::Other => {}
    }
}
