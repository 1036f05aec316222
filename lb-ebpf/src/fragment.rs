//! Datagrams in fragments: only the first holds ports, so the others follow it.

use lb_common::{
    abi::{Fragment, FragmentKey},
    net::{Address, IpProto},
    parse::{Part, Segment},
};

use crate::{
    maps::{self, FamilyMaps},
    track::Moment,
};

/// How long, in ticks, the ports of a datagram are good for: a sender may use an identification again after that
/// (RFC 791 speaks of the packet's time to live, RFC 6864 of two minutes; Linux reassembles for 30 s).
const TIMEOUT: u32 = 28;

/// Gives a later fragment the ports of its first, and its protocol where it hides that. `false` if that is not known.
///
/// A first fragment takes the place of one that its sender gave the same identification before, whatever becomes of it:
/// what comes after it is not of that one.
#[inline(always)]
pub(crate) fn follow<F: FamilyMaps>(segment: &mut Segment<F::Address>, moment: Moment) -> bool {
    if segment.part == Part::Whole {
        return true;
    }
    if segment.part == Part::First {
        if maps::fragment::<F>(&key(segment)).is_some() {
            remember::<F>(segment, moment);
        }
        return true;
    }
    if !segment.hides_proto() {
        return follow_first::<F>(segment, moment);
    }
    // An identification is of one datagram, whatever that is of.
    for proto in [IpProto::UDP, IpProto::TCP, IpProto::SCTP] {
        segment.key.proto = proto;
        if follow_first::<F>(segment, moment) {
            return true;
        }
    }
    false
}

#[inline(always)]
fn follow_first<F: FamilyMaps>(segment: &mut Segment<F::Address>, moment: Moment) -> bool {
    match maps::fragment::<F>(&key(segment)) {
        Some(first) if moment.tick.since(first.seen) <= TIMEOUT => {
            segment.key.source_port = first.source_port;
            segment.key.destination_port = first.destination_port;
            true
        }
        _ => false,
    }
}

/// Remembers the ports of a first fragment of a flow for those that come after it.
#[inline(always)]
pub(crate) fn remember<F: FamilyMaps>(segment: &Segment<F::Address>, moment: Moment) {
    if segment.part != Part::First {
        return;
    }
    let fragment = Fragment {
        source_port: segment.key.source_port,
        destination_port: segment.key.destination_port,
        seen: moment.tick.0,
    };
    maps::set_fragment::<F>(&key(segment), &fragment);
}

#[inline(always)]
fn key<A: Address>(segment: &Segment<A>) -> FragmentKey<A> {
    let &Segment { key, identification, .. } = segment;
    FragmentKey { source: key.source, destination: key.destination, identification, proto: key.proto, _pad: 0 }
}
