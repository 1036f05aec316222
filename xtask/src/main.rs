//! The project's own commands: `cargo xtask VERB`.

mod bench;
mod ci;
mod demo;
mod lint;
mod place;
mod setup;
mod test;
mod vm;

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "The project's own commands")]
enum Verb {
    /// Install what building and testing Wharf needs, where it is missing
    Setup,
    /// Compile the eBPF programs
    BuildEbpf,
    /// Run every ring of tests that this machine can run
    Test {
        /// Arguments for `cargo test`
        #[arg(last = true)]
        args: Vec<OsString>,
    },
    /// Run tests on other kernels, in virtual machines
    Vm(vm::Options),
    /// See Wharf balance: a lab of network namespaces, with the real agent on it
    Demo {
        /// Arguments for the demo
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Measure the datapath and the agent
    Bench {
        /// Arguments for the benchmark
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Check format, lints and the invariants of the source
    Lint,
    /// Do what CI does
    Ci,
}

fn main() -> ExitCode {
    match run(Verb::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Setup => setup::verb(),
        Verb::BuildEbpf => build_ebpf(),
        Verb::Test { args } => test::verb(&args),
        Verb::Vm(options) => vm::verb(&options),
        Verb::Demo { args } => demo::verb(&args),
        Verb::Bench { args } => bench::verb(&args),
        Verb::Lint => lint::verb(),
        Verb::Ci => ci::verb(),
    }
}

fn build_ebpf() -> Result<()> {
    for object in xtask::build_ebpf::build(&place::workspace())? {
        println!("{} ({} bytes)", object.display(), object.metadata()?.len());
    }
    Ok(())
}
