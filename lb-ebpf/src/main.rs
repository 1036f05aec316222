//! The road of Wharf: one packet in, one verdict out.
//!
//! Read in this order: `pipeline` says what happens to a packet, from top to bottom; `classify`, `track`,
//! `select`, `rewrite` and `emit` are its steps; `count` turns its verdict into an action; `maps` is what the
//! agent and the programs share; `packet` is how packet memory is reached.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)] // The build sets RUSTC_BOOTSTRAP for build-std already.

mod asm;
mod classify;
mod config;
mod count;
mod emit;
mod maps;
mod packet;
mod pipeline;
mod rewrite;
mod select;
mod socket;
mod track;

use aya_ebpf::{macros::xdp, programs::XdpContext};

use crate::packet::Packet;

/// Balances what comes in by an uplink: requests to services, and the replies of their backends.
#[xdp]
fn wharf_xdp(ctx: XdpContext) -> u32 {
    let packet = Packet::new(ctx);
    count::finish(&packet, pipeline::run(&packet))
}

/// Required by `no_std`; the verifier proves that it is never reached.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// "GPL" lets the kernel give the helpers that it keeps for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
