//! Generic receive offload (GRO) of veth devices: whether the segments that come in are put together before the stack sees them.
//!
//! All other devices have it on by themselves. A veth has it off, since it gets segments whole from a stack that has not yet cut them
//! up. With an XDP program in its driver it never gets such (`veth_fix_features` in `drivers/net/veth.c`), and what the program leaves to the
//! stack would go through it one packet at a time. Until Linux 6.8 the program itself brought GRO along; since then it has to be
//! asked for (commit d7db7775ea2e, "net: veth: do not manipulate GRO when using XDP").

use std::io;

use tracing::{info, warn};

use crate::network::{generic::Generic, name_of};

/// What `ethtool -k` calls it in the kernel's words.
const GRO: &str = "rx-gro";

/// Switches it on, if it is off: `note` is called before.
pub(super) fn switch_on(interface: u32, note: impl FnOnce()) {
    let name = shown(interface);
    let switched = is_on(interface).and_then(|is_on| {
        if is_on {
            return Ok(false);
        }
        note();
        set(interface, true).map(|()| true)
    });
    match switched {
        Ok(true) => info!("switched GRO on at {name}, a veth device, which has it off by itself"),
        Ok(false) => {}
        Err(error) => warn!(
            %error,
            "cannot switch GRO on at {name}, without which pods here receive less in a second than they could; ethtool -K {name} gro on"
        ),
    }
}

/// Switches it off again. Says whether it is off.
pub(super) fn switch_off(interface: u32) -> bool {
    let name = shown(interface);
    match set(interface, false) {
        Ok(()) => info!("switched GRO off again at {name}"),
        // It took its setting along.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
        Err(error) => {
            warn!(%error, "cannot switch GRO off again at {name}; ethtool -K {name} gro off");
            return false;
        }
    }
    true
}

fn is_on(interface: u32) -> io::Result<bool> {
    Ok(Generic::open()?.offloads(interface)?.iter().any(|name| name == GRO))
}

fn set(interface: u32, is_on: bool) -> io::Result<()> {
    Generic::open()?.set_offload(interface, GRO, is_on)
}

/// The name of an interface, or its number if it is gone.
fn shown(interface: u32) -> String {
    name_of(interface).unwrap_or_else(|| format!("interface {interface}"))
}
