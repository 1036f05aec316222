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

/// Cargo's target directory.
pub(crate) fn target() -> Result<PathBuf> {
    let ourselves = std::env::current_exe()?;
    let target = ourselves.ancestors().nth(2).context("xtask runs outside of cargo's target directory")?;
    Ok(target.into())
}

/// A program that cargo built for this machine, beside us.
pub(crate) fn built(profile: &str, name: &str) -> Result<PathBuf> {
    Ok(target()?.join(profile).join(name))
}

/// Whether we may build networks and load programs.
pub(crate) fn is_root() -> bool {
    // The owner of a process's directory is its effective user.
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Whether this is Debian, or descends from it.
pub(crate) fn is_debian() -> bool {
    fs::read_to_string("/etc/os-release").is_ok_and(|release| says_debian(&release))
}

/// Whether an os-release(5) file speaks of Debian.
fn says_debian(release: &str) -> bool {
    let fields = release.lines().filter_map(|line| line.split_once('='));
    let mut identities =
        fields.filter(|(name, _)| matches!(*name, "ID" | "ID_LIKE")).map(|(_, value)| value.trim_matches('"'));
    identities.any(|value| value.split_whitespace().any(|word| word == "debian"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_and_what_descends_from_it_are_told_from_others() {
        assert!(says_debian("NAME=\"Debian GNU/Linux\"\nID=debian\n"));
        assert!(says_debian("ID=raspbian\nID_LIKE=\"debian\"\n"));
        assert!(says_debian("ID_LIKE=\"ubuntu debian\"\n"));
        assert!(!says_debian("NAME=\"not debian\"\nID=fedora\n"));
    }
}
