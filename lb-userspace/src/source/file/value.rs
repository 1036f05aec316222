//! What a single value may be. Each function reads one from its text, or says what is wrong with it and what is right.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use crate::model::{Algorithm, Protocol, Weight};

/// Characters of a name; DNS names have no more.
const NAME_MAX: usize = 253;

/// Text from the file, fit for a terminal and for one line.
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

pub(super) fn name(text: &str) -> Result<Arc<str>, String> {
    if text.is_empty() {
        return Err("empty; a name has at least one character".to_owned());
    }
    if text.chars().count() > NAME_MAX {
        return Err(format!("longer than {NAME_MAX} characters"));
    }
    if let Some(bad) = text.chars().find(|c| c.is_whitespace() || c.is_control()) {
        return Err(format!("`{}` has {bad:?} in it; a name has no blanks and no control characters", shown(text)));
    }
    Ok(text.into())
}

/// A port without a name is called by its number: a name of digits could not be told from it.
pub(super) fn port_name(text: &str) -> Result<Arc<str>, String> {
    let name = name(text)?;
    if name.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{} reads like a port number; a port's name has a letter in it", shown(text)));
    }
    Ok(name)
}

pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    let address = text.parse().map_err(|_| {
        let wrong = shown(text);
        format!("{wrong} is not an IP address (without port, prefix length or interface)")
    })?;
    match unreachable(address) {
        None => Ok(address),
        Some(reason) => Err(format!("{address} {reason}")),
    }
}

/// Why no packet from or to another machine can carry this address.
fn unreachable(address: IpAddr) -> Option<&'static str> {
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

pub(super) fn port(text: &str) -> Result<u16, String> {
    let port = text.parse().ok().filter(|&port| port != 0);
    port.ok_or_else(|| format!("{} is not a port (1 to {})", shown(text), u16::MAX))
}

pub(super) fn weight(text: &str) -> Result<Weight, String> {
    let weight = text.parse().ok().and_then(Weight::new);
    weight.ok_or_else(|| format!("{} is not a weight (0 to {}; 0: no new connections)", shown(text), Weight::MAX))
}

pub(super) fn protocol(text: &str) -> Result<Protocol, String> {
    match text {
        "TCP" => Ok(Protocol::Tcp),
        "UDP" => Ok(Protocol::Udp),
        _ => Err(format!("{} is not a protocol that Wharf balances (TCP, UDP)", shown(text))),
    }
}

pub(super) fn algorithm(text: &str) -> Result<Algorithm, String> {
    Algorithm::ALL.into_iter().find(|algorithm| algorithm.name() == text).ok_or_else(|| {
        let problem = match text {
            "least-connections" => "this version of Wharf has no least-connections yet".to_owned(),
            _ => format!("{} is not an algorithm", shown(text)),
        };
        format!("{problem} ({})", Algorithm::ALL.map(Algorithm::name).join(", "))
    })
}
