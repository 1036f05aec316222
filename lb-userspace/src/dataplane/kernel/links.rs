//! What holds one of our programs at one hook: a BPF link, or a filter of the clsact qdisc.
//!
//! A hook is one of an interface, or of the control groups.

use std::{
    fmt, fs, io, mem,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    str::FromStr,
};

use aya::{
    Ebpf,
    programs::{
        ProgramError, SchedClassifier, Xdp,
        links::{FdLink, LinkError, PinnedLink},
        tc::{SchedClassifierLink, TcAttachType},
        xdp::XdpLink,
    },
};
use tracing::debug;

use super::{
    pins::{self, Pins},
    programs::{Hook, descriptor, program},
    sockets::SocketHook,
    sys::{self, LinkPlace},
};
use crate::dataplane::DataplaneError;

/// A hook of one interface, or of the control groups. As text, the name under which a link is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// Where packets come by.
    Interface {
        hook: Hook,
        /// In XDP: behind the driver, not in it.
        is_generic: bool,
        /// The interface's number.
        interface: u32,
    },
    /// Where calls on sockets come by.
    Sockets(SocketHook),
}

/// Keeps a program in its place for as long as it lives, or for longer: see [`Hold::stays`].
#[derive(Debug)]
pub(super) struct Hold {
    place: Place,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// A link: what is pinned stays when the agent ends.
    Link { link: Option<FdLink>, pin: Option<PathBuf> },
    /// A filter, which stays if nobody removes it.
    Filter { link: Option<SchedClassifierLink>, stays: bool },
}

impl Place {
    /// Where the XDP program is: behind the driver, or in it.
    pub(super) fn xdp(is_generic: bool, interface: u32) -> Self {
        Self::Interface { hook: Hook::Xdp, is_generic, interface }
    }

    /// Where the programs of a tc hook are.
    pub(super) fn tc(hook: Hook, interface: u32) -> Self {
        Self::Interface { hook, is_generic: false, interface }
    }
}

/// The side of an interface on which a tc hook is.
pub(super) fn side(hook: Hook) -> TcAttachType {
    if hook == Hook::TcEgress { TcAttachType::Egress } else { TcAttachType::Ingress }
}

impl Hold {
    /// A link that goes with the agent, unless it is pinned.
    pub(super) fn link(place: Place, link: FdLink) -> Self {
        Self { place, kind: Kind::Link { link: Some(link), pin: None } }
    }

    /// A filter, which stays when the agent ends or goes with it.
    pub(super) fn filter(place: Place, link: SchedClassifierLink, stays: bool) -> Self {
        Self { place, kind: Kind::Filter { link: Some(link), stays } }
    }

    /// Where it keeps the program.
    pub(super) fn place(&self) -> Place {
        self.place
    }

    /// Whether its link is on nothing any more. Of what is not pinned, and of filters, that is not known.
    pub(super) fn is_detached(&self) -> bool {
        matches!(&self.kind, Kind::Link { pin: Some(path), .. } if pins::is_dead(path))
    }

    /// Whether it is a link.
    pub(super) fn is_link(&self) -> bool {
        matches!(self.kind, Kind::Link { .. })
    }

    /// Whether it is a filter on this side of an interface.
    pub(super) fn is_filter_at(&self, index: u32, at: TcAttachType) -> bool {
        matches!(self.kind, Kind::Filter { .. })
            && matches!(self.place, Place::Interface { hook, interface, .. } if interface == index && side(hook) == at)
    }

    /// Whether it is a link that holds a program at the control group with this id.
    pub(super) fn is_at_control_group(&self, id: u64) -> bool {
        let Kind::Link { pin: Some(path), .. } = &self.kind else { return false };
        sys::link_place(path).is_ok_and(|place| place == LinkPlace::ControlGroup(id))
    }

    /// The link of a former agent, with our program in place of that one's: no packet is without one. An error if there is no
    /// interface to the link any more.
    pub(super) fn take_over(place: Place, object: &mut Ebpf, pins: &Pins) -> Result<Self, DataplaneError> {
        let path = pins.link(&place.to_string());
        let replaced = match place {
            Place::Interface { hook: Hook::Xdp, .. } => {
                let program: &mut Xdp = program(object, Hook::Xdp.program())?;
                replace(&path, |link| {
                    let id = program.attach_to_link(XdpLink::try_from(link)?)?;
                    Ok(FdLink::try_from(program.take_link(id)?)?)
                })
            }
            Place::Interface { hook, .. } => {
                let program: &mut SchedClassifier = program(object, hook.program())?;
                replace(&path, |link| {
                    let id = program.attach_to_link(SchedClassifierLink::try_from(link)?)?;
                    Ok(FdLink::try_from(program.take_link(id)?)?)
                })
            }
            Place::Sockets(hook) => {
                let program = descriptor(object, hook.program())?.as_fd();
                // The library does not do this for links of control groups.
                replace(&path, |link| sys::update_link(&path, program).map(|()| link).map_err(ReplaceError::Kernel))
            }
        };
        match replaced {
            Ok(link) => Ok(Self { place, kind: Kind::Link { link: Some(link), pin: Some(path) } }),
            Err(source) => Err(DataplaneError::Link { path, source: Box::new(source) }),
        }
    }

    /// Pins the link, if there is one that is not. Where pins can't be made it goes on without.
    pub(super) fn pin(&mut self, pins: &Pins) -> Result<(), DataplaneError> {
        let Kind::Link { link, pin: pin @ None } = &mut self.kind else { return Ok(()) };
        // The library drops a link that it can't pin, and so detaches it: better not to try in vain.
        pins.check_writable()?;
        let path = pins.link(&self.place.to_string());
        // Whatever has the name is of an interface that had the number before.
        let _none = fs::remove_file(&path);
        if let Some(unpinned) = link.take() {
            let pinned = unpinned.pin(&path).map_err(|source| DataplaneError::Pin { path: path.clone(), source })?;
            (*link, *pin) = (Some(pinned.into()), Some(path));
        }
        Ok(())
    }

    /// Takes the program away, also where it would stay.
    pub(super) fn release(mut self) {
        match &mut self.kind {
            Kind::Link { pin: Some(path), .. } => {
                if let Err(error) = fs::remove_file(&path) {
                    debug!(%error, "cannot remove {}", path.display());
                }
            }
            Kind::Filter { stays, .. } => *stays = false,
            Kind::Link { .. } => {}
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Kind::Filter { link, stays: true } = &mut self.kind {
            // The library would remove it.
            mem::forget(link.take());
        }
    }
}

/// Replaces the program of a pinned link.
fn replace(path: &Path, by: impl FnOnce(FdLink) -> Result<FdLink, ReplaceError>) -> Result<FdLink, ReplaceError> {
    by(PinnedLink::from_pin(path)?.into())
}

/// Why a program could not take another one's place.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// There is no such link, or it is of another kind.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The kernel refused.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The kernel refused.
    #[error("the kernel did not take the program in place of the former")]
    Kernel(#[source] io::Error),
}

/// What the names of links at control groups begin with.
pub(super) const SOCKETS: &str = "socket-";

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interface { hook, is_generic, interface } => {
                let mode = if *is_generic { "-generic" } else { "" };
                write!(f, "{}{mode}-{interface}", hook.name())
            }
            Self::Sockets(hook) => write!(f, "{SOCKETS}{}", hook.name()),
        }
    }
}

impl FromStr for Place {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(name) = text.strip_prefix(SOCKETS) {
            return SocketHook::ALL.into_iter().find(|hook| hook.name() == name).map(Self::Sockets).ok_or(());
        }
        let (name, interface) = text.rsplit_once('-').ok_or(())?;
        let (name, is_generic) = name.strip_suffix("-generic").map_or((name, false), |name| (name, true));
        let hook = Hook::ALL.into_iter().find(|hook| hook.name() == name).ok_or(())?;
        Ok(Self::Interface { hook, is_generic, interface: interface.parse().map_err(|_| ())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pins_say_where_programs_are() {
        for (hook, is_generic, text) in
            [(Hook::Xdp, false, "xdp-7"), (Hook::Xdp, true, "xdp-generic-7"), (Hook::TcEgress, false, "tc-egress-7")]
        {
            let place = Place::Interface { hook, is_generic, interface: 7 };
            assert_eq!((place.to_string().as_str(), text.parse()), (text, Ok(place)));
        }
        let place = Place::Sockets(SocketHook::Getpeername6);
        assert_eq!((place.to_string().as_str(), "socket-getpeername6".parse()), ("socket-getpeername6", Ok(place)));
        for other in ["", "xdp", "xdp-", "xdp-x", "filters", "tc-7", "socket-", "socket-7"] {
            assert_eq!(other.parse::<Place>(), Err(()), "{other}");
        }
    }
}
