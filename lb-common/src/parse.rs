//! From bytes to the fields that balancing needs: Ethernet, VLAN tags, IPv4 with options,
//! IPv6 with extension headers, TCP and UDP. The same code reads packets in the kernel and slices on the host.

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
    vlan::VlanHdr,
};

use crate::{
    abi::FlowKey,
    flow::TcpFlags,
    net::{Address, EtherType, IpProto, Ipv4Be, Ipv6Be, Port},
    verdict::PassReason,
};

/// How many VLAN tags are followed: a service tag and a customer tag.
pub const VLAN_MAX_DEPTH: usize = 2;

/// How many IPv6 extension headers are followed.
pub const IPV6_EXT_MAX: usize = 4;

/// The largest offset, in bytes, at which any header may start:
/// Ethernet, two tags, IPv6 and its extension headers of at most 2,048 bytes each.
pub const MAX_OFFSET: usize = 14 + 4 * VLAN_MAX_DEPTH + 40 + 2048 * IPV6_EXT_MAX;

/// A header that may be read from any bytes.
///
/// # Safety
///
/// Every bit pattern is a value of the type, and it has no padding.
#[expect(unsafe_code, reason = "a promise about bytes that no safe trait can state")]
pub unsafe trait Header: Copy {}

macro_rules! headers {
    ($($header:ty),*) => {
        $(
            #[expect(unsafe_code, reason = "see the trait")]
            // SAFETY: Integers and byte arrays alone, packed as on the wire.
            unsafe impl Header for $header {}
        )*
    };
}
headers!(EthHdr, VlanHdr, Ipv4Hdr, Ipv6Hdr, TcpHdr, UdpHdr, [u8; 1], [u8; 2], [u8; 4], [u8; 6], [u8; 16]);

/// The bytes of one packet, read with bounds checks: of a packet in the kernel, or of a slice.
pub trait Bytes {
    /// The bytes at `offset` as a header; `None` if the packet ends before the header does.
    fn read<T: Header>(&self, offset: usize) -> Option<T>;
    /// The packet's length in bytes, from the Ethernet header on.
    fn length(&self) -> usize;
    /// Called with each offset that leaves the parser; what comes back is used instead, and is the same.
    ///
    /// The verifier walks a program once for each value that an offset may have, so for each number of VLAN tags and
    /// extension headers; here the kernel's packet makes it forget them, and it walks on once.
    fn settle(&self, offset: usize) -> usize {
        offset
    }
}

impl Bytes for [u8] {
    #[expect(unsafe_code, reason = "reads a header from bytes whose number was checked")]
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        let bytes = self.get(offset..offset.checked_add(size_of::<T>())?)?;
        // SAFETY: The slice is as long as T, and T takes any bytes.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn length(&self) -> usize {
        self.len()
    }
}

/// What the link layer says: where the network header starts and what it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    /// The protocol behind the tags.
    pub ether_type: EtherType,
    /// The offset of the network header.
    pub network: usize,
}

impl Frame {
    /// Whether the frame carries VLAN tags.
    #[inline(always)]
    pub const fn is_tagged(self) -> bool {
        self.network > size_of::<EthHdr>()
    }
}

/// A TCP or UDP packet: all that the pipeline needs of its headers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment<A: Address> {
    /// The packet's tuple.
    pub key: FlowKey<A>,
    /// The TCP flags; none for UDP.
    pub flags: TcpFlags,
    /// The offset of the network header.
    pub network: usize,
    /// The offset of the TCP or UDP header.
    pub transport: usize,
    /// The length of the IP packet in bytes, as its header says.
    pub ip_length: u16,
    /// The type of service or traffic class byte.
    pub traffic_class: u8,
    /// The TTL or hop limit.
    pub ttl: u8,
    /// Whether the frame carries VLAN tags.
    pub is_tagged: bool,
}

/// Reads the Ethernet header and up to two VLAN tags.
#[inline(always)]
pub fn frame<B: Bytes + ?Sized>(bytes: &B) -> Result<Frame, PassReason> {
    let ethernet: EthHdr = bytes.read(0).ok_or(PassReason::MalformedEthernet)?;
    let mut ether_type = EtherType::from_bytes(ethernet.ether_type.to_ne_bytes());
    let mut network = size_of::<EthHdr>();
    for _ in 0..VLAN_MAX_DEPTH {
        if !ether_type.is_vlan() {
            break;
        }
        let tag: VlanHdr = bytes.read(network).ok_or(PassReason::MalformedEthernet)?;
        ether_type = EtherType::from_bytes(tag.ether_type.to_ne_bytes());
        network += size_of::<VlanHdr>();
    }
    if ether_type.is_vlan() {
        return Err(PassReason::VlanTooDeep);
    }
    Ok(Frame { ether_type, network })
}

/// Reads an IPv4 header (RFC 791), with options, and the TCP or UDP header behind it.
#[inline(always)]
pub fn ipv4<B: Bytes + ?Sized>(bytes: &B, frame: Frame) -> Result<Segment<Ipv4Be>, PassReason> {
    let header: Ipv4Hdr = bytes.read(frame.network).ok_or(PassReason::MalformedIpv4)?;
    let header_length = usize::from(header.vihl & 0x0F) * 4;
    let ip_length = usize::from(u16::from_be_bytes(header.tot_len));
    if header.vihl >> 4 != 4
        || header_length < size_of::<Ipv4Hdr>()
        || ip_length < header_length
        || frame.network + ip_length > bytes.length()
    {
        return Err(PassReason::MalformedIpv4);
    }
    // The offset field, and "more fragments" of the flags above it.
    if u16::from_be_bytes(header.frags) & 0x3FFF != 0 {
        return Err(PassReason::Fragment);
    }
    let source = Ipv4Be::from_bytes(header.src_addr);
    let destination = Ipv4Be::from_bytes(header.dst_addr);
    let transport = frame.network + header_length;
    let payload = ip_length - header_length;
    let (ports, flags) = ports(bytes, IpProto(u16::from(header.proto)), transport, payload)?;
    Ok(Segment {
        key: FlowKey::new(source, destination, ports, IpProto(u16::from(header.proto))),
        flags,
        network: bytes.settle(frame.network),
        transport: bytes.settle(transport),
        ip_length: ip_length as u16,
        traffic_class: header.tos,
        ttl: header.ttl,
        is_tagged: frame.is_tagged(),
    })
}

/// Reads an IPv6 header (RFC 8200), its extension headers, and the TCP or UDP header behind them.
#[inline(always)]
pub fn ipv6<B: Bytes + ?Sized>(bytes: &B, frame: Frame) -> Result<Segment<Ipv6Be>, PassReason> {
    let header: Ipv6Hdr = bytes.read(frame.network).ok_or(PassReason::MalformedIpv6)?;
    let ip_length = size_of::<Ipv6Hdr>() + usize::from(u16::from_be_bytes(header.payload_len));
    let [version_and_class, class_and_label, ..] = header.vcf;
    if version_and_class >> 4 != 6 || frame.network + ip_length > bytes.length() {
        return Err(PassReason::MalformedIpv6);
    }
    let source = Ipv6Be::from_bytes(header.src_addr);
    let destination = Ipv6Be::from_bytes(header.dst_addr);
    let (proto, skipped) =
        skip_extensions(bytes, IpProto(u16::from(header.next_hdr)), frame.network + size_of::<Ipv6Hdr>())?;
    let headers_length = size_of::<Ipv6Hdr>() + skipped;
    if headers_length > ip_length {
        return Err(PassReason::MalformedIpv6);
    }
    let transport = frame.network + headers_length;
    let (ports, flags) = ports(bytes, proto, transport, ip_length - headers_length)?;
    Ok(Segment {
        key: FlowKey::new(source, destination, ports, proto),
        flags,
        network: bytes.settle(frame.network),
        transport: bytes.settle(transport),
        ip_length: u16::try_from(ip_length).map_err(|_too_long| PassReason::MalformedIpv6)?,
        traffic_class: version_and_class << 4 | class_and_label >> 4,
        ttl: header.hop_limit,
        is_tagged: frame.is_tagged(),
    })
}

/// Extension headers that carry their length, in units of 8 bytes after the first 8 (RFC 8200, section 4; RFC 6275; RFC 7401; RFC 5533).
const HOP_BY_HOP: u16 = 0;
const ROUTING: u16 = 43;
const FRAGMENT: u16 = 44;
const DESTINATION_OPTIONS: u16 = 60;
const MOBILITY: u16 = 135;
const HOST_IDENTITY: u16 = 139;
const SHIM6: u16 = 140;

/// Walks over extension headers that start at `start`: the protocol behind them and their length in bytes.
#[inline(always)]
fn skip_extensions<B: Bytes + ?Sized>(
    bytes: &B,
    mut proto: IpProto,
    start: usize,
) -> Result<(IpProto, usize), PassReason> {
    let mut skipped = 0;
    for _ in 0..IPV6_EXT_MAX {
        match proto.0 {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | MOBILITY | HOST_IDENTITY | SHIM6 => {}
            FRAGMENT => return Err(PassReason::Fragment),
            _ => return Ok((proto, skipped)),
        }
        let [next, length] = bytes.read(start + skipped).ok_or(PassReason::MalformedIpv6)?;
        proto = IpProto(u16::from(next));
        skipped += (usize::from(length) + 1) * 8;
    }
    match proto.0 {
        HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | MOBILITY | HOST_IDENTITY | SHIM6 => {
            Err(PassReason::ExtensionsTooDeep)
        }
        FRAGMENT => Err(PassReason::Fragment),
        _ => Ok((proto, skipped)),
    }
}

/// Reads the ports, and for TCP the flags, of a transport header with `payload` bytes of the IP packet left for it.
#[inline(always)]
fn ports<B: Bytes + ?Sized>(
    bytes: &B,
    proto: IpProto,
    transport: usize,
    payload: usize,
) -> Result<((Port, Port), TcpFlags), PassReason> {
    match proto {
        IpProto::TCP => {
            let header: TcpHdr = bytes.read(transport).ok_or(PassReason::MalformedTcp)?;
            let [offset, flags] = bytes.read(transport + 12).ok_or(PassReason::MalformedTcp)?;
            let header_length = usize::from(offset >> 4) * 4;
            if header_length < size_of::<TcpHdr>() || header_length > payload {
                return Err(PassReason::MalformedTcp);
            }
            Ok(((Port::from_bytes(header.source), Port::from_bytes(header.dest)), TcpFlags(flags)))
        }
        IpProto::UDP => {
            let header: UdpHdr = bytes.read(transport).ok_or(PassReason::MalformedUdp)?;
            let length = usize::from(u16::from_be_bytes(header.len));
            if length < size_of::<UdpHdr>() || length > payload {
                return Err(PassReason::MalformedUdp);
            }
            Ok(((Port::from_bytes(header.src), Port::from_bytes(header.dst)), TcpFlags::default()))
        }
        _ => Err(PassReason::NotTcpUdp),
    }
}

/// A segment of either family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AnySegment {
    /// Over IPv4.
    V4(Segment<Ipv4Be>),
    /// Over IPv6.
    V6(Segment<Ipv6Be>),
}

/// Reads a whole packet, of either family, as the pipeline does.
pub fn packet<B: Bytes + ?Sized>(bytes: &B) -> Result<AnySegment, PassReason> {
    let frame = frame(bytes)?;
    match frame.ether_type {
        EtherType::IPV4 => ipv4(bytes, frame).map(AnySegment::V4),
        EtherType::IPV6 => ipv6(bytes, frame).map(AnySegment::V6),
        _ => Err(PassReason::NotIp),
    }
}

impl<A: Address> Segment<A> {
    /// Whether this packet may begin a flow: a SYN, or any UDP packet.
    #[inline(always)]
    pub fn opens_flow(&self) -> bool {
        self.key.proto == IpProto::UDP || self.flags.opens()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An IPv4 SYN from 192.0.2.1:4242 to 192.0.2.2:80.
    fn tcp4() -> Vec<u8> {
        let mut packet = vec![2; 12];
        packet.extend([0x08, 0x00]);
        packet.extend([0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
        packet.extend([0x10, 0x92, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xFF, 0xFF, 0, 0, 0, 0]);
        packet
    }

    /// An IPv6 UDP packet of no payload, 4242 to 53, behind the given extension headers.
    fn udp6(first: u8, extensions: &[u8]) -> Vec<u8> {
        let mut packet = vec![2; 12];
        packet.extend([0x86, 0xDD, 0x6B, 0x80, 0, 0]);
        packet.extend(((extensions.len() + 8) as u16).to_be_bytes());
        packet.extend([first, 64]);
        packet.extend([0x20; 16]);
        packet.extend([0x30; 16]);
        packet.extend(extensions);
        packet.extend([0x10, 0x92, 0, 53, 0, 8, 0xAB, 0xCD]);
        packet
    }

    fn v4(bytes: &[u8]) -> Segment<Ipv4Be> {
        match packet(bytes) {
            Ok(AnySegment::V4(segment)) => segment,
            other => panic!("{other:?}"),
        }
    }

    fn v6(bytes: &[u8]) -> Segment<Ipv6Be> {
        match packet(bytes) {
            Ok(AnySegment::V6(segment)) => segment,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn reads_a_plain_segment() {
        let segment = v4(&tcp4());
        assert_eq!(segment.key.source_port.to_host(), 4242);
        assert_eq!(segment.key.destination, Ipv4Be::from_bytes([192, 0, 2, 2]));
        assert!(segment.opens_flow() && !segment.is_tagged);
        assert_eq!((segment.network, segment.transport, segment.ip_length), (14, 34, 40));
    }

    #[test]
    fn follows_options_tags_and_extensions() {
        let mut options = tcp4();
        options[14] = 0x47;
        options[17] = 48;
        options.splice(34..34, [1; 8]);
        assert_eq!(v4(&options).transport, 42);

        let mut tagged = tcp4();
        tagged.splice(12..12, [0x88, 0xA8, 0, 7, 0x81, 0x00, 0, 8]);
        assert_eq!((v4(&tagged).network, v4(&tagged).is_tagged), (22, true));

        let extended = v6(&udp6(0, &[[60, 0, 0, 0, 0, 0, 0, 0], [17, 0, 0, 0, 0, 0, 0, 0]].concat()));
        assert_eq!((extended.transport, extended.key.proto), (14 + 40 + 16, IpProto::UDP));
        assert_eq!(extended.traffic_class, 0xB8);
    }

    #[test]
    fn each_defect_has_its_reason() {
        type Change = fn(&mut Vec<u8>);
        let cases: [(&str, Change, PassReason); 12] = [
            ("runt", |p| p.truncate(13), PassReason::MalformedEthernet),
            ("ARP", |p| p[13] = 6, PassReason::NotIp),
            ("three tags", |p| drop(p.splice(12..12, [0x81, 0, 0, 1].repeat(3))), PassReason::VlanTooDeep),
            ("tag cut short", |p| p.splice(12.., [0x81, 0, 0]).for_each(drop), PassReason::MalformedEthernet),
            ("version 5", |p| p[14] = 0x55, PassReason::MalformedIpv4),
            ("header of 16", |p| p[14] = 0x44, PassReason::MalformedIpv4),
            ("length below header", |p| p[17] = 19, PassReason::MalformedIpv4),
            ("longer than the frame", |p| p[17] = 41, PassReason::MalformedIpv4),
            ("later fragment", |p| p[21] = 1, PassReason::Fragment),
            ("first fragment", |p| p[20] = 0x20, PassReason::Fragment),
            ("ICMP", |p| p[23] = 1, PassReason::NotTcpUdp),
            ("data offset 4", |p| p[46] = 0x40, PassReason::MalformedTcp),
        ];
        for (name, change, reason) in cases {
            let mut bytes = tcp4();
            change(&mut bytes);
            assert_eq!(packet(&bytes[..]), Err(reason), "{name}");
        }
    }

    #[test]
    fn padding_of_the_frame_is_not_part_of_the_packet() {
        let mut bytes = tcp4();
        bytes[17] = 30;
        assert_eq!(packet(&bytes[..]), Err(PassReason::MalformedTcp));
    }

    #[test]
    fn extension_chains_end() {
        let chain = |n: usize| {
            let mut extensions: Vec<u8> = [60, 0, 0, 0, 0, 0, 0, 0].repeat(n - 1);
            extensions.extend([17, 0, 0, 0, 0, 0, 0, 0]);
            udp6(60, &extensions)
        };
        assert_eq!(v6(&chain(IPV6_EXT_MAX)).key.proto, IpProto::UDP);
        assert_eq!(packet(&chain(IPV6_EXT_MAX + 1)[..]), Err(PassReason::ExtensionsTooDeep));
        assert_eq!(packet(&udp6(44, &[17, 0, 0, 1, 0, 0, 0, 0])[..]), Err(PassReason::Fragment));
        assert_eq!(packet(&udp6(0, &[17, 200, 0, 0, 0, 0, 0, 0])[..]), Err(PassReason::MalformedIpv6));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_segment_inside_them_or_a_reason(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            check_bounds(&bytes)?;
        }

        #[test]
        fn damaged_packets_give_a_segment_inside_them_or_a_reason(
            v6 in any::<bool>(), cut in any::<prop::sample::Index>(),
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut bytes = if v6 { udp6(0, &[17, 0, 0, 0, 0, 0, 0, 0]) } else { tcp4() };
            for (index, byte) in damage {
                let index = index.index(bytes.len());
                bytes[index] = byte;
            }
            bytes.truncate(cut.index(bytes.len() * 4));
            check_bounds(&bytes)?;
        }
    }

    fn check_bounds(bytes: &[u8]) -> Result<(), TestCaseError> {
        let (transport, network, ip_length, proto) = match packet(bytes) {
            Ok(AnySegment::V4(s)) => (s.transport, s.network, s.ip_length, s.key.proto),
            Ok(AnySegment::V6(s)) => (s.transport, s.network, s.ip_length, s.key.proto),
            Err(_reason) => return Ok(()),
        };
        let header = if proto == IpProto::TCP { 20 } else { 8 };
        prop_assert!(transport + header <= network + usize::from(ip_length));
        prop_assert!(network + usize::from(ip_length) <= bytes.len());
        prop_assert!(transport <= MAX_OFFSET);
        Ok(())
    }
}
