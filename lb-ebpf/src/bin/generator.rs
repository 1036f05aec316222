//! Traffic for `cargo xtask bench`: lays the packet down again, gives it the tuple of the next flow, and calls the
//! program under test. (`BPF_PROG_TEST_RUN` hands each repetition the packet as the last one left it.)
//!
//! There is a pair of programs of each kind: one that does this, and one that does nothing. What the generator costs by
//! itself is measured with the latter.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    btf_maps::{Array, ProgramArray},
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use lb_common::generator::{LENGTH, Traffic};

/// 0 → what to send. The bench writes; the generator counts in it.
#[btf_map]
static TRAFFIC: Array<Traffic, 1> = Array::new();

/// 0 → the XDP program under test.
#[btf_map]
static XDP_UNDER_TEST: ProgramArray<1> = ProgramArray::new();

/// 0 → the tc program under test.
#[btf_map]
static TC_UNDER_TEST: ProgramArray<1> = ProgramArray::new();

/// Sends the next packet to an XDP program.
#[expect(clippy::needless_pass_by_value, reason = "the signature is the macro's")]
#[xdp]
fn generate_xdp(ctx: XdpContext) -> u32 {
    if lay_down(ctx.data(), ctx.data_end()).is_some() {
        // SAFETY: A program of the same type.
        unsafe { XDP_UNDER_TEST.tail_call(&ctx, 0) };
    }
    // Only reached if the packet is too short, or there is no program to call.
    xdp_action::XDP_ABORTED
}

/// Sends the next packet to a tc program.
#[expect(clippy::needless_pass_by_value, reason = "the signature is the macro's")]
#[classifier]
fn generate_tc(ctx: TcContext) -> i32 {
    if lay_down(ctx.data(), ctx.data_end()).is_some() {
        // SAFETY: As above.
        unsafe { TC_UNDER_TEST.tail_call(&ctx, 0) };
    }
    TC_ACT_SHOT
}

/// Does nothing.
#[xdp]
fn nothing_xdp(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

/// Does nothing.
#[classifier]
fn nothing_tc(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[inline(always)]
fn lay_down(start: usize, end: usize) -> Option<()> {
    let traffic = TRAFFIC.get_ptr_mut(0)?;
    if start + LENGTH > end {
        return None;
    }
    // SAFETY: The packet has LENGTH bytes, as just checked; the map's element is ours alone while the bench runs.
    unsafe {
        let packet = start as *mut [u64; LENGTH / 8];
        packet.write_unaligned((*traffic).packet);
        let number = (*traffic).next;
        (*traffic).next = number + 1;
        // An odd factor makes a permutation of the flows: neighbours in time are none in memory.
        let flow = (number.wrapping_mul(0x9E37_79B1) as u32) & (*traffic).flow_mask;
        let client = (start + (*traffic).client_offset as usize % LENGTH.next_power_of_two()) as *mut [u8; 4];
        let service = (start + (*traffic).service_offset as usize % LENGTH.next_power_of_two()) as *mut [u8; 4];
        let port = (start + (*traffic).port_offset as usize % LENGTH.next_power_of_two()) as *mut [u8; 2];
        if client as usize + 4 > end || service as usize + 4 > end || port as usize + 2 > end {
            return None;
        }
        let base = (*traffic).client;
        client.write_unaligned((base + (flow >> 14)).to_be_bytes());
        port.write_unaligned((1024 + (flow & 0x3FFF) as u16).to_be_bytes());
        service.write_unaligned(((*traffic).service + flow % (*traffic).services.max(1)).to_be_bytes());
    }
    Some(())
}

/// Required by `no_std`; the verifier proves that it is never reached.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// "GPL" lets the kernel give the helpers that it keeps for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
