//! The command line. Each command is a thin shell around the library, in a file of its own.
mod backends;
mod check;
mod cleanup;
mod doctor;
mod host;
mod run;
mod services;
mod status;
mod table;
mod verify;

use std::{
    io::{self, ErrorKind, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::admin::{
    self, client,
    report::{Request, Response},
};

/// Exit code: what was named does not exist.
const NOT_FOUND: u8 = 2;

/// Exit code: what should be the same is not.
const DIFFERS: u8 = 2;

/// Wharf: a layer 4 load balancer in eBPF.
#[derive(Debug, Parser)]
#[command(name = "wharf", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Balance: attach to interfaces and serve what the services file says
    Run(Box<run::Args>),
    /// Check a services file, without root and without an agent
    Check(check::Args),
    /// Look at this machine: what is in the way of `run`, and what to do about it; changes nothing
    Doctor(doctor::Args),
    /// Show how the agent is, how full its tables are, and what became of packets
    Status(status::Args),
    /// List the services that the agent serves
    Services(services::Args),
    /// List the backends that the agent sends to
    Backends(backends::Args),
    /// Compare what the kernel's maps say with what they should
    Verify(verify::Args),
    /// Take away what agents left here: programs, tables with all flows, changes to the host
    Cleanup(cleanup::Args),
}

impl Cli {
    /// Does what the command line says.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Run(args) => run::run(*args),
            Command::Check(args) => check::run(&args),
            Command::Doctor(args) => doctor::run(args),
            Command::Status(args) => status::run(&args),
            Command::Services(args) => services::run(&args),
            Command::Backends(args) => backends::run(&args),
            Command::Verify(args) => verify::run(&args),
            Command::Cleanup(args) => cleanup::run(&args),
        }
    }
}

/// How to ask the agent, and how to print what it says.
#[derive(Debug, clap::Args)]
struct Asking {
    /// The agent's socket
    #[arg(long, value_name = "PATH", default_value = admin::DEFAULT_SOCKET)]
    admin: PathBuf,
    #[command(flatten)]
    printing: Printing,
}

#[derive(Clone, Copy, Debug, clap::Args)]
struct Printing {
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// For people
    Table,
    /// For programs: everything that there is to tell
    Json,
}

impl Asking {
    fn ask(&self, request: Request) -> anyhow::Result<Response> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(client::ask(&self.admin, request))?)
    }

    fn print<T: Serialize>(&self, report: &T, table: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        self.printing.print(report, table)
    }
}

impl Printing {
    fn print<T: Serialize + ?Sized>(self, report: &T, table: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        Ok(print(&match self.output {
            Format::Table => table(report),
            Format::Json => serde_json::to_string_pretty(report)? + "\n",
        })?)
    }
}

/// Prints to standard output. That its reader has seen enough is no error.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}
