//! Internet checksums, updated in place: RFC 1624, equation 3, `HC' = ~(~HC + ~m + m')`.
//!
//! The sum of 16-bit words in one's complement doesn't depend on byte order (RFC 1071, section 2),
//! so every word here is taken as it stands in memory.

use crate::net::{Address, Port};

/// An Internet checksum as a header holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Csum(u16);

/// What a set of replaced words adds to a checksum: the sum of `~m + m'` over them.
///
/// A flow's rewrite is the same for all of its packets, so its delta is computed once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Delta(u32);

impl Delta {
    /// Nothing replaced.
    pub const NONE: Self = Self(0);

    /// A 16-bit word, `old`, becomes `new`.
    #[inline(always)]
    pub const fn replace16(self, old: u16, new: u16) -> Self {
        Self(self.0 + (!old as u32) + new as u32)
    }

    /// A port becomes another.
    #[inline(always)]
    pub const fn replace_port(self, old: Port, new: Port) -> Self {
        self.replace16(old.word(), new.word())
    }

    /// An address becomes another: two words for IPv4, eight for IPv6.
    #[inline(always)]
    pub fn replace_address<A: Address>(self, old: A, new: A) -> Self {
        let words = (size_of::<A>() / 2) as u32;
        // The sum of the complements of n words is n × 0xFFFF less the sum of the words.
        Self(self.0 + (words * 0xFFFF - old.sum16()) + new.sum16())
    }

    /// Both of two sets.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        Self(fold(self.0) as u32 + fold(other.0) as u32)
    }

    /// What the set adds without those of its words that `part` stands for.
    #[inline(always)]
    pub const fn without(self, part: Self) -> Self {
        Self(fold(self.0) as u32 + (!fold(part.0)) as u32)
    }

    /// The delta in 16 bits, as a flow entry keeps it.
    #[inline(always)]
    pub const fn fold(self) -> u16 {
        fold(self.0)
    }

    /// From the 16 bits of a flow entry.
    #[inline(always)]
    pub const fn from_folded(folded: u16) -> Self {
        Self(folded as u32)
    }
}

impl Csum {
    /// From the bytes of a header, as they stand there.
    #[inline(always)]
    pub const fn from_bytes(bytes: [u8; 2]) -> Self {
        Self(u16::from_ne_bytes(bytes))
    }

    /// Of a sum of 16-bit words.
    #[inline(always)]
    pub const fn of_sum(sum: u32) -> Self {
        Self(!fold(sum))
    }

    /// The bytes as a header holds them.
    #[inline(always)]
    pub const fn to_bytes(self) -> [u8; 2] {
        self.0.to_ne_bytes()
    }

    /// The checksum after the words behind `delta` were replaced.
    #[inline(always)]
    pub const fn update(self, delta: Delta) -> Self {
        Self(!fold(!self.0 as u32 + fold(delta.0) as u32))
    }

    /// The same for UDP, where zero on the wire means that there is no checksum (RFC 768):
    /// an absent one stays absent, and one that comes out as zero is sent as 0xFFFF.
    #[inline(always)]
    pub const fn update_udp(self, delta: Delta) -> Self {
        if self.0 == 0 {
            return self;
        }
        match self.update(delta).0 {
            0 => Self(0xFFFF),
            sum => Self(sum),
        }
    }
}

/// A 32-bit sum of 16-bit words, folded with end-around carry.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let once = (sum >> 16) + (sum & 0xFFFF);
    ((once >> 16) + (once & 0xFFFF)) as u16
}

/// The checksum of `bytes` computed in full, `initial` being a sum to start from
/// (a pseudo-header's). The kernel never does this; tests hold the incremental results against it.
pub fn full(initial: u32, bytes: &[u8]) -> Csum {
    let mut sum = bytes.chunks(2).fold(u64::from(initial), |sum, word| {
        let word = [word.first().copied().unwrap_or(0), word.get(1).copied().unwrap_or(0)];
        sum + u64::from(u16::from_ne_bytes(word))
    });
    while sum > 0xFFFF {
        sum = (sum >> 16) + (sum & 0xFFFF);
    }
    Csum(!(sum as u16))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::net::{Ipv4Be, Ipv6Be};

    fn sum_of(bytes: &[u8]) -> Csum {
        full(0, bytes)
    }

    /// Two checksums say the same if both verify; 0x0000 and 0xFFFF are the two zeros of one's complement.
    fn same(a: Csum, b: Csum) -> bool {
        a == b || (a.0 == 0 && b.0 == 0xFFFF) || (a.0 == 0xFFFF && b.0 == 0)
    }

    proptest! {
        #[test]
        fn update_equals_full_recompute(
            mut bytes in proptest::collection::vec(any::<u8>(), 60),
            v4 in any::<[u8; 4]>(), v6 in any::<[u8; 16]>(), port in any::<[u8; 2]>(), word in any::<[u8; 2]>(),
        ) {
            let before = sum_of(&bytes);
            let delta = Delta::NONE
                .replace_address(Ipv4Be::from_bytes(bytes[0..4].try_into().unwrap()), Ipv4Be::from_bytes(v4))
                .replace_address(Ipv6Be::from_bytes(bytes[4..20].try_into().unwrap()), Ipv6Be::from_bytes(v6))
                .replace_port(Port::from_bytes([bytes[20], bytes[21]]), Port::from_bytes(port))
                .replace16(u16::from_ne_bytes([bytes[22], bytes[23]]), u16::from_ne_bytes(word));
            bytes[0..4].copy_from_slice(&v4);
            bytes[4..20].copy_from_slice(&v6);
            bytes[20..22].copy_from_slice(&port);
            bytes[22..24].copy_from_slice(&word);
            prop_assert!(same(before.update(delta), sum_of(&bytes)));
            prop_assert!(same(before.update(Delta::from_folded(delta.fold())), sum_of(&bytes)));
        }

        #[test]
        fn udp_never_sends_a_computed_zero(sum in any::<u16>(), old in any::<u16>(), new in any::<u16>()) {
            let updated = Csum(sum).update_udp(Delta::NONE.replace16(old, new));
            prop_assert_eq!(updated.0 == 0, sum == 0);
        }
    }

    #[test]
    fn a_udp_sum_that_comes_out_as_zero_is_sent_as_ones() {
        // The words before the change sum to 0xFFFE, after it to 0xFFFF, whose complement is zero.
        let before = Csum(!0xFFFE);
        assert_eq!(before.update(Delta::NONE.replace16(1, 2)), Csum(0));
        assert_eq!(before.update_udp(Delta::NONE.replace16(1, 2)), Csum(0xFFFF));
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // Section 4: HC = 0xDD2F, m = 0x5555, m' = 0x3285, and eqn. 3 gives 0x0000.
        assert_eq!(Csum(0xDD2F).update(Delta::NONE.replace16(0x5555, 0x3285)), Csum(0x0000));
    }
}
