//! The loaded programs and their maps.

use std::{
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
};

use aya::{
    Ebpf, EbpfLoader, TestRunOptions,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray},
    programs::{
        ProgramError, TestRun as _, Xdp, XdpMode as AyaMode,
        links::{FdLink, Link as _},
    },
};
use aya_obj::programs::XdpAttachType;
use lb_common::{
    abi::{Backend, Counter, InterfaceAddresses, Service, ServiceKey, Slot},
    net::{Address, Ipv4Be, Ipv6Be, Port},
    verdict::{COUNTERS, CounterInfo},
};

use super::{Dataplane, DataplaneError, Sizes, grace, region::Region};
use crate::model::Frontend;

/// The programs and maps, as compiled by the build script.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/wharf-datapath"));

/// The name of the XDP program in the object.
const PROGRAM: &str = "wharf_xdp";

/// How an XDP program sits on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum XdpMode {
    /// In the driver, before the kernel makes anything of a packet.
    Native,
    /// Behind the driver, on any interface; slower, for tests and for drivers without XDP.
    Generic,
}

/// The addresses of one interface, as packets to backends leave with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
    /// Whether the program is to be on this interface itself, and not on the device below it.
    pub is_attached: bool,
}

/// What one packet counter says.
#[derive(Clone, Copy, Debug)]
pub struct Count {
    /// Which.
    pub counter: &'static CounterInfo,
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What became of a packet in a test run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRun {
    /// The XDP action.
    pub action: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
}

/// Runs the loaded program on single packets (`BPF_PROG_TEST_RUN`).
#[derive(Debug)]
pub struct Runner(Xdp);

/// The kernel's side of Wharf. When it is dropped, the programs are detached and the maps are gone.
pub struct Kernel {
    services4: HashMap<MapData, ServiceKey<Ipv4Be>, u32>,
    services6: HashMap<MapData, ServiceKey<Ipv6Be>, u32>,
    services: Region<Service>,
    table: Region<Slot>,
    backends: Region<Backend>,
    epoch: Region<u32>,
    addresses: HashMap<MapData, u32, InterfaceAddresses>,
    known_addresses: BTreeMap<u32, Addresses>,
    counters: PerCpuArray<MapData, Counter>,
    /// By the interface's name; with its number.
    links: BTreeMap<String, (u32, FdLink)>,
    // Holds the programs, and the maps that only they use.
    object: Ebpf,
}

impl Kernel {
    /// Loads the object with tables of these sizes; attaches nothing yet.
    pub fn load(sizes: &Sizes, snat_ports: &RangeInclusive<u16>) -> Result<Self, DataplaneError> {
        let mut object = EbpfLoader::new()
            .override_global("SNAT_FIRST", snat_ports.start(), true)
            .override_global("SNAT_LAST", snat_ports.end(), true)
            .map_max_entries("SERVICES4", sizes.frontends())
            .map_max_entries("SERVICES6", sizes.frontends())
            .map_max_entries("SERVICE", sizes.services)
            .map_max_entries("TABLE", sizes.slots)
            .map_max_entries("BACKENDS", sizes.backends)
            .map_max_entries("FLOWS4", sizes.flow_entries())
            .map_max_entries("FLOWS6", sizes.flow_entries())
            .load(OBJECT)
            .map_err(|error| DataplaneError::Load(Box::new(error)))?;
        xdp(&mut object)?.load().map_err(program_error)?;
        let kernel = Self {
            services4: map(&mut object, "SERVICES4")?,
            services6: map(&mut object, "SERVICES6")?,
            services: region(&mut object, "SERVICE", sizes.services)?,
            table: region(&mut object, "TABLE", sizes.slots)?,
            backends: region(&mut object, "BACKENDS", sizes.backends)?,
            epoch: region(&mut object, "EPOCH", 1)?,
            addresses: map(&mut object, "ADDRESSES")?,
            known_addresses: BTreeMap::new(),
            counters: map(&mut object, "COUNTERS")?,
            links: BTreeMap::new(),
            object,
        };
        kernel.begin_epoch();
        Ok(kernel)
    }

    /// Attaches to an interface of this network namespace. One of the same name that was attached to before is gone.
    pub fn attach(&mut self, interface: &str, mode: XdpMode) -> Result<(), DataplaneError> {
        let failed = |error| DataplaneError::Attach {
            interface: interface.to_owned(),
            mode: mode.name(),
            source: Box::new(error),
        };
        let program = xdp(&mut self.object)?;
        let index = nix::net::if_::if_nametoindex(interface)
            .map_err(|_| DataplaneError::NoInterface { interface: interface.to_owned() })?;
        let id = program.attach_to_if_index(index, mode.into()).map_err(failed)?;
        let link = program.take_link(id).map_err(failed)?;
        // aya falls back to netlink on old kernels; such a link would outlive the agent's death.
        let link = FdLink::try_from(link).map_err(|_| DataplaneError::NoLink { interface: interface.to_owned() })?;
        self.links.insert(interface.to_owned(), (index, link));
        Ok(())
    }

    /// The number of the interface of this name that the program is on, if it is still there.
    pub fn attached_to(&self, interface: &str) -> Option<u32> {
        let (index, _) = self.links.get(interface)?;
        (nix::net::if_::if_nametoindex(interface).ok() == Some(*index)).then_some(*index)
    }

    /// Detaches from every interface; the programs stay loaded.
    pub fn detach(&mut self) {
        for (interface, (_, link)) in std::mem::take(&mut self.links) {
            if let Err(error) = link.detach() {
                tracing::warn!(%error, "cannot detach from {interface}; closing the link does it");
            }
        }
    }

    /// Makes every next hop that a flow remembers be asked for again.
    pub fn begin_epoch(&self) {
        let next = self.epoch.get(0).wrapping_add(1);
        // Zero means that there is none.
        self.epoch.set(0, next.max(1));
    }

    /// Sets the addresses that packets leave with, by interface number; others are forgotten.
    pub fn set_addresses(&mut self, addresses: &BTreeMap<u32, Addresses>) -> Result<(), DataplaneError> {
        let failed = |source| DataplaneError::Map { name: "ADDRESSES", source: Some(source) };
        for (interface, known) in addresses {
            if self.known_addresses.get(interface) != Some(known) {
                let value = InterfaceAddresses {
                    v6: known.v6.map_or(Ipv6Be::UNSPECIFIED, Ipv6Be::from),
                    v4: known.v4.map_or(Ipv4Be::UNSPECIFIED, Ipv4Be::from),
                    is_attached: u32::from(known.is_attached),
                };
                self.addresses.insert(interface, value, 0).map_err(failed)?;
            }
        }
        for interface in self.known_addresses.keys().filter(|interface| !addresses.contains_key(interface)) {
            self.addresses.remove(interface).map_err(failed)?;
        }
        self.known_addresses.clone_from(addresses);
        Ok(())
    }

    /// The addresses that packets leave with, by interface number.
    pub fn addresses(&self) -> &BTreeMap<u32, Addresses> {
        &self.known_addresses
    }

    /// The addresses that packets leave an interface with; none if there is no such interface.
    pub fn addresses_of(&self, interface: &str) -> Addresses {
        let index = nix::net::if_::if_nametoindex(interface).unwrap_or(0);
        self.known_addresses.get(&index).copied().unwrap_or_default()
    }

    /// Every packet counter, summed over the CPUs.
    pub fn counters(&self) -> Result<Vec<Count>, DataplaneError> {
        COUNTERS
            .iter()
            .map(|counter| {
                let values = self
                    .counters
                    .get(&counter.index, 0)
                    .map_err(|source| DataplaneError::Map { name: "COUNTERS", source: Some(source) })?;
                Ok(Count {
                    counter,
                    packets: values.iter().map(|value| value.packets).sum(),
                    bytes: values.iter().map(|value| value.bytes).sum(),
                })
            })
            .collect()
    }

    /// The loaded program, to be run on packets, also from another thread while the tables change.
    pub fn runner(&mut self) -> Result<Runner, DataplaneError> {
        let info = xdp(&mut self.object)?.info().map_err(program_error)?;
        let program = Xdp::from_program_info(info, PROGRAM.into(), XdpAttachType::Interface);
        program.map(Runner).map_err(program_error)
    }

    /// How many instructions the verifier went through for the program; `None` on kernels that don't say.
    pub fn verified_instructions(&mut self) -> Result<Option<u32>, DataplaneError> {
        Ok(xdp(&mut self.object)?.info().map_err(program_error)?.verified_instruction_count())
    }

    /// The loaded XDP program, for the bench to call.
    pub fn program(&mut self) -> Result<&mut Xdp, DataplaneError> {
        xdp(&mut self.object)
    }
}

impl Runner {
    /// Runs the program on a packet, as if it came in by an interface of this network namespace.
    /// Flows and counters change as they would; nothing is sent.
    pub fn run(&mut self, packet: &[u8], ingress: u32) -> Result<TestRun, DataplaneError> {
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let length = u32::try_from(packet.len()).unwrap_or(u32::MAX);
        let context: Vec<u8> = [0, length, 0, ingress, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
        let mut out = vec![0; packet.len()];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = self.0.test_run(options).map_err(program_error)?;
        out.truncate(result.data_size_out as usize);
        Ok(TestRun { action: result.return_value, packet: out })
    }
}

impl Dataplane for Kernel {
    fn services(&self) -> &Region<Service> {
        &self.services
    }

    fn table(&self) -> &Region<Slot> {
        &self.table
    }

    fn backends(&self) -> &Region<Backend> {
        &self.backends
    }

    fn set_frontend(&mut self, frontend: &Frontend, service: u32) -> Result<(), DataplaneError> {
        match frontend.address {
            SocketAddr::V4(address) => self.services4.insert(key(frontend, Ipv4Be::from(*address.ip())), service, 0),
            SocketAddr::V6(address) => self.services6.insert(key(frontend, Ipv6Be::from(*address.ip())), service, 0),
        }
        .map_err(|source| DataplaneError::Frontend { frontend: *frontend, source })
    }

    fn remove_frontend(&mut self, frontend: &Frontend) -> Result<(), DataplaneError> {
        match frontend.address {
            SocketAddr::V4(address) => self.services4.remove(&key(frontend, Ipv4Be::from(*address.ip()))),
            SocketAddr::V6(address) => self.services6.remove(&key(frontend, Ipv6Be::from(*address.ip()))),
        }
        .map_err(|source| DataplaneError::Frontend { frontend: *frontend, source })
    }

    fn wait_for_readers(&self) -> Result<(), DataplaneError> {
        grace::wait().map_err(DataplaneError::Grace)
    }
}

impl XdpMode {
    /// The name in messages and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

impl From<XdpMode> for AyaMode {
    fn from(mode: XdpMode) -> Self {
        match mode {
            XdpMode::Native => Self::Driver,
            XdpMode::Generic => Self::Skb,
        }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").field("links", &self.links.keys()).finish_non_exhaustive()
    }
}

fn key<A: Address>(frontend: &Frontend, address: A) -> ServiceKey<A> {
    ServiceKey::new(address, Port::from_host(frontend.address.port()), frontend.protocol.number())
}

fn xdp(object: &mut Ebpf) -> Result<&mut Xdp, DataplaneError> {
    let program = object.program_mut(PROGRAM).ok_or(DataplaneError::Program { name: PROGRAM, source: None })?;
    program.try_into().map_err(program_error)
}

fn program_error(error: ProgramError) -> DataplaneError {
    DataplaneError::Program { name: PROGRAM, source: Some(Box::new(error)) }
}

fn map<M: TryFrom<Map, Error = MapError>>(object: &mut Ebpf, name: &'static str) -> Result<M, DataplaneError> {
    let map = object.take_map(name).ok_or(DataplaneError::Map { name, source: None })?;
    M::try_from(map).map_err(|source| DataplaneError::Map { name, source: Some(source) })
}

fn region<T: aya::Pod>(object: &mut Ebpf, name: &'static str, length: u32) -> Result<Region<T>, DataplaneError> {
    let Some(Map::Array(map)) = object.take_map(name) else {
        return Err(DataplaneError::Map { name, source: None });
    };
    Region::map(map.fd(), length).map_err(|source| DataplaneError::Mmap { name, source })
}
