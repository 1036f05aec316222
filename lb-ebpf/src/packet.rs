//! How packet memory is reached, at either hook: every access is behind a bounds check that the verifier sees.

mod skb;
mod xdp;

use core::ffi::c_void;

use lb_common::{
    checksum::Delta,
    net::{IfIndex, IpProto},
    parse::{Bytes, Header},
    verdict::Stage,
};

pub(crate) use self::{skb::SkbPacket, xdp::XdpPacket};
use crate::asm;

/// Where in a packet's way through the host it is looked at. (No `enum`: of a number the verifier needs to know less.)
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook(u32);

impl Hook {
    /// It came in by an uplink.
    pub(crate) const UPLINK: Self = Self(0);
    /// It came in by a pod-facing device: its sender is on this node.
    pub(crate) const POD: Self = Self(1);
    /// It leaves, by either.
    pub(crate) const EGRESS: Self = Self(2);
}

/// What a translation does to a transport checksum.
#[derive(Clone, Copy)]
pub(crate) struct ChecksumChange {
    /// What all replaced words add.
    pub(crate) all: Delta,
    /// What the addresses among them add, which stand in the pseudo-header.
    pub(crate) addresses: Delta,
    /// Whether zero means that there is none: UDP.
    pub(crate) may_be_absent: bool,
    /// Whether the pseudo-header is that of IPv6.
    pub(crate) is_v6: bool,
}

/// A packet at one of the hooks.
pub(crate) trait Packet: Bytes {
    /// Where it is looked at.
    fn hook(&self) -> Hook;

    /// The interface that it came in by, or leaves by.
    fn interface(&self) -> IfIndex;

    /// The context, for helpers.
    fn as_ptr(&self) -> *mut c_void;

    /// Whether it leaves, and nobody has looked at it before: a process of the node itself has sent it.
    fn is_own(&self) -> bool;

    /// Whether it leaves, and was looked at when it came in: it is no request any more.
    #[inline(always)]
    fn is_underway(&self) -> bool {
        self.hook() == Hook::EGRESS && !self.is_own()
    }

    /// Whether its sender is on this node: a pod, or a process of the node itself.
    #[inline(always)]
    fn is_from_node(&self) -> bool {
        self.hook() == Hook::POD || self.is_own()
    }

    /// Whether it has a VLAN tag that is not in its bytes.
    fn is_tagged_outside(&self) -> bool;

    /// The length of the largest IP packet, in bytes, that it becomes on a wire: several may still be one in memory.
    /// `headers`: the length of network and transport header.
    fn largest_on_wire(&self, ip_length: u16, headers: impl FnOnce() -> u16) -> u16;

    /// Where the bytes that lie in one piece begin and end in memory.
    fn bounds(&self) -> (usize, usize);

    /// A header in packet memory; `None` if the packet ends before it does. Only `rewrite` may write through it.
    #[inline(always)]
    fn header<T: Header>(&self, offset: usize) -> Option<*mut T> {
        let (data, end) = self.bounds();
        let start = asm::opaque(data + asm::bounded(offset));
        if start + size_of::<T>() > end {
            return None;
        }
        Some(start as *mut T)
    }

    /// Changes the transport checksum at `offset`; what this touches of the packet has to be looked up again.
    /// `false` if the packet ends before it.
    fn change_checksum(&self, offset: usize, change: ChecksumChange) -> bool;

    /// Copies bytes to where the verifier knows their number; `length` is above zero.
    fn copy_out(&self, offset: usize, to: *mut u8, length: u32) -> bool;

    /// Copies bytes into the packet. Only `rewrite` may.
    fn copy_in(&self, offset: usize, from: *const u8, length: u32) -> bool;

    /// Makes the packet so long, of which only the Ethernet header and its tags are to be kept, and have nobody complete its
    /// checksum. Only `rewrite` may. `false` if there is no room.
    fn resize(&self, length: usize) -> bool;

    /// Goes on with another program; comes back only if that is missing.
    fn hand_on(&self, stage: Stage);
}

/// A copy of a header; `None` if the packet ends before it does.
#[inline(always)]
fn read<P: Packet, T: Header>(packet: &P, offset: usize) -> Option<T> {
    let header = packet.header::<T>(offset)?;
    // SAFETY: Inside the packet, as just checked, and T takes any bytes.
    Some(unsafe { header.read_unaligned() })
}

/// Where the checksum of a transport header stands in it.
#[inline(always)]
pub(crate) const fn checksum_offset(proto: IpProto) -> Option<usize> {
    match proto {
        IpProto::TCP => Some(16),
        IpProto::UDP => Some(6),
        // SCTP's covers no addresses, and its ports are never changed.
        _ => None,
    }
}
