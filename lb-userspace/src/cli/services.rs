//! `wharf services`: what is served, and how.

use std::process::ExitCode;

use anyhow::bail;

use super::{Asking, NOT_FOUND, table::table};
use crate::admin::report::{Request, Response, ServiceReport};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only the service of this name
    name: Option<String>,
    #[command(flatten)]
    asking: Asking,
}

pub(super) fn run(Args { name, asking }: &Args) -> anyhow::Result<ExitCode> {
    let Response::Services(mut services) = asking.ask(Request::Services)? else {
        bail!("not an answer about services")
    };
    if let Some(name) = name {
        services.retain(|service| service.name == *name);
        if services.is_empty() {
            eprintln!("no service is called {name}");
            return Ok(ExitCode::from(NOT_FOUND));
        }
    }
    asking.print(&services, |services| text(services))?;
    Ok(ExitCode::SUCCESS)
}

fn text(services: &[ServiceReport]) -> String {
    let header = ["NAME", "PORT", "PROTOCOL", "FRONTENDS", "ALGORITHM", "BACKENDS", "FLOWS"];
    table(
        header,
        services.iter().map(|service| {
            let mut frontends: Vec<_> = service.frontends.iter().map(|frontend| frontend.address.to_string()).collect();
            frontends.extend(service.node_port.map(|port| format!("*:{port}")));
            [
                service.name.clone(),
                service.port.clone(),
                service.protocol.to_string(),
                frontends.join(","),
                service.algorithm.clone(),
                service.backends.to_string(),
                service.flows.to_string(),
            ]
        }),
    )
}
