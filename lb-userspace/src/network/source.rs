//! Which address packets leave an interface with.

use std::{collections::BTreeMap, net::IpAddr};

use rtnetlink::packet_route::link::InfoKind;

use super::listing::{Address, Link, Listing};
use crate::dataplane::kernel::{ANYWHERE, Addresses};

/// See [`super::Network::addresses`].
///
/// Of several addresses the one that was chosen before stays; clients of a new one would lose nothing, but flows of the
/// old one would. Else an address of a subnet comes before one that stands alone, which often moves to
/// another machine, and any of them before one that is a frontend.
pub(super) fn addresses(
    listing: &Listing,
    uplinks: &[String],
    before: &BTreeMap<u32, Addresses>,
    is_frontend: impl Fn(IpAddr) -> bool,
) -> BTreeMap<u32, Addresses> {
    let mut ours = interfaces(listing, uplinks);
    let candidates: Vec<_> = listing
        .addresses
        .iter()
        .filter(|address| address.is_source())
        .map(|it| Candidate { is_frontend: is_frontend(it.ip), of: it })
        .collect();
    for (&interface, known) in &mut ours {
        let present = before.get(&interface).copied().unwrap_or_default();
        let here = || candidates.iter().filter(move |candidate| candidate.of.interface == interface);
        // The kernel lists the oldest IPv4 address first, and the oldest IPv6 address last.
        let v4 = choose(here().filter(|it| it.of.ip.is_ipv4()), present.v4.map(IpAddr::V4));
        let v6 = choose(here().filter(|it| it.of.ip.is_ipv6()).rev(), present.v6.map(IpAddr::V6));
        if let Some(IpAddr::V4(address)) = v4 {
            known.v4 = Some(address);
        }
        if let Some(IpAddr::V6(address)) = v6 {
            known.v6 = Some(address);
        }
    }
    ours.insert(ANYWHERE, primary(listing, uplinks, &ours));
    ours
}

/// The uplinks, which are attached to, and the VLAN devices on them, without addresses yet.
pub(super) fn interfaces(listing: &Listing, uplinks: &[String]) -> BTreeMap<u32, Addresses> {
    let attached = |link: &Link| (link.index, Addresses { is_attached: true, ..Addresses::default() });
    let mut ours: BTreeMap<_, _> = listing.uplinks(uplinks).map(attached).collect();
    for link in &listing.links {
        if link.kind == Some(InfoKind::Vlan) && link.below.is_some_and(|below| ours.contains_key(&below)) {
            ours.entry(link.index).or_default();
        }
    }
    ours
}

/// The first uplink's addresses, in the order in which they were named; in each family that of the first that has one.
fn primary(listing: &Listing, uplinks: &[String], ours: &BTreeMap<u32, Addresses>) -> Addresses {
    let index = |name: &String| listing.links.iter().find(|link| link.name == *name).map(|link| link.index);
    let in_order = || uplinks.iter().filter_map(index).filter_map(|index| ours.get(&index));
    Addresses {
        v4: in_order().find_map(|known| known.v4),
        v6: in_order().find_map(|known| known.v6),
        is_attached: false,
    }
}

/// An address that packets could leave an interface with.
#[derive(Clone, Copy, Debug)]
struct Candidate<'a> {
    is_frontend: bool,
    of: &'a Address,
}

/// The best of an interface's addresses, the oldest coming first. See [`addresses`].
fn choose<'a>(candidates: impl Iterator<Item = &'a Candidate<'a>> + Clone, present: Option<IpAddr>) -> Option<IpAddr> {
    let stays = candidates.clone().find(|it| !it.is_frontend && Some(it.of.ip) == present);
    stays.or_else(|| candidates.min_by_key(|it| (it.is_frontend, it.of.stands_alone()))).map(|it| it.of.ip)
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::address::{AddressFlags, AddressScope};

    use super::*;
    use crate::network::listing::Link;

    fn link(index: u32, name: &str, kind: Option<InfoKind>, below: Option<u32>) -> Link {
        Link { below, ..Link::of(index, name, kind) }
    }

    /// An address as `interface address/prefix`, with what it is marked with at the end.
    fn address(text: &str) -> Address {
        let (interface, rest) = text.split_once(' ').unwrap();
        let (net, mark) = rest.split_once(' ').unwrap_or((rest, ""));
        let (address, prefix) = net.split_once('/').unwrap();
        let flags = match mark {
            "secondary" => AddressFlags::Secondary,
            "deprecated" => AddressFlags::Deprecated,
            "tentative" => AddressFlags::Tentative,
            _ => AddressFlags::empty(),
        };
        let scope = if mark == "link" { AddressScope::Link } else { AddressScope::Universe };
        Address {
            interface: interface.parse().unwrap(),
            ip: address.parse().unwrap(),
            prefix: prefix.parse().unwrap(),
            scope,
            flags,
        }
    }

    fn listing(all: &[&str]) -> Listing {
        let links = vec![
            link(2, "eth0", None, None),
            link(3, "eth1", None, None),
            link(4, "eth0.7", Some(InfoKind::Vlan), Some(2)),
            link(5, "other.7", Some(InfoKind::Vlan), Some(9)),
        ];
        Listing { links, addresses: all.iter().map(|text| address(text)).collect(), routes: Vec::new() }
    }

    /// Which of some addresses of `eth0` is taken, where the frontends are these.
    #[track_caller]
    fn check(all: &[&str], frontends: &[&str], present: Option<&str>, expect: Option<&str>) {
        let before = Addresses { v4: present.map(|text| text.parse().unwrap()), ..Addresses::default() };
        let is_frontend = |address: IpAddr| frontends.contains(&address.to_string().as_str());
        let ours = addresses(&listing(all), &["eth0".to_owned()], &BTreeMap::from([(2, before)]), is_frontend);
        assert_eq!(ours[&2].v4, expect.map(|text| text.parse().unwrap()));
    }

    #[test]
    fn the_oldest_address_of_a_subnet_is_chosen_and_stays() {
        check(&[], &[], None, None);
        check(&["2 10.0.0.1/24", "2 10.0.0.2/24"], &[], None, Some("10.0.0.1"));
        check(&["2 10.0.0.9/24", "2 10.0.0.1/24", "2 10.0.0.2/24"], &[], Some("10.0.0.1"), Some("10.0.0.1"));
        check(&["2 10.0.0.2/24"], &[], Some("10.0.0.1"), Some("10.0.0.2"));
    }

    #[test]
    fn an_address_that_may_move_away_comes_last() {
        check(&["2 10.0.0.7/32", "2 10.0.0.1/24"], &[], None, Some("10.0.0.1"));
        let mixed = ["2 10.0.0.6/24", "2 10.0.0.7/32", "2 10.0.0.8/32"];
        check(&mixed, &["10.0.0.6", "10.0.0.8"], None, Some("10.0.0.7"));
        check(&["2 10.0.0.6/24", "2 10.0.0.1/24"], &["10.0.0.6"], Some("10.0.0.6"), Some("10.0.0.1"));
        check(&["2 10.0.0.6/24"], &["10.0.0.6"], None, Some("10.0.0.6"));
    }

    #[test]
    fn addresses_that_packets_must_not_leave_with_are_not_taken() {
        check(&["2 10.0.0.1/24 secondary", "2 10.0.0.2/24 link", "2 10.0.0.3/24 tentative"], &[], None, None);
        check(&["2 10.0.0.1/24 deprecated", "2 10.0.0.2/24"], &[], Some("10.0.0.1"), Some("10.0.0.2"));
    }

    #[test]
    fn vlan_devices_on_uplinks_have_addresses_and_the_first_uplink_has_the_nodes() {
        let all = ["3 10.1.0.1/24", "4 10.7.0.1/24", "5 10.8.0.1/24", "2 fd00::2/64", "2 fd00::1/64", "3 fd01::1/64"];
        let uplinks = ["eth0".to_owned(), "eth1".to_owned()];
        let ours = addresses(&listing(&all), &uplinks, &BTreeMap::new(), |_| false);
        assert!(ours.keys().copied().eq([ANYWHERE, 2, 3, 4]));
        assert!(ours[&2].is_attached && !ours[&4].is_attached);
        assert_eq!(ours[&4].v4, Some([10, 7, 0, 1].into()));
        // eth0 has no IPv4 address of its own.
        let expect =
            Addresses { v4: Some([10, 1, 0, 1].into()), v6: Some("fd00::1".parse().unwrap()), is_attached: false };
        assert_eq!(ours[&ANYWHERE], expect);
    }
}
