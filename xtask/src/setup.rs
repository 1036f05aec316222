//! `cargo xtask setup`: what a machine with rustup's stable toolchain lacks to build and test Wharf.
//!
//! On Debian it installs that, and the other verbs call it first; elsewhere it says what to install.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail};
use xtask::{
    command::{cargo, clean, find, step},
    toolchain::{BY_HAND, Compiler, LINKER, Toolchain},
};

use crate::place::{is_debian, is_root, workspace};

/// The LLVM that the linker is built with: Debian's newest that this linker knows.
const LLVM: &str = "llvm-22";

/// A package of Debian's, and what it is for.
pub(crate) type Package = (&'static str, &'static str);

/// Sets the machine up, and says what is there.
pub(crate) fn verb() -> Result<()> {
    let toolchain = setup()?;
    println!("compiler of the eBPF programs: {}", toolchain.compiler);
    println!("linker of the eBPF programs: {}", toolchain.linker.display());
    println!("Nothing is missing.");
    Ok(())
}

/// Installs what is missing; silent if nothing is.
pub(crate) fn setup() -> Result<Toolchain> {
    let found = Toolchain::find();
    let packages = missing(found.as_ref());
    if packages.is_empty()
        && let Some(toolchain) = &found
    {
        return Ok(toolchain.clone());
    }
    tell(&packages);
    if found.is_none() {
        eprintln!("  bpf-linker {LINKER}, which Debian does not have, links the eBPF programs");
    }
    if !is_debian() {
        bail!("{BY_HAND}");
    }
    if !packages.is_empty() {
        install(&packages)?;
    }
    if found.is_none() && Compiler::Distribution.linker().is_none() {
        install_linker()?;
    }
    Toolchain::find().with_context(|| format!("Debian's compiler of eBPF is still not complete.\n{BY_HAND}"))
}

/// The packages that the machine lacks, now that it has this toolchain or none.
fn missing(toolchain: Option<&Toolchain>) -> Vec<Package> {
    let has_compiler = toolchain.is_some() || Compiler::Distribution.is_complete();
    let has_linker = toolchain.is_some() || Compiler::Distribution.linker().is_some();
    let has_llvm = Path::new("/usr/lib").join(LLVM).join("bin/llvm-config").exists();
    let is_nightly = toolchain.is_some_and(|toolchain| toolchain.compiler != Compiler::Distribution);
    let has_clippy = is_nightly || Compiler::in_distribution("cargo-clippy").exists();
    let has_ip = find("ip", |_| true).is_some();
    let has_curl = find("curl", |_| true).is_some();
    let has_python = Path::new("/usr/bin/python3").exists();
    let has_iperf3 = find("iperf3", |_| true).is_some();
    let all = [
        (has_compiler, ("rustc-web", "compiles the eBPF programs")),
        (has_compiler, ("cargo-web", "builds them")),
        (has_compiler, ("rust-web-src", "has the core library, which is compiled along with them")),
        (has_clippy, ("rust-web-clippy", "lints them")),
        (has_linker || has_llvm, ("llvm-22-dev", "is what bpf-linker, which links them, is built with")),
        (has_ip, ("iproute2", "shows and makes the networks of the tests")),
        // Elsewhere than on Debian the tests and the bench do without.
        (has_curl || !is_debian(), ("curl", "calls services in tests")),
        (has_python || !is_debian(), ("python3", "does so by sockets of its own")),
        (has_iperf3 || !is_debian(), ("iperf3", "measures throughput in the bench")),
    ];
    all.into_iter().filter(|(is_there, _)| !is_there).map(|(_, package)| package).collect()
}

/// Has Debian install what another verb lacks; silent if that is nothing.
pub(crate) fn provide(packages: &[Package]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    tell(packages);
    install(packages)
}

fn tell(packages: &[Package]) {
    eprintln!("Something is missing; by the names of Debian's packages:");
    for (name, purpose) in packages {
        eprintln!("  {name} {purpose}");
    }
}

/// Has Debian install packages.
fn install(packages: &[Package]) -> Result<()> {
    let names: Vec<_> = packages.iter().map(|(name, _)| *name).collect();
    if !is_root() {
        bail!(
            "only root can install them: sudo apt-get update && sudo apt-get install --no-install-recommends {}",
            names.join(" ")
        );
    }
    // A source that somebody else added may be out of order, and the packages come from Debian's.
    if let Err(error) = step("apt-get update", &log("apt-update"), apt().arg("update")) {
        eprintln!("going on without: {error}");
    }
    let mut install = apt();
    install.args(["install", "--yes", "--no-install-recommends"]).args(names);
    step("apt-get install", &log("apt-install"), &mut install)
}

/// Builds the linker for Debian's compiler, from its source and with Debian's LLVM.
fn install_linker() -> Result<()> {
    let prefix = Path::new("/usr/lib").join(LLVM);
    let mut command = cargo();
    command.args(["install", "--locked", "--force", &format!("bpf-linker@{LINKER}")]);
    command.args(["--no-default-features", "--features", LLVM]);
    command.env("RUSTFLAGS", format!("-L {}", prefix.join("lib").display())).env("LLVM_PREFIX", prefix);
    step(&format!("cargo install bpf-linker {LINKER}"), &log("bpf-linker"), &mut command)
}

/// Where a step's output is kept.
fn log(step: &str) -> std::path::PathBuf {
    workspace().join("target/xtask").join(step).with_extension("log")
}

/// Debian's package tool, which must not ask.
fn apt() -> Command {
    let mut apt = clean("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}
