//! Maglev tables (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4),
//! with weights: a backend of twice the weight takes twice as many turns.

use crate::flow::hash64;

/// Table sizes: primes, about doubling. Each makes every backend's permutation reach each slot.
const SIZES: [u32; 11] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071, 262_139];

/// Slots a backend below which the shares of equal backends differ by more than about 1 % (the paper's section 5.3).
const SLOTS_A_BACKEND: u32 = 100;

/// The number of slots for so many backends: the smallest size with 100 slots a backend, or the largest size.
pub fn table_size(n_backends: u32) -> u32 {
    let wanted = n_backends.saturating_mul(SLOTS_A_BACKEND);
    SIZES.into_iter().find(|&size| size >= wanted).unwrap_or(262_139)
}

/// One backend's way through the slots while a table is filled.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    next: u32,
    skip: u32,
    weight: u32,
    credit: u32,
}

impl Candidate {
    /// A backend known by a hash of what it is (its address and port), never of its place in a list:
    /// so a change of the list moves few slots.
    pub const fn new(identity: u64, weight: u32, size: u32) -> Self {
        let next = (hash64(identity) % size as u64) as u32;
        let skip = (hash64(identity ^ 0x5DEE_CE66_D1CE_4E5B) % (size as u64 - 1)) as u32 + 1;
        Self { next, skip, weight, credit: 0 }
    }

    /// Takes the next slot of the permutation that nobody has.
    fn claim(&mut self, table: &mut [u32], index: u32) -> bool {
        let size = table.len() as u32;
        for _ in 0..size {
            let slot = self.next;
            self.next = (self.next + self.skip) % size;
            if let Some(entry) = table.get_mut(slot as usize)
                && *entry == EMPTY
            {
                *entry = index;
                return true;
            }
        }
        false
    }
}

const EMPTY: u32 = u32::MAX;

/// Fills `table` with indexes of `candidates`. The table's length is the size that the candidates were made for.
/// Without a candidate of weight above zero the table is left as indexes that name nobody (`u32::MAX`).
pub fn fill(table: &mut [u32], candidates: &mut [Candidate]) {
    table.fill(EMPTY);
    let heaviest = candidates.iter().map(|candidate| candidate.weight).max().unwrap_or(0);
    if heaviest == 0 {
        return;
    }
    let mut free = table.len();
    while free > 0 {
        for (index, candidate) in (0..).zip(candidates.iter_mut()) {
            candidate.credit += candidate.weight;
            if candidate.credit >= heaviest {
                candidate.credit -= heaviest;
                if candidate.claim(table, index) {
                    free -= 1;
                }
                if free == 0 {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(backends: &[(u64, u32)]) -> Vec<u32> {
        let size = table_size(backends.len() as u32);
        let mut candidates: Vec<_> =
            backends.iter().map(|&(identity, weight)| Candidate::new(identity, weight, size)).collect();
        let mut table = vec![0; size as usize];
        fill(&mut table, &mut candidates);
        table
    }

    fn shares(table: &[u32], n: usize) -> Vec<f64> {
        let mut counts = vec![0_u32; n];
        for &index in table {
            counts[index as usize] += 1;
        }
        counts.into_iter().map(|count| f64::from(count) / f64::from(table.len() as u32)).collect()
    }

    #[test]
    fn sizes_are_primes() {
        for size in SIZES {
            assert!((2..=size.isqrt()).all(|d| size % d != 0), "{size}");
        }
    }

    #[test]
    fn nobody_to_choose_leaves_nobody_chosen() {
        assert!(table(&[]).iter().all(|&index| index == EMPTY));
        assert!(table(&[(1, 0)]).iter().all(|&index| index == EMPTY));
    }

    #[test]
    fn the_only_backend_takes_everything() {
        assert!(table(&[(42, 3)]).iter().all(|&index| index == 0));
    }

    #[test]
    fn one_leaving_moves_few_of_the_others() {
        let before: Vec<_> = (0..20).map(|i| (i * 7919, 1)).collect();
        let after: Vec<_> = before.iter().copied().filter(|&(identity, _)| identity != 5 * 7919).collect();
        let (old, new) = (table(&before), table(&after));
        let size = old.len();
        let moved =
            old.iter().zip(&new).filter(|&(&a, &b)| a != 5 && before[a as usize].0 != after[b as usize].0).count();
        assert!(moved * 20 < size, "{moved} of {size}");
    }

    proptest! {
        #[test]
        fn tables_have_no_holes_and_keep_to_the_weights(
            weights in proptest::collection::vec(0_u32..=4, 1..24), seed in any::<u64>(),
        ) {
            prop_assume!(weights.iter().any(|&weight| weight > 0));
            let backends: Vec<_> =
                weights.iter().enumerate().map(|(i, &weight)| (seed.wrapping_add(i as u64), weight)).collect();
            let table = table(&backends);
            prop_assert!(table.iter().all(|&index| (index as usize) < backends.len()));
            let total: u32 = weights.iter().sum();
            for (share, &weight) in shares(&table, weights.len()).iter().zip(&weights) {
                let expected = f64::from(weight) / f64::from(total);
                prop_assert!((share - expected).abs() < 0.02, "{share} for {expected}");
            }
        }

        #[test]
        fn the_same_backends_give_the_same_table(identities in proptest::collection::vec(any::<u64>(), 1..16)) {
            let backends: Vec<_> = identities.into_iter().map(|identity| (identity, 1)).collect();
            prop_assert_eq!(table(&backends), table(&backends));
        }
    }
}
