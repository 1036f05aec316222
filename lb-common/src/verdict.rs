//! What may become of a packet: the one list of reasons, and of the counters behind them.

use crate::net::IfIndex;

/// What the pipeline decided for one packet. Only `count::finish` makes an action of it.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Goes to the network stack.
    Pass(PassReason),
    /// Goes out by the interface that it came in by.
    Tx,
    /// Goes out by another interface.
    Redirect(IfIndex),
    /// Ends here.
    Drop(DropReason),
}

impl Verdict {
    /// The index of the verdict's counter, in [`COUNTERS`] and in the kernel's map.
    #[inline(always)]
    pub const fn counter(self) -> u32 {
        match self {
            Self::Tx => Forward::Tx as u32,
            Self::Redirect(_) => Forward::Redirect as u32,
            Self::Pass(reason) => reason as u32,
            Self::Drop(reason) => reason as u32,
        }
    }
}

impl From<PassReason> for Verdict {
    #[inline(always)]
    fn from(reason: PassReason) -> Self {
        Self::Pass(reason)
    }
}

impl From<DropReason> for Verdict {
    #[inline(always)]
    fn from(reason: DropReason) -> Self {
        Self::Drop(reason)
    }
}

/// A line of the list of counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CounterInfo {
    /// The index in the kernel's map. Never given to another meaning.
    pub index: u32,
    /// What is done with the packet: `forward`, `pass` or `drop`.
    pub action: &'static str,
    /// The reason, as metrics and tables show it.
    pub name: &'static str,
    /// What it means, for the reader of a metric or a table.
    pub help: &'static str,
}

macro_rules! reasons {
    ($($(#[$meta:meta])* $group:ident as $action:literal {
        $($reason:ident = $index:literal, $name:literal, $help:literal;)*
    })*) => {
        $(
            $(#[$meta])*
            #[repr(u32)]
            #[derive(Clone, Copy, PartialEq, Eq, Debug)]
            pub enum $group {
                $(#[doc = $help] $reason = $index,)*
            }
        )*
        /// Every counter. There is one for each index below their number.
        pub const COUNTERS: &[CounterInfo] = &[
            $($(CounterInfo { index: $index, action: $action, name: $name, help: $help },)*)*
        ];
    };
}

// Numbers are never changed or used again: metrics, dashboards and pinned maps live longer than a release.
reasons! {
    /// Ways in which a translated packet leaves.
    Forward as "forward" {
        Tx = 0, "tx", "Translated and sent out by the interface that it came in by.";
        Redirect = 1, "redirect", "Translated and sent out by another interface.";
    }
    /// Why a packet goes to the network stack.
    PassReason as "pass" {
        NotIp = 2, "not-ip", "Neither IPv4 nor IPv6.";
        NotTcpUdp = 3, "not-tcp-udp", "An IP protocol that is not balanced.";
        NotService = 4, "not-service", "Not for a service and not of a known flow.";
        Fragment = 5, "fragment", "An IP fragment: only the first holds ports, so fragments are left to the stack.";
        VlanTooDeep = 6, "vlan-too-deep", "More VLAN tags than two.";
        ExtensionsTooDeep = 7, "extensions-too-deep", "More IPv6 extension headers than are followed.";
        MalformedEthernet = 8, "malformed-ethernet", "Shorter than its Ethernet header or VLAN tags.";
        MalformedIpv4 = 9, "malformed-ipv4", "An IPv4 header that is cut short or contradicts itself.";
        MalformedIpv6 = 10, "malformed-ipv6", "An IPv6 header or extension header that is cut short or contradicts itself.";
        MalformedTcp = 11, "malformed-tcp", "A TCP header that is cut short or contradicts itself.";
        MalformedUdp = 12, "malformed-udp", "A UDP header that is cut short or contradicts itself.";
        TtlExpired = 13, "ttl-expired", "A packet of a flow whose TTL or hop limit ends here; the stack answers it.";
        NeighbourUnresolved = 14, "neighbour-unresolved", "Translated; the stack resolves the next hop and forwards it.";
        RoutedByStack = 15, "routed-by-stack", "Translated; the stack forwards it: by a VLAN or tunnel device, or an interface that is not attached to.";
    }
    /// Why a packet ends here.
    DropReason as "drop" {
        NoBackend = 16, "no-backend", "For a service that has no backend.";
        NoFlow = 17, "no-flow", "In the middle of a TCP connection that is not known.";
        SnatPortsExhausted = 18, "snat-ports-exhausted", "No free source port towards the chosen backend was found.";
        NoSourceAddress = 19, "no-source-address", "The balancer has no address of the packet's family on the interface towards the backend.";
        NoRoute = 20, "no-route", "A route that refuses (unreachable, prohibit, blackhole) to where the packet has to go.";
        NotForwarded = 21, "not-forwarded", "No route at all to where the packet has to go, or it is this host, which is not supported.";
        ForwardingDisabled = 22, "forwarding-disabled", "IP forwarding is off on the interface that the packet came in by.";
        PacketTooBig = 23, "packet-too-big", "Larger than the MTU on the way out.";
        FlowTableFull = 24, "flow-table-full", "The kernel had no room for a flow's entries.";
        ReplyTtlExpired = 26, "reply-ttl-expired", "A backend's reply whose TTL or hop limit ends here; the stack would take it for its own.";
        MapMissing = 25, "map-missing", "A table entry that always exists was not found: please report it.";
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashSet};

    use super::*;

    #[test]
    fn counters_are_dense_and_unique() {
        let indexes: BTreeSet<_> = COUNTERS.iter().map(|counter| counter.index as usize).collect();
        assert!(indexes.into_iter().eq(0..COUNTERS.len()), "an index is missing or taken twice");
        let names: HashSet<_> = COUNTERS.iter().map(|counter| counter.name).collect();
        assert_eq!(names.len(), COUNTERS.len());
    }

    #[test]
    fn names_are_kebab_case_labels() {
        for counter in COUNTERS {
            assert!(counter.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'));
            assert!(counter.help.ends_with('.'), "{}", counter.name);
        }
    }
}
