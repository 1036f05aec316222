//! Which endpoints take new flows, and on which addresses: pure functions over the model.
//!
//! [`decide`] makes of the services of a cluster what one node's maps are to say. The rules are kube-proxy's
//! (Kubernetes, `pkg/proxy/topology.go` and `pkg/proxy/servicechangetracker.go`):
//!
//! - Policy Cluster: endpoints that are ready; if none is ready on any node, all that are serving and terminating.
//! - Policy Local: the same of those on this node, decided by itself.
//! - Weight 0 takes an endpoint out of whichever set it is in; it does not make another endpoint eligible.
//! - Cluster IPs follow the internal policy, all other frontends the external one.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::abi;

use crate::model::{
    Algorithm, Conditions, Desired, Endpoint, Frontend, FrontendKind, IpFamily, Service, ServiceName, TrafficPolicy,
    Weight,
};

/// What policy has to know of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its name, as endpoints say on which node they are; `None`: not known.
    pub name: Option<Arc<str>>,
    /// All of its addresses but loopback and link-local ones.
    pub addresses: BTreeSet<IpAddr>,
    /// Those of them that node ports are served on.
    pub node_port_addresses: BTreeSet<IpAddr>,
    /// The subnets behind its pod-facing devices, without a gateway in between.
    pub pod_subnets: BTreeSet<IpNet>,
}

/// What the maps of one node are to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decided {
    /// The services.
    pub services: BTreeMap<ServiceName, Arc<Serving>>,
    /// Every address and port that is served, node ports among them.
    pub frontends: BTreeMap<Frontend, Route>,
    /// The ranges of clients that services with [`abi::Frontend::SOURCE_RANGES`] let in.
    pub sources: BTreeSet<(ServiceName, IpNet)>,
    /// The addresses that are services' alone, with the value of `VIPS4` and `VIPS6`.
    pub vips: BTreeMap<IpAddr, u32>,
}

/// How a service is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serving {
    /// How a backend is chosen for a new flow.
    pub algorithm: Algorithm,
    /// For how many seconds a client's new flows go where its last one went; 0: no session affinity.
    pub affinity: u32,
    /// Every endpoint, in the order of addresses: those that take no new flows may keep old ones.
    pub backends: Vec<(SocketAddr, Backend)>,
}

/// An endpoint as this node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its share of new flows.
    pub weight: Weight,
    /// It is on this node.
    pub is_on_node: bool,
    /// It takes new flows by policy Cluster.
    pub in_cluster: bool,
    /// It takes new flows by policy Local. Never where no frontend of the service has that policy.
    pub in_local: bool,
}

/// Where a frontend leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The service.
    pub service: ServiceName,
    /// What holds for it: [`abi::Frontend::LOCAL_POLICY`] and the others, combined.
    pub flags: u32,
}

/// What the maps are to say on this node.
pub fn decide(desired: &Desired, node: &Node) -> Decided {
    let mut decided = Decided::default();
    for (name, service) in desired.services() {
        let mut flags = 0;
        for (&address, &kind) in &service.frontends {
            let route = Route { service: name.clone(), flags: frontend_flags(service, Some(kind)) };
            flags |= route.flags;
            decided.frontends.insert(Frontend { address, protocol: name.protocol }, route);
            decided.add_vip(address.ip(), kind, node);
        }
        for address in node_port_addresses(name.family, service, node) {
            let route = Route { service: name.clone(), flags: frontend_flags(service, None) };
            flags |= route.flags;
            let frontend = Frontend { address, protocol: name.protocol };
            // What a service says of an address by name comes before what all nodes' addresses serve.
            if !desired.frontends().contains_key(&frontend) {
                decided.frontends.insert(frontend, route);
            }
        }
        if flags & abi::Frontend::SOURCE_RANGES != 0 {
            let ranges = service.source_ranges.iter().filter(|range| IpFamily::of(range.addr()) == name.family);
            decided.sources.extend(ranges.map(|&range| (name.clone(), range)));
        }
        let serving = Serving {
            algorithm: service.algorithm,
            affinity: service.affinity,
            backends: backends(service, node, flags & abi::Frontend::LOCAL_POLICY != 0),
        };
        decided.services.insert(name.clone(), Arc::new(serving));
    }
    decided
}

impl Serving {
    /// Whether any backend takes new flows by policy Local.
    pub fn has_local(&self) -> bool {
        self.backends.iter().any(|(_, backend)| backend.in_local)
    }
}

impl Decided {
    /// An address that the node has itself is the stack's, too, which answers on the ports that no service has.
    fn add_vip(&mut self, address: IpAddr, kind: FrontendKind, node: &Node) {
        if node.addresses.contains(&address) {
            return;
        }
        let flags = if kind == FrontendKind::ClusterIp { abi::VipKey::REFUSES } else { 0 };
        *self.vips.entry(address).or_default() |= flags;
    }
}

/// What the kernel has to know of a frontend; `None`: of a node port.
fn frontend_flags(service: &Service, kind: Option<FrontendKind>) -> u32 {
    let (policy, external) = match kind {
        Some(FrontendKind::ClusterIp) => (service.internal_policy, 0),
        _ => (service.external_policy, abi::Frontend::EXTERNAL),
    };
    let local = if policy == TrafficPolicy::Local { abi::Frontend::LOCAL_POLICY } else { 0 };
    let is_checked = kind == Some(FrontendKind::LoadBalancer) && !service.source_ranges.is_empty();
    external | local | if is_checked { abi::Frontend::SOURCE_RANGES } else { 0 }
}

/// Where the node port is served, if there is one.
fn node_port_addresses(family: IpFamily, service: &Service, node: &Node) -> impl Iterator<Item = SocketAddr> {
    service.node_port.into_iter().flat_map(move |port| {
        let ours = node.node_port_addresses.iter().filter(move |&&address| IpFamily::of(address) == family);
        ours.map(move |&address| SocketAddr::new(address, port))
    })
}

/// Every endpoint of a service with the sets that it is in.
fn backends(service: &Service, node: &Node, has_local_policy: bool) -> Vec<(SocketAddr, Backend)> {
    let mut backends = Vec::with_capacity(service.endpoints.len());
    let (mut has_ready, mut has_local_ready) = (false, false);
    for (&address, Endpoint { weight, node: of, conditions }) in &service.endpoints {
        let is_on_node = node.has_endpoint(address.ip(), of.as_deref());
        has_ready |= conditions.ready;
        has_local_ready |= conditions.ready && is_on_node;
        backends.push((address, Backend { weight: *weight, is_on_node, in_cluster: false, in_local: false }));
    }
    for ((_, backend), endpoint) in backends.iter_mut().zip(service.endpoints.values()) {
        let takes_new = |has_ready| backend.weight.get() > 0 && is_eligible(endpoint.conditions, has_ready);
        backend.in_cluster = takes_new(has_ready);
        backend.in_local = has_local_policy && backend.is_on_node && takes_new(has_local_ready);
    }
    backends
}

/// Where some endpoint is ready the ready ones take new flows, elsewhere those that serve until they end.
fn is_eligible(Conditions { ready, serving, terminating }: Conditions, has_ready: bool) -> bool {
    if has_ready { ready } else { serving && terminating }
}

impl Node {
    /// Whether an endpoint is on this node. Where the endpoint says its node and ours is known, that decides; else the node has its
    /// address, or reaches it through a pod-facing device.
    pub fn has_endpoint(&self, address: IpAddr, node_name: Option<&str>) -> bool {
        match (node_name, self.name.as_deref()) {
            (Some(theirs), Some(ours)) => theirs == ours,
            _ => self.addresses.contains(&address) || self.pod_subnets.iter().any(|subnet| subnet.contains(&address)),
        }
    }
}
