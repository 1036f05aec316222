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
    let is_in_force = report.is_compared && !report.is_behind && report.unapplied == 0;
    let is_right = is_in_force && (report.drift.is_empty() || report.repaired);
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::from(DIFFERS) })
}

fn text(report: &VerifyReport) -> String {
    let VerifyReport { is_compared, entries, is_behind, unapplied, drift, repaired } = report;
    let rows = drift.iter().map(|it| [it.map.clone(), it.entry.clone(), it.expected.clone(), it.found.clone()]);
    let list =
        if drift.is_empty() { String::new() } else { table(["MAP", "ENTRY", "SHOULD SAY", "SAID"], rows) + "\n" };
    let not_compared = if *is_compared {
        ""
    } else {
        "not compared: what a former agent left of services, as it is not known which there are to be: `wharf status` says why\n"
    };
    let unapplied = match unapplied {
        0 if *is_behind => "not all that the source says is in force: `wharf status` says why\n".to_owned(),
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
    list + not_compared + &unapplied + &verdict
}
