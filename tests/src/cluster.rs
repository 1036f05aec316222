//! Nodes with pods behind them, and clients outside: the network of a cluster.
//!
//! ```no_run
//! # use tests::cluster::{Layout, PodNetwork};
//! let cluster = Layout::new(PodNetwork::Bridged).up();
//! let _server = cluster.pod(2, 1).serve(8080);
//! assert_eq!(cluster.client().tcp((cluster.pod(2, 1).v4(), 8080)).unwrap().backend(), "n2-p1");
//! ```
//!
//! Every machine has a link of its own to a router in the middle, which is its default gateway:
//!
//! | host | IPv4 | IPv6 |
//! |---|---|---|
//! | node `n<i>`, `eth0` | 10.i.0.2/24 | `fd00:i::2/64` |
//! | `n1` with a second uplink, `eth1` | 10.101.0.2/24 | `fd00:101::2/64` |
//! | pod `n<i>-p<k>` | 10.244.i.(10+k) | `fd44:i::1k` |
//! | j-th client | 192.168.j.2/24 | `fd01:j::2/64` |
//! | the router on each link | .1 | `::1` |
//! | a narrow link of node `i` or client `j`, router and hop | 10.200.i or 10.200.(100+j), .1 and .2 | `fd02:…::1` and `::2` |
//!
//! Two nodes, two pods on each. The router knows the way to the pods of each node, and `n1` is the way to the addresses
//! of [`services`](crate::services): 10.96.0.0/16 and `fd00:96::/64`, 203.0.113.0/24 and `2001:db8:e::/48`. What is sent to 198.18.0.0/15 and
//! `2001:db8:f::/48`, where forged packets may say that they come from, ends at the router.
//!
//! All nodes forward, as those of Kubernetes do. Without an agent all machines reach each other by their own addresses.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::host::{Host, Subnet};

/// How many nodes there are, and how many pods on each.
const NODES: u8 = 2;
const PODS: u8 = 2;

/// The largest packet, in bytes, that a narrow link takes. Both its ends have other links that take 1,500.
pub const NARROW_MTU: u16 = 1_400;

/// What services have their addresses from.
const SERVICES: [Prefixes; 2] = [("10.96.0.0/16", "fd00:96::/64"), ("203.0.113.0/24", "2001:db8:e::/48")];

/// What forged packets come from, a /15 and a /48: the first address of each.
pub const FORGED: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(198, 18, 0, 0), Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 0));

/// An IPv4 and an IPv6 prefix.
type Prefixes<Text = &'static str> = (Text, Text);

/// The Ethernet address of a node's end of each link to a routed pod, and the IPv4 and IPv6 gateway that the pod knows:
/// those of Calico (<https://docs.tigera.io/calico/latest/reference/faq>). The third follows from the first.
const GATEWAY_MAC: &str = "ee:ee:ee:ee:ee:ee";
const GATEWAY4: &str = "169.254.1.1";
const GATEWAY6: &str = "fe80::ecee:eeff:feee:eeee";

/// How pods hang on their node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PodNetwork {
    /// A port of the bridge `cni0` each, on which the node is `.1` and the gateway. The node's end is `veth<k>`.
    Bridged,
    /// A link each, without a subnet: the node has a host route by `cali<k>`, and answers for a gateway that nobody has.
    Routed,
}

/// What a node's uplinks are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Uplinks {
    /// Network cards, for XDP: what comes in is as on a wire, whole in checksums and in segments of the MTU's size; behind XDP those are
    /// put together again (GRO).
    Cards,
    /// What veth is by itself: checksums may be left to be done and segments be as large as 64 KiB, as between
    /// virtual machines and containers of one host.
    Veth,
}

/// What a cluster will look like.
#[derive(Clone, Debug)]
#[must_use = "a plan is nothing until it is `up`"]
pub struct Layout {
    pods: PodNetwork,
    uplinks: Uplinks,
    clients: u8,
    second_uplink: bool,
    narrow_clients: bool,
    narrow_node: Option<u8>,
}

/// A cluster that is up; it goes when this is dropped.
#[derive(Debug)]
#[must_use = "the network goes when this is dropped"]
pub struct Cluster {
    clients: Vec<Host>,
    nodes: Vec<Node>,
    router: Host,
    /// The hosts behind narrow links.
    hops: Vec<Host>,
}

/// A node with its pods.
#[derive(Debug)]
pub struct Node {
    host: Host,
    number: u8,
    pods: Vec<Host>,
    network: PodNetwork,
    uplinks: Vec<&'static str>,
}

impl Layout {
    /// Two nodes with two pods each, and a client.
    pub const fn new(pods: PodNetwork) -> Self {
        let uplinks = Uplinks::Cards;
        Self { pods, uplinks, clients: 1, second_uplink: false, narrow_clients: false, narrow_node: None }
    }

    /// With uplinks of this kind; else they are cards.
    pub const fn uplinks(mut self, uplinks: Uplinks) -> Self {
        self.uplinks = uplinks;
        self
    }

    /// With this many clients: `client1` and so on.
    pub fn clients(mut self, count: u8) -> Self {
        assert!(count <= 9, "a client's name is part of the name of an interface");
        self.clients = count;
        self
    }

    /// With a second uplink on `n1`, by which all leaves that is not for the other end of the first. Services are still behind the first.
    pub const fn second_uplink(mut self) -> Self {
        self.second_uplink = true;
        self
    }

    /// With a narrow link between each client's gateway and the router.
    pub const fn narrow_clients(mut self) -> Self {
        self.narrow_clients = true;
        self
    }

    /// With a narrow link between the gateway of a node and the router.
    pub fn narrow_node(mut self, i: u8) -> Self {
        assert!((1..=NODES).contains(&i), "there is no node n{i}");
        self.narrow_node = Some(i);
        self
    }

    /// Raises it; when this returns all addresses can be used.
    pub fn up(self) -> Cluster {
        let mut cluster =
            Cluster { clients: Vec::new(), nodes: Vec::new(), router: Host::router("r"), hops: Vec::new() };
        for i in 1..=NODES {
            let node = self.node(&mut cluster, i);
            cluster.nodes.push(node);
        }
        for j in 1..=self.clients {
            let mut client = Host::new(&format!("client{j}"));
            let narrow = self.narrow_clients.then_some(100 + j);
            self.plug(&mut cluster, (&mut client, "eth0"), Subnet::of_client(j), narrow, &[]);
            client.route_by(Subnet::of_client(j));
            cluster.clients.push(client);
        }
        let (v4, v6) = FORGED;
        cluster.router.namespace().ip(&format!("route add blackhole {v4}/15\nroute add blackhole {v6}/48"));
        cluster.hosts().for_each(Host::wait_until_usable);
        cluster
    }

    fn node(&self, cluster: &mut Cluster, i: u8) -> Node {
        let name = format!("n{i}");
        let mut host = Host::new(&name).on_node(&name);
        for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/default/forwarding"] {
            host.namespace().sysctl(key, "1");
        }
        // Strict, unless packets of one connection are to come and go by different uplinks.
        let rp_filter = if self.second_uplink { "0" } else { "1" };
        for key in ["ipv4/conf/all/rp_filter", "ipv4/conf/default/rp_filter"] {
            host.namespace().sysctl(key, rp_filter);
        }
        let mut behind = vec![Subnet::of_pods(i).prefixes()];
        if i == 1 {
            behind.extend(SERVICES.map(|(v4, v6)| (v4.to_owned(), v6.to_owned())));
        }
        let narrow = self.narrow_node.filter(|narrow| *narrow == i);
        self.plug(cluster, (&mut host, "eth0"), Subnet::of_backend(i), narrow, &behind);
        let mut uplinks = vec!["eth0"];
        let mut gateway = Subnet::of_backend(i);
        if i == 1 && self.second_uplink {
            gateway = Subnet::of_backend(100 + i);
            self.plug(cluster, (&mut host, "eth1"), gateway, None, &[]);
            uplinks.push("eth1");
        }
        host.route_by(gateway);
        let mut node = Node::new(host, i, self.pods, uplinks);
        (0..PODS).for_each(|_| node.add_pod());
        node
    }

    /// Gives a machine a link to the router, which is then its way to what lies behind it; with a hop between them if the link
    /// is to be narrow, which needs a number of its own.
    fn plug(
        &self,
        cluster: &mut Cluster,
        (machine, device): (&mut Host, &str),
        subnet: Subnet,
        narrow: Option<u8>,
        behind: &[Prefixes<String>],
    ) {
        let port = format!("{}-{device}", machine.name());
        let router = &mut cluster.router;
        let Some(number) = narrow else {
            self.link(router, &port, (machine, device), subnet);
            lead(router, behind, subnet);
            return;
        };
        let mut hop = Host::router(&format!("hop-{}", machine.name()));
        let wire = Subnet::of_narrow(number);
        self.link(router, &port, (&mut hop, "eth0"), wire);
        router.namespace().ip(&format!("link set {port} mtu {NARROW_MTU}"));
        hop.namespace().ip(&format!("link set eth0 mtu {NARROW_MTU}"));
        lead(router, &[behind, &[subnet.prefixes()]].concat(), wire);
        hop.route_by(wire);
        self.link(&mut hop, "eth1", (machine, device), subnet);
        lead(&hop, behind, subnet);
        cluster.hops.push(hop);
    }

    /// Links `.1` of a subnet with `.2`.
    fn link(&self, router: &mut Host, port: &str, (machine, device): (&mut Host, &str), subnet: Subnet) {
        let namespace = machine.namespace().name();
        router.namespace().ip(&format!("link add {port} type veth peer name {device} netns {namespace}"));
        router.add_interface(port, subnet, 1);
        machine.add_interface(device, subnet, 2);
        if self.uplinks == Uplinks::Cards {
            router.behave_like_hardware(port);
            machine.set_gro(device, true);
        }
    }
}

/// Makes `.2` of a subnet the router's way to what lies behind it.
fn lead(router: &Host, behind: &[Prefixes<String>], subnet: Subnet) {
    let (v4, v6) = (subnet.v4(2), subnet.v6(2));
    let all = behind.iter().map(|(to4, to6)| format!("route add {to4} via {v4}\nroute add {to6} via {v6}\n"));
    router.namespace().ip(&all.collect::<String>());
}

impl Node {
    /// Prepares the node for pods.
    fn new(mut host: Host, number: u8, network: PodNetwork, uplinks: Vec<&'static str>) -> Self {
        let subnet = Subnet::of_pods(number);
        match network {
            PodNetwork::Bridged => {
                host.namespace().ip("link add cni0 type bridge forward_delay 0 mcast_snooping 0");
                host.add_interface("cni0", subnet, 1);
            }
            PodNetwork::Routed => {
                // What no pod has is not somewhere else.
                let (v4, v6) = subnet.prefixes();
                host.namespace().ip(&format!("route add blackhole {v4}\nroute add blackhole {v6}"));
            }
        }
        Self { host, number, pods: Vec::new(), network, uplinks }
    }

    fn add_pod(&mut self) {
        let k = 1 + u8::try_from(self.pods.len()).expect("there are few");
        let mut pod = Host::new(&format!("{}-p{k}", self.host.name())).on_node(self.host.name());
        match self.network {
            PodNetwork::Bridged => self.bridge(&mut pod, k),
            PodNetwork::Routed => self.route(&mut pod, k),
        }
        self.host.add_link();
        self.pods.push(pod);
    }

    fn bridge(&self, pod: &mut Host, k: u8) {
        let (subnet, namespace) = (Subnet::of_pods(self.number), pod.namespace().name());
        self.host.namespace().ip(&format!(
            "link add veth{k} type veth peer name eth0 netns {namespace}\nlink set veth{k} master cni0 up"
        ));
        pod.add_interface("eth0", subnet, 10 + k);
        pod.route_by(subnet);
    }

    fn route(&self, pod: &mut Host, k: u8) {
        let (subnet, node, namespace) = (Subnet::of_pods(self.number), self.host.namespace(), pod.namespace().name());
        let (v4, v6) = (subnet.v4(10 + k), subnet.v6(10 + k));
        node.ip(&format!("link add cali{k} address {GATEWAY_MAC} type veth peer name eth0 netns {namespace}"));
        node.sysctl(&format!("ipv4/conf/cali{k}/proxy_arp"), "1");
        node.sysctl(&format!("ipv4/neigh/cali{k}/proxy_delay"), "0");
        node.ip(&format!("link set cali{k} up\nroute add {v4} dev cali{k}\nroute add {v6} dev cali{k}"));
        pod.add_addresses("eth0", (v4, 32), (v6, 128));
        pod.namespace().ip(&format!(
            "route add {GATEWAY4} dev eth0 scope link\nroute add default via {GATEWAY4} dev eth0
             route add default via {GATEWAY6} dev eth0"
        ));
    }
}

impl Cluster {
    /// The first client.
    #[track_caller]
    pub fn client(&self) -> &Host {
        self.clients.first().expect("there is a client unless a layout says none")
    }

    /// Every client.
    pub fn clients(&self) -> &[Host] {
        &self.clients
    }

    /// The node `n<i>`.
    #[track_caller]
    pub fn node(&self, i: usize) -> &Node {
        self.nodes.get(i.wrapping_sub(1)).unwrap_or_else(|| panic!("there is no node n{i}"))
    }

    /// The pod `n<i>-p<k>`.
    #[track_caller]
    pub fn pod(&self, i: usize, k: usize) -> &Host {
        self.node(i).pods.get(k.wrapping_sub(1)).unwrap_or_else(|| panic!("there is no pod n{i}-p{k}"))
    }

    /// One more pod on the node `n<i>`; when this returns its addresses can be used.
    #[track_caller]
    pub fn add_pod(&mut self, i: usize) {
        self.nodes.get_mut(i.wrapping_sub(1)).unwrap_or_else(|| panic!("there is no node n{i}")).add_pod();
        self.hosts().for_each(Host::wait_until_usable);
    }

    /// The router in the middle.
    pub fn router(&self) -> &Host {
        &self.router
    }

    /// The only hop behind a narrow link.
    #[track_caller]
    pub fn hop(&self) -> &Host {
        let [hop] = self.hops.as_slice() else { panic!("there are {} hops", self.hops.len()) };
        hop
    }

    fn hosts(&self) -> impl Iterator<Item = &Host> {
        let of_nodes = self.nodes.iter().flat_map(|node| [&node.host].into_iter().chain(&node.pods));
        of_nodes.chain(&self.clients).chain(&self.hops).chain([&self.router])
    }
}

impl Node {
    /// The node itself, as a machine.
    pub const fn host(&self) -> &Host {
        &self.host
    }

    /// Its pods.
    pub fn pods(&self) -> &[Host] {
        &self.pods
    }

    /// The interfaces towards the router.
    pub fn uplinks(&self) -> &[&'static str] {
        &self.uplinks
    }

    /// The pattern of its interfaces towards pods.
    pub const fn pod_interfaces(&self) -> &'static str {
        match self.network {
            PodNetwork::Bridged => "veth*",
            PodNetwork::Routed => "cali*",
        }
    }
}
