//! The loaded programs and their maps.

mod attach;
mod audit;
mod batch;
mod flows;
mod links;
mod pins;
pub mod probe;
mod programs;
mod shape;
mod sockets;
mod sys;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{
        Array, HashMap, Map, MapData, MapError, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
    programs::ProgramFd,
};
use ipnet::IpNet;
use lb_common::{
    abi::{
        self, Backend, Counter, Flow, FlowKey, InterfaceAddresses, Service, ServiceKey, Slot, SourceKey, VipKey, Whose,
    },
    flow::{Tick, Timeouts},
    net::{Address, Ipv4Be, Ipv6Be, Port},
    verdict::{COUNTERS, CounterInfo},
};

use self::attach::Attachments;
pub use self::{
    attach::{Attachment, LOOPBACK, TcMode, XdpMode, remove_filters},
    links::ReplaceError,
    pins::{DEFAULT as DEFAULT_PINS, Pins, PinsError, has_pins, is_same_place, namespace, remove_pins},
    programs::{Hook, Origin, Runner, TestRun},
    shape::{Shape, pinned_sizes},
    sockets::{ControlGroup, Ended, MissingHook, SocketHook, SocketMode, SocketSettings, Watched},
};
use super::{
    Dataplane, DataplaneError, Sizes,
    collect::{Collector, Progress},
    grace,
    region::Region,
    sources::{SourceRange, family},
};
use crate::model::{Frontend, Protocol};

/// The programs and maps, as compiled by the build script.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/wharf-datapath"));

/// The key in `ADDRESSES` of the addresses to take where an interface has none: no interface has this number.
pub const ANYWHERE: u32 = 0;

/// The section of what the programs are told later, which is a map of one entry: `SHOWS_BACKENDS`.
const VARIABLE: &str = ".data";

/// What the programs are told when they are loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The source ports that a flow may take whose own is taken.
    pub snat_ports: RangeInclusive<u16>,
    /// How long a flow lives without a packet.
    pub timeouts: Timeouts,
    /// Whether echo requests to a service's own address are answered.
    pub answer_ping: bool,
    /// Whose sockets are balanced.
    pub sockets: SocketSettings,
}

impl Default for Settings {
    fn default() -> Self {
        let ticks = Tick::from_seconds;
        Self {
            // Below what the host's own connections take, unless `net.ipv4.ip_local_port_range` says otherwise.
            snat_ports: 1024..=32767,
            timeouts: Timeouts {
                opening: ticks(60),
                established: ticks(8_000),
                closing: ticks(10),
                datagram: ticks(60),
            },
            answer_ping: false,
            sockets: SocketSettings::default(),
        }
    }
}

/// The addresses of one interface, as packets to backends leave with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
    /// Whether the programs are on this interface itself, and may send by it.
    pub is_attached: bool,
}

impl Addresses {
    /// As the map has them.
    fn entry(&self) -> InterfaceAddresses {
        InterfaceAddresses {
            v6: self.v6.map_or(Ipv6Be::UNSPECIFIED, Ipv6Be::from),
            v4: self.v4.map_or(Ipv4Be::UNSPECIFIED, Ipv4Be::from),
            is_attached: u32::from(self.is_attached),
        }
    }
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

/// A table of flows.
pub type FlowMap<A> = HashMap<MapData, FlowKey<A>, Flow<A>>;

/// The kernel's side of Wharf. When it is dropped, the programs are detached and the maps are gone, but for what is pinned.
pub struct Kernel {
    services4: HashMap<MapData, ServiceKey<Ipv4Be>, abi::Frontend>,
    services6: HashMap<MapData, ServiceKey<Ipv6Be>, abi::Frontend>,
    vips4: HashMap<MapData, VipKey<Ipv4Be>, u32>,
    vips6: HashMap<MapData, VipKey<Ipv6Be>, u32>,
    sources: LpmTrie<MapData, SourceKey, u32>,
    services: Region<Service>,
    table: Region<Slot>,
    backends: Region<Backend>,
    epoch: Region<u32>,
    known_epoch: u32,
    address_bits: Region<u64>,
    addresses: HashMap<MapData, u32, InterfaceAddresses>,
    known_addresses: BTreeMap<u32, Addresses>,
    counters: PerCpuArray<MapData, Counter>,
    flows4: FlowMap<Ipv4Be>,
    flows6: FlowMap<Ipv6Be>,
    exempt: HashMap<MapData, u64, u32>,
    known_exempt: BTreeSet<u64>,
    watched: Option<Watched>,
    /// Whether UDP sockets would see answers come from backends: 0 or 1.
    variable: Array<MapData, u32>,
    /// Hooks of sockets that this kernel does not have, or that are taken.
    missing_hooks: Vec<MissingHook>,
    attachments: Attachments,
    // Holds the programs, and the maps that only they use.
    object: Ebpf,
    /// The directory where our programs are pinned, if they are to outlive the agent.
    programs: Option<PathBuf>,
    /// Whether nothing of a former agent is in use any more.
    is_settled: bool,
}

impl Kernel {
    /// Loads the object with tables of these sizes, that go with it; attaches nothing yet.
    pub fn load(sizes: &Sizes, settings: &Settings) -> Result<Self, DataplaneError> {
        Self::new(sizes, settings, None)
    }

    /// Loads the object over the tables that are pinned, or pins new ones of these sizes; attaches nothing yet.
    pub fn load_pinned(sizes: &Sizes, settings: &Settings, pins: Pins) -> Result<Self, DataplaneError> {
        shape::check(&pins, sizes)?;
        Self::new(sizes, settings, Some(pins))
    }

    fn new(sizes: &Sizes, settings: &Settings, pins: Option<Pins>) -> Result<Self, DataplaneError> {
        let mut loader = EbpfLoader::new();
        for (name, room) in shape::LASTING {
            if let Some(pins) = &pins {
                loader.map_pin_path(name, pins.map(name));
            }
            if let Some(room) = room {
                loader.map_max_entries(name, (room.entries)(sizes));
            }
        }
        let answer_ping = u32::from(settings.answer_ping);
        let sockets = &settings.sockets;
        let (all, ends_all) = (u32::from(sockets.mode == SocketMode::On), u32::from(sockets.ends_all));
        let leaves_udp = u32::from(sockets.leaves_udp);
        let (ends_udp, ends_tcp) = (u32::from(sockets.ended >= Ended::Udp), u32::from(sockets.ended >= Ended::All));
        let namespace = sys::namespace_cookie().map_err(PinsError::Namespace)?;
        let mut object = loader
            .override_global("SNAT_FIRST", settings.snat_ports.start(), true)
            .override_global("SNAT_LAST", settings.snat_ports.end(), true)
            .override_global("TIMEOUT_OPENING", &settings.timeouts.opening, true)
            .override_global("TIMEOUT_ESTABLISHED", &settings.timeouts.established, true)
            .override_global("TIMEOUT_CLOSING", &settings.timeouts.closing, true)
            .override_global("TIMEOUT_DATAGRAM", &settings.timeouts.datagram, true)
            .override_global("ANSWER_PING", &answer_ping, true)
            .override_global("NODE_NAMESPACE", &namespace, true)
            .override_global("SOCKETS_OF_ALL", &all, true)
            .override_global("ENDS_SOCKETS_OF_ALL", &ends_all, true)
            .override_global("LEAVES_UDP", &leaves_udp, true)
            .override_global("ENDS_UDP", &ends_udp, true)
            .override_global("ENDS_TCP", &ends_tcp, true)
            .override_global("MEETS_PODS", &u32::from(sockets.meets_pods), true)
            .override_global("EXEMPT_LEVELS", &sockets.exempt_levels, true)
            .load(OBJECT)
            .map_err(|error| DataplaneError::Load(Box::new(error)))?;
        let programs = pins.as_ref().map(Pins::new_programs).transpose()?;
        programs::load(&mut object, programs.as_deref())?;
        let missing_hooks = if sockets.mode == SocketMode::Off { Vec::new() } else { sockets::load(&mut object) };
        let backends: Region<Backend> = region(&mut object, "BACKENDS", sizes.backends)?;
        let watched = Watched::new(map(&mut object, "WATCHED")?, backends.clone());
        let mut kernel = Self {
            services4: map(&mut object, "SERVICES4")?,
            services6: map(&mut object, "SERVICES6")?,
            vips4: map(&mut object, "VIPS4")?,
            vips6: map(&mut object, "VIPS6")?,
            sources: map(&mut object, "SOURCES")?,
            services: region(&mut object, "SERVICE", sizes.services)?,
            table: region(&mut object, "TABLE", sizes.slots)?,
            backends,
            epoch: region(&mut object, "EPOCH", 1)?,
            known_epoch: 0,
            address_bits: region(&mut object, "ADDRESS_BITS", abi::ADDRESS_WORDS as u32)?,
            addresses: map(&mut object, "ADDRESSES")?,
            known_addresses: BTreeMap::new(),
            counters: map(&mut object, "COUNTERS")?,
            flows4: map(&mut object, "FLOWS4")?,
            flows6: map(&mut object, "FLOWS6")?,
            exempt: map(&mut object, "EXEMPT")?,
            known_exempt: BTreeSet::new(),
            watched: Some(watched),
            variable: map(&mut object, VARIABLE)?,
            missing_hooks,
            attachments: pins.map(Attachments::pinned_in).unwrap_or_default(),
            object,
            programs,
            is_settled: false,
        };
        kernel.known_addresses = kernel.read_addresses()?;
        kernel.known_exempt = kernel.exempt.keys().collect::<Result<_, _>>().map_err(map_error("EXEMPT"))?;
        kernel.known_epoch = kernel.epoch.get(0);
        kernel.begin_epoch();
        Ok(kernel)
    }

    /// Puts our programs in the place of a former agent's, wherever links hold those: from now on packets meet ours. Links of
    /// interfaces that are gone go, too.
    pub fn take_over(&mut self) -> Result<(), DataplaneError> {
        self.attachments.take_over(&mut self.object)
    }

    /// Once everything is attached: detaches from where only a former agent was attached, and removes its programs.
    pub fn release_others(&mut self) -> Result<(), DataplaneError> {
        if std::mem::replace(&mut self.is_settled, true) {
            return Ok(());
        }
        self.attachments.release_others();
        if let (Some(pins), Some(programs)) = (self.attachments.pins(), &self.programs) {
            // Whoever was in the middle of a former program still calls the rest of it.
            grace::wait().map_err(DataplaneError::Grace)?;
            pins.remove_other_programs(programs);
        }
        Ok(())
    }

    /// Why not everything is pinned that is to outlive the agent.
    pub fn unpinned(&self) -> Option<&DataplaneError> {
        self.attachments.unpinned()
    }

    /// Pins what could not be pinned when it was attached.
    pub fn pin_again(&mut self) -> Result<(), DataplaneError> {
        self.attachments.pin_again()
    }

    /// Attaches to an uplink of this network namespace, which may be an end of a veth pair. One of the same name that was attached to
    /// before is gone.
    pub fn attach_uplink(
        &mut self,
        interface: &str,
        mode: XdpMode,
        is_veth: bool,
    ) -> Result<&Attachment, DataplaneError> {
        self.attachments.uplink(&mut self.object, interface, mode, is_veth)
    }

    /// Whether what the programs send by an uplink leaves by it. XDP sends only by devices of which the driver does XDP, and
    /// most have to have a program for that; tc sends by all.
    pub fn sends_by(&self, index: u32) -> bool {
        let uplinks = &self.attachments.uplinks;
        let has_xdp = |it: &Attachment| it.xdp() != XdpMode::Off;
        uplinks.values().any(|it| it.index() == index && (has_xdp(it) || !uplinks.values().any(has_xdp)))
    }

    /// The same where not all is attached to yet: what a former agent attached counts, too.
    pub fn still_sends_by(&self, index: u32) -> bool {
        self.attachments.has_xdp(index) || !self.known_addresses.keys().any(|&it| self.attachments.has_xdp(it))
    }

    /// Attaches to a pod-facing device of this network namespace.
    pub fn attach_pod(&mut self, interface: &str) -> Result<(), DataplaneError> {
        self.attachments.pod(&mut self.object, interface)
    }

    /// Attaches to the loopback interface of this network namespace, for what processes send to the node itself.
    pub fn attach_loopback(&mut self) -> Result<(), DataplaneError> {
        self.attachments.loopback(&mut self.object)
    }

    /// How the program sits on the loopback interface, if it does.
    pub fn loopback(&self) -> Option<&Attachment> {
        self.attachments.loopback.as_ref()
    }

    /// The numbers of the interfaces, beside uplinks, where the programs meet what comes in: pod-facing devices, and loopback.
    pub fn met_inside(&self) -> impl Iterator<Item = u32> {
        self.attachments.pods.keys().copied().chain(self.loopback().map(Attachment::index))
    }

    /// Attaches to the hooks of sockets that it is not attached to yet, in this control group and all below it. What can't be is in
    /// [`Kernel::missing_hooks`].
    ///
    /// # Errors
    ///
    /// If the programs can't be told that a hook is missing.
    pub fn attach_sockets(&mut self, group: &ControlGroup) -> Result<(), DataplaneError> {
        for hook in SocketHook::ALL {
            if self.missing_hooks.iter().any(|missing| missing.hook == hook) {
                continue;
            }
            let attached = match hook.needs().iter().find(|needs| !self.attachments.sockets.contains_key(needs)) {
                Some(needs) => {
                    self.attachments.release_socket(hook);
                    Err(DataplaneError::NeedsHook { hook: hook.name(), needs: needs.name() })
                }
                None if self.attachments.sockets.contains_key(&hook) => continue,
                None => self.attachments.socket(&mut self.object, hook, group),
            };
            self.missing_hooks.extend(attached.err().map(|error| MissingHook { hook, error }));
        }
        let shows_backends = SocketHook::SHOWING.iter().any(|hook| !self.attachments.sockets.contains_key(hook));
        self.variable.set(0, u32::from(shows_backends), 0).map_err(map_error(VARIABLE))
    }

    /// To how many hooks of sockets the programs are attached.
    pub fn attached_hooks(&self) -> usize {
        self.attachments.sockets.len()
    }

    /// The hooks of sockets that the programs could not be attached to.
    pub fn missing_hooks(&self) -> &[MissingHook] {
        &self.missing_hooks
    }

    /// What tells which sockets have lost their backends. The first call takes it, the next one finds nothing.
    pub fn take_watched(&mut self) -> Option<Watched> {
        self.watched.take()
    }

    /// Leaves the sockets of these control groups alone, by their ids, and of no others.
    ///
    /// # Errors
    ///
    /// [`DataplaneError::Room`] if there are too many, and then nothing has changed.
    pub fn set_exempt(&mut self, groups: &BTreeSet<u64>) -> Result<(), DataplaneError> {
        let (needed, size) = (groups.len(), abi::MAX_EXEMPT);
        if needed > size {
            let (table, remedy) = ("control groups to leave alone", "name one above many with --socket-lb-exempt");
            return Err(DataplaneError::Room { table, needed, size, remedy });
        }
        let failed = map_error("EXEMPT");
        for gone in self.known_exempt.difference(groups).copied().collect::<Vec<_>>() {
            removed(self.exempt.remove(&gone)).map_err(&failed)?;
            self.known_exempt.remove(&gone);
        }
        for &group in groups {
            if !self.known_exempt.contains(&group) {
                self.exempt.insert(group, 1, 0).map_err(&failed)?;
                self.known_exempt.insert(group);
            }
        }
        Ok(())
    }

    /// Detaches from the pod-facing devices that don't stay, by their numbers.
    pub fn retain_pods(&mut self, stays: impl Fn(u32) -> bool) {
        self.attachments.retain_pods(stays);
    }

    /// Forgets an uplink whose device is gone.
    pub fn forget_uplink(&mut self, interface: &str) {
        self.attachments.forget_uplink(interface);
    }

    /// How the programs sit on an uplink, if it is still there.
    pub fn attached_to(&self, interface: &str) -> Option<&Attachment> {
        let attachment = self.attachments.uplinks.get(interface)?;
        (nix::net::if_::if_nametoindex(interface).ok() == Some(attachment.index())).then_some(attachment)
    }

    /// Whether the programs are on a pod-facing device, by its number.
    pub fn is_attached_to_pod(&self, index: u32) -> bool {
        self.attachments.pods.contains_key(&index)
    }

    /// On how many pod-facing devices the programs are.
    pub fn attached_pods(&self) -> usize {
        self.attachments.pods.len()
    }

    /// Attaches by clsact from now on, as on kernels that have no tcx.
    pub fn forgo_tcx(&mut self) {
        self.attachments.forgo_tcx();
    }

    /// Detaches from every interface; the programs stay loaded.
    pub fn detach(&mut self) {
        self.attachments.clear();
    }

    /// The numbers of the interfaces whose clsact qdisc was made here, since this was last asked.
    pub fn take_new_qdiscs(&mut self) -> Vec<u32> {
        self.attachments.take_new_qdiscs()
    }

    /// Makes every next hop that a flow remembers be asked for again.
    pub fn begin_epoch(&mut self) {
        // Zero means that there is none.
        self.known_epoch = self.known_epoch.wrapping_add(1).max(1);
        self.epoch.set(0, self.known_epoch);
    }

    /// Sets the addresses that packets leave with, by interface number; others are forgotten.
    ///
    /// # Errors
    ///
    /// [`DataplaneError::Room`] if there are too many, and then nothing has changed.
    pub fn set_addresses(&mut self, addresses: &BTreeMap<u32, Addresses>) -> Result<(), DataplaneError> {
        let (needed, size) = (addresses.len(), abi::MAX_INTERFACES);
        if needed > size {
            let (table, remedy) = ("interfaces", "name fewer with --interface or --pod-interface");
            return Err(DataplaneError::Room { table, needed, size, remedy });
        }
        let failed = map_error("ADDRESSES");
        let is_gone = |interface: &u32| !addresses.contains_key(interface);
        for gone in self.known_addresses.keys().copied().filter(is_gone).collect::<Vec<_>>() {
            removed(self.addresses.remove(&gone)).map_err(&failed)?;
            self.known_addresses.remove(&gone);
        }
        for (&interface, known) in addresses {
            if self.known_addresses.get(&interface) != Some(known) {
                self.addresses.insert(interface, known.entry(), 0).map_err(&failed)?;
                self.known_addresses.insert(interface, *known);
            }
        }
        Ok(())
    }

    fn read_addresses(&self) -> Result<BTreeMap<u32, Addresses>, DataplaneError> {
        let known = listed("ADDRESSES", self.addresses.iter())?.into_iter().map(|(interface, value)| {
            let InterfaceAddresses { v6, v4, is_attached } = value;
            let v4 = (v4 != Ipv4Be::UNSPECIFIED).then(|| Ipv4Addr::from(v4.to_bytes()));
            let v6 = (v6 != Ipv6Be::UNSPECIFIED).then(|| Ipv6Addr::from(v6.to_bytes()));
            (interface, Addresses { v4, v6, is_attached: is_attached != 0 })
        });
        Ok(known.collect())
    }

    /// The addresses that packets leave with, by interface number.
    pub fn addresses(&self) -> &BTreeMap<u32, Addresses> {
        &self.known_addresses
    }

    /// The addresses that packets leave an interface with; none if there is no such interface.
    pub fn addresses_of(&self, interface: &str) -> Addresses {
        let index = nix::net::if_::if_nametoindex(interface).ok();
        index.and_then(|index| self.known_addresses.get(&index)).copied().unwrap_or_default()
    }

    /// The addresses to take where an interface has none: this node's own.
    pub fn default_addresses(&self) -> Addresses {
        self.known_addresses.get(&ANYWHERE).copied().unwrap_or_default()
    }

    /// Every packet counter, summed over the CPUs.
    pub fn counters(&self) -> Result<Vec<Count>, DataplaneError> {
        COUNTERS
            .iter()
            .map(|counter| {
                let values = self.counters.get(&counter.index, 0).map_err(map_error("COUNTERS"))?;
                Ok(Count {
                    counter,
                    packets: values.iter().map(|value| value.packets).sum(),
                    bytes: values.iter().map(|value| value.bytes).sum(),
                })
            })
            .collect()
    }

    /// Goes on with a garbage collection, for about as long as said and at least one step.
    pub fn collect(&mut self, collector: &mut Collector, budget: Duration) -> Result<Progress, DataplaneError> {
        collector.step(&mut self.flows4, &mut self.flows6, &self.backends, flows::now(), budget)
    }

    /// The tables of established flows, of IPv4 and of IPv6, for tests and measurements.
    pub fn flows(&mut self) -> (&mut FlowMap<Ipv4Be>, &mut FlowMap<Ipv6Be>) {
        (&mut self.flows4, &mut self.flows6)
    }

    /// A map that only the programs use, for tests and measurements. The first call takes it, the next one finds nothing.
    pub fn take_map(&mut self, name: &str) -> Option<Map> {
        self.object.take_map(name)
    }

    /// The loaded program of a hook, to be run on packets.
    pub fn runner(&self, hook: Hook) -> Result<Runner, DataplaneError> {
        Runner::new(&self.object, hook)
    }

    /// How many instructions the verifier went through for each program; `None` on kernels that don't say.
    pub fn verified_instructions(&self) -> Result<Vec<(String, Option<u32>)>, DataplaneError> {
        programs::verified_instructions(&self.object)
    }

    /// The loaded program of a hook, for the bench to call.
    pub fn program(&self, hook: Hook) -> Result<&ProgramFd, DataplaneError> {
        programs::descriptor(&self.object, hook.program())
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

    fn set_frontend(&mut self, frontend: &Frontend, value: abi::Frontend) -> Result<(), DataplaneError> {
        self.look_for(frontend.address.ip(), Whose::Services);
        match frontend.address {
            SocketAddr::V4(address) => self.services4.insert(key(frontend, Ipv4Be::from(*address.ip())), value, 0),
            SocketAddr::V6(address) => self.services6.insert(key(frontend, Ipv6Be::from(*address.ip())), value, 0),
        }
        .map_err(|source| DataplaneError::Frontend { frontend: *frontend, source })
    }

    fn remove_frontend(&mut self, frontend: &Frontend) -> Result<(), DataplaneError> {
        removed(match frontend.address {
            SocketAddr::V4(address) => self.services4.remove(&key(frontend, Ipv4Be::from(*address.ip()))),
            SocketAddr::V6(address) => self.services6.remove(&key(frontend, Ipv6Be::from(*address.ip()))),
        })
        .map_err(|source| DataplaneError::Frontend { frontend: *frontend, source })
    }

    fn set_vip(&mut self, address: IpAddr, flags: u32) -> Result<(), DataplaneError> {
        self.look_for(address, Whose::Services);
        match address {
            IpAddr::V4(v4) => self.vips4.insert(VipKey { address: Ipv4Be::from(v4) }, flags, 0),
            IpAddr::V6(v6) => self.vips6.insert(VipKey { address: Ipv6Be::from(v6) }, flags, 0),
        }
        .map_err(|source| DataplaneError::Vip { address, source })
    }

    fn remove_vip(&mut self, address: IpAddr) -> Result<(), DataplaneError> {
        removed(match address {
            IpAddr::V4(v4) => self.vips4.remove(&VipKey { address: Ipv4Be::from(v4) }),
            IpAddr::V6(v6) => self.vips6.remove(&VipKey { address: Ipv6Be::from(v6) }),
        })
        .map_err(|source| DataplaneError::Vip { address, source })
    }

    fn add_source(&mut self, service: u32, range: &IpNet) -> Result<(), DataplaneError> {
        let added = self.sources.insert(&source_key(&SourceRange::new(service, range)), family(range), 0);
        added.map_err(|source| DataplaneError::SourceRange { range: *range, source })
    }

    fn remove_source(&mut self, service: u32, range: &IpNet) -> Result<(), DataplaneError> {
        let result = self.sources.remove(&source_key(&SourceRange::new(service, range)));
        removed(result).map_err(|source| DataplaneError::SourceRange { range: *range, source })
    }

    fn forget_source(&mut self, range: &SourceRange) -> Result<(), DataplaneError> {
        removed(self.sources.remove(&source_key(range))).map_err(map_error("SOURCES"))
    }

    fn address_bits(&self) -> &Region<u64> {
        &self.address_bits
    }

    fn frontends(&self) -> Result<BTreeMap<Frontend, abi::Frontend>, DataplaneError> {
        let v4 = listed("SERVICES4", self.services4.iter())?.into_iter().map(|(key, value)| (frontend(&key), value));
        let v6 = listed("SERVICES6", self.services6.iter())?.into_iter().map(|(key, value)| (frontend(&key), value));
        Ok(v4.chain(v6).filter_map(|(frontend, value)| Some((frontend?, value))).collect())
    }

    fn vips(&self) -> Result<BTreeMap<IpAddr, u32>, DataplaneError> {
        let v4 = listed("VIPS4", self.vips4.iter())?.into_iter().map(|(key, flags)| (key.address.into(), flags));
        let v6 = listed("VIPS6", self.vips6.iter())?.into_iter().map(|(key, flags)| (key.address.into(), flags));
        Ok(v4.chain(v6).collect())
    }

    fn sources(&self) -> Result<BTreeMap<SourceRange, u32>, DataplaneError> {
        let entries = listed("SOURCES", self.sources.iter())?.into_iter();
        Ok(entries.map(|(key, family)| (SourceRange::of_key(key.prefix_len(), key.data()), family)).collect())
    }

    fn wait_for_readers(&self) -> Result<(), DataplaneError> {
        grace::wait().map_err(DataplaneError::Grace)
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").field("attachments", &self.attachments).finish_non_exhaustive()
    }
}

fn key<A: Address>(frontend: &Frontend, address: A) -> ServiceKey<A> {
    ServiceKey::new(address, Port::from_host(frontend.address.port()), frontend.protocol.number())
}

fn source_key(range: &SourceRange) -> Key<SourceKey> {
    let (length, key) = range.key();
    Key::new(length, key)
}

/// The frontend of a key; `None` if no frontend has such a key, which only drift makes.
fn frontend<A: Address>(found: &ServiceKey<A>) -> Option<Frontend> {
    let protocol = Protocol::ALL.into_iter().find(|protocol| protocol.number() == found.proto)?;
    let frontend = Frontend { address: SocketAddr::new(found.address.into(), found.port.to_host()), protocol };
    (*found == key(&frontend, found.address)).then_some(frontend)
}

/// What became of a removal: what was not there is as good as removed.
fn removed(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

/// What a map refused, by its name.
fn map_error(name: &'static str) -> impl Fn(MapError) -> DataplaneError {
    move |source| DataplaneError::Entries { name, source }
}

/// Everything in a map.
fn listed<K, V>(
    name: &'static str,
    entries: impl Iterator<Item = Result<(K, V), MapError>>,
) -> Result<Vec<(K, V)>, DataplaneError> {
    entries.collect::<Result<_, _>>().map_err(map_error(name))
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
