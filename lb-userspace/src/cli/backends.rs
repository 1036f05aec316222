//! `wharf backends`: where new flows go, and how many went.

use std::process::ExitCode;

use anyhow::bail;

use super::{Asking, NOT_FOUND, table::table};
use crate::admin::report::{BackendReport, Request, Response};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only backends of the service of this name
    name: Option<String>,
    #[command(flatten)]
    asking: Asking,
}

pub(super) fn run(Args { name, asking }: &Args) -> anyhow::Result<ExitCode> {
    let Response::Backends(mut backends) = asking.ask(Request::Backends)? else {
        bail!("not an answer about backends")
    };
    if let Some(name) = name {
        backends.retain(|backend| backend.service == *name);
        if backends.is_empty() {
            eprintln!("no backend belongs to a service called {name}");
            return Ok(ExitCode::from(NOT_FOUND));
        }
    }
    asking.print(&backends, |backends| text(backends))?;
    Ok(ExitCode::SUCCESS)
}

fn text(backends: &[BackendReport]) -> String {
    table(
        ["SERVICE", "PORT", "PROTOCOL", "ADDRESS", "WEIGHT", "FLOWS"],
        backends.iter().map(|backend| {
            [
                backend.service.clone(),
                backend.port.clone(),
                backend.protocol.to_string(),
                backend.address.to_string(),
                backend.weight.to_string(),
                backend.flows.to_string(),
            ]
        }),
    )
}
