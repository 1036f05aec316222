//! `cargo xtask bench`: measures the datapath and the agent, in the same kind of lab as the demo.

use std::ffi::OsString;

use anyhow::Result;

use crate::demo::lab;

pub(crate) fn verb(args: &[OsString]) -> Result<()> {
    lab("bench", args)
}
