//! `wharf run`: the agent.

use std::{ops::RangeInclusive, path::PathBuf, process::ExitCode};

use anyhow::Context as _;

use crate::{
    admin,
    agent::{self, Options},
    dataplane::{Sizes, kernel::XdpMode},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// An interface that clients and backends are reached by; may be given several times
    #[arg(long = "interface", value_name = "IF", required = true)]
    interfaces: Vec<String>,
    /// The services file; it is read again when it changes, and on SIGHUP
    #[arg(long, value_name = "FILE")]
    services: PathBuf,
    /// Where the programs sit: in the driver, or behind it
    #[arg(long, value_enum, default_value_t = XdpMode::Native)]
    xdp: XdpMode,
    /// Where other commands reach the agent
    #[arg(long, value_name = "PATH", default_value = admin::DEFAULT_SOCKET)]
    admin: PathBuf,
    /// The source ports that a flow may take towards a backend where its own is taken; not those that the host's own
    /// connections take (`net.ipv4.ip_local_port_range`)
    #[arg(long, value_name = "FIRST-LAST", default_value = "1024-32767", value_parser = port_range)]
    snat_ports: RangeInclusive<u16>,
    /// Leave kernel settings as they are, even where forwarding is off
    #[arg(long)]
    keep_sysctls: bool,
    #[command(flatten)]
    sizes: Sizes,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let options = Options {
        interfaces: args.interfaces,
        xdp: args.xdp,
        services: args.services,
        admin: args.admin,
        sizes: args.sizes,
        snat_ports: args.snat_ports,
        keep_sysctls: args.keep_sysctls,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the event loop could not be set up")?;
    runtime.block_on(agent::run(options))?;
    Ok(ExitCode::SUCCESS)
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let wrong = || format!("{text} is not a range of ports such as 1024-32767");
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let first: u16 = first.parse().map_err(|_| wrong())?;
    let last: u16 = last.parse().map_err(|_| wrong())?;
    if first == 0 || first > last {
        return Err(wrong());
    }
    Ok(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges_have_a_beginning_and_an_end() {
        assert_eq!(port_range("61000-65535"), Ok(61_000..=65_535));
        assert_eq!(port_range("80-80"), Ok(80..=80));
        for wrong in ["", "80", "0-1", "9-8", "1-65536", "a-b"] {
            assert!(port_range(wrong).is_err(), "{wrong}");
        }
    }
}
