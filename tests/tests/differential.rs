//! The programs and the reference agree on random services and packet sequences.
//!
//! `WHARF_SEQUENCES` says how many are played, `WHARF_SEED` which: the same seed and number play the same again. A mismatch is
//! told with its seed, and step by step: the services, each packet and what became of it, and what else may have become of the last.
#![expect(clippy::panic, reason = "this is test code: it fails by panicking")]

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use lb_common::flow::{self, Tick};
use lb_userspace::dataplane::{
    Sizes,
    kernel::{Hook as Program, Settings},
};
use proptest::test_runner::RngSeed;
use tests::{
    datapath::{Datapath, Link, NODE, with_datapath, with_settings},
    number,
    reference::{
        Action, Hook, Ran, Reference, Timeouts,
        packet::Packet,
        sequence::{self, CASES, Case, Mismatch, Programs, SHORT, SNAT_PORTS, Stage, UPLINK, explore},
        service::{Service, yaml},
    },
};

const SIZES: Sizes = Sizes {
    services: 1024,
    backends: 8192,
    slots: 1 << 18,
    flows: 1 << 17,
    pending_flows: 1 << 17,
    affinity_clients: 1 << 16,
    source_ranges: 1 << 12,
};

/// How many sequences are played where nothing is said.
const SEQUENCES: u32 = 2_000;

const TIMEOUTS: Timeouts = Timeouts { opening: 60, established: 8_000, closing: 10, datagram: 60 };

/// A services file without services.
const NOTHING: &str = "services: []";

/// The loaded programs.
struct Loaded<'a> {
    datapath: &'a mut Datapath,
    /// What the counters said before the packet.
    counts: BTreeMap<&'static str, u64>,
}

impl<'a> Loaded<'a> {
    fn new(datapath: &'a mut Datapath) -> Self {
        let counts = datapath.counts();
        Self { datapath, counts }
    }
}

impl Programs for Loaded<'_> {
    fn apply(&mut self, services: &[Service]) {
        self.datapath.publish(&yaml(services, NODE));
    }

    fn wait(&mut self, seconds: u32) {
        thread::sleep(Duration::from_secs(seconds.into()));
    }

    fn reclaim(&mut self) {
        self.datapath.reclaim();
    }

    fn run(&mut self, hook: Hook, is_tc: bool, packet: &Packet) -> Option<Ran> {
        let packet = packet.bytes();
        let (program, link) = match (hook, is_tc) {
            (Hook::Uplink(link), false) => (Program::Xdp, uplink(link)),
            (Hook::Uplink(link), true) => (Program::TcIngress, uplink(link)),
            (Hook::Pod, _) => (Program::TcPod, Link::Pod),
            (Hook::Egress | Hook::Own, _) => (Program::TcEgress, Link::Up),
        };
        let run = match hook {
            Hook::Own => self.datapath.run_own(link, &packet, 0),
            _ => self.datapath.run(program, link, &packet),
        };
        let [pass, drop, send] = if let Program::Xdp = program {
            // XDP_PASS, XDP_DROP, XDP_TX and XDP_REDIRECT.
            [&[2][..], &[1], &[3, 4]]
        } else {
            // TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT.
            [&[u32::MAX][..], &[2], &[7]]
        };
        let action = match run.action {
            it if pass.contains(&it) => Action::Pass,
            it if drop.contains(&it) => Action::Drop,
            it if send.contains(&it) => Action::Send,
            other => panic!("{program:?} gives the action {other}"),
        };
        let counts = self.datapath.counts();
        let rose = counts.iter().filter(|(name, count)| self.counts.get(*name) != Some(*count));
        let reason = rose.map(|(name, _)| *name).collect::<Vec<_>>().join(" and ");
        self.counts = counts;
        Some(Ran { action, reason, packet: run.packet })
    }
}

fn uplink(link: usize) -> Link {
    if link == UPLINK { Link::Up } else { Link::Down }
}

#[test]
fn programs_do_what_the_reference_says() {
    let sequences = number("WHARF_SEQUENCES").map_or(SEQUENCES, |number| u32::try_from(number).expect("it is small"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
    let seed = number("WHARF_SEED").unwrap_or(now.as_secs());
    println!("WHARF_SEED={seed}");
    let begin = Instant::now();
    // At least two batches: pings are answered in every second one.
    let size = CASES.min(sequences.div_ceil(2)).max(1);
    with_datapath(SIZES, |datapath| {
        for (batch, first) in (0..sequences).step_by(size as usize).enumerate() {
            let (seed, answer_ping) = (seed + batch as u64, batch % 2 == 1);
            let settings = Settings { snat_ports: SNAT_PORTS, answer_ping, ..Settings::default() };
            datapath.with(settings, NOTHING, |datapath| {
                let mut programs = Loaded::new(datapath);
                let found = explore(size.min(sequences - first), RngSeed::Fixed(seed), |case, stage| {
                    case.play(stage, Reference::new(sequence::node(answer_ping, TIMEOUTS)), &mut programs)
                });
                if let Err(Mismatch { steps, story }) = found {
                    panic!("batch {batch} of WHARF_SEED={} finds, in {steps} steps:\n{story}", seed - batch as u64);
                }
            });
        }
    });
    println!("{sequences} sequences in {:.1?}", begin.elapsed());
}

#[test]
fn flows_grow_old_as_the_reference_says() {
    let Timeouts { opening, established, closing, datagram } = SHORT;
    let [opening, established, closing, datagram] = [opening, established, closing, datagram].map(Tick::from_seconds);
    let timeouts = flow::Timeouts { opening, established, closing, datagram };
    let settings = Settings { snat_ports: SNAT_PORTS, timeouts, ..Settings::default() };
    // The two kinds of program wait at once.
    thread::scope(|scope| {
        for is_tc in [false, true] {
            let settings = settings.clone();
            scope.spawn(move || {
                with_settings(SIZES, settings, |datapath| {
                    let reference = Reference::new(sequence::node(false, SHORT));
                    let played = Case::aging(is_tc).play(Stage(0), reference, &mut Loaded::new(datapath));
                    played.unwrap_or_else(|story| panic!("{story}"));
                });
            });
        }
    });
}
