//! `cargo xtask demo`: raises a lab of network namespaces with the real agent on it, and shows traffic being spread.

use std::{ffi::OsString, process::Command};

use anyhow::{Result, bail};
use xtask::{
    build_ebpf,
    command::{cargo, run},
};

use crate::{
    place::{built, is_root, workspace},
    setup::setup,
};

pub(crate) fn verb(args: &[OsString]) -> Result<()> {
    lab("demo", args)
}

/// Builds one of the package `tests`' programs and the agent for it, both as they are released, and runs it.
pub(crate) fn lab(program: &str, args: &[OsString]) -> Result<()> {
    setup()?;
    build_ebpf::build(&workspace())?;
    let mut build = cargo();
    build.current_dir(workspace()).args(["build", "--locked", "--release"]);
    run(build.args(["--package", "lb-userspace", "--bin", "wharf", "--package", "tests", "--bin", program]))?;
    let (program, wharf) = (built("release", program)?, built("release", "wharf")?);
    if !is_root() {
        bail!(
            "all is built, but only root may make networks and load programs into the kernel. To run it:\n  sudo WHARF_BIN={} {}",
            wharf.display(),
            program.display()
        );
    }
    run(Command::new(program).args(args).env("WHARF_BIN", wharf))
}
