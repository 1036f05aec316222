//! Whether a services file makes sense. Every mistake is reported, so nothing here stops at the first; what a mistake
//! leaves open is passed over or takes its default, as the state of a file with mistakes is never used.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, btree_map, hash_map::Entry},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    remarks::{Place, Position, Remarks},
    value::{self, ServiceType},
    wire::{self, At, Text},
};
use crate::model::{
    Claim, Conditions, DEFAULT_AFFINITY, DEFAULT_ALGORITHM, Desired, Endpoint, FrontendKind, IpFamily, Protocol,
    Service, ServiceName, Taken, TrafficPolicy, Weight,
};

/// Frontends of all services: addresses times ports. Without a bound a file of some kilobytes could ask for billions.
const MAX_FRONTENDS: usize = 1_000_000;
/// Backends of all services: backends times ports.
const MAX_BACKENDS: usize = 4_000_000;
/// Source ranges of all services: ranges times ports.
const MAX_SOURCE_RANGES: usize = 1_000_000;

/// What was found in a file.
#[derive(Default)]
pub(super) struct Findings {
    /// Its services; complete only if there is no mistake.
    pub(super) desired: Desired,
    /// What is wrong.
    pub(super) mistakes: Remarks,
    /// What is allowed, but hardly meant.
    pub(super) warnings: Remarks,
    names: HashMap<Arc<str>, Position>,
    /// All frontends, backends and source ranges so far.
    sizes: [usize; 3],
}

/// A service of the file, all ports and both families.
struct Whole {
    name: Arc<str>,
    addresses: BTreeMap<IpAddr, Listed>,
    ports: Vec<Port>,
    backends: BTreeMap<IpAddr, Endpoint>,
    /// What is the same for each port and family.
    common: Service,
}

/// An address with its place in the file.
struct Listed {
    kind: FrontendKind,
    field: &'static str,
    index: usize,
    at: Position,
}

#[expect(clippy::struct_field_names, reason = "the file's own names")]
struct Port {
    name: Arc<str>,
    number: u16,
    target: u16,
    protocol: Protocol,
    node_port: Option<u16>,
    index: usize,
    /// Where the node port is, if there is one.
    at: Position,
}

pub(super) fn validate(services: &[At<wire::Service>]) -> Findings {
    let mut findings = Findings::default();
    for (index, service) in services.iter().enumerate() {
        findings.service(Place { at: service.at, path: format_args!("services[{index}]") }, &service.value);
    }
    findings
}

impl Findings {
    fn service(&mut self, place: Place<'_>, service: &wire::Service) {
        let name = self.service_name(place, &service.name);
        let kind = self.read(place, "type", &service.kind, value::service_type).unwrap_or_default();
        let addresses = self.addresses(place, kind, service);
        let ports = self.ports(place, kind, service.ports.as_deref().unwrap_or_default());
        let algorithm = self.read(place, "algorithm", &service.algorithm, value::algorithm);
        let external = self.read(place, "externalTrafficPolicy", &service.external_traffic_policy, value::policy);
        let internal = self.read(place, "internalTrafficPolicy", &service.internal_traffic_policy, value::policy);
        let common = Service {
            algorithm: algorithm.unwrap_or(DEFAULT_ALGORITHM),
            external_policy: external.unwrap_or(TrafficPolicy::Cluster),
            internal_policy: internal.unwrap_or(TrafficPolicy::Cluster),
            affinity: self.affinity(place, service),
            source_ranges: self
                .source_ranges(place, service.load_balancer_source_ranges.as_deref().unwrap_or_default()),
            ..Service::default()
        };
        let backends = self.backends(place, service.backends.as_deref());
        let Some(name) = name else { return };
        let whole = Whole { name, addresses, ports, backends, common };
        self.warn_of_what_concerns_nothing(place, service, &whole);
        if self.has_room(place, &whole) {
            self.add(place, &whole, IpFamily::V4);
            self.add(place, &whole, IpFamily::V6);
        }
    }

    fn service_name(&mut self, place: Place<'_>, text: &Text) -> Option<Arc<str>> {
        let name = self.require(place, "name", text, value::name)?;
        match self.names.entry(name.clone()) {
            Entry::Vacant(vacant) => {
                vacant.insert(place.at);
                Some(name)
            }
            Entry::Occupied(first) => {
                let line = first.get().line;
                let place = Place { path: format_args!("{}.name", place.path), ..place };
                self.mistakes.add(place, format_args!("{name} is also the name of the service in line {line}"));
                None
            }
        }
    }

    /// The addresses of every kind.
    fn addresses(&mut self, place: Place<'_>, kind: ServiceType, service: &wire::Service) -> BTreeMap<IpAddr, Listed> {
        let mut known = BTreeMap::new();
        for (field, kind, texts) in [
            ("addresses", FrontendKind::ClusterIp, &service.addresses),
            ("externalIPs", FrontendKind::ExternalIp, &service.external_ips),
            ("loadBalancerIPs", FrontendKind::LoadBalancer, &service.load_balancer_ips),
        ] {
            for (index, text) in texts.iter().flatten().enumerate() {
                let at = text.at;
                let place = Place { at, path: format_args!("{}.{field}[{index}]", place.path) };
                let Some(address) = self.check(place, value::address(&text.value)) else { continue };
                match known.entry(address) {
                    btree_map::Entry::Vacant(vacant) => {
                        vacant.insert(Listed { kind, field, index, at });
                    }
                    btree_map::Entry::Occupied(first) if first.get().field == field => {
                        self.mistakes.add(place, format_args!("{address} is listed twice"));
                    }
                    btree_map::Entry::Occupied(first) => {
                        let first = first.get().field;
                        self.mistakes.add(place, format_args!("{address} is one of the {first}, too; say which it is"));
                    }
                }
            }
        }
        if let Some(first) = service.load_balancer_ips.iter().flatten().next()
            && kind != ServiceType::LoadBalancer
        {
            let place = Place { at: first.at, path: format_args!("{}.loadBalancerIPs", place.path) };
            self.mistakes.add(place, "only a service of `type: LoadBalancer` has them");
        }
        let has_node_port = service.ports.iter().flatten().any(|port| port.value.node_port.is_some());
        let lists = [&service.addresses, &service.external_ips, &service.load_balancer_ips];
        if lists.into_iter().flatten().all(Vec::is_empty) && !has_node_port {
            let place = Place { path: format_args!("{}.addresses", place.path), ..place };
            self.mistakes.add(place, "missing; a service has at least one address, of any kind, or a nodePort");
        }
        known
    }

    fn ports(&mut self, place: Place<'_>, kind: ServiceType, ports: &[At<wire::Port>]) -> Vec<Port> {
        let (mut known, mut names, mut numbers) = (Vec::new(), HashSet::new(), HashSet::new());
        let mut node_ports = HashSet::new();
        if ports.is_empty() {
            let place = Place { path: format_args!("{}.ports", place.path), ..place };
            self.mistakes.add(place, "missing; a service has at least one port");
        }
        for (index, At { value: port, at }) in ports.iter().enumerate() {
            let place = Place { at: *at, path: format_args!("{}.ports[{index}]", place.path) };
            let name = self.read(place, "name", &port.name, value::port_name);
            let number = self.require(place, "port", &port.port, value::port);
            let target = self.read(place, "targetPort", &port.target_port, value::port);
            let node_port = self.node_port(place, kind, &port.node_port);
            let protocol = match &port.protocol {
                None => Some(Protocol::Tcp),
                text => self.read(place, "protocol", text, value::protocol),
            };
            let (Some(number), Some(protocol)) = (number, protocol) else { continue };
            if protocol == Protocol::Sctp {
                self.stays(place, "targetPort", &port.target_port, target, number);
                self.stays(place, "nodePort", &port.node_port, node_port, number);
            }
            if let Some(name) = name.clone().filter(|name| !names.insert(name.clone())) {
                self.mistakes.add(place, format_args!("the service has another port called {name}"));
            } else if !numbers.insert((number, protocol)) {
                self.mistakes.add(place, format_args!("{protocol} port {number} is listed twice"));
            } else if let Some(twice) = node_port.filter(|&node_port| !node_ports.insert((node_port, protocol))) {
                self.mistakes.add(place, format_args!("{protocol} node port {twice} is listed twice"));
            } else {
                let name = name.unwrap_or_else(|| number.to_string().into());
                let at = port.node_port.as_ref().map_or(*at, |text| text.at);
                known.push(Port { name, number, target: target.unwrap_or(number), protocol, node_port, index, at });
            }
        }
        known
    }

    fn node_port(&mut self, place: Place<'_>, kind: ServiceType, text: &Text) -> Option<u16> {
        let at = text.as_ref().map_or(place.at, |text| text.at);
        let field = Place { at, path: format_args!("{}.nodePort", place.path) };
        match kind {
            ServiceType::ClusterIp if text.is_some() => {
                self.mistakes.add(field, "only a service of `type: NodePort` or `type: LoadBalancer` has one");
            }
            ServiceType::NodePort if text.is_none() => {
                self.mistakes.add(
                    field,
                    "missing; a service of `type: NodePort` has one for each port, as nobody here allocates them",
                );
            }
            _ => {}
        }
        self.read(place, "nodePort", text, value::port)
    }

    /// Whether a port of SCTP is left as it is.
    fn stays(&mut self, place: Place<'_>, field: &str, text: &Text, port: Option<u16>, number: u16) {
        if let (Some(text), Some(port)) = (text, port)
            && port != number
        {
            let place = Place { at: text.at, path: format_args!("{}.{field}", place.path) };
            let remark = format_args!(
                "{port} is not {number}: the checksum of SCTP is over the whole packet (RFC 9260, section 6.8), so Wharf \
                 changes no ports of it; leave {field} out, or make it {number}"
            );
            self.mistakes.add(place, remark);
        }
    }

    fn source_ranges(&mut self, place: Place<'_>, ranges: &[At<String>]) -> BTreeSet<IpNet> {
        let mut known = BTreeSet::new();
        for (index, text) in ranges.iter().enumerate() {
            let place = Place { at: text.at, path: format_args!("{}.loadBalancerSourceRanges[{index}]", place.path) };
            let Some(range) = self.check(place, value::range(&text.value)) else { continue };
            if !known.insert(range) {
                self.mistakes.add(place, format_args!("{range} is listed twice"));
            }
        }
        known
    }

    /// For how many seconds a client stays at its backend: said as Kubernetes says it, or in short.
    fn affinity(&mut self, place: Place<'_>, service: &wire::Service) -> u32 {
        let kind = self.read(place, "sessionAffinity", &service.session_affinity, value::session_affinity);
        let config = service.session_affinity_config.as_ref();
        let within = Place { path: format_args!("{}.sessionAffinityConfig.clientIP", place.path), ..place };
        let timeout = config.and_then(|config| config.value.client_ip.as_ref()).and_then(|client_ip| {
            self.read(within, "timeoutSeconds", &client_ip.timeout_seconds, value::timeout_seconds)
        });
        let short = self.read(place, "affinity", &service.affinity, value::affinity);
        match (&service.affinity, config) {
            (Some(text), _) if service.session_affinity.is_some() || config.is_some() => {
                let place = Place { at: text.at, path: format_args!("{}.affinity", place.path) };
                self.mistakes.add(place, "sessionAffinity says the same at greater length; leave one of them out");
            }
            (None, Some(config)) if kind != Some(true) => {
                let place = Place { at: config.at, path: format_args!("{}.sessionAffinityConfig", place.path) };
                self.mistakes.add(place, "without `sessionAffinity: ClientIP` there is nothing to configure");
            }
            _ => {}
        }
        match kind {
            Some(true) => timeout.unwrap_or(DEFAULT_AFFINITY),
            _ => short.unwrap_or_default(),
        }
    }

    fn backends(&mut self, place: Place<'_>, backends: Option<&[At<wire::Backend>]>) -> BTreeMap<IpAddr, Endpoint> {
        let mut known = BTreeMap::new();
        if backends.is_none() {
            let place = Place { path: format_args!("{}.backends", place.path), ..place };
            self.mistakes.add(place, "missing; a service without backends says `backends: []`");
        }
        for (index, backend) in backends.unwrap_or_default().iter().enumerate() {
            let place = Place { at: backend.at, path: format_args!("{}.backends[{index}]", place.path) };
            let (address, endpoint) = match &backend.value {
                wire::Backend::Address(text) => (self.check(place, value::address(text)), Endpoint::READY),
                wire::Backend::Described(backend) => {
                    (self.require(place, "address", &backend.address, value::address), self.endpoint(place, backend))
                }
            };
            let Some(address) = address else { continue };
            if known.insert(address, endpoint).is_some() {
                self.mistakes.add(place, format_args!("{address} is listed twice; say it once, with a weight"));
            }
        }
        known
    }

    /// What a backend says of itself; what it leaves out is as in Kubernetes (`EndpointConditions` of `discovery/v1`).
    fn endpoint(&mut self, place: Place<'_>, backend: &wire::DescribedBackend) -> Endpoint {
        let weight = self.read(place, "weight", &backend.weight, value::weight).unwrap_or(Weight::ONE);
        let node = self.read(place, "nodeName", &backend.node_name, value::name);
        let mut conditions = Conditions::READY;
        if let Some(texts) = &backend.conditions {
            let mut condition = |field, text| {
                let place = Place { path: format_args!("{}.conditions", place.path), ..place };
                self.read(place, field, text, value::condition)
            };
            conditions.ready = condition("ready", &texts.ready).unwrap_or(true);
            conditions.serving = condition("serving", &texts.serving).unwrap_or(conditions.ready);
            conditions.terminating = condition("terminating", &texts.terminating).unwrap_or(false);
            if conditions.terminating && texts.ready.is_none() {
                self.warnings.add(place, "terminating, and yet it takes new flows: without `ready: false` it is ready");
            }
        }
        Endpoint { weight, node, conditions, ..Endpoint::READY }
    }

    /// Warns of fields that concern kinds of frontends which the service does not have.
    fn warn_of_what_concerns_nothing(&mut self, place: Place<'_>, service: &wire::Service, whole: &Whole) {
        let of_kind = |kind| whole.addresses.values().any(|listed| listed.kind == kind);
        let has_balancer = of_kind(FrontendKind::LoadBalancer);
        let has_node_port = whole.ports.iter().any(|port| port.node_port.is_some());
        let is_external = has_balancer || has_node_port || of_kind(FrontendKind::ExternalIp);
        let first_range = service.load_balancer_source_ranges.iter().flatten().next();
        for (field, text, concerns_some, what) in [
            (
                "externalTrafficPolicy",
                service.external_traffic_policy.as_ref(),
                is_external,
                "externalIPs, loadBalancerIPs and nodePorts",
            ),
            (
                "internalTrafficPolicy",
                service.internal_traffic_policy.as_ref(),
                of_kind(FrontendKind::ClusterIp),
                "addresses",
            ),
            ("loadBalancerSourceRanges", first_range, has_balancer, "loadBalancerIPs"),
        ] {
            if let Some(text) = text.filter(|_| !concerns_some) {
                let place = Place { at: text.at, path: format_args!("{}.{field}", place.path) };
                self.warnings.add(place, format_args!("concerns {what}, and the service has none"));
            }
        }
        let ranges = &whole.common.source_ranges;
        for (address, listed) in &whole.addresses {
            let (family, kind) = (IpFamily::of(*address), listed.kind);
            if kind == FrontendKind::LoadBalancer
                && !ranges.is_empty()
                && !ranges.iter().any(|range| IpFamily::of(range.addr()) == family)
            {
                let place = Place { path: format_args!("{}.loadBalancerSourceRanges", place.path), ..place };
                self.warnings.add(place, format_args!("no {family} range: {address} serves nobody from outside"));
            }
        }
    }

    /// Whether all that the service spans still fits in.
    fn has_room(&mut self, place: Place<'_>, service: &Whole) -> bool {
        let n_ports = service.ports.len();
        // A node port counts as one, however many addresses the node has.
        let n_frontends = n_ports * service.addresses.len() + n_ports;
        let [frontends, backends, ranges] = self.sizes;
        let sizes = [
            frontends + n_frontends,
            backends + n_ports * service.backends.len(),
            ranges + n_ports * service.common.source_ranges.len(),
        ];
        let limits = [MAX_FRONTENDS, MAX_BACKENDS, MAX_SOURCE_RANGES];
        if sizes.iter().zip(limits).any(|(&size, limit)| size > limit) {
            let remark = format_args!(
                "too many for one file: more than {MAX_FRONTENDS} frontends (addresses times ports), {MAX_BACKENDS} \
                 backends or {MAX_SOURCE_RANGES} source ranges (times ports) with this service"
            );
            self.mistakes.add(place, remark);
            return false;
        }
        self.sizes = sizes;
        true
    }

    /// Adds each port of the service in one family: only backends of an address's own family can serve it. A node port is
    /// served in the families that the service has something of; where it has nothing at all, in both.
    fn add(&mut self, place: Place<'_>, whole: &Whole, family: IpFamily) {
        let is_ours = |address: &IpAddr| IpFamily::of(*address) == family;
        let addresses: Vec<_> = whole.addresses.iter().filter(|(address, _)| is_ours(address)).collect();
        let backends: Vec<_> = whole.backends.iter().filter(|(address, _)| is_ours(address)).collect();
        let has_node_port = whole.ports.iter().any(|port| port.node_port.is_some());
        let is_bare = whole.addresses.is_empty() && whole.backends.is_empty();
        match (addresses.first(), backends.is_empty()) {
            (None, true) if has_node_port && is_bare => {
                let remark = format_args!("no {family} backends: what is sent to its node ports is refused");
                self.warnings.add(place, remark);
            }
            (None, true) => return,
            (None, false) if !has_node_port => {
                let remark = format_args!("its {family} backends serve nothing: it has no {family} address");
                return self.warnings.add(place, remark);
            }
            (Some((address, _)), true) => {
                let remark = format_args!("no {family} backends: what is sent to {address} is refused");
                self.warnings.add(place, remark);
            }
            (_, false) => {}
        }
        for port in &whole.ports {
            let Port { name: port_name, number, target, protocol, node_port, .. } = port;
            if addresses.is_empty() && node_port.is_none() {
                continue;
            }
            let name = ServiceName { name: whole.name.clone(), port: port_name.clone(), protocol: *protocol, family };
            let frontends =
                addresses.iter().map(|&(&address, listed)| (SocketAddr::new(address, *number), listed.kind));
            let endpoints = backends.iter().map(|&(&at, endpoint)| (SocketAddr::new(at, *target), endpoint.clone()));
            let service = Service {
                frontends: frontends.collect(),
                node_port: *node_port,
                endpoints: endpoints.collect(),
                ..whole.common.clone()
            };
            if let Err(taken) = self.desired.add(name, service) {
                self.taken(place, whole, port, &taken);
            }
        }
    }

    fn taken(&mut self, place: Place<'_>, whole: &Whole, port: &Port, Taken { what, owner }: &Taken) {
        let line = self.names.get(&owner.name).map_or(0, |at| at.line);
        let (service, owner) = (&whole.name, &owner.name);
        match what {
            Claim::Frontend(frontend) => {
                let Some(Listed { field, index, at, .. }) = whole.addresses.get(&frontend.address.ip()) else { return };
                let place = Place { at: *at, path: format_args!("{}.{field}[{index}]", place.path) };
                let remark = format_args!("{frontend} of {service} is already a frontend of {owner} in line {line}");
                self.mistakes.add(place, remark);
            }
            Claim::NodePort(node_port) => {
                let place = Place { at: port.at, path: format_args!("{}.ports[{}].nodePort", place.path, port.index) };
                let remark =
                    format_args!("{node_port} of {service} is already the node port of {owner} in line {line}");
                self.mistakes.add(place, remark);
            }
        }
    }

    /// The value of a field that may be absent.
    fn read<T>(
        &mut self,
        place: Place<'_>,
        field: &str,
        text: &Text,
        parse: fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = text.as_ref()?;
        let place = Place { at: text.at, path: format_args!("{}.{field}", place.path) };
        self.check(place, parse(&text.value))
    }

    /// The value of a field that must be there.
    fn require<T>(
        &mut self,
        place: Place<'_>,
        field: &str,
        text: &Text,
        parse: fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        if text.is_none() {
            self.mistakes.add(Place { path: format_args!("{}.{field}", place.path), ..place }, "missing");
        }
        self.read(place, field, text, parse)
    }

    fn check<T>(&mut self, place: Place<'_>, value: Result<T, String>) -> Option<T> {
        value.map_err(|problem| self.mistakes.add(place, problem)).ok()
    }
}
