//! How a translated packet leaves: the next hop, and the verdict for it.

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNSUPP_LWT, bpf_fib_lookup as FibParams,
    },
    helpers::generated::bpf_fib_lookup,
};
use lb_common::{
    abi::{Flow, Hop},
    net::{Address, IfIndex, MacAddr},
    parse::Segment,
    verdict::{DropReason, PassReason, Verdict},
};

use crate::{
    maps::{self, FamilyMaps},
    packet::Packet,
    track::Moment,
};

/// The least MTU that there is, in bytes.
const MTU_MIN: u16 = 68;

/// Who sends the packet on.
pub(crate) enum Egress {
    /// Wharf itself, by this interface.
    Wire(IfIndex),
    /// The network stack, which forwards the translated packet.
    Stack(PassReason),
}

/// Who sends a packet to this hop.
#[inline(always)]
pub(crate) fn egress<A: Address>(packet: &Packet, segment: &Segment<A>, hop: &Hop, epoch: u32) -> Egress {
    if hop.epoch != epoch {
        return Egress::Stack(PassReason::NeighbourUnresolved);
    }
    // A tagged frame goes back as it came. To leave by another device its tags have to change, which the stack knows to do.
    if hop.mtu == 0 || (segment.is_tagged && hop.interface != packet.ingress()) {
        return Egress::Stack(PassReason::RoutedByStack);
    }
    Egress::Wire(hop.interface)
}

/// The verdict for a packet that leaves by an interface.
#[inline(always)]
pub(crate) fn verdict(packet: &Packet, interface: IfIndex) -> Verdict {
    if interface == packet.ingress() { Verdict::Tx } else { Verdict::Redirect(interface) }
}

/// Asks the kernel's FIB where a packet goes once it is translated as the flow says, and notes it in the flow.
///
/// A hop whose neighbour is unknown stays of another epoch, to be asked for again with the next packet;
/// one that only the stack sends to has an MTU of zero.
#[inline(never)] // The stack, as in `track`.
pub(crate) fn lookup<F: FamilyMaps>(
    packet: &Packet,
    segment: &Segment<F::Address>,
    moment: &Moment,
    flow: &mut Flow<F::Address>,
) -> Result<(), DropReason> {
    let params = &mut F::workspace().ok_or(DropReason::MapMissing)?.fib;
    params.family = F::AF;
    params.l4_protocol = segment.key.proto.0 as u8;
    params.sport = flow.source_port.word();
    params.dport = flow.destination_port.word();
    params.ifindex = packet.ingress().0;
    params.__bindgen_anon_1.tot_len = segment.ip_length;
    params.__bindgen_anon_2.flowinfo = F::fib_class(segment.traffic_class);
    // For IPv4 the kernel reads the first word alone.
    params.__bindgen_anon_3.ipv6_src = fib_words(flow.source);
    params.__bindgen_anon_4.ipv6_dst = fib_words(flow.destination);
    params.__bindgen_anon_5.tbid = 0;
    // SAFETY: The context is the one of this run, and the size is that of the parameters.
    let answer = unsafe { bpf_fib_lookup(packet.as_ptr(), &raw mut *params, size_of::<FibParams>() as i32, 0) };
    let hop = &mut flow.hop;
    match answer as u32 {
        BPF_FIB_LKUP_RET_SUCCESS => {
            hop.epoch = moment.epoch;
            hop.interface = IfIndex(params.ifindex);
            hop.destination = MacAddr(params.dmac);
            hop.source = MacAddr(params.smac);
            // XDP sends by interfaces that have our program, and so can take what is redirected; the stack sends by all.
            // SAFETY: Both variants are 16 bits; the kernel wrote this one.
            let mtu = unsafe { params.__bindgen_anon_1.mtu_result };
            // Below what IPv4 demands (RFC 791) it is the rest of a number that was too large for 16 bits.
            hop.mtu = if mtu >= MTU_MIN && maps::is_attached(hop.interface) { mtu } else { 0 };
            Ok(())
        }
        BPF_FIB_LKUP_RET_NO_NEIGH => {
            hop.interface = IfIndex(params.ifindex);
            Ok(())
        }
        BPF_FIB_LKUP_RET_UNSUPP_LWT => {
            hop.epoch = moment.epoch;
            hop.interface = IfIndex(0);
            hop.mtu = 0;
            Ok(())
        }
        BPF_FIB_LKUP_RET_NOT_FWDED => Err(DropReason::NotForwarded),
        BPF_FIB_LKUP_RET_FWD_DISABLED => Err(DropReason::ForwardingDisabled),
        BPF_FIB_LKUP_RET_FRAG_NEEDED => Err(DropReason::PacketTooBig),
        _ => Err(DropReason::NoRoute),
    }
}

/// An address as the FIB lookup takes it, in network order.
#[inline(always)]
fn fib_words<A: Address>(address: A) -> [u32; 4] {
    // SAFETY: Both are 16 bytes of integers.
    unsafe { core::mem::transmute(address.to_words()) }
}
