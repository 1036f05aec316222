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
    vm,
};

pub(crate) fn verb(args: &[OsString]) -> Result<()> {
    setup()?;
    // The build script would do it too, but cargo does not show what a build script is busy with.
    build_ebpf::build(&workspace())?;
    let wharf = built("debug", "wharf")?;
    if is_root() {
        println!("rings 1 and 2: host; packets through the kernel, and networks of namespaces");
        run(tests().args(args).env("WHARF_BIN", wharf))?;
    } else {
        println!("ring 1: host");
        run(tests().args(["--exclude", "tests"]).args(args))?;
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

/// A cargo that runs all tests that run on the host. Always for the same packages, and for the agent with them: those that they
/// depend on are compiled anew where others ask for other features of them.
pub(crate) fn tests() -> Command {
    let mut cargo = cargo();
    cargo.current_dir(workspace()).args(["--locked", "test", "--workspace", "--exclude", "lb-ebpf"]);
    cargo
}
