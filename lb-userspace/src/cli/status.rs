//! `wharf status`: how the agent is, on one screen.

use std::{net::IpAddr, process::ExitCode};

use anyhow::bail;

use super::{Asking, table::table};
use crate::{
    admin::report::{CollectorReport, InterfaceReport, Request, Response, SocketsReport, StatusReport},
    doctor::where_kube_proxy_runs,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    asking: Asking,
}

pub(super) fn run(Args { asking }: &Args) -> anyhow::Result<ExitCode> {
    let Response::Status(status) = asking.ask(Request::Status)? else { bail!("not an answer about the status") };
    asking.print(&*status, text)?;
    Ok(ExitCode::SUCCESS)
}

fn text(status: &StatusReport) -> String {
    let sources = |i: &InterfaceReport| {
        let addresses = [i.source_ipv4.map(IpAddr::from), i.source_ipv6.map(IpAddr::from)];
        let addresses: Vec<_> = addresses.into_iter().flatten().map(|address| address.to_string()).collect();
        if addresses.is_empty() { "none".to_owned() } else { addresses.join(", ") }
    };
    let interfaces = status.interfaces.iter().map(|i| [i.name.clone(), i.xdp.clone(), i.tc.clone(), sources(i)]);
    let tables = status.tables.iter();
    let tables = tables.map(|t| [t.name.clone(), t.used.to_string(), t.size.to_string(), percent(t.used, t.size)]);
    let counters = status.counters.iter().filter(|counter| counter.packets > 0);
    let counters = counters.map(|c| [c.action.clone(), c.name.clone(), c.packets.to_string(), c.bytes.to_string()]);
    [
        head(status),
        table(["INTERFACE", "XDP", "TC", "SOURCE ADDRESSES"], interfaces) + &remarks(status),
        table(["TABLE", "USED", "SIZE", "FULL"], tables) + &collector(status),
        table(["ACTION", "REASON", "PACKETS", "BYTES"], counters),
    ]
    .join("\n")
}

fn head(status: &StatusReport) -> String {
    let StatusReport { version, pid, .. } = status;
    let running = duration(status.uptime_seconds);
    let source = &status.source;
    let applied = duration(status.applied_seconds_ago);
    let error = status.services_error.as_ref().map_or(String::new(), |error| {
        format!("services error: not all that the source says is in force\n  {}\n", error.replace('\n', "\n  "))
    });
    let unpinned = status.unpinned.as_ref().map_or(String::new(), |why| format!("not everything is pinned: {why}\n"));
    let rivals = if status.kube_proxies.is_empty() {
        String::new()
    } else {
        let (found, remedy) = where_kube_proxy_runs(&status.kube_proxies);
        format!("{found}; {remedy}\n")
    };
    let audit = match status.audit.repaired {
        0 => String::new(),
        entries => format!("{entries} entries of maps that somebody else had changed were put right (see the log)\n"),
    };
    format!(
        "wharf {version}, process {pid}, running for {running}\n\
         services: {source}, applied {applied} ago\n\
         {error}{rivals}{unpinned}{audit}"
    )
}

/// What there is to say about interfaces beyond the table.
fn remarks(status: &StatusReport) -> String {
    let why = status.interfaces.iter().filter_map(|i| Some(format!("{}: {}\n", i.name, i.why.as_ref()?)));
    let pods = &status.pod_interfaces;
    let refused =
        if pods.refused > 0 { format!(", {} could not be (see the log)", pods.refused) } else { String::new() };
    let pods = (!pods.patterns.is_empty())
        .then(|| format!("pods ({}): {} attached{refused}\n", pods.patterns.join(", "), pods.attached));
    why.chain(pods).chain(sockets(&status.sockets)).collect()
}

fn sockets(sockets: &SocketsReport) -> Vec<String> {
    let SocketsReport { mode, cgroup, attached, missing, loopback, ended } = sockets;
    let place = cgroup.as_ref().map_or(String::new(), |cgroup| format!(", {attached} hooks at {cgroup}"));
    let ended = if *ended > 0 { format!(", {ended} ended that had lost their backends") } else { String::new() };
    let missing = missing.iter().map(|missing| format!("sockets: missing: {missing}\n"));
    let loopback = loopback.iter().map(|tc| format!("sockets: others are balanced by what they send (lo: {tc})\n"));
    std::iter::once(format!("sockets: {mode}{place}{ended}\n")).chain(missing).chain(loopback).collect()
}

fn collector(status: &StatusReport) -> String {
    status.collector.as_ref().map_or(String::new(), |collector| {
        let CollectorReport { passes, removed, entries, milliseconds } = collector;
        format!("garbage collection: {removed} flows removed in {passes} passes; the last took {milliseconds} ms for {entries} entries\n")
    })
}

/// The two largest units: "5s", "2h 3m".
fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        (_, _, _) => format!("{days}d {hours}h"),
    }
}

/// Rounded up, so that only an empty table is 0 % full.
fn percent(used: u64, size: u64) -> String {
    format!("{}%", used.saturating_mul(100).div_ceil(size.max(1)))
}
