//! Where calls on sockets meet our programs: the hooks of a control group.

use std::{collections::BTreeMap, fs::File, io, os::unix::fs::MetadataExt as _, path::Path};

use aya::{
    Ebpf,
    maps::{HashMap, IterableMap as _, MapData},
    programs::{CgroupAttachMode, CgroupSock, CgroupSockAddr, ProgramError, links::FdLink},
};
use lb_common::{
    abi::{Backend, Translation},
    flow::Tick,
};

use super::{
    batch::lookup_batch,
    flows::now,
    programs::{program, refused},
};
use crate::dataplane::{DataplaneError, region::Region};

/// Whose sockets are balanced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketSettings {
    /// Of which network namespaces.
    pub mode: SocketMode,
    /// Which are ended when they lose their backend.
    pub ended: Ended,
    /// Whether those of other network namespaces can be. Where not, connected UDP sockets there are not balanced.
    pub ends_all: bool,
    /// Whether connected UDP sockets are left to packets: they are to be ended, and this kernel can't.
    pub leaves_udp: bool,
    /// Whether what pods send is met packet by packet.
    pub meets_pods: bool,
    /// A bit for each depth below the root at which there may be control groups whose sockets are left alone.
    pub exempt_levels: u64,
}

/// Which sockets are ended when they lose their backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Ended {
    /// None
    None,
    /// Those of UDP, which would not notice
    #[default]
    Udp,
    /// Those of TCP as well, which else stay for as long as both ends like
    All,
}

/// Of which network namespaces sockets are balanced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SocketMode {
    /// Of all: the node's own and those of pods
    On,
    /// Of the node's own: pods are served packet by packet
    #[default]
    Host,
    /// Of none
    Off,
}

impl SocketMode {
    /// The name in messages and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Host => "host",
            Self::Off => "off",
        }
    }
}

/// A hook for calls on sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SocketHook {
    /// connect(2) over IPv4.
    Connect4,
    /// connect(2) over IPv6.
    Connect6,
    /// sendto(2) and the like of UDP sockets that are not connected, over IPv4.
    Sendmsg4,
    /// The same over IPv6.
    Sendmsg6,
    /// recvfrom(2) and the like of UDP sockets, over IPv4.
    Recvmsg4,
    /// The same over IPv6.
    Recvmsg6,
    /// getpeername(2) over IPv4.
    Getpeername4,
    /// getpeername(2) over IPv6.
    Getpeername6,
    /// bind(2) over IPv4.
    Bind4,
    /// bind(2) over IPv6.
    Bind6,
    /// close(2) of whoever has it last.
    Release,
}

impl SocketHook {
    /// Every hook. Those that show processes what they asked for come before those that translate: nobody is shown a backend.
    pub const ALL: [Self; 11] = [
        Self::Release,
        Self::Recvmsg4,
        Self::Recvmsg6,
        Self::Getpeername4,
        Self::Getpeername6,
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::Bind4,
        Self::Bind6,
    ];

    /// The name of the program in the object.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Connect4 => "wharf_connect4",
            Self::Connect6 => "wharf_connect6",
            Self::Sendmsg4 => "wharf_sendmsg4",
            Self::Sendmsg6 => "wharf_sendmsg6",
            Self::Recvmsg4 => "wharf_recvmsg4",
            Self::Recvmsg6 => "wharf_recvmsg6",
            Self::Getpeername4 => "wharf_getpeername4",
            Self::Getpeername6 => "wharf_getpeername6",
            Self::Bind4 => "wharf_bind4",
            Self::Bind6 => "wharf_bind6",
            Self::Release => "wharf_release",
        }
    }

    /// The name in messages and of pins.
    pub fn name(self) -> &'static str {
        self.program().trim_start_matches("wharf_")
    }

    /// What is not done where a kernel does not have it.
    pub const fn cost(self) -> &'static str {
        match self {
            Self::Connect4 | Self::Connect6 => {
                "what processes connect to is not translated once, but packet by packet as they send it, which is slower; NodePorts at \
                 localhost are not served"
            }
            Self::Sendmsg4 | Self::Sendmsg6 => {
                "datagrams of UDP sockets that are not connected are balanced packet by packet, as they are sent; NodePorts at localhost are \
                 not served to them"
            }
            Self::Recvmsg4 | Self::Recvmsg6 => {
                "UDP sockets would see answers come from backends, so their datagrams are balanced packet by packet, as they are sent; \
                 NodePorts at localhost are not served to them"
            }
            Self::Getpeername4 | Self::Getpeername6 => {
                "processes that ask for their peer see the backend, not the service"
            }
            Self::Bind4 | Self::Bind6 => {
                "a process may listen on a port that is a NodePort, and never gets a connection"
            }
            Self::Release => {
                "the tables of sockets fill up; then connected UDP sockets are not balanced any more, and processes see the backend as the peer \
                 of TCP connections"
            }
        }
    }

    /// The hooks by which UDP sockets see answers come from the service: those of IPv6 may talk IPv4.
    pub(super) const SHOWING: [Self; 2] = [Self::Recvmsg4, Self::Recvmsg6];

    /// The hooks without which this one does more harm than good.
    pub(super) const fn needs(self) -> &'static [Self] {
        match self {
            Self::Sendmsg4 | Self::Sendmsg6 => &Self::SHOWING,
            _ => &[],
        }
    }
}

/// A control group: version 2 (cgroups(7)).
#[derive(Debug)]
pub struct ControlGroup {
    /// What people call it.
    name: String,
    directory: File,
    id: u64,
}

impl ControlGroup {
    /// The control group with this directory; its name is for messages.
    pub fn open(path: &Path, name: String) -> io::Result<Self> {
        let directory = File::open(path)?;
        // What the kernel calls its id is the number of its directory.
        let id = directory.metadata()?.ino();
        Ok(Self { name, directory, id })
    }

    /// Its id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What people call it.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// What a hook can't be used for, and why.
#[derive(Debug)]
pub struct MissingHook {
    /// The hook.
    pub hook: SocketHook,
    /// Why.
    pub error: DataplaneError,
}

impl MissingHook {
    /// That a hook can't be used, if it can't.
    fn of((hook, used): (SocketHook, Result<(), DataplaneError>)) -> Option<Self> {
        Some(Self { hook, error: used.err()? })
    }
}

/// Loads the programs of sockets. Those that the kernel does not take are named.
pub(super) fn load(object: &mut Ebpf) -> Vec<MissingHook> {
    let mut load = |hook: SocketHook| {
        let name = hook.program();
        match hook {
            SocketHook::Release => program::<&mut CgroupSock>(object, name)?.load(),
            _ => program::<&mut CgroupSockAddr>(object, name)?.load(),
        }
        .map_err(|error| refused(name, error))
    };
    SocketHook::ALL.map(|hook| (hook, load(hook))).into_iter().filter_map(MissingHook::of).collect()
}

/// Attaches the program of a hook to a control group, beside those of others: links there are never exclusive, and the kernel takes
/// no flags that say so.
pub(super) fn attach(object: &mut Ebpf, hook: SocketHook, group: &ControlGroup) -> Result<FdLink, DataplaneError> {
    let name = hook.program();
    let attached = if hook == SocketHook::Release {
        let program: &mut CgroupSock = program(object, name)?;
        let link = program.attach(&group.directory, CgroupAttachMode::Single).and_then(|id| program.take_link(id));
        link.map(FdLink::try_from)
    } else {
        let program: &mut CgroupSockAddr = program(object, name)?;
        let link = program.attach(&group.directory, CgroupAttachMode::Single).and_then(|id| program.take_link(id));
        link.map(FdLink::try_from)
    };
    let link = attached.and_then(|link| link.map_err(|_| ProgramError::UnexpectedProgramType));
    link.map_err(|error| DataplaneError::AttachSockets {
        hook: hook.name(),
        group: group.name.clone(),
        source: Box::new(error),
    })
}

/// That an entry is made only where there is none: `BPF_NOEXIST` in `include/uapi/linux/bpf.h`.
const NOEXIST: u64 = 1;

/// What tells which sockets have lost their backends.
pub struct Watched {
    sockets: HashMap<MapData, u64, Translation>,
    backends: Region<Backend>,
}

impl Watched {
    pub(super) fn new(sockets: HashMap<MapData, u64, Translation>, backends: Region<Backend>) -> Self {
        Self { sockets, backends }
    }

    /// The sockets that are connected to backends that are gone, by their cookies.
    pub fn lost(&self) -> io::Result<BTreeMap<u64, Translation>> {
        let (mut keys, mut values, mut cursor) = (Vec::new(), Vec::new(), None);
        let mut lost = BTreeMap::new();
        loop {
            cursor = lookup_batch(self.sockets.map(), cursor, &mut keys, &mut values)?;
            let entries = keys.iter().copied().zip(values.iter().copied());
            lost.extend(entries.filter(|(_, translation): &(u64, Translation)| !self.is_current(translation)));
            if cursor.is_none() {
                return Ok(lost);
            }
        }
    }

    /// A socket needs no watching any more, unless it was connected anew since it was seen so.
    pub fn forget(&mut self, cookie: u64, seen: &Translation) {
        if self.sockets.get(&cookie, 0).is_ok_and(|now| now == *seen) {
            // It may have gone by itself.
            let _gone = self.sockets.remove(&cookie);
        }
    }

    /// A socket is to be watched on, unless it is already.
    pub fn remember(&mut self, cookie: u64, seen: &Translation) {
        let _known = self.sockets.insert(cookie, seen, NOEXIST);
    }

    /// Whether a socket was connected some seconds ago only.
    pub fn is_recent(connected: &Translation) -> bool {
        now().since(connected.last_used) <= Tick::from_seconds(3)
    }

    /// Whether the backend is still the one that was chosen.
    fn is_current(&self, &Translation { backend, generation, .. }: &Translation) -> bool {
        backend < self.backends.length() && self.backends.get(backend).generation == generation
    }
}
