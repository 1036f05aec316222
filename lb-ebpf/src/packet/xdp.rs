//! A packet at the XDP hook.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_load_bytes, bpf_xdp_store_bytes},
    programs::XdpContext,
};
use lb_common::{
    checksum::Csum,
    net::IfIndex,
    parse::{Bytes, Header},
    verdict::Stage,
};

use super::{ChecksumChange, Hook, Packet};
use crate::{asm, maps};

/// An Ethernet header with all the VLAN tags that are parsed, or the beginning of what follows; every IP packet is as long.
type LinkHeader = [u8; 22];

/// A packet at the XDP hook of an uplink.
pub(crate) struct XdpPacket {
    ctx: XdpContext,
}

impl XdpPacket {
    #[inline(always)]
    pub(crate) fn new(ctx: XdpContext) -> Self {
        Self { ctx }
    }
}

impl Packet for XdpPacket {
    #[inline(always)]
    fn hook(&self) -> Hook {
        Hook::UPLINK
    }

    #[inline(always)]
    fn interface(&self) -> IfIndex {
        IfIndex(self.ctx.ingress_ifindex() as u32)
    }

    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        self.ctx.as_ptr()
    }

    #[inline(always)]
    fn is_own(&self) -> bool {
        false
    }

    #[inline(always)]
    fn is_tagged_outside(&self) -> bool {
        false
    }

    #[inline(always)]
    fn largest_on_wire(&self, ip_length: u16, _headers: impl FnOnce() -> u16) -> u16 {
        ip_length
    }

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.ctx.data(), self.ctx.data_end())
    }

    #[inline(always)]
    fn change_checksum(&self, offset: usize, change: ChecksumChange) -> bool {
        let Some(field) = self.header::<[u8; 2]>(offset) else { return false };
        // SAFETY: Inside the packet; nothing else points there.
        let field = unsafe { &mut *field };
        let before = Csum::from_bytes(*field);
        let after = if change.may_be_absent { before.update_udp(change.all) } else { before.update(change.all) };
        *field = after.to_bytes();
        true
    }

    #[inline(always)]
    fn copy_out(&self, offset: usize, to: *mut u8, length: u32) -> bool {
        // SAFETY: The caller's memory has room for so many bytes, as the verifier checks.
        unsafe { bpf_xdp_load_bytes(self.ctx.ctx, offset as u32, to.cast(), length) == 0 }
    }

    #[inline(always)]
    fn copy_in(&self, offset: usize, from: *const u8, length: u32) -> bool {
        // SAFETY: The caller's memory has so many bytes, as the verifier checks.
        unsafe { bpf_xdp_store_bytes(self.ctx.ctx, offset as u32, from.cast_mut().cast(), length) == 0 }
    }

    #[inline(always)]
    fn resize(&self, length: usize) -> bool {
        // Hidden, or the compiler would subtract in 32 bits, which the verifier doesn't let it do with pointers.
        let change = length as i32 - asm::opaque(self.length()) as i32;
        if change <= 0 {
            // SAFETY: Pointers into the packet that were taken before are not used after this.
            return unsafe { bpf_xdp_adjust_tail(self.ctx.ctx, change) == 0 };
        }
        // Drivers leave room in front of a packet, but not always behind it: veth leaves there what rounding up to a cache
        // line gives. What lies behind the Ethernet header and its tags is written anew in any case.
        let Some(link) = self.read::<LinkHeader>(0) else { return false };
        // SAFETY: As above.
        if unsafe { bpf_xdp_adjust_head(self.ctx.ctx, -change) } != 0 {
            return false;
        }
        let Some(to) = self.header::<LinkHeader>(0) else { return false };
        // SAFETY: Inside the packet; nothing else points there.
        unsafe { to.write_unaligned(link) };
        true
    }

    #[inline(always)]
    fn hand_on(&self, stage: Stage) {
        maps::call_xdp_stage(&self.ctx, stage);
    }
}

impl Bytes for XdpPacket {
    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        super::read(self, offset)
    }

    #[inline(always)]
    fn settle(&self, offset: usize) -> usize {
        maps::forget(offset)
    }

    #[inline(always)]
    fn length(&self) -> usize {
        self.ctx.data_end() - self.ctx.data()
    }
}
