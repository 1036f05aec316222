//! The agent's interfaces: attached to, followed as they come and go, and reported.

use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::{Agent, describe};
use crate::{
    admin::report::{InterfaceReport, PodInterfacesReport},
    dataplane::{
        DataplaneError,
        kernel::{Attachment, LOOPBACK, XdpMode},
    },
    network::{PodDevice, name_of},
};

/// To how many pod-facing devices the agent attaches before it looks for other events: the kernel takes some 10 ms for each
/// of the two programs, as it waits for packets that are underway (`tcx_entry_sync` in `include/net/tcx.h`).
const PODS_AT_ONCE: usize = 4;
/// How long it looks for other events then.
const ATTACH_PAUSE: Duration = Duration::from_millis(1);

impl Agent {
    /// Attaches to all that is there. Every uplink has to be, unless traffic goes on already by those that a former agent
    /// attached to.
    pub(super) fn attach(&mut self, has_former: bool) -> Result<(), DataplaneError> {
        self.tables.dataplane_mut().take_over()?;
        for interface in self.options.roles.uplinks.clone() {
            let is_veth = self.is_veth(&interface);
            match self.tables.dataplane_mut().attach_uplink(&interface, self.options.xdp, is_veth) {
                Ok(attachment) => say(&interface, attachment),
                Err(DataplaneError::NoInterface { .. }) if has_former => self.miss(&interface),
                Err(error) => return Err(error),
            }
        }
        self.sockets = Some(self.attach_sockets());
        self.attach_loopback();
        self.note_attachments();
        self.put_segments_together();
        info!("devices of pods to attach to: {}", self.options.roles.pod_interfaces);
        self.attach_pods();
        Ok(())
    }

    fn is_veth(&self, interface: &str) -> bool {
        nix::net::if_::if_nametoindex(interface).is_ok_and(|index| self.network.is_veth(index))
    }

    /// Attaches to the loopback interface where processes may not be balanced by their sockets: by uplinks goes all that they send to
    /// services but to the node's own addresses.
    fn attach_loopback(&mut self) {
        if self.balances_all_processes_by_sockets() {
            return;
        }
        if !self.options.keep_sysctls {
            self.sysctls.prepare(&[LOOPBACK.to_owned()]);
        }
        match self.tables.dataplane_mut().attach_loopback() {
            Ok(()) => info!("attached to {LOOPBACK}: processes of this node are balanced by what they send"),
            Err(error) => warn!(
                error = describe(&error),
                "cannot attach to {LOOPBACK}: processes of this node do not reach its NodePorts, nor backends on this node's addresses"
            ),
        }
    }

    /// Has segments put together behind our programs where nobody else sees to that.
    fn put_segments_together(&mut self) {
        if self.options.keep_sysctls {
            return;
        }
        let kernel = self.tables.dataplane();
        let attachments = self.options.roles.uplinks.iter().filter_map(|name| kernel.attached_to(name));
        let native = attachments.filter(|it| it.xdp() == XdpMode::Native).map(Attachment::index);
        let interfaces: Vec<_> = native.filter(|&interface| self.network.is_veth(interface)).collect();
        self.sysctls.put_segments_together(&interfaces);
    }

    /// Makes interfaces forward that have come since the last look.
    pub(super) fn prepare_new(&mut self) {
        let interfaces = self.network.takes_in_by();
        let names: Vec<_> = interfaces.difference(&self.prepared).copied().filter_map(name_of).collect();
        if !names.is_empty() && !self.options.keep_sysctls {
            self.sysctls.prepare(&names);
        }
        self.prepared = interfaces;
    }

    /// An uplink that was removed and made again has a new number and no program.
    pub(super) fn attach_again(&mut self) {
        for interface in self.options.roles.uplinks.clone() {
            let is_veth = self.is_veth(&interface);
            let kernel = self.tables.dataplane_mut();
            if kernel.attached_to(&interface).is_some() {
                self.lost.remove(&interface);
            } else if nix::net::if_::if_nametoindex(interface.as_str()).is_err() {
                // It may come back with the number that it had.
                kernel.forget_uplink(&interface);
                self.miss(&interface);
            } else {
                if !self.options.keep_sysctls {
                    self.sysctls.prepare(std::slice::from_ref(&interface));
                }
                let attached = match self.network.check_uplinks() {
                    Ok(()) => {
                        kernel.attach_uplink(&interface, self.options.xdp, is_veth).map_err(|error| describe(&error))
                    }
                    Err(error) => Err(describe(&error)),
                };
                match attached {
                    Ok(attachment) => {
                        info!("interface {interface} is back");
                        say(&interface, attachment);
                        self.lost.remove(&interface);
                        self.put_segments_together();
                    }
                    Err(error) => {
                        if self.lose(&interface, Some(&error)) {
                            error!(error, "cannot attach to {interface} again");
                        }
                    }
                }
            }
        }
    }

    /// Attaches to where somebody else has detached programs.
    pub(super) fn attach_detached(&mut self) {
        self.attach_again();
        self.attach_sockets_again();
        if self.tables.dataplane().loopback().is_none() {
            self.attach_loopback();
        }
        self.attach_pods();
        self.choose_addresses();
    }

    /// Tries again to attach to uplinks that are lost: what was in the way may have gone without a change of the network.
    pub(super) async fn attach_lost(&mut self) {
        if !self.lost.is_empty() {
            self.look().await;
        }
    }

    /// Notes that an uplink is gone.
    fn miss(&mut self, interface: &str) {
        if self.lose(interface, None) {
            warn!("interface {interface} is gone; wharf attaches to it when it comes back");
        }
    }

    /// Notes that an uplink is not attached to, and why it can't be if it is there. Whether that is news.
    fn lose(&mut self, interface: &str, why: Option<&str>) -> bool {
        let before = self.lost.insert(interface.to_owned(), why.map(str::to_owned));
        before.as_ref().map(Option::as_deref) != Some(why)
    }

    /// Attaches to pod-facing devices that are new, and forgets those that are gone or have another name now.
    pub(super) fn attach_pods(&mut self) {
        let devices = self.network.pod_devices();
        let stays = |index| devices.iter().any(|device| device.index == index);
        self.refused_pods.retain(|&index| stays(index));
        let kernel = self.tables.dataplane_mut();
        kernel.retain_pods(stays);
        let mut new: Vec<_> = devices.into_iter().filter(|device| !kernel.is_attached_to_pod(device.index)).collect();
        // Those that were refused before are tried again with the next look at the network, after all others.
        let fresh = new.iter().filter(|device| !self.refused_pods.contains(&device.index)).count();
        self.attach_at = (fresh > PODS_AT_ONCE).then(|| Instant::now() + ATTACH_PAUSE);
        let is_last = self.attach_at.is_none();
        new.sort_by_key(|device| self.refused_pods.contains(&device.index));
        if let Some((_, refused)) = new.split_at_mut_checked(fresh)
            && !refused.is_empty()
        {
            // Not the same ones each time.
            refused.rotate_left(self.retried_pods % refused.len());
            self.retried_pods = self.retried_pods.wrapping_add(PODS_AT_ONCE.saturating_sub(fresh));
        }
        new.truncate(PODS_AT_ONCE);
        for PodDevice { index, name } in new {
            match kernel.attach_pod(&name) {
                Ok(()) => {
                    self.refused_pods.remove(&index);
                    info!("attached to {name} (pods)");
                }
                // It has gone again.
                Err(DataplaneError::NoInterface { .. }) => {}
                Err(error) if self.refused_pods.insert(index) => {
                    warn!(error = describe(&error), "cannot attach to the pod-facing device {name}");
                }
                Err(_again) => {}
            }
        }
        if is_last {
            // Whatever a former agent was attached to has found its use by now, or has none.
            if let Err(error) = kernel.release_others() {
                error!(error = describe(&error), "what a former agent left is not all removed");
            }
        }
        self.note_attachments();
    }

    /// Pins what is attached and could not be pinned until now.
    pub(super) fn pin_again(&mut self) {
        let kernel = self.tables.dataplane_mut();
        if kernel.unpinned().is_some() && kernel.pin_again().is_ok() {
            info!("all is pinned again: traffic will go on without the agent");
        }
    }

    /// Notes what attaching has left on the host, and says so once if it is not all pinned.
    fn note_attachments(&mut self) {
        let kernel = self.tables.dataplane_mut();
        self.sysctls.note_qdiscs(kernel.take_new_qdiscs());
        match kernel.unpinned() {
            Some(error) if !self.is_unpinned => {
                error!(error = describe(error), "not everything is pinned: without the agent its traffic would stop");
                self.is_unpinned = true;
            }
            Some(_again) => {}
            None => self.is_unpinned = false,
        }
    }

    pub(super) fn interfaces(&self) -> Vec<InterfaceReport> {
        let kernel = self.tables.dataplane();
        let report = |name: &String| {
            let addresses = kernel.addresses_of(name);
            let attachment = kernel.attached_to(name);
            InterfaceReport {
                name: name.clone(),
                xdp: attachment.map_or("gone", |it| it.xdp().name()).to_owned(),
                tc: attachment.map_or("gone", |it| it.tc().name()).to_owned(),
                why: match attachment {
                    Some(attachment) => attachment.why().map(|error| describe(error)),
                    None => self.lost.get(name).cloned().flatten(),
                },
                source_ipv4: addresses.v4,
                source_ipv6: addresses.v6,
            }
        };
        self.options.roles.uplinks.iter().map(report).collect()
    }

    pub(super) fn pod_interfaces(&self) -> PodInterfacesReport {
        PodInterfacesReport {
            patterns: self.options.roles.pod_interfaces.values(),
            attached: self.tables.dataplane().attached_pods(),
            refused: self.refused_pods.len(),
        }
    }
}

/// Tells how the programs came to sit on an uplink.
fn say(interface: &str, attachment: &Attachment) {
    let tc = attachment.tc().name();
    match (attachment.xdp(), attachment.why()) {
        (XdpMode::Off, Some(why)) => warn!(
            why = describe(why),
            "attached to {interface} without XDP: tc takes its place ({tc}), which is slower; --xdp off says that this is meant"
        ),
        (XdpMode::Off, None) => info!("attached to {interface} (tc by {tc}, no XDP)"),
        (xdp, _) => info!("attached to {interface} (XDP, {}; tc egress by {tc})", xdp.name()),
    }
}
