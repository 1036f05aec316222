//! ICMP: errors about packets of flows, and echo requests to services' own addresses.

use lb_common::{
    abi::Flow,
    net::{Ipv4Be, Ipv6Be, V4, V6},
    parse::{self, Bytes, Embedded, Part, Segment},
    verdict::{AnswerReason, DropReason, PassReason, Verdict},
};

use crate::{
    classify, config, emit,
    maps::{self, FamilyMaps, Flows},
    packet::Packet,
    rewrite::{self, NetworkHeader},
    track::Moment,
};

/// What is different between ICMP and ICMPv6.
pub(crate) trait Icmp: FamilyMaps + NetworkHeader {
    /// The types of an echo request and of its reply.
    const ECHO: (u8, u8);

    /// Whether a message of this type is about a packet, and has its beginning in it.
    fn is_error(kind: u8) -> bool;

    /// The packet that an error is about.
    fn embedded<B: Bytes>(bytes: &B, icmp: usize) -> Result<Embedded<Self::Address>, PassReason>;
}

impl Icmp for V4 {
    const ECHO: (u8, u8) = (8, 0);

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable, time exceeded, parameter problem (RFC 792). Source quench is no more (RFC 6633).
        matches!(kind, 3 | 11 | 12)
    }

    #[inline(always)]
    fn embedded<B: Bytes>(bytes: &B, icmp: usize) -> Result<Embedded<Ipv4Be>, PassReason> {
        parse::embedded4(bytes, icmp)
    }
}

impl Icmp for V6 {
    const ECHO: (u8, u8) = (128, 129);

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443).
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn embedded<B: Bytes>(bytes: &B, icmp: usize) -> Result<Embedded<Ipv6Be>, PassReason> {
        parse::embedded6(bytes, icmp)
    }
}

/// The way of an ICMP message.
#[inline(always)]
pub(crate) fn run<P: Packet, F: Icmp>(packet: &P, segment: &Segment<F::Address>) -> Result<Verdict, Verdict> {
    let [kind] = packet.read(segment.transport).ok_or(PassReason::MalformedIcmp)?;
    if kind == F::ECHO.0 && classify::is_to_vip::<P, F>(packet, segment) {
        return echo::<P, F>(packet, segment);
    }
    let result = if F::is_error(kind) && segment.part == Part::Whole {
        error::<P, F>(packet, segment)
    } else {
        Err(PassReason::OtherIcmp.into())
    };
    match result {
        // Left to the stack it would go back to whoever routes the address to us, and be sent round until its TTL ends.
        Err(Verdict::Pass(PassReason::OtherIcmp)) if classify::is_to_vip::<P, F>(packet, segment) => {
            Err(DropReason::IcmpLost.into())
        }
        result => result,
    }
}

/// Answers an echo request to an address that is a service's alone, or refuses it.
#[inline(always)]
fn echo<P: Packet, F: Icmp>(packet: &P, segment: &Segment<F::Address>) -> Result<Verdict, Verdict> {
    if !config::answers_ping() || segment.part != Part::Whole || classify::is_to_all(packet) {
        return Err(DropReason::EchoRefused.into());
    }
    rewrite::answer_echo::<P, F>(packet, segment, F::ECHO.1)?;
    Ok(AnswerReason::Echo.into())
}

/// Translates an error about a packet of a flow, so that it reaches whoever sent that packet, as if about the one that it sent.
#[inline(always)]
fn error<P: Packet, F: Icmp>(packet: &P, segment: &Segment<F::Address>) -> Result<Verdict, Verdict> {
    let embedded = F::embedded(packet, segment.transport)?;
    let moment = Moment::now()?;
    // The error goes the way of the packets that answer the one that it is about.
    let flow = match find::<F>(F::flows(), &embedded) {
        Some(flow) => flow,
        None => find::<F>(F::pending(), &embedded).ok_or(PassReason::OtherIcmp)?,
    };
    emit::is_here(packet, segment, flow)?;
    if emit::has_lost_its_hop(flow, moment) {
        emit::lookup::<P, F>(packet, segment, moment, flow)?;
    }
    let (way, reason) = emit::way(packet, segment, flow, moment.epoch);
    rewrite::translate_error::<P, F>(packet, segment, &embedded, flow, way)?;
    Ok(emit::verdict(packet, flow, way, reason))
}

/// The flow of the packets that answer the one that an error is about, copied.
#[inline(always)]
fn find<F: FamilyMaps>(
    flows: &Flows<F::Address>,
    embedded: &Embedded<F::Address>,
) -> Option<&'static mut Flow<F::Address>> {
    let key = embedded.key.reversed();
    let entry = maps::flow(flows, &key)?;
    let flow = &mut F::workspace()?.flow;
    maps::copy_flow(&key, entry, flow).then_some(flow)
}
