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

pub use lb_common::select::Algorithm;
use lb_common::{net, select};
use serde::{Deserialize, Serialize};

use crate::plan::Op;

/// All services that are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    services: BTreeMap<ServiceName, Service>,
    owners: BTreeMap<Frontend, ServiceName>,
}

/// What a service is known by, across reloads and in every table that a person reads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    /// The service's name as its source has it.
    pub name: Arc<str>,
    /// The port's name, or its number where it has none.
    pub port: Arc<str>,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The family of its addresses and backends.
    pub family: IpFamily,
}

/// One port of a service in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Where clients send to; all of the name's family. Not empty.
    pub frontends: BTreeSet<SocketAddr>,
    /// How a backend is chosen for a new flow.
    pub algorithm: Algorithm,
    /// Address and port of each backend, of the name's family, with its weight.
    pub backends: BTreeMap<SocketAddr, Weight>,
}

/// An address and port that clients send to, with the protocol that they speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// Address and port.
    pub address: SocketAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
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

/// Two services want the same frontend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{frontend} is already a frontend of service {owner}")]
pub struct FrontendTaken {
    /// The frontend.
    pub frontend: Frontend,
    /// Who has it.
    pub owner: ServiceName,
}

impl Desired {
    /// Adds a service, or frontends and backends to it if it is there already.
    ///
    /// # Errors
    ///
    /// If a frontend belongs to another service; then nothing is added.
    pub fn add(&mut self, name: ServiceName, service: Service) -> Result<(), FrontendTaken> {
        for &address in &service.frontends {
            let frontend = Frontend { address, protocol: name.protocol };
            if let Some(owner) = self.owners.get(&frontend).filter(|&owner| *owner != name) {
                return Err(FrontendTaken { frontend, owner: owner.clone() });
            }
        }
        for &address in &service.frontends {
            self.owners.insert(Frontend { address, protocol: name.protocol }, name.clone());
        }
        match self.services.entry(name) {
            Entry::Vacant(vacant) => {
                vacant.insert(service);
            }
            Entry::Occupied(mut occupied) => {
                let present = occupied.get_mut();
                present.frontends.extend(service.frontends);
                present.backends.extend(service.backends);
            }
        }
        Ok(())
    }

    /// The state after one change of a plan.
    pub fn advance(&mut self, op: &Op<'_>) {
        match op {
            Op::SetService { name, service } => {
                let frontends = self.services.remove(*name).map(|present| present.frontends).unwrap_or_default();
                self.services.insert((*name).clone(), Service { frontends, ..(*service).clone() });
            }
            Op::SetFrontend { frontend, name } => {
                self.release(frontend);
                self.owners.insert(*frontend, (*name).clone());
                if let Some(service) = self.services.get_mut(*name) {
                    service.frontends.insert(frontend.address);
                }
            }
            Op::RemoveFrontend { frontend } => self.release(frontend),
            Op::RemoveService { name } => {
                self.services.remove(*name);
            }
        }
    }

    fn release(&mut self, frontend: &Frontend) {
        let owner = self.owners.remove(frontend);
        if let Some(service) = owner.and_then(|owner| self.services.get_mut(&owner)) {
            service.frontends.remove(&frontend.address);
        }
    }

    /// Every service, in the order of names.
    pub fn services(&self) -> &BTreeMap<ServiceName, Service> {
        &self.services
    }

    /// Whether clients send to this address, on any port.
    pub fn is_frontend(&self, address: IpAddr) -> bool {
        // Frontends are ordered by address, then port, then protocol, of which these are the first.
        let first = Frontend { address: SocketAddr::new(address, 0), protocol: Protocol::Tcp };
        self.owners.range(first..).next().is_some_and(|(frontend, _)| frontend.address.ip() == address)
    }

    /// Every frontend with the service that it belongs to.
    pub fn frontends(&self) -> &BTreeMap<Frontend, ServiceName> {
        &self.owners
    }
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
    /// The IP protocol number.
    pub fn number(self) -> net::IpProto {
        match self {
            Self::Tcp => net::IpProto::TCP,
            Self::Udp => net::IpProto::UDP,
        }
    }
}

impl IpFamily {
    /// The family of an address.
    pub fn of(address: &SocketAddr) -> Self {
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

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
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

    #[test]
    fn the_addresses_of_frontends_are_known_whatever_their_port() {
        let mut desired = Desired::default();
        let name = ServiceName { name: "dns".into(), port: "53".into(), protocol: Protocol::Udp, family: IpFamily::V4 };
        let service = Service {
            frontends: ["10.0.0.5:53".parse().unwrap(), "10.0.0.9:65535".parse().unwrap()].into(),
            algorithm: DEFAULT_ALGORITHM,
            backends: BTreeMap::new(),
        };
        desired.add(name, service).unwrap();
        let addresses = ["10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.9", "10.0.0.10", "::1"];
        let found = addresses.map(|address| desired.is_frontend(address.parse().unwrap()));
        assert_eq!(found, [false, true, false, true, false, false]);
    }
}
