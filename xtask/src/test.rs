//! `cargo xtask test`: every ring of tests that this machine can run, and what was skipped and why.

use std::{ffi::OsString, process::Command};

use anyhow::Result;
use xtask::{
    build_ebpf,
    command::{cargo, run},
};

use crate::{
    place::{built, is_root, workspace},
    setup::setup,
};

pub(crate) fn verb(args: &[OsString]) -> Result<()> {
    setup()?;
    // The build script would do it too, but cargo does not show what a build script is busy with.
    build_ebpf::build(&workspace())?;
    println!("ring 1: host");
    run(host().args(["test", "--workspace", "--exclude", "lb-ebpf", "--exclude", "tests"]).args(args))?;
    println!("ring 2: packets through the kernel, and networks of namespaces");
    run(host().args(["build", "--package", "lb-userspace", "--bin", "wharf"]))?;
    let wharf = built("debug", "wharf")?;
    if is_root() {
        run(host().args(["test", "--package", "tests"]).args(args).env("WHARF_BIN", wharf))?;
    } else {
        println!("skipped: ring 2 loads programs into the kernel, which only root may. To run it:");
        println!(
            "  WHARF_BIN={} cargo --config 'target.\"cfg(unix)\".runner=\"sudo --preserve-env=WHARF_BIN\"' test --package tests",
            wharf.display()
        );
    }
    println!("skipped: ring 3 (other kernels, in virtual machines) is not part of this release");
    Ok(())
}

/// A cargo at the root of the tree.
fn host() -> Command {
    let mut cargo = cargo();
    cargo.current_dir(workspace()).arg("--locked");
    cargo
}
