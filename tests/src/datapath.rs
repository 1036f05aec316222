//! The loaded programs in a namespace of their own, where packets are run through them one by one.
//!
//! Two interfaces, with neighbours that never change, so that every next hop is resolved:
//!
//! ```text
//!     clients, by the router 10.0.0.2 ── up0 │ wharf │ down0 ── backends 10.0.1.10 … 10.0.1.29
//! ```
//! What goes back to where it came from leaves by XDP_TX, what goes on to a backend is redirected. Backends of 10.2.0.0/16 and
//! `fd00:b::/64` are behind the router, too: they are reached by `XDP_TX`. Nothing is known of 10.0.1.99 and `fd00:1::99`,
//! and to 203.0.113.0/24 and `2001:db8:dead::/48` there is no route.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    path::Path,
};

use lb_userspace::{
    dataplane::{
        Sizes,
        kernel::{Addresses, Kernel, Runner, TestRun},
        tables::Tables,
    },
    source::file,
};

use crate::netns::NetNs;

/// Our addresses towards the clients.
pub const UP: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 0, 0, 1), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1));
/// Our addresses towards the backends.
pub const DOWN: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 0, 1, 1), Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1));
/// The Ethernet addresses of our two interfaces.
pub const UP_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// See [`UP_MAC`].
pub const DOWN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
/// The Ethernet address of the router towards the clients.
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// The programs with their tables, inside the namespace.
#[derive(Debug)]
pub struct Datapath {
    /// The tables.
    pub tables: Tables<Kernel>,
    runner: Runner,
    sizes: Sizes,
    snat_ports: RangeInclusive<u16>,
    up: u32,
    down: u32,
}

/// The Ethernet address of the backend `10.0.1.host` and `fd00:1::host`.
pub fn backend_mac(host: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, host]
}

/// Runs `work` with programs that were loaded for it.
pub fn with_datapath<T: Send>(sizes: Sizes, work: impl FnOnce(&mut Datapath) -> T + Send) -> T {
    let namespace = NetNs::new("datapath");
    namespace.run(|| {
        lay_network(&namespace);
        let mut datapath = Datapath::load(sizes, 1024..=65535);
        work(&mut datapath)
    })
}

impl Datapath {
    fn load(sizes: Sizes, snat_ports: RangeInclusive<u16>) -> Self {
        let index = |name: &str| nix::net::if_::if_nametoindex(name).expect("the interface was just made");
        let (up, down) = (index("up0"), index("down0"));
        let mut kernel = Kernel::load(&sizes, &snat_ports).expect("the programs load");
        let addresses = |(v4, v6)| Addresses { v4: Some(v4), v6: Some(v6), is_attached: true };
        kernel.set_addresses(&BTreeMap::from([(up, addresses(UP)), (down, addresses(DOWN))])).expect("addresses fit");
        let runner = kernel.runner().expect("the program is loaded");
        Self { tables: Tables::new(kernel, sizes), runner, sizes, snat_ports, up, down }
    }

    /// Serves what this services file says.
    pub fn apply(&mut self, services: &str) {
        let loaded = file::parse(Path::new("services.yaml"), services.as_bytes()).expect("the file is right");
        self.tables.apply(&loaded.desired).expect("it fits");
        self.tables.reclaim().expect("the kernel has membarrier");
    }

    /// Runs a packet that comes from the clients' side.
    pub fn from_clients(&mut self, packet: &[u8]) -> TestRun {
        self.runner.run(packet, self.up).expect("the program runs")
    }

    /// Runs a packet that comes from the backends' side.
    pub fn from_backends(&mut self, packet: &[u8]) -> TestRun {
        self.runner.run(packet, self.down).expect("the program runs")
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

    /// Runs `work` with programs of the same sizes that were loaded anew, in the same namespace.
    pub fn afresh<T>(&self, services: &str, work: impl FnOnce(&mut Self) -> T) -> T {
        self.with_snat_ports(self.snat_ports.clone(), services, work)
    }

    /// The same, with another SNAT range.
    pub fn with_snat_ports<T>(
        &self,
        snat_ports: RangeInclusive<u16>,
        services: &str,
        work: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let mut fresh = Self::load(self.sizes, snat_ports);
        fresh.apply(services);
        work(&mut fresh)
    }

    /// Flows opened to the present backends of all services.
    pub fn flows(&self) -> u64 {
        let names = self.tables.applied().services().keys();
        names.flat_map(|name| self.tables.members(name).map(|(_, _, flows)| flows)).sum()
    }

    /// The number of the interface towards the clients.
    pub fn up(&self) -> u32 {
        self.up
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
        UP.0,
        UP.1,
        DOWN.0,
        DOWN.1,
        router = mac(ROUTER_MAC),
    );
    for host in 10..30 {
        let address = mac(backend_mac(host));
        for neighbour in [format!("10.0.1.{host}"), format!("fd00:1::{host:x}")] {
            let _ = writeln!(batch, "neigh add {neighbour} lladdr {address} dev down0 nud permanent");
        }
    }
    namespace.ip(&batch);
    for interface in ["up0", "down0"] {
        namespace.sysctl(&format!("ipv4/conf/{interface}/forwarding"), "1");
        namespace.sysctl(&format!("ipv6/conf/{interface}/forwarding"), "1");
    }
}
