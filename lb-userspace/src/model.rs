//! The desired state, validated: what every source feeds and what planning reads.
//!
//! A service here is one port of one protocol in one IP family. That is the unit which has its own
//! backend set in the kernel; a service in a file, or in Kubernetes, becomes several of these.
//! The model derives no `Deserialize`: sources parse their own wire formats and convert.
//!
//! A state is a value, and a changed copy of it shares all that did not change. So what differs between two is found
//! by looking at no more than that, however large they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::{OrdMap, ordmap::DiffItem};
use ipnet::IpNet;
pub use lb_common::select::Algorithm;
use lb_common::{net, select};
use serde::{Deserialize, Serialize};

/// All services that are wanted, of the whole cluster: what becomes of them on this node is [`crate::policy`]'s.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    services: OrdMap<ServiceName, Arc<Service>>,
    /// Those who want each thing that only one can have, the one that has it first. Never empty.
    claims: OrdMap<Claim, Vec<Claimant>>,
    addresses: OrdMap<IpAddr, Uses>,
    /// Those who want to be asked for on each port, as in `claims`; each port of a Service is one.
    health_claims: OrdMap<u16, Vec<Claimant>>,
    health_checks: OrdMap<u16, Arc<str>>,
}

/// Of several that want the same, the first has it: the oldest, and of those of one age the first by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claimant {
    created: u64,
    name: ServiceName,
}

/// How many frontends an address has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Uses {
    all: usize,
    /// Those that are cluster IPs.
    cluster_ip: usize,
}

/// What a service is known by, across reloads and in every table that a person reads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    /// The service's name as its source has it.
    pub name: Arc<str>,
    /// The port's name, or its number where it has none.
    pub port: Arc<str>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The family of its addresses and endpoints.
    pub family: IpFamily,
}

/// One port of a service in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Where clients send to, all of the name's family. Empty only where there is a node port.
    pub frontends: BTreeMap<SocketAddr, FrontendKind>,
    /// The port that every node serves it on, on its own addresses.
    pub node_port: Option<u16>,
    /// Which endpoints the clients of all frontends but cluster IPs get.
    pub external_policy: TrafficPolicy,
    /// Which endpoints the clients of cluster IPs get.
    pub internal_policy: TrafficPolicy,
    /// How a backend is chosen for a new flow.
    pub algorithm: Algorithm,
    /// For how many seconds a client's new flows go where its last one went; 0: no session affinity.
    pub affinity: u32,
    /// The clients that load balancer addresses serve; empty: all. Those of the other family count, too: where only IPv4
    /// ranges are given, nobody is let in over IPv6.
    pub source_ranges: BTreeSet<IpNet>,
    /// Address and port of each endpoint, of the name's family.
    pub endpoints: BTreeMap<SocketAddr, Endpoint>,
    /// The port that a load balancer asks on whether this node has endpoints of it, where one does.
    pub health_check: Option<u16>,
    /// When it was made, in seconds since 1970, where its source knows that; 0 elsewhere.
    pub created: u64,
}

/// What kind of address a frontend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FrontendKind {
    /// The service's own address inside of the cluster.
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    /// An address that somebody brings to the nodes.
    #[serde(rename = "ExternalIP")]
    ExternalIp,
    /// An address that a load balancer in front of the nodes gave the service.
    LoadBalancer,
}

/// Which endpoints take a new flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// Those of all nodes.
    #[default]
    Cluster,
    /// Those on the node that the flow comes to.
    Local,
}

/// What is known of one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its share of new flows.
    pub weight: Weight,
    /// The node that it is on, where its source says so.
    pub node: Option<Arc<str>>,
    /// How it is.
    pub conditions: Conditions,
    /// For whose clients it is meant before others, where its source says so.
    pub hints: Option<Arc<Hints>>,
    /// Whether policy Local takes it for a node's only where it says that it is there, as in Kubernetes.
    pub is_local_by_name: bool,
}

/// For whose clients an endpoint is meant (Kubernetes, `EndpointHints` of `discovery/v1`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Those in these zones.
    pub zones: BTreeSet<Arc<str>>,
    /// Those on these nodes.
    pub nodes: BTreeSet<Arc<str>>,
}

/// How an endpoint is (Kubernetes, `EndpointConditions` of `discovery/v1`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conditions {
    /// It is to have new flows.
    pub ready: bool,
    /// It answers, whether it is about to end or not.
    pub serving: bool,
    /// It is about to end.
    pub terminating: bool,
}

/// An address and port that clients send to, with the protocol that they speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// Address and port.
    pub address: SocketAddr,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
}

/// A port on all nodes, in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodePort {
    /// The number.
    pub port: u16,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The family of the nodes' addresses.
    pub family: IpFamily,
}

/// A backend's share of new flows relative to the others, 0 to 256; 0: no new flows (drain).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Weight(u16);

/// The transport protocol of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Transmission Control Protocol.
    Tcp,
    /// User Datagram Protocol.
    Udp,
    /// Stream Control Transmission Protocol.
    Sctp,
}

/// The IP family of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum IpFamily {
    /// IP version 4.
    #[serde(rename = "IPv4")]
    V4,
    /// IP version 6.
    #[serde(rename = "IPv6")]
    V6,
}

/// Two services want the same frontend, or the same node port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} is already taken by service {owner}")]
pub struct Taken {
    /// What both want.
    pub what: Claim,
    /// Who has it.
    pub owner: ServiceName,
}

/// A service that goes without something that another one has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lacking {
    service: ServiceName,
    taken: Taken,
}

/// What only one service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// A frontend.
    Frontend(Frontend),
    /// A node port.
    NodePort(NodePort),
}

impl Desired {
    /// Adds a service.
    ///
    /// # Errors
    ///
    /// If a frontend or the node port belongs to another service; then nothing is added.
    pub fn add(&mut self, name: ServiceName, service: Service) -> Result<(), Taken> {
        for (what, _) in claims(&name, &service) {
            if let Some(owner) = self.owner(what).filter(|&owner| *owner != name) {
                return Err(Taken { what, owner: owner.clone() });
            }
        }
        self.set(name, Arc::new(service));
        Ok(())
    }

    /// Adds a service, or replaces it. Where it wants what another one has, the older of the two has it, and the other one
    /// once that is gone.
    pub fn set(&mut self, name: ServiceName, service: Arc<Service>) {
        self.remove(&name);
        let claimant = Claimant { created: service.created, name: name.clone() };
        for (what, kind) in claims(&name, &service) {
            claimant.join(self.claims.entry(what).or_default());
            self.count(what, kind, |count| count + 1);
        }
        if let Some(port) = service.health_check {
            claimant.join(self.health_claims.entry(port).or_default());
            self.settle_health_check(port);
        }
        self.services.insert(name, service);
    }

    /// Removes a service, if it is there.
    pub fn remove(&mut self, name: &ServiceName) {
        let Some(service) = self.services.remove(name) else { return };
        for (what, kind) in claims(name, &service) {
            if let Some(claimants) = self.claims.get_mut(&what) {
                claimants.retain(|claimant| claimant.name != *name);
                if claimants.is_empty() {
                    self.claims.remove(&what);
                }
            }
            self.count(what, kind, |count| count.saturating_sub(1));
        }
        if let Some(port) = service.health_check
            && let Some(claimants) = self.health_claims.get_mut(&port)
        {
            claimants.retain(|claimant| claimant.name != *name);
            if claimants.is_empty() {
                self.health_claims.remove(&port);
            }
            self.settle_health_check(port);
        }
    }

    fn settle_health_check(&mut self, port: u16) {
        match self.health_claims.get(&port).and_then(|claimants| claimants.first()) {
            Some(first) => self.health_checks.insert(port, Arc::clone(&first.name.name)),
            None => self.health_checks.remove(&port),
        };
    }

    fn count(&mut self, what: Claim, kind: Option<FrontendKind>, change: fn(usize) -> usize) {
        let Claim::Frontend(Frontend { address, .. }) = what else { return };
        let uses = self.addresses.entry(address.ip()).or_default();
        uses.all = change(uses.all);
        if kind == Some(FrontendKind::ClusterIp) {
            uses.cluster_ip = change(uses.cluster_ip);
        }
        if uses.all == 0 {
            self.addresses.remove(&address.ip());
        }
    }

    /// Every service, in the order of names.
    pub fn services(&self) -> &OrdMap<ServiceName, Arc<Service>> {
        &self.services
    }

    /// Every port of what its source calls so, of each protocol and family.
    pub fn ports_of(&self, name: &Arc<str>) -> impl Iterator<Item = (&ServiceName, &Arc<Service>)> {
        // Nothing comes before this but what is called otherwise.
        let first =
            ServiceName { name: Arc::clone(name), port: "".into(), protocol: Protocol::Tcp, family: IpFamily::V4 };
        self.services.range(first..).take_while(move |(of, _)| of.name == *name)
    }

    /// Only the services that are named so.
    #[must_use]
    pub fn filter(&self, is_meant: impl Fn(&ServiceName) -> bool) -> Self {
        let mut some = Self::default();
        for (name, service) in self.services.iter().filter(|(name, _)| is_meant(name)) {
            some.set(name.clone(), Arc::clone(service));
        }
        some
    }

    /// All services, with only the endpoints that are at these addresses.
    #[must_use]
    pub fn with_endpoints(&self, is_meant: impl Fn(&ServiceName, SocketAddr) -> bool) -> Self {
        let mut some = Self::default();
        for (name, service) in &self.services {
            let mut service = Service::clone(service);
            service.endpoints.retain(|&address, _| is_meant(name, address));
            some.set(name.clone(), Arc::new(service));
        }
        some
    }

    /// Makes all ports of what its source calls so what they are in another state.
    pub fn copy(&mut self, name: &Arc<str>, from: &Self) {
        let gone = self.ports_of(name).map(|(name, _)| name).filter(|&name| !from.services.contains_key(name));
        for name in gone.cloned().collect::<Vec<_>>() {
            self.remove(&name);
        }
        for (name, service) in from.ports_of(name) {
            self.set(name.clone(), Arc::clone(service));
        }
    }

    /// Whether another state says the same of all ports of what its source calls so.
    pub fn says_the_same(&self, other: &Self, name: &Arc<str>) -> bool {
        self.ports_of(name).eq(other.ports_of(name))
    }

    /// What its source calls the services that are otherwise in another state: those first that lose most endpoints until then, then those
    /// that gain the fewest, beyond so many as they have.
    pub fn names_by_growth(&self, other: &Self, size: impl Fn(&ServiceName, &Service) -> usize) -> Vec<Arc<str>> {
        let mut growth = BTreeMap::<&Arc<str>, i64>::new();
        for change in self.services.diff(&other.services) {
            let (name, change) = match change {
                DiffItem::Add(name, new) => (name, new.endpoints.len() as i64),
                DiffItem::Remove(name, old) => (name, -(size(name, old) as i64)),
                DiffItem::Update { old: (_, old), new: (name, new) } => {
                    (name, new.endpoints.len() as i64 - size(name, old) as i64)
                }
            };
            *growth.entry(&name.name).or_default() += change;
        }
        let mut names: Vec<_> = growth.into_iter().map(|(name, growth)| (growth, Arc::clone(name))).collect();
        names.sort();
        names.into_iter().map(|(_, name)| name).collect()
    }

    /// The ports on which load balancers ask for endpoints on this node, each with the name of the service.
    pub fn health_checks(&self) -> &OrdMap<u16, Arc<str>> {
        &self.health_checks
    }

    /// The service that has what only one can have.
    pub fn owner(&self, what: Claim) -> Option<&ServiceName> {
        Some(&self.claims.get(&what)?.first()?.name)
    }

    /// The services that want what an older one has, or one of the same age that comes first by name, as far as they did not in another
    /// state.
    pub fn lacking_since(&self, before: &Self) -> impl Iterator<Item = Lacking> {
        before.claims.diff(&self.claims).flat_map(|change| {
            let (what, old, new) = match change {
                DiffItem::Add(what, new) => (*what, &[][..], new),
                DiffItem::Update { old: (_, old), new: (what, new) } => (*what, &old[..], new),
                DiffItem::Remove(..) => return Vec::new(),
            };
            let Some((owner, others)) = new.split_first() else { return Vec::new() };
            let is_news = |it: &&Claimant| !old.iter().skip(1).any(|known| known == *it);
            let lacks =
                |it: &Claimant| Lacking { service: it.name.clone(), taken: Taken { what, owner: owner.name.clone() } };
            others.iter().filter(is_news).map(lacks).collect()
        })
    }

    /// Whether clients send to this address, on any port. The nodes' own addresses are not meant, which node ports are on.
    pub fn is_frontend(&self, address: IpAddr) -> bool {
        self.addresses.contains_key(&address)
    }

    /// Whether this is some service's own address inside of the cluster.
    pub fn is_cluster_ip(&self, address: IpAddr) -> bool {
        self.addresses.get(&address).is_some_and(|uses| uses.cluster_ip > 0)
    }
}

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "service {} goes without: {}, which comes first", self.service, self.taken)
    }
}

impl Claimant {
    /// Takes its place among others.
    fn join(&self, others: &mut Vec<Self>) {
        let place = others.partition_point(|other| other < self);
        others.insert(place, self.clone());
    }
}

/// What a service wants for itself; of frontends with their kind.
fn claims(name: &ServiceName, service: &Service) -> impl Iterator<Item = (Claim, Option<FrontendKind>)> {
    let &ServiceName { protocol, family, .. } = name;
    let node_port = service.node_port.map(|port| (Claim::NodePort(NodePort { port, protocol, family }), None));
    let frontends = service.frontends.iter();
    let frontends =
        frontends.map(move |(&address, &kind)| (Claim::Frontend(Frontend { address, protocol }), Some(kind)));
    frontends.chain(node_port)
}

impl Default for Service {
    fn default() -> Self {
        Self {
            frontends: BTreeMap::new(),
            node_port: None,
            external_policy: TrafficPolicy::Cluster,
            internal_policy: TrafficPolicy::Cluster,
            algorithm: DEFAULT_ALGORITHM,
            affinity: 0,
            source_ranges: BTreeSet::new(),
            endpoints: BTreeMap::new(),
            health_check: None,
            created: 0,
        }
    }
}

impl Endpoint {
    /// An endpoint of weight 1 that is ready, on whichever node.
    pub const READY: Self =
        Self { weight: Weight::ONE, node: None, conditions: Conditions::READY, hints: None, is_local_by_name: false };
}

impl Conditions {
    /// What an endpoint is that says nothing of itself.
    pub const READY: Self = Self { ready: true, serving: true, terminating: false };
}

impl Weight {
    /// The weight of a backend that says none.
    pub const ONE: Self = Self(1);
    /// The largest weight.
    pub const MAX: u16 = 256;

    /// A weight; `None` above [`Weight::MAX`].
    pub fn new(weight: u16) -> Option<Self> {
        (weight <= Self::MAX).then_some(Self(weight))
    }

    /// The number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl Protocol {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The IP protocol number.
    pub fn number(self) -> net::IpProto {
        match self {
            Self::Tcp => net::IpProto::TCP,
            Self::Udp => net::IpProto::UDP,
            Self::Sctp => net::IpProto::SCTP,
        }
    }
}

impl IpFamily {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} ({}, {})", self.name, self.port, self.protocol, self.family)
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.protocol, self.address)
    }
}

impl fmt::Display for NodePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} node port {}", self.protocol, self.port)
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frontend(frontend) => frontend.fmt(f),
            Self::NodePort(node_port) => node_port.fmt(f),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

impl fmt::Display for IpFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// The algorithm of a service that says none: kube-proxy's nftables and iptables modes choose at random too.
pub const DEFAULT_ALGORITHM: Algorithm = select::Algorithm::Random;

/// For how long session affinity lasts where nothing else is said (Kubernetes, `DefaultClientIPServiceAffinitySeconds`), in
/// seconds.
pub const DEFAULT_AFFINITY: u32 = 10_800;

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str, family: IpFamily) -> ServiceName {
        ServiceName { name: name.into(), port: "53".into(), protocol: Protocol::Udp, family }
    }

    fn service(frontends: &[&str], node_port: Option<u16>) -> Service {
        let frontends = frontends.iter().map(|address| (address.parse().unwrap(), FrontendKind::ClusterIp)).collect();
        Service { frontends, node_port, ..Service::default() }
    }

    #[test]
    fn the_addresses_of_frontends_are_known_whatever_their_port() {
        let mut desired = Desired::default();
        desired.add(name("dns", IpFamily::V4), service(&["10.0.0.5:53", "10.0.0.9:65535"], None)).unwrap();
        let addresses = ["10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.9", "10.0.0.10", "::1"];
        let found = addresses.map(|address| desired.is_frontend(address.parse().unwrap()));
        assert_eq!(found, [false, true, false, true, false, false]);
    }

    #[test]
    fn a_frontend_and_a_node_port_belong_to_one_service() {
        let mut desired = Desired::default();
        desired.add(name("a", IpFamily::V4), service(&["10.0.0.1:53"], Some(30053))).unwrap();
        let refused = |desired: &mut Desired, service| {
            let before = desired.clone();
            let error = desired.add(name("b", IpFamily::V4), service).unwrap_err();
            assert_eq!(*desired, before);
            error.to_string()
        };
        let error = refused(&mut desired, service(&["10.0.0.2:53", "10.0.0.1:53"], None));
        assert_eq!(error, "UDP 10.0.0.1:53 is already taken by service a:53 (UDP, IPv4)");
        let error = refused(&mut desired, service(&["10.0.0.2:53"], Some(30053)));
        assert_eq!(error, "UDP node port 30053 is already taken by service a:53 (UDP, IPv4)");
        desired.add(name("a", IpFamily::V6), service(&[], Some(30053))).unwrap();
    }

    #[test]
    fn of_several_that_want_the_same_the_oldest_has_it_until_it_goes() {
        let what = Claim::Frontend(Frontend { address: "10.0.0.1:53".parse().unwrap(), protocol: Protocol::Udp });
        let mut desired = Desired::default();
        let before = desired.clone();
        let aged =
            |created| Arc::new(Service { created, health_check: Some(31_000), ..service(&["10.0.0.1:53"], None) });
        for (service, created) in [("c", 7), ("b", 3), ("a", 7)] {
            desired.set(name(service, IpFamily::V4), aged(created));
        }
        let lacking: Vec<_> = desired.lacking_since(&before).map(|it| it.to_string()).collect();
        assert_eq!(
            lacking[0],
            "service a:53 (UDP, IPv4) goes without: UDP 10.0.0.1:53 is already taken by service b:53 (UDP, IPv4), which comes first"
        );
        assert_eq!((lacking.len(), desired.lacking_since(&desired.clone()).count()), (2, 0));
        let mut order = Vec::new();
        while let Some(owner) = desired.owner(what).cloned() {
            assert!(desired.is_frontend("10.0.0.1".parse().unwrap()));
            assert_eq!(desired.health_checks()[&31_000], owner.name);
            desired.remove(&owner);
            order.push(owner.name.to_string());
        }
        assert_eq!(order, ["b", "a", "c"]);
        assert_eq!(desired, before, "nothing is left");
    }
}
