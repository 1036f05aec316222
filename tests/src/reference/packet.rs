//! Packets as the reference sees them: fields, from which [`crate::packet::Packet`] makes bytes.

use std::net::{IpAddr, SocketAddr};

use crate::packet;

/// A protocol that is balanced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
    /// RFC 9260.
    Sctp,
}

impl Protocol {
    /// The name in services files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// What tells flows apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tuple {
    /// How it is spoken.
    pub protocol: Protocol,
    /// Who speaks.
    pub source: SocketAddr,
    /// To whom.
    pub destination: SocketAddr,
}

impl Tuple {
    /// The tuple of what answers.
    pub const fn reversed(self) -> Self {
        Self { protocol: self.protocol, source: self.destination, destination: self.source }
    }
}

/// Ethernet addresses: of the sender, and of the receiver.
pub type Ethernet = ([u8; 6], [u8; 6]);

/// A packet in an Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The frame's addresses.
    pub ethernet: Ethernet,
    /// The IP source address.
    pub source: IpAddr,
    /// The IP destination address, of the same family.
    pub destination: IpAddr,
    /// The TTL or hop limit.
    pub ttl: u8,
    /// What is behind the IP header.
    pub body: Body,
}

/// What is behind an IP header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A transport header with its payload.
    Segment(Segment),
    /// A fragment that is not the first.
    LaterPiece(LaterPiece),
    /// An ICMP message of a type that quotes a packet.
    Error(Error),
    /// An ICMP echo request.
    Echo {
        /// Which sender.
        identifier: u16,
        /// Which of its requests.
        sequence: u16,
        /// What is to come back.
        payload: Vec<u8>,
    },
}

/// A transport header with its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The sender's port.
    pub source_port: u16,
    /// The receiver's port.
    pub destination_port: u16,
    /// The rest of the header.
    pub header: Header,
    /// What follows it, in SCTP all chunks but the first.
    pub payload: Vec<u8>,
    /// Set for the first fragment, of which this is the whole packet.
    pub cut: Option<Cut>,
}

/// Where a packet is cut in two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// What its fragments have in common.
    pub identification: u16,
    /// How many bytes behind the IP header are in the first: a multiple of eight.
    pub at: usize,
}

/// What a transport header says but for the ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// TCP.
    Tcp {
        /// The flags.
        flags: Flags,
        /// The sequence number.
        sequence: u32,
        /// The acknowledgement number, which counts where the flag says so.
        acknowledgment: u32,
    },
    /// UDP.
    Udp {
        /// Whether there is a checksum, which over IPv4 may be left out.
        has_checksum: bool,
    },
    /// SCTP.
    Sctp {
        /// The type of the first chunk.
        chunk: u8,
    },
}

/// TCP flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "as they stand in the header")]
pub struct Flags {
    /// Opens a connection, or accepts one.
    pub syn: bool,
    /// The acknowledgement number counts.
    pub ack: bool,
    /// The sender is done.
    pub fin: bool,
    /// The connection is over.
    pub rst: bool,
}

/// A fragment that is not the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaterPiece {
    /// What the packet would be.
    pub protocol: Protocol,
    /// What its fragments have in common.
    pub identification: u16,
    /// How many bytes behind the IP header are in those before: a multiple of eight.
    pub offset: usize,
    /// Whether others follow.
    pub more: bool,
    /// What it carries.
    pub bytes: Vec<u8>,
}

/// An ICMP message of a type that quotes a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The type.
    pub kind: u8,
    /// The code.
    pub code: u8,
    /// The four bytes behind the checksum: an MTU, a pointer, nothing.
    pub rest: [u8; 4],
    /// What it is about.
    pub quoted: Box<Packet>,
    /// How many bytes of that are quoted, from its IP header on.
    pub length: usize,
}

/// The first chunk of an SCTP association (RFC 9260, section 3.2).
pub const SCTP_INIT: u8 = 1;

impl Segment {
    /// The protocol.
    pub const fn protocol(&self) -> Protocol {
        match self.header {
            Header::Tcp { .. } => Protocol::Tcp,
            Header::Udp { .. } => Protocol::Udp,
            Header::Sctp { .. } => Protocol::Sctp,
        }
    }

    /// The TCP flags; none in other protocols.
    pub fn flags(&self) -> Flags {
        if let Header::Tcp { flags, .. } = self.header { flags } else { Flags::default() }
    }

    /// Whether it may begin a flow.
    pub fn opens(&self) -> bool {
        match self.header {
            Header::Tcp { flags, .. } => flags == Flags { syn: true, ..Flags::default() },
            Header::Udp { .. } => true,
            Header::Sctp { chunk } => chunk == SCTP_INIT,
        }
    }
}

impl Error {
    /// Whether it is about a packet that could not go on, and not about a better route or a sender that is too fast:
    /// unreachable, too big, time exceeded, parameter problem (RFC 792; RFC 4443, section 3).
    pub fn is_of_flows(&self) -> bool {
        if self.quoted.source.is_ipv4() { matches!(self.kind, 3 | 11 | 12) } else { (1..=4).contains(&self.kind) }
    }
}

impl Packet {
    /// A transport packet's tuple, also a first fragment's.
    pub fn tuple(&self) -> Option<Tuple> {
        let Body::Segment(segment) = &self.body else { return None };
        Some(Tuple {
            protocol: segment.protocol(),
            source: SocketAddr::new(self.source, segment.source_port),
            destination: SocketAddr::new(self.destination, segment.destination_port),
        })
    }

    /// The packet as it has to look when packets that come in as `from` leave as `to`.
    ///
    /// An error about one of them goes the other way, and becomes an error about what was sent: its receiver is who sent that;
    /// its sender only changes where that of other packets does, since a router may have sent it.
    #[must_use]
    pub fn translated(&self, from: &Tuple, to: &Tuple) -> Self {
        let mut packet = self.clone();
        packet.destination = to.destination.ip();
        match &mut packet.body {
            Body::Segment(segment) => {
                packet.source = to.source.ip();
                (segment.source_port, segment.destination_port) = (to.source.port(), to.destination.port());
            }
            Body::Error(error) => {
                if from.source.ip() != to.source.ip() {
                    packet.source = to.source.ip();
                }
                *error.quoted = error.quoted.translated(&from.reversed(), &to.reversed());
            }
            Body::LaterPiece(_) | Body::Echo { .. } => packet.source = to.source.ip(),
        }
        packet
    }

    /// The packet one hop further, in a frame with these addresses.
    #[must_use]
    pub fn forwarded(self, ethernet: Ethernet) -> Self {
        Self { ttl: self.ttl - 1, ..self.framed(ethernet) }
    }

    /// The packet in a frame with these addresses.
    #[must_use]
    pub fn framed(self, ethernet: Ethernet) -> Self {
        Self { ethernet, ..self }
    }

    /// Cuts a transport packet in front of these bytes behind its IP header: multiples of eight, in ascending order.
    ///
    /// # Panics
    ///
    /// If it is no transport packet.
    #[must_use]
    pub fn pieces(&self, identification: u16, cuts: &[usize]) -> Vec<Self> {
        let Body::Segment(segment) = &self.body else { panic!("only a transport packet is cut") };
        let whole = self.build().quote(usize::MAX).split_off(if self.source.is_ipv4() { 20 } else { 40 });
        let first = Segment { cut: Some(Cut { identification, at: cuts[0] }), ..segment.clone() };
        let ends = cuts[1..].iter().copied().chain([whole.len()]);
        let later = cuts.iter().zip(ends).map(|(&offset, end)| {
            let bytes = whole[offset..end].to_vec();
            let more = end < whole.len();
            Body::LaterPiece(LaterPiece { protocol: segment.protocol(), identification, offset, more, bytes })
        });
        [Body::Segment(first)].into_iter().chain(later).map(|body| Self { body, ..self.clone() }).collect()
    }

    /// The packet as it is on the wire.
    pub fn bytes(&self) -> Vec<u8> {
        self.build().bytes()
    }

    /// Where in [`Packet::bytes`] the transport header begins.
    pub fn transport_offset(&self) -> usize {
        let is_piece = matches!(&self.body, Body::Segment(Segment { cut: Some(_), .. }) | Body::LaterPiece(_));
        14 + if self.source.is_ipv4() { 20 } else { 40 + if is_piece { 8 } else { 0 } }
    }

    fn build(&self) -> packet::Packet {
        let (source, destination) = (self.source.to_string(), self.destination.to_string());
        let packet = match self.source {
            IpAddr::V4(_) => packet::Packet::v4(&source, &destination),
            IpAddr::V6(_) => packet::Packet::v6(&source, &destination),
        };
        let packet = packet.ethernet(self.ethernet.0, self.ethernet.1).ttl(self.ttl);
        match &self.body {
            Body::Segment(segment) => segment.build(packet),
            Body::LaterPiece(LaterPiece { protocol, identification, offset, more, bytes }) => {
                let packet = packet.identification(*identification).protocol(protocol.number()).payload(bytes);
                packet.fragment(u16::try_from(offset / 8).expect("packets in tests are small"), *more)
            }
            Body::Error(Error { kind, code, rest, quoted, length }) => {
                packet.icmp(*kind, *code, *rest).payload(&quoted.build().quote(*length))
            }
            Body::Echo { identifier, sequence, payload } => packet.echo(*identifier, *sequence).payload(payload),
        }
    }
}

impl Segment {
    fn build(&self, packet: packet::Packet) -> packet::Packet {
        let (source, destination) = (self.source_port, self.destination_port);
        let packet = match self.header {
            Header::Tcp { flags, sequence, acknowledgment } => {
                let mut packet = packet.tcp(source, destination);
                for (is_set, set) in [
                    (flags.syn, packet::Packet::syn as fn(packet::Packet) -> packet::Packet),
                    (flags.ack, packet::Packet::ack),
                    (flags.fin, packet::Packet::fin),
                    (flags.rst, packet::Packet::rst),
                ] {
                    packet = if is_set { set(packet) } else { packet };
                }
                packet.sequence(sequence, acknowledgment).payload(&self.payload)
            }
            Header::Udp { has_checksum } => {
                let packet = packet.udp(source, destination).payload(&self.payload);
                if has_checksum { packet } else { packet.without_checksum() }
            }
            Header::Sctp { chunk } => packet.sctp(source, destination, chunk),
        };
        match self.cut {
            None => packet,
            Some(Cut { identification, at }) => packet.identification(identification).pieces(&[at]).swap_remove(0),
        }
    }
}
