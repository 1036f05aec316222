//! What a single value may be. Each function reads one from its text, or says what is wrong with it and what is right.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;

use crate::{
    model::{Algorithm, Protocol, TrafficPolicy, Weight},
    source::text::{NAME_MAX, shown, unreachable},
};

/// The seconds that session affinity may last: Kubernetes has the same bounds (`ClientIPConfig` of `core/v1`).
const AFFINITY: std::ops::RangeInclusive<u32> = 1..=86_400;

/// By which addresses and ports a service is to be reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ServiceType {
    /// By its cluster IPs, and by external IPs.
    #[default]
    ClusterIp,
    /// By a port of each node, too.
    NodePort,
    /// By a load balancer's addresses, too.
    LoadBalancer,
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
        "SCTP" => Ok(Protocol::Sctp),
        _ => Err(format!("{} is not a protocol that Wharf balances (TCP, UDP, SCTP)", shown(text))),
    }
}

pub(super) fn service_type(text: &str) -> Result<ServiceType, String> {
    match text {
        "ClusterIP" => Ok(ServiceType::ClusterIp),
        "NodePort" => Ok(ServiceType::NodePort),
        "LoadBalancer" => Ok(ServiceType::LoadBalancer),
        "ExternalName" => {
            Err("an ExternalName is not balanced: its name server is asked; leave the service out".to_owned())
        }
        _ => Err(format!("{} is not a type (ClusterIP, NodePort, LoadBalancer)", shown(text))),
    }
}

pub(super) fn policy(text: &str) -> Result<TrafficPolicy, String> {
    match text {
        "Cluster" => Ok(TrafficPolicy::Cluster),
        "Local" => Ok(TrafficPolicy::Local),
        _ => Err(format!("{} is not a policy (Cluster, Local)", shown(text))),
    }
}

pub(super) fn range(text: &str) -> Result<IpNet, String> {
    let range: IpNet = text.parse().map_err(|_| match text.parse::<IpAddr>() {
        Ok(address) => format!("{address} has no prefix length; for this address alone write {}", IpNet::from(address)),
        Err(_) => format!("{} is not a range of IP addresses (such as 192.0.2.0/24)", shown(text)),
    })?;
    match range.trunc() {
        trunc if trunc == range => Ok(range),
        trunc => Err(format!("{range} has bits beyond its prefix length; write {trunc}")),
    }
}

/// Whether there is session affinity.
pub(super) fn session_affinity(text: &str) -> Result<bool, String> {
    match text {
        "None" => Ok(false),
        "ClientIP" => Ok(true),
        _ => Err(format!("{} is not a kind of session affinity (None, ClientIP)", shown(text))),
    }
}

/// How many seconds session affinity lasts.
pub(super) fn timeout_seconds(text: &str) -> Result<u32, String> {
    let seconds = text.parse().ok().filter(|seconds| AFFINITY.contains(seconds));
    seconds.ok_or_else(|| {
        format!("{} is not a number of seconds ({} to {})", shown(text), AFFINITY.start(), AFFINITY.end())
    })
}

/// The same from the text of a duration.
pub(super) fn affinity(text: &str) -> Result<u32, String> {
    let duration = humantime::parse_duration(text).ok();
    let seconds = duration.filter(|duration| duration.subsec_nanos() == 0).as_ref().map(Duration::as_secs);
    let seconds = seconds.and_then(|seconds| u32::try_from(seconds).ok()).filter(|seconds| AFFINITY.contains(seconds));
    seconds
        .ok_or_else(|| format!("{} is not a duration of whole seconds, 1s to 24h (such as 3h or 1h 30m)", shown(text)))
}

pub(super) fn condition(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("{} is neither true nor false", shown(text)))
}

pub(super) fn algorithm(text: &str) -> Result<Algorithm, String> {
    Algorithm::ALL.into_iter().find(|algorithm| algorithm.name() == text).ok_or_else(|| {
        format!("{} is not an algorithm ({})", shown(text), Algorithm::ALL.map(Algorithm::name).join(", "))
    })
}
