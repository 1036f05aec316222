//! Whose packet is it: the questions asked of a packet that has no established flow.

use lb_common::{
    abi::{Flow, Frontend, ServiceKey, VipKey, Whose},
    flow::Direction,
    net::{Address, IfIndex},
    parse::{Part, Segment},
    verdict::{AnswerReason, DropReason, PassReason, Stage, Verdict},
};
use network_types::eth::EthHdr;

use crate::{
    answer,
    maps::{self, FamilyMaps},
    packet::{Hook, Packet},
};

/// Whether a packet may be of a flow, or open one: its requests go to a service's address, and its replies come from a backend's.
/// Nearly all other traffic ends here, without a lookup.
#[inline(always)]
pub(crate) fn may_be_ours<P: Packet, F: FamilyMaps>(packet: &P, segment: &Segment<F::Address>) -> bool {
    let is_request = !packet.is_underway() && maps::may_be(Whose::Services, segment.key.destination);
    is_request || maps::may_be(Whose::Backends, segment.key.source)
}

/// What becomes of a packet that has no established flow.
#[inline(always)]
pub(crate) fn stranger<P: Packet, F: FamilyMaps>(packet: &P, segment: &Segment<F::Address>) -> Verdict {
    if maps::flow(F::pending(), &segment.key).is_some() {
        return Stage::Pending.into();
    }
    // A backend's own traffic goes no further: one load does instead of two lookups.
    if !may_ask(packet) || !maps::may_be(Whose::Services, segment.key.destination) {
        return PassReason::NotService.into();
    }
    // What is sent to all on a link is for nobody to forward or to answer (RFC 1122, section 3.2.2; `ip_forward` in `net/ipv4`).
    if is_to_all(packet) {
        return PassReason::NotService.into();
    }
    if frontend::<F>(segment).is_some() {
        return Stage::Open.into();
    }
    match maps::vip::<F>(segment.key.destination) {
        Some(_) if is_later_fragment(segment) => DropReason::FragmentLost.into(),
        Some(flags) if refuses(flags) => answer::refuse(segment, AnswerReason::WrongPort),
        _ => PassReason::NotService.into(),
    }
}

/// Whether a packet may be for a service: not if it was looked at before. One of the node itself is only where the agent leaves processes
/// to packets, as it does where it is attached to loopback.
#[inline(always)]
fn may_ask<P: Packet>(packet: &P) -> bool {
    packet.hook() != Hook::EGRESS || packet.is_own() && maps::is_met_at(IfIndex::LOOPBACK)
}

/// Whether what is sent to an address is for a service alone, whatever it is. An external or load balancer address may be some other
/// machine's, to which the node itself may have more to say.
#[inline(always)]
pub(crate) fn is_to_vip<P: Packet, F: FamilyMaps>(packet: &P, segment: &Segment<F::Address>) -> bool {
    may_ask(packet) && maps::vip::<F>(segment.key.destination).is_some_and(|flags| !packet.is_own() || refuses(flags))
}

/// Whether an address is one that a service has in the cluster, and nobody else has.
#[inline(always)]
const fn refuses(flags: u32) -> bool {
    flags & VipKey::REFUSES != 0
}

/// Whether the frame is a broadcast, or a multicast: the first bit of its destination says so (IEEE 802).
#[inline(always)]
pub(crate) fn is_to_all<P: Packet>(packet: &P) -> bool {
    packet.read::<EthHdr>(0).is_some_and(|ethernet| ethernet.dst_addr[0] & 1 != 0)
}

/// The frontend that a packet is for. The unspecified address stands in the tables for this host's own, for sockets: no packet is for it.
#[inline(always)]
pub(crate) fn frontend<F: FamilyMaps>(segment: &Segment<F::Address>) -> Option<Frontend> {
    let key = &segment.key;
    if key.destination == F::Address::UNSPECIFIED {
        return None;
    }
    maps::frontend::<F>(&ServiceKey::new(key.destination, key.destination_port, key.proto))
}

/// The frontend that a packet may open a flow to.
#[inline(always)]
pub(crate) fn admit<P: Packet, F: FamilyMaps>(packet: &P, segment: &Segment<F::Address>) -> Result<Frontend, Verdict> {
    let frontend = frontend::<F>(segment).ok_or(PassReason::NotService)?;
    let is_checked = frontend.flags & Frontend::SOURCE_RANGES != 0 && !packet.is_from_node();
    if is_checked && !maps::is_source_allowed(frontend.service, segment.key.source) {
        return Err(DropReason::SourceNotAllowed.into());
    }
    // It is forged. The backend's reply would come back to us as a request: two services that answer each other never end.
    // (An external or load balancer address may be some other machine's, which is a client like any.)
    if maps::vip::<F>(segment.key.source).is_some_and(refuses) {
        return Err(DropReason::SourceIsService.into());
    }
    if packet.is_own() && is_on_its_way::<F>(segment) {
        return Err(PassReason::NotService.into());
    }
    if !segment.opens_flow() {
        // At an address of the node it may be of a connection that the node, or a pod behind its address, has begun from a port that is
        // a NodePort as well. One of the node that is older than the agent may be another machine's that has this address, too.
        let may_be_anothers =
            maps::vip::<F>(segment.key.destination).is_none_or(|flags| packet.is_own() && !refuses(flags));
        return Err(if may_be_anothers { PassReason::NotService.into() } else { DropReason::NoFlow.into() });
    }
    Ok(frontend)
}

/// Whether a packet of the node itself is one that was translated already, and comes by once more as it is sent: to a backend whose
/// address and port are a frontend as well.
#[inline(always)]
fn is_on_its_way<F: FamilyMaps>(segment: &Segment<F::Address>) -> bool {
    let answer = segment.key.reversed();
    let is_own = |flow: Option<&'static mut Flow<F::Address>>| flow.is_some_and(|flow| flow.is_own());
    is_own(maps::flow(F::pending(), &answer)) || is_own(maps::flow(F::flows(), &answer))
}

/// What becomes of a later fragment whose first has not come, or of a flow that is not known.
#[inline(always)]
pub(crate) fn lost_fragment<P: Packet, F: FamilyMaps>(packet: &P, segment: &Segment<F::Address>) -> Verdict {
    // At our own addresses it may be the host's: the stack waits for the first as long as it likes.
    if is_to_vip::<P, F>(packet, segment) {
        return DropReason::FragmentLost.into();
    }
    PassReason::Fragment.into()
}

/// Whether the packet is a later fragment.
#[inline(always)]
pub(crate) fn is_later_fragment<A: Address>(segment: &Segment<A>) -> bool {
    segment.part == Part::Later
}

/// Whether the packet may go one hop further (RFC 1812, section 5.3.1). The stack answers a request that may not;
/// a reply is addressed to us, and the stack would not know that it is not.
#[inline(always)]
pub(crate) fn lives_on<A: Address>(segment: &Segment<A>, direction: Direction) -> Result<(), Verdict> {
    match direction {
        _ if segment.ttl > 1 => Ok(()),
        Direction::Request => Err(PassReason::TtlExpired.into()),
        Direction::Reply => Err(DropReason::ReplyTtlExpired.into()),
    }
}
