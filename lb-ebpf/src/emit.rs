//! How a packet of a flow leaves: where it is translated, by which way, and the verdict for it.

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS,
        BPF_FIB_LKUP_RET_UNSUPP_LWT, bpf_fib_lookup as FibParams,
    },
    helpers::generated::bpf_fib_lookup,
};
use lb_common::{
    abi::{Flow, Hop},
    flow::Direction,
    net::{Address, IfIndex, IpProto, MacAddr},
    parse::Segment,
    verdict::{DropReason, PassReason, Verdict},
};

use crate::{
    classify,
    maps::{self, FamilyMaps},
    packet::{Hook, Packet},
    track::Moment,
};

/// The least MTU that there is, in bytes.
const MTU_MIN: u16 = 68;

/// Who sends a packet on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// The network stack, which forwards the translated packet: it counts the TTL and addresses the frame itself.
    Stack,
    /// We, to the flow's next hop.
    Wire,
    /// We, to where it came from.
    Back,
    /// We, by the next hop's interface; the kernel finds the neighbour. For what the node itself sends, as long as the neighbour is unknown.
    Neighbour,
    /// The network stack, which is given it as if it had come in by the interface that it was to leave by. For what the node itself sends.
    Inward,
    /// The network stack, which is given it as if it had come in by loopback. For what pods and processes of the node answer it: from a
    /// service's address it would not take it by a pod's device, to which no route leads back; and what a process sends has been seen by
    /// its connection tracking as what it was.
    Loopback,
}

/// Whether this hook is the place to translate a packet of a flow.
///
/// The stack must see of a flow on this node the same addresses in both directions, and of its services none: so requests are
/// translated before they reach it, and replies after they have left it. For what the node itself sends it is the other way round. All
/// others never reach it.
#[inline(always)]
pub(crate) fn is_here<P: Packet, A: Address>(packet: &P, segment: &Segment<A>, flow: &Flow<A>) -> Result<(), Verdict> {
    if flow.is_own() {
        let is_forged = flow.direction() == Direction::Request && !packet.is_own();
        return if is_forged { Err(PassReason::NotService.into()) } else { Ok(()) };
    }
    let is_egress = packet.hook() == Hook::EGRESS;
    match (flow.is_on_node(), flow.direction()) {
        (true, Direction::Request) if !is_egress => Ok(()),
        (true, Direction::Reply) if is_egress => Ok(()),
        (true, Direction::Reply) => Err(PassReason::ReplyUnderway.into()),
        (false, direction) if !is_egress => classify::lives_on(segment, direction),
        _ => Err(PassReason::NotService.into()),
    }
}

/// Who sends a packet of a flow on, and why if it is the stack.
#[inline(always)]
pub(crate) fn way<P: Packet, A: Address>(
    packet: &P,
    segment: &Segment<A>,
    flow: &Flow<A>,
    epoch: u32,
) -> (Way, PassReason) {
    let hop = &flow.hop;
    // The FIB names a VLAN's own device for what leaves with a tag: on any other the tags have to go, which the stack knows to do.
    let is_tagged = segment.is_tagged || packet.is_tagged_outside();
    let reason = match flow.direction() {
        Direction::Request => PassReason::RequestOnNode,
        Direction::Reply => PassReason::ReplyOnNode,
    };
    if flow.is_own() {
        let way = match flow.direction() {
            Direction::Request if hop.interface == IfIndex(0) || is_tagged => Way::Inward,
            Direction::Request if hop.epoch == epoch => Way::Wire,
            Direction::Request => Way::Neighbour,
            Direction::Reply if packet.hook() != Hook::UPLINK && maps::is_met_at(IfIndex::LOOPBACK) => Way::Loopback,
            Direction::Reply => Way::Stack,
        };
        return (way, reason);
    }
    if flow.is_on_node() {
        return (Way::Stack, reason);
    }
    if flow.is_hairpin() {
        (Way::Back, PassReason::RoutedByStack)
    } else if hop.epoch != epoch {
        (Way::Stack, PassReason::NeighbourUnresolved)
    } else if hop.mtu == 0 || hop.is_by_stack != 0 || is_tagged {
        (Way::Stack, PassReason::RoutedByStack)
    } else {
        (Way::Wire, PassReason::RoutedByStack)
    }
}

/// Whether a packet is small enough for its next hop.
#[inline(always)]
pub(crate) fn fits<P: Packet, A: Address>(packet: &P, segment: &Segment<A>, hop: &Hop) -> bool {
    let headers = || {
        let transport = match segment.key.proto {
            // The data offset, in words of four bytes.
            IpProto::TCP => {
                packet.read(segment.transport + 12).map_or(20, |[offset]: [u8; 1]| u16::from(offset >> 4) * 4)
            }
            _ => 8,
        };
        (segment.transport - segment.network) as u16 + transport
    };
    // Of a neighbour that is not resolved yet it is unknown.
    hop.mtu == 0 || packet.largest_on_wire(segment.ip_length, headers) <= hop.mtu
}

/// The verdict for a packet that goes this way.
#[inline(always)]
pub(crate) fn verdict<P: Packet, A: Address>(packet: &P, flow: &Flow<A>, way: Way, reason: PassReason) -> Verdict {
    match way {
        Way::Stack => reason.into(),
        Way::Wire if packet.is_own() => Verdict::Outward(flow.hop.interface),
        Way::Wire if flow.hop.interface != packet.interface() => Verdict::Redirect(flow.hop.interface),
        Way::Wire | Way::Back => Verdict::Tx,
        Way::Neighbour => Verdict::Neighbour(flow.hop.interface),
        Way::Inward => Verdict::Inward,
        Way::Loopback => Verdict::Loopback,
    }
}

/// Whether the next hop that a flow remembers, if it needs one, is of another epoch and has to be asked for again.
#[inline(always)]
pub(crate) fn has_lost_its_hop<A: Address>(flow: &Flow<A>, moment: Moment) -> bool {
    flow.needs_hop() && flow.hop.epoch != moment.epoch
}

/// Asks the kernel's FIB where a packet goes once it is translated as the flow says, and notes it in the flow.
///
/// A hop whose neighbour is unknown stays of another epoch, to be asked for again with the next packet;
/// one that only the stack sends to says so (`Hop::is_by_stack`), or has an MTU of zero. It has no interface where the FIB names none: a route that encapsulates, or, for
/// what the node itself sends, one of its own addresses.
#[inline(never)] // The stack, as in `track`.
pub(crate) fn lookup<P: Packet, F: FamilyMaps>(
    packet: &P,
    segment: &Segment<F::Address>,
    moment: Moment,
    flow: &mut Flow<F::Address>,
) -> Result<(), DropReason> {
    let params = &mut F::workspace().ok_or(DropReason::MapMissing)?.fib;
    params.family = F::AF;
    params.l4_protocol = segment.key.proto.0 as u8;
    params.sport = flow.source_port.word();
    params.dport = flow.destination_port.word();
    params.ifindex = packet.interface().0;
    // Not the packet's: whether it is too big is for us to say. But zero would make the tc helper compare by itself.
    params.__bindgen_anon_1.tot_len = 1;
    params.__bindgen_anon_2.flowinfo = F::fib_class(segment.traffic_class);
    // For IPv4 the kernel reads the first word alone.
    params.__bindgen_anon_3.ipv6_src = fib_words(flow.source);
    params.__bindgen_anon_4.ipv6_dst = fib_words(flow.destination);
    params.__bindgen_anon_5.tbid = 0;
    // SAFETY: The context is the one of this run, and the size is that of the parameters.
    let answer = unsafe { bpf_fib_lookup(packet.as_ptr(), &raw mut *params, size_of::<FibParams>() as i32, 0) };
    let is_own = flow.is_own();
    let hop = &mut flow.hop;
    match answer as u32 {
        BPF_FIB_LKUP_RET_SUCCESS => {
            hop.epoch = moment.epoch;
            hop.interface = IfIndex(params.ifindex);
            hop.destination = MacAddr(params.dmac);
            hop.source = MacAddr(params.smac);
            // SAFETY: Both variants are 16 bits; the kernel wrote this one.
            let mtu = unsafe { params.__bindgen_anon_1.mtu_result };
            // XDP sends by interfaces that have our program, and so can take what is redirected; the stack sends by all.
            hop.is_by_stack = u16::from(!is_own && !maps::is_attached(hop.interface));
            // Below what IPv4 demands (RFC 791) it is the rest of a number that was too large for 16 bits.
            hop.mtu = if mtu >= MTU_MIN { mtu } else { 0 };
            Ok(())
        }
        BPF_FIB_LKUP_RET_NO_NEIGH => {
            hop.interface = IfIndex(params.ifindex);
            hop.mtu = 0;
            Ok(())
        }
        BPF_FIB_LKUP_RET_UNSUPP_LWT => {
            hop.leave_to_stack(moment.epoch);
            Ok(())
        }
        // The backend is a process of the node, too.
        BPF_FIB_LKUP_RET_NOT_FWDED if is_own => {
            hop.leave_to_stack(moment.epoch);
            Ok(())
        }
        BPF_FIB_LKUP_RET_NOT_FWDED => Err(DropReason::NotForwarded),
        BPF_FIB_LKUP_RET_FWD_DISABLED => Err(DropReason::ForwardingDisabled),
        _ => Err(DropReason::NoRoute),
    }
}

/// An address as the FIB lookup takes it, in network order.
#[inline(always)]
fn fib_words<A: Address>(address: A) -> [u32; 4] {
    // SAFETY: Both are 16 bytes of integers.
    unsafe { core::mem::transmute(address.to_words()) }
}
