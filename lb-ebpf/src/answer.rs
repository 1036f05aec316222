//! What a packet is answered with that goes no further: TCP RST, ICMP port unreachable, ICMP packet too big.

use core::ptr;

use aya_ebpf::helpers::generated::bpf_csum_diff;
use lb_common::{
    checksum::Csum,
    flow::TcpFlags,
    net::{Address, IpProto, Ipv4Be, Ipv6Be, V4, V6},
    parse::{self, Segment},
    verdict::{AnswerReason, DropReason, Stage, Verdict},
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use crate::{
    asm, classify,
    maps::{self, ANSWER_MAX, FamilyMaps, Handover},
    packet::Packet,
    rewrite::{self, TTL},
};

/// The length of a TCP header without options, in bytes.
const TCP: usize = 20;
/// The length of an ICMP header, in bytes.
const ICMP: usize = 8;
/// How much of a packet is quoted at most, in bytes; a multiple of four. RFC 792 wants the IP header and eight bytes.
const QUOTE_MAX: u16 = 200;

/// How headers of a family are made.
pub(crate) trait Compose: FamilyMaps {
    /// The length of the network header, in bytes.
    const HEADER: usize;
    /// The protocol of its ICMP.
    const ICMP: IpProto;
    /// Type and code of "port unreachable".
    const PORT_UNREACHABLE: [u8; 2];
    /// Type and code of "packet too big"; the MTU is in the last two of the header's bytes.
    const TOO_BIG: [u8; 2];
    /// Whether ICMP's checksum covers a pseudo-header.
    const HAS_PSEUDO_HEADER: bool;

    /// Writes a network header for `payload` bytes, with its checksum where the family has one.
    fn write(to: *mut u8, from: Self::Address, for_: Self::Address, proto: IpProto, payload: u16);
}

impl Compose for V4 {
    const HEADER: usize = 20;
    const ICMP: IpProto = IpProto::ICMP;
    const PORT_UNREACHABLE: [u8; 2] = [3, 3];
    const TOO_BIG: [u8; 2] = [3, 4];
    const HAS_PSEUDO_HEADER: bool = false;

    #[inline(always)]
    fn write(to: *mut u8, from: Ipv4Be, for_: Ipv4Be, proto: IpProto, payload: u16) {
        let header = Ipv4Hdr {
            vihl: 0x45,
            tos: 0,
            tot_len: (payload + Self::HEADER as u16).to_be_bytes(),
            id: [0; 2],
            frags: 0x4000_u16.to_be_bytes(),
            ttl: TTL,
            proto: proto.0 as u8,
            check: [0; 2],
            src_addr: from.to_bytes(),
            dst_addr: for_.to_bytes(),
        };
        // SAFETY: The caller's memory has room for the header.
        unsafe {
            to.cast::<Ipv4Hdr>().write_unaligned(header);
            let check = checksum(to, Self::HEADER as u32, 0).to_bytes();
            (&raw mut (*to.cast::<Ipv4Hdr>()).check).write_unaligned(check);
        }
    }
}

impl Compose for V6 {
    const HEADER: usize = 40;
    const ICMP: IpProto = IpProto::ICMPV6;
    const PORT_UNREACHABLE: [u8; 2] = [1, 4];
    const TOO_BIG: [u8; 2] = [2, 0];
    const HAS_PSEUDO_HEADER: bool = true;

    #[inline(always)]
    fn write(to: *mut u8, from: Ipv6Be, for_: Ipv6Be, proto: IpProto, payload: u16) {
        let header = Ipv6Hdr {
            vcf: [0x60, 0, 0, 0],
            payload_len: payload.to_be_bytes(),
            next_hdr: proto.0 as u8,
            hop_limit: TTL,
            src_addr: from.to_bytes(),
            dst_addr: for_.to_bytes(),
        };
        // SAFETY: The caller's memory has room for the header.
        unsafe { to.cast::<Ipv6Hdr>().write_unaligned(header) };
    }
}

/// Has a packet refused, where that may be: nothing is ever said to a RST, or to who can't be a single sender (RFC 1122, section 3.2.2).
#[inline(always)]
pub(crate) fn refuse<A: Address>(segment: &Segment<A>, reason: AnswerReason) -> Verdict {
    hand_on(segment, reason, 0)
}

/// Has a packet's sender told that it may not be larger than `mtu` bytes.
#[inline(always)]
pub(crate) fn too_big<A: Address>(segment: &Segment<A>, mtu: u16) -> Verdict {
    hand_on(segment, AnswerReason::TooBig, mtu)
}

#[inline(always)]
fn hand_on<A: Address>(segment: &Segment<A>, reason: AnswerReason, mtu: u16) -> Verdict {
    let is_answered = !segment.flags.resets()
        && !segment.is_icmp()
        && !classify::is_later_fragment(segment)
        && segment.key.source.is_single_host();
    match maps::handover() {
        Some(handover) if is_answered => {
            *handover = Handover { answer: reason as u32, mtu: u32::from(mtu) };
            Stage::Answer.into()
        }
        _ => unanswered(reason).into(),
    }
}

/// Why a packet ends here that is not answered.
#[inline(always)]
const fn unanswered(reason: AnswerReason) -> DropReason {
    match reason {
        AnswerReason::NoBackend => DropReason::NoBackend,
        AnswerReason::WrongPort => DropReason::WrongPort,
        AnswerReason::TooBig => DropReason::PacketTooBig,
        AnswerReason::Echo => DropReason::EchoRefused,
    }
}

/// Makes of a packet the answer that [`refuse`] or [`too_big`] asked for.
#[inline(always)]
pub(crate) fn run<P: Packet, F: Compose>(packet: &P, segment: &Segment<F::Address>) -> Result<Verdict, Verdict> {
    let Handover { answer, mtu } = *maps::handover().ok_or(DropReason::MapMissing)?;
    let reason = match answer {
        answer if answer == AnswerReason::NoBackend as u32 => AnswerReason::NoBackend,
        answer if answer == AnswerReason::WrongPort as u32 => AnswerReason::WrongPort,
        _ => AnswerReason::TooBig,
    };
    let to = F::workspace().ok_or(DropReason::MapMissing)?.answer.as_mut_ptr();
    if segment.key.proto == IpProto::TCP && reason != AnswerReason::TooBig {
        reset::<P, F>(packet, segment, to)?;
        rewrite::replace(packet, segment.network, to, (F::HEADER + TCP) as u32)?;
    } else {
        let kind = if reason == AnswerReason::TooBig { F::TOO_BIG } else { F::PORT_UNREACHABLE };
        let length = error::<P, F>(packet, segment, to, kind, mtu as u16)?;
        rewrite::replace(packet, segment.network, to, length)?;
    }
    Ok(reason.into())
}

/// A TCP RST (RFC 9293, section 3.10.7.1): with the number that the sender waits for, or else one that acknowledges all that it sent.
#[inline(always)]
fn reset<P: Packet, F: Compose>(packet: &P, segment: &Segment<F::Address>, to: *mut u8) -> Result<(), DropReason> {
    let key = &segment.key;
    let header: TcpHdr = packet.read(segment.transport).ok_or(DropReason::AnswerFailed)?;
    let [offset] = packet.read(segment.transport + 12).ok_or(DropReason::AnswerFailed)?;
    let (sequence, acknowledged) = parse::tcp_numbers(packet, segment.transport).ok_or(DropReason::AnswerFailed)?;
    let length = (segment.network + usize::from(segment.ip_length)).wrapping_sub(segment.transport) as u32;
    let flags = segment.flags.0;
    let (sequence, acknowledged, reply_flags) = if flags & TcpFlags::ACK != 0 {
        (acknowledged, 0, TcpFlags::RST)
    } else {
        let payload = length.wrapping_sub(u32::from(offset >> 4) * 4);
        let marks = u32::from(flags & TcpFlags::SYN != 0) + u32::from(flags & TcpFlags::FIN != 0);
        (0, sequence.wrapping_add(payload).wrapping_add(marks), TcpFlags::RST | TcpFlags::ACK)
    };
    F::write(to, key.destination, key.source, IpProto::TCP, TCP as u16);
    let reply = TcpHdr {
        source: key.destination_port.to_bytes(),
        dest: key.source_port.to_bytes(),
        seq: sequence.to_be_bytes(),
        ack_seq: acknowledged.to_be_bytes(),
        ..header
    };
    let pseudo_header = pseudo_header(key.source, key.destination, IpProto::TCP, TCP as u32);
    // SAFETY: There is room for both headers, as `ANSWER_MAX` says.
    unsafe {
        let tcp = to.add(F::HEADER);
        tcp.cast::<TcpHdr>().write_unaligned(reply);
        // Data offset and flags, then window, checksum and urgent pointer.
        tcp.add(12).cast::<[u8; 2]>().write_unaligned([(TCP as u8 / 4) << 4, reply_flags]);
        tcp.add(14).cast::<[u8; 6]>().write_unaligned([0; 6]);
        let check = checksum(tcp, TCP as u32, pseudo_header).to_bytes();
        tcp.add(16).cast::<[u8; 2]>().write_unaligned(check);
    }
    Ok(())
}

/// An ICMP error that quotes the packet; how long it is, in bytes, from its IP header on.
#[inline(always)]
fn error<P: Packet, F: Compose>(
    packet: &P,
    segment: &Segment<F::Address>,
    to: *mut u8,
    [kind, code]: [u8; 2],
    mtu: u16,
) -> Result<u32, DropReason> {
    let key = &segment.key;
    // The kernel sums up words of four bytes. Hidden, so that the very number that is checked is used.
    let quoted = asm::opaque(usize::from(segment.ip_length.min(QUOTE_MAX)) & 0xFC) as u32;
    if quoted < F::HEADER as u32 || quoted > u32::from(QUOTE_MAX) {
        return Err(DropReason::AnswerFailed);
    }
    let [a, b] = mtu.to_be_bytes();
    // SAFETY: There is room for two headers and the longest quotation, as is asserted below.
    unsafe {
        let icmp = to.add(F::HEADER);
        icmp.cast::<[u8; ICMP]>().write_unaligned([kind, code, 0, 0, 0, 0, a, b]);
        if !packet.copy_out(segment.network, icmp.add(ICMP), quoted) {
            return Err(DropReason::AnswerFailed);
        }
        let length = ICMP as u32 + quoted;
        let pseudo_header =
            if F::HAS_PSEUDO_HEADER { pseudo_header(key.source, key.destination, F::ICMP, length) } else { 0 };
        let check = checksum(icmp, length, pseudo_header).to_bytes();
        icmp.add(2).cast::<[u8; 2]>().write_unaligned(check);
        F::write(to, key.destination, key.source, F::ICMP, length as u16);
        Ok(F::HEADER as u32 + length)
    }
}

const _: () = assert!(V6::HEADER + ICMP + 0xFC <= ANSWER_MAX);

/// The sum of a pseudo-header (RFC 9293, section 3.1; RFC 8200, section 8.1), not folded.
#[inline(always)]
fn pseudo_header<A: Address>(source: A, destination: A, proto: IpProto, length: u32) -> u32 {
    source.sum16() + destination.sum16() + u32::from(proto.0.to_be()) + u32::from((length as u16).to_be())
}

/// The checksum of `length` bytes, a multiple of four, and of what `sum` stands for.
///
/// # Safety
///
/// There are so many bytes.
#[inline(always)]
unsafe fn checksum(bytes: *mut u8, length: u32, sum: u32) -> Csum {
    // SAFETY: As the caller promises.
    let sum = unsafe { bpf_csum_diff(ptr::null_mut(), 0, bytes.cast(), length, sum) };
    Csum::of_sum(sum as u32)
}
