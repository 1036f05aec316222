//! The agent's part in socket-level balancing: where its programs are attached, whose sockets are left alone, and which are ended.

use std::{io, path::PathBuf};

use futures::future;
use tracing::{error, info, warn};

use super::{Agent, Options, describe};
use crate::{
    admin::report::SocketsReport,
    cgroup::{self, CgroupError, Root, Watch},
    dataplane::kernel::{ControlGroup, Ended, Kernel, SocketHook, SocketMode, SocketSettings},
    privileges,
    sockets::{self, Ender},
};

/// What is not done where a kernel ends no sockets.
const UNENDED: &str = "connected UDP sockets would stay on backends that are gone, so they are balanced packet by packet, as they send; \
                       NodePorts at localhost are not served to them";

/// What the operator says about sockets.
#[derive(Clone, Debug)]
pub struct SocketOptions {
    /// Of which network namespaces they are balanced.
    pub mode: SocketMode,
    /// Which are ended when they lose their backend.
    pub ended: Ended,
    /// Below which control group; `None`: below the root of all.
    pub cgroup: Option<PathBuf>,
    /// The control groups whose sockets are left alone, by their names from the root on.
    pub exempt: Vec<PathBuf>,
}

/// What there is of socket-level balancing.
#[derive(Default)]
pub(super) struct Sockets {
    /// The control group that the programs are attached to.
    group: Option<ControlGroup>,
    /// Why there is none.
    failure: Option<String>,
    ender: Option<Ender>,
    /// How many backends were gone when their sockets were last ended.
    gone: u64,
    /// The control groups whose sockets are left alone.
    exempt: Option<Watch>,
    /// Why others are.
    not_exempt: Option<String>,
}

impl SocketOptions {
    /// What the programs are told, by what this process may do and this kernel can.
    pub(super) fn settings(&self, meets_pods: bool) -> SocketSettings {
        let is_ending = self.mode != SocketMode::Off && self.ended != Ended::None;
        let warn = |error: &io::Error| warn!(error = describe(error), "sock-destroy is missing: {UNENDED}");
        let leaves_udp = is_ending && sockets::check().inspect_err(warn).is_err();
        let level = |name: &PathBuf| 1_u64.checked_shl(cgroup::level(name) as u32).unwrap_or_default();
        SocketSettings {
            mode: self.mode,
            ended: self.ended,
            ends_all: self.mode == SocketMode::On && is_ending && !leaves_udp && privileges::reaches_all_namespaces(),
            leaves_udp,
            meets_pods,
            exempt_levels: self.exempt.iter().map(level).fold(0, |levels, level| levels | level),
        }
    }

    /// The control group to attach to.
    fn group(&self, root: &Result<Root, CgroupError>) -> Result<ControlGroup, String> {
        let (path, name) = match (&self.cgroup, root) {
            (Some(group), _) => {
                cgroup::check(group).map_err(|error| describe(&error))?;
                (group.as_path(), group.display().to_string())
            }
            (None, Ok(root)) => (root.directory(), root.name()),
            (None, Err(error)) => return Err(describe(error)),
        };
        ControlGroup::open(path, name).map_err(|error| format!("{} can't be opened: {error}", path.display()))
    }
}

impl Agent {
    /// Attaches to the hooks of sockets. Where that can't be, packets are balanced all the same.
    pub(super) fn attach_sockets(&mut self) -> Sockets {
        let mut sockets = Sockets { ender: self.start_ender(), ..Sockets::default() };
        let Options { sockets: options, settings, .. } = &self.options;
        let mode = options.mode;
        if mode == SocketMode::Off {
            return sockets;
        }
        let root = Root::find();
        let group = match options.group(&root) {
            Ok(group) => group,
            Err(error) => {
                warn!(
                    error,
                    "sockets are not balanced, but what processes of this node send, packet by packet, which is slower; NodePorts at \
                     localhost are not served; --socket-lb off says that this is meant"
                );
                sockets.failure = Some(error);
                return sockets;
            }
        };
        let SocketSettings { ends_all, leaves_udp, meets_pods, .. } = settings.sockets;
        if mode == SocketMode::On && options.ended != Ended::None && !ends_all && !leaves_udp {
            let what = if meets_pods {
                "connected UDP sockets of pods are not balanced as sockets, but packet by packet"
            } else {
                "connected UDP sockets of pods stay on backends that are gone, as --pod-interface names nothing by which they could be \
                 balanced packet by packet"
            };
            let of_tcp = if options.ended == Ended::All { ", and TCP connections of pods are not ended" } else { "" };
            warn!(
                "{what}{of_tcp}: to end sockets of pods when their backend is gone wharf has to enter their network namespaces, which takes \
                 CAP_SYS_ADMIN, CAP_SYS_PTRACE and to see all processes (hostPID)"
            );
        }
        if !options.exempt.is_empty() {
            match root {
                Ok(root) => sockets.exempt = Some(Watch::over(root, &options.exempt)),
                Err(error) => error!(error = describe(&error), "--socket-lb-exempt has no effect"),
            }
        }
        let kernel = self.tables.dataplane_mut();
        sockets.exempt(kernel);
        attach(kernel, &group);
        info!(
            "attached to {} of {} hooks of sockets at {} ({})",
            kernel.attached_hooks(),
            SocketHook::ALL.len(),
            group.name(),
            mode.name()
        );
        sockets.group = Some(group);
        sockets
    }

    /// Attaches to the hooks of sockets that somebody else has detached programs from.
    pub(super) fn attach_sockets_again(&mut self) {
        let Some(group) = self.sockets.as_ref().and_then(|it| it.group.as_ref()) else { return };
        let kernel = self.tables.dataplane_mut();
        if kernel.attached_hooks() + kernel.missing_hooks().len() == SocketHook::ALL.len() {
            return;
        }
        attach(kernel, group);
    }

    /// Begins to end sockets, of a former agent's making, too: even where none are balanced any more.
    fn start_ender(&mut self) -> Option<Ender> {
        let watched = self.tables.dataplane_mut().take_watched()?;
        Ender::start(watched, &self.options.settings.sockets)
            .inspect_err(|error| error!(%error, "sockets that lose their backends are not ended"))
            .ok()
    }

    /// Whether there is no process of the node that is not balanced by its sockets.
    pub(super) fn balances_all_processes_by_sockets(&self) -> bool {
        self.tables.dataplane().attached_hooks() == SocketHook::ALL.len()
            && self.options.sockets.exempt.is_empty()
            && !self.options.settings.sockets.leaves_udp
    }

    /// Has the sockets ended that are connected to backends that are gone, if any more are.
    pub(super) fn end_sockets(&mut self) {
        let Some(sockets) = &mut self.sockets else { return };
        let gone = self.tables.gone();
        if std::mem::replace(&mut sockets.gone, gone) != gone
            && let Some(ender) = &sockets.ender
        {
            ender.look();
        }
    }

    /// Looks which of the exempt control groups are there.
    pub(super) fn exempt_sockets(&mut self) {
        if let Some(sockets) = &mut self.sockets {
            sockets.exempt(self.tables.dataplane_mut());
        }
    }

    pub(super) fn sockets_report(&self) -> SocketsReport {
        let kernel = self.tables.dataplane();
        let sockets = self.sockets.as_ref();
        let unended = self.options.settings.sockets.leaves_udp.then(|| format!("sock-destroy: {UNENDED}"));
        let missing = kernel
            .missing_hooks()
            .iter()
            .map(|it| format!("{}: {}", it.hook.name(), it.hook.cost()))
            .chain(unended)
            .filter(|_| sockets.is_some_and(|it| it.group.is_some()));
        let failures = sockets.into_iter().flat_map(|it| [&it.failure, &it.not_exempt]).flatten().cloned();
        SocketsReport {
            mode: self.options.sockets.mode.name().to_owned(),
            cgroup: sockets.and_then(|it| it.group.as_ref()).map(|group| group.name().to_owned()),
            attached: kernel.attached_hooks(),
            missing: failures.chain(missing).collect(),
            loopback: kernel.loopback().map(|it| it.tc().name().to_owned()),
            ended: sockets.and_then(|it| it.ender.as_ref()).map_or(0, Ender::ended),
        }
    }
}

/// Attaches to the hooks of sockets, and says which can't be.
fn attach(kernel: &mut Kernel, group: &ControlGroup) {
    if let Err(error) = kernel.attach_sockets(group) {
        error!(error = describe(&error), "UDP sockets may see answers come from backends");
    }
    for missing in kernel.missing_hooks() {
        warn!(error = describe(&missing.error), "{} is missing: {}", missing.hook.name(), missing.hook.cost());
    }
}

impl Sockets {
    /// Leaves the sockets of the exempt control groups that are there now alone, and of no others.
    fn exempt(&mut self, kernel: &mut Kernel) {
        let ids = self.exempt.as_mut().map(Watch::ids).unwrap_or_default();
        let refused = kernel.set_exempt(&ids).err().map(|error| describe(&error));
        if refused != self.not_exempt
            && let Some(error) = &refused
        {
            error!(error, "other sockets than before should be left alone, and are not");
        }
        self.not_exempt = refused;
    }

    /// Waits until other exempt control groups may be there than before.
    pub(super) async fn exempt_change(sockets: Option<&mut Self>) {
        match sockets.and_then(|it| it.exempt.as_mut()) {
            Some(watch) => watch.change().await,
            None => future::pending().await,
        }
    }
}
