//! The tables over plain memory: what is in there is what is desired, however it came to be.

use std::collections::BTreeSet;

use lb_common::net::{Address as _, Ipv4Be};
use proptest::prelude::*;

use super::*;
use crate::{
    dataplane::memory::Memory,
    model::{IpFamily, Protocol},
};

const SIZES: Sizes = Sizes { services: 8, backends: 16, slots: 1200, flows: 128 };

fn name(name: &str) -> ServiceName {
    ServiceName { name: name.into(), port: "http".into(), protocol: Protocol::Tcp, family: IpFamily::V4 }
}

/// The last byte of a service's address, its algorithm, and the last bytes and weights of its backends.
type Row<'a> = (u8, Algorithm, &'a [(u8, u16)]);

/// Services 10.0.0.`i`:80 with an algorithm and the weights of backends 10.1.0.`j`:80.
fn desired(services: &[Row<'_>]) -> Arc<Desired> {
    let mut desired = Desired::default();
    for &(i, algorithm, backends) in services {
        let service = model::Service {
            frontends: [([10, 0, 0, i], 80).into()].into(),
            algorithm,
            backends: backends
                .iter()
                .map(|&(j, weight)| (([10, 1, 0, j], 80).into(), Weight::new(weight).unwrap()))
                .collect(),
        };
        desired.add(name(&i.to_string()), service).unwrap();
    }
    Arc::new(desired)
}

fn tables() -> Tables<Memory> {
    Tables::new(Memory::new(&SIZES).unwrap(), SIZES)
}

/// Reads the memory as the kernel does, and holds it against what is desired.
#[track_caller]
fn check(tables: &Tables<Memory>, desired: &Desired) {
    let memory = tables.dataplane();
    let frontends: BTreeSet<_> = desired.frontends().keys().collect();
    assert_eq!(memory.frontends.keys().collect::<BTreeSet<_>>(), frontends);
    let mut taken = BTreeSet::new();
    for (frontend, name) in desired.frontends() {
        let service = memory.services().get(memory.frontends[frontend]);
        let wanted = &desired.services()[name];
        assert_eq!(Algorithm::from_raw(service.algorithm), wanted.algorithm);
        let range = TableRange::from_word(service.table);
        let mut found = BTreeSet::new();
        for index in range.base..range.base + range.length {
            assert!(taken.insert(index), "slot {index} is of two services");
            let backend = memory.backends().get(memory.table().get(index).backend);
            let address = std::net::Ipv4Addr::from(Ipv4Be::from_words(backend.address));
            found.insert(SocketAddr::new(address.into(), backend.port.to_host()));
        }
        let live = wanted.backends.iter().filter(|(_, weight)| weight.get() > 0);
        assert_eq!(found, live.map(|(&address, _)| address).collect());
    }
    assert_eq!(**tables.applied(), *desired);
}

#[test]
fn what_is_applied_twice_changes_nothing() {
    let mut tables = tables();
    let state = desired(&[(1, Algorithm::Random, &[(1, 1), (2, 3)]), (2, Algorithm::Maglev, &[(1, 1)])]);
    assert_eq!(tables.apply(&state).unwrap(), 4);
    check(&tables, &state);
    assert_eq!(tables.apply(&state).unwrap(), 0);
}

#[test]
fn a_backend_that_stays_keeps_its_id_and_its_count() {
    let mut tables = tables();
    tables.apply(&desired(&[(1, Algorithm::Random, &[(1, 1), (2, 1)])])).unwrap();
    let members = |tables: &Tables<Memory>| tables.members(&name("1")).map(|(a, m, _)| (a, m.id)).collect::<Vec<_>>();
    let before = members(&tables);
    tables.apply(&desired(&[(1, Algorithm::Maglev, &[(2, 9), (3, 1)])])).unwrap();
    tables.reclaim().unwrap();
    let after = members(&tables);
    assert_eq!(after[0], before[1]);
    assert_ne!(after[1].1, before[1].1);
}

#[test]
fn what_is_freed_rests_until_the_readers_are_done() {
    let mut tables = tables();
    tables.apply(&desired(&[(1, Algorithm::Random, &[(1, 1)])])).unwrap();
    let (_, gone, _) = tables.members(&name("1")).next().unwrap();
    let generation = tables.dataplane().backends().get(gone.id).generation;
    tables.apply(&desired(&[(1, Algorithm::Random, &[(2, 1)])])).unwrap();
    assert_eq!(tables.dataplane().backends().get(gone.id).generation, generation, "a packet may still read it");
    assert_eq!(tables.dataplane().grace_periods(), 0);
    tables.reclaim().unwrap();
    assert_eq!(tables.dataplane().grace_periods(), 1);
    assert_ne!(tables.dataplane().backends().get(gone.id).generation, generation, "flows to it are over");
    tables.reclaim().unwrap();
    assert_eq!(tables.dataplane().grace_periods(), 1, "nothing rests, so nobody is waited for");
}

#[test]
fn a_change_that_does_not_fit_changes_nothing_and_says_what_it_needs() {
    let mut tables = tables();
    let state = desired(&[(1, Algorithm::Random, &[(1, 1), (2, 1)])]);
    tables.apply(&state).unwrap();
    let many: Vec<_> = (1..=20).map(|j| (j, 1)).collect();
    let services: Vec<Row<'_>> = (1..=9).map(|i| (i, Algorithm::Random, &[][..])).collect();
    let cases: [(_, &str, u64); 3] = [
        (desired(&[(1, Algorithm::Random, &many)]), "--max-backends", 20),
        (desired(&services), "--max-services", 9),
        (desired(&[(1, Algorithm::Maglev, &many[..15])]), "--max-slots", 2039 + 2),
    ];
    for (too_much, expected_flag, expected_need) in cases {
        let usage = tables.usage();
        match tables.apply(&too_much) {
            Err(DataplaneError::Full { flag, needed, .. }) => {
                assert_eq!((flag, needed), (expected_flag, expected_need));
            }
            other => panic!("{other:?}"),
        }
        check(&tables, &state);
        assert_eq!(tables.usage(), usage, "nothing leaked");
    }
    tables.apply(&Arc::default()).unwrap();
    tables.reclaim().unwrap();
    assert!(tables.usage().iter().all(|usage| usage.used == 0), "{:?}", tables.usage());
}

#[test]
fn a_full_table_is_reclaimed_before_it_is_refused() {
    let mut tables = tables();
    for round in 0..50_u8 {
        let first = round % 2 * 10;
        let backends: Vec<_> = (first..first + 10).map(|j| (j, 1)).collect();
        tables.apply(&desired(&[(1, Algorithm::Maglev, &backends)])).unwrap_or_else(|error| {
            panic!("round {round}: {error}");
        });
        // Two Maglev tables of 1,021 slots do not fit beside one another, and the third round would be one too many.
        tables.apply(&Arc::default()).unwrap();
    }
}

proptest! {
    #[test]
    fn after_any_history_the_memory_says_what_is_desired(
        history in proptest::collection::vec(
            (
                proptest::collection::btree_map(
                    1_u8..6,
                    (prop::sample::select(&Algorithm::ALL[..]), proptest::collection::btree_map(0_u8..5, 0_u16..4, 0..3)),
                    0..4,
                ),
                any::<bool>(),
            ),
            1..24,
        ),
    ) {
        let mut tables = tables();
        for (services, reclaims) in history {
            let services: Vec<_> = services
                .into_iter()
                .map(|(i, (algorithm, backends))| (i, algorithm, backends.into_iter().collect::<Vec<_>>()))
                .collect();
            let state: Vec<_> = services.iter().map(|(i, algorithm, b)| (*i, *algorithm, &b[..])).collect();
            let state = desired(&state);
            let before = Arc::clone(&tables.applied);
            match tables.apply(&state) {
                Ok(_) => check(&tables, &state),
                Err(DataplaneError::Full { .. }) => check(&tables, &before),
                Err(error) => return Err(TestCaseError::fail(error.to_string())),
            }
            if reclaims {
                tables.reclaim().unwrap();
            }
        }
        tables.apply(&Arc::default()).unwrap();
        tables.reclaim().unwrap();
        prop_assert!(tables.usage().iter().all(|usage| usage.used == 0), "{:?}", tables.usage());
    }
}
