//! `wharf check`: whether a services file would be taken, and where it is wrong.

use std::{collections::BTreeSet, path::PathBuf, process::ExitCode};

use crate::{
    cli::print,
    model::Desired,
    source::{Loaded, file},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The services file
    file: PathBuf,
}

pub(super) fn run(Args { file }: &Args) -> anyhow::Result<ExitCode> {
    match file::load(file, None) {
        Ok(Loaded { desired, warnings, .. }) => {
            let nothing = Desired::default();
            let lacking = desired.lacking_since(&nothing).map(|it| it.to_string());
            for warning in warnings.into_iter().chain(lacking) {
                eprintln!("warning: {warning}");
            }
            print(&format!("{}: ok: {}\n", file.display(), summary(&desired)))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            // One line a mistake, as compilers print them, so that editors can jump to it.
            eprintln!("{error}");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Counts what the file has, not what the model makes of it for each port and family.
fn summary(desired: &Desired) -> String {
    let (mut services, mut ports, mut backends) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (name, service) in desired.services() {
        services.insert(&name.name);
        ports.insert((&name.name, &name.port, name.protocol));
        backends.extend(service.endpoints.keys().map(|address| (&name.name, address.ip())));
    }
    let (services, ports) = (count(services.len(), "service"), count(ports.len(), "port"));
    format!("{services} ({ports}), {}", count(backends.len(), "backend"))
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
