//! The figures, and how they are shown to people.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::{
    changes::{Change, Collection},
    generator::{PACKETS, ROUNDS},
    packets::{Row, Stranger},
    sockets::Sockets,
    throughput::{self, Throughputs},
};

/// The figures; a part that was not measured is left out.
#[derive(Default, Serialize)]
pub(crate) struct Report {
    /// Packets of flows of ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) packets: Option<Vec<Row>>,
    /// Packets of others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) strangers: Option<Vec<Stranger>>,
    /// What a change of the services costs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) changes: Option<Vec<Change>>,
    /// What the garbage collector costs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) collections: Option<Vec<Collection>>,
    /// What goes through in a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) throughput: Option<Throughputs>,
    /// What balancing of sockets costs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sockets: Option<Vec<Sockets>>,
    /// How many instructions the verifier went through for each program; null where the kernel does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) verified_instructions: Option<Vec<(String, Option<u32>)>>,
}

impl Report {
    /// The report in tables.
    pub(crate) fn text(&self) -> String {
        let sections = [
            self.packets.as_deref().map(packets),
            self.strangers.as_deref().map(strangers),
            self.changes.as_deref().map(changes),
            self.collections.as_deref().map(collections),
            self.throughput.as_ref().map(throughput),
            self.sockets.as_deref().map(sockets),
            self.verified_instructions.as_deref().map(verified_instructions),
        ];
        sections.into_iter().flatten().collect::<Vec<_>>().join("\n\n")
    }
}

fn packets(rows: &[Row]) -> String {
    let whole = |ns: f64| format!("{ns:.0}");
    let or_none = |ns: Option<f64>| ns.map_or("-".to_owned(), whole);
    let lines = rows.iter().map(|row| {
        vec![
            row.hook.to_owned(),
            row.reason.to_owned(),
            row.family.name().to_owned(),
            row.protocol.name().to_owned(),
            row.services.to_string(),
            row.flows.to_string(),
            whole(row.established_ns),
            or_none(row.pending_ns),
            or_none(row.open_ns),
            or_none(row.establish_ns),
            whole(row.generator_ns),
        ]
    });
    let header = [
        "HOOK",
        "COUNTED AS",
        "FAMILY",
        "PROTOCOL",
        "SERVICES",
        "FLOWS",
        "ESTABLISHED",
        "PENDING",
        "OPENS",
        "ESTABLISHES",
        "(GENERATOR)",
    ];
    format!(
        "Packets of flows, net ns each (median of {ROUNDS} rounds of {PACKETS} packets, or one a flow if that is more; \
         of packets that open or establish a flow, one round), next hop resolved:\n\n{}",
        table(&header, 4, lines)
    )
}

fn strangers(rows: &[Stranger]) -> String {
    let lines = rows.iter().map(|row| {
        let figures = [row.xdp_ns, row.tc_ingress_ns, row.tc_egress_ns].map(|ns| format!("{ns:.0}"));
        let family = if row.reason == "not-ip" { "-" } else { row.family.name() };
        [row.reason.to_owned(), family.to_owned(), row.flows.to_string()].into_iter().chain(figures).collect()
    });
    let header = ["COUNTED AS", "FAMILY", "FLOWS", "XDP", "TC INGRESS", "TC EGRESS"];
    format!("Packets of others, net ns each, likewise:\n\n{}", table(&header, 2, lines))
}

fn changes(rows: &[Change]) -> String {
    let lines = rows.iter().map(|row| {
        let times = [row.parse_ms, row.apply_ms, row.one_change_ms].map(|ms| format!("{ms:.1}"));
        [row.services.to_string(), row.backends.to_string()].into_iter().chain(times).collect()
    });
    let header = ["SERVICES", "BACKENDS", "PARSE ms", "APPLY ms", "ONE CHANGE ms"];
    format!("From a services file to the kernel:\n\n{}", table(&header, 0, lines))
}

fn collections(rows: &[Collection]) -> String {
    let lines = rows.iter().map(|row| {
        vec![
            row.flows.to_string(),
            row.removed.to_string(),
            format!("{:.0}", row.cpu_ms),
            format!("{:.2}", row.flows_per_second() / 1e6),
        ]
    });
    let header = ["FLOWS", "REMOVED", "AGENT'S CPU ms", "MILLION FLOWS/s"];
    format!("Passes of the garbage collector:\n\n{}", table(&header, 0, lines))
}

fn throughput(throughputs: &Throughputs) -> String {
    let rows = match throughputs {
        Throughputs::Measured(rows) => rows,
        Throughputs::NotMeasured(why) => return format!("Throughput was not measured: {why}."),
    };
    let lines = rows.iter().map(|row| {
        let names = [row.xdp, row.family, row.backend, row.flow].map(str::to_owned);
        let rates = [row.routed, row.balanced].map(|rate| format!("{:.2}", rate / 1e9));
        names.into_iter().chain(rates).chain([format!("{:.2}", row.part)]).collect()
    });
    let header = ["--xdp", "FAMILY", "BACKEND", "FLOW", "ROUTED Gbit/s", "BALANCED Gbit/s", "PART"];
    format!(
        "One TCP connection by iperf3 over veth, to the backend without an agent and to its service with one, in turns \
         (median of {} rounds):\n\n{}",
        throughput::ROUNDS,
        table(&header, 4, lines)
    )
}

fn sockets(rows: &[Sockets]) -> String {
    let lines = rows.iter().map(|row| {
        let names = [row.what, row.family].map(str::to_owned);
        let rates = [row.straight, row.balanced].map(|rate| format!("{rate:.2}"));
        names.into_iter().chain(rates).chain([format!("{:.3}", row.part)]).collect()
    });
    let header = ["IN A SECOND", "FAMILY", "STRAIGHT", "BALANCED", "PART"];
    format!(
        "From a process of a node to a pod there, by its address and by its service's, in turns beside one agent (medians):\n\n{}",
        table(&header, 2, lines)
    )
}

fn verified_instructions(counts: &[(String, Option<u32>)]) -> String {
    let lines = counts
        .iter()
        .map(|(name, count)| vec![name.clone(), count.map_or("unknown".to_owned(), |count| count.to_string())]);
    format!("Instructions that the verifier went through:\n\n{}", table(&["PROGRAM", "INSTRUCTIONS"], 1, lines))
}

/// A table of which all columns but the first so many hold numbers.
fn table(header: &[&str], words: usize, rows: impl Iterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header).add_rows(rows);
    for column in table.column_iter_mut().skip(words) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
