//! `cargo xtask bench`: what a packet costs, in nanoseconds of the real program, net of the packet generator.
//!
//! The generator (an XDP program, too) lays each packet down and tail-calls the program under test, so that packets of
//! as many flows as wanted go through it in one `BPF_PROG_TEST_RUN`. What the generator costs by itself is measured in
//! the same round with a program that does nothing, and taken off.

use std::{fmt::Write as _, path::Path, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, TestRunOptions,
    maps::{Array, MapData, ProgramArray},
    programs::{TestRun as _, Xdp},
};
use clap::{Parser, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use lb_common::generator::{LENGTH, Traffic};
use lb_userspace::{dataplane::Sizes, source::file};
use serde::Serialize;
use tests::{
    datapath::{Datapath, with_datapath},
    packet::Packet,
};

static GENERATOR: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/wharf-generator"));

/// How often each figure is measured; the median counts, so that a neighbour's burst does not.
const ROUNDS: usize = 5;
/// Packets a round: enough for a second's hundredth even of the cheapest.
const PACKETS: u32 = 1 << 20;
/// Backends of each service: enough for a million flows to find a source port each.
const BACKENDS: u32 = 250;

/// Measures what a packet costs
#[derive(Parser)]
struct Args {
    /// How to print the figures
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// Leave out the runs with a million flows and with 100,000 services
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// The figures.
#[derive(Serialize)]
struct Report {
    /// What the verifier says of the program.
    verified_instructions: Option<u32>,
    /// Net ns a packet.
    rows: Vec<Row>,
    /// Where the time goes: IPv4 packets that are done with early, by the reason that they are counted under.
    steps: Vec<Step>,
    /// What a change of the services costs.
    changes: Vec<Change>,
}

/// A packet that goes part of the way.
#[derive(Clone, Serialize)]
struct Step {
    /// How it is counted.
    reason: &'static str,
    /// What is done for it.
    what: &'static str,
    /// Net ns.
    ns: f64,
}

/// How long it takes from a services file to the kernel.
#[derive(Clone, Serialize)]
struct Change {
    services: u32,
    backends: u32,
    /// From bytes to the validated state.
    parse_ms: f64,
    /// From the validated state to the kernel's maps, from nothing.
    apply_ms: f64,
    /// The same where one service of all loses a backend.
    one_change_ms: f64,
}

/// One line of the table.
#[derive(Clone, Serialize)]
struct Row {
    family: &'static str,
    protocol: &'static str,
    services: u32,
    flows: u32,
    /// A packet of a known flow.
    established_ns: f64,
    /// A packet that opens a flow; none for one flow, which can't be opened twice.
    open_ns: Option<f64>,
    /// What the generator costs by itself.
    generator_ns: f64,
}

#[derive(Clone, Copy)]
enum Kind {
    Tcp,
    Udp,
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
    let mut report = Report { verified_instructions: None, rows: Vec::new(), steps: Vec::new(), changes: Vec::new() };
    let mut cases = Vec::new();
    for is_v6 in [false, true] {
        for kind in [Kind::Tcp, Kind::Udp] {
            let flows = [1, 1 << 10, 1 << 16, 1 << 20];
            cases.extend(flows.into_iter().map(|flows| (is_v6, kind, 1, flows)));
        }
        cases.extend([1, 1_000, 100_000].map(|services| (is_v6, Kind::Tcp, services, 1 << 17)));
    }
    if args.quick {
        cases.retain(|&(_, _, services, flows)| services < 100_000 && flows < 1 << 20);
    }
    let total = cases.len();
    for (number, (is_v6, kind, services, flows)) in cases.into_iter().enumerate() {
        eprint!("\r\x1b[K{} of {total}: {flows} flows, {services} services", number + 1);
        let sizes = Sizes { services: 2 * services.max(8), flows: (flows + flows / 4).max(1 << 12), ..Sizes::DEFAULT };
        let (row, instructions) = with_datapath(sizes, |datapath| measure(datapath, is_v6, kind, services, flows))?;
        report.verified_instructions = instructions;
        report.rows.push(row);
    }
    report.steps = with_datapath(Sizes { flows: 1 << 12, ..Sizes::DEFAULT }, steps)?;
    for (services, backends) in [(5_000, 50), (100_000, 2)] {
        eprint!("\r\x1b[Kchanges with {services} services of {backends} backends");
        let sizes = Sizes { flows: 1 << 12, ..Sizes::DEFAULT };
        report.changes.push(with_datapath(sizes, |datapath| change(datapath, services, backends))?);
    }
    eprint!("\r\x1b[K");
    match args.output {
        Format::Table => println!("{}", text(&report)),
        Format::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(())
}

fn measure(datapath: &mut Datapath, is_v6: bool, kind: Kind, services: u32, flows: u32) -> Result<(Row, Option<u32>)> {
    datapath.apply(&services_file(is_v6, services));
    let mut generator = Generator::load(datapath)?;
    let opening = traffic(is_v6, kind, true, services, flows);
    let steady = traffic(is_v6, kind, false, services, flows);

    generator.aim(Target::Nothing, datapath)?;
    let idle = generator.send(&steady, PACKETS)?;
    generator.aim(Target::Wharf, datapath)?;
    let opened = datapath.count("tx");
    let open = generator.send(&opening, flows)?;
    anyhow::ensure!(
        datapath.count("tx") - opened == u64::from(flows),
        "not every flow was opened: {:?}",
        datapath.tables.dataplane().counters()
    );
    // The second packet of a connection changes its state; from the third on nothing is written.
    generator.send(&steady, flows)?;

    let (established_ns, generator_ns) = generator.net(datapath, &steady)?;
    let row = Row {
        family: if is_v6 { "IPv6" } else { "IPv4" },
        protocol: match kind {
            Kind::Tcp => "TCP",
            Kind::Udp => "UDP",
        },
        services,
        flows,
        established_ns,
        open_ns: (flows > 1).then_some(open - idle),
        generator_ns,
    };
    let instructions = datapath.tables.dataplane_mut().verified_instructions()?;
    Ok((row, instructions))
}

fn steps(datapath: &mut Datapath) -> Result<Vec<Step>> {
    datapath.apply(&services_file(false, 1));
    let mut generator = Generator::load(datapath)?;
    let steady = traffic(false, Kind::Tcp, false, 1, 1);
    let mut not_ip = steady;
    // The Ethernet protocol is in bytes 12 and 13, the second half of the second word.
    let mut bytes: Vec<u8> = not_ip.packet.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.splice(12..14, [0x08, 0x06]);
    for (word, chunk) in not_ip.packet.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_ne_bytes(*chunk);
    }
    let elsewhere = Traffic { service: 0x0A90_0000, ..steady };
    generator.aim(Target::Wharf, datapath)?;
    generator.send(&traffic(false, Kind::Tcp, true, 1, 1), 1)?;
    generator.send(&steady, 1)?;
    let steps = [
        ("not-ip", "called, Ethernet read, counted", not_ip),
        ("not-service", "and IP and TCP read, no flow and no service found", elsewhere),
        ("tx", "and instead a flow found and copied, the packet translated", steady),
    ];
    steps
        .into_iter()
        .map(|(reason, what, traffic)| {
            let before = datapath.count(reason);
            let ns = generator.net(datapath, &traffic)?.0;
            anyhow::ensure!(datapath.count(reason) > before, "no packet was counted as {reason}");
            Ok(Step { reason, what, ns })
        })
        .collect()
}

fn change(datapath: &mut Datapath, services: u32, backends: u32) -> Result<Change> {
    let file = |without: Option<u32>| {
        let mut text = String::from("services:\n");
        for service in 0..services {
            let [_, a, b, c] = service.to_be_bytes();
            let from = u32::from(without == Some(service));
            let list: Vec<_> = (from..backends).map(|backend| format!("10.{backend}.{b}.{c}")).collect();
            let _ = writeln!(
                text,
                "  - name: s{service}\n    addresses: [11.{a}.{b}.{c}]\n    ports: [{{ port: 80 }}]\n    backends: [{}]",
                list.join(", ")
            );
        }
        text
    };
    let parse = |text: &str| file::parse(Path::new("services.yaml"), text.as_bytes());
    let (all, but_one) = (file(None), file(Some(services / 2)));
    let begin = Instant::now();
    let all = parse(&all)?;
    let parse_ms = milliseconds(begin);
    let but_one = parse(&but_one)?;
    let begin = Instant::now();
    datapath.tables.apply(&all.desired)?;
    let apply_ms = milliseconds(begin);
    let begin = Instant::now();
    datapath.tables.apply(&but_one.desired)?;
    let one_change_ms = milliseconds(begin);
    Ok(Change { services, backends: services * backends, parse_ms, apply_ms, one_change_ms })
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// What the generator calls.
#[derive(Clone, Copy)]
enum Target {
    Wharf,
    Nothing,
}

/// The loaded generator.
struct Generator {
    object: Ebpf,
    traffic: Array<MapData, Traffic>,
    under_test: ProgramArray<MapData>,
    ingress: u32,
}

impl Generator {
    fn load(datapath: &Datapath) -> Result<Self> {
        let mut object = Ebpf::load(GENERATOR)?;
        for name in ["generate", "nothing"] {
            program(&mut object, name)?.load()?;
        }
        let traffic = Array::try_from(object.take_map("TRAFFIC").context("the object has no map TRAFFIC")?)?;
        let under_test =
            ProgramArray::try_from(object.take_map("UNDER_TEST").context("the object has no map UNDER_TEST")?)?;
        Ok(Self { object, traffic, under_test, ingress: datapath.up() })
    }

    fn aim(&mut self, target: Target, datapath: &mut Datapath) -> Result<()> {
        let fd = match target {
            Target::Wharf => datapath.tables.dataplane_mut().program()?.fd()?,
            Target::Nothing => program(&mut self.object, "nothing")?.fd()?,
        };
        Ok(self.under_test.set(0, fd, 0)?)
    }

    /// Net ns a packet, and the generator's own: the median of several rounds, each with both.
    fn net(&mut self, datapath: &mut Datapath, traffic: &Traffic) -> Result<(f64, f64)> {
        let mut figures = Vec::new();
        for _ in 0..ROUNDS {
            self.aim(Target::Nothing, datapath)?;
            let generator_ns = self.send(traffic, PACKETS)?;
            self.aim(Target::Wharf, datapath)?;
            figures.push((self.send(traffic, PACKETS)? - generator_ns, generator_ns));
        }
        figures.sort_by(|a, b| a.0.total_cmp(&b.0));
        figures.get(ROUNDS / 2).copied().context("there are rounds")
    }

    /// Sends so many packets; gives ns a packet, the generator's own time included.
    fn send(&mut self, traffic: &Traffic, packets: u32) -> Result<f64> {
        self.traffic.set(0, traffic, 0)?;
        let context: Vec<u8> =
            [0, LENGTH as u32, 0, self.ingress, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
        let result = program(&mut self.object, "generate")?.test_run(TestRunOptions {
            data_in: Some(&[0; LENGTH]),
            ctx_in: Some(&context),
            repeat: packets,
            ..TestRunOptions::new()
        })?;
        // The kernel gives the mean, in whole nanoseconds.
        Ok(result.duration.as_secs_f64() * 1e9)
    }
}

fn program<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    Ok(object.program_mut(name).with_context(|| format!("the object has no program {name}"))?.try_into()?)
}

/// Services that stand one after another from 10.128.0.0 or `fd00:5::`, with backends behind the router.
fn services_file(is_v6: bool, services: u32) -> String {
    let backends = |first: &str| {
        (0..BACKENDS)
            .map(|i| format!("\"{first}{}\"", if is_v6 { format!("{i:x}") } else { i.to_string() }))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let mut text = String::from("services:\n");
    for service in 0..services {
        let [a, b, c, d] = (0x0A80_0000 + service).to_be_bytes();
        let address = if is_v6 {
            format!("fd00:5::{:x}:{:x}", service >> 16, service & 0xFFFF)
        } else {
            format!("{a}.{b}.{c}.{d}")
        };
        let first = if is_v6 { "fd00:b::" } else { "10.2.0." };
        // Many services share few backends each, or the file would be larger than it is worth.
        let list = if services > 1 {
            let host = service % BACKENDS;
            if is_v6 { format!("\"{first}{host:x}\"") } else { format!("{first}{host}") }
        } else {
            backends(first)
        };
        let _ = writeln!(
            text,
            "  - name: s{service}\n    addresses: [\"{address}\"]\n    ports: [{{ port: 80, protocol: TCP }}, {{ port: 80, protocol: UDP }}]\n    backends: [{list}]"
        );
    }
    text
}

fn traffic(is_v6: bool, kind: Kind, opens: bool, services: u32, flows: u32) -> Traffic {
    let packet = if is_v6 { Packet::v6("fd00:c::", "fd00:5::") } else { Packet::v4("172.16.0.0", "10.128.0.0") };
    let network = 14;
    let header = if is_v6 { 40 } else { 20 };
    let packet = match (kind, opens) {
        (Kind::Tcp, true) => packet.tcp(1024, 80).syn(),
        (Kind::Tcp, false) => packet.tcp(1024, 80).ack(),
        (Kind::Udp, _) => packet.udp(1024, 80),
    };
    let transport = match kind {
        Kind::Tcp => 20,
        Kind::Udp => 8,
    };
    let bytes = packet.payload(&vec![0x55; LENGTH - network - header - transport]).bytes();
    let mut words = [0; LENGTH / 8];
    for (word, chunk) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_ne_bytes(*chunk);
    }
    let (source_end, destination_end) = if is_v6 { (24, 40) } else { (16, 20) };
    Traffic {
        packet: words,
        next: 0,
        flow_mask: flows - 1,
        client_offset: (network + source_end - 4) as u16,
        port_offset: (network + header) as u16,
        service_offset: (network + destination_end - 4) as u16,
        _pad: 0,
        client: if is_v6 { 0 } else { 0xAC10_0000 },
        service: if is_v6 { 0 } else { 0x0A80_0000 },
        services,
    }
}

fn text(report: &Report) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["FAMILY", "PROTOCOL", "SERVICES", "FLOWS", "ESTABLISHED ns", "OPEN ns", "(GENERATOR ns)"]);
    for row in &report.rows {
        table.add_row([
            row.family.to_owned(),
            row.protocol.to_owned(),
            row.services.to_string(),
            row.flows.to_string(),
            format!("{:.0}", row.established_ns),
            row.open_ns.map_or("-".to_owned(), |ns| format!("{ns:.0}")),
            format!("{:.0}", row.generator_ns),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut changes = Table::new();
    changes.load_style(presets::NOTHING);
    changes.set_header(["SERVICES", "BACKENDS", "PARSE ms", "APPLY ms", "ONE CHANGE ms"]);
    for row in &report.changes {
        let times = [row.parse_ms, row.apply_ms, row.one_change_ms].map(|ms| format!("{ms:.1}"));
        changes.add_row([row.services.to_string(), row.backends.to_string()].into_iter().chain(times));
    }
    for column in changes.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut steps = Table::new();
    steps.load_style(presets::NOTHING);
    steps.set_header(["COUNTED AS", "ns", "WHAT IS DONE"]);
    for step in &report.steps {
        steps.add_row([step.reason.to_owned(), format!("{:.0}", step.ns), step.what.to_owned()]);
    }
    let instructions = report.verified_instructions.map_or("unknown".to_owned(), |count| count.to_string());
    format!(
        "XDP, net ns a packet (median of {ROUNDS} rounds of {PACKETS} packets), next hop resolved:\n\n{table}\n\n\
         Where the time of an IPv4 packet goes, at one flow:\n\n{steps}\n\n\
         From a services file to the kernel:\n\n{changes}\n\n\
         instructions that the verifier went through: wharf_xdp {instructions}"
    )
}
