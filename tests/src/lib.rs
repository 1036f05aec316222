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
    thread,
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
