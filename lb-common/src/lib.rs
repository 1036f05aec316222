//! The vocabulary of Wharf: what its kernel programs and its agent both say.
//!
//! No I/O and no maps in here: only types, parsing, arithmetic and choices, each of which
//! gives the same answer in the kernel, in the agent and in a test on the host.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

pub mod net;
#[macro_use]
mod layout;
pub mod abi;
pub mod checksum;
pub mod flow;
pub mod generator;
pub mod maglev;
pub mod parse;
pub mod select;

pub mod verdict;
