//! The only place that writes packet bytes. Addresses, ports and their checksums change together, or not at all.

use lb_common::{
    abi::{Flow, Hop},
    checksum::{Csum, Delta},
    net::{Family, IpProto, Ipv4Be, Ipv6Be, V4, V6},
    parse::{Embedded, Part, Segment},
    verdict::{DropReason, PassReason, Verdict},
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    emit::Way,
    packet::{ChecksumChange, Packet, checksum_offset},
};

/// The network header of a family, as far as it is written.
pub(crate) trait NetworkHeader: Family {
    /// The header's wire format.
    type Header: lb_common::parse::Header;

    /// Writes addresses, and the header's own checksum where it has one: `delta` is what they add to it.
    fn set_addresses(header: &mut Self::Header, source: Self::Address, destination: Self::Address, delta: Delta);

    /// The header's own checksum, in network order; zero where it has none.
    fn checksum(header: &Self::Header) -> u16;

    /// Takes one off the TTL or hop limit, which is above one.
    fn decrement_ttl(header: &mut Self::Header);

    /// Writes a TTL or hop limit as we send it, instead of the present one.
    fn renew_ttl(header: &mut Self::Header);
}

/// The TTL and hop limit of what we send ourselves: Linux's default (RFC 1700).
pub(crate) const TTL: u8 = 64;

impl NetworkHeader for V4 {
    type Header = Ipv4Hdr;

    #[inline(always)]
    fn set_addresses(header: &mut Ipv4Hdr, source: Ipv4Be, destination: Ipv4Be, delta: Delta) {
        header.src_addr = source.to_bytes();
        header.dst_addr = destination.to_bytes();
        header.check = Csum::from_bytes(header.check).update(delta).to_bytes();
    }

    #[inline(always)]
    fn checksum(header: &Ipv4Hdr) -> u16 {
        u16::from_ne_bytes(header.check)
    }

    #[inline(always)]
    fn decrement_ttl(header: &mut Ipv4Hdr) {
        set_ttl(header, header.ttl.wrapping_sub(1));
    }

    #[inline(always)]
    fn renew_ttl(header: &mut Ipv4Hdr) {
        set_ttl(header, TTL);
    }
}

#[inline(always)]
fn set_ttl(header: &mut Ipv4Hdr, ttl: u8) {
    let before = u16::from_ne_bytes([header.ttl, header.proto]);
    header.ttl = ttl;
    let after = u16::from_ne_bytes([header.ttl, header.proto]);
    header.check = Csum::from_bytes(header.check).update(Delta::NONE.replace16(before, after)).to_bytes();
}

impl NetworkHeader for V6 {
    type Header = Ipv6Hdr;

    #[inline(always)]
    fn set_addresses(header: &mut Ipv6Hdr, source: Ipv6Be, destination: Ipv6Be, _delta: Delta) {
        header.src_addr = source.to_bytes();
        header.dst_addr = destination.to_bytes();
    }

    #[inline(always)]
    fn checksum(_header: &Ipv6Hdr) -> u16 {
        0
    }

    #[inline(always)]
    fn decrement_ttl(header: &mut Ipv6Hdr) {
        header.hop_limit = header.hop_limit.wrapping_sub(1);
    }

    #[inline(always)]
    fn renew_ttl(header: &mut Ipv6Hdr) {
        header.hop_limit = TTL;
    }
}

/// Translates a packet of a flow. A later fragment has no ports, and what its addresses add to the checksum is in the first.
#[inline(always)]
pub(crate) fn translate<P: Packet, F: NetworkHeader>(
    packet: &P,
    segment: &Segment<F::Address>,
    flow: &Flow<F::Address>,
    way: Way,
) -> Result<(), Verdict> {
    // The bounds were checked when the packet was parsed, so none can fail; the verifier wants to see it again.
    // Nothing is written before all are there.
    let missing = PassReason::MalformedEthernet;
    let is_first = segment.part != Part::Later;
    // SCTP's ports stay as they are.
    let has_ports = is_first && segment.key.proto != IpProto::SCTP;
    let network = packet.header::<F::Header>(segment.network).ok_or(missing)?;
    let ethernet = packet.header::<EthHdr>(0).ok_or(missing)?;
    if has_ports {
        let ports = packet.header::<[u8; 4]>(segment.transport).ok_or(missing)?;
        let ([a, b], [c, d]) = (flow.source_port.to_bytes(), flow.destination_port.to_bytes());
        // SAFETY: Inside the packet; nothing else points there.
        unsafe { *ports = [a, b, c, d] };
    }
    // SAFETY: As above; the transport header begins behind it.
    let network = unsafe { &mut *network };
    F::set_addresses(network, flow.source, flow.destination, Delta::from_folded(flow.ip_delta));
    // SAFETY: As above; the network header begins behind it.
    send::<P, F>(packet, network, unsafe { &mut *ethernet }, &flow.hop, way);
    if let Some(offset) = checksum_offset(segment.key.proto)
        && is_first
    {
        let change = ChecksumChange {
            all: Delta::from_folded(flow.l4_delta),
            addresses: Delta::from_folded(flow.ip_delta),
            may_be_absent: segment.key.proto == IpProto::UDP,
            is_v6: F::AF == V6::AF,
        };
        packet.change_checksum(segment.transport + offset, change);
    }
    Ok(())
}

/// Translates an ICMP error about a packet of a flow, and in it the beginning of that packet, to what its sender sent.
/// `flow` is the one whose packets go the way of the error.
#[inline(always)]
pub(crate) fn translate_error<P: Packet, F: NetworkHeader>(
    packet: &P,
    segment: &Segment<F::Address>,
    embedded: &Embedded<F::Address>,
    flow: &Flow<F::Address>,
    way: Way,
) -> Result<(), Verdict> {
    let missing = PassReason::MalformedIcmp;
    let was = &embedded.key;
    let sent = flow.answer(was.proto);
    // Whoever reports is left as it is, unless the flow hides the addresses there.
    let source = if flow.source == was.destination { segment.key.source } else { flow.source };

    let ethernet = packet.header::<EthHdr>(0).ok_or(missing)?;
    let outer = packet.header::<F::Header>(segment.network).ok_or(missing)?;
    let checksum = packet.header::<[u8; 2]>(segment.transport + 2).ok_or(missing)?;
    let inner = packet.header::<F::Header>(embedded.network).ok_or(missing)?;
    let ports = packet.header::<[u8; 4]>(embedded.transport).ok_or(missing)?;
    let inner_checksum = match checksum_offset(was.proto) {
        // Of TCP often only the first eight bytes are there, and what is behind the packet is none of it.
        Some(offset) if embedded.transport + offset + 2 <= segment.network + usize::from(segment.ip_length) => {
            packet.header::<[u8; 2]>(embedded.transport + offset)
        }
        _ => None,
    };
    let outer_delta = Delta::NONE
        .replace_address(segment.key.source, source)
        .replace_address(segment.key.destination, flow.destination);
    let addresses =
        Delta::NONE.replace_address(was.source, sent.source).replace_address(was.destination, sent.destination);
    let ports_delta = Delta::NONE
        .replace_port(was.source_port, sent.source_port)
        .replace_port(was.destination_port, sent.destination_port);
    // All that ICMP's own checksum covers; for IPv6 the outer addresses, too (RFC 4443, section 2.3).
    let mut covered = addresses.and(ports_delta);
    if F::AF == V6::AF {
        covered = covered.and(outer_delta);
    }
    // SAFETY: All are inside the packet, one behind the other; nothing else points there.
    let (ethernet, outer, checksum, inner) = unsafe { (&mut *ethernet, &mut *outer, &mut *checksum, &mut *inner) };
    F::set_addresses(outer, source, flow.destination, outer_delta);
    let before = F::checksum(inner);
    F::set_addresses(inner, sent.source, sent.destination, addresses);
    covered = covered.and(Delta::NONE.replace16(before, F::checksum(inner)));
    if was.proto != IpProto::SCTP {
        let ([a, b], [c, d]) = (sent.source_port.to_bytes(), sent.destination_port.to_bytes());
        // SAFETY: As above.
        unsafe { *ports = [a, b, c, d] };
    }
    if let Some(field) = inner_checksum {
        // SAFETY: As above.
        let field = unsafe { &mut *field };
        let before = Csum::from_bytes(*field);
        let delta = addresses.and(ports_delta);
        let after = if was.proto == IpProto::UDP { before.update_udp(delta) } else { before.update(delta) };
        covered = covered
            .and(Delta::NONE.replace16(u16::from_ne_bytes(before.to_bytes()), u16::from_ne_bytes(after.to_bytes())));
        *field = after.to_bytes();
    }
    *checksum = Csum::from_bytes(*checksum).update(covered).to_bytes();
    send::<P, F>(packet, outer, ethernet, &flow.hop, way);
    Ok(())
}

/// Makes of an echo request the reply to it.
#[inline(always)]
pub(crate) fn answer_echo<P: Packet, F: NetworkHeader>(
    packet: &P,
    segment: &Segment<F::Address>,
    reply: u8,
) -> Result<(), Verdict> {
    let missing = PassReason::MalformedIcmp;
    let ethernet = packet.header::<EthHdr>(0).ok_or(missing)?;
    let network = packet.header::<F::Header>(segment.network).ok_or(missing)?;
    let icmp = packet.header::<[u8; 4]>(segment.transport).ok_or(missing)?;
    // SAFETY: All are inside the packet, one behind the other; nothing else points there.
    let (ethernet, network, icmp) = unsafe { (&mut *ethernet, &mut *network, &mut *icmp) };
    let [kind, code, high, low] = *icmp;
    let (before, after) = (u16::from_ne_bytes([kind, code]), u16::from_ne_bytes([reply, code]));
    let [high, low] = Csum::from_bytes([high, low]).update(Delta::NONE.replace16(before, after)).to_bytes();
    *icmp = [reply, code, high, low];
    // Two addresses that change places add nothing to any sum.
    F::set_addresses(network, segment.key.destination, segment.key.source, Delta::NONE);
    F::renew_ttl(network);
    swap(ethernet);
    Ok(())
}

/// Puts another IP packet in place of this one, and sends it back by the way that this one came; VLAN tags stay.
/// `length` is above zero, and no more than the verifier knows `bytes` to hold.
#[inline(always)]
pub(crate) fn replace<P: Packet>(packet: &P, network: usize, bytes: *const u8, length: u32) -> Result<(), Verdict> {
    if !packet.resize(network + length as usize) || !packet.copy_in(network, bytes, length) {
        return Err(DropReason::AnswerFailed.into());
    }
    let ethernet = packet.header::<EthHdr>(0).ok_or(PassReason::MalformedEthernet)?;
    // SAFETY: Inside the packet; nothing else points there.
    swap(unsafe { &mut *ethernet });
    Ok(())
}

/// What the way of a packet demands of its frame and TTL; VLAN tags stay. The node itself is no hop for what it sends.
#[inline(always)]
fn send<P: Packet, F: NetworkHeader>(packet: &P, network: &mut F::Header, ethernet: &mut EthHdr, hop: &Hop, way: Way) {
    match way {
        Way::Stack | Way::Neighbour => return,
        // An interface takes what is addressed to itself.
        Way::Inward => return set_mac(&mut ethernet.dst_addr, ethernet.src_addr),
        Way::Loopback => return set_mac(&mut ethernet.dst_addr, [0; 6]),
        Way::Wire => {
            set_mac(&mut ethernet.dst_addr, hop.destination.0);
            set_mac(&mut ethernet.src_addr, hop.source.0);
        }
        Way::Back => swap(ethernet),
    }
    if !packet.is_own() {
        F::decrement_ttl(network);
    }
}

/// Addresses a frame to where it came from.
#[inline(always)]
fn swap(ethernet: &mut EthHdr) {
    let (to, from) = (ethernet.dst_addr, ethernet.src_addr);
    set_mac(&mut ethernet.dst_addr, from);
    set_mac(&mut ethernet.src_addr, to);
}

/// Writes an Ethernet address. By words: an assignment would be a call of `memmove`, which copies byte by byte.
#[inline(always)]
fn set_mac(field: &mut [u8; 6], address: [u8; 6]) {
    let start = field.as_mut_ptr();
    let [low @ .., fifth, sixth] = address;
    // SAFETY: Four bytes and two, of six.
    unsafe {
        start.cast::<u32>().write_unaligned(u32::from_ne_bytes(low));
        start.add(4).cast::<u16>().write_unaligned(u16::from_ne_bytes([fifth, sixth]));
    }
}
