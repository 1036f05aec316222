//! Traffic for `cargo xtask bench`: lays the packet down again, gives it the tuple of the next flow, and calls the
//! program under test. (`BPF_PROG_TEST_RUN` hands each repetition the packet as the last one left it.)
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, ProgramArray},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use lb_common::generator::{LENGTH, Traffic};

/// 0 → what to send. The bench writes; the generator counts in it.
#[btf_map]
static TRAFFIC: Array<Traffic, 1> = Array::new();

/// 0 → the program under test.
#[btf_map]
static UNDER_TEST: ProgramArray<1> = ProgramArray::new();

/// Sends the next packet.
#[expect(clippy::needless_pass_by_value, reason = "the signature is the macro's")]
#[xdp]
fn generate(ctx: XdpContext) -> u32 {
    match lay_down(&ctx) {
        // SAFETY: A program of the same type.
        Some(()) => unsafe { UNDER_TEST.tail_call(&ctx, 0) },
        None => return xdp_action::XDP_ABORTED,
    }
    // Only reached if there is no program to call.
    xdp_action::XDP_ABORTED
}

/// Does nothing: what the generator costs by itself is measured with this one.
#[xdp]
fn nothing(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

#[inline(always)]
fn lay_down(ctx: &XdpContext) -> Option<()> {
    let traffic = TRAFFIC.get_ptr_mut(0)?;
    let start = ctx.data();
    if start + LENGTH > ctx.data_end() {
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
        if client as usize + 4 > ctx.data_end()
            || service as usize + 4 > ctx.data_end()
            || port as usize + 2 > ctx.data_end()
        {
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
