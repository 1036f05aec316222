use rtnetlink::packet_route::address::{AddressFlags, AddressScope};

use super::*;
use crate::network::listing::{Address, Route};

fn address(interface: u32, text: &str, flags: AddressFlags) -> Address {
    let net: IpNet = text.parse().unwrap();
    let scope = AddressScope::Universe;
    Address { interface, ip: net.addr(), prefix: net.prefix_len(), scope, flags }
}

fn route(interface: u32, text: &str) -> Route {
    Route { destination: text.parse().unwrap(), interface }
}

fn read(values: &[&str]) -> Result<Option<PodInterfaces>, String> {
    PodInterfaces::read(values.iter().map(|text| text.parse().unwrap()).collect())
}

fn roles(uplinks: &[&str], patterns: &[&str]) -> Roles {
    Roles {
        uplinks: uplinks.iter().map(|&name| name.to_owned()).collect(),
        pod_interfaces: read(patterns).unwrap().unwrap_or_default(),
        ..Roles::default()
    }
}

/// A node with most that there is: pods on a bridge and beside it, machines on the uplink's bridge, VLANs and tunnels.
fn links() -> Vec<Link> {
    let lo = Link { layer: LinkLayerType::Loopback, ..Link::of(1, "lo", None) };
    let wg0 = Link { layer: LinkLayerType::None, ..Link::of(11, "wg0", Some(InfoKind::Wireguard)) };
    vec![
        lo,
        Link::of(2, "eth0", None),
        Link::of(3, "eth1", None),
        Link { below: Some(2), ..Link::of(4, "eth0.7", Some(InfoKind::Vlan)) },
        Link { port_of: Some(10), ..Link::of(5, "veth1", Some(InfoKind::Veth)) },
        Link::of(6, "cali1", Some(InfoKind::Veth)),
        Link { below: Some(2), ..Link::of(7, "vxlan1", Some(InfoKind::Vxlan)) },
        Link { port_of: Some(9), ..Link::of(8, "eth2", None) },
        Link::of(9, "br-lan", Some(InfoKind::Bridge)),
        Link::of(10, "cni0", Some(InfoKind::Bridge)),
        wg0,
        Link { port_of: Some(13), below: Some(3), ..Link::of(12, "eth1.9", Some(InfoKind::Vlan)) },
        Link::of(13, "br9", Some(InfoKind::Bridge)),
        Link { below: Some(13), ..Link::of(14, "on-br9", Some(InfoKind::Bridge)) },
    ]
}

#[test]
fn pods_are_behind_devices_that_lead_nowhere_else() {
    assert_eq!(roles(&["eth0"], &[]).pod_facing(&links()), [5, 6, 10].into());
    assert_eq!(roles(&["eth0", "cali1"], &[]).pod_facing(&links()), [5, 10].into(), "an uplink of whatever kind");
    assert_eq!(roles(&["eth0"], &["br-l*", "eth?"]).pod_facing(&links()), [3, 5, 6, 8, 9, 10].into(), "as named");
}

#[test]
fn devices_are_matched_by_name_but_for_uplinks_and_what_is_not_ethernet() {
    let names = |uplinks: &[&str], patterns: &[&str]| pod_devices(&links(), uplinks, patterns);
    assert_eq!(names(&["eth0"], &[]), [""; 0]);
    assert_eq!(names(&["eth0"], &["none"]), [""; 0]);
    assert_eq!(names(&["eth0"], &["veth*", "cali*"]), ["veth1", "cali1"]);
    assert_eq!(names(&["eth0", "cali1"], &["eth?", "cali*"]), ["eth1", "eth2"]);
    assert_eq!(names(&["eth0"], &["lo", "wg*"]), [""; 0]);
    assert_eq!(names(&[], &["*"]).len(), links().len() - 2);
}

fn pod_devices(links: &[Link], uplinks: &[&str], values: &[&str]) -> Vec<String> {
    let roles = roles(uplinks, values);
    let devices = roles.pod_devices(links, &roles.pod_facing(links));
    devices.into_iter().map(|device| device.name).collect()
}

#[test]
fn devices_are_found_by_what_connects_pods() {
    let names = |links: &[Link], uplinks: &[&str]| pod_devices(links, uplinks, &["auto"]);
    assert_eq!(names(&links(), &["eth0"]), ["veth1", "cali1"], "a bridge's port, not the bridge");
    assert_eq!(names(&links(), &["eth0", "cali1"]), ["veth1"], "an uplink of whatever kind");
    let with = |more: &[Link]| names(&[&links(), more].concat(), &["eth0", "bond0", "up0"]).split_off(2);
    let veth = |index, name| Link::of(index, name, Some(InfoKind::Veth));
    let bond = Link::of(20, "bond0", Some(InfoKind::Bond));
    assert_eq!(with(&[Link::of(20, "lxc1", Some(InfoKind::Netkit))]), ["lxc1"]);
    assert_eq!(with(&[Link { port_of: Some(9), ..veth(20, "vm1") }]), ["vm1"], "beside an uplink on its bridge");
    assert_eq!(with(&[bond, Link { port_of: Some(20), ..veth(21, "slave1") }]), [""; 0], "a part of an uplink");
    let ends = [Link { peer: Some(21), ..veth(20, "up0") }, Link { peer: Some(20), ..veth(21, "up1") }];
    assert_eq!(with(&ends), [""; 0], "the other end of an uplink");
    assert_eq!(with(&[Link { peer: Some(21), ..veth(20, "here0") }]), [""; 0], "no pod is at the other end");
    for kind in [InfoKind::Dummy, InfoKind::Tun, InfoKind::Bridge, InfoKind::MacVlan] {
        assert_eq!(with(&[Link::of(20, "other", Some(kind))]), [""; 0]);
    }
    assert_eq!(with(&[Link { layer: LinkLayerType::None, ..veth(20, "bare") }]), [""; 0]);
    assert_eq!(with(&[Link { has_subnet: true, ..veth(20, "card2") }]), [""; 0], "others may be behind it");
}

#[test]
fn what_is_said_of_pod_interfaces_is_patterns_or_one_word() {
    let patterns = |texts: &[&str]| Some(PodInterfaces::Named(texts.iter().map(|it| it.parse().unwrap()).collect()));
    assert_eq!(read(&[]), Ok(None));
    assert_eq!(read(&["none"]), Ok(Some(PodInterfaces::None)));
    assert_eq!(read(&["auto"]), Ok(Some(PodInterfaces::ByKind)));
    assert_eq!(read(&["veth*", "cali*"]), Ok(patterns(&["veth*", "cali*"])));
    // A device that is called so can still be named.
    assert_eq!(read(&["[n]one"]), Ok(patterns(&["[n]one"])));
    assert!(read(&["auto", "veth*"]).is_err() && read(&["veth*", "none"]).is_err());
}

fn listing() -> Listing {
    let none = AddressFlags::empty();
    Listing {
        links: links(),
        addresses: vec![
            address(1, "127.0.0.1/8", none),
            address(1, "::1/128", none),
            address(1, "198.51.100.1/32", none),
            address(2, "192.0.2.10/24", none),
            address(2, "2001:db8::10/64", AddressFlags::Deprecated),
            address(2, "2001:db8::11/64", AddressFlags::Tentative),
            address(2, "2001:db8::12/64", AddressFlags::Dadfailed),
            address(2, "fe80::1/64", none),
            address(2, "169.254.1.1/16", none),
            address(10, "10.244.0.1/24", none),
        ],
        routes: vec![
            route(2, "192.0.2.0/24"),
            route(10, "10.244.0.0/24"),
            route(6, "10.244.9.5/32"),
            route(6, "fd00:244::5/128"),
            route(6, "fe80::/64"),
            route(6, "0.0.0.0/0"),
            route(7, "10.244.2.0/24"),
        ],
    }
}

fn node(roles: &Roles) -> Node {
    let listing = listing();
    let pod_facing = roles.pod_facing(&listing.links);
    let primary = Addresses { v4: Some("192.0.2.10".parse().unwrap()), v6: None, is_attached: false };
    roles.node(&listing, &pod_facing, primary)
}

fn set<T: FromStr + Ord>(texts: &[&str]) -> BTreeSet<T> {
    texts.iter().map(|text| text.parse().unwrap_or_else(|_| panic!("{text}"))).collect()
}

#[test]
fn a_node_knows_its_addresses_and_where_its_pods_are() {
    let node = node(&Roles { node_name: Some("n1".into()), ..roles(&["eth0"], &[]) });
    assert_eq!(node.name.as_deref(), Some("n1"));
    assert_eq!(node.addresses, set(&["192.0.2.10", "198.51.100.1", "2001:db8::10", "10.244.0.1"]));
    assert_eq!(node.node_port_addresses, node.addresses);
    assert_eq!(node.pod_subnets, set(&["10.244.0.0/24", "10.244.9.5/32", "fd00:244::5/128"]));
}

#[test]
fn the_addresses_of_services_that_ipvs_left_behind_are_not_the_nodes() {
    let mut listing = listing();
    let of_services = |name: &str, listing: &mut Listing| {
        listing.links.push(Link::of(15, name, Some(InfoKind::Dummy)));
        let node = roles(&["eth0"], &[]).node(listing, &BTreeSet::new(), Addresses::default());
        listing.links.pop();
        node.addresses.contains(&IpAddr::from([10, 96, 0, 1]))
    };
    listing.addresses.push(address(15, "10.96.0.1/32", AddressFlags::empty()));
    assert!(of_services("dummy0", &mut listing));
    assert!(!of_services("kube-ipvs0", &mut listing));
}

#[test]
fn node_ports_are_served_where_the_operator_says() {
    let served = |text: &str| {
        let roles = Roles { node_ports: text.parse().unwrap(), ..roles(&["eth0"], &[]) };
        node(&roles).node_port_addresses
    };
    assert_eq!(served("primary"), set(&["192.0.2.10"]));
    assert_eq!(served("192.0.2.0/24,2001:db8::/32"), set(&["192.0.2.10", "2001:db8::10"]));
    assert_eq!(served("203.0.113.0/24,fd00::/8"), BTreeSet::new());
    // A family that no range is given of.
    assert_eq!(served("192.0.2.0/24"), set(&["192.0.2.10", "2001:db8::10"]));
    assert_eq!(served("fd00::/8"), set(&["192.0.2.10", "198.51.100.1", "10.244.0.1"]));
    assert_eq!(served("").len(), 4);
}

#[test]
fn sockets_find_node_ports_at_localhost_where_they_are_served_there() {
    let served = |node_ports: NodePorts| {
        let roles = Roles { node_ports, balances_sockets: true, ..roles(&["eth0"], &[]) };
        let node = node(&roles);
        assert!(!node.addresses.iter().any(IpAddr::is_unspecified), "they are nobody's");
        let served = node.node_port_addresses.into_iter().filter(IpAddr::is_unspecified).collect::<Vec<_>>();
        (served, node.bind_only.into_iter().collect::<Vec<_>>())
    };
    let both: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let split = |here: &[IpAddr], bind_only: &[IpAddr]| (here.to_vec(), bind_only.to_vec());
    assert_eq!(served(NodePorts::All), split(&both, &[]));
    // Who has all addresses has those that are served. The primary one is of IPv4 alone.
    assert_eq!(served(NodePorts::Primary), split(&[], &both[..1]));
    assert_eq!(served("192.0.2.0/24,2001:db8::/32".parse().unwrap()), split(&[], &both));
    assert_eq!(served("203.0.113.0/24,fd00::/8".parse().unwrap()), split(&[], &[]));
    assert_eq!(served("127.0.0.0/8,2001:db8::/32".parse().unwrap()), split(&both[..1], &both[1..]));
    assert_eq!(served("192.0.2.0/24,::1/128".parse().unwrap()), split(&both[1..], &both[..1]));
    assert_eq!(served("::1/128".parse().unwrap()), split(&both, &[]), "no range is of IPv4");
}

#[test]
fn a_tun_device_without_ethernet_headers_is_a_tunnel() {
    let facing = |layer| {
        let tun0 = Link { layer, ..Link::of(5, "tun0", Some(InfoKind::Tun)) };
        roles(&["eth0"], &[]).pod_facing(&[tun0])
    };
    assert_eq!(facing(LinkLayerType::Ether), [5].into());
    assert_eq!(facing(LinkLayerType::None), [].into());
}
