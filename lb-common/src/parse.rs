//! From bytes to the fields that balancing needs: Ethernet, VLAN tags, IPv4 with options, IPv6 with extension
//! headers, fragments, TCP, UDP and SCTP, and the packets that ICMP errors are about. The same code reads packets in the kernel and slices on the host.

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
headers!(
    EthHdr, VlanHdr, Ipv4Hdr, Ipv6Hdr, TcpHdr, UdpHdr, u64, [u8; 1], [u8; 2], [u8; 4], [u8; 6], [u8; 16], [u8; 22]
);

/// The bytes of one packet, read with bounds checks: of a packet in the kernel, or of a slice.
pub trait Bytes {
    /// The bytes at `offset` as a header; `None` if the packet ends before the header does.
    fn read<T: Header>(&self, offset: usize) -> Option<T>;
    /// The packet's length in bytes, from the Ethernet header on.
    fn length(&self) -> usize;
    /// Whether it stands for several packets. Such a one may be longer than IP can say, and then says zero (`iph_totlen` and
    /// `ipv6_payload_len` in the kernel's `include/linux/ip.h` and `ipv6.h`).
    fn stands_for_several(&self) -> bool {
        false
    }
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

/// Which part of its datagram a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first fragment, the only one with a transport header.
    First,
    /// A later fragment.
    Later,
}

/// A packet that flows are made of, or an ICMP message: all that the pipeline needs of its headers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment<A: Address> {
    /// The packet's tuple. An ICMP message and a later fragment have no ports: zero. See [`Segment::hides_proto`].
    pub key: FlowKey<A>,
    /// The TCP flags, or what is alike for SCTP; none for others.
    pub flags: TcpFlags,
    /// Whether it is a fragment.
    pub part: Part,
    /// What the fragments of a datagram have in common, as it stands in the header; of what is whole it says nothing.
    pub identification: u32,
    /// The offset of the network header.
    pub network: usize,
    /// The offset of the transport or ICMP header, or of a later fragment's data.
    pub transport: usize,
    /// The length of the IP packet in bytes, as its header says; at most that is said of a longer one.
    pub ip_length: u16,
    /// The type of service or traffic class byte.
    pub traffic_class: u8,
    /// The TTL or hop limit.
    pub ttl: u8,
    /// Whether nobody on the way may fragment it: always so for IPv6.
    pub dont_fragment: bool,
    /// Whether the frame carries VLAN tags.
    pub is_tagged: bool,
}

/// What an ICMP error is about: the beginning of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Embedded<A: Address> {
    /// Its tuple, as it was when it was sent.
    pub key: FlowKey<A>,
    /// The offset of its network header.
    pub network: usize,
    /// The offset of its transport header, of which eight bytes are there.
    pub transport: usize,
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

/// The fields of the word with flags and fragment offset (RFC 791, section 3.1).
const IPV4_FRAGMENT_OFFSET: u16 = 0x1FFF;
const IPV4_MORE_FRAGMENTS: u16 = 0x2000;
const IPV4_DONT_FRAGMENT: u16 = 0x4000;

#[inline(always)]
const fn part(has_offset: bool, has_more: bool) -> Part {
    match (has_offset, has_more) {
        (false, false) => Part::Whole,
        (false, true) => Part::First,
        (true, _) => Part::Later,
    }
}

/// Reads an IPv4 header (RFC 791), with options, and the transport header behind it.
#[inline(always)]
pub fn ipv4<B: Bytes + ?Sized>(bytes: &B, frame: Frame) -> Result<Segment<Ipv4Be>, PassReason> {
    let header: Ipv4Hdr = bytes.read(frame.network).ok_or(PassReason::MalformedIpv4)?;
    let header_length = usize::from(header.vihl & 0x0F) * 4;
    let ip_length = match u16::from_be_bytes(header.tot_len) {
        0 if bytes.stands_for_several() => bytes.length() - frame.network,
        length => usize::from(length),
    };
    if header.vihl >> 4 != 4
        || header_length < size_of::<Ipv4Hdr>()
        || ip_length < header_length
        || frame.network + ip_length > bytes.length()
    {
        return Err(PassReason::MalformedIpv4);
    }
    let fragmentation = u16::from_be_bytes(header.frags);
    let part = part(fragmentation & IPV4_FRAGMENT_OFFSET != 0, fragmentation & IPV4_MORE_FRAGMENTS != 0);
    let source = Ipv4Be::from_bytes(header.src_addr);
    let destination = Ipv4Be::from_bytes(header.dst_addr);
    let transport = frame.network + header_length;
    let proto = IpProto(u16::from(header.proto));
    let (ports, flags) = transport_header(bytes, proto, part, transport, ip_length - header_length)?;
    Ok(Segment {
        key: FlowKey::new(source, destination, ports, proto),
        flags,
        part,
        identification: u32::from(u16::from_ne_bytes(header.id)),
        network: bytes.settle(frame.network),
        transport: bytes.settle(transport),
        ip_length: at_most_u16(ip_length),
        traffic_class: header.tos,
        ttl: header.ttl,
        dont_fragment: fragmentation & IPV4_DONT_FRAGMENT != 0,
        is_tagged: frame.is_tagged(),
    })
}

#[inline(always)]
const fn at_most_u16(length: usize) -> u16 {
    if length > u16::MAX as usize { u16::MAX } else { length as u16 }
}

/// Reads an IPv6 header (RFC 8200), its extension headers, and the transport header behind them.
#[inline(always)]
pub fn ipv6<B: Bytes + ?Sized>(bytes: &B, frame: Frame) -> Result<Segment<Ipv6Be>, PassReason> {
    let header: Ipv6Hdr = bytes.read(frame.network).ok_or(PassReason::MalformedIpv6)?;
    let ip_length = match u16::from_be_bytes(header.payload_len) {
        0 if bytes.stands_for_several() => bytes.length() - frame.network,
        length => size_of::<Ipv6Hdr>() + usize::from(length),
    };
    let [version_and_class, class_and_label, ..] = header.vcf;
    if version_and_class >> 4 != 6 || frame.network + ip_length > bytes.length() {
        return Err(PassReason::MalformedIpv6);
    }
    let source = Ipv6Be::from_bytes(header.src_addr);
    let destination = Ipv6Be::from_bytes(header.dst_addr);
    let Behind { proto, skipped, part, identification } =
        skip_extensions(bytes, IpProto(u16::from(header.next_hdr)), frame.network + size_of::<Ipv6Hdr>())?;
    let headers_length = size_of::<Ipv6Hdr>() + skipped;
    if headers_length > ip_length {
        return Err(PassReason::MalformedIpv6);
    }
    let transport = frame.network + headers_length;
    let (ports, flags) = if hides_proto(part, proto) {
        no_transport_header()
    } else {
        transport_header(bytes, proto, part, transport, ip_length - headers_length)?
    };
    Ok(Segment {
        key: FlowKey::new(source, destination, ports, proto),
        flags,
        part,
        identification,
        network: bytes.settle(frame.network),
        transport: bytes.settle(transport),
        ip_length: at_most_u16(ip_length),
        traffic_class: version_and_class << 4 | class_and_label >> 4,
        ttl: header.hop_limit,
        dont_fragment: true,
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

/// What is behind extension headers, and what a fragment header among them says.
struct Behind {
    proto: IpProto,
    /// Their length in bytes.
    skipped: usize,
    part: Part,
    identification: u32,
}

/// Walks over extension headers that start at `start`. What follows the fragment header of a later fragment is data.
#[inline(always)]
fn skip_extensions<B: Bytes + ?Sized>(bytes: &B, mut proto: IpProto, start: usize) -> Result<Behind, PassReason> {
    let mut skipped = 0;
    let mut part = Part::Whole;
    let mut identification = 0;
    for _ in 0..IPV6_EXT_MAX {
        if !is_extension(proto) || part == Part::Later {
            break;
        }
        // As one word: an array of bytes would go over the stack.
        let header: u64 = bytes.read(start + skipped).ok_or(PassReason::MalformedIpv6)?;
        let [next, length, high, low, a, b, c, d] = header.to_ne_bytes();
        if proto.0 == FRAGMENT {
            // 13 bits of offset, two reserved, "more fragments".
            let word = u16::from_be_bytes([high, low]);
            part = self::part(word >> 3 != 0, word & 1 != 0);
            identification = u32::from_ne_bytes([a, b, c, d]);
            skipped += 8;
        } else {
            let segments_left = low;
            if proto.0 == ROUTING && segments_left != 0 {
                return Err(PassReason::SourceRouted);
            }
            skipped += (usize::from(length) + 1) * 8;
        }
        proto = IpProto(u16::from(next));
    }
    if is_extension(proto) && part != Part::Later {
        return Err(PassReason::ExtensionsTooDeep);
    }
    Ok(Behind { proto, skipped, part, identification })
}

#[inline(always)]
const fn is_extension(proto: IpProto) -> bool {
    matches!(proto.0, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS | MOBILITY | HOST_IDENTITY | SHIM6)
}

/// Whether only the first fragment says what the datagram is of: this one names an extension header, which is in the first
/// (RFC 8200, section 4.5).
#[inline(always)]
const fn hides_proto(part: Part, proto: IpProto) -> bool {
    matches!(part, Part::Later) && is_extension(proto)
}

/// The ports and flags of a packet without a transport header.
#[inline(always)]
fn no_transport_header() -> ((Port, Port), TcpFlags) {
    ((Port::default(), Port::default()), TcpFlags::default())
}

/// The SCTP common header (RFC 9260, section 3.1), and the type and flags of the first chunk behind it.
const SCTP_HEADER: usize = 12;
/// The least length of a chunk.
const SCTP_CHUNK: usize = 4;
/// The least length of an ICMP message that is looked at: type, code, checksum, and four bytes by type.
const ICMP_HEADER: usize = 8;

/// Reads the ports and flags of a transport header with `payload` bytes of the IP packet left for it. A later fragment has none.
#[inline(always)]
fn transport_header<B: Bytes + ?Sized>(
    bytes: &B,
    proto: IpProto,
    part: Part,
    transport: usize,
    payload: usize,
) -> Result<((Port, Port), TcpFlags), PassReason> {
    if part == Part::Later {
        return match proto {
            IpProto::TCP | IpProto::UDP | IpProto::SCTP | IpProto::ICMP | IpProto::ICMPV6 => Ok(no_transport_header()),
            _ => Err(PassReason::OtherProtocol),
        };
    }
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
            // The first of several fragments says the length of all.
            if length < size_of::<UdpHdr>()
                || payload < size_of::<UdpHdr>()
                || (length > payload && part == Part::Whole)
            {
                return Err(PassReason::MalformedUdp);
            }
            Ok(((Port::from_bytes(header.src), Port::from_bytes(header.dst)), TcpFlags::default()))
        }
        IpProto::SCTP => {
            let [a, b, c, d]: [u8; 4] = bytes.read(transport).ok_or(PassReason::MalformedSctp)?;
            let [chunk] = bytes.read(transport + SCTP_HEADER).ok_or(PassReason::MalformedSctp)?;
            if payload < SCTP_HEADER + SCTP_CHUNK {
                return Err(PassReason::MalformedSctp);
            }
            Ok(((Port::from_bytes([a, b]), Port::from_bytes([c, d])), TcpFlags::of_sctp_chunk(chunk)))
        }
        IpProto::ICMP | IpProto::ICMPV6 if payload < ICMP_HEADER => Err(PassReason::MalformedIcmp),
        IpProto::ICMP | IpProto::ICMPV6 => Ok(no_transport_header()),
        _ => Err(PassReason::OtherProtocol),
    }
}

/// The sequence and acknowledgement numbers of a TCP segment, in host order.
#[inline(always)]
pub fn tcp_numbers<B: Bytes + ?Sized>(bytes: &B, transport: usize) -> Option<(u32, u32)> {
    let numbers = u64::from_be(bytes.read::<u64>(transport + 4)?);
    Some(((numbers >> 32) as u32, numbers as u32))
}

/// Reads the packet that an ICMP error at `icmp` is about (RFC 792), as far as it is quoted.
#[inline(always)]
pub fn embedded4<B: Bytes + ?Sized>(bytes: &B, icmp: usize) -> Result<Embedded<Ipv4Be>, PassReason> {
    let network = icmp + ICMP_HEADER;
    let header: Ipv4Hdr = bytes.read(network).ok_or(PassReason::MalformedIcmp)?;
    let header_length = usize::from(header.vihl & 0x0F) * 4;
    if header.vihl >> 4 != 4 || header_length < size_of::<Ipv4Hdr>() {
        return Err(PassReason::MalformedIcmp);
    }
    if u16::from_be_bytes(header.frags) & IPV4_FRAGMENT_OFFSET != 0 {
        return Err(PassReason::OtherIcmp);
    }
    let (source, destination) = (Ipv4Be::from_bytes(header.src_addr), Ipv4Be::from_bytes(header.dst_addr));
    embedded(bytes, (source, destination), IpProto(u16::from(header.proto)), network, network + header_length)
}

/// The same for ICMPv6 (RFC 4443).
#[inline(always)]
pub fn embedded6<B: Bytes + ?Sized>(bytes: &B, icmp: usize) -> Result<Embedded<Ipv6Be>, PassReason> {
    let network = icmp + ICMP_HEADER;
    let header: Ipv6Hdr = bytes.read(network).ok_or(PassReason::MalformedIcmp)?;
    let [version, ..] = header.vcf;
    if version >> 4 != 6 {
        return Err(PassReason::MalformedIcmp);
    }
    let start = network + size_of::<Ipv6Hdr>();
    let Behind { proto, skipped, part, .. } = skip_extensions(bytes, IpProto(u16::from(header.next_hdr)), start)?;
    if part == Part::Later {
        return Err(PassReason::OtherIcmp);
    }
    let (source, destination) = (Ipv6Be::from_bytes(header.src_addr), Ipv6Be::from_bytes(header.dst_addr));
    embedded(bytes, (source, destination), proto, network, start + skipped)
}

#[inline(always)]
fn embedded<B: Bytes + ?Sized, A: Address>(
    bytes: &B,
    (source, destination): (A, A),
    proto: IpProto,
    network: usize,
    transport: usize,
) -> Result<Embedded<A>, PassReason> {
    if !matches!(proto, IpProto::TCP | IpProto::UDP | IpProto::SCTP) {
        return Err(PassReason::OtherIcmp);
    }
    let [a, b, c, d, ..] = bytes.read::<u64>(transport).ok_or(PassReason::MalformedIcmp)?.to_ne_bytes();
    let ports = (Port::from_bytes([a, b]), Port::from_bytes([c, d]));
    Ok(Embedded {
        key: FlowKey::new(source, destination, ports, proto),
        network: bytes.settle(network),
        transport: bytes.settle(transport),
    })
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
    /// Whether this packet may begin a flow: a SYN, what is alike for SCTP, or any UDP packet.
    #[inline(always)]
    pub fn opens_flow(&self) -> bool {
        self.key.proto == IpProto::UDP || self.flags.opens()
    }

    /// Whether this is a later fragment of which the first alone says what its datagram is of: its protocol stands for an
    /// IPv6 extension header.
    #[inline(always)]
    pub fn hides_proto(&self) -> bool {
        hides_proto(self.part, self.key.proto)
    }

    /// Whether this is an ICMP or ICMPv6 message.
    #[inline(always)]
    pub fn is_icmp(&self) -> bool {
        matches!(self.key.proto, IpProto::ICMP | IpProto::ICMPV6)
    }
}

#[cfg(test)]
mod tests {
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
            ("later fragment of GRE", |p| (p[21], p[23]) = (1, 47), PassReason::OtherProtocol),
            ("SCTP without a chunk", |p| (p[17], p[23]) = (20 + 15, 132), PassReason::MalformedSctp),
            ("GRE", |p| p[23] = 47, PassReason::OtherProtocol),
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
    fn fragments_are_told_apart() {
        let mut first = tcp4();
        (first[18], first[19], first[20]) = (0xAB, 0xCD, 0x20);
        assert_eq!(
            (v4(&first).part, v4(&first).identification),
            (Part::First, u16::from_ne_bytes([0xAB, 0xCD]).into())
        );
        assert_eq!(v4(&first).key.destination_port.to_host(), 80);
        let mut later = first.clone();
        (later[20], later[21]) = (0, 185);
        assert_eq!((v4(&later).part, v4(&later).identification), (Part::Later, v4(&first).identification));
        assert_eq!((v4(&later).key.destination_port.to_host(), v4(&later).transport), (0, 34));

        let parsed = |offset: u8, more: u8| v6(&udp6(44, &[17, 0, 0, offset << 3 | more, 1, 2, 3, 4]));
        let [whole, first, later] = [parsed(0, 0), parsed(0, 1), parsed(1, 0)];
        assert_eq!([whole.part, first.part, later.part], [Part::Whole, Part::First, Part::Later]);
        assert_eq!([first.identification, later.identification], [u32::from_ne_bytes([1, 2, 3, 4]); 2]);
        // What looks like one more extension header is data already.
        let data = v6(&udp6(44, &[17, 0, 0, 8, 1, 2, 3, 4, 60, 0, 0, 0, 0, 0, 0, 0]));
        assert_eq!((data.transport, data.key.proto), (14 + 48, IpProto::UDP));
    }

    #[test]
    fn the_first_of_several_fragments_says_the_length_of_all() {
        let mut bytes = udp6(44, &[17, 0, 0, 1, 1, 2, 3, 4]);
        let length = bytes.len() - 4;
        bytes[length..length + 2].copy_from_slice(&4000_u16.to_be_bytes());
        assert_eq!(v6(&bytes).key.destination_port.to_host(), 53);
    }

    /// Bytes that stand for several packets.
    struct Several(Vec<u8>);

    impl Bytes for Several {
        fn read<T: Header>(&self, offset: usize) -> Option<T> {
            self.0[..].read(offset)
        }

        fn length(&self) -> usize {
            self.0.len()
        }

        fn stands_for_several(&self) -> bool {
            true
        }
    }

    #[test]
    fn what_stands_for_several_packets_may_be_longer_than_ip_can_say() {
        let mut large = Several(tcp4());
        large.0[16..18].fill(0);
        assert_eq!(packet(&large.0[..]), Err(PassReason::MalformedIpv4), "a packet of its own may not");
        assert!(matches!(packet(&large), Ok(AnySegment::V4(segment)) if segment.ip_length == 40));
        large.0.resize(100_000, 7);
        assert!(matches!(packet(&large), Ok(AnySegment::V4(segment)) if segment.ip_length == u16::MAX));

        let mut large = Several(udp6(0, &[17, 0, 0xC2, 4, 0, 1, 0x86, 0x78]));
        large.0[18..20].fill(0);
        assert_eq!(packet(&large.0[..]), Err(PassReason::MalformedIpv6));
        large.0.resize(100_000, 7);
        assert!(
            matches!(packet(&large), Ok(AnySegment::V6(segment)) if (segment.transport, segment.ip_length) == (62, u16::MAX))
        );
    }

    #[test]
    fn sctp_chunks_read_like_flags() {
        let mut bytes = tcp4();
        bytes[23] = 132;
        let ends = [6, 7, 8, 14].map(|chunk| (chunk, false, true));
        for (chunk, opens, ends) in [(1, true, false), (2, false, false), (0, false, false)].into_iter().chain(ends) {
            bytes[46] = chunk;
            assert_eq!((v4(&bytes).opens_flow(), v4(&bytes).flags.ends()), (opens, ends), "chunk {chunk}");
        }
        assert_eq!(v4(&bytes).key.destination_port.to_host(), 80);
    }

    #[test]
    fn icmp_errors_are_about_a_packet() {
        let about = &tcp4()[14..14 + 28];
        let mut bytes = tcp4();
        bytes.truncate(34);
        (bytes[17], bytes[23]) = (20 + 8 + 28, 1);
        bytes.extend([3, 4, 0, 0, 0, 0, 5, 120]);
        bytes.extend(about);
        assert!(v4(&bytes).is_icmp());
        let embedded = embedded4(&bytes[..], v4(&bytes).transport).unwrap();
        assert_eq!((embedded.key, embedded.network, embedded.transport), (v4(&tcp4()).key, 42, 62));
        bytes.pop();
        assert_eq!(embedded4(&bytes[..], 34), Err(PassReason::MalformedIcmp));

        let about = &udp6(60, &[17, 0, 0, 0, 0, 0, 0, 0])[14..];
        let mut bytes = udp6(58, &[]);
        bytes.truncate(54);
        bytes[18..20].copy_from_slice(&((8 + about.len()) as u16).to_be_bytes());
        bytes.extend([2, 0, 0, 0, 0, 0, 5, 0]);
        bytes.extend(about);
        let embedded = embedded6(&bytes[..], v6(&bytes).transport).unwrap();
        assert_eq!((embedded.key.destination_port.to_host(), embedded.transport), (53, 54 + 8 + 48));
    }

    #[test]
    fn a_packet_on_its_way_to_a_further_hop_is_not_for_its_destination() {
        let routing = |segments_left| {
            let mut extensions = vec![17, 2, 4, segments_left, 0, 0, 0, 0];
            extensions.extend([0x40; 16]);
            udp6(43, &extensions)
        };
        assert_eq!(v6(&routing(0)).key.destination_port.to_host(), 53);
        assert_eq!(packet(&routing(1)[..]), Err(PassReason::SourceRouted));
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
        assert_eq!(packet(&udp6(0, &[17, 200, 0, 0, 0, 0, 0, 0])[..]), Err(PassReason::MalformedIpv6));
    }
}
