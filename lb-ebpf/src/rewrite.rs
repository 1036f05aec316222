//! The only place that writes packet bytes. Addresses, ports and their checksums change together, or not at all.

use lb_common::{
    abi::{Flow, Hop},
    checksum::{Csum, Delta},
    net::{Family, IpProto, Ipv4Be, Ipv6Be, V4, V6},
    parse::Segment,
    verdict::{PassReason, Verdict},
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::packet::Packet;

/// The network header of a family, as far as it is written.
pub(crate) trait NetworkHeader: Family {
    /// The header's wire format.
    type Header: lb_common::parse::Header;

    /// Writes addresses, and the header's own checksum where it has one.
    fn translate(header: &mut Self::Header, flow: &Flow<Self::Address>);

    /// Takes one off the TTL or hop limit, which is above one.
    fn decrement_ttl(header: &mut Self::Header);
}

impl NetworkHeader for V4 {
    type Header = Ipv4Hdr;

    #[inline(always)]
    fn translate(header: &mut Ipv4Hdr, flow: &Flow<Ipv4Be>) {
        header.src_addr = flow.source.to_bytes();
        header.dst_addr = flow.destination.to_bytes();
        header.check = Csum::from_bytes(header.check).update(Delta::from_folded(flow.ip_delta)).to_bytes();
    }

    #[inline(always)]
    fn decrement_ttl(header: &mut Ipv4Hdr) {
        let before = u16::from_ne_bytes([header.ttl, header.proto]);
        header.ttl = header.ttl.wrapping_sub(1);
        let after = u16::from_ne_bytes([header.ttl, header.proto]);
        header.check = Csum::from_bytes(header.check).update(Delta::NONE.replace16(before, after)).to_bytes();
    }
}

impl NetworkHeader for V6 {
    type Header = Ipv6Hdr;

    #[inline(always)]
    fn translate(header: &mut Ipv6Hdr, flow: &Flow<Ipv6Be>) {
        header.src_addr = flow.source.to_bytes();
        header.dst_addr = flow.destination.to_bytes();
    }

    #[inline(always)]
    fn decrement_ttl(header: &mut Ipv6Hdr) {
        header.hop_limit = header.hop_limit.wrapping_sub(1);
    }
}

/// Translates a packet that leaves by the flow's next hop.
#[inline(always)]
pub(crate) fn to_wire<F: NetworkHeader>(
    packet: &Packet,
    segment: &Segment<F::Address>,
    flow: &Flow<F::Address>,
) -> Result<(), Verdict> {
    let network = translate::<F>(packet, segment, flow)?;
    // SAFETY: Checked by `translate`; nothing else points there.
    F::decrement_ttl(unsafe { &mut *network });
    ethernet(packet, &flow.hop)
}

/// Translates a packet that the stack forwards: it counts the TTL and addresses the frame itself.
#[inline(always)]
pub(crate) fn to_stack<F: NetworkHeader>(
    packet: &Packet,
    segment: &Segment<F::Address>,
    flow: &Flow<F::Address>,
) -> Result<(), Verdict> {
    translate::<F>(packet, segment, flow).map(drop)
}

/// Writes addresses, ports and checksums, and gives the network header.
#[inline(always)]
fn translate<F: NetworkHeader>(
    packet: &Packet,
    segment: &Segment<F::Address>,
    flow: &Flow<F::Address>,
) -> Result<*mut F::Header, Verdict> {
    // The bounds were checked when the packet was parsed, so neither can fail; the verifier wants to see it again.
    // Nothing is written before both are there.
    let network = packet.header::<F::Header>(segment.network).ok_or(PassReason::MalformedEthernet)?;
    if segment.key.proto == IpProto::TCP {
        let tcp = packet.header::<TcpHdr>(segment.transport).ok_or(PassReason::MalformedTcp)?;
        // SAFETY: Inside the packet; nothing else points there.
        let tcp = unsafe { &mut *tcp };
        tcp.source = flow.source_port.to_bytes();
        tcp.dest = flow.destination_port.to_bytes();
        tcp.check = Csum::from_bytes(tcp.check).update(Delta::from_folded(flow.l4_delta)).to_bytes();
    } else {
        let udp = packet.header::<UdpHdr>(segment.transport).ok_or(PassReason::MalformedUdp)?;
        // SAFETY: As above.
        let udp = unsafe { &mut *udp };
        udp.src = flow.source_port.to_bytes();
        udp.dst = flow.destination_port.to_bytes();
        udp.check = Csum::from_bytes(udp.check).update_udp(Delta::from_folded(flow.l4_delta)).to_bytes();
    }
    // SAFETY: Inside the packet; the transport header begins behind it.
    F::translate(unsafe { &mut *network }, flow);
    Ok(network)
}

/// Addresses the frame to the next hop; VLAN tags stay.
#[inline(always)]
fn ethernet(packet: &Packet, hop: &Hop) -> Result<(), Verdict> {
    let header = packet.header::<EthHdr>(0).ok_or(PassReason::MalformedEthernet)?;
    // SAFETY: Inside the packet; nothing else points there.
    let header = unsafe { &mut *header };
    header.dst_addr = hop.destination.0;
    header.src_addr = hop.source.0;
    Ok(())
}
