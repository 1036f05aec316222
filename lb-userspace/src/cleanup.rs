//! Leaving no trace: what outlives the agent is taken away, and what it changed on the host is put back.

use std::path::{Path, PathBuf};

use tracing::{debug, info};

use crate::{
    dataplane::kernel::{self, PinsError},
    network,
    sysctl::Sysctls,
};

/// Takes away what agents of this network namespace left: their programs, their tables with all flows, and their changes to
/// the host. Nobody may be running. Says whether there was anything.
pub async fn clean_up(bpffs: &Path, admin: &Path) -> Result<bool, PinsError> {
    let had_pins = kernel::remove_pins(bpffs)?;
    kernel::remove_filters();
    let mut sysctls = Sysctls::open(&record(admin)?);
    for interface in sysctls.qdiscs() {
        if let Err(error) = network::remove_empty_clsact(*interface).await {
            // Most often the interface is gone.
            debug!(%error, "cannot remove the clsact qdisc of interface {interface}");
        }
    }
    let had_changes = sysctls.put_back();
    if had_pins || had_changes {
        info!("nothing of wharf is left in this network namespace");
    }
    Ok(had_pins || had_changes)
}

/// Expects that nothing is pinned elsewhere: without it, half of what agents left would be taken away.
pub fn expect_pins(bpffs: &Path, admin: &Path) -> Result<(), PinsError> {
    match Sysctls::open(&record(admin)?).pins() {
        Some(pins) if pins != bpffs && pins.exists() => Err(PinsError::Elsewhere(pins.to_owned())),
        _ => Ok(()),
    }
}

/// The file in which the changes to the host are on record: beside the admin socket, one for each network namespace.
pub fn record(admin: &Path) -> Result<PathBuf, PinsError> {
    Ok(admin.with_file_name(kernel::namespace()?).with_extension("json"))
}
