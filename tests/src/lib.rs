//! The proving ground of Wharf: what its tests stand on.
//!
//! [`topology`] raises a network of namespaces, [`servers`] and [`probe`] put real sockets into it,
//! [`agent`] runs the real binary there, and [`traffic`] goes on while something is changed.
//! [`packet`] builds single packets for tests that need no network.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    clippy::panic,
    reason = "this is test code: it fails by panicking, and its caller is a test"
)]

pub mod agent;
pub mod datapath;
mod link;
pub mod netns;
pub mod packet;
pub mod probe;
pub mod servers;
pub mod topology;
pub mod traffic;

use std::{
    io, thread,
    time::{Duration, Instant},
};

/// Asks again until there is an answer; `None` after `limit`.
pub fn poll<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        let answer = ask();
        if answer.is_some() || Instant::now() > deadline {
            return answer;
        }
        thread::sleep(Duration::from_millis(10));
    }
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
