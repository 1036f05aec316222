//! Objects of Kubernetes.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::{
    core::v1::{Node as NodeObject, Service},
    discovery::v1::EndpointSlice,
};
use lb_userspace::{
    model::{Desired, FrontendKind, IpFamily},
    policy::{self, Decided, Decision, Node},
    source::{Loaded, kubernetes::Cluster},
};

/// What this node is called.
const HERE: &str = "node-1";

/// A file of objects: state that holds together on any node, or a mistake with its place.
pub fn kubernetes_objects(bytes: &[u8]) {
    if let Some(Loaded { desired, .. }) = crate::parsed(bytes, Some(HERE)) {
        check(&desired);
    }
}

/// What a watch says.
#[derive(Clone, Debug)]
pub enum Change {
    /// A Service is there, or another than before.
    Service(Box<Service>),
    /// A slice is there, or another than before.
    Slice(Box<EndpointSlice>),
    /// A node is there, or another than before.
    Node(Box<NodeObject>),
    /// A Service is gone.
    NoService(Box<Service>),
    /// A slice is gone.
    NoSlice(Box<EndpointSlice>),
    /// All that came before is to be in force.
    Load,
}

/// Objects that come and go: what becomes of them, step by step, is what those that are left are at once, in another order.
pub fn kubernetes_changes(changes: &[Change]) {
    let mut cluster = Cluster::new(Some(HERE.into()));
    let (mut services, mut slices) = (BTreeMap::new(), BTreeMap::new());
    let node = Arc::new(nodes()[0].clone());
    let mut decision = Decision::default();
    for change in changes {
        match change {
            Change::Service(service) => {
                cluster.set_service(service);
                services.insert(key(&service.metadata), service);
            }
            Change::Slice(slice) => {
                cluster.set_slice(slice);
                slices.insert(key(&slice.metadata), slice);
            }
            Change::Node(node) => cluster.set_node(node),
            Change::NoService(service) => {
                cluster.remove_service(service);
                services.remove(&key(&service.metadata));
            }
            Change::NoSlice(slice) => {
                cluster.remove_slice(slice);
                slices.remove(&key(&slice.metadata));
            }
            Change::Load => decision = decision.next(&cluster.loaded().desired, &node),
        }
    }
    let Loaded { desired, warnings, .. } = cluster.loaded();
    assert!(warnings.iter().all(|line| crate::is_printable(line)), "{warnings:?}");
    check(&desired);
    let mut left = Cluster::new(Some(HERE.into()));
    for slice in slices.values() {
        left.set_slice(slice);
    }
    for service in services.values().rev() {
        left.set_service(service);
    }
    assert_eq!(desired, left.loaded().desired);
    decision = decision.next(&desired, &node);
    assert_eq!(**decision.decided(), policy::decide(&desired, &node));
}

fn key(metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> (Option<String>, Option<String>) {
    let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    (text(&metadata.namespace), text(&metadata.name))
}

/// One that knows where it is, and has addresses that services may want, too; and one that knows nothing.
fn nodes() -> [Node; 2] {
    let addresses = ["192.0.2.1", "2001:db8::1", "10.96.0.1"].map(|it| it.parse().expect("it is an address"));
    let here = Node {
        name: Some(HERE.into()),
        zone: Some("a".into()),
        addresses: addresses.into(),
        node_port_addresses: addresses.into(),
        bind_only: [].into(),
        pod_subnets: ["10.244.1.0/24".parse().expect("it is a range")].into(),
    };
    [here, Node::default()]
}

fn check(desired: &Desired) {
    for (name, service) in desired.services() {
        assert!(crate::is_printable(&name.name) && crate::is_printable(&name.port), "{name:?}");
        assert!(service.frontends.values().any(|kind| *kind == FrontendKind::ClusterIp), "{name:?}: {service:?}");
        for address in service.frontends.keys().chain(service.endpoints.keys()) {
            assert_eq!(IpFamily::of(address.ip()), name.family, "{name:?}: {service:?}");
            let ip = address.ip();
            let is_special = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.to_canonical() != ip;
            assert!(!is_special && address.port() != 0, "{name:?}: {address}");
        }
        assert!(service.node_port != Some(0) && service.health_check != Some(0), "{name:?}: {service:?}");
    }
    for node in nodes() {
        hold_together(desired, &policy::decide(desired, &node));
    }
}

fn hold_together(desired: &Desired, decided: &Decided) {
    assert!(decided.services.keys().eq(desired.services().keys()));
    for (name, serving) in &decided.services {
        let endpoints = &desired.services()[name].endpoints;
        assert!(serving.backends.iter().map(|(address, _)| address).eq(endpoints.keys()), "{name:?}");
        for ((_, backend), endpoint) in serving.backends.iter().zip(endpoints.values()) {
            let conditions = endpoint.conditions;
            let may = conditions.ready || conditions.serving && conditions.terminating;
            assert!(may || !(backend.in_cluster || backend.in_local), "{name:?}: {backend:?}, {endpoint:?}");
        }
    }
    for (frontend, route) in &decided.frontends {
        assert!(decided.services.contains_key(&route.service), "{frontend:?}");
        assert_eq!(route.service.protocol, frontend.protocol);
        assert_eq!(route.service.family, IpFamily::of(frontend.address.ip()));
    }
    for address in decided.vips.keys() {
        assert!(decided.frontends.keys().any(|frontend| frontend.address.ip() == *address), "{address}");
    }
}
