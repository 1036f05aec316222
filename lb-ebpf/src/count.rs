//! Where every packet's way ends, and every call on a socket: the verdict is counted and becomes an action.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    helpers::generated::{bpf_redirect, bpf_redirect_neigh, bpf_set_retval},
};
use lb_common::{
    net::IfIndex,
    verdict::{DropReason, Forward, Verdict},
};

use crate::{
    asm, maps,
    packet::{Packet, SkbPacket, XdpPacket},
};

/// What a hook calls the actions.
pub(crate) trait Actions: Packet {
    /// Goes on as if we were not there, to other programs at the hook and to the stack.
    const PASS: u32;
    /// Ends here.
    const DROP: u32;

    /// Goes back to its sender, by the interface that it came in by or was to leave by.
    fn back(&self) -> u32;

    /// Comes in by an interface.
    fn inward(&self, interface: IfIndex) -> u32;

    /// Leaves by an interface, and the kernel finds the neighbour.
    fn neighbour(&self, interface: IfIndex) -> u32;
}

impl Actions for XdpPacket {
    const PASS: u32 = xdp_action::XDP_PASS;
    const DROP: u32 = xdp_action::XDP_DROP;

    #[inline(always)]
    fn back(&self) -> u32 {
        xdp_action::XDP_TX
    }

    // What the node itself sends does not come by here, and what comes in for it needs no other interface.

    #[inline(always)]
    fn inward(&self, _interface: IfIndex) -> u32 {
        Self::DROP
    }

    #[inline(always)]
    fn neighbour(&self, _interface: IfIndex) -> u32 {
        Self::DROP
    }
}

impl Actions for SkbPacket {
    // The same number as `TCX_NEXT`.
    const PASS: u32 = TC_ACT_UNSPEC as u32;
    const DROP: u32 = TC_ACT_SHOT as u32;

    #[inline(always)]
    fn back(&self) -> u32 {
        if self.is_own() { self.inward(self.interface()) } else { redirect(self.interface(), 0) }
    }

    #[inline(always)]
    fn inward(&self, interface: IfIndex) -> u32 {
        redirect(interface, BPF_F_INGRESS)
    }

    #[inline(always)]
    fn neighbour(&self, interface: IfIndex) -> u32 {
        // SAFETY: Without parameters the helper only notes the interface.
        unsafe { bpf_redirect_neigh(interface.0, core::ptr::null_mut(), 0, 0) as u32 }
    }
}

/// Counts the verdict, with the packet's bytes, and gives the action for it. Bytes are those of the packet as it is now.
#[inline(always)]
pub(crate) fn finish<P: Actions>(packet: &P, verdict: Verdict) -> u32 {
    if let Verdict::Next(stage) = verdict {
        packet.hand_on(stage);
    }
    if let Some(counter) = maps::counter(verdict.counter()) {
        // SAFETY: This CPU's own element, and no other program runs on it meanwhile.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += packet.length() as u64;
        }
    }
    match verdict {
        Verdict::Pass(_) => P::PASS,
        Verdict::Tx | Verdict::Answer(_) | Verdict::Inward => packet.back(),
        Verdict::Redirect(interface) | Verdict::Outward(interface) => redirect(interface, 0),
        Verdict::Loopback => packet.inward(IfIndex::LOOPBACK),
        Verdict::Neighbour(interface) => packet.neighbour(interface),
        Verdict::Drop(_) | Verdict::Next(_) => P::DROP,
    }
}

/// What the kernel is told of a call on a socket: it goes on.
pub(crate) const ALLOW: i32 = 1;
/// It fails, with what was set by `bpf_set_retval`.
const DENY: i32 = 0;

// Error numbers of the kernel (include/uapi/asm-generic/errno.h).
const EPERM: i32 = 1;
const EADDRINUSE: i32 = 98;
const ECONNREFUSED: i32 = 111;

/// Counts what became of a call on a socket, and gives the kernel its answer. `Ok`: it goes to a backend.
#[inline(always)]
pub(crate) fn finish_call(result: Result<(), Verdict>) -> i32 {
    let (counter, error) = match result {
        Ok(()) => (Forward::Socket as u32, 0),
        // Most calls are none of ours.
        Err(Verdict::Pass(_)) => return ALLOW,
        Err(verdict @ Verdict::Drop(DropReason::PortInUse)) => (verdict.counter(), EADDRINUSE),
        Err(verdict @ Verdict::Answer(_)) => (verdict.counter(), ECONNREFUSED),
        // As when a rule of netfilter drops what a process sends.
        Err(verdict) => (verdict.counter(), EPERM),
    };
    if let Some(counter) = maps::counter(counter) {
        // SAFETY: Map memory; atomic, as packets may be counted on this CPU meanwhile.
        unsafe { asm::fetch_add(&raw mut (*counter).packets, 1) };
    }
    if error == 0 {
        return ALLOW;
    }
    // SAFETY: The helper takes a number.
    unsafe { bpf_set_retval(-error) };
    DENY
}

#[inline(always)]
fn redirect(interface: IfIndex, flags: u32) -> u32 {
    // SAFETY: The helper only notes the interface, for the driver or for the stack.
    unsafe { bpf_redirect(interface.0, u64::from(flags)) as u32 }
}
