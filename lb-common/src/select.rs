//! The choice of a backend for a new flow: pure, so the kernel and the agent can only agree.

use crate::{abi::FlowKey, net::Address};

/// How a service picks a backend for a new flow.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Algorithm {
    /// Any, each with the same chance a unit of weight.
    Random = 0,
    /// One after another, each as often as its weight says.
    RoundRobin = 1,
    /// By a hash of the whole tuple, over a table that changes little when the backends change.
    Maglev = 2,
    /// By a hash of the client's address alone, over the same kind of table.
    SourceHash = 3,
    /// Of two at random the one that has fewer live flows for its weight (Mitzenmacher, "The Power of Two Choices").
    LeastConnections = 4,
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Self; 5] = [Self::Random, Self::RoundRobin, Self::Maglev, Self::SourceHash, Self::LeastConnections];

    /// The name in files and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::Maglev => "maglev",
            Self::SourceHash => "source-hash",
            Self::LeastConnections => "least-connections",
        }
    }

    /// From the byte in a service's entry; an unknown one reads as random, which suits any table.
    #[inline(always)]
    pub const fn from_raw(raw: u8) -> Self {
        match raw {
            1 => Self::RoundRobin,
            2 => Self::Maglev,
            3 => Self::SourceHash,
            4 => Self::LeastConnections,
            _ => Self::Random,
        }
    }

    /// Whether the table has to be a Maglev table, and not one slot a unit of weight.
    pub const fn is_consistent(self) -> bool {
        matches!(self, Self::Maglev | Self::SourceHash)
    }
}

/// The slot, below `length`, that a new flow takes in its service's range.
///
/// `random` draws 32 random bits; `next` counts the service's picks. Only the algorithm
/// that needs one calls it. Any algorithm works on any table, so a service's algorithm and table
/// need not change in one store. `length` is not zero.
#[inline(always)]
pub fn slot_index<A: Address>(
    algorithm: Algorithm,
    length: u32,
    key: &FlowKey<A>,
    random: impl FnOnce() -> u32,
    next: impl FnOnce() -> u32,
) -> u32 {
    match algorithm {
        // Least-connections draws twice, and compares.
        Algorithm::Random | Algorithm::LeastConnections => scale(random(), length),
        // Not `%`: the compiler would have to see that the length is not zero, or call a panic that BPF has no room for.
        Algorithm::RoundRobin => next().checked_rem(length).unwrap_or(0),
        Algorithm::Maglev => scale((key.hash() >> 32) as u32, length),
        Algorithm::SourceHash => scale((key.source_hash() >> 32) as u32, length),
    }
}

/// Of two backends the one with fewer live flows for its weight; each is given as (live flows, weight above zero).
/// `true`: the second.
#[inline(always)]
pub const fn prefers_second(first: (u64, u16), second: (u64, u16)) -> bool {
    // Where both are alike the first stays: it was drawn by weight, so weights hold for idle backends, too.
    second.0 * (first.1 as u64) < first.0 * (second.1 as u64)
}

/// Maps 32 uniform bits to `0..length`, without a division (Lemire, "Fast random integer generation in an interval").
#[inline(always)]
const fn scale(bits: u32, length: u32) -> u32 {
    ((bits as u64 * length as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::net::{IpProto, Ipv6Be, Port};

    proptest! {
        #[test]
        fn every_choice_is_inside_the_table(
            algorithm in prop::sample::select(&Algorithm::ALL[..]),
            length in 1_u32.., client in any::<[u8; 16]>(), port in any::<u16>(), draw in any::<u32>(),
        ) {
            let key = FlowKey::new(
                Ipv6Be::from_bytes(client), Ipv6Be::default(), (Port::from_host(port), Port::from_host(80)), IpProto::UDP,
            );
            prop_assert!(slot_index(algorithm, length, &key, || draw, || draw) < length);
        }
    }

    #[test]
    fn names_and_numbers_are_one_to_one() {
        for algorithm in Algorithm::ALL {
            assert_eq!(Algorithm::from_raw(algorithm as u8), algorithm);
        }
    }

    #[test]
    fn fewer_flows_for_the_weight_are_preferred() {
        assert!(!prefers_second((0, 1), (0, 256)), "idle ones are alike");
        assert!(prefers_second((1, 1), (0, 1)) && !prefers_second((0, 1), (1, 1)));
        assert!(prefers_second((2, 1), (3, 2)) && !prefers_second((2, 1), (4, 2)));
    }

    #[test]
    fn scaling_spreads_over_the_whole_table() {
        assert_eq!(scale(0, 7), 0);
        assert_eq!(scale(u32::MAX, 7), 6);
        assert_eq!(scale(u32::MAX, u32::MAX), u32::MAX - 1);
    }
}
