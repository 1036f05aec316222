//! A short run with every test run: the seeds as they are, then some thousand damaged ones, and arbitrary bytes.
//! `WHARF_INPUTS=1000000 cargo test --release -p fuzz` is a longer one.
#![expect(clippy::expect_used, clippy::panic, reason = "this is test code: it fails by panicking")]

use std::{
    env, fs,
    ops::Range,
    path::Path,
    time::{Duration, Instant},
};

use proptest::{collection::vec, prelude::*, sample, test_runner::TestRunner};

/// Longer than any input of some kilobytes may take, on a busy machine and without optimization.
const LIMIT: Duration = Duration::from_secs(20);
/// What the process may take at the most, in KiB.
const MEMORY: u64 = 1 << 20;

/// The beginnings: files that others made, and what a line of theirs could be taken for.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let files = fs::read_dir(directory).expect("there is a corpus").map(|it| it.expect("it can be read").path());
    files.map(|file| fs::read(file).expect("it can be read")).collect()
}

/// What is done to a seed: some bytes at a place are replaced by others, or by some of another place.
#[derive(Clone, Debug)]
enum Damage {
    Bytes(Range<sample::Index>, Vec<u8>),
    Copy(Range<sample::Index>, sample::Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let range = || (any::<sample::Index>(), any::<sample::Index>()).prop_map(|(from, to)| from..to);
    prop_oneof![
        4 => (range(), vec(any::<u8>(), 0..4)).prop_map(|(range, bytes)| Damage::Bytes(range, bytes)),
        1 => (range(), any::<sample::Index>(), 0..40_usize).prop_map(|(range, from, length)| Damage::Copy(range, from, length)),
    ]
}

/// A few bytes of the input, from a place on.
fn cut(range: &Range<sample::Index>, length: usize) -> Range<usize> {
    let start = range.start.index(length + 1);
    start..(start + range.end.index(8)).min(length)
}

fn apply(mut bytes: Vec<u8>, damage: Vec<Damage>) -> Vec<u8> {
    for damage in damage {
        let length = bytes.len();
        match damage {
            Damage::Bytes(range, new) => drop(bytes.splice(cut(&range, length), new)),
            Damage::Copy(range, from, size) => {
                let from = from.index(length + 1);
                let copy = bytes.get(from..(from + size).min(length)).unwrap_or_default().to_vec();
                drop(bytes.splice(cut(&range, length), copy));
            }
        }
    }
    bytes
}

fn inputs(target: &str) -> impl Strategy<Value = Vec<u8>> + use<> {
    let damaged = (sample::select(seeds(target)), vec(damage(), 1..6)).prop_map(|(seed, damage)| apply(seed, damage));
    prop_oneof![9 => damaged, 1 => vec(any::<u8>(), 0..300)]
}

fn run(target: &str, cases: u32, body: fn(&[u8])) {
    for seed in seeds(target) {
        timed(body, &seed);
    }
    let cases = env::var("WHARF_INPUTS").map_or(cases, |text| text.parse().expect("WHARF_INPUTS is a number"));
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let result = TestRunner::new(config).run(&inputs(target), |input| {
        timed(body, &input);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let peak = peak();
    assert!(peak < MEMORY, "{peak} KiB");
}

fn timed(body: fn(&[u8]), input: &[u8]) {
    let begin = Instant::now();
    body(input);
    assert!(begin.elapsed() < LIMIT, "{:?} for {:?}", begin.elapsed(), String::from_utf8_lossy(input));
}

/// The most memory that this process has had, in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the kernel tells it");
    peak.trim().trim_end_matches(" kB").parse().expect("it is a number")
}

#[test]
fn packets() {
    run("packet", 20_000, fuzz::packet);
}

#[test]
fn services_files() {
    run("services_file", 3_000, fuzz::services_file);
}

#[test]
fn files_of_objects() {
    run("kubernetes_objects", 3_000, fuzz::kubernetes_objects);
}

#[test]
fn admin_sockets() {
    run("admin_socket", 3_000, fuzz::admin_socket);
}
