//! A network to balance in: a client, backends, and the balancer between them.
//!
//! ```no_run
//! # use tests::topology::Topology;
//! let lab = Topology::new().client("client").backends(3).up();
//! let _servers = lab.serve(8080);
//! assert_eq!(lab.client().tcp((lab.backend(1).v4(), 8080)).unwrap().backend(), "b1");
//! ```
//!
//! Routed (the default), every host has a link of its own to the balancer, which is its default gateway:
//!
//! | host | IPv4 | IPv6 |
//! |---|---|---|
//! | backend `b<i>` | 10.i.0.2/24 | `fd00:i::2/64` |
//! | j-th client | 192.168.j.2/24 | `fd01:j::2/64` |
//! | the balancer on each link | .1 | `::1` |
//!
//! One-armed, all are on one switch: the balancer is 10.0.0.1, backends are 10.0.0.(10+i), clients 10.0.0.(100+j),
//! and the same behind `fd00::`. Every other address, and so every VIP, is reached through the balancer,
//! which does no more than the kernel does until an agent runs there: not even forwarding is on.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::OwnedFd,
    sync::atomic::AtomicU16,
    time::Duration,
};

use crate::{link, netns::NetNs, poll};

/// A virtual IPv4 address: nobody in the lab has it.
pub const VIP4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// A virtual IPv6 address: nobody in the lab has it.
pub const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10);

/// How long the kernel may take for what it does by itself, such as finding a neighbour.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a lab will look like.
#[derive(Clone, Debug, Default)]
#[must_use = "a plan is nothing until it is `up`"]
pub struct Topology {
    clients: Vec<String>,
    backends: u8,
    one_armed: bool,
}

/// A network that is up; it goes when this is dropped.
#[derive(Debug)]
#[must_use = "the network goes when this is dropped"]
pub struct Lab {
    lb: Host,
    clients: Vec<Host>,
    backends: Vec<Host>,
    /// The bridge of a one-armed lab, and what holds its port to the balancer.
    _switch: Option<(NetNs, OwnedFd)>,
}

/// A machine: a namespace with its interfaces.
#[derive(Debug)]
pub struct Host {
    name: String,
    namespace: NetNs,
    interfaces: Vec<Interface>,
    /// See [`link::behave_like_hardware`].
    hardware: Option<OwnedFd>,
    /// The next source port to hand out; see [`Host::next_port`].
    pub(crate) port: AtomicU16,
}

#[derive(Debug)]
struct Interface {
    name: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

/// A /24 and a /64 that one link or switch has.
#[derive(Clone, Copy)]
struct Subnet {
    v4: [u8; 3],
    v6: [u16; 2],
}

impl Topology {
    /// A routed network without hosts.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more client, called `name`. If none is named there is one called `client`.
    pub fn client(mut self, name: &str) -> Self {
        self.clients.push(name.to_owned());
        self
    }

    /// Backends `b1`, `b2` and so on.
    pub fn backends(mut self, count: u8) -> Self {
        assert!(count <= 89, "the next one would get the address of a client");
        self.backends = count;
        self
    }

    /// All on one switch, the balancer having a single interface.
    pub fn one_armed(mut self) -> Self {
        self.one_armed = true;
        self
    }

    /// Raises it; when this returns all addresses can be used.
    pub fn up(mut self) -> Lab {
        if self.clients.is_empty() {
            self.clients.push("client".to_owned());
        }
        let lb = Host::new("lb");
        let lab = if self.one_armed { self.up_one_armed(lb) } else { self.up_routed(lb) };
        lab.hosts().for_each(Host::wait_until_usable);
        lab
    }

    fn up_routed(self, mut lb: Host) -> Lab {
        let mut join = |name: &str, subnet: Subnet| {
            let mut host = Host::new(name);
            let port = format!("eth-{name}");
            lb.namespace.ip(&format!("link add {port} type veth peer name eth0 netns {}", host.namespace.name()));
            lb.add_interface(&port, subnet, 1);
            host.add_interface("eth0", subnet, 2);
            host.connect(subnet);
            host
        };
        let clients = (1..).zip(&self.clients).map(|(j, name)| join(name, Subnet::of_client(j))).collect();
        let backends = (1..=self.backends).map(|i| join(&format!("b{i}"), Subnet::of_backend(i))).collect();
        Lab { lb, clients, backends, _switch: None }
    }

    fn up_one_armed(self, mut lb: Host) -> Lab {
        let switch = NetNs::new("switch");
        switch.sysctl("ipv6/conf/default/disable_ipv6", "1");
        switch.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0\nlink set br0 up");
        let plug = |host: &mut Host, number: u8| {
            let (port, namespace) = (&host.name, host.namespace.name());
            switch.ip(&format!(
                "link add {port} type veth peer name eth0 netns {namespace}\nlink set {port} master br0 up"
            ));
            host.add_interface("eth0", Subnet::SWITCH, number);
        };
        plug(&mut lb, 1);
        let port = switch.run(|| link::behave_like_hardware("lb")).expect("the port was just made");
        let join = |name: &str, number: u8| {
            let mut host = Host::new(name);
            plug(&mut host, number);
            host.connect(Subnet::SWITCH);
            host
        };
        let clients = (1..).zip(&self.clients).map(|(j, name)| join(name, 100 + j)).collect();
        let backends = (1..=self.backends).map(|i| join(&format!("b{i}"), 10 + i)).collect();
        Lab { lb, clients, backends, _switch: Some((switch, port)) }
    }
}

impl Lab {
    /// The balancer.
    pub fn lb(&self) -> &Host {
        &self.lb
    }

    /// The first client.
    pub fn client(&self) -> &Host {
        self.clients.first().expect("`up` adds one")
    }

    /// The backend `b<i>`.
    #[track_caller]
    pub fn backend(&self, i: usize) -> &Host {
        self.backends.get(i.wrapping_sub(1)).unwrap_or_else(|| panic!("there is no backend b{i}"))
    }

    /// Every backend, `b1` first.
    pub fn backends(&self) -> &[Host] {
        &self.backends
    }

    /// Every client.
    pub fn clients(&self) -> &[Host] {
        &self.clients
    }

    /// Makes the balancer know the Ethernet address of every host, and they its own.
    pub fn resolve_neighbours(&self) {
        let hosts: Vec<IpAddr> = self.clients.iter().chain(&self.backends).flat_map(Host::addresses).collect();
        self.lb.namespace.run(|| {
            let socket = UdpSocket::bind("[::]:0").expect("any port will do");
            for host in &hosts {
                let host = match host {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => *v6,
                };
                // Nobody listens on the discard port; what counts is that the kernel has to find the host.
                let _ = socket.send_to(b"", (host, 9));
            }
        });
        let all_known = poll(PATIENCE, || {
            let known = self.neighbours();
            hosts.iter().all(|host| known.contains(host)).then_some(())
        });
        assert!(all_known.is_some(), "of {hosts:?} only {:?} answered", self.neighbours());
    }

    /// Makes the balancer forget all Ethernet addresses.
    pub fn flush_neighbours(&self) {
        self.lb.namespace.ip("neigh flush all");
    }

    /// The hosts of which the balancer knows the Ethernet address.
    pub fn neighbours(&self) -> Vec<IpAddr> {
        let output = self.lb.namespace.command("ip").args(["neigh", "show"]).output().expect("ip is needed");
        let text = String::from_utf8_lossy(&output.stdout);
        let known = text.lines().filter(|line| line.contains("lladdr") && !line.contains("FAILED"));
        known.filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
    }

    fn hosts(&self) -> impl Iterator<Item = &Host> {
        [&self.lb].into_iter().chain(&self.clients).chain(&self.backends)
    }
}

impl Host {
    fn new(name: &str) -> Self {
        let namespace = NetNs::new(name);
        // An address could not be used before a second had shown that nobody else has it.
        namespace.sysctl("ipv6/conf/all/accept_dad", "0");
        namespace.sysctl("ipv6/conf/default/accept_dad", "0");
        // A new namespace has the IPv4 settings of the machine, and that one may be a router.
        namespace.sysctl("ipv4/ip_forward", "0");
        Self { name: name.to_owned(), namespace, interfaces: Vec::new(), hardware: None, port: AtomicU16::default() }
    }

    /// The name: `lb`, `b1`, or what the client was called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace that the host is.
    pub fn namespace(&self) -> &NetNs {
        &self.namespace
    }

    /// The names of its interfaces, loopback left out.
    pub fn interfaces(&self) -> impl Iterator<Item = &str> {
        self.interfaces.iter().map(|interface| interface.name.as_str())
    }

    /// Its addresses; the balancer of a routed lab has a pair on every link.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.interfaces.iter().flat_map(|interface| [interface.v4.into(), interface.v6.into()])
    }

    /// Its IPv4 address, the first if it has several.
    pub fn v4(&self) -> Ipv4Addr {
        self.interfaces.first().expect("every host has one").v4
    }

    /// Its IPv6 address, the first if it has several.
    pub fn v6(&self) -> Ipv6Addr {
        self.interfaces.first().expect("every host has one").v6
    }

    fn add_interface(&mut self, name: &str, subnet: Subnet, number: u8) {
        let (v4, v6) = (subnet.v4(number), subnet.v6(number));
        self.namespace
            .ip(&format!("addr add {v4}/24 dev {name}\naddr add {v6}/64 dev {name} nodad\nlink set {name} up"));
        self.interfaces.push(Interface { name: name.to_owned(), v4, v6 });
    }

    /// Makes its only interface a network card, and the balancer the gateway.
    fn connect(&mut self, subnet: Subnet) {
        self.namespace.ip(&format!("route add default via {}\nroute add default via {}", subnet.v4(1), subnet.v6(1)));
        let hardware = self.namespace.run(|| link::behave_like_hardware("eth0"));
        self.hardware = Some(hardware.expect("the interface was just made"));
    }

    /// Waits for the link-local addresses, without which nobody is asked for an Ethernet address: a link gets
    /// its own when the kernel notices that both ends are up.
    fn wait_until_usable(&self) {
        let usable = poll(PATIENCE, || {
            // Address, index, prefix, scope (20: link), flags (40: tentative), name.
            let table = self.namespace.run(|| fs::read_to_string("/proc/thread-self/net/if_inet6")).ok()?;
            let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            let ready = rows.filter(|row| matches!(row.as_slice(), [_, _, _, "20", "80", _])).count();
            (ready == self.interfaces.len()).then_some(())
        });
        assert!(usable.is_some(), "the links of {} do not come up", self.name);
    }
}

impl Subnet {
    const SWITCH: Self = Self { v4: [10, 0, 0], v6: [0xfd00, 0] };

    fn of_backend(i: u8) -> Self {
        Self { v4: [10, i, 0], v6: [0xfd00, spelled_alike(i)] }
    }

    fn of_client(j: u8) -> Self {
        Self { v4: [192, 168, j], v6: [0xfd01, spelled_alike(j)] }
    }

    fn v4(self, number: u8) -> Ipv4Addr {
        let [a, b, c] = self.v4;
        Ipv4Addr::new(a, b, c, number)
    }

    fn v6(self, number: u8) -> Ipv6Addr {
        let [a, b] = self.v6;
        Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, spelled_alike(number))
    }
}

/// The number whose hexadecimal digits are the decimal digits of `number`, so that both families' addresses look alike.
fn spelled_alike(number: u8) -> u16 {
    u16::from_str_radix(&number.to_string(), 16).expect("decimal digits are hexadecimal ones, and three fit")
}
