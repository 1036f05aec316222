//! A packet at the tc hooks, which is a socket buffer: its bytes may be in several pieces of memory, its checksum not computed
//! yet, and it may stand for several packets.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::generated::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
        bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use lb_common::{
    checksum::Delta,
    net::{EtherType, IfIndex, IpProto},
    parse::{Bytes, Header},
    verdict::Stage,
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use super::{ChecksumChange, Hook, Packet};
use crate::maps;

/// So many bytes of a packet are made to lie in one piece, in which all headers are but for very long extension headers.
const HEADERS: u32 = 256;

/// The lengths of headers without options, in bytes.
const ETHERNET: u32 = size_of::<EthHdr>() as u32;
const IPV4: u32 = size_of::<Ipv4Hdr>() as u32;
const IPV6: u32 = size_of::<Ipv6Hdr>() as u32;
const TCP: u32 = size_of::<TcpHdr>() as u32;
const UDP: u32 = size_of::<UdpHdr>() as u32;

/// A packet at a tc hook.
pub(crate) struct SkbPacket {
    ctx: TcContext,
    hook: Hook,
}

impl SkbPacket {
    /// A packet that a hook has just been given.
    #[inline(always)]
    pub(crate) fn new(ctx: TcContext, hook: Hook) -> Self {
        let packet = Self { ctx, hook };
        let (length, headers) = (packet.ctx.len(), packet.headers());
        let wanted = if length < headers { length } else { headers };
        if packet.ctx.data() + wanted as usize > packet.ctx.data_end() {
            // If there is no memory for it, the headers are not found, and the packet goes to the stack.
            // SAFETY: No pointer into the packet is held.
            unsafe { bpf_skb_pull_data(packet.skb(), wanted) };
        }
        packet
    }

    /// A packet that [`Packet::hand_on`] handed on.
    #[inline(always)]
    pub(crate) fn handed_on(ctx: TcContext) -> Self {
        let skb: *mut __sk_buff = ctx.as_ptr().cast();
        // SAFETY: The context, whose `cb` is ours until the packet leaves the hook.
        let hook = Hook(unsafe { (&raw const (*skb).cb[0]).read_volatile() });
        Self { ctx, hook }
    }

    /// How many bytes have to lie in one piece. Of what a socket sends, and many cards receive, just the headers do; to add
    /// data to them the kernel would allocate memory for each packet. So it is no more than that, as far as it is easily told.
    #[inline(always)]
    fn headers(&self) -> u32 {
        let has_no_options = || self.read(ETHERNET as usize) == Some([0x45]);
        let (network, protocol) = match self.read(12).map(EtherType::from_bytes) {
            Some(EtherType::IPV4) if has_no_options() => (IPV4, ETHERNET + 9),
            Some(EtherType::IPV6) => (IPV6, ETHERNET + 6),
            _ => return HEADERS,
        };
        let transport = match self.read::<[u8; 1]>(protocol as usize) {
            Some([protocol]) if protocol == IpProto::TCP.0 as u8 => TCP,
            Some([protocol]) if protocol == IpProto::UDP.0 as u8 => UDP,
            _ => return HEADERS,
        };
        ETHERNET + network + transport
    }

    #[inline(always)]
    fn skb(&self) -> *mut __sk_buff {
        self.ctx.as_ptr().cast()
    }

    /// Lets the kernel change a checksum: whatever is in the field, it knows what has to become of it.
    #[inline(always)]
    fn replace(&self, offset: usize, delta: Delta, flags: u32) -> bool {
        // SAFETY: Pointers into the packet that were taken before are not used after this.
        // A size of zero stands for a difference of sums.
        unsafe { bpf_l4_csum_replace(self.skb(), offset as u32, 0, u64::from(delta.fold()), u64::from(flags)) == 0 }
    }
}

impl Packet for SkbPacket {
    #[inline(always)]
    fn hook(&self) -> Hook {
        self.hook
    }

    #[inline(always)]
    fn interface(&self) -> IfIndex {
        // SAFETY: The context.
        IfIndex(unsafe { (&raw const (*self.skb()).ifindex).read_volatile() })
    }

    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        self.ctx.as_ptr()
    }

    #[inline(always)]
    fn is_own(&self) -> bool {
        // SAFETY: The context. What was received has the number of its interface.
        self.hook == Hook::EGRESS && unsafe { (&raw const (*self.skb()).ingress_ifindex).read_volatile() } == 0
    }

    #[inline(always)]
    fn is_tagged_outside(&self) -> bool {
        // SAFETY: The context.
        unsafe { (&raw const (*self.skb()).vlan_present).read_volatile() != 0 }
    }

    #[inline(always)]
    fn largest_on_wire(&self, ip_length: u16, headers: impl FnOnce() -> u16) -> u16 {
        // SAFETY: The context.
        match unsafe { (&raw const (*self.skb()).gso_size).read_volatile() } {
            0 => ip_length,
            // `GSO_BY_FRAGS` (include/linux/skbuff.h): SCTP has cut it by itself to what it knows the path to take.
            0xFFFF => 0,
            payload => headers().saturating_add(payload as u16),
        }
    }

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.ctx.data(), self.ctx.data_end())
    }

    #[inline(always)]
    fn change_checksum(&self, offset: usize, change: ChecksumChange) -> bool {
        let absent = if change.may_be_absent { BPF_F_MARK_MANGLED_0 } else { 0 };
        // A sum of the pseudo-header alone changes with the addresses only; one that the card has computed over the whole
        // packet changes with them, too, as IPv4's header checksum makes up for itself.
        if !self.replace(offset, change.addresses, absent | BPF_F_PSEUDO_HDR) {
            return false;
        }
        if change.is_v6 {
            // IPv6 has no such checksum: there the card's sum stays as it was (BPF_F_IPV6 says so, but since Linux 6.16 only).
            // SAFETY: The context. An error says that the card has computed nothing.
            let _no_sum = unsafe { bpf_csum_update(self.skb(), u32::from(change.addresses.fold())) };
        }
        self.replace(offset, change.all.without(change.addresses), absent)
    }

    #[inline(always)]
    fn copy_out(&self, offset: usize, to: *mut u8, length: u32) -> bool {
        // SAFETY: The caller's memory has room for so many bytes, as the verifier checks.
        unsafe { bpf_skb_load_bytes(self.as_ptr(), offset as u32, to.cast(), length) == 0 }
    }

    #[inline(always)]
    fn copy_in(&self, offset: usize, from: *const u8, length: u32) -> bool {
        // SAFETY: The caller's memory has so many bytes, as the verifier checks.
        unsafe { bpf_skb_store_bytes(self.skb(), offset as u32, from.cast(), length, 0) == 0 }
    }

    #[inline(always)]
    fn resize(&self, length: usize) -> bool {
        let length = length as u32;
        // The card that is to complete the packet's checksum would write it into what takes the packet's place. The kernel gives
        // that up when the bytes where the sum begins are cut off (`skb_postpull_rcsum` in include/linux/skbuff.h): so the packet is
        // made longer first, and all headers behind Ethernet's go. With tags in the frame it cuts nothing off.
        // SAFETY: Pointers into the packet that were taken before are not used after this.
        unsafe {
            let is_cut = bpf_skb_change_tail(self.skb(), length + HEADERS, 0) == 0
                && bpf_skb_adjust_room(self.skb(), -(HEADERS as i32), BPF_ADJ_ROOM_MAC, 0) == 0;
            is_cut || bpf_skb_change_tail(self.skb(), length, 0) == 0
        }
    }

    #[inline(always)]
    fn hand_on(&self, stage: Stage) {
        // SAFETY: The context, whose `cb` is ours until the packet leaves the hook.
        unsafe { (&raw mut (*self.skb()).cb[0]).write_volatile(self.hook.0) };
        maps::call_tc_stage(&self.ctx, stage);
    }
}

impl Bytes for SkbPacket {
    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        super::read(self, offset)
    }

    #[inline(always)]
    fn settle(&self, offset: usize) -> usize {
        maps::forget(offset)
    }

    #[inline(always)]
    fn stands_for_several(&self) -> bool {
        // SAFETY: The context.
        unsafe { (&raw const (*self.skb()).gso_size).read_volatile() != 0 }
    }

    #[inline(always)]
    fn length(&self) -> usize {
        self.ctx.len() as usize
    }
}
