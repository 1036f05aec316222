//! Leaving no trace: what outlives the agent is taken away, and what it changed on the host is put back.

use std::path::{Path, PathBuf};

use tracing::{debug, info, warn};

use crate::{
    dataplane::kernel::{self, PinsError},
    describe, network,
    sysctl::{PutBack, Sysctls},
};

/// Why something of wharf is left.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// Its pins are.
    #[error(transparent)]
    Pins(#[from] PinsError),
    /// Settings of the host are.
    #[error(
        "not all that was changed on this host could be put back (the warnings above say what, and why); it stays on record, and \
         `wharf cleanup` as root tries again"
    )]
    Host,
}

/// Takes away what agents of this network namespace left: their programs, their tables with all flows, and their changes to
/// the host. Nobody may be running. Says whether there was anything.
pub async fn clean_up(bpffs: &Path, admin: &Path) -> Result<bool, CleanupError> {
    let had_pins = kernel::remove_pins(bpffs)?;
    kernel::remove_filters();
    let mut sysctls = Sysctls::open(&record(admin)?);
    let mut gone = Vec::new();
    for &interface in sysctls.qdiscs() {
        match network::remove_empty_clsact(interface).await {
            Err(error) if error.is_forbidden() => {
                warn!(error = describe(&error), "cannot remove the clsact qdisc of interface {interface}");
                continue;
            }
            // Most often the interface is gone.
            Err(error) => debug!(%error, "cannot remove the clsact qdisc of interface {interface}"),
            Ok(()) => {}
        }
        gone.push(interface);
    }
    sysctls.forget_qdiscs(&gone);
    let PutBack { had_anything, is_left } = sysctls.put_back();
    if is_left {
        return Err(CleanupError::Host);
    }
    let had_anything = had_anything || !gone.is_empty() || had_pins;
    if had_anything {
        info!("nothing of wharf is left in this network namespace");
    }
    Ok(had_anything)
}

/// Expects that nothing is pinned elsewhere: where the last agent had its pins, and where they usually are, if that is asked for. An agent
/// would balance beside them, and of what agents left half would be taken away.
pub fn expect_pins(bpffs: &Path, admin: &Path, usual: Option<&Path>) -> Result<(), PinsError> {
    let sysctls = Sysctls::open(&record(admin)?);
    for place in sysctls.pins().into_iter().chain(usual) {
        if !kernel::is_same_place(place, bpffs) && kernel::has_pins(place)? {
            return Err(PinsError::Elsewhere(place.to_owned()));
        }
    }
    Ok(())
}

/// The file in which the changes to the host are on record: beside the admin socket, one for each network namespace.
pub fn record(admin: &Path) -> Result<PathBuf, PinsError> {
    Ok(admin.with_file_name(kernel::namespace()?).with_extension("json"))
}
