//! What the agent sets before it loads the programs, which the kernel treats as constant, but for one.

use aya_ebpf::Global;
use lb_common::{
    flow::{Tick, Timeouts},
    net::IpProto,
};

/// The first port of the SNAT range, in host order.
#[unsafe(no_mangle)]
static SNAT_FIRST: Global<u16> = Global::new(1024);

/// The last port of the SNAT range, in host order, not below the first.
#[unsafe(no_mangle)]
static SNAT_LAST: Global<u16> = Global::new(u16::MAX);

/// How long a TCP connection may be opening without a packet, in ticks.
#[unsafe(no_mangle)]
static TIMEOUT_OPENING: Global<u32> = Global::new(Tick::from_seconds(60));

/// How long a TCP connection may be idle, in ticks.
#[unsafe(no_mangle)]
static TIMEOUT_ESTABLISHED: Global<u32> = Global::new(Tick::from_seconds(8_000));

/// How long an ended side of a TCP connection is remembered without a packet, in ticks.
#[unsafe(no_mangle)]
static TIMEOUT_CLOSING: Global<u32> = Global::new(Tick::from_seconds(10));

/// How long a UDP flow may be idle, in ticks.
#[unsafe(no_mangle)]
static TIMEOUT_DATAGRAM: Global<u32> = Global::new(Tick::from_seconds(60));

/// Whether echo requests to services' own addresses are answered: 0 or 1.
#[unsafe(no_mangle)]
static ANSWER_PING: Global<u32> = Global::new(0);

/// The cookie of the agent's network namespace, the node's own.
#[unsafe(no_mangle)]
static NODE_NAMESPACE: Global<u64> = Global::new(0);

/// Whether sockets of other network namespaces are balanced, too: 0 or 1.
#[unsafe(no_mangle)]
static SOCKETS_OF_ALL: Global<u32> = Global::new(0);

/// Whether the agent can end sockets of other network namespaces: 0 or 1.
#[unsafe(no_mangle)]
static ENDS_SOCKETS_OF_ALL: Global<u32> = Global::new(0);

/// Whether connected UDP sockets are left to packets, as this kernel can't end them: 0 or 1.
#[unsafe(no_mangle)]
static LEAVES_UDP: Global<u32> = Global::new(0);

/// Whether connected UDP sockets that lose their backend are to be ended: 0 or 1.
#[unsafe(no_mangle)]
static ENDS_UDP: Global<u32> = Global::new(0);

/// Whether TCP connections that lose their backend are to be ended: 0 or 1.
#[unsafe(no_mangle)]
static ENDS_TCP: Global<u32> = Global::new(0);

/// Whether the agent attaches to the devices of pods, so that what they send is met packet by packet: 0 or 1.
#[unsafe(no_mangle)]
static MEETS_PODS: Global<u32> = Global::new(0);

/// A bit for each depth below the root at which there are control groups whose sockets are left alone.
#[unsafe(no_mangle)]
static EXEMPT_LEVELS: Global<u64> = Global::new(0);

/// Whether UDP sockets would see answers come from backends, as a hook is missing by which they see the service: 0 or 1. The only one that
/// the agent sets later, once it has attached to what there is.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".data")]
static SHOWS_BACKENDS: Global<u32> = Global::new(0);

/// The first port of the SNAT range and how many there are.
#[inline(always)]
pub(crate) fn snat_ports() -> (u16, u32) {
    let first = SNAT_FIRST.load();
    (first, u32::from(SNAT_LAST.load().wrapping_sub(first)) + 1)
}

/// How long flows live without a packet.
#[inline(always)]
pub(crate) fn timeouts() -> Timeouts {
    Timeouts {
        opening: TIMEOUT_OPENING.load(),
        established: TIMEOUT_ESTABLISHED.load(),
        closing: TIMEOUT_CLOSING.load(),
        datagram: TIMEOUT_DATAGRAM.load(),
    }
}

/// Whether echo requests to services' own addresses are answered.
#[inline(always)]
pub(crate) fn answers_ping() -> bool {
    ANSWER_PING.load() != 0
}

/// The cookie of the node's own network namespace.
#[inline(always)]
pub(crate) fn node_namespace() -> u64 {
    NODE_NAMESPACE.load()
}

/// Whether sockets of other network namespaces are balanced, too.
#[inline(always)]
pub(crate) fn balances_all_sockets() -> bool {
    SOCKETS_OF_ALL.load() != 0
}

/// Whether sockets of other network namespaces can be ended when they lose their backend.
#[inline(always)]
pub(crate) fn ends_all_sockets() -> bool {
    ENDS_SOCKETS_OF_ALL.load() != 0
}

/// Whether connected UDP sockets are left to packets, as this kernel can't end them.
#[inline(always)]
pub(crate) fn leaves_udp() -> bool {
    LEAVES_UDP.load() != 0
}

/// Whether what pods send is met packet by packet.
#[inline(always)]
pub(crate) fn meets_pods() -> bool {
    MEETS_PODS.load() != 0
}

/// Whether UDP sockets would see answers come from backends.
#[inline(always)]
pub(crate) fn shows_backends() -> bool {
    SHOWS_BACKENDS.load() != 0
}

/// Whether connected sockets of a protocol are to be ended when they lose their backend.
#[inline(always)]
pub(crate) fn ends(proto: IpProto) -> bool {
    match proto {
        IpProto::UDP => ENDS_UDP.load() != 0,
        IpProto::TCP => ENDS_TCP.load() != 0,
        _ => false,
    }
}

/// Whether there may be control groups at this depth whose sockets are left alone.
#[inline(always)]
pub(crate) fn may_be_exempt(level: u32) -> bool {
    EXEMPT_LEVELS.load() >> level & 1 != 0
}
