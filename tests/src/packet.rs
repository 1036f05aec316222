//! Single packets: built from what a test says about them, checked, and told in a line.
//!
//! ```
//! # use tests::packet::{Packet, describe};
//! let syn = Packet::v4("192.0.2.7", "10.96.0.10").tcp(4242, 80).syn().vlan(7);
//! assert_eq!(describe(&syn.bytes()), "tcp 192.0.2.7:4242 > 10.96.0.10:80 [S] ttl 64 vlan 7 len 58");
//! ```
//!
//! Headers and checksums come from etherparse and not from lb-common, which is under test.

use std::{fmt::Write as _, net::IpAddr, ops::Range};

use etherparse::{
    EtherType, Ethernet2Header, IpDscp, IpEcn, IpFragOffset, IpNumber, Ipv4Header, Ipv4HeaderSlice, Ipv6FragmentHeader,
    Ipv6Header, NetSlice, SingleVlanHeader, SlicedPacket, TcpHeader, TransportSlice, UdpHeader,
    checksum::Sum16BitWords,
};

/// The Ethernet address that packets come from unless they say another.
pub const THEIR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The Ethernet address that packets go to unless they say another.
pub const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A packet in the making. [`Packet::bytes`] adds the lengths and checksums.
#[derive(Clone, Debug)]
#[must_use = "only `bytes` gives something to send"]
pub struct Packet {
    ethernet: Ethernet2Header,
    vlans: Vec<u16>,
    network: Network,
    fragment: Option<Fragment>,
    identification: u16,
    transport: Transport,
    payload: Vec<u8>,
}

#[derive(Clone, Debug)]
enum Network {
    V4(Ipv4Header),
    V6(Ipv6Header, Vec<Extension>),
}

/// An IPv6 extension header.
#[derive(Clone, Debug)]
struct Extension {
    number: u8,
    /// In bytes, of which all are zero but these.
    length: usize,
    /// The fourth byte.
    segments_left: u8,
}

#[derive(Clone, Debug)]
enum Transport {
    Tcp(TcpHeader),
    Udp(UdpHeader, UdpChecksum),
    /// Between these ports; the payload is its chunks.
    Sctp(u16, u16),
    /// Type, code, and the four bytes that depend on them.
    Icmp(u8, u8, [u8; 4]),
    /// The payload is all there is.
    Other(IpNumber),
}

#[derive(Clone, Copy, Debug)]
enum UdpChecksum {
    Computed,
    Absent,
}

#[derive(Clone, Copy, Debug)]
struct Fragment {
    offset: IpFragOffset,
    more: bool,
}

/// What a fragment's parts know each other by, unless they say another.
const IDENTIFICATION: u16 = 0x4242;

impl Packet {
    /// An IPv4 packet.
    #[track_caller]
    pub fn v4(source: &str, destination: &str) -> Self {
        let address = |text: &str| text.parse::<std::net::Ipv4Addr>().expect("an IPv4 address").octets();
        let (source, destination) = (address(source), address(destination));
        let header = Ipv4Header { source, destination, time_to_live: 64, dont_fragment: true, ..Default::default() };
        Self::new(EtherType::IPV4, Network::V4(header))
    }

    /// An IPv6 packet.
    #[track_caller]
    pub fn v6(source: &str, destination: &str) -> Self {
        let address = |text: &str| text.parse::<std::net::Ipv6Addr>().expect("an IPv6 address").octets();
        let (source, destination) = (address(source), address(destination));
        let header = Ipv6Header { source, destination, hop_limit: 64, ..Default::default() };
        Self::new(EtherType::IPV6, Network::V6(header, Vec::new()))
    }

    fn new(ether_type: EtherType, network: Network) -> Self {
        Self {
            ethernet: Ethernet2Header { source: THEIR_MAC, destination: OUR_MAC, ether_type },
            vlans: Vec::new(),
            network,
            fragment: None,
            identification: IDENTIFICATION,
            transport: Transport::Other(IpNumber::EXPERIMENTAL_AND_TESTING_0),
            payload: Vec::new(),
        }
    }

    /// A TCP segment in the middle of a connection, but for the flags that are still to be said.
    pub fn tcp(mut self, source: u16, destination: u16) -> Self {
        self.transport = Transport::Tcp(TcpHeader::new(source, destination, 1_000, 65_535));
        self
    }

    /// A UDP datagram.
    pub fn udp(mut self, source: u16, destination: u16) -> Self {
        let header = UdpHeader { source_port: source, destination_port: destination, length: 0, checksum: 0 };
        self.transport = Transport::Udp(header, UdpChecksum::Computed);
        self
    }

    /// An SCTP packet with one chunk of this type, that has no more than its header (RFC 9260, section 3).
    pub fn sctp(mut self, source: u16, destination: u16, chunk: u8) -> Self {
        self.transport = Transport::Sctp(source, destination);
        self.payload = vec![chunk, 0, 0, 4];
        self
    }

    /// An ICMP message of this type and code, with the four bytes that they give a meaning to. What it is about
    /// is the payload; see [`Packet::quote`].
    pub fn icmp(mut self, kind: u8, code: u8, rest: [u8; 4]) -> Self {
        self.transport = Transport::Icmp(kind, code, rest);
        self
    }

    /// An echo request (RFC 792; RFC 4443, section 4).
    pub fn echo(self, identifier: u16, sequence: u16) -> Self {
        let kind = if let Network::V4(_) = self.network { 8 } else { 128 };
        let [[a, b], [c, d]] = [identifier, sequence].map(u16::to_be_bytes);
        self.icmp(kind, 0, [a, b, c, d])
    }

    /// Another protocol, whose headers are in the payload.
    pub fn protocol(mut self, number: u8) -> Self {
        self.transport = Transport::Other(IpNumber(number));
        self
    }

    /// From and to these Ethernet addresses.
    pub fn ethernet(mut self, source: [u8; 6], destination: [u8; 6]) -> Self {
        (self.ethernet.source, self.ethernet.destination) = (source, destination);
        self
    }

    /// One more VLAN tag, inside those that are there.
    pub fn vlan(mut self, id: u16) -> Self {
        self.vlans.push(id);
        self
    }

    /// The TTL or hop limit.
    pub fn ttl(mut self, ttl: u8) -> Self {
        match &mut self.network {
            Network::V4(header) => header.time_to_live = ttl,
            Network::V6(header, _) => header.hop_limit = ttl,
        }
        self
    }

    /// The type of service or traffic class byte: DSCP and ECN.
    pub fn tos(mut self, tos: u8) -> Self {
        match &mut self.network {
            Network::V4(header) => {
                header.dscp = IpDscp::try_new(tos >> 2).expect("six bits");
                header.ecn = IpEcn::try_new(tos & 3).expect("two bits");
            }
            Network::V6(header, _) => header.traffic_class = tos,
        }
        self
    }

    /// IPv4 options: up to 40 bytes, a multiple of four.
    #[track_caller]
    pub fn options(mut self, options: &[u8]) -> Self {
        match &mut self.network {
            Network::V4(header) => header.options = options.try_into().expect("a multiple of four"),
            Network::V6(..) => panic!("IPv6 has extension headers instead"),
        }
        self
    }

    /// One more IPv6 extension header of this number and length, a multiple of eight. It holds nothing but padding.
    #[track_caller]
    pub fn extension(mut self, number: u8, length: usize) -> Self {
        match &mut self.network {
            Network::V4(_) => panic!("IPv4 has options instead"),
            Network::V6(_, extensions) => extensions.push(Extension { number, length, segments_left: 0 }),
        }
        self
    }

    /// Puts a routing header of one address behind all that there are (RFC 8200, section 4.4).
    pub fn routing(mut self, segments_left: u8) -> Self {
        self = self.extension(IpNumber::IPV6_ROUTE_HEADER.0, 24);
        if let Network::V6(_, extensions) = &mut self.network
            && let Some(last) = extensions.last_mut()
        {
            last.segments_left = segments_left;
        }
        self
    }

    /// A fragment, its offset in units of eight bytes. All but the first have no TCP or UDP header.
    #[track_caller]
    pub fn fragment(mut self, offset: u16, more: bool) -> Self {
        self.fragment = Some(Fragment { offset: offset.try_into().expect("13 bits"), more });
        self
    }

    /// What the fragments of a packet have in common.
    pub fn identification(mut self, identification: u16) -> Self {
        self.identification = identification;
        self
    }

    /// The packet in pieces, cut in front of each of these bytes behind the IP header: multiples of eight, in ascending order.
    #[track_caller]
    pub fn pieces(&self, cuts: &[usize]) -> Vec<Self> {
        let whole = self.transport_bytes();
        let ends = cuts.iter().copied().chain([whole.len()]);
        let starts = [0].into_iter().chain(cuts.iter().copied());
        let piece = |(start, end): (usize, usize)| {
            let offset = u16::try_from(start / 8).expect("packets in tests are small");
            let piece = self.clone().protocol(self.protocol_number().0).payload(&whole[start..end]);
            piece.fragment(offset, end < whole.len())
        };
        starts.zip(ends).map(piece).collect()
    }

    /// Opens a connection; with [`Packet::ack`], accepts one.
    #[track_caller]
    pub fn syn(self) -> Self {
        self.with_tcp(|header| header.syn = true)
    }

    /// Acknowledges something.
    #[track_caller]
    pub fn ack(self) -> Self {
        self.with_tcp(|header| (header.ack, header.acknowledgment_number) = (true, 2_000))
    }

    /// The sender is done.
    #[track_caller]
    pub fn fin(self) -> Self {
        self.with_tcp(|header| header.fin = true)
    }

    /// Resets the connection.
    #[track_caller]
    pub fn rst(self) -> Self {
        self.with_tcp(|header| header.rst = true)
    }

    /// TCP sequence and acknowledgement numbers.
    #[track_caller]
    pub fn sequence(self, sequence: u32, acknowledgment: u32) -> Self {
        self.with_tcp(|header| {
            (header.sequence_number, header.acknowledgment_number) = (sequence, acknowledgment);
        })
    }

    /// The TCP window.
    #[track_caller]
    pub fn window(self, window: u16) -> Self {
        self.with_tcp(|header| header.window_size = window)
    }

    /// TCP options as they stand in the header, up to 40 bytes.
    #[track_caller]
    pub fn tcp_options(self, options: &[u8]) -> Self {
        self.with_tcp(|header| header.set_options_raw(options).expect("no more than 40 bytes"))
    }

    #[track_caller]
    fn with_tcp(mut self, change: impl FnOnce(&mut TcpHeader)) -> Self {
        match &mut self.transport {
            Transport::Tcp(header) => change(header),
            other => panic!("not TCP: {other:?}"),
        }
        self
    }

    /// UDP without a checksum, which IPv4 allows.
    #[track_caller]
    pub fn without_checksum(mut self) -> Self {
        match &mut self.transport {
            Transport::Udp(_, checksum) => *checksum = UdpChecksum::Absent,
            other => panic!("not UDP: {other:?}"),
        }
        self
    }

    /// What follows the last header.
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// The packet as it is on the wire.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.link_bytes();
        let transport = self.transport_bytes();
        let protocol = self.protocol_number();
        match &self.network {
            Network::V4(header) => bytes.extend(self.ipv4_bytes(header.clone(), protocol, transport.len())),
            Network::V6(header, extensions) => {
                bytes.extend(self.ipv6_bytes(header.clone(), extensions, protocol, transport.len()));
            }
        }
        bytes.extend(transport);
        bytes
    }

    /// The packet from its IP header on and up to this length, as an ICMP error quotes it.
    pub fn quote(&self, length: usize) -> Vec<u8> {
        let bytes = self.bytes().split_off(self.link_bytes().len());
        bytes.into_iter().take(length).collect()
    }

    /// The packet as bytes of which some are not as they should be.
    pub fn edit(&self, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = self.bytes();
        change(&mut bytes);
        bytes
    }

    fn protocol_number(&self) -> IpNumber {
        match (&self.transport, &self.network) {
            (Transport::Tcp(_), _) => IpNumber::TCP,
            (Transport::Udp(..), _) => IpNumber::UDP,
            (Transport::Sctp(..), _) => IpNumber::SCTP,
            (Transport::Icmp(..), Network::V4(_)) => IpNumber::ICMP,
            (Transport::Icmp(..), Network::V6(..)) => IpNumber::IPV6_ICMP,
            (Transport::Other(number), _) => *number,
        }
    }

    fn link_bytes(&self) -> Vec<u8> {
        let mut ethernet = self.ethernet.clone();
        let inner_type = ethernet.ether_type;
        // The outer one of two tags is the provider's.
        ethernet.ether_type = match self.vlans.len() {
            0 => inner_type,
            1 => EtherType::VLAN_TAGGED_FRAME,
            _ => EtherType::PROVIDER_BRIDGING,
        };
        let mut bytes = ethernet.to_bytes().to_vec();
        for (position, &id) in self.vlans.iter().enumerate() {
            let is_last = position + 1 == self.vlans.len();
            let ether_type = if is_last { inner_type } else { EtherType::VLAN_TAGGED_FRAME };
            let vlan_id = id.try_into().expect("12 bits");
            bytes.extend(SingleVlanHeader { vlan_id, ether_type, ..Default::default() }.to_bytes());
        }
        bytes
    }

    fn ipv4_bytes(&self, mut header: Ipv4Header, protocol: IpNumber, payload: usize) -> Vec<u8> {
        header.protocol = protocol;
        if let Some(Fragment { offset, more }) = self.fragment {
            (header.fragment_offset, header.more_fragments) = (offset, more);
            (header.identification, header.dont_fragment) = (self.identification, false);
        }
        header.set_payload_len(payload).expect("packets in tests are small");
        header.header_checksum = header.calc_header_checksum();
        header.to_bytes().to_vec()
    }

    fn ipv6_bytes(
        &self,
        mut header: Ipv6Header,
        extensions: &[Extension],
        protocol: IpNumber,
        payload: usize,
    ) -> Vec<u8> {
        // Each header names the next, so they are made from the last to the first.
        let mut next_header = protocol;
        let mut chain = Vec::new();
        if let Some(Fragment { offset, more }) = self.fragment {
            chain = Ipv6FragmentHeader::new(next_header, offset, more, self.identification.into()).to_bytes().to_vec();
            next_header = IpNumber::IPV6_FRAGMENTATION_HEADER;
        }
        for &Extension { number, length, segments_left } in extensions.iter().rev() {
            let units = u8::try_from(length / 8 - 1).expect("no longer than 2,048 bytes");
            let mut extension = vec![0; length];
            extension.splice(..4, [next_header.0, units, 0, segments_left]);
            chain.splice(..0, extension);
            next_header = IpNumber(number);
        }
        header.next_header = next_header;
        header.set_payload_length(chain.len() + payload).expect("packets in tests are small");
        [header.to_bytes().to_vec(), chain].concat()
    }

    fn transport_bytes(&self) -> Vec<u8> {
        let is_later_fragment = self.fragment.is_some_and(|fragment| fragment.offset.value() > 0);
        let header = match &self.transport {
            _ if is_later_fragment => Vec::new(),
            Transport::Tcp(header) => {
                let mut header = header.clone();
                header.checksum = tcp_checksum(&header, &self.network, &self.payload);
                header.to_bytes().to_vec()
            }
            Transport::Udp(header, checksum) => {
                let mut header = header.clone();
                header.length = u16::try_from(UdpHeader::LEN + self.payload.len()).expect("packets in tests are small");
                if let UdpChecksum::Computed = checksum {
                    header.checksum = udp_checksum(&header, &self.network, &self.payload);
                }
                header.to_bytes().to_vec()
            }
            Transport::Sctp(source, destination) => {
                let mut header = [source.to_be_bytes(), destination.to_be_bytes()].concat();
                // The verification tag is any; the checksum is of the packet with zero in its place.
                header.extend([0, 0, 0, 7, 0, 0, 0, 0]);
                let sum = crc32c(&[&header[..], &self.payload].concat());
                header.splice(8.., sum.to_le_bytes());
                header
            }
            Transport::Icmp(kind, code, rest) => {
                let mut header = [&[*kind, *code, 0, 0][..], rest].concat();
                let sum = icmp_checksum(&self.network, &[&header[..], &self.payload].concat());
                header.splice(2..4, sum.to_be_bytes());
                header
            }
            Transport::Other(_) => Vec::new(),
        };
        [header, self.payload.clone()].concat()
    }
}

/// Asserts what [`check_checksums`] checks.
#[track_caller]
pub fn verify_checksums(bytes: &[u8]) {
    if let Err(wrong) = check_checksums(bytes) {
        panic!("{wrong} of {}", describe(bytes));
    }
}

/// Whether the checksums of IPv4, TCP, UDP, SCTP and ICMP are right, and that of an IPv4 header that an ICMP error quotes,
/// computing each in full. A UDP checksum may be absent from an IPv4 packet, and there is none to check in a fragment.
///
/// # Errors
///
/// Which checksum is wrong.
pub fn check_checksums(bytes: &[u8]) -> Result<(), String> {
    let packet = match SlicedPacket::from_ethernet(bytes) {
        Ok(packet) => packet,
        // etherparse takes its data for the header that it names.
        Err(_) if is_later_fragment6(bytes) => return Ok(()),
        Err(error) => return Err(format!("{error}: the headers")),
    };
    let check = |which: &str, got: u32, right: u32| {
        if got == right { Ok(()) } else { Err(format!("{got:#x} is not {right:#x}: the {which} checksum")) }
    };
    let network = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header().to_header();
            check("IPv4", header.header_checksum.into(), header.calc_header_checksum().into())?;
            Network::V4(header)
        }
        Some(NetSlice::Ipv6(ip)) => Network::V6(ip.header().to_header(), Vec::new()),
        _ => return Ok(()),
    };
    match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let right = tcp_checksum(&tcp.to_header(), &network, tcp.payload());
            check("TCP", tcp.checksum().into(), right.into())
        }
        Some(TransportSlice::Udp(udp)) if udp.checksum() != 0 || matches!(network, Network::V6(..)) => {
            let right = udp_checksum(&udp.to_header(), &network, udp.payload());
            check("UDP", udp.checksum().into(), right.into())
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            if let (3 | 11 | 12, Ok(quoted)) = (icmp.type_u8(), Ipv4HeaderSlice::from_slice(icmp.payload())) {
                let quoted = quoted.to_header();
                check("quoted IPv4", quoted.header_checksum.into(), quoted.calc_header_checksum().into())?;
            }
            let right = icmp_checksum(&network, &without_checksum(icmp.slice(), 2..4));
            check("ICMP", icmp.checksum().into(), right.into())
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            let right = icmp_checksum(&network, &without_checksum(icmp.slice(), 2..4));
            check("ICMPv6", icmp.checksum().into(), right.into())
        }
        _ => match ip_payload(&packet) {
            Some((IpNumber::SCTP, sctp @ [_, _, _, _, _, _, _, _, a, b, c, d, ..])) => {
                check("SCTP", u32::from_le_bytes([*a, *b, *c, *d]), crc32c(&without_checksum(sctp, 8..12)))
            }
            _ => Ok(()),
        },
    }
}

/// Whether a packet is one of IPv6, and a later fragment.
fn is_later_fragment6(bytes: &[u8]) -> bool {
    let Ok((_, packet)) = Ethernet2Header::from_slice(bytes) else { return false };
    let Ok((header, payload)) = Ipv6Header::from_slice(packet) else { return false };
    let fragment = Ipv6FragmentHeader::from_slice(payload);
    header.next_header == IpNumber::IPV6_FRAGMENTATION_HEADER
        && fragment.is_ok_and(|(fragment, _)| fragment.fragment_offset.value() > 0)
}

/// The bytes, with zeros in these places.
fn without_checksum(bytes: &[u8], places: Range<usize>) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[places].fill(0);
    bytes
}

/// What is behind the IP headers of a packet that is no fragment.
fn ip_payload<'a>(packet: &SlicedPacket<'a>) -> Option<(IpNumber, &'a [u8])> {
    let payload = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => ip.payload(),
        Some(NetSlice::Ipv6(ip)) => ip.payload(),
        _ => return None,
    };
    (!payload.fragmented).then_some((payload.ip_number, payload.payload))
}

/// The checksum of an ICMP message in which there are zeros in its place (RFC 792; RFC 4443, section 2.3).
fn icmp_checksum(network: &Network, message: &[u8]) -> u16 {
    let sum = match network {
        Network::V4(_) => Sum16BitWords::new(),
        Network::V6(ip, _) => {
            let length = u32::try_from(message.len()).expect("packets in tests are small");
            let addresses = Sum16BitWords::new().add_16bytes(ip.source).add_16bytes(ip.destination);
            addresses.add_slice(&length.to_be_bytes()).add_2bytes([0, IpNumber::IPV6_ICMP.0])
        }
    };
    sum.add_slice(message).ones_complement().to_be()
}

/// The CRC-32C of SCTP (RFC 9260, appendix A), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let crc = bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _bit| if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 })
    });
    !crc
}

fn tcp_checksum(header: &TcpHeader, network: &Network, payload: &[u8]) -> u16 {
    match network {
        Network::V4(ip) => header.calc_checksum_ipv4(ip, payload),
        Network::V6(ip, _) => header.calc_checksum_ipv6(ip, payload),
    }
    .expect("packets in tests are small")
}

fn udp_checksum(header: &UdpHeader, network: &Network, payload: &[u8]) -> u16 {
    match network {
        Network::V4(ip) => header.calc_checksum_ipv4(ip, payload),
        Network::V6(ip, _) => header.calc_checksum_ipv6(ip, payload),
    }
    .expect("packets in tests are small")
}

/// A packet in one line, as assertions show it.
pub fn describe(bytes: &[u8]) -> String {
    let length = bytes.len();
    let Ok(packet) = SlicedPacket::from_ethernet(bytes) else { return format!("malformed len {length}") };
    let (source, destination, protocol, ttl): (IpAddr, IpAddr, _, _) = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            (header.source_addr().into(), header.destination_addr().into(), ip.payload_ip_number(), header.ttl())
        }
        Some(NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            let protocol = ip.payload().ip_number;
            (header.source_addr().into(), header.destination_addr().into(), protocol, header.hop_limit())
        }
        _ => return format!("not IP len {length}"),
    };
    let endpoints = |ports: (u16, u16)| match (source, destination) {
        (IpAddr::V4(a), IpAddr::V4(b)) => format!("{a}:{} > {b}:{}", ports.0, ports.1),
        (a, b) => format!("[{a}]:{} > [{b}]:{}", ports.0, ports.1),
    };
    let mut line = match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let flags = [(tcp.syn(), 'S'), (tcp.fin(), 'F'), (tcp.rst(), 'R'), (tcp.psh(), 'P'), (tcp.ack(), '.')];
            let flags: String = flags.into_iter().filter_map(|(is_set, letter)| is_set.then_some(letter)).collect();
            format!("tcp {} [{flags}]", endpoints((tcp.source_port(), tcp.destination_port())))
        }
        Some(TransportSlice::Udp(udp)) => format!("udp {}", endpoints((udp.source_port(), udp.destination_port()))),
        Some(TransportSlice::Icmpv4(icmp)) => {
            format!("icmp {}/{} {source} > {destination}", icmp.type_u8(), icmp.code_u8())
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            format!("icmp6 {}/{} {source} > {destination}", icmp.type_u8(), icmp.code_u8())
        }
        _ if packet.is_ip_payload_fragmented() => {
            format!("fragment of protocol {} {source} > {destination}", protocol.0)
        }
        _ => match ip_payload(&packet) {
            Some((IpNumber::SCTP, [a, b, c, d, ..])) => {
                format!("sctp {}", endpoints((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]))))
            }
            _ => format!("protocol {} {source} > {destination}", protocol.0),
        },
    };
    let _ = write!(line, " ttl {ttl}");
    for id in packet.vlan_ids() {
        let _ = write!(line, " vlan {}", id.value());
    }
    line + &format!(" len {length}")
}

/// Asserts that two packets are the same to the last byte.
#[track_caller]
pub fn assert_packets_equal(expected: &[u8], got: &[u8]) {
    let lines = (describe(expected), describe(got));
    assert!(expected == got, "\nexpected: {}\n     got: {}\n{}", lines.0, lines.1, difference(expected, got));
}

/// Both in hexadecimal, sixteen bytes a row; rows that differ are there twice.
fn difference(expected: &[u8], got: &[u8]) -> String {
    let row = |bytes: &[u8], from: usize| {
        let bytes = bytes.iter().skip(from).take(16);
        bytes.fold(String::new(), |row, byte| format!("{row} {byte:02x}"))
    };
    let rows = (0..expected.len().max(got.len())).step_by(16);
    rows.map(|from| match (row(expected, from), row(got, from)) {
        (expected, got) if expected == got => format!("  {from:04x} {got}\n"),
        (expected, got) => format!("- {from:04x} {expected}\n+ {from:04x} {got}\n"),
    })
    .collect()
}
