//! `cargo xtask bench`: what a packet costs, in nanoseconds of the real programs, net of the packet generator; what the
//! agent's work costs; what is left of the throughput; and what calls on sockets cost.
//!
//! The generator (an XDP and a tc program) lays each packet down and tail-calls the program under test, so that packets
//! of as many flows as wanted go through it in one `BPF_PROG_TEST_RUN`. What the generator costs by itself is measured in
//! the same round with a program that does nothing, and taken off.

mod changes;
mod generator;
mod packets;
mod report;
mod sockets;
mod throughput;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};

use crate::{packets::Case, report::Report};

/// Measures what a packet costs, what the agent's work costs, and throughput
#[derive(Parser)]
struct Args {
    /// How to print the figures
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// Leave out the runs with a million flows and with 100,000 services
    #[arg(long)]
    quick: bool,
    /// Measure these parts alone
    #[arg(long, value_enum, value_name = "PART", value_delimiter = ',', default_values_t = Part::value_variants().to_vec())]
    only: Vec<Part>,
    /// Measure only packets whose description has this text in it, as it is shown while they are measured
    #[arg(long, value_name = "TEXT", default_value = "")]
    packets: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// A part of the report.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Packets of flows
    Packets,
    /// Packets of others
    Strangers,
    /// Changes of the services
    Changes,
    /// The garbage collector
    Collector,
    /// Throughput, by iperf3
    Throughput,
    /// Calls on sockets
    Sockets,
    /// Instructions that the verifier went through
    Instructions,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let mut report = Report::default();
    for part in &args.only {
        match part {
            Part::Packets => {
                let cases = Case::all(args.quick).into_iter().filter(|case| case.to_string().contains(&args.packets));
                let cases: Vec<_> = cases.collect();
                let mut rows = Vec::new();
                for (number, case) in cases.iter().enumerate() {
                    progress(&format!("{} of {}: {case}", number + 1, cases.len()));
                    rows.push(case.measure()?);
                }
                report.packets = Some(rows);
            }
            Part::Strangers => {
                progress("packets of others");
                report.strangers = Some(packets::strangers()?);
            }
            Part::Changes => {
                progress("changes of the services");
                report.changes = Some(changes::changes()?);
            }
            Part::Collector => {
                progress("garbage collection");
                report.collections = Some(changes::collections()?);
            }
            Part::Throughput => {
                progress("throughput");
                report.throughput = Some(throughput::throughputs()?);
            }
            Part::Sockets => {
                progress("sockets");
                report.sockets = Some(sockets::sockets()?);
            }
            Part::Instructions => report.verified_instructions = Some(packets::verified_instructions()?),
        }
    }
    progress("");
    match args.output {
        Format::Table => println!("{}", report.text()),
        Format::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(())
}

/// Shows what is being done, in place of what was.
fn progress(what: &str) {
    eprint!("\r\x1b[K{what}");
}
