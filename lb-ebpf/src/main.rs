//! The road of Wharf: one packet in, one verdict out.
//!
//! Read in this order: `pipeline` says what happens to a packet, from top to bottom; `track`, `classify`, `pending`,
//! `select`, `fragment`, `emit`, `rewrite`, `icmp` and `answer` are its steps; `count` turns its verdict into an action;
//! `maps` is what the agent and the programs share; `packet` is how packet memory is reached at either kind of hook.
//!
//! The programs here are pairs of a hook and a step. The first at each hook deals with established flows, and hands all
//! else of ours on by a tail call: each program is verified by itself, and has a stack of its own.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)] // The build sets RUSTC_BOOTSTRAP for build-std already.

mod answer;
mod asm;
mod classify;
mod config;
mod count;
mod emit;
mod fragment;
mod icmp;
mod maps;
mod packet;
mod pending;
mod pipeline;
mod rewrite;
mod select;
mod sock_addr;
mod socket;
mod track;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};

use crate::{
    count::Actions,
    packet::{Hook, SkbPacket, XdpPacket},
    pipeline::{Answer, Established, Message, Open, Pending, Step},
    sock_addr::{Bind, Connect, Sendmsg, Show},
};

/// What comes in by an uplink: requests, and replies of backends on other nodes.
#[xdp]
#[inline(always)]
fn wharf_xdp(ctx: XdpContext) -> u32 {
    take::<_, Established>(&XdpPacket::new(ctx))
}

/// Stage `Pending` of `wharf_xdp`.
#[xdp]
#[inline(always)]
fn wharf_xdp_pending(ctx: XdpContext) -> u32 {
    take::<_, Pending>(&XdpPacket::new(ctx))
}

/// Stage `Open` of `wharf_xdp`.
#[xdp]
#[inline(always)]
fn wharf_xdp_open(ctx: XdpContext) -> u32 {
    take::<_, Open>(&XdpPacket::new(ctx))
}

/// Stage `Icmp` of `wharf_xdp`.
#[xdp]
#[inline(always)]
fn wharf_xdp_icmp(ctx: XdpContext) -> u32 {
    take::<_, Message>(&XdpPacket::new(ctx))
}

/// Stage `Answer` of `wharf_xdp`.
#[xdp]
#[inline(always)]
fn wharf_xdp_answer(ctx: XdpContext) -> u32 {
    take::<_, Answer>(&XdpPacket::new(ctx))
}

/// What comes in by an uplink without XDP.
#[classifier]
#[inline(always)]
fn wharf_tc_ingress(ctx: TcContext) -> i32 {
    take::<_, Established>(&SkbPacket::new(ctx, Hook::UPLINK)) as i32
}

/// What pods send.
#[classifier]
#[inline(always)]
fn wharf_tc_pod(ctx: TcContext) -> i32 {
    take::<_, Established>(&SkbPacket::new(ctx, Hook::POD)) as i32
}

/// What leaves by an uplink or for a pod: replies of flows whose backend or client is on this node.
#[classifier]
#[inline(always)]
fn wharf_tc_egress(ctx: TcContext) -> i32 {
    take::<_, Established>(&SkbPacket::new(ctx, Hook::EGRESS)) as i32
}

/// Stage `Pending` of the tc programs.
#[classifier]
#[inline(always)]
fn wharf_tc_pending(ctx: TcContext) -> i32 {
    take::<_, Pending>(&SkbPacket::handed_on(ctx)) as i32
}

/// Stage `Open` of the tc programs.
#[classifier]
#[inline(always)]
fn wharf_tc_open(ctx: TcContext) -> i32 {
    take::<_, Open>(&SkbPacket::handed_on(ctx)) as i32
}

/// Stage `Icmp` of the tc programs.
#[classifier]
#[inline(always)]
fn wharf_tc_icmp(ctx: TcContext) -> i32 {
    take::<_, Message>(&SkbPacket::handed_on(ctx)) as i32
}

/// Stage `Answer` of the tc programs.
#[classifier]
#[inline(always)]
fn wharf_tc_answer(ctx: TcContext) -> i32 {
    take::<_, Answer>(&SkbPacket::handed_on(ctx)) as i32
}

/// What processes connect to, over IPv4.
#[cgroup_sock_addr(connect4)]
#[inline(always)]
fn wharf_connect4(ctx: SockAddrContext) -> i32 {
    sock_addr::take4::<Connect>(ctx)
}

/// What processes connect to, over IPv6.
#[cgroup_sock_addr(connect6)]
#[inline(always)]
fn wharf_connect6(ctx: SockAddrContext) -> i32 {
    sock_addr::take6::<Connect>(ctx)
}

/// Where sockets that are not connected send datagrams, over IPv4.
#[cgroup_sock_addr(sendmsg4)]
#[inline(always)]
fn wharf_sendmsg4(ctx: SockAddrContext) -> i32 {
    sock_addr::take4::<Sendmsg>(ctx)
}

/// Where sockets that are not connected send datagrams, over IPv6.
#[cgroup_sock_addr(sendmsg6)]
#[inline(always)]
fn wharf_sendmsg6(ctx: SockAddrContext) -> i32 {
    sock_addr::take6::<Sendmsg>(ctx)
}

/// Which addresses and ports of IPv4 sockets are to have.
#[cgroup_sock_addr(bind4)]
#[inline(always)]
fn wharf_bind4(ctx: SockAddrContext) -> i32 {
    sock_addr::take4::<Bind>(ctx)
}

/// Which addresses and ports of IPv6 sockets are to have.
#[cgroup_sock_addr(bind6)]
#[inline(always)]
fn wharf_bind6(ctx: SockAddrContext) -> i32 {
    sock_addr::take6::<Bind>(ctx)
}

/// Whom a datagram came from, over IPv4.
#[cgroup_sock_addr(recvmsg4)]
#[inline(always)]
fn wharf_recvmsg4(ctx: SockAddrContext) -> i32 {
    sock_addr::take4::<Show>(ctx)
}

/// Whom a datagram came from, over IPv6.
#[cgroup_sock_addr(recvmsg6)]
#[inline(always)]
fn wharf_recvmsg6(ctx: SockAddrContext) -> i32 {
    sock_addr::take6::<Show>(ctx)
}

/// Whom a socket is connected to, over IPv4.
#[cgroup_sock_addr(getpeername4)]
#[inline(always)]
fn wharf_getpeername4(ctx: SockAddrContext) -> i32 {
    sock_addr::take4::<Show>(ctx)
}

/// Whom a socket is connected to, over IPv6.
#[cgroup_sock_addr(getpeername6)]
#[inline(always)]
fn wharf_getpeername6(ctx: SockAddrContext) -> i32 {
    sock_addr::take6::<Show>(ctx)
}

/// Which sockets are closed.
#[cgroup_sock(sock_release)]
#[inline(always)]
fn wharf_release(ctx: SockContext) -> i32 {
    sock_addr::release(ctx)
}

#[inline(always)]
fn take<P: Actions, S: Step>(packet: &P) -> u32 {
    count::finish(packet, pipeline::run::<P, S>(packet))
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
