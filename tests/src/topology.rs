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
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::OwnedFd,
};

pub use crate::host::Host;
use crate::{PATIENCE, host::Subnet, link, netns::NetNs, poll};

/// A virtual IPv4 address: nobody in the lab has it.
pub const VIP4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// A virtual IPv6 address: nobody in the lab has it.
pub const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10);

/// What a lab will look like.
#[derive(Clone, Debug, Default)]
#[must_use = "a plan is nothing until it is `up`"]
pub struct Topology {
    clients: Vec<String>,
    backends: u8,
    one_armed: bool,
    on_this_machine: bool,
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

    /// The balancer is the machine that this runs on, whose settings are changed for it: one that is there for the test alone.
    pub fn on_this_machine(mut self) -> Self {
        self.on_this_machine = true;
        self
    }

    /// Raises it; when this returns all addresses can be used.
    pub fn up(mut self) -> Lab {
        if self.clients.is_empty() {
            self.clients.push("client".to_owned());
        }
        let lb = if self.on_this_machine { Host::this_machine("lb") } else { Host::new("lb") };
        let lab = if self.one_armed { self.up_one_armed(lb) } else { self.up_routed(lb) };
        lab.hosts().for_each(Host::wait_until_usable);
        lab
    }

    fn up_routed(self, mut lb: Host) -> Lab {
        let mut join = |name: &str, subnet: Subnet| {
            let mut host = Host::new(name);
            let port = format!("eth-{name}");
            lb.namespace().ip(&format!("link add {port} type veth peer name eth0 netns {}", host.namespace().name()));
            lb.add_interface(&port, subnet, 1);
            host.add_interface("eth0", subnet, 2);
            connect(&mut host, subnet);
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
            let (port, namespace) = (host.name(), host.namespace().name());
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
            connect(&mut host, Subnet::SWITCH);
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
        self.lb.namespace().run(|| {
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
        self.lb.namespace().ip("neigh flush all");
    }

    /// The hosts of which the balancer knows the Ethernet address.
    pub fn neighbours(&self) -> Vec<IpAddr> {
        let output = self.lb.namespace().command("ip").args(["neigh", "show"]).output().expect("ip is needed");
        let text = String::from_utf8_lossy(&output.stdout);
        let known = text.lines().filter(|line| line.contains("lladdr") && !line.contains("FAILED"));
        known.filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
    }

    fn hosts(&self) -> impl Iterator<Item = &Host> {
        [&self.lb].into_iter().chain(&self.clients).chain(&self.backends)
    }
}

/// Makes the only interface of a host a network card, and the balancer its gateway.
fn connect(host: &mut Host, subnet: Subnet) {
    host.route_by(subnet);
    host.behave_like_hardware("eth0");
}
