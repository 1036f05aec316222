//! The `wharf` command: reads the command line, sets up the log, calls the library, turns errors into exit codes.

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
};

use clap::Parser as _;
use lb_userspace::cli::Cli;
use tracing_subscriber::EnvFilter;

/// Exit code: the command line makes no sense. (`EX_USAGE` of sysexits.h)
const USAGE: u8 = 64;

/// What is logged unless `RUST_LOG` says otherwise. The client of the API server says each of its errors, which we do, too.
const LOG: &str = "info,kube_client=off,kube_runtime=off";

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version come this way, too.
        Err(error) => {
            let code = if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
            let _ = error.print();
            return code;
        }
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        .init();
    cli.run().unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
