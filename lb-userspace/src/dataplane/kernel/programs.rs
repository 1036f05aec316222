//! The programs of the object: what they are called, how they are loaded, handed to each other, and run on single packets.

use std::{os::fd::AsFd as _, path::Path};

use aya::{
    Ebpf, TestRunOptions,
    maps::{Map, MapError, ProgramArray},
    programs::{Program, ProgramError, ProgramFd, SchedClassifier, TestRun as _, Xdp},
};
use aya_obj::programs::XdpAttachType;
use lb_common::verdict::Stage;

use super::sys;
use crate::dataplane::{DataplaneError, tables::Drift};

/// Where packets meet one of our programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// What comes in by an uplink, in XDP.
    Xdp,
    /// What comes in by an uplink, in tc: in place of XDP.
    TcIngress,
    /// What comes in by a pod-facing device, in tc: what a pod sends.
    TcPod,
    /// What leaves by an uplink or a pod-facing device, in tc.
    TcEgress,
}

impl Hook {
    /// Every hook.
    pub const ALL: [Self; 4] = [Self::Xdp, Self::TcIngress, Self::TcPod, Self::TcEgress];

    /// The name of the program in the object.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Xdp => "wharf_xdp",
            Self::TcIngress => "wharf_tc_ingress",
            Self::TcPod => "wharf_tc_pod",
            Self::TcEgress => "wharf_tc_egress",
        }
    }

    /// The name in messages and of pins.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::TcIngress => "tc-ingress",
            Self::TcPod => "tc-pod",
            Self::TcEgress => "tc-egress",
        }
    }

    /// What a test run tells the kernel of a packet of so many bytes at this interface: the beginning of the program's
    /// context, as `BPF_PROG_TEST_RUN` takes it.
    pub fn context(self, length: u32, interface: u32, origin: Origin) -> Vec<u8> {
        let (ingress, gso_size) = match origin {
            Origin::Received => (interface, 0),
            Origin::Own { gso_size } => (0, gso_size),
        };
        let mut words = if self == Self::Xdp {
            // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
            vec![0, length, 0, ingress, 0, 0]
        } else {
            // The beginning of `struct __sk_buff`: nine words, of which the kernel wants all but the mark to be zero
            // (`convert___skb_to_skb` in `net/bpf/test_run.c`), then ingress_ifindex and ifindex.
            vec![0, 0, 0, 0, 0, 0, 0, 0, 0, ingress, interface]
        };
        if gso_size != 0 {
            // Its last word.
            words.resize(44, 0);
            words.push(u32::from(gso_size));
        }
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }
}

/// Where the packet of a test run is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It came in by the interface, or by another one where it leaves.
    Received,
    /// A process of the node has sent it: it came in by no interface.
    Own {
        /// How many bytes of payload each of the packets has that it stands for (`skb_shared_info.gso_size`); 0: it stands for itself.
        gso_size: u16,
    },
}

/// The program arrays by which programs of one kind hand packets on, with what the names of such programs begin with.
/// The kernel empties an array when the agent's last handle of it is closed, whatever program still uses it
/// (`prog_array_map_clear` in `kernel/bpf/arraymap.c`).
const STAGES: [(&str, &str); 2] = [("XDP_STAGES", "wharf_xdp"), ("TC_STAGES", "wharf_tc")];

/// Loads every program, and lets them find each other for as long as the object lives, or what is pinned: in a directory, if
/// there is one for it.
pub(super) fn load(object: &mut Ebpf, pins: Option<&Path>) -> Result<(), DataplaneError> {
    for name in names() {
        let program = object.program_mut(&name).ok_or_else(|| missing(&name))?;
        match program {
            Program::Xdp(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            _ => Err(ProgramError::UnexpectedProgramType),
        }
        .map_err(|error| refused(&name, error))?;
        if let Some(path) = pins.map(|directory| directory.join(&name)) {
            program.pin(&path).map_err(|source| DataplaneError::Pin { path, source })?;
        }
    }
    for (array, kind) in STAGES {
        if let (Some(directory), Some(map)) = (pins, object.map(array)) {
            let path = directory.join(array);
            map.pin(&path).map_err(|source| DataplaneError::Pin { path, source })?;
        }
        Stage::ALL.into_iter().try_for_each(|stage| set_stage(object, array, kind, stage))?;
    }
    Ok(())
}

/// Makes the programs of one kind hand packets of a stage on to its program.
fn set_stage(object: &mut Ebpf, array: &'static str, kind: &str, stage: Stage) -> Result<(), DataplaneError> {
    let refused = |source| DataplaneError::Entries { name: array, source };
    let program = descriptor(object, &stage_name(kind, stage))?.try_clone();
    let program = program.map_err(|error| refused(MapError::IoError(error)))?;
    let map = object.map_mut(array).ok_or(DataplaneError::Map { name: array, source: None })?;
    ProgramArray::try_from(map).and_then(|mut stages| stages.set(stage as u32, &program, 0)).map_err(refused)
}

/// Looks for stages that are not handed on to their programs, and puts that right if that is asked for.
pub(super) fn audit_stages(object: &mut Ebpf, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
    let mut drift = Vec::new();
    for (array, kind) in STAGES {
        for stage in Stage::ALL {
            let name = stage_name(kind, stage);
            let program = object.program(&name).ok_or_else(|| missing(&name))?;
            let expected = program.info().map_err(|error| refused(&name, error))?.id();
            let Some(Map::ProgramArray(stages)) = object.map(array) else {
                return Err(DataplaneError::Map { name: array, source: None });
            };
            let found = sys::program_in(stages.fd().as_fd(), stage as u32)
                .map_err(|error| DataplaneError::Entries { name: array, source: MapError::IoError(error) })?;
            if found == Some(expected) {
                continue;
            }
            let found = found.map_or_else(|| "not there".to_owned(), |id| format!("program {id}"));
            let (entry, expected) = (stage.name().to_owned(), format!("program {expected}"));
            drift.push(Drift { map: array, entry, expected, found });
            if repair {
                set_stage(object, array, kind, stage)?;
            }
        }
    }
    Ok(drift)
}

/// How many stages there are to look at.
pub(super) const N_STAGES: usize = STAGES.len() * Stage::ALL.len();

/// Every program by its name: those of the hooks, then those that they hand packets on to.
pub(super) fn names() -> impl Iterator<Item = String> {
    let stages = STAGES.iter().flat_map(|(_, kind)| Stage::ALL.map(|stage| stage_name(kind, stage)));
    Hook::ALL.map(|hook| hook.program().to_owned()).into_iter().chain(stages)
}

fn stage_name(kind: &str, stage: Stage) -> String {
    format!("{kind}_{}", stage.name())
}

/// How many instructions the verifier went through for each program; `None` on kernels that don't say.
pub(super) fn verified_instructions(object: &Ebpf) -> Result<Vec<(String, Option<u32>)>, DataplaneError> {
    names()
        .map(|name| {
            let program = object.program(&name).ok_or_else(|| missing(&name))?;
            let info = program.info().map_err(|error| refused(&name, error))?;
            Ok((name, info.verified_instruction_count()))
        })
        .collect()
}

/// A loaded program's file descriptor.
pub(super) fn descriptor<'a>(object: &'a Ebpf, name: &str) -> Result<&'a ProgramFd, DataplaneError> {
    object.program(name).ok_or_else(|| missing(name))?.fd().map_err(|error| refused(name, error))
}

/// A program of the object, as the kind that it has to be.
pub(super) fn program<'a, P>(object: &'a mut Ebpf, name: &str) -> Result<P, DataplaneError>
where
    P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    P::try_from(object.program_mut(name).ok_or_else(|| missing(name))?).map_err(|error| refused(name, error))
}

fn missing(name: &str) -> DataplaneError {
    DataplaneError::Program { name: name.to_owned(), source: None }
}

pub(super) fn refused(name: &str, error: ProgramError) -> DataplaneError {
    DataplaneError::Program { name: name.to_owned(), source: Some(Box::new(error)) }
}

/// What became of a packet in a test run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRun {
    /// The XDP action, or that of tc.
    pub action: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
}

/// Runs a loaded program on single packets (`BPF_PROG_TEST_RUN`), also from another thread while the tables change.
#[derive(Debug)]
pub struct Runner {
    hook: Hook,
    program: Kind,
}

#[derive(Debug)]
enum Kind {
    Xdp(Xdp),
    Tc(SchedClassifier),
}

/// By how many bytes a packet may grow: an answer is headers, of which the longest are those of IPv6, and what it quotes.
const GROWTH: usize = 256;

impl Runner {
    pub(super) fn new(object: &Ebpf, hook: Hook) -> Result<Self, DataplaneError> {
        let name = hook.program();
        let program = object.program(name).ok_or_else(|| missing(name))?;
        let info = program.info().map_err(|error| refused(name, error))?;
        let program = match hook {
            Hook::Xdp => Xdp::from_program_info(info, name.into(), XdpAttachType::Interface).map(Kind::Xdp),
            _ => SchedClassifier::from_program_info(info, name.into()).map(Kind::Tc),
        };
        Ok(Self { hook, program: program.map_err(|error| refused(name, error))? })
    }

    /// Runs the program on a packet, as if it came in by an interface of this network namespace, or left by it where
    /// the hook is at egress. Flows and counters change as they would; nothing is sent.
    pub fn run(&mut self, packet: &[u8], interface: u32, origin: Origin) -> Result<TestRun, DataplaneError> {
        let context = self.hook.context(u32::try_from(packet.len()).unwrap_or(u32::MAX), interface, origin);
        let mut out = vec![0; packet.len() + GROWTH];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = match &mut self.program {
            Kind::Xdp(program) => program.test_run(options),
            Kind::Tc(program) => program.test_run(options),
        }
        .map_err(|error| refused(self.hook.program(), error))?;
        out.truncate(result.data_size_out as usize);
        Ok(TestRun { action: result.return_value, packet: out })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hook_and_every_stage_of_its_kind_has_a_program() {
        let names: Vec<_> = names().collect();
        assert_eq!(names.len(), Hook::ALL.len() + STAGES.len() * Stage::ALL.len());
        for name in ["wharf_xdp", "wharf_tc_egress", "wharf_xdp_open", "wharf_tc_answer"] {
            assert!(names.iter().any(|it| it == name), "{name}");
        }
    }
}
