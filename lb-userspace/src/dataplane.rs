//! Desired state becomes map contents. Only what is in here names aya.
//!
//! `tables` decides which id, which slot and which order; it writes through the [`Dataplane`] trait, of which there
//! are two kinds: `kernel`, the loaded programs and their maps, and `memory`, for tests on the host.

pub mod collect;
pub mod grace;
pub mod kernel;
pub mod memory;
pub mod region;
mod sizes;
mod slots;
pub mod sources;
pub mod tables;

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use lb_common::{
    abi::{self, Backend, Service, Slot, Whose},
    net,
};
use region::Region;

use self::{
    kernel::{PinsError, ReplaceError, Shape},
    sources::SourceRange,
};

pub use self::sizes::{SizeOptions, Sizes};
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
    /// Bits of addresses that were once a service's or a backend's.
    fn address_bits(&self) -> &Region<u64>;
    /// Every frontend that leads somewhere, with what holds for it.
    fn frontends(&self) -> Result<BTreeMap<Frontend, abi::Frontend>, DataplaneError>;
    /// Every address that is a service's alone, with its flags.
    fn vips(&self) -> Result<BTreeMap<IpAddr, u32>, DataplaneError>;
    /// Removes an entry of `SOURCES` that is none of ours.
    fn forget_source(&mut self, range: &SourceRange) -> Result<(), DataplaneError>;
    /// Which clients are let in, each with the value of its entry.
    fn sources(&self) -> Result<BTreeMap<SourceRange, u32>, DataplaneError>;
    /// Makes the programs look for services at an address, or for replies from one. To be called before one has it. Bits are never
    /// cleared: one that is nobody's any more costs packets a lookup, others may share it, and flows outlive their backend.
    fn look_for(&self, address: IpAddr, whose: Whose) {
        let (word, bit) = abi::address_bit(net::words(address), whose);
        self.address_bits().set(word, self.address_bits().get(word) | bit);
    }
    /// Whether the programs look at all for services at an address, or for replies from it: they do once it was one's.
    fn is_looked_for(&self, address: IpAddr, whose: Whose) -> bool {
        let (word, bit) = abi::address_bit(net::words(address), whose);
        self.address_bits().get(word) & bit != 0
    }
    /// Waits until every packet that is being processed now is done: after that, nobody holds what was
    /// unpublished before. Milliseconds, not microseconds.
    fn wait_for_readers(&self) -> Result<(), DataplaneError>;
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
    /// More than there is room for in a table whose size is fixed; nothing of it was changed.
    #[error("the table of {table} has room for {size}, and this needs {needed}, so it stays as it was; {remedy}")]
    Room {
        /// What the table holds.
        table: &'static str,
        /// Entries needed in all.
        needed: usize,
        /// Entries there.
        size: usize,
        /// What may be done about it.
        remedy: &'static str,
    },
    /// XDP is not to be trusted on a veth.
    #[error(
        "{interface} is a veth: it hands over packets whose checksums are not finished, which XDP breaks, and its other end may drop what \
         XDP sends; --xdp native takes it all the same, after `ethtool -K IF tx off gro on` at the other end"
    )]
    VethXdp {
        /// The interface.
        interface: String,
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
    /// What a map holds could not be read, or changed.
    #[error("map {name} could not be read or changed in the kernel")]
    Entries {
        /// Which.
        name: &'static str,
        /// What the kernel said.
        source: aya::maps::MapError,
    },
    /// A map could not be mapped into memory.
    #[error("map {name} could not be mapped into memory")]
    Mmap {
        /// Which.
        name: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A map that a former agent pinned is not what this one would make.
    #[error("map {name} is pinned as {pinned}, and is to be {wanted}: {remedy}")]
    Shape {
        /// Which.
        name: &'static str,
        /// What it is.
        pinned: Shape,
        /// What it is to be.
        wanted: Shape,
        /// What to do about it.
        remedy: String,
    },
    /// What is to outlive the agent could not be pinned, or taken over.
    #[error(transparent)]
    Pins(#[from] PinsError),
    /// A map or program could not be pinned.
    #[error("{} could not be pinned", path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: aya::pin::PinError,
    },
    /// The link of a former agent could not be taken over.
    #[error("the link {} of a former agent could not be taken over", path.display())]
    Link {
        /// Where it is pinned.
        path: PathBuf,
        /// Why.
        source: Box<ReplaceError>,
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
    /// A program could not be attached to a control group.
    #[error("{hook} could not be attached to the control group {group}")]
    AttachSockets {
        /// The hook.
        hook: &'static str,
        /// The control group.
        group: String,
        /// What the kernel said.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// A program is no good without another one.
    #[error("{hook} is of no use without {needs}")]
    NeedsHook {
        /// The hook.
        hook: &'static str,
        /// The one that it needs.
        needs: &'static str,
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
