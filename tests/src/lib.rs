//! The proving ground of Wharf: what its tests stand on.
//!
//! [`topology`] raises a network of namespaces with a balancer in the middle, [`cluster`] one of nodes with pods.
//! [`servers`] and [`probe`] put real sockets into it, [`flood`] what no socket sends; [`agent`] runs the real binary there with [`services`] to serve,
//! and [`traffic`] goes on while something is changed.
//! [`apiserver`] is the Kubernetes that an agent may ask. [`packet`] builds single packets for tests that need no network.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    clippy::panic,
    reason = "this is test code: it fails by panicking, and its caller is a test"
)]

pub mod agent;
pub mod apiserver;
pub mod cluster;
pub mod container;
pub mod control_group;
pub mod datapath;
pub mod flood;
pub mod home;
mod host;
pub mod http;
pub mod inspect;
mod link;
pub mod netns;
pub mod packet;
pub mod probe;
pub mod reference;
pub mod servers;
pub mod services;
pub mod sockets;
pub mod throughput;
pub mod topology;
pub mod traffic;
pub mod variants;

use std::{
    env, io,
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

/// How many times longer than here things take where the tests run: `$WHARF_SLOWNESS`, which is set in emulated machines.
/// It is for limits, of [`poll`] and of sockets; how long a test itself waits for is the same everywhere.
static SLOWNESS: LazyLock<u32> =
    LazyLock::new(|| number("WHARF_SLOWNESS").map_or(1, |slowness| slowness.max(1) as u32));

/// How many times longer than here things may take.
pub fn slowness() -> u32 {
    *SLOWNESS
}

/// The number that the environment has for this.
pub fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

/// How long the kernel may take for what it does by itself, such as finding a neighbour.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks again until there is an answer; `None` after `limit`, or as much more as the machine is slower than ours.
pub fn poll<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit * *SLOWNESS;
    loop {
        let answer = ask();
        if answer.is_some() || Instant::now() > deadline {
            return answer;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Longer than anything takes that comes by itself.
pub const SOON: Duration = Duration::from_secs(10);

/// Expects that something becomes so by itself.
#[track_caller]
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    assert!(poll(SOON, || is_so().then_some(())).is_some(), "not within {SOON:?}: {what}");
}

/// Lets this process have as many file descriptors as it may; how many that are.
pub fn raise_descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: The kernel writes the struct that it is given.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: The kernel reads the struct that it is given.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    assert!(got == 0 && set == 0, "{}", io::Error::last_os_error());
    limit.rlim_cur
}
