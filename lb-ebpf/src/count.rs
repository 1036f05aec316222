//! Where every packet's way ends: the verdict is counted and becomes an action.

use aya_ebpf::{bindings::xdp_action, helpers::generated::bpf_redirect};
use lb_common::{parse::Bytes as _, verdict::Verdict};

use crate::{maps, packet::Packet};

/// Counts the verdict, with the packet's bytes, and gives the action for it.
#[inline(always)]
pub(crate) fn finish(packet: &Packet, verdict: Verdict) -> u32 {
    if let Some(counter) = maps::counter(verdict.counter()) {
        // SAFETY: This CPU's own element, and no other program runs on it meanwhile.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += packet.length() as u64;
        }
    }
    match verdict {
        Verdict::Pass(_) => xdp_action::XDP_PASS,
        Verdict::Tx => xdp_action::XDP_TX,
        Verdict::Drop(_) => xdp_action::XDP_DROP,
        // SAFETY: The helper only notes the interface for the driver.
        Verdict::Redirect(interface) => unsafe { bpf_redirect(interface.0, 0) as u32 },
    }
}
