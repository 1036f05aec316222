//! Which endpoints take new flows, and on which addresses: pure functions over the model.
//!
//! [`decide`] makes of the services of a cluster what one node's maps are to say; [`Decision::next`] does the same, but looks
//! at no more than what has changed. The rules are kube-proxy's (Kubernetes, `pkg/proxy/topology.go` and
//! `pkg/proxy/servicechangetracker.go`):
//!
//! - Policy Cluster: endpoints that are ready, of those the ones that are hinted for this node, or for its zone, if all of them
//!   have such hints and one is for us; if none is ready on any node, all that are serving and terminating.
//! - Policy Local: the same of those on this node, decided by itself.
//! - Weight 0 takes an endpoint out of whichever set it is in; it does not make another endpoint eligible.
//! - Cluster IPs follow the internal policy, all other frontends the external one.

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::{OrdMap, OrdSet, ordmap::DiffItem};
use ipnet::IpNet;
use lb_common::abi;

use crate::model::{
    Algorithm, Claim, Conditions, Desired, Endpoint, Frontend, FrontendKind, Hints, IpFamily, NodePort, Service,
    ServiceName, TrafficPolicy, Weight,
};

/// What policy has to know of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its name, as endpoints say on which node they are; `None`: not known.
    pub name: Option<Arc<str>>,
    /// The zone that it is in, as endpoints say for which zones they are; `None`: not known.
    pub zone: Option<Arc<str>>,
    /// All of its addresses but loopback and link-local ones.
    pub addresses: BTreeSet<IpAddr>,
    /// Those of them that node ports are served on, and the unspecified ones where sockets of this node find them at localhost.
    pub node_port_addresses: BTreeSet<IpAddr>,
    /// The unspecified ones that stand for all addresses in bind(2) alone: node ports are served, but not at localhost.
    pub bind_only: BTreeSet<IpAddr>,
    /// The subnets behind its pod-facing devices, without a gateway in between.
    pub pod_subnets: BTreeSet<IpNet>,
}

/// What the maps of one node are to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decided {
    /// The services.
    pub services: OrdMap<ServiceName, Arc<Serving>>,
    /// Every address and port that is served, node ports among them.
    pub frontends: OrdMap<Frontend, Route>,
    /// The ranges of clients that services with [`abi::Frontend::SOURCE_RANGES`] let in.
    pub sources: OrdSet<(ServiceName, IpNet)>,
    /// The addresses that are services' alone, with the value of `VIPS4` and `VIPS6`.
    pub vips: OrdMap<IpAddr, u32>,
}

/// What was decided, and of what.
#[derive(Clone, Debug, Default)]
pub struct Decision {
    desired: Arc<Desired>,
    node: Arc<Node>,
    decided: Arc<Decided>,
}

/// Whose traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// That of clients that send to cluster IPs.
    Inside,
    /// That of all others.
    Outside,
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
    decided.follow(&Desired::default(), desired, node);
    decided
}

impl Decision {
    /// What is decided of these services on this node, of which only those are looked at that have changed; all, if the node has.
    #[must_use]
    pub fn next(&self, desired: &Arc<Desired>, node: &Arc<Node>) -> Self {
        let decided = if *node == self.node {
            let mut decided = Decided::clone(&self.decided);
            decided.follow(&self.desired, desired, node);
            decided
        } else {
            decide(desired, node)
        };
        Self { desired: Arc::clone(desired), node: Arc::clone(node), decided: Arc::new(decided) }
    }

    /// The services.
    pub fn desired(&self) -> &Arc<Desired> {
        &self.desired
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// What the maps are to say.
    pub fn decided(&self) -> &Arc<Decided> {
        &self.decided
    }

    /// How many services of a family have endpoints, but none on this node, although their clients inside of the cluster, or
    /// those outside of it, get no others.
    pub fn without_local(&self, family: IpFamily, clients: Clients) -> usize {
        let wanted = match clients {
            Clients::Inside => abi::Frontend::LOCAL_POLICY,
            Clients::Outside => abi::Frontend::LOCAL_POLICY | abi::Frontend::EXTERNAL,
        };
        let is_wanted = |flags| flags & (abi::Frontend::LOCAL_POLICY | abi::Frontend::EXTERNAL) == wanted;
        let services = self.desired.services().iter().filter(|(name, _)| name.family == family);
        let local = services.filter(|(_, service)| all_flags(service).any(is_wanted));
        let lacks = |serving: &Arc<Serving>| serving.has_cluster() && !serving.has_local();
        local.filter(|(name, _)| self.decided.services.get(*name).is_some_and(lacks)).count()
    }
}

impl Serving {
    /// Whether an endpoint is among its backends.
    pub fn has_backend(&self, address: SocketAddr) -> bool {
        self.backends.binary_search_by_key(&address, |&(address, _)| address).is_ok()
    }

    /// Whether any backend takes new flows by policy Cluster.
    fn has_cluster(&self) -> bool {
        self.backends.iter().any(|(_, backend)| backend.in_cluster)
    }

    /// Whether any backend takes new flows by policy Local.
    pub fn has_local(&self) -> bool {
        self.backends.iter().any(|(_, backend)| backend.in_local)
    }
}

impl Decided {
    /// Makes of what was decided of the services as they were what is decided of them as they are.
    fn follow(&mut self, before: &Desired, after: &Desired, node: &Node) {
        let mut touched = BTreeSet::new();
        for change in before.services().diff(after.services()) {
            let (name, old, new) = match change {
                DiffItem::Add(name, new) => (name, None, Some(new)),
                DiffItem::Update { old: (_, old), new: (name, new) } => (name, Some(old), Some(new)),
                DiffItem::Remove(name, old) => (name, Some(old), None),
            };
            let addresses = [old, new].into_iter().flatten().flat_map(|service| addresses(name, service, node));
            touched.extend(addresses.map(|address| Frontend { address, protocol: name.protocol }));
            old.into_iter().flat_map(|service| sources(name, service)).for_each(|source| {
                self.sources.remove(&source);
            });
            self.sources.extend(new.into_iter().flat_map(|service| sources(name, service)));
            match new {
                Some(service) => self.services.insert(name.clone(), Arc::new(serving(service, node))),
                None => self.services.remove(name),
            };
        }
        for &frontend in &touched {
            match route(after, frontend, node) {
                Some(route) => self.frontends.insert(frontend, route),
                None => self.frontends.remove(&frontend),
            };
        }
        for address in touched.into_iter().map(|frontend| frontend.address.ip()).collect::<BTreeSet<_>>() {
            match vip(after, address, node) {
                Some(flags) => self.vips.insert(address, flags),
                None => self.vips.remove(&address),
            };
        }
    }
}

/// Every address and port of a service on this node, node ports among them.
fn addresses(name: &ServiceName, service: &Service, node: &Node) -> impl Iterator<Item = SocketAddr> {
    let node_ports = service.node_port.into_iter().flat_map(move |port| {
        let ours = node.node_port_addresses.iter().chain(&node.bind_only);
        let of_family = ours.filter(|&&address| IpFamily::of(address) == name.family);
        of_family.map(move |&address| SocketAddr::new(address, port))
    });
    service.frontends.keys().copied().chain(node_ports)
}

/// The ranges of clients that a service lets in, where it asks for that.
fn sources(name: &ServiceName, service: &Service) -> impl Iterator<Item = (ServiceName, IpNet)> {
    let is_checked = all_flags(service).any(|flags| flags & abi::Frontend::SOURCE_RANGES != 0);
    let ranges = service.source_ranges.iter().filter(move |_| is_checked);
    ranges.filter(|range| IpFamily::of(range.addr()) == name.family).map(|&range| (name.clone(), range))
}

fn serving(service: &Service, node: &Node) -> Serving {
    let has_local_policy = all_flags(service).any(|flags| flags & abi::Frontend::LOCAL_POLICY != 0);
    Serving {
        algorithm: service.algorithm,
        affinity: service.affinity,
        backends: backends(service, node, has_local_policy),
    }
}

/// Where a frontend leads to. What a service says of an address by name comes before what all nodes' addresses serve.
fn route(desired: &Desired, frontend: Frontend, node: &Node) -> Option<Route> {
    let Frontend { address, protocol } = frontend;
    let port = NodePort { port: address.port(), protocol, family: IpFamily::of(address.ip()) };
    let is_bind_only = node.bind_only.contains(&address.ip());
    let of_node_port = || {
        let is_ours = is_bind_only || node.node_port_addresses.contains(&address.ip());
        desired.owner(Claim::NodePort(port)).filter(|_| is_ours)
    };
    let name = desired.owner(Claim::Frontend(frontend)).or_else(of_node_port)?;
    let service = desired.services().get(name)?;
    let flags = frontend_flags(service, service.frontends.get(&address).copied());
    let bind_only = if is_bind_only { abi::Frontend::BIND_ONLY } else { 0 };
    Some(Route { service: name.clone(), flags: flags | bind_only })
}

/// The value of `VIPS4` and `VIPS6`, if the address is services' alone. One that the node has itself is the stack's, too,
/// which answers on the ports that no service has.
fn vip(desired: &Desired, address: IpAddr, node: &Node) -> Option<u32> {
    let is_service = desired.is_frontend(address) && !node.addresses.contains(&address);
    is_service.then(|| if desired.is_cluster_ip(address) { abi::VipKey::REFUSES } else { 0 })
}

/// What the kernel has to know of a frontend; `None`: of a node port.
fn frontend_flags(service: &Service, kind: Option<FrontendKind>) -> u32 {
    let (policy, external) = match kind {
        Some(FrontendKind::ClusterIp) => (service.internal_policy, 0),
        _ => (service.external_policy, abi::Frontend::EXTERNAL),
    };
    let local = if policy == TrafficPolicy::Local { abi::Frontend::LOCAL_POLICY } else { 0 };
    let is_checked = kind == Some(FrontendKind::LoadBalancer) && !service.source_ranges.is_empty();
    let node_port = if kind.is_none() { abi::Frontend::NODE_PORT } else { 0 };
    external | local | node_port | if is_checked { abi::Frontend::SOURCE_RANGES } else { 0 }
}

/// What the kernel has to know of each frontend of a service, its node port among them.
fn all_flags(service: &Service) -> impl Iterator<Item = u32> {
    let kinds = service.frontends.values().map(|&kind| Some(kind)).chain(service.node_port.map(|_| None));
    kinds.map(|kind| frontend_flags(service, kind))
}

/// Every endpoint of a service with the sets that it is in.
fn backends(service: &Service, node: &Node, has_local_policy: bool) -> Vec<(SocketAddr, Backend)> {
    let mut backends = Vec::with_capacity(service.endpoints.len());
    let (mut has_ready, mut has_local_ready) = (false, false);
    for (&address, endpoint) in &service.endpoints {
        let is_on_node = node.has_endpoint(address.ip(), endpoint.node.as_deref());
        has_ready |= endpoint.conditions.ready;
        has_local_ready |= endpoint.conditions.ready && is_on_node && node.claims(endpoint);
        backends.push((address, Backend { weight: endpoint.weight, is_on_node, in_cluster: false, in_local: false }));
    }
    let topology = Topology::of(service, node);
    for ((_, backend), endpoint) in backends.iter_mut().zip(service.endpoints.values()) {
        let takes_new = |has_ready| backend.weight.get() > 0 && is_eligible(endpoint.conditions, has_ready);
        backend.in_cluster = takes_new(has_ready) && (!has_ready || topology.prefers(endpoint, node));
        let is_local = has_local_policy && backend.is_on_node && node.claims(endpoint);
        backend.in_local = is_local && takes_new(has_local_ready);
    }
    backends
}

/// What hints of endpoints say to this node.
#[derive(Clone, Copy, Debug)]
enum Topology {
    /// Nothing.
    Anywhere,
    /// It has endpoints of its own zone.
    SameZone,
    /// It has endpoints of its own.
    SameNode,
}

impl Topology {
    /// Hints count where all endpoints that are ready have them, and one of those is for us.
    fn of(service: &Service, node: &Node) -> Self {
        let says = |preference: Self, has: fn(&Hints) -> bool| {
            let mut ready = service.endpoints.values().filter(|endpoint| endpoint.conditions.ready);
            let all_have = ready.clone().all(|endpoint| endpoint.hints.as_deref().is_some_and(has));
            all_have && ready.any(|endpoint| preference.prefers(endpoint, node))
        };
        if says(Self::SameNode, |hints| !hints.nodes.is_empty()) {
            Self::SameNode
        } else if says(Self::SameZone, |hints| !hints.zones.is_empty()) {
            Self::SameZone
        } else {
            Self::Anywhere
        }
    }

    fn prefers(self, endpoint: &Endpoint, node: &Node) -> bool {
        let (ours, theirs) = match self {
            Self::Anywhere => return true,
            Self::SameZone => (&node.zone, endpoint.hints.as_deref().map(|hints| &hints.zones)),
            Self::SameNode => (&node.name, endpoint.hints.as_deref().map(|hints| &hints.nodes)),
        };
        ours.as_ref().zip(theirs).is_some_and(|(ours, theirs)| theirs.contains(ours))
    }
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

    /// Whether an endpoint that is on this node counts for policy Local. In a cluster one does that says so itself (Kubernetes,
    /// `addEndpoints` in `pkg/proxy/endpointslicecache.go`), as far as our name is known.
    pub fn claims(&self, endpoint: &Endpoint) -> bool {
        endpoint.node.is_some() || self.name.is_none() || !endpoint.is_local_by_name
    }
}
