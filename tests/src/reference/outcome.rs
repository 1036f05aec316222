//! What may become of a packet, and whether that is what became of it.

use std::{collections::BTreeSet, fmt, net::IpAddr, ops::RangeInclusive};

use etherparse::{Ethernet2Slice, NetSlice, SlicedPacket, TcpSlice, TransportSlice};

use super::{
    Flow,
    packet::{Body, Header, Packet, Protocol, Segment},
};
use crate::packet::{check_checksums, describe};

/// What a program did with a packet, whatever its hook calls that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Gave it to the network stack.
    Pass,
    /// Sent it out, by any interface.
    Send,
    /// Ended its way.
    Drop,
}

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// What was done with it.
    pub action: Action,
    /// The counter that rose by one.
    pub reason: String,
    /// How it looks now.
    pub packet: Vec<u8>,
}

/// One of the things that may become of a packet.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The counter that it is counted in.
    pub reason: &'static str,
    /// What is done with it.
    pub fate: Fate,
    /// What is remembered of it.
    pub effect: Effect,
    /// Set if the packet's source port is not the one in [`Outcome::fate`], but one of these.
    pub source_port: Option<Choice>,
}

/// What is done with a packet.
#[derive(Clone, Debug)]
pub enum Fate {
    /// It goes to the stack as it came.
    Untouched,
    /// It goes to the stack like this.
    Handed(Packet),
    /// It is sent out like this.
    Sent(Packet),
    /// Its sender gets an answer.
    Answered(Answer),
    /// It ends here.
    Dropped,
}

/// What a sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// TCP RST (RFC 9293, section 3.10.7.1).
    Reset,
    /// Port unreachable (RFC 792; RFC 4443, section 3.1).
    Unreachable,
    /// Echo reply (RFC 792; RFC 4443, section 4.2).
    Echo,
}

/// What is remembered of a packet.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Nothing.
    Nothing,
    /// That this flow was opened.
    Opens(Box<Flow>),
    /// That a backend was chosen for a flow that was not opened, of the service that backends know so.
    Tries((String, Protocol, u16)),
    /// That the flow of this number carried it.
    Carries(usize),
}

/// Source ports of which any may be taken.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The SNAT range.
    pub range: RangeInclusive<u16>,
    /// But for those that are taken.
    pub taken: BTreeSet<u16>,
}

impl Outcome {
    pub(super) fn new(reason: &'static str, fate: Fate) -> Self {
        Self { reason, fate, effect: Effect::Nothing, source_port: None }
    }

    pub(super) fn untouched(reason: &'static str) -> Self {
        Self::new(reason, Fate::Untouched)
    }

    pub(super) fn dropped(reason: &'static str) -> Self {
        Self::new(reason, Fate::Dropped)
    }

    pub(super) fn with(self, effect: Effect) -> Self {
        Self { effect, ..self }
    }

    /// The same, with this source port.
    #[must_use]
    pub fn with_source_port(mut self, port: u16) -> Self {
        if let Fate::Handed(packet) | Fate::Sent(packet) = &mut self.fate
            && let Body::Segment(segment) = &mut packet.body
        {
            segment.source_port = port;
        }
        if let Effect::Opens(flow) = &mut self.effect {
            flow.reply.destination.set_port(port);
        }
        self.source_port = None;
        self
    }

    /// This outcome, with all that it left open, if it is what became of a packet.
    pub fn confirmed(&self, given: &Packet, ran: &Ran) -> Option<Self> {
        if self.reason != ran.reason {
            return None;
        }
        let outcome = match &self.source_port {
            None => self.clone(),
            Some(choice) => {
                let (Fate::Handed(packet) | Fate::Sent(packet)) = &self.fate else { return None };
                let at = packet.transport_offset();
                let port = u16::from_be_bytes(ran.packet.get(at..at + 2)?.try_into().ok()?);
                if !choice.range.contains(&port) || choice.taken.contains(&port) {
                    return None;
                }
                self.clone().with_source_port(port)
            }
        };
        let is_so = match (&outcome.fate, ran.action) {
            (Fate::Untouched, Action::Pass) => ran.packet == given.bytes(),
            (Fate::Handed(packet), Action::Pass) | (Fate::Sent(packet), Action::Send) => ran.packet == packet.bytes(),
            (Fate::Answered(answer), Action::Send) => answer.faults(given, &ran.packet).is_ok(),
            (Fate::Dropped, Action::Drop) => true,
            _ => false,
        };
        is_so.then_some(outcome)
    }
}

impl Answer {
    /// What is wrong with an answer to this packet, if that is what it is to be.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn faults(self, given: &Packet, answer: &[u8]) -> Result<(), String> {
        check_checksums(answer)?;
        let parsed = SlicedPacket::from_ethernet(answer).map_err(|error| error.to_string())?;
        let link = Ethernet2Slice::from_slice_without_fcs(answer).map_err(|error| error.to_string())?;
        same("Ethernet addresses", &(link.destination(), link.source()), &given.ethernet)?;
        let (source, destination, ttl) = addresses(&parsed).ok_or("not IP")?;
        same("addresses", &(source, destination), &(given.destination, given.source))?;
        if ttl < 32 {
            return Err(format!("it does not get far with a TTL of {ttl}"));
        }
        let quote = |at: usize| {
            // What fits: RFC 1812, section 4.3.2.3; RFC 4443, section 2.4(c).
            let limit = if source.is_ipv4() { 576 } else { 1280 };
            let least = if source.is_ipv4() { 28 } else { 48 };
            let (quoted, whole) = (&answer[at..], &given.bytes()[14..]);
            if answer.len() - 14 > limit || quoted.len() < least.min(whole.len()) || !whole.starts_with(quoted) {
                return Err(format!("it quotes {} bytes of {}, or others", quoted.len(), whole.len()));
            }
            Ok(())
        };
        match (self, &given.body, &parsed.transport) {
            (Self::Reset, Body::Segment(asked), Some(TransportSlice::Tcp(reset))) => is_reset_of(asked, reset),
            (Self::Unreachable, Body::Segment(_), Some(TransportSlice::Icmpv4(icmp))) => {
                same("type and code", &(icmp.type_u8(), icmp.code_u8()), &(3, 3))?;
                same("unused bytes", &icmp.bytes5to8(), &[0; 4])?;
                quote(14 + 20 + 8)
            }
            (Self::Unreachable, Body::Segment(_), Some(TransportSlice::Icmpv6(icmp))) => {
                same("type and code", &(icmp.type_u8(), icmp.code_u8()), &(1, 4))?;
                same("unused bytes", &icmp.bytes5to8(), &[0; 4])?;
                quote(14 + 40 + 8)
            }
            (Self::Echo, Body::Echo { .. }, Some(TransportSlice::Icmpv4(icmp))) => {
                same("type and code", &(icmp.type_u8(), icmp.code_u8()), &(0, 0))?;
                same("rest", &icmp.slice()[4..], &given.bytes()[14 + 20 + 4..])
            }
            (Self::Echo, Body::Echo { .. }, Some(TransportSlice::Icmpv6(icmp))) => {
                same("type and code", &(icmp.type_u8(), icmp.code_u8()), &(129, 0))?;
                same("rest", &icmp.slice()[4..], &given.bytes()[14 + 40 + 4..])
            }
            _ => Err(format!("it is no {self:?}")),
        }
    }
}

/// RFC 9293, section 3.10.7.1: believable to the sender of a segment that no connection takes.
fn is_reset_of(asked: &Segment, reset: &TcpSlice<'_>) -> Result<(), String> {
    let Header::Tcp { flags, sequence, acknowledgment } = asked.header else { return Err("not asked by TCP".into()) };
    same("ports", &(reset.source_port(), reset.destination_port()), &(asked.destination_port, asked.source_port))?;
    let length = u32::try_from(asked.payload.len()).expect("packets in tests are small");
    let end = sequence.wrapping_add(length + u32::from(flags.syn) + u32::from(flags.fin));
    let got = (reset.sequence_number(), reset.ack(), if reset.ack() { reset.acknowledgment_number() } else { 0 });
    let right = if flags.ack { (acknowledgment, false, 0) } else { (0, true, end) };
    same("sequence number, ACK, acknowledgement number", &got, &right)?;
    same("RST, SYN, FIN", &(reset.rst(), reset.syn(), reset.fin()), &(true, false, false))?;
    same("payload", reset.payload(), &[][..])
}

fn addresses(packet: &SlicedPacket<'_>) -> Option<(IpAddr, IpAddr, u8)> {
    match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            Some((header.source_addr().into(), header.destination_addr().into(), header.ttl()))
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            Some((header.source_addr().into(), header.destination_addr().into(), header.hop_limit()))
        }
        NetSlice::Arp(_) => None,
    }
}

fn same<T: PartialEq + fmt::Debug + ?Sized>(what: &str, got: &T, right: &T) -> Result<(), String> {
    if got == right { Ok(()) } else { Err(format!("{what}: {got:?} is not {right:?}")) }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.reason)?;
        match &self.fate {
            Fate::Untouched => f.write_str("to the stack as it came"),
            Fate::Dropped => f.write_str("dropped"),
            Fate::Answered(answer) => write!(f, "answered: {answer:?}"),
            Fate::Handed(packet) => write!(f, "to the stack as {packet}"),
            Fate::Sent(packet) => write!(f, "sent as {packet}"),
        }?;
        match &self.source_port {
            None => Ok(()),
            Some(Choice { range, taken }) => {
                write!(f, ", but from a port of {}-{} other than {taken:?}", range.start(), range.end())
            }
        }
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mac = |address: [u8; 6]| address.map(|byte| format!("{byte:02x}")).join(":");
        f.write_str(&describe(&self.bytes()))?;
        match &self.body {
            Body::Segment(Segment { source_port, destination_port, cut: Some(cut), .. }) => write!(
                f,
                ": the first {} bytes of packet {:#x}, ports {source_port} > {destination_port}",
                cut.at, cut.identification
            )?,
            Body::LaterPiece(piece) => {
                write!(f, ": bytes from {} of packet {:#x}", piece.offset, piece.identification)?;
            }
            Body::Error(error) => write!(f, " about {} bytes of ({})", error.length, describe(&error.quoted.bytes()))?,
            _ => {}
        }
        write!(f, ", {} > {}", mac(self.ethernet.0), mac(self.ethernet.1))
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let checksums = check_checksums(&self.packet).err().map_or(String::new(), |wrong| format!(" ({wrong})"));
        write!(f, "{}: {:?} of {}{checksums}", self.reason, self.action, describe(&self.packet))
    }
}
