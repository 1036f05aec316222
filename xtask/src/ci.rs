//! `cargo xtask ci`: exactly what CI runs.

use std::process::Command;

use anyhow::Result;
use xtask::command::run;

use crate::place::workspace;

pub(crate) fn verb() -> Result<()> {
    run(&mut Command::new(workspace().join(".ci/run")))
}
