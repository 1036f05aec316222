//! Desired state becomes map contents. Only what is in here names aya.
//!
//! `tables` decides which id, which slot and which order; it writes through the [`Dataplane`] trait, of which there
//! are two kinds: `kernel`, the loaded programs and their maps, and `memory`, for tests on the host.

pub mod collect;
mod grace;
pub mod kernel;
pub mod memory;
pub mod region;
mod slots;
pub mod tables;

use std::net::IpAddr;

use ipnet::IpNet;
use lb_common::abi::{self, Backend, Service, Slot};
use region::Region;

use crate::model::Frontend;

/// The maps that say which packet goes where.
pub trait Dataplane {
    /// Service id → table ranges, affinity and algorithm.
    fn services(&self) -> &Region<Service>;
    /// Slot → backend id.
    fn table(&self) -> &Region<Slot>;
    /// Backend id → address, port, and which new flows it takes.
    fn backends(&self) -> &Region<Backend>;
    /// Makes a frontend lead to a service, with what holds for it, in one step.
    fn set_frontend(&mut self, frontend: &Frontend, value: abi::Frontend) -> Result<(), DataplaneError>;
    /// Makes a frontend lead nowhere.
    fn remove_frontend(&mut self, frontend: &Frontend) -> Result<(), DataplaneError>;
    /// Makes an address a service's alone; `flags` is the value of `VIPS4` and `VIPS6`.
    fn set_vip(&mut self, address: IpAddr, flags: u32) -> Result<(), DataplaneError>;
    /// Makes an address nobody's.
    fn remove_vip(&mut self, address: IpAddr) -> Result<(), DataplaneError>;
    /// Lets clients of a range in to a service.
    fn add_source(&mut self, service: u32, range: &IpNet) -> Result<(), DataplaneError>;
    /// Lets clients of a range in to a service no more.
    fn remove_source(&mut self, service: u32, range: &IpNet) -> Result<(), DataplaneError>;
    /// Waits until every packet that is being processed now is done: after that, nobody holds what was
    /// unpublished before. Milliseconds, not microseconds.
    fn wait_for_readers(&self) -> Result<(), DataplaneError>;
}

/// How much the tables hold. The kernel's memory for most of it is taken when the agent starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
pub struct Sizes {
    /// How many services there may be: ports of services, counted for each IP family.
    #[arg(id = "max-services", long, value_name = "N", default_value_t = Self::DEFAULT.services, value_parser = clap::value_parser!(u32).range(1..=1 << 22))]
    pub services: u32,
    /// How many backends there may be, counted for each service port.
    #[arg(id = "max-backends", long, value_name = "N", default_value_t = Self::DEFAULT.backends, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub backends: u32,
    /// How many slots the backend sets may have in all: one a unit of weight, or about 100 a backend with maglev and source-hash.
    #[arg(id = "max-slots", long, value_name = "N", default_value_t = Self::DEFAULT.slots, value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    pub slots: u32,
    /// How many flows are remembered in each IP family; beyond that the least recently used one is forgotten.
    #[arg(id = "max-flows", long, value_name = "N", default_value_t = Self::DEFAULT.flows, value_parser = clap::value_parser!(u32).range(128..=1 << 26))]
    pub flows: u32,
    /// How many flows that no backend has answered yet are remembered in each IP family; beyond that the least recently used one is forgotten.
    #[arg(id = "max-pending-flows", long, value_name = "N", default_value_t = Self::DEFAULT.pending_flows, value_parser = clap::value_parser!(u32).range(128..=1 << 26))]
    pub pending_flows: u32,
    /// How many clients of services with session affinity are remembered; beyond that the least recently used one is forgotten.
    #[arg(id = "max-affinity-clients", long, value_name = "N", default_value_t = Self::DEFAULT.affinity_clients, value_parser = clap::value_parser!(u32).range(128..=1 << 26))]
    pub affinity_clients: u32,
    /// How many source ranges there may be, counted for each service port.
    #[arg(id = "max-source-ranges", long, value_name = "N", default_value_t = Self::DEFAULT.source_ranges, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub source_ranges: u32,
}

impl Sizes {
    /// For the machines that most people have: about 300 MiB of kernel memory, two thirds of it for flows.
    pub const DEFAULT: Self = Self {
        services: 1 << 17,
        backends: 1 << 19,
        slots: 1 << 22,
        flows: 1 << 18,
        pending_flows: 1 << 16,
        affinity_clients: 1 << 17,
        source_ranges: 1 << 16,
    };

    /// Frontends in one family: a service may have several.
    pub const fn frontends(&self) -> u32 {
        self.services * 2
    }

    /// Addresses in one family that are services' alone: each has a frontend at least.
    pub const fn vips(&self) -> u32 {
        self.frontends()
    }

    /// Entries of a flow table: one for each direction.
    pub const fn flow_entries(&self) -> u32 {
        self.flows * 2
    }

    /// Entries of a table of pending flows: one for each direction.
    pub const fn pending_entries(&self) -> u32 {
        self.pending_flows * 2
    }
}

impl Default for Sizes {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What can go wrong on the way into the kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataplaneError {
    /// A change does not fit; nothing of it was applied.
    #[error(
        "the table of {table} is full: this needs {needed} entries and {size} are there, so nothing was changed; \
         start wharf with a larger {flag}"
    )]
    Full {
        /// What the table holds.
        table: &'static str,
        /// Entries needed in all.
        needed: u64,
        /// Entries there.
        size: u64,
        /// The flag that sets the size.
        flag: &'static str,
    },
    /// A map refused a frontend.
    #[error("frontend {frontend} could not be changed in the kernel")]
    Frontend {
        /// Which.
        frontend: Frontend,
        /// What the kernel said.
        source: aya::maps::MapError,
    },
    /// A map refused an address.
    #[error("what holds for address {address} could not be changed in the kernel")]
    Vip {
        /// Which.
        address: IpAddr,
        /// What the kernel said.
        source: aya::maps::MapError,
    },
    /// A map refused a range of clients.
    #[error("source range {range} could not be changed in the kernel")]
    SourceRange {
        /// Which.
        range: IpNet,
        /// What the kernel said.
        source: aya::maps::MapError,
    },
    /// A map is not there or not of the expected kind: object and agent don't belong together.
    #[error("the kernel object has no usable map {name}")]
    Map {
        /// Which.
        name: &'static str,
        /// Why, where the kernel or the loader said so.
        #[source]
        source: Option<aya::maps::MapError>,
    },
    /// A map could not be mapped into memory.
    #[error("map {name} could not be mapped into memory")]
    Mmap {
        /// Which.
        name: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The object could not be loaded.
    #[error(
        "the kernel did not take the eBPF object (root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, and Linux 6.1 or later are needed)"
    )]
    Load(#[source] Box<aya::EbpfError>),
    /// A program could not be loaded.
    #[error("the kernel's verifier did not take program {name}")]
    Program {
        /// Which.
        name: String,
        /// What the verifier said.
        #[source]
        source: Option<Box<aya::programs::ProgramError>>,
    },
    /// A program could not be attached.
    #[error("{hook} could not be attached to interface {interface} ({remedy})")]
    Attach {
        /// Where.
        interface: String,
        /// To what of it.
        hook: &'static str,
        /// What may be done about it.
        remedy: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// Flows could not be read or removed.
    #[error("the garbage collector could not {what} flows")]
    Flows {
        /// What it was doing.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The interface is not there.
    #[error("there is no network interface {interface}; `ip link` lists those that there are")]
    NoInterface {
        /// Which.
        interface: String,
    },
    /// An attached program is held by the old netlink interface, whose link doesn't end with the process.
    #[error("interface {interface} gave no BPF link for the XDP program: the kernel is older than 5.9")]
    NoLink {
        /// Where.
        interface: String,
    },
    /// Waiting for readers failed.
    #[error("membarrier(2), which tells when no packet uses an old table any more, failed")]
    Grace(#[source] std::io::Error),
}
