//! What happens to a packet, from top to bottom.

use lb_common::{
    abi::Flow,
    flow::Direction,
    net::{EtherType, V4, V6},
    parse::{self, Segment},
    verdict::{DropReason, PassReason, Verdict},
};

use crate::{
    classify,
    emit::{self, Egress},
    maps::FamilyMaps,
    packet::Packet,
    rewrite::{self, NetworkHeader},
    track::{self, Moment},
};

/// The way of one packet.
#[inline(always)]
pub(crate) fn run(packet: &Packet) -> Verdict {
    match balance(packet) {
        Ok(verdict) | Err(verdict) => verdict,
    }
}

#[inline(always)]
fn balance(packet: &Packet) -> Result<Verdict, Verdict> {
    let frame = parse::frame(packet)?;
    match frame.ether_type {
        EtherType::IPV4 => translate::<V4>(packet, &parse::ipv4(packet, frame)?),
        EtherType::IPV6 => translate::<V6>(packet, &parse::ipv6(packet, frame)?),
        _ => Err(PassReason::NotIp.into()),
    }
}

/// The flow is looked up before the service: a packet of a known flow, in either direction, costs one hash lookup.
/// A packet that opens a flow is after that a packet of a known flow like any other.
#[inline(always)]
fn translate<F: FamilyMaps + NetworkHeader>(
    packet: &Packet,
    segment: &Segment<F::Address>,
) -> Result<Verdict, Verdict> {
    let moment = Moment::now()?;
    for is_second in [false, true] {
        if let Some(flow) = track::find::<F>(segment, &moment) {
            classify::lives_on(segment, flow.direction())?;
            track::update::<F>(packet, segment, &moment, flow)?;
            return forward::<F>(packet, segment, &moment, flow);
        }
        if is_second {
            break;
        }
        let service = classify::service::<F>(segment)?;
        classify::lives_on(segment, Direction::Request)?;
        track::open::<F>(packet, segment, &moment, service)?;
    }
    Err(DropReason::FlowTableFull.into())
}

/// Sends a packet of a known flow on its way.
#[inline(always)]
fn forward<F: FamilyMaps + NetworkHeader>(
    packet: &Packet,
    segment: &Segment<F::Address>,
    moment: &Moment,
    flow: &Flow<F::Address>,
) -> Result<Verdict, Verdict> {
    match emit::egress(packet, segment, &flow.hop, moment.epoch) {
        Egress::Wire(interface) => {
            if segment.ip_length > flow.hop.mtu {
                return Err(DropReason::PacketTooBig.into());
            }
            rewrite::to_wire::<F>(packet, segment, flow)?;
            Ok(emit::verdict(packet, interface))
        }
        Egress::Stack(reason) => {
            rewrite::to_stack::<F>(packet, segment, flow)?;
            Ok(reason.into())
        }
    }
}
