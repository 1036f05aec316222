//! The entries of `SOURCES`: which clients are let in to a service.

use std::net::IpAddr;

use ipnet::IpNet;
use lb_common::{
    abi::{self, SourceKey},
    net::{self, Address as _, Ipv4Be, Ipv6Be},
};

/// A key of `SOURCES`, of our making or not. Two that the kernel takes for one are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceRange {
    /// How many bits of the words have to match.
    length: u32,
    /// The service's id and the address, as the key has them; zero beyond what has to match.
    words: [u32; 5],
}

impl SourceRange {
    /// That of a range of clients of a service: the whole id has to match, and the address up to the range's prefix length.
    pub fn new(service: u32, range: &IpNet) -> Self {
        let length = SourceKey::prefix_length(u32::from(range.prefix_len()));
        Self::of_key(length, SourceKey::new(service, net::words(range.network())))
    }

    /// That of which this many bits have to match.
    pub fn of_key(length: u32, SourceKey { service, address: [a, b, c, d] }: SourceKey) -> Self {
        let mut words = [service, a, b, c, d];
        for (word, before) in words.iter_mut().zip((0..).step_by(u32::BITS as usize)) {
            let bits = length.saturating_sub(before).min(u32::BITS);
            // The kernel compares from the first byte on.
            *word &= u32::MAX.checked_shl(u32::BITS - bits).unwrap_or(0).to_be();
        }
        Self { length, words }
    }

    /// How many bits have to match, and of what.
    pub fn key(&self) -> (u32, SourceKey) {
        let [service, a, b, c, d] = self.words;
        (self.length, SourceKey { service, address: [a, b, c, d] })
    }

    /// The service and its range, by the value of the entry; `None` if it is none of ours, which only drift makes.
    pub fn range(&self, family: u32) -> Option<(u32, IpNet)> {
        let (length, key) = self.key();
        let address: IpAddr = match family {
            abi::SOURCES_IPV4 => Ipv4Be::from_words(key.words()).into(),
            abi::SOURCES_IPV6 => Ipv6Be::from_words(key.words()).into(),
            _ => return None,
        };
        let length = length.checked_sub(SourceKey::prefix_length(0))?;
        Some((key.service, IpNet::new(address, u8::try_from(length).ok()?).ok()?))
    }

    /// What it lets in, by the value of the entry.
    pub fn text(&self, family: u32) -> String {
        match self.range(family) {
            Some((service, range)) => format!("{range} to service {service}"),
            None => format!("{} bits of {:x?}", self.length, self.words),
        }
    }
}

/// The value of an entry with this range.
pub fn family(range: &IpNet) -> u32 {
    if range.addr().is_ipv4() { abi::SOURCES_IPV4 } else { abi::SOURCES_IPV6 }
}
