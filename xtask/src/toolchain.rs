//! Which compiler and which linker build the eBPF programs.
//!
//! They need a compiler that may use unstable features and has the source of Rust's core library, since no compiler comes with that
//! library built for eBPF, and `bpf-linker`, which makes one eBPF object of the compiler's LLVM bitcode.

use std::{
    fmt, iter,
    path::{Path, PathBuf},
    process::Command,
};

use crate::command::{clean, find, output};

/// What `bpf-linker` has to be at least: the first that knows what `build_ebpf::FLAGS` asks of it. It is also the one that set-up installs.
pub const LINKER: &str = "0.13.0";

/// What to do where set-up cannot.
pub const BY_HAND: &str = "To build Wharf, please install:
  a nightly Rust with its library source   rustup toolchain install nightly --component rust-src,clippy
  bpf-linker 0.13 or newer                 cargo binstall bpf-linker, or its release archive
  ip, to build networks for the tests      from the distribution's package iproute2";

/// A compiler.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Compiler {
    /// A nightly of rustup's, by its name.
    Nightly(String),
    /// The distribution's, in `/usr/bin`.
    Distribution,
}

/// A compiler and a linker that go together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Toolchain {
    /// The compiler.
    pub compiler: Compiler,
    /// Where `bpf-linker` is.
    pub linker: PathBuf,
}

impl Toolchain {
    /// The first complete one on this machine: rustup's nightlies come before the distribution's compiler.
    pub fn find() -> Option<Self> {
        let list = output(Command::new("rustup").args(["toolchain", "list"])).unwrap_or_default();
        let names = list.lines().filter_map(|line| line.split_whitespace().next());
        let nightlies = names.filter(|name| name.starts_with("nightly")).map(|name| Compiler::Nightly(name.into()));
        nightlies.chain(iter::once(Compiler::Distribution)).find_map(|compiler| {
            let linker = compiler.is_complete().then(|| compiler.linker()).flatten()?;
            Some(Self { compiler, linker })
        })
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nightly(name) => write!(f, "rustup's {name}"),
            Self::Distribution => write!(f, "the distribution's, {}", Self::in_distribution("rustc").display()),
        }
    }
}

impl Compiler {
    /// One of the compiler's programs (`rustc`, `cargo`, `cargo-clippy`), in an environment that lets it use unstable features.
    pub fn command(&self, program: &str) -> Command {
        match self {
            Self::Nightly(name) => {
                let mut command = clean("rustup");
                command.args(["run", name, program]);
                command
            }
            Self::Distribution => {
                let mut command = clean(Self::in_distribution(program));
                // CARGO: cargo's subcommands would call rustup's otherwise.
                command.env("RUSTC", Self::in_distribution("rustc")).env("CARGO", Self::in_distribution("cargo"));
                command.env("RUSTC_BOOTSTRAP", "1");
                command
            }
        }
    }

    /// Where the distribution has a program of its compiler.
    pub fn in_distribution(program: &str) -> PathBuf {
        Path::new("/usr/bin").join(program)
    }

    /// Whether it is new enough and comes with cargo and the source of the core library.
    pub fn is_complete(&self) -> bool {
        let core = output(self.command("rustc").args(["--print", "sysroot"]))
            .map(|sysroot| Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core"));
        let release = output(self.command("rustc").arg("--version")).and_then(|text| version(&text));
        core.is_some_and(|core| core.is_dir())
            && release >= version(env!("CARGO_PKG_RUST_VERSION"))
            && output(self.command("cargo").arg("--version")).is_some()
    }

    /// A linker for the bitcode of this compiler: LLVM reads what its older versions wrote, not the newer.
    pub fn linker(&self) -> Option<PathBuf> {
        let details = output(self.command("rustc").arg("-vV"))?;
        let (llvm, _) = version(details.split_once("LLVM version:")?.1)?;
        find("bpf-linker", |linker| {
            output(Command::new(linker).arg("--version")).and_then(|text| version(&text)) >= version(LINKER)
                && shared_llvm(linker).is_none_or(|theirs| theirs >= llvm)
        })
    }
}

/// The major version of the LLVM library that a linker loads; `None` if LLVM is a part of the linker, as in its released binaries.
fn shared_llvm(linker: &Path) -> Option<u32> {
    let libraries = output(Command::new("ldd").arg(linker))?;
    version(libraries.split_once("libLLVM.so.")?.1).map(|(major, _)| major)
}

/// The first version number in a text, without what follows the minor.
fn version(text: &str) -> Option<(u32, u32)> {
    let number = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    let mut parts = number.split('.').map_while(|part| part.parse().ok());
    Some((parts.next()?, parts.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_where_programs_print_them() {
        assert_eq!(version("rustc 1.97.0-nightly (e50aa6fba 2026-05-19)"), Some((1, 97)));
        assert_eq!(version("bpf-linker 0.13.0\n"), Some((0, 13)));
        assert_eq!(version(" 22.1.8"), Some((22, 1)));
        assert_eq!(version("no number"), None);
        assert!(version("1.100.0") > version("1.90"));
    }
}
