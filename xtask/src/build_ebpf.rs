//! `cargo xtask build-ebpf`, and the build script of `lb-userspace`: compiles the eBPF programs.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs, iter,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    command::run,
    toolchain::{BY_HAND, Toolchain},
};

/// The objects that the package makes, one of each of its binaries.
const OBJECTS: [&str; 2] = ["wharf-datapath", "wharf-generator"];

/// How eBPF is compiled.
const FLAGS: [&str; 5] = [
    // 32-bit registers and comparisons: kernel 5.1.
    "-Ctarget-cpu=v3",
    // The types of maps and functions, which the kernel and the loader read.
    "-Cdebuginfo=2",
    "-Clink-arg=--btf",
    // Headers lie at odd offsets; without this every field is loaded byte by byte.
    "-Clink-arg=--cpu-features=+allows-misaligned-mem-access",
    // With that, LLVM would merge neighbouring stores into misaligned ones, on the stack too, where the verifier refuses them.
    "-Clink-arg=--llvm-args=--combiner-store-merging=false",
];

/// Compiles the eBPF programs, and gives the objects.
pub fn build(workspace: &Path) -> Result<Vec<PathBuf>> {
    let toolchain = toolchain()?;
    run(cargo(&toolchain, workspace, "cargo").args(["build", "--bins"]).args(what(workspace)))?;
    let directory = target_dir(workspace).join(target()).join("release");
    let objects: Vec<_> = OBJECTS.iter().map(|object| directory.join(object)).collect();
    for object in &objects {
        ensure!(object.is_file(), "the build made no {}", object.display());
    }
    Ok(objects)
}

/// All that the objects are made of.
const SOURCES: [&str; 6] =
    ["Cargo.lock", "Cargo.toml", "lb-common/Cargo.toml", "lb-common/src", "lb-ebpf/Cargo.toml", "lb-ebpf/src"];

/// The whole of a build script: compiles, and copies the objects to `OUT_DIR`.
pub fn build_script() -> Result<()> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the package has left its workspace")?;
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let out = env::var_os("OUT_DIR").context("OUT_DIR is not set")?;
    for object in build(workspace).context("the eBPF programs were not built")? {
        let name = object.file_name().context("an object has no name")?;
        fs::copy(&object, Path::new(&out).join(name))?;
    }
    Ok(())
}

/// Lints the eBPF programs with the compiler that builds them: the host's cannot read its core library.
pub fn clippy(workspace: &Path) -> Result<()> {
    let toolchain = toolchain()?;
    run(cargo(&toolchain, workspace, "cargo-clippy").arg("clippy").args(what(workspace)).args(["--", "-D", "warnings"]))
}

/// The toolchain that there is; nothing is installed on the way of a build.
fn toolchain() -> Result<Toolchain> {
    Toolchain::find().with_context(|| {
        format!("no toolchain for eBPF is complete. On Debian `cargo xtask setup` installs one; elsewhere:\n{BY_HAND}")
    })
}

/// A cargo of the toolchain, set up to compile for eBPF.
fn cargo(toolchain: &Toolchain, workspace: &Path, program: &str) -> Command {
    let mut linker = OsString::from("-Clinker=");
    linker.push(&toolchain.linker);
    let flags: Vec<_> = FLAGS.into_iter().map(Into::into).chain(iter::once(linker)).collect();
    let mut cargo = toolchain.compiler.command(program);
    // Encoded flags are taken before all others that a user may have configured, and a linker's path may hold a space.
    cargo.current_dir(workspace).env("CARGO_ENCODED_RUSTFLAGS", flags.join(OsStr::new("\x1f")));
    cargo
}

/// The package, how it is built and where to. The directory is not the one of the cargo that may be waiting for us: that one is locked.
fn what(workspace: &Path) -> Vec<OsString> {
    let fixed =
        ["--package", "lb-ebpf", "--release", "--locked", "-Zbuild-std=core", "--target", target(), "--target-dir"];
    fixed.into_iter().map(Into::into).chain(iter::once(target_dir(workspace).into())).collect()
}

/// Where eBPF is built.
fn target_dir(workspace: &Path) -> PathBuf {
    workspace.join("target/ebpf")
}

/// eBPF has the byte order of its machine: in a build script that of the machine that is built for, or else of this one.
fn target() -> &'static str {
    let is_big = env::var("CARGO_CFG_TARGET_ENDIAN").map_or(cfg!(target_endian = "big"), |endian| endian == "big");
    if is_big { "bpfeb-unknown-none" } else { "bpfel-unknown-none" }
}
