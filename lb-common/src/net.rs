//! Addresses, ports and protocol numbers, in the byte order of the wire.
//!
//! None of these types does arithmetic: a value in network order is compared, copied and
//! hashed, and becomes a number only through `to_host`.

use core::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use network_types::ip::IpProto as WireProto;

/// One IP family, as a type: the packet pipeline is generic over it and compiled once for each.
pub trait Family: Copy + 'static {
    /// The family's address.
    type Address: Address;
    /// The protocol number that Ethernet carries for the family.
    const ETHER_TYPE: EtherType;
    /// The socket address family (`AF_INET`, `AF_INET6`), for the FIB lookup.
    const AF: u8;
    /// The family's number: 4 or 6.
    const NUMBER: u32;
    /// The traffic class as the `tos`/`flowinfo` word of the kernel's FIB lookup wants it: IPv4 in the first byte
    /// of the word in memory, IPv6 in the flow information's traffic class bits (network order).
    fn fib_class(traffic_class: u8) -> u32;
}

/// IP version 4.
#[derive(Clone, Copy, Debug)]
pub struct V4;

/// IP version 6.
#[derive(Clone, Copy, Debug)]
pub struct V6;

impl Family for V4 {
    type Address = Ipv4Be;
    const ETHER_TYPE: EtherType = EtherType::IPV4;
    const AF: u8 = 2;
    const NUMBER: u32 = 4;

    #[inline(always)]
    fn fib_class(traffic_class: u8) -> u32 {
        u32::from_ne_bytes([traffic_class, 0, 0, 0])
    }
}

impl Family for V6 {
    type Address = Ipv6Be;
    const ETHER_TYPE: EtherType = EtherType::IPV6;
    const AF: u8 = 10;
    const NUMBER: u32 = 6;

    #[inline(always)]
    fn fib_class(traffic_class: u8) -> u32 {
        (u32::from(traffic_class) << 20).to_be()
    }
}

/// What the pipeline needs of an address, whatever its family.
pub trait Address: Copy + Eq + Into<IpAddr> + 'static {
    /// No address: the unspecified one, all zeros.
    const UNSPECIFIED: Self;
    /// What fills the struct of an address and two 16-bit numbers up to the address's alignment.
    type Padding: Copy + Eq + fmt::Debug + Default;
    /// The address as two 64-bit words in network order; IPv4 uses the first four bytes in memory, the rest are zero.
    fn to_words(self) -> [u64; 2];
    /// The inverse of [`Address::to_words`]; IPv4 ignores all bytes but the first four.
    fn from_words(words: [u64; 2]) -> Self;
    /// The sum of the address's 16-bit words, not folded: at most 8 × 0xFFFF.
    fn sum16(self) -> u32;
    /// Whether it names the host that it is used on: a loopback address, or the unspecified one, which connect(2) takes for that.
    fn is_this_host(self) -> bool;
    /// An address that no host has, for the network namespace with this cookie: sockets there are one client, whatever
    /// address they will send from.
    fn of_namespace(cookie: u64) -> Self;
    /// Whether it can be the address of one host on a network: not unspecified, loopback, multicast or broadcast.
    fn is_single_host(self) -> bool;
}

/// An IPv4 address in network order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Ipv4Be(u32);

/// An IPv6 address in network order, in 64-bit words: the verifier wants stack memory to be
/// accessed as it is aligned, and two wide accesses are faster than four.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Ipv6Be([u64; 2]);

/// A TCP or UDP port in network order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Port(u16);

/// The protocol number of an Ethernet frame or a VLAN tag, in network order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EtherType(u16);

/// An IP protocol number, in host order: one byte on the wire, two here, so that map keys need no padding of odd size.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct IpProto(pub u16);

/// The kernel's number of a network interface, in host order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IfIndex(pub u32);

impl IfIndex {
    /// The loopback interface's, in every network namespace (`LOOPBACK_IFINDEX` in the kernel's `include/net/flow.h`).
    pub const LOOPBACK: Self = Self(1);
}

/// An Ethernet address.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MacAddr(pub [u8; 6]);

impl Address for Ipv4Be {
    const UNSPECIFIED: Self = Self(0);
    type Padding = [u32; 0];

    #[inline(always)]
    fn to_words(self) -> [u64; 2] {
        [u64::from_le(u64::from(u32::from_le(self.0))), 0]
    }

    #[inline(always)]
    fn from_words([word, _]: [u64; 2]) -> Self {
        Self(u32::to_le(u64::to_le(word) as u32))
    }

    #[inline(always)]
    fn sum16(self) -> u32 {
        (self.0 >> 16) + (self.0 & 0xFFFF)
    }

    #[inline(always)]
    fn is_this_host(self) -> bool {
        self == Self::UNSPECIFIED || self.to_bytes()[0] == 127
    }

    #[inline(always)]
    fn of_namespace(cookie: u64) -> Self {
        // In "this network", 0.0.0.0/8. Cookies are counted from 1 on, so these differ.
        let [_, bytes @ ..] = (cookie as u32).to_be_bytes();
        Self::from_bytes([0, bytes[0], bytes[1], bytes[2]])
    }

    #[inline(always)]
    fn is_single_host(self) -> bool {
        // Of class D and E, and "this network" and loopback (RFC 1122, section 3.2.1.3), none is.
        let [first, ..] = self.to_bytes();
        !matches!(first, 0 | 127 | 224..)
    }
}

impl Ipv4Be {
    /// From the bytes of a header, as they stand there.
    #[inline(always)]
    pub const fn from_bytes(bytes: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(bytes))
    }

    /// The bytes as a header holds them.
    #[inline(always)]
    pub const fn to_bytes(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }
}

impl Address for Ipv6Be {
    const UNSPECIFIED: Self = Self([0; 2]);
    type Padding = [u32; 1];

    #[inline(always)]
    fn to_words(self) -> [u64; 2] {
        self.0
    }

    #[inline(always)]
    fn from_words(words: [u64; 2]) -> Self {
        Self(words)
    }

    #[inline(always)]
    fn sum16(self) -> u32 {
        let [a, b] = self.0;
        let sum = |word: u64| Ipv4Be((word >> 32) as u32).sum16() + Ipv4Be(word as u32).sum16();
        sum(a) + sum(b)
    }

    #[inline(always)]
    fn is_this_host(self) -> bool {
        let [high, low] = self.0;
        high == 0 && (low == 0 || low == u64::to_be(1))
    }

    #[inline(always)]
    fn of_namespace(cookie: u64) -> Self {
        // In ::/8, of which no host has any (RFC 4291, section 4).
        Self([0, cookie.to_be()])
    }

    #[inline(always)]
    fn is_single_host(self) -> bool {
        let [a, b] = self.0;
        let [first, ..] = a.to_ne_bytes();
        // Multicast (RFC 4291, section 2.7), `::` and `::1`.
        first != 0xFF && !(a == 0 && u64::from_be(b) <= 1)
    }
}

impl Ipv6Be {
    /// From the bytes of a header, as they stand there.
    #[inline(always)]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let [a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7] = bytes;
        Self([
            u64::from_ne_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            u64::from_ne_bytes([b0, b1, b2, b3, b4, b5, b6, b7]),
        ])
    }

    /// The bytes as a header holds them.
    #[inline(always)]
    pub const fn to_bytes(self) -> [u8; 16] {
        let [a, b] = self.0;
        let [a0, a1, a2, a3, a4, a5, a6, a7] = a.to_ne_bytes();
        let [b0, b1, b2, b3, b4, b5, b6, b7] = b.to_ne_bytes();
        [a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7]
    }
}

/// The halves of a word of an address, in the order in which they stand in memory.
#[inline(always)]
pub const fn halves(word: u64) -> (u32, u32) {
    let (high, low) = ((word >> 32) as u32, word as u32);
    if cfg!(target_endian = "big") { (high, low) } else { (low, high) }
}

/// The inverse of [`halves`].
#[inline(always)]
pub const fn whole(first: u32, second: u32) -> u64 {
    let (high, low) = if cfg!(target_endian = "big") { (first, second) } else { (second, first) };
    (high as u64) << 32 | low as u64
}

impl Port {
    /// From the bytes of a header, as they stand there.
    #[inline(always)]
    pub const fn from_bytes(bytes: [u8; 2]) -> Self {
        Self(u16::from_ne_bytes(bytes))
    }

    /// The bytes as a header holds them.
    #[inline(always)]
    pub const fn to_bytes(self) -> [u8; 2] {
        self.0.to_ne_bytes()
    }

    /// From a port number in host order.
    #[inline(always)]
    pub const fn from_host(port: u16) -> Self {
        Self(port.to_be())
    }

    /// The port number in host order.
    #[inline(always)]
    pub const fn to_host(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The 16-bit word as checksums and hashes read it: network order, uninterpreted.
    #[inline(always)]
    pub const fn word(self) -> u16 {
        self.0
    }
}

impl EtherType {
    /// IPv4 (RFC 894).
    pub const IPV4: Self = Self::from_host(0x0800);
    /// IPv6 (RFC 2464).
    pub const IPV6: Self = Self::from_host(0x86DD);
    /// A customer VLAN tag (IEEE 802.1Q).
    pub const VLAN: Self = Self::from_host(0x8100);
    /// A service VLAN tag (IEEE 802.1ad).
    pub const SERVICE_VLAN: Self = Self::from_host(0x88A8);

    /// From a number in host order.
    pub const fn from_host(number: u16) -> Self {
        Self(number.to_be())
    }

    /// From the bytes of a header, as they stand there.
    #[inline(always)]
    pub const fn from_bytes(bytes: [u8; 2]) -> Self {
        Self(u16::from_ne_bytes(bytes))
    }

    /// Whether a VLAN tag follows.
    #[inline(always)]
    pub fn is_vlan(self) -> bool {
        self == Self::VLAN || self == Self::SERVICE_VLAN
    }
}

impl IpProto {
    /// Transmission Control Protocol.
    pub const TCP: Self = Self(WireProto::Tcp as u16);
    /// User Datagram Protocol.
    pub const UDP: Self = Self(WireProto::Udp as u16);
    /// Stream Control Transmission Protocol.
    pub const SCTP: Self = Self(WireProto::Sctp as u16);
    /// Internet Control Message Protocol.
    pub const ICMP: Self = Self(WireProto::Icmp as u16);
    /// The same for IPv6.
    pub const ICMPV6: Self = Self(WireProto::Ipv6Icmp as u16);
}

impl From<Ipv4Addr> for Ipv4Be {
    fn from(address: Ipv4Addr) -> Self {
        Self::from_bytes(address.octets())
    }
}

impl From<Ipv4Be> for Ipv4Addr {
    fn from(address: Ipv4Be) -> Self {
        Self::from(address.to_bytes())
    }
}

impl From<Ipv6Addr> for Ipv6Be {
    fn from(address: Ipv6Addr) -> Self {
        Self::from_bytes(address.octets())
    }
}

impl From<Ipv6Be> for Ipv6Addr {
    fn from(address: Ipv6Be) -> Self {
        Self::from(address.to_bytes())
    }
}

impl From<Ipv4Be> for IpAddr {
    fn from(address: Ipv4Be) -> Self {
        Self::V4(address.into())
    }
}

impl From<Ipv6Be> for IpAddr {
    fn from(address: Ipv6Be) -> Self {
        Self::V6(address.into())
    }
}

/// The words of an address of either family, as [`Address::to_words`] gives them.
pub fn words(address: IpAddr) -> [u64; 2] {
    match address {
        IpAddr::V4(address) => Ipv4Be::from(address).to_words(),
        IpAddr::V6(address) => Ipv6Be::from(address).to_words(),
    }
}

impl fmt::Debug for Ipv4Be {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Ipv4Addr::from(*self), f)
    }
}

impl fmt::Debug for Ipv6Be {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Ipv6Addr::from(*self), f)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_host(), f)
    }
}

impl fmt::Debug for IpProto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TCP => f.write_str("tcp"),
            Self::UDP => f.write_str("udp"),
            Self::SCTP => f.write_str("sctp"),
            Self(number) => write!(f, "protocol {number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_through_words() {
        let v4 = Ipv4Addr::new(192, 0, 2, 7);
        let v6: Ipv6Addr = "2001:db8::7".parse().unwrap();
        assert_eq!(Ipv4Addr::from(Ipv4Be::from_words(words(v4.into()))), v4);
        assert_eq!(Ipv6Addr::from(Ipv6Be::from_words(words(v6.into()))), v6);
    }

    #[test]
    fn this_host_has_the_unspecified_addresses_and_those_of_loopback() {
        let is_v4 = |text: &str| Ipv4Be::from(text.parse::<Ipv4Addr>().unwrap()).is_this_host();
        let is_v6 = |text: &str| Ipv6Be::from(text.parse::<Ipv6Addr>().unwrap()).is_this_host();
        assert!(["0.0.0.0", "127.0.0.1", "127.255.0.1"].into_iter().all(is_v4));
        assert!(!["0.0.0.1", "126.0.0.1", "128.0.0.1", "1.0.0.127"].into_iter().any(is_v4));
        assert!(["::", "::1"].into_iter().all(is_v6));
        assert!(!["::2", "1::1", "::1:0:0:1", "::ffff:127.0.0.1"].into_iter().any(is_v6));
    }

    #[test]
    fn namespaces_are_clients_that_no_host_can_be() {
        for cookie in [1, 2, 0xFF, 0x100, 0xAB_CDEF] {
            let (v4, v6) = (Ipv4Be::of_namespace(cookie), Ipv6Be::of_namespace(cookie));
            assert!(!v4.is_single_host() && !v4.is_this_host(), "{cookie}");
            assert_ne!((v4, v6), (Ipv4Be::of_namespace(cookie + 1), Ipv6Be::of_namespace(cookie + 1)));
            assert_eq!(u32::from(Ipv4Addr::from(v4)), cookie as u32);
            assert_eq!(u128::from(Ipv6Addr::from(v6)), u128::from(cookie));
        }
    }

    #[test]
    fn ports_hold_network_order() {
        assert_eq!(Port::from_host(80).to_bytes(), [0, 80]);
        assert_eq!(Port::from_bytes([0x1F, 0x90]).to_host(), 8080);
    }
}
