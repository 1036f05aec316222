//! What Wharf reads from others, read from arbitrary bytes: a function for each such thing, which panics where something is
//! wrong.
//!
//! Two drivers call them: `tests/bounded.rs`, a few seconds with each test run, and `cargo fuzz`, for as long as one likes.
#![expect(
    clippy::panic,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "a panic is what a fuzzer looks for"
)]

mod admin;
mod objects;
mod packet;

use std::path::Path;

use lb_userspace::source::{
    Loaded,
    file::{self, FileError},
};

pub use self::{
    admin::admin_socket,
    objects::{Change, kubernetes_changes, kubernetes_objects},
    packet::packet,
};

/// A services file: state, or some mistakes, each on a line of its own with its place.
pub fn services_file(bytes: &[u8]) {
    drop(parsed(bytes, None));
}

fn parsed(bytes: &[u8], node: Option<&str>) -> Option<Loaded> {
    match file::parse(Path::new("s.yaml"), bytes, node) {
        Ok(loaded) => {
            assert!(loaded.warnings.iter().all(|line| is_placed(line)), "{:?}", loaded.warnings);
            Some(loaded)
        }
        Err(FileError::Invalid(lines)) => {
            assert!(!lines.is_empty() && lines.iter().all(|line| is_placed(line)), "{lines:?}");
            None
        }
        Err(error) => panic!("nothing was read: {error}"),
    }
}

fn is_placed(line: &str) -> bool {
    line.starts_with("s.yaml:") && is_printable(line)
}

fn is_printable(text: &str) -> bool {
    !text.chars().any(char::is_control)
}
