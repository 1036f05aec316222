//! How packet memory is reached: every access is behind a bounds check that the verifier sees.

use aya_ebpf::{EbpfContext as _, programs::XdpContext};
use lb_common::{
    net::IfIndex,
    parse::{Bytes, Header, MAX_OFFSET},
};

use crate::{asm, maps};

/// A packet at the XDP hook.
pub(crate) struct Packet {
    ctx: XdpContext,
}

impl Packet {
    #[inline(always)]
    pub(crate) fn new(ctx: XdpContext) -> Self {
        Self { ctx }
    }

    /// The interface that the packet came in by.
    #[inline(always)]
    pub(crate) fn ingress(&self) -> IfIndex {
        IfIndex(self.ctx.ingress_ifindex() as u32)
    }

    /// The context, for helpers.
    #[inline(always)]
    pub(crate) fn as_ptr(&self) -> *mut core::ffi::c_void {
        self.ctx.as_ptr()
    }

    /// A header in packet memory; `None` if the packet ends before it does. Only `rewrite` may write through it.
    #[inline(always)]
    pub(crate) fn header<T: Header>(&self, offset: usize) -> Option<*mut T> {
        // The limit is what the verifier needs to know of an offset that was read from the packet.
        if offset > MAX_OFFSET {
            return None;
        }
        let start = asm::opaque(self.ctx.data() + offset);
        if start + size_of::<T>() > self.ctx.data_end() {
            return None;
        }
        Some(start as *mut T)
    }
}

impl Bytes for Packet {
    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        let header = self.header::<T>(offset)?;
        // SAFETY: Inside the packet, as just checked, and T takes any bytes.
        Some(unsafe { header.read_unaligned() })
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
