//! How the eBPF programs are compiled.
//!
//! It is a library so that the build script of `lb-userspace` and `cargo xtask build-ebpf` share one code path.

pub mod build_ebpf;
pub mod command;
pub mod toolchain;
