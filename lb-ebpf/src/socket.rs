//! The host's own sockets, whose packets are not ours to translate.

use aya_ebpf::{
    bindings::bpf_sock_tuple,
    helpers::generated::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp},
};
use lb_common::{abi::FlowKey, net::IpProto};

use crate::{maps::FamilyMaps, packet::Packet};

/// `BPF_F_CURRENT_NETNS` (include/uapi/linux/bpf.h): the namespace of the interface that the packet came in by.
const CURRENT_NETNS: u64 = u64::MAX;

/// Whether packets with this tuple are for a socket of the host: a connection, or one that listens.
#[inline(always)]
pub(crate) fn has_tuple<P: Packet, F: FamilyMaps>(packet: &P, key: &FlowKey<F::Address>) -> bool {
    // The kernel looks up no other sockets.
    if key.proto == IpProto::SCTP {
        return false;
    }
    // `struct bpf_sock_tuple` is the beginning of a flow's key: both addresses, then both ports, in network order.
    let tuple = (&raw const *key).cast::<bpf_sock_tuple>().cast_mut();
    let size = 2 * (size_of::<F::Address>() as u32 + size_of::<u16>() as u32);
    // SAFETY: The key is longer than the tuple that is read of it.
    let socket = unsafe {
        if key.proto == IpProto::TCP {
            bpf_skc_lookup_tcp(packet.as_ptr(), tuple, size, CURRENT_NETNS, 0)
        } else {
            bpf_sk_lookup_udp(packet.as_ptr(), tuple, size, CURRENT_NETNS, 0)
        }
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: The lookup took this reference, and nothing else was done with it.
    unsafe { bpf_sk_release(socket.cast()) };
    true
}
