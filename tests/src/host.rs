//! The machines of a lab, and their addresses.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    sync::atomic::AtomicU16,
};

use crate::{PATIENCE, link, netns::NetNs, poll};

/// A machine: a namespace with its interfaces.
#[derive(Debug)]
pub struct Host {
    name: String,
    /// See [`Host::node`].
    node: Option<String>,
    namespace: NetNs,
    interfaces: Vec<Interface>,
    /// How many links it has, those without an address included.
    links: usize,
    /// See [`link::behave_like_hardware`].
    hardware: Vec<OwnedFd>,
    /// How many source ports were handed out.
    pub(crate) port: AtomicU16,
}

#[derive(Debug)]
struct Interface {
    name: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

/// A /24 and a /64 that one link or switch has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subnet {
    v4: [u8; 3],
    v6: [u16; 2],
}

impl Host {
    pub(crate) fn new(name: &str) -> Self {
        Self::in_namespace(name, NetNs::new(name))
    }

    /// The machine that this process runs on.
    pub(crate) fn this_machine(name: &str) -> Self {
        Self::in_namespace(name, NetNs::own(name))
    }

    fn in_namespace(name: &str, namespace: NetNs) -> Self {
        // An address could not be used before a second had shown that nobody else has it.
        namespace.sysctl("ipv6/conf/all/accept_dad", "0");
        namespace.sysctl("ipv6/conf/default/accept_dad", "0");
        // A new namespace has the IPv4 settings of the machine, and that one may be a router.
        namespace.sysctl("ipv4/ip_forward", "0");
        // Tests ask for errors faster than one would bear elsewhere.
        namespace.sysctl("ipv4/icmp_ratelimit", "0");
        namespace.sysctl("ipv6/icmp/ratelimit", "0");
        Self {
            name: name.to_owned(),
            node: None,
            namespace,
            interfaces: Vec::new(),
            links: 0,
            hardware: Vec::new(),
            port: AtomicU16::default(),
        }
    }

    /// A host that forwards whatever comes.
    pub(crate) fn router(name: &str) -> Self {
        let router = Self::new(name);
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ] {
            router.namespace.sysctl(key, value);
        }
        router
    }

    /// The same host, being on this node.
    pub(crate) fn on_node(mut self, node: &str) -> Self {
        self.node = Some(node.to_owned());
        self
    }

    /// The name: `lb`, `b1`, `n1`, `n1-p1`, or what the client was called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node that it is, or on which it is a pod; `None` if it is neither.
    pub fn node(&self) -> Option<&str> {
        self.node.as_deref()
    }

    /// The namespace that the host is.
    pub fn namespace(&self) -> &NetNs {
        &self.namespace
    }

    /// The names of its interfaces, loopback left out.
    pub fn interfaces(&self) -> impl Iterator<Item = &str> {
        self.interfaces.iter().map(|interface| interface.name.as_str())
    }

    /// Its addresses; the balancer of a routed lab has a pair on every link, and a node one on every uplink
    /// and one towards its pods if they are bridged.
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

    /// The address that it has in the same family as this one.
    pub fn address_like(&self, other: impl Into<IpAddr>) -> IpAddr {
        if other.into().is_ipv4() { self.v4().into() } else { self.v6().into() }
    }

    /// Gives an interface its addresses of a subnet, and sets it up.
    pub(crate) fn add_interface(&mut self, name: &str, subnet: Subnet, number: u8) {
        self.add_addresses(name, (subnet.v4(number), 24), (subnet.v6(number), 64));
    }

    /// Gives an interface addresses, each with a prefix length, and sets it up.
    pub(crate) fn add_addresses(&mut self, name: &str, (v4, bits4): (Ipv4Addr, u8), (v6, bits6): (Ipv6Addr, u8)) {
        self.namespace.ip(&format!(
            "addr add {v4}/{bits4} dev {name}\naddr add {v6}/{bits6} dev {name} nodad\nlink set {name} up"
        ));
        self.interfaces.push(Interface { name: name.to_owned(), v4, v6 });
        self.links += 1;
    }

    /// Counts one more link, that has no addresses but link-local ones.
    pub(crate) const fn add_link(&mut self) {
        self.links += 1;
    }

    /// Makes the first host of a subnet its gateway.
    pub(crate) fn route_by(&self, subnet: Subnet) {
        self.namespace.ip(&format!("route add default via {}\nroute add default via {}", subnet.v4(1), subnet.v6(1)));
    }

    /// See [`link::behave_like_hardware`].
    pub(crate) fn behave_like_hardware(&mut self, interface: &str) {
        let hardware = self.namespace.run(|| link::behave_like_hardware(interface));
        self.hardware.push(hardware.unwrap_or_else(|error| panic!("{interface} of {}: {error}", self.name)));
    }

    /// Whether an interface puts segments together which it receives; one that is not there does not.
    pub fn has_gro(&self, interface: &str) -> bool {
        self.namespace.run(|| link::has_gro(interface)).unwrap_or(false)
    }

    /// Makes an interface put segments together which it receives, or not.
    pub fn set_gro(&self, interface: &str, is_on: bool) {
        let result = self.namespace.run(|| link::set_gro(interface, is_on));
        result.unwrap_or_else(|error| panic!("{interface} of {}: {error}", self.name));
    }

    /// From now on checksums are whole in what leaves by this interface, and no card at the other end has to complete them.
    pub fn complete_checksums(&self, interface: &str) {
        let result = self.namespace.run(|| link::complete_checksums(interface));
        result.unwrap_or_else(|error| panic!("{interface} of {}: {error}", self.name));
    }

    /// Waits for the link-local addresses, without which nobody is asked for an Ethernet address: a link gets
    /// its own when the kernel notices that both ends are up.
    pub(crate) fn wait_until_usable(&self) {
        let usable = poll(PATIENCE, || {
            // Address, index, prefix, scope (20: link), flags (40: tentative), name.
            let table = self.namespace.run(|| fs::read_to_string("/proc/thread-self/net/if_inet6")).ok()?;
            let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            let ready = rows.filter(|row| matches!(row.as_slice(), [_, _, _, "20", "80", _])).count();
            (ready >= self.links).then_some(())
        });
        assert!(usable.is_some(), "the links of {} do not come up", self.name);
    }
}

impl Subnet {
    /// What the switch of a one-armed lab connects.
    pub(crate) const SWITCH: Self = Self { v4: [10, 0, 0], v6: [0xfd00, 0] };

    /// Of the link to the backend or the node `i`.
    pub(crate) fn of_backend(i: u8) -> Self {
        Self { v4: [10, i, 0], v6: [0xfd00, spelled_alike(i)] }
    }

    /// Of the link to the client `j`.
    pub(crate) fn of_client(j: u8) -> Self {
        Self { v4: [192, 168, j], v6: [0xfd01, spelled_alike(j)] }
    }

    /// Of the pods of the node `i`.
    pub(crate) fn of_pods(i: u8) -> Self {
        Self { v4: [10, 244, i], v6: [0xfd44, spelled_alike(i)] }
    }

    /// Of the narrow link `k`.
    pub(crate) fn of_narrow(k: u8) -> Self {
        Self { v4: [10, 200, k], v6: [0xfd02, spelled_alike(k)] }
    }

    /// The whole of it.
    pub(crate) fn prefixes(self) -> (String, String) {
        (format!("{}/24", self.v4(0)), format!("{}/64", self.v6(0)))
    }

    pub(crate) fn v4(self, number: u8) -> Ipv4Addr {
        let [a, b, c] = self.v4;
        Ipv4Addr::new(a, b, c, number)
    }

    pub(crate) fn v6(self, number: u8) -> Ipv6Addr {
        let [a, b] = self.v6;
        Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, spelled_alike(number))
    }
}

/// The number whose hexadecimal digits are the decimal digits of `number`, so that both families' addresses look alike.
pub(crate) fn spelled_alike(number: u8) -> u16 {
    u16::from_str_radix(&number.to_string(), 16).expect("decimal digits are hexadecimal ones, and three fit")
}
