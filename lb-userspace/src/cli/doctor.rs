//! `wharf doctor`: what on this machine is in the way of `wharf run`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Error};

use super::{Printing, host::Host, table::table};
use crate::{
    doctor::{self, Check, Options, Verdict},
    network::PodInterfaces,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// An interface that clients and backends are reached by; may be given several times [default: all that are up]
    #[arg(long = "interface", value_name = "IF")]
    interfaces: Vec<String>,
    /// The services file: its backends are looked for
    #[arg(long, value_name = "FILE")]
    services: Option<PathBuf>,
    #[command(flatten)]
    host: Host,
    #[command(flatten)]
    printing: Printing,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let options = Options {
        interfaces: args.interfaces,
        pod_interfaces: PodInterfaces::read(args.host.pod_interfaces).map_err(Error::msg)?.unwrap_or_default(),
        services: args.services,
        xdp: args.host.xdp,
        snat_ports: args.host.snat_ports,
        bpffs: args.host.bpffs,
        keep_sysctls: args.host.keep_sysctls,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let checks = runtime.block_on(doctor::examine(&options)).context("the network can't be looked at")?;
    args.printing.print(checks.as_slice(), text)?;
    let is_ill = checks.iter().any(|check| check.verdict == Verdict::Problem);
    Ok(if is_ill { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(checks: &[Check]) -> String {
    let rows = checks.iter().map(|check| {
        let remedy = check.remedy.as_ref().map_or(String::new(), |remedy| wrapped(&format!("\n-> {remedy}")));
        let interface = check.interface.clone().unwrap_or_default();
        [check.verdict.to_string(), check.name.to_owned(), interface, wrapped(&check.found) + &remedy]
    });
    format!("{}\n{}\n", table(["VERDICT", "CHECK", "INTERFACE", "FOUND, AND -> WHAT TO DO"], rows), summary(checks))
}

/// The text in lines that fit beside the other columns; a line break that is there stays.
fn wrapped(text: &str) -> String {
    const WIDTH: usize = 80;
    let mut lines: Vec<String> = Vec::new();
    for line in text.split('\n') {
        lines.push(String::new());
        for word in line.split(' ') {
            match lines.last_mut() {
                Some(last) if last.is_empty() => last.push_str(word),
                Some(last) if last.chars().count() + 1 + word.chars().count() <= WIDTH => {
                    last.push(' ');
                    last.push_str(word);
                }
                _ => lines.push(word.to_owned()),
            }
        }
    }
    lines.join("\n")
}

/// How many checks there are of each verdict.
fn summary(checks: &[Check]) -> String {
    let counts = Verdict::ALL.iter().filter_map(|&verdict| {
        let count = checks.iter().filter(|check| check.verdict == verdict).count();
        let has_plural = matches!(verdict, Verdict::Problem | Verdict::Warning | Verdict::Note);
        let ending = if count > 1 && has_plural { "s" } else { "" };
        (count > 0).then(|| format!("{count} {verdict}{ending}"))
    });
    counts.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(verdict: Verdict, remedy: Option<&str>) -> Check {
        let (found, remedy) = ("it is so".to_owned(), remedy.map(str::to_owned));
        Check { name: "it", interface: None, verdict, found, remedy }
    }

    #[test]
    fn long_sentences_take_several_lines() {
        assert_eq!(wrapped("a\nb c"), "a\nb c");
        let long = wrapped(&"word ".repeat(50));
        assert!(long.lines().count() > 1 && long.lines().all(|line| line.len() <= 80), "{long}");
        assert_eq!(wrapped(&"x".repeat(300)).lines().count(), 1);
    }

    #[test]
    fn the_gravest_are_counted_first_and_remedies_stand_below() {
        let checks = [
            check(Verdict::Ok, None),
            check(Verdict::Problem, Some("change it")),
            check(Verdict::Note, Some("nothing")),
            check(Verdict::Note, Some("nothing")),
            check(Verdict::Ok, None),
        ];
        assert_eq!(summary(&checks), "1 problem, 2 notes, 2 ok");
        let text = text(&checks);
        let below = text.lines().skip_while(|line| !line.starts_with("problem")).nth(1);
        assert_eq!(below.map(str::trim), Some("-> change it"), "{text}");
    }
}
