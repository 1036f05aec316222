//! Whether a services file makes sense. Every mistake is reported, so nothing here stops at the first; what a mistake
//! leaves open is passed over or takes its default, as the state of a file with mistakes is never used.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    remarks::{Place, Position, Remarks},
    value,
    wire::{self, At, Text},
};
use crate::model::{
    Algorithm, DEFAULT_ALGORITHM, Desired, FrontendTaken, IpFamily, Protocol, Service, ServiceName, Weight,
};

/// Frontends of all services: addresses times ports. Without a bound a file of some kilobytes could ask for billions.
const MAX_FRONTENDS: usize = 1_000_000;
/// Backends of all services: backends times ports.
const MAX_BACKENDS: usize = 4_000_000;

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
    frontends: usize,
    backends: usize,
}

/// A service of the file, all ports and both families.
struct Whole {
    name: Arc<str>,
    /// Each with its index and place in the list.
    addresses: BTreeMap<IpAddr, (usize, Position)>,
    ports: Vec<Port>,
    algorithm: Algorithm,
    backends: BTreeMap<IpAddr, Weight>,
}

struct Port {
    name: Arc<str>,
    number: u16,
    target: u16,
    protocol: Protocol,
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
        let addresses = self.addresses(place, service.addresses.as_deref().unwrap_or_default());
        let ports = self.ports(place, service.ports.as_deref().unwrap_or_default());
        let algorithm = self.read(place, "algorithm", &service.algorithm, value::algorithm);
        let backends = self.backends(place, service.backends.as_deref());
        let Some(name) = name else { return };
        let whole = Whole { name, addresses, ports, algorithm: algorithm.unwrap_or(DEFAULT_ALGORITHM), backends };
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

    fn addresses(&mut self, place: Place<'_>, addresses: &[At<String>]) -> BTreeMap<IpAddr, (usize, Position)> {
        let mut known = BTreeMap::new();
        if addresses.is_empty() {
            let place = Place { path: format_args!("{}.addresses", place.path), ..place };
            self.mistakes.add(place, "missing; a service has at least one address");
        }
        for (index, text) in addresses.iter().enumerate() {
            let place = Place { at: text.at, path: format_args!("{}.addresses[{index}]", place.path) };
            let Some(address) = self.check(place, value::address(&text.value)) else { continue };
            if known.insert(address, (index, text.at)).is_some() {
                self.mistakes.add(place, format_args!("{address} is listed twice"));
            }
        }
        known
    }

    fn ports(&mut self, place: Place<'_>, ports: &[At<wire::Port>]) -> Vec<Port> {
        let (mut known, mut names, mut numbers) = (Vec::new(), HashSet::new(), HashSet::new());
        if ports.is_empty() {
            let place = Place { path: format_args!("{}.ports", place.path), ..place };
            self.mistakes.add(place, "missing; a service has at least one port");
        }
        for (index, At { value: port, at }) in ports.iter().enumerate() {
            let place = Place { at: *at, path: format_args!("{}.ports[{index}]", place.path) };
            let name = self.read(place, "name", &port.name, value::port_name);
            let number = self.require(place, "port", &port.port, value::port);
            let target = self.read(place, "targetPort", &port.target_port, value::port);
            let protocol = match &port.protocol {
                None => Some(Protocol::Tcp),
                text => self.read(place, "protocol", text, value::protocol),
            };
            let (Some(number), Some(protocol)) = (number, protocol) else { continue };
            if let Some(name) = name.clone().filter(|name| !names.insert(name.clone())) {
                self.mistakes.add(place, format_args!("the service has another port called {name}"));
            } else if !numbers.insert((number, protocol)) {
                self.mistakes.add(place, format_args!("{protocol} port {number} is listed twice"));
            } else {
                let name = name.unwrap_or_else(|| number.to_string().into());
                known.push(Port { name, number, target: target.unwrap_or(number), protocol });
            }
        }
        known
    }

    fn backends(&mut self, place: Place<'_>, backends: Option<&[At<wire::Backend>]>) -> BTreeMap<IpAddr, Weight> {
        let mut known = BTreeMap::new();
        if backends.is_none() {
            let place = Place { path: format_args!("{}.backends", place.path), ..place };
            self.mistakes.add(place, "missing; a service without backends says `backends: []`");
        }
        for (index, backend) in backends.unwrap_or_default().iter().enumerate() {
            let place = Place { at: backend.at, path: format_args!("{}.backends[{index}]", place.path) };
            let (address, weight) = match &backend.value {
                wire::Backend::Address(text) => (self.check(place, value::address(text)), None),
                wire::Backend::Weighted(backend) => (
                    self.require(place, "address", &backend.address, value::address),
                    self.read(place, "weight", &backend.weight, value::weight),
                ),
            };
            let Some(address) = address else { continue };
            if known.insert(address, weight.unwrap_or(Weight::ONE)).is_some() {
                self.mistakes.add(place, format_args!("{address} is listed twice; say it once, with a weight"));
            }
        }
        known
    }

    /// Whether all that the service spans still fits in.
    fn has_room(&mut self, place: Place<'_>, service: &Whole) -> bool {
        let frontends = self.frontends + service.addresses.len() * service.ports.len();
        let backends = self.backends + service.backends.len() * service.ports.len();
        if frontends > MAX_FRONTENDS || backends > MAX_BACKENDS {
            let limit = format!("{MAX_FRONTENDS} frontends (addresses times ports) or {MAX_BACKENDS} backends");
            self.mistakes.add(place, format_args!("too many for one file: more than {limit} with this service"));
            return false;
        }
        (self.frontends, self.backends) = (frontends, backends);
        true
    }

    /// Adds each port of the service in one family: only backends of an address's own family can serve it.
    fn add(&mut self, place: Place<'_>, whole: &Whole, family: IpFamily) {
        let is_ours = |address: &IpAddr| address.is_ipv4() == (family == IpFamily::V4);
        let addresses: Vec<_> = whole.addresses.keys().copied().filter(is_ours).collect();
        let backends: Vec<_> = whole.backends.iter().filter(|(address, _)| is_ours(address)).collect();
        match (addresses.first(), backends.is_empty()) {
            (None, true) => return,
            (None, false) => {
                let remark = format_args!("its {family} backends serve nothing: it has no {family} address");
                return self.warnings.add(place, remark);
            }
            (Some(address), true) => {
                let remark = format_args!("no {family} backends: what is sent to {address} is dropped");
                self.warnings.add(place, remark);
            }
            (Some(_), false) => {}
        }
        for Port { name: port, number, target, protocol } in &whole.ports {
            let name = ServiceName { name: whole.name.clone(), port: port.clone(), protocol: *protocol, family };
            let service = Service {
                frontends: addresses.iter().map(|&address| SocketAddr::new(address, *number)).collect(),
                algorithm: whole.algorithm,
                backends: backends.iter().map(|&(&at, &weight)| (SocketAddr::new(at, *target), weight)).collect(),
            };
            if let Err(taken) = self.desired.add(name, service) {
                self.taken(place, whole, &taken);
            }
        }
    }

    fn taken(&mut self, place: Place<'_>, whole: &Whole, FrontendTaken { frontend, owner }: &FrontendTaken) {
        let Some(&(index, at)) = whole.addresses.get(&frontend.address.ip()) else { return };
        let line = self.names.get(&owner.name).map_or(0, |at| at.line);
        let place = Place { at, path: format_args!("{}.addresses[{index}]", place.path) };
        let (service, owner) = (&whole.name, &owner.name);
        let remark = format_args!("{frontend} of {service} is already a frontend of {owner} in line {line}");
        self.mistakes.add(place, remark);
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
