//! What holds for text from any source.

use std::net::{IpAddr, Ipv4Addr};

/// Characters of a name; DNS names have no more.
pub(super) const NAME_MAX: usize = 253;

/// Text from others, fit for a terminal and for one line.
pub(super) fn shown(text: &str) -> String {
    let mut shown = String::new();
    for (count, char) in text.chars().enumerate() {
        match char {
            _ if count == NAME_MAX => return shown + "…",
            _ if char.is_control() => shown.extend(char.escape_debug()),
            _ => shown.push(char),
        }
    }
    shown
}

/// Why no packet from or to another machine can carry this address.
pub(super) fn unreachable(address: IpAddr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => Some("is the unspecified address; name the address itself"),
        _ if address.is_loopback() => Some("is a loopback address: it can't be reached over a wire"),
        _ if address.is_multicast() => Some("is a multicast address: a connection has one other end"),
        IpAddr::V4(Ipv4Addr::BROADCAST) => Some("is the broadcast address: a connection has one other end"),
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            Some("is an IPv4 address in IPv6 notation; write it as an IPv4 address")
        }
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            Some("is a link-local address: it means nothing without an interface, so no route leads to it")
        }
        _ => None,
    }
}
