//! Our programs on interfaces: in XDP, and in tc by tcx links or by filters of the clsact qdisc.

use std::{collections::BTreeMap, io};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode as AyaMode,
        links::FdLink,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError},
        xdp::XdpError,
    },
};
use tracing::{debug, info, warn};

use super::programs::{Hook, program};
use crate::dataplane::DataplaneError;

/// How packets that come in by an uplink are to be met, or are met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum XdpMode {
    /// In the driver; where it does not do that, in tc
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

/// Our programs on one interface; they leave it when this is dropped.
#[derive(Debug)]
pub struct Attachment {
    index: u32,
    xdp: XdpMode,
    tc: TcMode,
    why: Option<DataplaneError>,
    _links: Links,
}

/// What holds programs in their places, in the order in which they go: what opens flows before what brings replies back.
type Links = (Option<FdLink>, Option<SchedClassifierLink>, SchedClassifierLink);

/// All attachments.
#[derive(Debug, Default)]
pub(super) struct Attachments {
    /// By name.
    pub(super) uplinks: BTreeMap<String, Attachment>,
    /// By number.
    pub(super) pods: BTreeMap<u32, Attachment>,
    /// Whether the kernel has tcx, once that was tried.
    has_tcx: Option<bool>,
    /// Interfaces that got their clsact qdisc from us.
    qdiscs: Vec<u32>,
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
}

impl Attachments {
    /// Attaches to an uplink: to what comes in by it, and to what leaves by it.
    pub(super) fn uplink(
        &mut self,
        object: &mut Ebpf,
        name: &str,
        mode: XdpMode,
    ) -> Result<&Attachment, DataplaneError> {
        // What was there before goes first: a removed interface may be back by the same name.
        self.uplinks.remove(name);
        let index = index_of(name)?;
        let (egress, tc) = self.tc(object, name, index, Hook::TcEgress)?;
        let (xdp, link, why) = match mode {
            XdpMode::Off => (XdpMode::Off, None, None),
            XdpMode::Generic => (XdpMode::Generic, Some(xdp(object, name, index, AyaMode::Skb)?), None),
            XdpMode::Native => (XdpMode::Native, Some(xdp(object, name, index, AyaMode::Driver)?), None),
            XdpMode::Auto => match xdp(object, name, index, AyaMode::Driver) {
                Ok(link) => (XdpMode::Native, Some(link), None),
                Err(error) => (XdpMode::Off, None, Some(error)),
            },
        };
        let ingress = match xdp {
            XdpMode::Off => Some(self.tc(object, name, index, Hook::TcIngress)?.0),
            _ => None,
        };
        let attachment = Attachment { index, xdp, tc, why, _links: (link, ingress, egress) };
        Ok(self.uplinks.entry(name.to_owned()).or_insert(attachment))
    }

    /// Attaches to a pod-facing device.
    pub(super) fn pod(&mut self, object: &mut Ebpf, name: &str) -> Result<(), DataplaneError> {
        let index = index_of(name)?;
        let (egress, tc) = self.tc(object, name, index, Hook::TcEgress)?;
        let (ingress, _) = self.tc(object, name, index, Hook::TcPod)?;
        let links = (None, Some(ingress), egress);
        self.pods.insert(index, Attachment { index, xdp: XdpMode::Off, tc, why: None, _links: links });
        Ok(())
    }

    /// Takes tcx for missing, as it is below Linux 6.6.
    pub(super) fn forgo_tcx(&mut self) {
        self.has_tcx = Some(false);
    }

    /// Detaches from everything, and gives the interfaces whose clsact qdisc is ours.
    pub(super) fn clear(&mut self) -> Vec<u32> {
        self.uplinks.clear();
        self.pods.clear();
        std::mem::take(&mut self.qdiscs)
    }

    /// Puts a tc program on one side of an interface, before those of others.
    fn tc(
        &mut self,
        object: &mut Ebpf,
        interface: &str,
        index: u32,
        hook: Hook,
    ) -> Result<(SchedClassifierLink, TcMode), DataplaneError> {
        let side = if hook == Hook::TcEgress { TcAttachType::Egress } else { TcAttachType::Ingress };
        let program: &mut SchedClassifier = program(object, hook.program())?;
        let name = if side == TcAttachType::Egress { "tc egress" } else { "tc ingress" };
        let failed = |error| refused(interface, name, error);
        if self.has_tcx != Some(false) {
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            match program.attach_with_options(interface, side, options) {
                Ok(id) => {
                    self.has_tcx = Some(true);
                    return Ok((program.take_link(id).map_err(failed)?, TcMode::Tcx));
                }
                Err(error) if self.has_tcx.is_none() && is_unknown(&error) => {
                    info!("this kernel has no tcx: programs are attached by clsact");
                    self.has_tcx = Some(false);
                }
                Err(error) => return Err(failed(error)),
            }
        }
        self.prepare_clsact(interface, index, side).map_err(|error| failed(error.into()))?;
        let options = TcAttachOptions::Netlink(NlOptions { priority: 1, ..NlOptions::default() });
        let id = program.attach_with_options(interface, side, options).map_err(failed)?;
        Ok((program.take_link(id).map_err(failed)?, TcMode::Clsact))
    }

    /// Makes sure that there is a clsact qdisc, without filters of ours on this side: those outlive an agent that was killed.
    fn prepare_clsact(&mut self, interface: &str, index: u32, side: TcAttachType) -> Result<(), TcError> {
        match tc::qdisc_add_clsact(interface) {
            Ok(()) => {
                self.qdiscs.push(index);
                return Ok(());
            }
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(error),
        }
        for hook in Hook::ALL {
            match tc::qdisc_detach_program(interface, side, hook.program()) {
                Ok(()) => warn!("{interface} had a filter {} of an agent that was killed", hook.program()),
                Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => debug!(%error, "cannot list the filters of {interface}"),
            }
        }
        Ok(())
    }
}

/// Puts the XDP program on an interface.
fn xdp(object: &mut Ebpf, interface: &str, index: u32, mode: AyaMode) -> Result<FdLink, DataplaneError> {
    let name = if mode == AyaMode::Driver { "native XDP" } else { "generic XDP" };
    let failed = |error| refused(interface, name, error);
    let program: &mut Xdp = program(object, Hook::Xdp.program())?;
    let id = program.attach_to_if_index(index, mode).map_err(failed)?;
    let link = program.take_link(id).map_err(failed)?;
    // aya falls back to netlink on old kernels; such a link would outlive the agent's death.
    FdLink::try_from(link).map_err(|_| DataplaneError::NoLink { interface: interface.to_owned() })
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
