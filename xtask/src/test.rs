//! `cargo xtask test`: every ring of tests that this machine can run, and what was skipped and why.

use std::{ffi::OsString, path::PathBuf, process::Command};

use anyhow::Result;
use xtask::{
    build_ebpf,
    command::{cargo, run},
};

use crate::{
    place::{built, is_root, workspace},
    setup::setup,
    vm,
};

pub(crate) fn verb(args: &[OsString]) -> Result<()> {
    setup()?;
    // The build script would do it too, but cargo does not show what a build script is busy with.
    build_ebpf::build(&workspace())?;
    println!("ring 1: host");
    run(host().args(["test", "--workspace", "--exclude", "lb-ebpf", "--exclude", "tests"]).args(args))?;
    println!("ring 2: packets through the kernel, and networks of namespaces");
    let wharf = build_wharf()?;
    if is_root() {
        run(host().args(["test", "--package", "tests"]).args(args).env("WHARF_BIN", wharf))?;
    } else {
        println!("skipped: ring 2 loads programs into the kernel, which only root may. To run it:");
        println!(
            "  WHARF_BIN={} cargo --config 'target.\"cfg(unix)\".runner=\"sudo --preserve-env=WHARF_BIN\"' test --package tests",
            wharf.display()
        );
    }
    println!("ring 3: the oldest kernel, in a virtual machine");
    if !args.is_empty() {
        println!("skipped: ring 3 takes no arguments of `cargo test`. To run it: cargo xtask vm");
        return Ok(());
    }
    match vm::prepare(&vm::Options::default()) {
        Ok(kernels) => vm::test(&kernels, &[]),
        Err(error) => {
            println!("skipped: there can be no virtual machine here: {error:#}");
            Ok(())
        }
    }
}

/// Builds the agent, as tests run it.
pub(crate) fn build_wharf() -> Result<PathBuf> {
    run(host().args(["build", "--package", "lb-userspace", "--bin", "wharf"]))?;
    built("debug", "wharf")
}

/// A cargo at the root of the tree.
pub(crate) fn host() -> Command {
    let mut cargo = cargo();
    cargo.current_dir(workspace()).arg("--locked");
    cargo
}
