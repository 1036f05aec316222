//! Our programs on interfaces, in XDP and in tc by tcx links or by filters of the clsact qdisc, and at control groups.

use std::{collections::BTreeMap, io};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode as AyaMode,
        links::FdLink,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
        xdp::XdpError,
    },
};
use tracing::{debug, info};

use super::{
    links::{Hold, Place, side},
    pins::Pins,
    programs::{Hook, descriptor, program},
    sockets::{self, ControlGroup, SocketHook},
};
use crate::{dataplane::DataplaneError, network::name_of};

/// The name of the loopback interface in every network namespace.
pub const LOOPBACK: &str = "lo";

/// How packets that come in by an uplink are to be met, or are met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum XdpMode {
    /// In the driver; where it does not do that, or not reliably as with veth, in tc
    Auto,
    /// In the driver, before the kernel makes anything of a packet; where it does not do that, not at all
    Native,
    /// In XDP, but behind the driver: on any interface, and slower; for tests
    Generic,
    /// In tc
    Off,
}

/// How programs sit on tc's hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcMode {
    /// By BPF links: since Linux 6.6.
    Tcx,
    /// By filters of the clsact qdisc.
    Clsact,
}

/// Our programs on one interface.
#[derive(Debug)]
pub struct Attachment {
    index: u32,
    xdp: XdpMode,
    tc: TcMode,
    why: Option<DataplaneError>,
    /// What holds them in their places, in the order in which they go: what opens flows before what brings replies back.
    holds: Vec<Hold>,
}

/// All attachments. What is pinned stays when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Attachments {
    /// Where links are pinned, if they are to outlive the agent.
    pins: Option<Pins>,
    /// By name.
    pub(super) uplinks: BTreeMap<String, Attachment>,
    /// By number.
    pub(super) pods: BTreeMap<u32, Attachment>,
    /// The loopback interface.
    pub(super) loopback: Option<Attachment>,
    /// At the control groups: what holds programs at hooks of sockets.
    pub(super) sockets: BTreeMap<SocketHook, Hold>,
    /// What a former agent attached and has our programs by now, but for what was found a use for.
    former: BTreeMap<Place, Hold>,
    /// Whether the kernel has tcx, once that was tried.
    has_tcx: Option<bool>,
    /// Interfaces that got their clsact qdisc from us.
    qdiscs: Vec<u32>,
    /// Why what was attached last could not be pinned.
    unpinned: Option<DataplaneError>,
}

impl Attachment {
    /// The number of the interface.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Where what comes in is met; never [`XdpMode::Auto`].
    pub fn xdp(&self) -> XdpMode {
        self.xdp
    }

    /// How programs sit on tc's hooks.
    pub fn tc(&self) -> TcMode {
        self.tc
    }

    /// Why tc had to take the place of XDP, if it had to.
    pub fn why(&self) -> Option<&DataplaneError> {
        self.why.as_ref()
    }

    /// Takes the programs away, also where they would outlive the agent.
    fn release(self) {
        self.holds.into_iter().for_each(Hold::release);
    }
}

impl Attachments {
    /// None yet, of which the links are to be pinned.
    pub(super) fn pinned_in(pins: Pins) -> Self {
        Self { pins: Some(pins), ..Self::default() }
    }

    /// Where links are pinned.
    pub(super) fn pins(&self) -> Option<&Pins> {
        self.pins.as_ref()
    }

    /// Puts our programs in the place of a former agent's.
    pub(super) fn take_over(&mut self, object: &mut Ebpf) -> Result<(), DataplaneError> {
        let Some(pins) = &self.pins else { return Ok(()) };
        for name in pins.links() {
            let Ok(place) = name.parse() else { continue };
            // Where sockets are not to be balanced, or the kernel does not take the program, there is none to put in its place.
            if let Place::Sockets(hook) = place
                && descriptor(object, hook.program()).is_err()
            {
                info!("detached from {place}");
                pins.remove_link(&name)?;
                continue;
            }
            match Hold::take_over(place, object, pins) {
                Ok(hold) => drop(self.former.insert(place, hold)),
                Err(error) if pins.is_dead(&name) => {
                    debug!(%error, "the interface of {name} is gone");
                    pins.remove_link(&name)?;
                }
                // It goes on with the former program, which is better than none.
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Detaches from where only a former agent was attached.
    pub(super) fn release_others(&mut self) {
        for (place, hold) in std::mem::take(&mut self.former) {
            info!("detached from {place}, which is not named any more");
            hold.release();
        }
        if self.has_tcx == Some(false) {
            // Filters are nowhere written down: all of ours go that no attachment has.
            remove_filters_but(|interface, side| self.holds().any(|hold| hold.is_filter_at(interface, side)));
        }
    }

    /// Attaches to an uplink: to what comes in by it, and to what leaves by it.
    pub(super) fn uplink(
        &mut self,
        object: &mut Ebpf,
        name: &str,
        mode: XdpMode,
        is_veth: bool,
    ) -> Result<&Attachment, DataplaneError> {
        // What was there before goes first: a removed interface may be back by the same name.
        if let Some(before) = self.uplinks.remove(name) {
            before.release();
        }
        let index = index_of(name)?;
        let (egress, tc) = self.tc(object, name, index, Hook::TcEgress)?;
        // An interface takes XDP in one mode only: between a former agent's and ours, tc sees to what comes in. What the host's
        // own stack met meanwhile it would answer with a RST.
        let changes_mode = self.former.contains_key(&Place::xdp(mode != XdpMode::Generic, index));
        let cover = changes_mode.then(|| self.tc(object, name, index, Hook::TcIngress)).transpose()?;
        let xdp = match mode {
            XdpMode::Off => None,
            XdpMode::Generic => Some((XdpMode::Generic, self.xdp(object, name, index, AyaMode::Skb))),
            XdpMode::Auto if is_veth => {
                Some((XdpMode::Native, Err(DataplaneError::VethXdp { interface: name.to_owned() })))
            }
            XdpMode::Native | XdpMode::Auto => Some((XdpMode::Native, self.xdp(object, name, index, AyaMode::Driver))),
        };
        let (xdp, link, why) = match xdp {
            None => (XdpMode::Off, None, None),
            Some((xdp, Ok(link))) => (xdp, Some(link), None),
            Some((_, Err(error))) if mode == XdpMode::Auto => (XdpMode::Off, None, Some(error)),
            Some((_, Err(error))) => {
                // The former agent's is gone, and its traffic goes on: by the cover, which is to outlive this one.
                if let Some((cover, _)) = cover {
                    let _pinned = self.pinned([cover, egress].into_iter());
                }
                return Err(error);
            }
        };
        let ingress = match (xdp, cover) {
            (XdpMode::Off, Some((cover, _))) => Some(cover),
            (XdpMode::Off, None) => Some(self.tc(object, name, index, Hook::TcIngress)?.0),
            (_, cover) => {
                if let Some((cover, _)) = cover {
                    cover.release();
                }
                None
            }
        };
        let holds = self.pinned(link.into_iter().chain(ingress).chain([egress]))?;
        let attachment = Attachment { index, xdp, tc, why, holds };
        Ok(self.uplinks.entry(name.to_owned()).or_insert(attachment))
    }

    /// Whether there is XDP of ours on an uplink, or still a former agent's.
    pub(super) fn has_xdp(&self, index: u32) -> bool {
        let is_former = |is_generic| self.former.contains_key(&Place::xdp(is_generic, index));
        self.uplinks.values().any(|it| it.index() == index && it.xdp() != XdpMode::Off)
            || is_former(true)
            || is_former(false)
    }

    /// Attaches to a pod-facing device.
    pub(super) fn pod(&mut self, object: &mut Ebpf, name: &str) -> Result<(), DataplaneError> {
        let index = index_of(name)?;
        let (egress, tc) = self.tc(object, name, index, Hook::TcEgress)?;
        let (ingress, _) = self.tc(object, name, index, Hook::TcPod)?;
        let holds = self.pinned([ingress, egress].into_iter())?;
        self.pods.insert(index, Attachment { index, xdp: XdpMode::Off, tc, why: None, holds });
        Ok(())
    }

    /// Attaches to what leaves by the loopback interface.
    pub(super) fn loopback(&mut self, object: &mut Ebpf) -> Result<(), DataplaneError> {
        let index = index_of(LOOPBACK)?;
        let (egress, tc) = self.tc(object, LOOPBACK, index, Hook::TcEgress)?;
        let holds = self.pinned([egress].into_iter())?;
        self.loopback = Some(Attachment { index, xdp: XdpMode::Off, tc, why: None, holds });
        Ok(())
    }

    /// Attaches to one hook of sockets, in a control group and all below it, beside the programs of others.
    pub(super) fn socket(
        &mut self,
        object: &mut Ebpf,
        hook: SocketHook,
        group: &ControlGroup,
    ) -> Result<(), DataplaneError> {
        let place = Place::Sockets(hook);
        let hold = match self.former.remove(&place) {
            Some(hold) if hold.is_at_control_group(group.id()) => hold,
            other => {
                let link = sockets::attach(object, hook, group)?;
                other.into_iter().for_each(Hold::release);
                Hold::link(place, link)
            }
        };
        let hold = self.pinned([hold].into_iter())?.pop();
        self.sockets.extend(hold.map(|hold| (hook, hold)));
        Ok(())
    }

    /// Detaches from the pod-facing devices that don't stay, by their numbers.
    pub(super) fn retain_pods(&mut self, stays: impl Fn(u32) -> bool) {
        take_if(&mut self.pods, |&index, _| !stays(index)).for_each(Attachment::release);
    }

    /// Forgets an uplink whose device is gone, and has not merely got another name.
    pub(super) fn forget_uplink(&mut self, interface: &str) {
        if self.uplinks.get(interface).is_some_and(|it| name_of(it.index()).is_none()) {
            self.uplinks.remove(interface).into_iter().for_each(Attachment::release);
        }
    }

    /// All that holds programs in their places.
    pub(super) fn holds(&self) -> impl Iterator<Item = &Hold> {
        let attachments = self.uplinks.values().chain(self.pods.values()).chain(&self.loopback);
        attachments.flat_map(|attachment| &attachment.holds).chain(self.sockets.values())
    }

    /// The places that somebody else has detached programs from, of interfaces that are still there.
    pub(super) fn detached(&self) -> impl Iterator<Item = Place> {
        let is_there =
            |place: &Place| !matches!(place, Place::Interface { interface, .. } if name_of(*interface).is_none());
        self.holds().filter(|hold| hold.is_detached()).map(Hold::place).filter(is_there)
    }

    /// Forgets such places, and the interfaces that they are of, to be attached to anew. What else is there stays in its place meanwhile,
    /// as if a former agent had left it.
    pub(super) fn forget_detached(&mut self) {
        let is_detached = |attachment: &Attachment| attachment.holds.iter().any(Hold::is_detached);
        let uplinks = take_if(&mut self.uplinks, |_, it| is_detached(it));
        let pods = take_if(&mut self.pods, |_, it| is_detached(it));
        let attachments = uplinks.chain(pods).chain(self.loopback.take_if(|it| is_detached(it)));
        let holds = attachments.flat_map(|attachment| attachment.holds);
        let holds = holds.chain(take_if(&mut self.sockets, |_, hold| hold.is_detached()));
        let (detached, others): (Vec<_>, Vec<_>) = holds.partition(Hold::is_detached);
        detached.into_iter().for_each(Hold::release);
        // Filters are found by themselves.
        self.former.extend(others.into_iter().filter(Hold::is_link).map(|hold| (hold.place(), hold)));
    }

    /// Detaches from a hook of sockets.
    pub(super) fn release_socket(&mut self, hook: SocketHook) {
        self.sockets.remove(&hook).into_iter().for_each(Hold::release);
    }

    /// Takes tcx for missing, as it is below Linux 6.6.
    pub(super) fn forgo_tcx(&mut self) {
        self.has_tcx = Some(false);
    }

    /// Detaches from everything.
    pub(super) fn clear(&mut self) {
        let uplinks = std::mem::take(&mut self.uplinks).into_values();
        let pods = std::mem::take(&mut self.pods).into_values();
        uplinks.chain(pods).chain(self.loopback.take()).for_each(Attachment::release);
        std::mem::take(&mut self.sockets).into_values().for_each(Hold::release);
        std::mem::take(&mut self.former).into_values().for_each(Hold::release);
    }

    /// The interfaces whose clsact qdisc is ours, since this was last asked.
    pub(super) fn take_new_qdiscs(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.qdiscs)
    }

    /// Why not everything is pinned that is to be.
    pub(super) fn unpinned(&self) -> Option<&DataplaneError> {
        self.unpinned.as_ref()
    }

    /// Pins what could not be pinned before.
    pub(super) fn pin_again(&mut self) -> Result<(), DataplaneError> {
        let Some(pins) = &self.pins else { return Ok(()) };
        let attachments = self.uplinks.values_mut().chain(self.pods.values_mut()).chain(&mut self.loopback);
        let holds = attachments.flat_map(|attachment| &mut attachment.holds).chain(self.sockets.values_mut());
        holds.into_iter().try_for_each(|hold| hold.pin(pins))?;
        self.unpinned = None;
        Ok(())
    }

    /// What holds programs, pinned if it is to outlive the agent. Where that can't be now it is tried again later.
    fn pinned(&mut self, holds: impl Iterator<Item = Hold>) -> Result<Vec<Hold>, DataplaneError> {
        let Some(pins) = &self.pins else { return Ok(holds.collect()) };
        holds
            .map(|mut hold| match hold.pin(pins) {
                Ok(()) => Ok(hold),
                Err(error @ DataplaneError::Pins(_)) => {
                    self.unpinned = Some(error);
                    Ok(hold)
                }
                Err(error) => Err(error),
            })
            .collect()
    }

    /// Puts the XDP program on an interface.
    fn xdp(&mut self, object: &mut Ebpf, interface: &str, index: u32, mode: AyaMode) -> Result<Hold, DataplaneError> {
        let is_generic = mode == AyaMode::Skb;
        if let Some(hold) = self.former.remove(&Place::xdp(is_generic, index)) {
            return Ok(hold);
        }
        if let Some(other) = self.former.remove(&Place::xdp(!is_generic, index)) {
            other.release();
        }
        let name = if is_generic { "generic XDP" } else { "native XDP" };
        let failed = |error| refused(interface, name, error);
        let program: &mut Xdp = program(object, Hook::Xdp.program())?;
        let id = program.attach_to_if_index(index, mode).map_err(failed)?;
        let link = program.take_link(id).map_err(failed)?;
        // aya falls back to netlink on old kernels; such a link would outlive the agent's death.
        let link = FdLink::try_from(link).map_err(|_| DataplaneError::NoLink { interface: interface.to_owned() })?;
        Ok(Hold::link(Place::xdp(is_generic, index), link))
    }

    /// Puts a tc program on one side of an interface, before those of others.
    fn tc(
        &mut self,
        object: &mut Ebpf,
        interface: &str,
        index: u32,
        hook: Hook,
    ) -> Result<(Hold, TcMode), DataplaneError> {
        let place = Place::tc(hook, index);
        if let Some(hold) = self.former.remove(&place) {
            self.has_tcx = Some(true);
            return Ok((hold, TcMode::Tcx));
        }
        let side = side(hook);
        let program: &mut SchedClassifier = program(object, hook.program())?;
        let name = if side == TcAttachType::Egress { "tc egress" } else { "tc ingress" };
        let failed = |error| refused(interface, name, error);
        if self.has_tcx != Some(false) {
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            match program.attach_with_options(interface, side, options) {
                Ok(id) => {
                    self.has_tcx = Some(true);
                    let link = program.take_link(id).map_err(failed)?;
                    // A link by netlink is what clsact has, not tcx.
                    let link = FdLink::try_from(link)
                        .map_err(|_| DataplaneError::NoLink { interface: interface.to_owned() })?;
                    return Ok((Hold::link(place, link), TcMode::Tcx));
                }
                Err(error) if self.has_tcx.is_none() && is_unknown(&error) => {
                    info!("this kernel has no tcx: programs are attached by clsact");
                    self.has_tcx = Some(false);
                }
                Err(error) => return Err(failed(error)),
            }
        }
        self.prepare_clsact(interface, index).map_err(|error| failed(error.into()))?;
        if let Some(pins) = &self.pins {
            pins.note_filters()?;
        }
        let link = filter(program, interface, side).map_err(failed)?;
        Ok((Hold::filter(place, link, self.pins.is_some()), TcMode::Clsact))
    }

    /// Makes sure that there is a clsact qdisc.
    fn prepare_clsact(&mut self, interface: &str, index: u32) -> Result<(), TcError> {
        match tc::qdisc_add_clsact(interface) {
            Ok(()) => self.qdiscs.push(index),
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Takes some values out of a map.
fn take_if<K: Ord + Clone, V>(map: &mut BTreeMap<K, V>, is_taken: impl Fn(&K, &V) -> bool) -> impl Iterator<Item = V> {
    let keys: Vec<_> = map.iter().filter(|(key, value)| is_taken(key, value)).map(|(key, _)| key.clone()).collect();
    keys.into_iter().filter_map(|key| map.remove(&key))
}

/// Of our filters: the first to be asked, by a number that nobody else takes.
const FILTER: NlOptions = NlOptions { priority: 1, handle: TcHandle::new(0x5748, 0x4152), classid: None };

/// Puts a filter on one side of an interface, in the place of a former agent's if there is one: no packet is without.
fn filter(
    program: &mut SchedClassifier,
    interface: &str,
    side: TcAttachType,
) -> Result<SchedClassifierLink, ProgramError> {
    let NlOptions { priority, handle, classid } = FILTER;
    let present =
        SchedClassifierLink::attached(interface, side, priority, handle, classid).map_err(TcError::IoError)?;
    let id = program
        .attach_to_link(present)
        .or_else(|_none| program.attach_with_options(interface, side, TcAttachOptions::Netlink(FILTER)))?;
    program.take_link(id)
}

/// Removes all of our filters from this network namespace: nothing else outlives an agent without being pinned.
pub fn remove_filters() {
    remove_filters_but(|_, _| false);
}

/// Removes our filters from all sides of interfaces, by number, but those where they are to stay.
fn remove_filters_but(stay: impl Fn(u32, TcAttachType) -> bool) {
    for interface in nix::net::if_::if_nameindex().iter().flat_map(|interfaces| interfaces.iter()) {
        let Ok(name) = interface.name().to_str() else { continue };
        let sides = [TcAttachType::Ingress, TcAttachType::Egress];
        for side in sides.into_iter().filter(|&side| !stay(interface.index(), side)) {
            for hook in Hook::ALL {
                match tc::qdisc_detach_program(name, side, hook.program()) {
                    Ok(()) => info!("removed the filter {} from {name}", hook.program()),
                    Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => debug!(%error, "cannot list the filters of {name}"),
                }
            }
        }
    }
}

fn index_of(interface: &str) -> Result<u32, DataplaneError> {
    nix::net::if_::if_nametoindex(interface)
        .map_err(|_| DataplaneError::NoInterface { interface: interface.to_owned() })
}

fn refused(interface: &str, hook: &'static str, error: ProgramError) -> DataplaneError {
    let remedy = remedy(hook.ends_with("XDP"), errno(&error));
    DataplaneError::Attach { interface: interface.to_owned(), hook, remedy, source: Box::new(error) }
}

/// What to do about a refusal.
fn remedy(is_xdp: bool, errno: Option<i32>) -> &'static str {
    match (errno, is_xdp) {
        (Some(libc::EPERM | libc::EACCES), _) => "root, or CAP_BPF and CAP_NET_ADMIN, are needed",
        (Some(libc::EBUSY | libc::EEXIST), true) => {
            "another XDP program is there; `ip link set dev INTERFACE xdp off` removes it"
        }
        (Some(libc::EOPNOTSUPP), true) => {
            "the driver has no XDP, or not for this interface as it is set up; --xdp off takes tc"
        }
        (Some(libc::ENOMEM | libc::ENOSPC), true) => {
            "the driver has too few queues or too little memory for XDP; `ethtool -L INTERFACE combined N` changes their number"
        }
        (_, true) => {
            "often the MTU is too large for the driver's XDP, or receive offloads (LRO) are on; --xdp off takes tc"
        }
        (_, false) => "is an ingress qdisc in the way of clsact? `tc qdisc show dev INTERFACE` tells",
    }
}

/// Whether the kernel does not know of such links: before 6.6, or built without them.
fn is_unknown(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
}

fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        ProgramError::XdpError(XdpError::NetlinkError(error))
        | ProgramError::TcError(TcError::NetlinkError(error))
        | ProgramError::NetlinkError(error) => error.raw_os_error(),
        _ => None,
    }
}

impl XdpMode {
    /// The name in messages and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Off => "off",
        }
    }
}

impl TcMode {
    /// The name in messages and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}
