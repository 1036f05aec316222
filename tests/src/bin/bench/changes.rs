//! What the agent's own work costs: a change of the services, and a pass of the garbage collector.

use std::{
    fmt::Write as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use lb_common::{
    abi::{Flow, FlowAbout, FlowKey},
    flow::{Direction, State, Tick},
    net::{IpProto, Ipv4Be, Port},
};
use lb_userspace::{
    dataplane::{Sizes, collect::Collector, kernel::Settings},
    policy::{self, Decided, Node},
    source::{Loaded, file},
};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use tests::datapath::{Datapath, with_datapath};

/// How long it takes from a services file to the kernel.
#[derive(Serialize)]
pub(crate) struct Change {
    pub(crate) services: u32,
    pub(crate) backends: u32,
    /// From bytes to the validated state.
    pub(crate) parse_ms: f64,
    /// From the validated state to the kernel's maps, from nothing.
    pub(crate) apply_ms: f64,
    /// The same where one service of all loses a backend.
    pub(crate) one_change_ms: f64,
}

/// A pass of the garbage collector.
#[derive(Serialize)]
pub(crate) struct Collection {
    /// Flows there were, each with two entries.
    pub(crate) flows: u32,
    /// Flows that were over, and are removed.
    pub(crate) removed: u64,
    /// Time of the agent's CPU.
    pub(crate) cpu_ms: f64,
}

impl Collection {
    /// How many flows are gone through in a second of CPU.
    pub(crate) fn flows_per_second(&self) -> f64 {
        f64::from(self.flows) / self.cpu_ms * 1e3
    }
}

/// Measures changes of the services.
pub(crate) fn changes() -> Result<Vec<Change>> {
    let sizes = Sizes { flows: 1 << 12, pending_flows: 1 << 12, ..Sizes::DEFAULT };
    let all = [(5_000, 50), (100_000, 2)];
    all.into_iter()
        .map(|(services, backends)| with_datapath(sizes, |datapath| change(datapath, services, backends)))
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
    let parse = |text: &str| file::parse(Path::new("services.yaml"), text.as_bytes(), None);
    let (all, but_one) = (file(None), file(Some(services / 2)));
    let begin = Instant::now();
    let all = parse(&all)?;
    let parse_ms = milliseconds(begin.elapsed());
    let but_one = parse(&but_one)?;
    let begin = Instant::now();
    datapath.tables.apply(&decided(&all))?;
    let apply_ms = milliseconds(begin.elapsed());
    let begin = Instant::now();
    datapath.tables.apply(&decided(&but_one))?;
    let one_change_ms = milliseconds(begin.elapsed());
    Ok(Change { services, backends: services * backends, parse_ms, apply_ms, one_change_ms })
}

/// What is to be served of a file, on a node without addresses.
fn decided(loaded: &Loaded) -> Arc<Decided> {
    Arc::new(policy::decide(&loaded.desired, &Node::default()))
}

/// Measures a pass over a million flows of which every tenth is over, in tables of twice the room, and then one more over
/// those that are left.
pub(crate) fn collections() -> Result<Vec<Collection>> {
    const FLOWS: u32 = 1_000_000;
    let sizes = Sizes { flows: 2 * FLOWS, pending_flows: 1 << 12, ..Sizes::DEFAULT };
    with_datapath(sizes, |datapath| {
        let kernel = datapath.tables.dataplane_mut();
        fill(kernel.flows().0, FLOWS)?;
        let mut collector = Collector::new(Settings::default().timeouts);
        let (mut flows, mut passes) = (FLOWS, Vec::new());
        for _ in 0..2 {
            let begin = cpu_time()?;
            kernel.collect(&mut collector, Duration::MAX)?;
            let cpu_ms = milliseconds(cpu_time()?.saturating_sub(begin));
            let pass = collector.last().context("the pass is over")?;
            passes.push(Collection { flows, removed: pass.removed, cpu_ms });
            flows -= pass.removed as u32;
        }
        Ok(passes)
    })
}

/// Adds flows of a thousand backends to a table: of ten, one has ended long ago.
fn fill(table: &mut lb_userspace::dataplane::kernel::FlowMap<Ipv4Be>, flows: u32) -> Result<()> {
    let timeouts = Settings::default().timeouts;
    let now = Tick::from_ns(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos() as u64);
    for number in 0..flows {
        let client = Ipv4Be::from_bytes((0x0A00_0000 + number / 4).to_be_bytes());
        let address = |byte| Ipv4Be::from_bytes([192, 0, 2, byte]);
        let ports = (Port::from_host(1024 + (number % 4) as u16), Port::from_host(80));
        let asked = FlowKey::new(client, address(1), ports, IpProto::TCP);
        let answer = FlowKey::new(client, address(2), ports, IpProto::TCP).reversed();
        let (state, age) =
            if number % 10 == 0 { (State::Closing, timeouts.closing + 1) } else { (State::Established, 0) };
        for (key, other, direction) in [(asked, answer, Direction::Request), (answer, asked, Direction::Reply)] {
            let (backend, now) = (number % 1000, Tick(now.0.saturating_sub(age)));
            let about = FlowAbout { direction, backend, generation: 0, flags: 0, now };
            table.insert(key, Flow { state: state as u8, ..Flow::new(&key, &other, &about) }, 0)?;
        }
    }
    Ok(())
}

/// The time that this thread has had of a CPU.
fn cpu_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
