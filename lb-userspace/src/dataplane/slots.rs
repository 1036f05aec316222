//! A backend set as slots: which backend id stands where.

use lb_common::{flow::hash64, maglev, net};

use crate::model::Algorithm;

/// A backend that takes new flows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) id: u32,
    pub(super) address: std::net::SocketAddr,
    /// Above zero.
    pub(super) weight: u16,
}

/// The slots of a service: backend ids, each as often as its weight says. Empty if there is no candidate.
pub(super) fn build(algorithm: Algorithm, candidates: &[Candidate]) -> Vec<u32> {
    match candidates {
        [] => Vec::new(),
        _ if algorithm.is_consistent() => consistent(candidates),
        _ => interleaved(candidates),
    }
}

/// One slot a unit of weight, weights reduced; the slots of a heavy backend stand evenly among the others, so that
/// round robin does not send it bursts.
fn interleaved(candidates: &[Candidate]) -> Vec<u32> {
    let divisor = candidates.iter().fold(0, |divisor, candidate| gcd(divisor, candidate.weight)).max(1);
    let mut turns: Vec<(u64, u32)> = candidates
        .iter()
        .flat_map(|candidate| {
            let weight = u64::from(candidate.weight / divisor);
            // The middle of the k-th of `weight` equal parts of the round.
            (0..weight).map(move |k| (((2 * k + 1) << 32) / (2 * weight), candidate.id))
        })
        .collect();
    turns.sort_by_key(|&(position, _)| position);
    turns.into_iter().map(|(_, id)| id).collect()
}

/// A Maglev table: the place of a backend depends on its address and port alone.
fn consistent(candidates: &[Candidate]) -> Vec<u32> {
    let size = maglev::table_size(u32::try_from(candidates.len()).unwrap_or(u32::MAX));
    let mut turns: Vec<_> = candidates
        .iter()
        .map(|candidate| {
            let [high, low] = net::words(candidate.address.ip());
            let identity = hash64(hash64(high) ^ low) ^ u64::from(candidate.address.port());
            maglev::Candidate::new(identity, u32::from(candidate.weight), size)
        })
        .collect();
    let mut table = vec![0; size as usize];
    maglev::fill(&mut table, &mut turns);
    table.iter().filter_map(|&index| candidates.get(index as usize)).map(|candidate| candidate.id).collect()
}

fn gcd(a: u16, b: u16) -> u16 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(weights: &[u16]) -> Vec<Candidate> {
        (0..)
            .zip(weights)
            .map(|(id, &weight)| Candidate { id, address: ([10, 0, 0, id as u8], 80).into(), weight })
            .collect()
    }

    #[test]
    fn equal_weights_take_one_slot_each() {
        assert_eq!(build(Algorithm::RoundRobin, &candidates(&[7, 7, 7])), [0, 1, 2]);
        assert!(build(Algorithm::Random, &[]).is_empty());
    }

    #[test]
    fn heavy_backends_are_spread_over_the_round() {
        assert_eq!(build(Algorithm::RoundRobin, &candidates(&[4, 2, 2])), [0, 1, 2, 0]);
        assert_eq!(build(Algorithm::RoundRobin, &candidates(&[1, 5])), [1, 1, 0, 1, 1, 1]);
    }

    #[test]
    fn consistent_tables_are_full_and_ignore_ids() {
        let table = build(Algorithm::Maglev, &candidates(&[1, 1, 2]));
        assert_eq!(table.len(), 509);
        let mut renumbered = candidates(&[1, 1, 2]);
        for candidate in &mut renumbered {
            candidate.id += 100;
        }
        let shifted: Vec<_> = build(Algorithm::Maglev, &renumbered).iter().map(|id| id - 100).collect();
        assert_eq!(shifted, table);
    }
}
