//! Flows: the tuple that names one, its hashes, its states and how long each lasts.

use crate::{
    abi::FlowKey,
    net::{Address, IpProto},
};

/// Which way the packets of a flow entry go.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the client to the service.
    Request = 0,
    /// From the backend back to the client.
    Reply = 1,
}

impl Direction {
    /// The other one.
    #[inline(always)]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Request => Self::Reply,
            Self::Reply => Self::Request,
        }
    }
}

/// The state of a flow entry; each direction of a flow has its own.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// A TCP connection of which only SYNs went this way.
    Opening = 0,
    /// A TCP connection that carries data.
    Established = 1,
    /// A TCP connection whose sender on this side is done: a FIN went this way, or a RST any way.
    Closing = 2,
    /// A UDP flow: there are no states to tell apart.
    Datagram = 3,
    /// What is left among the pending flows of one that is established by now.
    Promoted = 4,
}

/// A point in time as flows remember it: `CLOCK_MONOTONIC` in units of 2^30 ns, about a second.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Tick(pub u32);

impl Tick {
    /// Of a time in ns.
    #[inline(always)]
    pub const fn from_ns(ns: u64) -> Self {
        Self((ns >> 30) as u32)
    }

    /// How many ticks have passed since an earlier one; zero if that is later, as another CPU's clock may say.
    #[inline(always)]
    pub const fn since(self, earlier: u32) -> u32 {
        self.0.saturating_sub(earlier)
    }

    /// At least so many seconds, in ticks.
    pub const fn from_seconds(seconds: u32) -> u32 {
        ((seconds as u64 * 1_000_000_000).div_ceil(1 << 30)) as u32
    }
}

/// How long an entry lives without a packet, in ticks, by its state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// Of [`State::Opening`].
    pub opening: u32,
    /// Of [`State::Established`].
    pub established: u32,
    /// Of [`State::Closing`].
    pub closing: u32,
    /// Of [`State::Datagram`].
    pub datagram: u32,
}

impl Timeouts {
    /// As long as a packet may be underway between two CPUs that look at a flow at once.
    const PROMOTED: u32 = 2;

    /// The timeout of a state, in ticks.
    #[inline(always)]
    pub const fn of(&self, state: State) -> u32 {
        match state {
            State::Opening => self.opening,
            State::Established => self.established,
            State::Closing => self.closing,
            State::Datagram => self.datagram,
            State::Promoted => Self::PROMOTED,
        }
    }
}

impl State {
    /// From the byte in a flow entry; an unknown one reads as closing, the state that trusts the least.
    #[inline(always)]
    pub const fn from_raw(raw: u8) -> Self {
        match raw {
            0 => Self::Opening,
            1 => Self::Established,
            3 => Self::Datagram,
            4 => Self::Promoted,
            _ => Self::Closing,
        }
    }

    /// The state after one more packet with these flags.
    #[inline(always)]
    pub const fn after(self, flags: TcpFlags) -> Self {
        match self {
            Self::Datagram => Self::Datagram,
            Self::Closing => Self::Closing,
            Self::Promoted => Self::Promoted,
            Self::Opening | Self::Established if flags.ends() => Self::Closing,
            // Neither SYN nor SYN-ACK: only what follows shows that both ends mean it, and not a sender with a forged address.
            Self::Opening if flags.is_syn() => Self::Opening,
            Self::Opening | Self::Established => Self::Established,
        }
    }
}

/// The flag byte of a TCP header (RFC 9293, section 3.1), or what is alike for SCTP; zero for UDP.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Opens a connection.
    pub const SYN: u8 = 0x02;
    /// Resets the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;

    /// The flags that mean for TCP what an SCTP packet's first chunk means (RFC 9260, section 3.2).
    #[inline(always)]
    pub const fn of_sctp_chunk(chunk: u8) -> Self {
        Self(match chunk {
            // INIT; INIT ACK; ABORT; SHUTDOWN, SHUTDOWN ACK, which is the other end's, and SHUTDOWN COMPLETE.
            1 => Self::SYN,
            2 => Self::SYN | Self::ACK,
            6 => Self::RST | Self::ACK,
            7 | 8 | 14 => Self::FIN | Self::ACK,
            _ => Self::ACK,
        })
    }

    /// Whether this asks for a new connection: SYN and none of ACK, RST, FIN.
    #[inline(always)]
    pub const fn opens(self) -> bool {
        self.0 & (Self::SYN | Self::ACK | Self::RST | Self::FIN) == Self::SYN
    }

    /// Whether SYN is set, with or without ACK.
    #[inline(always)]
    pub const fn is_syn(self) -> bool {
        self.0 & Self::SYN != 0
    }

    /// Whether the connection is over for both sides.
    #[inline(always)]
    pub const fn resets(self) -> bool {
        self.0 & Self::RST != 0
    }

    /// Whether the sender is done: FIN or RST.
    #[inline(always)]
    pub const fn ends(self) -> bool {
        self.0 & (Self::FIN | Self::RST) != 0
    }
}

impl<A: Address> FlowKey<A> {
    /// The key of a packet between two endpoints.
    #[inline(always)]
    pub const fn new(source: A, destination: A, ports: (crate::net::Port, crate::net::Port), proto: IpProto) -> Self {
        Self { source, destination, source_port: ports.0, destination_port: ports.1, proto, _pad: 0 }
    }

    /// The key of a packet that answers this one.
    #[inline(always)]
    pub const fn reversed(self) -> Self {
        Self::new(self.destination, self.source, (self.destination_port, self.source_port), self.proto)
    }

    /// A well-mixed hash of the whole tuple, the same on every machine of one byte order.
    #[inline(always)]
    pub fn hash(&self) -> u64 {
        let ports = u64::from(self.source_port.word()) << 32
            | u64::from(self.destination_port.word()) << 16
            | u64::from(self.proto.0);
        mix(mix_address(self.destination, mix_address(self.source, 0)) ^ ports)
    }

    /// A well-mixed hash of the client's address alone.
    #[inline(always)]
    pub fn source_hash(&self) -> u64 {
        mix_address(self.source, 0)
    }

    /// The check that a flow entry carries of its key; see [`crate::abi::Flow::check`].
    ///
    /// Cheaper than [`FlowKey::hash`], since it only has to differ, not to spread.
    #[inline(always)]
    pub fn check(&self) -> u32 {
        let [a, b] = self.source.to_words();
        let [c, d] = self.destination.to_words();
        let ports = u64::from(self.source_port.word()) << 16 | u64::from(self.destination_port.word());
        let sum = a ^ b.rotate_left(17) ^ c.rotate_left(32) ^ d.rotate_left(49);
        let product = (sum ^ ports.rotate_left(28) ^ u64::from(self.proto.0)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (product >> 32) as u32
    }
}

#[inline(always)]
fn mix_address<A: Address>(address: A, seed: u64) -> u64 {
    let [a, b] = address.to_words();
    let first = mix(seed ^ a);
    // For IPv4 the size is known at compile time, and the second round disappears.
    if size_of::<A>() > 8 { mix(first ^ b) } else { first }
}

/// The finalizer of `MurmurHash3` (public domain, Austin Appleby), after an odd increment so that zero is not a fixed point.
#[inline(always)]
const fn mix(value: u64) -> u64 {
    let mut hash = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    hash ^ (hash >> 33)
}

/// A well-mixed hash of any 64-bit value; Maglev's permutations are made with it.
pub const fn hash64(value: u64) -> u64 {
    mix(value)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::net::{Ipv4Be, Port};

    fn key(client: u32, port: u16) -> FlowKey<Ipv4Be> {
        FlowKey::new(
            Ipv4Be::from_bytes((0x0A00_0000 + client).to_be_bytes()),
            Ipv4Be::from_bytes([192, 0, 2, 1]),
            (Port::from_host(port), Port::from_host(80)),
            IpProto::TCP,
        )
    }

    #[test]
    fn reversing_twice_changes_nothing() {
        assert_eq!(key(1, 2).reversed().reversed(), key(1, 2));
        assert_ne!(key(1, 2).reversed(), key(1, 2));
    }

    #[test]
    fn neighbouring_flows_spread_evenly() {
        let mut buckets = [0_u32; 16];
        for client in 0..64 {
            for port in 1024..2048 {
                buckets[(key(client, port).hash() >> 60) as usize] += 1;
            }
        }
        // 4,096 a bucket; four standard deviations are 248.
        assert!(buckets.iter().all(|count| count.abs_diff(4096) < 248), "{buckets:?}");
    }

    #[test]
    fn checks_of_neighbouring_flows_differ() {
        let checks: HashSet<_> = (0..64).flat_map(|c| (1024..2048).map(move |p| key(c, p).check())).collect();
        assert!(checks.len() > 65_530, "{}", checks.len());
        assert_ne!(key(1, 2).check(), key(1, 2).reversed().check());
    }

    #[test]
    fn tcp_states_follow_the_handshake() {
        let syn = TcpFlags(TcpFlags::SYN);
        let syn_ack = TcpFlags(TcpFlags::SYN | TcpFlags::ACK);
        let ack = TcpFlags(TcpFlags::ACK);
        let fin = TcpFlags(TcpFlags::FIN | TcpFlags::ACK);
        assert!(syn.opens() && !syn_ack.opens() && !ack.opens());
        assert_eq!(State::Opening.after(syn), State::Opening);
        assert_eq!(State::Opening.after(syn_ack), State::Opening, "the client may never have asked");
        assert_eq!(State::Opening.after(ack), State::Established);
        assert_eq!(State::Established.after(fin), State::Closing);
        assert_eq!(State::Closing.after(ack), State::Closing);
        assert_eq!(State::Datagram.after(TcpFlags(0)), State::Datagram);
    }
}
