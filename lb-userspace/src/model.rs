//! The desired state, validated: what every source feeds and what planning reads.
//!
//! A service here is one port of one protocol in one IP family. That is the unit which has its own
//! backend set in the kernel; a service in a file, or in Kubernetes, becomes several of these.
//! The model derives no `Deserialize`: sources parse their own wire formats and convert.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
pub use lb_common::select::Algorithm;
use lb_common::{net, select};
use serde::{Deserialize, Serialize};

/// All services that are wanted, of the whole cluster: what becomes of them on this node is [`crate::policy`]'s.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    services: BTreeMap<ServiceName, Service>,
    owners: BTreeMap<Frontend, ServiceName>,
    node_ports: BTreeMap<NodePort, ServiceName>,
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

/// What only one service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// A frontend.
    Frontend(Frontend),
    /// A node port.
    NodePort(NodePort),
}

impl Desired {
    /// Adds a service, or frontends and endpoints to it if it is there already.
    ///
    /// # Errors
    ///
    /// If a frontend or the node port belongs to another service; then nothing is added.
    pub fn add(&mut self, name: ServiceName, service: Service) -> Result<(), Taken> {
        let protocol = name.protocol;
        let node_port = service.node_port.map(|port| NodePort { port, protocol, family: name.family });
        for &address in service.frontends.keys() {
            let frontend = Frontend { address, protocol };
            free_for(&name, Claim::Frontend(frontend), self.owners.get(&frontend))?;
        }
        if let Some(node_port) = node_port {
            free_for(&name, Claim::NodePort(node_port), self.node_ports.get(&node_port))?;
            self.node_ports.insert(node_port, name.clone());
        }
        for &address in service.frontends.keys() {
            self.owners.insert(Frontend { address, protocol }, name.clone());
        }
        match self.services.entry(name) {
            Entry::Vacant(vacant) => {
                vacant.insert(service);
            }
            Entry::Occupied(mut occupied) => {
                let present = occupied.get_mut();
                present.frontends.extend(service.frontends);
                present.endpoints.extend(service.endpoints);
            }
        }
        Ok(())
    }

    /// Every service, in the order of names.
    pub fn services(&self) -> &BTreeMap<ServiceName, Service> {
        &self.services
    }

    /// Whether clients send to this address, on any port. The nodes' own addresses are not meant, which node ports are on.
    pub fn is_frontend(&self, address: IpAddr) -> bool {
        // Frontends are ordered by address, then port, then protocol, of which these are the first.
        let first = Frontend { address: SocketAddr::new(address, 0), protocol: Protocol::Tcp };
        self.owners.range(first..).next().is_some_and(|(frontend, _)| frontend.address.ip() == address)
    }

    /// Every frontend with the service that it belongs to; node ports are none yet.
    pub fn frontends(&self) -> &BTreeMap<Frontend, ServiceName> {
        &self.owners
    }
}

fn free_for(name: &ServiceName, what: Claim, owner: Option<&ServiceName>) -> Result<(), Taken> {
    match owner {
        Some(owner) if owner != name => Err(Taken { what, owner: owner.clone() }),
        _ => Ok(()),
    }
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
        }
    }
}

impl Endpoint {
    /// An endpoint of weight 1 that is ready, on whichever node.
    pub const READY: Self = Self { weight: Weight::ONE, node: None, conditions: Conditions::READY };
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
}
