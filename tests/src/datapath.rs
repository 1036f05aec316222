//! The loaded programs in a namespace of their own, where packets are run through them one by one.
//!
//! Three interfaces, with neighbours that never change, so that every next hop is resolved:
//!
//! ```text
//!     clients, by the router 10.0.0.2 ── up0 │ wharf │ down0 ── backends 10.0.1.10 … 10.0.1.29
//!                                            │       │ pod0 ─── pods 10.0.2.10 … 10.0.2.29
//!                                            │       │ side0 ── backend 10.0.3.10
//! ```
//! What goes back to where it came from leaves by `XDP_TX`, what goes on to a backend is redirected. Backends of 10.2.0.0/16 and
//! `fd00:b::/64` are behind the router, too: they are reached by `XDP_TX`. Nothing is known of 10.0.1.99 and `fd00:1::99`,
//! and to 203.0.113.0/24 and `2001:db8:dead::/48` there is no route. By side0, which is narrower than the others, the stack alone
//! sends. The node is called `here`, and pods are on it.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::Arc,
};

use aya::maps::{HashMap, Map, MapData, MapError};
use lb_common::{
    abi::{Affinity, AffinityKey, Flow, FlowKey, Fragment, FragmentKey},
    flow::Direction,
    net::{Address, Ipv4Be, Ipv6Be},
};
use lb_userspace::{
    dataplane::{
        Sizes,
        kernel::{ANYWHERE, Addresses, FlowMap, Hook, Kernel, Origin, Runner, Settings, TestRun},
        tables::Tables,
    },
    policy::{self, Node},
    source::file,
};

use crate::netns::NetNs;

/// Our addresses towards the clients.
pub const UP: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 0, 0, 1), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1));
/// Our addresses towards the backends.
pub const DOWN: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 0, 1, 1), Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1));
/// Our addresses towards the pods.
pub const POD: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 0, 2, 1), Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 1));
/// The Ethernet addresses of our interfaces towards clients, backends and pods.
pub const UP_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// See [`UP_MAC`].
pub const DOWN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
/// See [`UP_MAC`].
pub const POD_MAC: [u8; 6] = [2, 0, 0, 0, 2, 1];
/// The Ethernet address of the router towards the clients.
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The node's name.
pub const NODE: &str = "here";

/// An interface of the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Towards the clients.
    Up,
    /// Towards the backends.
    Down,
    /// Towards the pods.
    Pod,
}

/// The programs with their tables, inside the namespace.
#[derive(Debug)]
pub struct Datapath {
    /// The tables.
    pub tables: Tables<Kernel>,
    runners: BTreeMap<Hook, Runner>,
    node: Node,
    sizes: Sizes,
    settings: Settings,
    links: [u32; 3],
    memory: Memory,
}

/// What only the programs remember.
#[derive(Debug)]
struct Memory {
    pending4: FlowMap<Ipv4Be>,
    pending6: FlowMap<Ipv6Be>,
    affinity: HashMap<MapData, AffinityKey, Affinity>,
    fragments4: HashMap<MapData, FragmentKey<Ipv4Be>, Fragment>,
    fragments6: HashMap<MapData, FragmentKey<Ipv6Be>, Fragment>,
}

impl Memory {
    fn of(kernel: &mut Kernel) -> Self {
        Self {
            pending4: map(kernel, "PENDING4"),
            pending6: map(kernel, "PENDING6"),
            affinity: map(kernel, "AFFINITY"),
            fragments4: map(kernel, "FRAGMENTS4"),
            fragments6: map(kernel, "FRAGMENTS6"),
        }
    }

    fn forget(&mut self) {
        empty(&mut self.pending4);
        empty(&mut self.pending6);
        empty(&mut self.affinity);
        empty(&mut self.fragments4);
        empty(&mut self.fragments6);
    }
}

fn map<M: TryFrom<Map, Error = MapError>>(kernel: &mut Kernel, name: &str) -> M {
    let map = kernel.take_map(name).unwrap_or_else(|| panic!("the object has no map {name}"));
    M::try_from(map).expect("it is of that kind")
}

fn empty<K: aya::Pod, V: aya::Pod>(map: &mut HashMap<MapData, K, V>) {
    let keys: Vec<K> = map.keys().filter_map(Result::ok).collect();
    for key in &keys {
        map.remove(key).expect("nobody else removes it");
    }
}

fn answer<A: Address>(pending: &mut FlowMap<A>)
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
{
    let is_reply = |flow: &Flow<A>| flow.direction() == Direction::Reply;
    let replies: Vec<_> = pending.iter().filter_map(Result::ok).filter(|(_, flow)| is_reply(flow)).collect();
    for (key, mut flow) in replies {
        flow.flags |= Flow::<A>::ANSWERED;
        // The client has to acknowledge the number after it, and packets made by `Packet::tcp` acknowledge zero.
        flow.sequence = u32::MAX;
        pending.insert(key, flow, 0).expect("it replaces one");
    }
}

/// The Ethernet address of the backend `10.0.1.host` and `fd00:1::host`.
pub fn backend_mac(host: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, host]
}

/// The Ethernet address of pod 10.0.2.`host`.
pub fn pod_mac(host: u8) -> [u8; 6] {
    [2, 0, 0, 0, 2, host]
}

/// Runs `work` with programs that were loaded for it.
pub fn with_datapath<T: Send>(sizes: Sizes, work: impl FnOnce(&mut Datapath) -> T + Send) -> T {
    let settings = Settings { snat_ports: 1024..=65535, ..Settings::default() };
    with_settings(sizes, settings, work)
}

/// The same with these settings.
pub fn with_settings<T: Send>(sizes: Sizes, settings: Settings, work: impl FnOnce(&mut Datapath) -> T + Send) -> T {
    let namespace = NetNs::new("datapath");
    namespace.run(|| {
        lay_network(&namespace);
        let mut datapath = Datapath::load(sizes, settings);
        work(&mut datapath)
    })
}

impl Datapath {
    fn load(sizes: Sizes, settings: Settings) -> Self {
        let index = |name: &str| nix::net::if_::if_nametoindex(name).expect("the interface was just made");
        let links = [index("up0"), index("down0"), index("pod0")];
        let [up, down, pod] = links;
        let loopback = index("lo");
        let mut kernel = Kernel::load(&sizes, &settings).expect("the programs load");
        let addresses = |(v4, v6)| Addresses { v4: Some(v4), v6: Some(v6), is_attached: true };
        let anywhere = Addresses { is_attached: false, ..addresses(UP) };
        let inside = [pod, loopback].map(|interface| (interface, Addresses::default()));
        let known = [(up, addresses(UP)), (down, addresses(DOWN)), (ANYWHERE, anywhere)].into_iter().chain(inside);
        kernel.set_addresses(&known.collect()).expect("addresses fit");
        let runner = |hook| (hook, kernel.runner(hook).expect("the program is loaded"));
        let runners = Hook::ALL.into_iter().map(runner).collect();
        let ours = [UP, DOWN, POD].into_iter().flat_map(|(v4, v6)| [IpAddr::V4(v4), IpAddr::V6(v6)]);
        let node = Node {
            zone: None,
            name: Some(NODE.into()),
            addresses: ours.clone().collect(),
            // The unspecified ones are for sockets, as the agent has it.
            node_port_addresses: ours.chain([Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]).collect(),
            bind_only: [].into(),
            pod_subnets: ["10.0.2.0/24", "fd00:2::/64"].iter().map(|it| it.parse().expect("a subnet")).collect(),
        };
        let memory = Memory::of(&mut kernel);
        Self { tables: Tables::new(kernel, sizes), runners, node, sizes, settings, links, memory }
    }

    /// Serves what this services file says.
    pub fn apply(&mut self, services: &str) {
        self.publish(services);
        self.reclaim();
    }

    /// Serves what this services file says, and does not wait until nobody sees any more what was served before.
    pub fn publish(&mut self, services: &str) {
        let loaded = file::parse(Path::new("services.yaml"), services.as_bytes(), None)
            .unwrap_or_else(|error| panic!("{error}\n{services}"));
        self.tables.apply(&Arc::new(policy::decide(&loaded.desired, &self.node))).expect("it fits");
    }

    /// Waits until nobody sees any more what was served before.
    pub fn reclaim(&mut self) {
        self.tables.reclaim().expect("the kernel has membarrier");
    }

    /// Runs a packet through the program of a hook, as if it came in by an interface, or left by it.
    pub fn run(&mut self, hook: Hook, link: Link, packet: &[u8]) -> TestRun {
        let interface = self.link(link);
        let runner = self.runners.get_mut(&hook).expect("every hook has one");
        runner.run(packet, interface, Origin::Received).expect("the program runs")
    }

    /// Runs a packet that a process of the node sends, as it leaves by an interface; `gso_size` as in [`Origin`].
    pub fn run_own(&mut self, link: Link, packet: &[u8], gso_size: u16) -> TestRun {
        let interface = self.link(link);
        let runner = self.runners.get_mut(&Hook::TcEgress).expect("every hook has one");
        runner.run(packet, interface, Origin::Own { gso_size }).expect("the program runs")
    }

    /// Runs a packet that comes from the clients' side, by XDP.
    pub fn from_clients(&mut self, packet: &[u8]) -> TestRun {
        self.run(Hook::Xdp, Link::Up, packet)
    }

    /// Runs a packet that comes from the backends' side, by XDP.
    pub fn from_backends(&mut self, packet: &[u8]) -> TestRun {
        self.run(Hook::Xdp, Link::Down, packet)
    }

    /// How many packets met each fate.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        let counters = self.tables.dataplane().counters().expect("counters can be read");
        counters.into_iter().map(|count| (count.counter.name, count.packets)).collect()
    }

    /// How many packets met this fate.
    pub fn count(&self, reason: &str) -> u64 {
        *self.counts().get(reason).expect("there is such a reason")
    }

    /// Forgets all flows, and what goes with them.
    pub fn forget(&mut self) {
        let (flows4, flows6) = self.tables.dataplane_mut().flows();
        empty(flows4);
        empty(flows6);
        self.memory.forget();
    }

    /// Forgets all flows that are not established, and what is left of those that became so.
    pub fn forget_pending(&mut self) {
        empty(&mut self.memory.pending4);
        empty(&mut self.memory.pending6);
    }

    /// Runs `work` with programs that were loaded anew, in the same namespace.
    pub fn afresh<T>(&self, services: &str, work: impl FnOnce(&mut Self) -> T) -> T {
        self.with(self.settings.clone(), services, work)
    }

    /// Runs `work` with programs that were loaded anew with other settings, in the same namespace.
    pub fn with<T>(&self, settings: Settings, services: &str, work: impl FnOnce(&mut Self) -> T) -> T {
        let mut fresh = Self::load(self.sizes, settings);
        fresh.apply(services);
        work(&mut fresh)
    }

    /// The same, with another SNAT range.
    pub fn with_snat_ports<T>(
        &self,
        snat_ports: std::ops::RangeInclusive<u16>,
        services: &str,
        work: impl FnOnce(&mut Self) -> T,
    ) -> T {
        self.with(Settings { snat_ports, ..self.settings.clone() }, services, work)
    }

    /// Marks all pending flows as answered by their backends: the next packet of each from its client, made by
    /// [`Packet`](crate::packet::Packet), establishes it.
    pub fn answer(&mut self) {
        answer(&mut self.memory.pending4);
        answer(&mut self.memory.pending6);
    }

    /// How many entries there are of established flows and of pending ones, in both families.
    pub fn entries(&mut self) -> (usize, usize) {
        let (flows4, flows6) = self.tables.dataplane_mut().flows();
        let established = flows4.keys().count() + flows6.keys().count();
        (established, self.memory.pending4.keys().count() + self.memory.pending6.keys().count())
    }

    /// Flows opened to the present backends of all services.
    pub fn flows(&self) -> u64 {
        let names = self.tables.applied().services.keys();
        names.flat_map(|name| self.tables.members(name).map(|(_, _, backend)| backend.flows)).sum()
    }

    /// The number of an interface.
    pub fn link(&self, link: Link) -> u32 {
        let [up, down, pod] = self.links;
        match link {
            Link::Up => up,
            Link::Down => down,
            Link::Pod => pod,
        }
    }
}

fn lay_network(namespace: &NetNs) {
    let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    let mut batch = format!(
        "link add up0 address {} type veth peer name up1
         link add down0 address {} type veth peer name down1
         link set up0 up
         link set up1 up
         link set down0 up
         link set down1 up
         link add pod0 address {} type veth peer name pod1
         link set pod0 up
         link set pod1 up
         link add side0 mtu 1400 type veth peer name side1
         link set side0 up
         link set side1 up
         addr add 10.0.3.1/24 dev side0
         addr add fd00:3::1/64 dev side0 nodad
         neigh add 10.0.3.10 lladdr {router} dev side0 nud permanent
         neigh add fd00:3::a lladdr {router} dev side0 nud permanent
         addr add {}/24 dev pod0
         addr add {}/64 dev pod0 nodad
         addr add {}/24 dev up0
         addr add {}/64 dev up0 nodad
         addr add {}/24 dev down0
         addr add {}/64 dev down0 nodad
         neigh add 10.0.0.2 lladdr {router} dev up0 nud permanent
         neigh add fd00::2 lladdr {router} dev up0 nud permanent
         route add default via 10.0.0.2
         route add unreachable 203.0.113.0/24
         route add unreachable 2001:db8:dead::/48
         route add default via fd00::2\n",
        mac(UP_MAC),
        mac(DOWN_MAC),
        mac(POD_MAC),
        POD.0,
        POD.1,
        UP.0,
        UP.1,
        DOWN.0,
        DOWN.1,
        router = mac(ROUTER_MAC),
    );
    for host in 10..30 {
        for (net, interface, address) in [(1, "down0", backend_mac(host)), (2, "pod0", pod_mac(host))] {
            let address = mac(address);
            for neighbour in [format!("10.0.{net}.{host}"), format!("fd00:{net}::{host:x}")] {
                let _ = writeln!(batch, "neigh add {neighbour} lladdr {address} dev {interface} nud permanent");
            }
        }
    }
    namespace.ip(&batch);
    for interface in ["up0", "down0", "pod0"] {
        namespace.sysctl(&format!("ipv4/conf/{interface}/forwarding"), "1");
        namespace.sysctl(&format!("ipv6/conf/{interface}/forwarding"), "1");
    }
}
