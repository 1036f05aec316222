//! The loaded packet generator: sends packets to a program of the datapath, and says what one costs.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, TestRunOptions, TestRunResult,
    maps::{Array, MapData, ProgramArray},
    programs::{Program, ProgramError, ProgramFd, TestRun as _},
};
use lb_common::generator::{LENGTH, Traffic};
use lb_userspace::dataplane::kernel::{Hook, Origin};
use tests::datapath::{Datapath, Link};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/wharf-generator"));

/// How often each figure is measured; the median counts, so that a neighbour's burst does not.
pub(crate) const ROUNDS: usize = 9;
/// Packets a round, or one a flow if that is more: a few milliseconds, shorter than most bursts.
pub(crate) const PACKETS: u32 = 1 << 17;

/// The loaded generator.
pub(crate) struct Generator {
    object: Ebpf,
    traffic: Array<MapData, Traffic>,
    xdp: ProgramArray<MapData>,
    tc: ProgramArray<MapData>,
    interface: u32,
}

/// What packets cost.
#[derive(Clone, Copy)]
pub(crate) struct Cost {
    /// Net ns a packet.
    pub(crate) ns: f64,
    /// What the generator costs by itself, in ns a packet.
    pub(crate) generator_ns: f64,
}

/// What the generator calls.
#[derive(Clone, Copy)]
enum Target {
    Wharf,
    Nothing,
}

/// How many packets a round has, for so many flows.
pub(crate) fn packets_a_round(flows: u32) -> u32 {
    flows.max(PACKETS)
}

impl Generator {
    /// Loads it; packets come in by, and leave by, the clients' side of the datapath.
    pub(crate) fn load(datapath: &Datapath) -> Result<Self> {
        let mut object = Ebpf::load(OBJECT)?;
        for (name, program) in object.programs_mut() {
            match program {
                Program::Xdp(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
                _ => Err(ProgramError::UnexpectedProgramType),
            }
            .with_context(|| format!("the kernel does not take the generator's {name}"))?;
        }
        let mut map = |name| object.take_map(name).with_context(|| format!("the object has no map {name}"));
        let traffic = Array::try_from(map("TRAFFIC")?)?;
        let xdp = ProgramArray::try_from(map("XDP_UNDER_TEST")?)?;
        let tc = ProgramArray::try_from(map("TC_UNDER_TEST")?)?;
        Ok(Self { object, traffic, xdp, tc, interface: datapath.link(Link::Up) })
    }

    /// What a packet costs at a hook: the median of several rounds, in each of which the generator is measured, too.
    pub(crate) fn measure(&mut self, datapath: &Datapath, hook: Hook, traffic: &Traffic) -> Result<Cost> {
        let mut costs = Vec::new();
        for _ in 0..ROUNDS {
            costs.push(self.once(datapath, hook, traffic, packets_a_round(traffic.flow_mask + 1))?);
        }
        costs.sort_by(|a, b| a.ns.total_cmp(&b.ns));
        costs.get(ROUNDS / 2).copied().context("there are rounds")
    }

    /// What each of so many packets costs at a hook, measured once.
    pub(crate) fn once(&mut self, datapath: &Datapath, hook: Hook, traffic: &Traffic, packets: u32) -> Result<Cost> {
        self.aim(datapath, hook, Target::Nothing)?;
        let generator_ns = self.send(hook, traffic, PACKETS)?;
        self.aim(datapath, hook, Target::Wharf)?;
        Ok(Cost { ns: self.send(hook, traffic, packets)? - generator_ns, generator_ns })
    }

    fn aim(&mut self, datapath: &Datapath, hook: Hook, target: Target) -> Result<()> {
        let (calls, nothing) = match hook {
            Hook::Xdp => (&mut self.xdp, "nothing_xdp"),
            _ => (&mut self.tc, "nothing_tc"),
        };
        let fd: &ProgramFd = match target {
            Target::Wharf => datapath.tables.dataplane().program(hook)?,
            Target::Nothing => {
                let program = self.object.program(nothing);
                program.with_context(|| format!("the object has no program {nothing}"))?.fd()?
            }
        };
        Ok(calls.set(0, fd, 0)?)
    }

    /// Sends so many packets; gives ns a packet, the generator's own time included.
    fn send(&mut self, hook: Hook, traffic: &Traffic, packets: u32) -> Result<f64> {
        self.traffic.set(0, traffic, 0)?;
        let context = hook.context(LENGTH as u32, self.interface, Origin::Received);
        let options = TestRunOptions {
            data_in: Some(&[0; LENGTH]),
            ctx_in: Some(&context),
            repeat: packets,
            ..TestRunOptions::new()
        };
        let name = if hook == Hook::Xdp { "generate_xdp" } else { "generate_tc" };
        let result: TestRunResult = match self.object.program_mut(name) {
            Some(Program::Xdp(program)) => program.test_run(options),
            Some(Program::SchedClassifier(program)) => program.test_run(options),
            _ => Err(ProgramError::UnexpectedProgramType),
        }
        .with_context(|| format!("the generator's {name} does not run"))?;
        // The kernel gives the mean, in whole nanoseconds.
        Ok(result.duration.as_secs_f64() * 1e9)
    }
}
