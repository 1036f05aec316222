//! `wharf verify`: whether the maps say what they should.

use std::process::ExitCode;

use anyhow::bail;

use super::{Asking, DIFFERS, table::table};
use crate::admin::report::{Request, Response, VerifyReport};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Put right what is not as it should be
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    asking: Asking,
}

pub(super) fn run(Args { repair, asking }: &Args) -> anyhow::Result<ExitCode> {
    let Response::Verify(report) = asking.ask(Request::Verify { repair: *repair })? else {
        bail!("not an answer about the maps")
    };
    asking.print(&report, text)?;
    let is_right = report.unapplied == 0 && (report.drift.is_empty() || report.repaired);
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::from(DIFFERS) })
}

fn text(report: &VerifyReport) -> String {
    let VerifyReport { entries, unapplied, drift, repaired } = report;
    let rows = drift.iter().map(|it| [it.map.clone(), it.entry.clone(), it.expected.clone(), it.found.clone()]);
    let list =
        if drift.is_empty() { String::new() } else { table(["MAP", "ENTRY", "SHOULD SAY", "SAID"], rows) + "\n" };
    let unapplied = match unapplied {
        0 => String::new(),
        changes => format!("{changes} changes of the services are not in force: `wharf status` says why\n"),
    };
    let verdict = match (drift.len(), repaired) {
        (0, _) => format!("all of {entries} entries say what they should\n"),
        (wrong, true) => format!("{wrong} of {entries} entries were put right\n"),
        (wrong, false) => {
            format!("{wrong} of {entries} entries don't say what they should; --repair puts them right\n")
        }
    };
    list + &unapplied + &verdict
}
