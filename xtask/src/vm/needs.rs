//! What virtual machines need of the host.

use std::{
    env::consts::ARCH,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use xtask::command::find;

use crate::{
    place::{is_debian, is_root},
    setup::{Package, provide},
};

/// Where Debian puts what serves files to guests, of late and before.
const VIRTIOFSD: [&str; 2] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];

/// Installs what is missing, and says what can't be had.
pub(super) fn provide_all() -> Result<()> {
    ensure!(ARCH == "x86_64", "there are guests for x86-64 alone, and this machine is {ARCH}");
    ensure!(is_debian(), "the kernels are Debian's, and so have to be the tools that unpack and boot them");
    ensure!(is_root(), "only root may lend guests the host's files: please run this as root");
    let packages: [(&str, Package); 4] = [
        ("qemu-system-x86_64", ("qemu-system-x86", "runs other kernels for the tests")),
        ("modprobe", ("kmod", "finds their modules")),
        ("busybox", ("busybox-static", "is the shell that they boot into")),
        ("systemctl", ("systemd", "runs Wharf's unit in one of them")),
    ];
    let missing = packages.into_iter().filter(|(program, _)| find(program, |_| true).is_none());
    provide(&missing.map(|(_, package)| package).collect::<Vec<_>>())?;
    // Up to Debian 12 it came with QEMU.
    if virtiofsd().is_err() {
        provide(&[("virtiofsd", "serves them files")])?;
    }
    virtiofsd().map(drop)
}

/// What serves files to guests.
pub(super) fn virtiofsd() -> Result<PathBuf> {
    let found = VIRTIOFSD.map(Path::new).into_iter().find(|path| path.exists());
    found.map(Path::to_owned).context("there is no virtiofsd")
}
