//! Desired state becomes map contents. Only what is in here names aya.
//!
//! `tables` decides which id, which slot and which order; it writes through the [`Dataplane`] trait, of which there
//! are two kinds: `kernel`, the loaded programs and their maps, and `memory`, for tests on the host.

mod grace;
pub mod kernel;
pub mod memory;
pub mod region;
mod slots;
pub mod tables;

use lb_common::abi::{Backend, Service, Slot};
use region::Region;

use crate::model::Frontend;

/// The maps that say which packet goes where.
pub trait Dataplane {
    /// Service id → table range and algorithm.
    fn services(&self) -> &Region<Service>;
    /// Slot → backend id.
    fn table(&self) -> &Region<Slot>;
    /// Backend id → address and port.
    fn backends(&self) -> &Region<Backend>;
    /// Makes a frontend lead to a service, in one step.
    fn set_frontend(&mut self, frontend: &Frontend, service: u32) -> Result<(), DataplaneError>;
    /// Makes a frontend lead nowhere.
    fn remove_frontend(&mut self, frontend: &Frontend) -> Result<(), DataplaneError>;
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
}

impl Sizes {
    /// For the machines that most people have: about 220 MiB of kernel memory, three quarters of it for flows.
    pub const DEFAULT: Self = Self { services: 1 << 17, backends: 1 << 19, slots: 1 << 22, flows: 1 << 18 };

    /// Frontends in one family: a service may have several.
    pub const fn frontends(&self) -> u32 {
        self.services * 2
    }

    /// Entries of a flow table: one for each direction.
    pub const fn flow_entries(&self) -> u32 {
        self.flows * 2
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
        name: &'static str,
        /// What the verifier said.
        #[source]
        source: Option<Box<aya::programs::ProgramError>>,
    },
    /// A program could not be attached.
    #[error(
        "XDP ({mode}) could not be attached to interface {interface}; is another XDP program there, is the MTU too large \
         for the driver, or has the driver no XDP (then try --xdp generic)?"
    )]
    Attach {
        /// Where.
        interface: String,
        /// How.
        mode: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<aya::programs::ProgramError>,
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
