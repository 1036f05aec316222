//! The interfaces: whether they are there, and whether they are the ones to name.

use std::net::IpAddr;

use glob::Pattern;

use super::{Check, list};
use crate::network::{
    PodInterfaces, Roles,
    survey::{self, InfoKind, Link},
};

/// What is so.
pub(super) struct Facts<'a> {
    pub(super) devices: &'a [Link],
    /// The addresses that packets may leave with, by the number of their interface.
    pub(super) addresses: &'a [(u32, IpAddr)],
    pub(super) roles: &'a Roles,
    /// Whether the operator has named the uplinks.
    pub(super) are_named: bool,
}

/// The interfaces to look at where none is named.
pub(super) fn likely_uplinks(devices: &[Link], roles: &Roles) -> Vec<String> {
    let of_pods = survey::pod_devices(devices, roles);
    let likely = devices.iter().filter(|it| it.is_up && !it.is_loopback() && !of_pods.contains(&it.name));
    likely.map(|it| it.name.clone()).collect()
}

pub(super) fn checks(facts: &Facts<'_>) -> Vec<Check> {
    let mut checks = Vec::new();
    if facts.roles.uplinks.is_empty() {
        checks.push(Check::problem(
            "interface",
            "no interface but loopback, and those of pods, is up",
            "ip link set dev IF up, for each interface that clients and backends are reached by",
        ));
    }
    for name in &facts.roles.uplinks {
        match facts.devices.iter().find(|device| device.name == *name) {
            Some(device) => checks.extend(facts.uplink(device).into_iter().map(|check| check.on(name))),
            None => checks.push(
                Check::problem(
                    "interface",
                    format!("there is no interface {name}"),
                    "`ip link` lists those that there are",
                )
                .on(name),
            ),
        }
    }
    checks.extend(facts.different_mtus());
    match &facts.roles.pod_interfaces {
        PodInterfaces::None => {}
        PodInterfaces::Named(patterns) => checks.extend(patterns.iter().map(|pattern| facts.pods(pattern))),
        PodInterfaces::ByKind => checks.push(facts.pods_by_kind()),
    }
    checks
}

/// The name of the checks on what interfaces are built of.
const STACK: &str = "device-stack";
/// The name of the checks on the devices of pods.
const PODS: &str = "pod-interfaces";

impl Facts<'_> {
    fn uplink(&self, device: &Link) -> Vec<Check> {
        let mut checks = vec![self.state(device)];
        checks.extend(self.port(device).or_else(|| self.stack(device)));
        checks.push(self.address(device));
        checks
    }

    fn name(&self, index: u32) -> &str {
        self.devices.iter().find(|device| device.index == index).map_or("another namespace", |device| &device.name)
    }

    fn state(&self, device: &Link) -> Check {
        const NAME: &str = "interface";
        let name = &device.name;
        if !device.is_ethernet() {
            let found = format!("{name} is no Ethernet device ({})", device.layer);
            let remedy = "name the Ethernet devices that clients and backends are reached by";
            return if self.are_named { Check::problem(NAME, found, remedy) } else { Check::note(NAME, found, remedy) };
        }
        match (device.is_up, device.has_carrier) {
            (false, _) => Check::problem(NAME, format!("{name} is down"), format!("ip link set dev {name} up")),
            (true, false) => Check::warning(
                NAME,
                format!("{name} is up, but has no carrier"),
                "look at the cable, or at the other end, which may be down",
            ),
            (true, true) => Check::ok(NAME, format!("{name} is up and has a carrier")),
        }
    }

    /// What it is a port of, which then is the one to name.
    fn port(&self, device: &Link) -> Option<Check> {
        let name = &device.name;
        let index = device.port_of?;
        let above = self.name(index);
        let kind = self.devices.iter().find(|it| it.index == index).and_then(|it| it.kind.as_ref());
        if kind == Some(&InfoKind::Vrf) {
            let found = format!("{name} is in the VRF {above}, which has a routing table of its own");
            return Some(Check::note(STACK, found, "see that this table has the routes to clients and backends"));
        }
        let kind = kind.map_or("a device of another kind".to_owned(), |kind| format!("a {kind}"));
        let found = format!("{name} is a port of {above} ({kind}), which has the addresses and routes");
        Some(Check::warning(STACK, found, format!("name {above} instead")))
    }

    /// What it stands on, by which it may have no XDP of its own.
    fn stack(&self, device: &Link) -> Option<Check> {
        let name = &device.name;
        match (device.kind.as_ref()?, device.below) {
            (InfoKind::Vlan, below) => {
                let below = below.map_or("the device below", |below| self.name(below));
                Some(Check::warning(
                    STACK,
                    format!("{name} is a VLAN device on {below}: it has no XDP of its own"),
                    format!("name {below} instead: tagged packets are translated there, and forwarded by the stack"),
                ))
            }
            (kind @ (InfoKind::Bridge | InfoKind::Team), _) => Some(Check::note(
                STACK,
                format!("{name} is a {kind}, which has no XDP in the driver, so tc takes its place"),
                "nothing, or, if it has one port only, move its addresses there and name that",
            )),
            (InfoKind::Bond, _) => Some(Check::note(
                STACK,
                format!(
                    "{name} is a bond: it does XDP if all its ports do, in the modes active-backup, balance-rr, \
                     balance-xor and 802.3ad"
                ),
                "nothing; if XDP is refused, look at its mode and at its ports' drivers",
            )),
            _ => None,
        }
    }

    fn address(&self, device: &Link) -> Check {
        const NAME: &str = "source-address";
        let name = &device.name;
        let own: Vec<_> = self.addresses.iter().filter(|(at, _)| *at == device.index).map(|(_, it)| it).collect();
        if !own.is_empty() {
            return Check::ok(NAME, format!("packets to backends leave with an address of {}", list(&own)));
        }
        let remedy = format!("ip address add ADDRESS/LENGTH dev {name}, if backends are reached by it");
        let loopback = |at: u32| self.devices.iter().any(|it| it.index == at && it.is_loopback());
        if self.addresses.iter().any(|(at, it)| !(loopback(*at) && it.is_loopback())) {
            let found = format!("{name} has no address, so packets to backends leave with one of another interface");
            Check::note(NAME, found, remedy)
        } else {
            let found = format!("neither {name} nor any other interface has an address for packets to backends");
            Check::problem(NAME, found, remedy)
        }
    }

    fn different_mtus(&self) -> Option<Check> {
        let uplinks = self.devices.iter().filter(|it| self.roles.uplinks.contains(&it.name));
        let mut mtus: Vec<_> = uplinks.map(|device| (device.mtu, &device.name)).collect();
        mtus.sort();
        let (smallest, largest) = (mtus.first()?, mtus.last()?);
        (smallest.0 != largest.0).then(|| {
            Check::note(
                "mtu",
                format!("the MTU of {} is {} and that of {} is {}", smallest.1, smallest.0, largest.1, largest.0),
                "nothing if that is meant: senders of what is too large are told; else give them one MTU",
            )
        })
    }

    fn pods(&self, pattern: &Pattern) -> Check {
        let devices = self.devices.iter().filter(|it| it.is_ethernet() && pattern.matches(&it.name));
        let names: Vec<_> = devices.map(|it| &it.name).filter(|name| !self.roles.uplinks.contains(name)).collect();
        if names.is_empty() {
            let found = format!("no device is called like '{pattern}'");
            Check::note(PODS, found, "nothing if pods are yet to come; `ip link` lists the devices that there are")
        } else {
            Check::ok(PODS, format!("'{pattern}' finds {}", list(&names)))
        }
    }

    fn pods_by_kind(&self) -> Check {
        let names = survey::pod_devices(self.devices, self.roles);
        if names.is_empty() {
            let found = "there is no veth or netkit device whose other end is in another network namespace";
            let remedy =
                "nothing if pods are yet to come; if they have devices of another kind, --pod-interface names them";
            Check::note(PODS, found, remedy)
        } else {
            Check::ok(PODS, format!("pods are behind {}", list(&names)))
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use rtnetlink::packet_route::link::LinkLayerType;

    use super::{super::tests::check_says, *};
    use crate::doctor::Verdict::{Note, Ok as Fine, Problem, Warning};

    const ADDRESSES: [(u32, IpAddr); 1] = [(2, IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)))];

    fn with(devices: &[Link], uplinks: &[&str], addresses: &[(u32, IpAddr)], are_named: bool) -> Vec<Check> {
        let uplinks = uplinks.iter().map(|&name| name.to_owned()).collect();
        let roles = Roles { uplinks, ..facing(named("veth*")) };
        checks(&Facts { devices, addresses, roles: &roles, are_named })
    }

    fn named(pattern: &str) -> PodInterfaces {
        PodInterfaces::Named(vec![pattern.parse().unwrap()])
    }

    fn facing(pod_interfaces: PodInterfaces) -> Roles {
        Roles { pod_interfaces, ..Roles::default() }
    }

    #[test]
    fn what_is_up_and_not_loopback_is_likely_an_uplink() {
        let lo = Link { layer: LinkLayerType::Loopback, ..Link::of(1, "lo", None) };
        let down = Link { is_up: false, ..Link::of(3, "eth1", None) };
        let devices = [lo, Link::of(2, "eth0", None), down, Link::of(4, "veth7", Some(InfoKind::Veth))];
        assert_eq!(likely_uplinks(&devices, &facing(named("veth*"))), ["eth0"]);
        assert_eq!(likely_uplinks(&devices, &facing(PodInterfaces::ByKind)), ["eth0"]);
        assert_eq!(likely_uplinks(&devices, &facing(PodInterfaces::None)), ["eth0", "veth7"]);
    }

    #[test]
    fn an_interface_is_there_up_and_connected_or_not() {
        let eth0 = Link::of(2, "eth0", None);
        let state = |device: Link, are_named| with(&[device], &["eth0"], &ADDRESSES, are_named);
        check_says(&state(eth0.clone(), true), "interface", Fine, "carrier");
        check_says(&state(Link { is_up: false, ..eth0.clone() }, true), "interface", Problem, "set dev eth0 up");
        check_says(&state(Link { has_carrier: false, ..eth0.clone() }, true), "interface", Warning, "no carrier");
        let tunnel = Link { layer: LinkLayerType::None, ..eth0 };
        check_says(&state(tunnel.clone(), true), "interface", Problem, "no Ethernet");
        check_says(&state(tunnel, false), "interface", Note, "no Ethernet");
        check_says(&with(&[], &["eth9"], &[], true), "interface", Problem, "no interface eth9");
        check_says(&with(&[], &[], &[], false), "interface", Problem, "no interface but loopback");
    }

    #[test]
    fn the_device_to_name_is_the_one_with_the_addresses_and_the_driver() {
        let place = |kind, port_of, below| {
            let above = |index, name, kind| Link::of(index, name, Some(kind));
            with(
                &[
                    Link { below, port_of, ..Link::of(2, "it", kind) },
                    Link::of(3, "eth0", None),
                    above(4, "bond0", InfoKind::Bond),
                    above(5, "red", InfoKind::Vrf),
                ],
                &["it"],
                &ADDRESSES,
                true,
            )
        };
        check_says(&place(None, Some(4), None), "device-stack", Warning, "name bond0 instead");
        check_says(&place(None, Some(3), None), "device-stack", Warning, "another kind");
        check_says(&place(None, Some(5), None), "device-stack", Note, "VRF red");
        check_says(&place(Some(InfoKind::Vlan), None, Some(3)), "device-stack", Warning, "name eth0 instead");
        check_says(&place(Some(InfoKind::Vlan), None, None), "device-stack", Warning, "the device below");
        check_says(&place(Some(InfoKind::Bridge), None, None), "device-stack", Note, "is a bridge");
        check_says(&place(Some(InfoKind::Team), None, None), "device-stack", Note, "is a team");
        check_says(&place(Some(InfoKind::Bond), None, None), "device-stack", Note, "active-backup");
        assert!(!place(None, None, None).iter().any(|check| check.name == "device-stack"));
    }

    #[test]
    fn packets_need_an_address_to_leave_with() {
        let devices = [Link::of(2, "eth0", None), Link::of(3, "eth1", None)];
        check_says(&with(&devices, &["eth0"], &ADDRESSES, true), "source-address", Fine, "192.0.2.1");
        check_says(&with(&devices, &["eth1"], &ADDRESSES, true), "source-address", Note, "another interface");
        check_says(&with(&devices, &["eth1"], &[], true), "source-address", Problem, "neither eth1 nor");
    }

    #[test]
    fn different_mtus_and_patterns_that_find_nothing_are_noted() {
        let jumbo = Link { mtu: 9000, ..Link::of(3, "eth1", None) };
        let devices = [Link::of(2, "eth0", None), jumbo, Link::of(4, "veth7", Some(InfoKind::Veth))];
        let both = with(&devices, &["eth0", "eth1"], &ADDRESSES, true);
        check_says(&both, "mtu", Note, "eth0 is 1500 and that of eth1 is 9000");
        check_says(&both, "pod-interfaces", Fine, "finds veth7");
        let one = with(&devices[..1], &["eth0"], &ADDRESSES, true);
        assert!(!one.iter().any(|check| check.name == "mtu"));
        check_says(&one, "pod-interfaces", Note, "no device");
        let roles = Roles { uplinks: vec!["eth0".to_owned()], ..facing(PodInterfaces::ByKind) };
        let found =
            |devices: &[Link]| checks(&Facts { devices, addresses: &ADDRESSES, roles: &roles, are_named: true });
        check_says(&found(&devices), "pod-interfaces", Fine, "behind veth7");
        check_says(&found(&devices[..2]), "pod-interfaces", Note, "no veth or netkit device");
    }
}
