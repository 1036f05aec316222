//! Services as the reference sees them: which addresses are theirs, and which endpoints take a new flow.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use super::{Protocol, packet::Tuple};

/// A service, in the terms of a services file.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its cluster addresses.
    pub addresses: Vec<IpAddr>,
    /// Addresses that are routed here from outside.
    pub external_addresses: Vec<IpAddr>,
    /// Addresses that a load balancer routes here.
    pub load_balancer_addresses: Vec<IpAddr>,
    /// What it serves.
    pub ports: Vec<ServicePort>,
    /// For clients from outside: node ports, external and load balancer addresses.
    pub external_policy: Policy,
    /// For cluster addresses.
    pub internal_policy: Policy,
    /// Who may use the load balancer addresses; none: everyone. Of both families, or of none.
    pub source_ranges: Vec<(IpAddr, u8)>,
    /// For how many seconds a client's new flows go where its last one went.
    pub affinity: Option<u32>,
    /// How one of several endpoints is chosen; the reference takes any choice for right.
    pub algorithm: &'static str,
    /// Who serves it.
    pub endpoints: Vec<Endpoint>,
}

/// A port of a service.
#[derive(Clone, Copy, Debug)]
pub struct ServicePort {
    /// How it is spoken to.
    pub protocol: Protocol,
    /// The port of its addresses.
    pub port: u16,
    /// The port of its endpoints.
    pub target_port: u16,
    /// The port of the node's addresses.
    pub node_port: Option<u16>,
}

/// An endpoint of a service.
#[derive(Clone, Copy, Debug)]
pub struct Endpoint {
    /// Where it is.
    pub address: IpAddr,
    /// Its share of new flows.
    pub weight: u16,
    /// Whether it is on this node.
    pub is_on_node: bool,
    /// How it is.
    pub condition: Condition,
}

/// The conditions of an endpoint (Kubernetes, `discovery/v1`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Ready, and so serving.
    Ready,
    /// Neither ready nor serving.
    NotReady,
    /// On its way out, and still serving.
    ServingTerminating,
    /// On its way out, and no longer serving.
    Terminating,
}

/// Which endpoints serve a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// All.
    Cluster,
    /// Those on this node.
    Local,
}

/// What an address of a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One of its cluster addresses.
    Cluster,
    /// One of the node's addresses, with the NodePort.
    NodePort,
    /// One of its external addresses.
    External,
    /// One of its load balancer addresses.
    LoadBalancer,
}

/// Where clients send to.
#[derive(Clone, Copy, Debug)]
pub struct Frontend {
    /// Which service's it is.
    pub service: usize,
    /// Which of the service's ports.
    pub port: usize,
    /// Which of its addresses.
    pub kind: Kind,
}

/// Whose backend it is, and where: as long as this is there the backend is the same one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Backend {
    /// The service, by its name, protocol and port.
    pub service: (String, Protocol, u16),
    /// Where it listens.
    pub address: SocketAddr,
}

/// The endpoints that may take a new flow.
#[derive(Debug)]
pub enum Eligible<'a> {
    /// Any of these.
    Some(Vec<&'a Endpoint>),
    /// There are only others, on other nodes.
    Elsewhere,
    /// There are none.
    None,
}

impl Service {
    /// The endpoints of one family that may take a new flow.
    pub fn eligible(&self, is_ipv4: bool, policy: Policy) -> Eligible<'_> {
        let of_family: Vec<_> = self.endpoints.iter().filter(|it| it.address.is_ipv4() == is_ipv4).collect();
        let cluster = takers(&of_family);
        let chosen = match policy {
            Policy::Cluster => return if cluster.is_empty() { Eligible::None } else { Eligible::Some(cluster) },
            // Decided among those on this node alone.
            Policy::Local => takers(&of_family.into_iter().filter(|it| it.is_on_node).collect::<Vec<_>>()),
        };
        match (chosen.is_empty(), cluster.is_empty()) {
            (false, _) => Eligible::Some(chosen),
            (true, false) => Eligible::Elsewhere,
            (true, true) => Eligible::None,
        }
    }

    /// The policy of a frontend. What is for clients outside of the cluster is open to those on this node.
    pub fn policy(&self, kind: Kind, is_client_on_node: bool) -> Policy {
        match kind {
            Kind::Cluster => self.internal_policy,
            _ if is_client_on_node => Policy::Cluster,
            _ => self.external_policy,
        }
    }

    /// Whether its source ranges, if it has any, let a client in.
    pub fn admits(&self, client: IpAddr) -> bool {
        self.source_ranges.is_empty() || self.source_ranges.iter().any(|&range| contains(range, client))
    }

    /// What a backend of one of its ports is known by.
    pub fn backend(&self, port: &ServicePort, address: IpAddr) -> Backend {
        Backend {
            service: (self.name.clone(), port.protocol, port.port),
            address: SocketAddr::new(address, port.target_port),
        }
    }

    fn addresses(&self, node: &[IpAddr]) -> Vec<(Kind, IpAddr)> {
        let all = [
            (Kind::Cluster, &self.addresses[..]),
            (Kind::External, &self.external_addresses),
            (Kind::LoadBalancer, &self.load_balancer_addresses),
            (Kind::NodePort, node),
        ];
        all.into_iter().flat_map(|(kind, addresses)| addresses.iter().map(move |&address| (kind, address))).collect()
    }
}

/// Those that are ready; if none is, those that are terminating and still serve. Of these all that have weight.
fn takers<'a>(endpoints: &[&'a Endpoint]) -> Vec<&'a Endpoint> {
    let in_condition = |condition| endpoints.iter().copied().filter(move |it| it.condition == condition);
    let is_any_ready = in_condition(Condition::Ready).next().is_some();
    let condition = if is_any_ready { Condition::Ready } else { Condition::ServingTerminating };
    in_condition(condition).filter(|it| it.weight > 0).collect()
}

fn contains((network, length): (IpAddr, u8), address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32_u32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    };
    let ((network, size), (address, other)) = (bits(network), bits(address));
    let rest = size - u32::from(length);
    size == other && network.checked_shr(rest) == address.checked_shr(rest)
}

/// Every frontend of these services, on a node with these addresses.
pub fn frontends(services: &[Service], node: &[IpAddr]) -> BTreeMap<(Protocol, SocketAddr), Frontend> {
    let mut frontends = BTreeMap::new();
    for (service, it) in services.iter().enumerate() {
        for (kind, address) in it.addresses(node) {
            for (port, it) in it.ports.iter().enumerate() {
                let number = if kind == Kind::NodePort { it.node_port } else { Some(it.port) };
                if let Some(number) = number {
                    frontends.insert((it.protocol, SocketAddr::new(address, number)), Frontend { service, port, kind });
                }
            }
        }
    }
    frontends
}

/// Every address that is a service's and not the node's; of cluster addresses `true`.
pub fn vips(services: &[Service]) -> BTreeMap<IpAddr, bool> {
    let all = services.iter().flat_map(|service| service.addresses(&[]));
    all.map(|(kind, address)| (address, kind == Kind::Cluster)).collect()
}

/// Every backend of these services, of whatever condition and weight.
pub fn backends(services: &[Service]) -> impl Iterator<Item = Backend> {
    services.iter().flat_map(|service| {
        let of_port = move |port| service.endpoints.iter().map(move |endpoint| service.backend(port, endpoint.address));
        service.ports.iter().flat_map(of_port)
    })
}

impl Frontend {
    /// Whether this is open to all in spite of source ranges.
    pub fn is_open_to_all(&self, is_client_on_node: bool) -> bool {
        self.kind != Kind::LoadBalancer || is_client_on_node
    }
}

impl Tuple {
    /// The key of the frontend that a packet is for.
    pub const fn frontend(&self) -> (Protocol, SocketAddr) {
        (self.protocol, self.destination)
    }
}

/// The services file that says this, on a node called `node`.
pub fn yaml(services: &[Service], node: &str) -> String {
    let list =
        |addresses: &[IpAddr]| addresses.iter().map(|address| format!("\"{address}\"")).collect::<Vec<_>>().join(", ");
    let mut file = String::from(if services.is_empty() { "services: []\n" } else { "services:\n" });
    for service in services {
        let has_node_port = service.ports.iter().any(|port| port.node_port.is_some());
        let kind = match (service.load_balancer_addresses.is_empty(), has_node_port) {
            (false, _) => "LoadBalancer",
            (true, true) => "NodePort",
            (true, false) => "ClusterIP",
        };
        let _ = writeln!(
            file,
            "  - name: {}\n    type: {kind}\n    addresses: [{}]\n    internalTrafficPolicy: {:?}\n    algorithm: {}",
            service.name,
            list(&service.addresses),
            service.internal_policy,
            service.algorithm
        );
        if kind != "ClusterIP" || !service.external_addresses.is_empty() {
            let _ = writeln!(file, "    externalTrafficPolicy: {:?}", service.external_policy);
        }
        let others =
            [("externalIPs", &service.external_addresses), ("loadBalancerIPs", &service.load_balancer_addresses)];
        for (field, addresses) in others.into_iter().filter(|(_, addresses)| !addresses.is_empty()) {
            let _ = writeln!(file, "    {field}: [{}]", list(addresses));
        }
        if !service.source_ranges.is_empty() {
            let ranges = service.source_ranges.iter().map(|(network, length)| format!("\"{network}/{length}\""));
            let _ = writeln!(file, "    loadBalancerSourceRanges: [{}]", ranges.collect::<Vec<_>>().join(", "));
        }
        if let Some(seconds) = service.affinity {
            let _ = writeln!(
                file,
                "    sessionAffinity: ClientIP\n    sessionAffinityConfig: {{ clientIP: {{ timeoutSeconds: {seconds} }} }}"
            );
        }
        file += "    ports:\n";
        for ServicePort { protocol, port, target_port, node_port } in &service.ports {
            let node_port = node_port.map_or(String::new(), |port| format!(", nodePort: {port}"));
            let _ = writeln!(
                file,
                "      - {{ name: {}-{port}, protocol: {}, port: {port}, targetPort: {target_port}{node_port} }}",
                protocol.name().to_lowercase(),
                protocol.name(),
            );
        }
        file += if service.endpoints.is_empty() { "    backends: []\n" } else { "    backends:\n" };
        for Endpoint { address, weight, is_on_node, condition } in &service.endpoints {
            let node = if *is_on_node { node } else { "elsewhere" };
            let conditions = match condition {
                Condition::Ready => "ready: true, serving: true, terminating: false",
                Condition::NotReady => "ready: false, serving: false, terminating: false",
                Condition::ServingTerminating => "ready: false, serving: true, terminating: true",
                Condition::Terminating => "ready: false, serving: false, terminating: true",
            };
            let _ = writeln!(
                file,
                "      - {{ address: \"{address}\", weight: {weight}, nodeName: {node}, conditions: {{ {conditions} }} }}",
            );
        }
    }
    file
}
