//! Where things are.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// The root of the source tree.
pub(crate) fn workspace() -> PathBuf {
    let member = Path::new(env!("CARGO_MANIFEST_DIR"));
    member.parent().unwrap_or(member).into()
}

/// A program that cargo built for this machine, beside us.
pub(crate) fn built(profile: &str, name: &str) -> Result<PathBuf> {
    let ourselves = std::env::current_exe()?;
    let target = ourselves.ancestors().nth(2).context("xtask runs outside of cargo's target directory")?;
    Ok(target.join(profile).join(name))
}

/// Whether we may build networks and load programs.
pub(crate) fn is_root() -> bool {
    // The owner of a process's directory is its effective user.
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}
