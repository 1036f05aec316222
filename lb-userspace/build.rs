//! Compiles the eBPF programs, which the agent carries inside it: `OUT_DIR` holds an object for each of them.

use std::{env, fs, path::Path, process::ExitCode};

use anyhow::{Context as _, Result};

/// All that the objects are made of.
const SOURCES: [&str; 6] =
    ["Cargo.lock", "Cargo.toml", "lb-common/Cargo.toml", "lb-common/src", "lb-ebpf/Cargo.toml", "lb-ebpf/src"];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the eBPF programs were not built: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the package has left its workspace")?;
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let out = env::var_os("OUT_DIR").context("OUT_DIR is not set")?;
    for object in xtask::build_ebpf::build(workspace)? {
        let name = object.file_name().context("an object has no name")?;
        fs::copy(&object, Path::new(&out).join(name))?;
    }
    Ok(())
}
