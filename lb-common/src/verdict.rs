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
    /// Of the node itself: goes out by an interface.
    Outward(IfIndex),
    /// Of the node itself: goes out by an interface, and the kernel finds the neighbour's Ethernet address.
    Neighbour(IfIndex),
    /// Of the node itself: goes to its own stack, as if it had come in by the interface that it was to leave by.
    Inward,
    /// For the node itself: goes to its stack, as if it had come in by loopback.
    Loopback,
    /// Goes back to its sender as our answer.
    Answer(AnswerReason),
    /// Ends here.
    Drop(DropReason),
    /// Not decided: another program goes on with it. Never counted.
    Next(Stage),
}

/// The programs that a packet is handed on to, by their index in `STAGES`: each is verified by itself and has a
/// stack of its own. What only passes through, and packets of established flows, need none of them.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Flows that are not established yet.
    Pending = 0,
    /// New flows; their first packet goes on to `Pending`.
    Open = 1,
    /// ICMP: errors about flows, echo requests.
    Icmp = 2,
    /// Answers: refusals, and that a packet is too big.
    Answer = 3,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Self; 4] = [Self::Pending, Self::Open, Self::Icmp, Self::Answer];

    /// What programs of this stage are called, after the name of their hook.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Open => "open",
            Self::Icmp => "icmp",
            Self::Answer => "answer",
        }
    }
}

impl Verdict {
    /// The index of the verdict's counter, in [`COUNTERS`] and in the kernel's map.
    #[inline(always)]
    pub const fn counter(self) -> u32 {
        match self {
            Self::Tx => Forward::Tx as u32,
            Self::Redirect(_) => Forward::Redirect as u32,
            Self::Outward(_) | Self::Neighbour(_) | Self::Inward | Self::Loopback => Forward::Own as u32,
            Self::Pass(reason) => reason as u32,
            Self::Answer(reason) => reason as u32,
            Self::Drop(reason) => reason as u32,
            Self::Next(_) => DropReason::StageMissing as u32,
        }
    }
}

impl From<PassReason> for Verdict {
    #[inline(always)]
    fn from(reason: PassReason) -> Self {
        Self::Pass(reason)
    }
}

impl From<AnswerReason> for Verdict {
    #[inline(always)]
    fn from(reason: AnswerReason) -> Self {
        Self::Answer(reason)
    }
}

impl From<Stage> for Verdict {
    #[inline(always)]
    fn from(stage: Stage) -> Self {
        Self::Next(stage)
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
    /// What is done with the packet: `forward`, `pass`, `answer` or `drop`.
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
        Socket = 46, "socket", "A socket of this node that was connected to a service, or a datagram that one sent: translated once, before there are packets.";
        Own = 48, "own", "From or to a process of this node, through no hook of sockets: translated, and the kernel sends it on.";
    }
    /// Why a packet goes to the network stack.
    PassReason as "pass" {
        NotIp = 2, "not-ip", "Neither IPv4 nor IPv6.";
        OtherProtocol = 3, "other-protocol", "An IP protocol that is not balanced.";
        NotService = 4, "not-service", "Not for a service and not of a known flow.";
        Fragment = 5, "fragment", "A later fragment of no known datagram, and not to a service's own address.";
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
        RequestOnNode = 27, "request-on-node", "Translated; the stack takes it to its backend, as the backend or the client is on this node.";
        ReplyOnNode = 28, "reply-on-node", "Translated: a reply whose backend or client is on this node.";
        ReplyUnderway = 29, "reply-underway", "A reply whose backend or client is on this node: it is translated when it leaves.";
        MalformedSctp = 30, "malformed-sctp", "An SCTP header that is cut short.";
        MalformedIcmp = 31, "malformed-icmp", "An ICMP message that is cut short, or about a packet that is.";
        OtherIcmp = 32, "other-icmp", "An ICMP message that is about no known flow, and not to a service's own address.";
        SourceRouted = 50, "source-routed", "With an IPv6 routing header that names further hops: the destination is not the last one.";
    }
    /// What a packet is answered with.
    AnswerReason as "answer" {
        NoBackend = 33, "refused-no-backend", "For a service without backends: refused by TCP RST or ICMP port unreachable.";
        WrongPort = 34, "refused-wrong-port", "For a port that a service's own address does not serve: refused likewise.";
        TooBig = 35, "answered-too-big", "Larger than the MTU on the way out: the sender is told the MTU by ICMP.";
        Echo = 36, "answered-echo", "An echo request to a service's own address: answered.";
    }
    /// Why a packet ends here.
    DropReason as "drop" {
        NoBackend = 16, "no-backend", "For a service that has no backend, and nothing that may be answered.";
        NoFlow = 17, "no-flow", "In the middle of a TCP connection that is not known.";
        SnatPortsExhausted = 18, "snat-ports-exhausted", "No free source port towards the chosen backend was found.";
        NoSourceAddress = 19, "no-source-address", "The balancer has no address of the packet's family on the interface towards the backend.";
        NoRoute = 20, "no-route", "A route that refuses (unreachable, prohibit, blackhole) to where the packet has to go.";
        NotForwarded = 21, "not-forwarded", "No route at all to where the packet has to go.";
        ForwardingDisabled = 22, "forwarding-disabled", "IP forwarding is off on the interface that the packet came in by.";
        PacketTooBig = 23, "packet-too-big", "Larger than the MTU on the way out, and nothing that may be answered.";
        FlowTableFull = 24, "flow-table-full", "The kernel had no room for a flow's entries.";
        MapMissing = 25, "map-missing", "A table entry that always exists was not found: please report it.";
        ReplyTtlExpired = 26, "reply-ttl-expired", "A backend's reply whose TTL or hop limit ends here; the stack would take it for its own.";
        NoLocalEndpoints = 37, "no-local-endpoints", "For a service whose policy is Local and whose backends are all on other nodes.";
        SourceNotAllowed = 38, "source-not-allowed", "From outside of the service's source ranges.";
        FragmentLost = 39, "fragment-lost", "A later fragment to a service's own address, of a datagram whose first did not come before it.";
        WrongPort = 40, "wrong-port", "For a port that a service's own address does not serve, and nothing that may be answered.";
        EchoRefused = 41, "echo-refused", "An echo request to a service's own address; `--answer-ping` answers them.";
        AnswerFailed = 43, "answer-failed", "To be answered, but the kernel had no room for that.";
        SourceIsService = 44, "source-is-service", "To a service from a service's cluster address, which no client has.";
        IcmpLost = 45, "icmp-lost", "An ICMP message to a service's own address that is about no known flow.";
        PortInUse = 47, "port-in-use", "A socket of this node that was to have a port which is a NodePort: refused.";
        ReplyUnseen = 49, "reply-unseen", "Of a process of this node, to a backend whose replies would come in where no program of ours is.";
        StageMissing = 42, "stage-missing", "A program that packets are handed on to was not found: please report it.";
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
        assert!(COUNTERS.len() <= crate::abi::COUNTERS_MAX);
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
