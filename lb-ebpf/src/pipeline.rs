//! What happens to a packet, from top to bottom: in one program if it is of an established flow, or not ours; else in
//! two or three.

use lb_common::{
    abi::Flow,
    net::{EtherType, V4, V6},
    parse::{self, Segment},
    verdict::{DropReason, PassReason, Stage, Verdict},
};

use crate::{
    answer::{self, Compose},
    classify,
    emit::{self, Way},
    fragment,
    icmp::{self, Icmp},
    maps::{self, FamilyMaps},
    packet::Packet,
    pending, rewrite, select,
    track::{self, Moment},
};

/// All that is different between the IP families.
pub(crate) trait Ip: FamilyMaps + Icmp + Compose {}

impl Ip for V4 {}
impl Ip for V6 {}

/// What a program does with a packet once it is parsed. Every program parses it: that is cheaper than to hand over what was found.
pub(crate) trait Step {
    fn take<P: Packet, F: Ip>(packet: &P, segment: &mut Segment<F::Address>) -> Result<Verdict, Verdict>;
}

/// The way of one packet through one program.
#[inline(always)]
pub(crate) fn run<P: Packet, S: Step>(packet: &P) -> Verdict {
    match parse::<P, S>(packet) {
        Ok(verdict) | Err(verdict) => verdict,
    }
}

#[inline(always)]
fn parse<P: Packet, S: Step>(packet: &P) -> Result<Verdict, Verdict> {
    let frame = parse::frame(packet)?;
    match frame.ether_type {
        EtherType::IPV4 => S::take::<P, V4>(packet, &mut parse::ipv4(packet, frame)?),
        EtherType::IPV6 => S::take::<P, V6>(packet, &mut parse::ipv6(packet, frame)?),
        _ => Err(PassReason::NotIp.into()),
    }
}

/// The first program at each hook. The flow is looked up before the service: a packet of an established flow, in either
/// direction, costs one hash lookup.
pub(crate) struct Established;

impl Step for Established {
    #[inline(always)]
    fn take<P: Packet, F: Ip>(packet: &P, segment: &mut Segment<F::Address>) -> Result<Verdict, Verdict> {
        let moment = Moment::now()?;
        if !fragment::follow::<F>(segment, moment) {
            return Err(classify::lost_fragment::<P, F>(packet, segment));
        }
        if segment.is_icmp() {
            return Err(Stage::Icmp.into());
        }
        if !classify::may_be_ours::<P, F>(packet, segment) {
            return Err(PassReason::NotService.into());
        }
        let Some(flow) = track::find::<F>(segment, moment) else {
            return Err(classify::stranger::<P, F>(packet, segment));
        };
        emit::is_here(packet, segment, flow)?;
        track::update::<P, F>(packet, segment, moment, flow)?;
        forward::<P, F>(packet, segment, moment, flow)
    }
}

/// Flows that are not established yet.
pub(crate) struct Pending;

impl Step for Pending {
    #[inline(always)]
    fn take<P: Packet, F: Ip>(packet: &P, segment: &mut Segment<F::Address>) -> Result<Verdict, Verdict> {
        let moment = Moment::now()?;
        if !fragment::follow::<F>(segment, moment) {
            return Err(classify::lost_fragment::<P, F>(packet, segment));
        }
        let Some(flow) = pending::find::<P, F>(packet, segment, moment)? else {
            // It was there a moment ago, but it is over.
            return Err(if packet.is_underway() { PassReason::NotService.into() } else { Stage::Open.into() });
        };
        emit::is_here(packet, segment, flow)?;
        forward::<P, F>(packet, segment, moment, flow)
    }
}

/// New flows. A packet that opens one is after that a packet of a known flow like any other.
pub(crate) struct Open;

impl Step for Open {
    #[inline(always)]
    fn take<P: Packet, F: Ip>(packet: &P, segment: &mut Segment<F::Address>) -> Result<Verdict, Verdict> {
        let segment = maps::off_stack::<F>(segment).ok_or(DropReason::MapMissing)?;
        let moment = Moment::now()?;
        if classify::is_later_fragment(segment) {
            // Its flow has just ended.
            return Err(classify::lost_fragment::<P, F>(packet, segment));
        }
        let frontend = classify::admit::<P, F>(packet, segment)?;
        let choice = match select::choice(frontend, packet.is_from_node()) {
            Err(Verdict::Answer(reason)) => return Err(answer::refuse(segment, reason)),
            result => result?,
        };
        let backend = select::backend(choice, &segment.key, moment.tick)?;
        pending::open::<P, F>(packet, segment, &moment, backend)?;
        Ok(Stage::Pending.into())
    }
}

/// ICMP messages.
pub(crate) struct Message;

impl Step for Message {
    #[inline(always)]
    fn take<P: Packet, F: Ip>(packet: &P, segment: &mut Segment<F::Address>) -> Result<Verdict, Verdict> {
        icmp::run::<P, F>(packet, maps::off_stack::<F>(segment).ok_or(DropReason::MapMissing)?)
    }
}

/// Packets that are answered.
pub(crate) struct Answer;

impl Step for Answer {
    #[inline(always)]
    fn take<P: Packet, F: Ip>(packet: &P, segment: &mut Segment<F::Address>) -> Result<Verdict, Verdict> {
        answer::run::<P, F>(packet, maps::off_stack::<F>(segment).ok_or(DropReason::MapMissing)?)
    }
}

/// Translates a packet of a flow, and sends it on its way.
#[inline(always)]
fn forward<P: Packet, F: Ip>(
    packet: &P,
    segment: &Segment<F::Address>,
    moment: Moment,
    flow: &Flow<F::Address>,
) -> Result<Verdict, Verdict> {
    fragment::remember::<F>(segment, moment);
    let (mut way, reason) = emit::way(packet, segment, flow, moment.epoch);
    if matches!(way, Way::Wire | Way::Neighbour | Way::Stack) && !emit::fits(packet, segment, &flow.hop) {
        // The stack would tell the source that the packet has once it is translated: us.
        if segment.dont_fragment {
            return Err(answer::too_big(segment, flow.hop.mtu));
        }
        // The stack fragments the packet.
        way = if packet.is_own() { Way::Inward } else { Way::Stack };
    }
    rewrite::translate::<P, F>(packet, segment, flow, way)?;
    Ok(emit::verdict(packet, flow, way, reason))
}
