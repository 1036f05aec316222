//! Where the BPF file system is.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use tracing::{debug, info};

use super::PinsError;

/// Where the BPF file system is mounted as a rule.
pub(super) const MOUNT_POINT: &str = "/sys/fs/bpf";

/// Where a directory on a BPF file system really is, which is mounted if it has to be.
///
/// What `ip netns exec` runs has a /sys of its own, without the BPF file system that everybody else shares, and what it mounts
/// there would go with the process. So where the directory is not on one here, it is looked for as process 1 sees it.
pub(super) fn place(bpffs: &Path) -> Result<PathBuf, PinsError> {
    if let Some(root) = existing(bpffs) {
        return Ok(root);
    }
    if !bpffs.starts_with(MOUNT_POINT) {
        return Err(PinsError::NotBpffs(bpffs.to_owned()));
    }
    mount_bpffs().map_err(PinsError::Mount)?;
    existing(bpffs).ok_or_else(|| PinsError::NotBpffs(bpffs.to_owned()))
}

/// The directory, or the one that process 1 sees by that name, if it is or would be on a BPF file system.
pub(super) fn existing(bpffs: &Path) -> Option<PathBuf> {
    if is_on_bpffs(bpffs) {
        return Some(bpffs.to_owned());
    }
    let below = bpffs.strip_prefix(MOUNT_POINT).ok()?;
    Some(outside()?.join(below))
}

/// The BPF file system that process 1 sees, by a way that stays open to an agent that has dropped its capabilities: they may
/// not look at process 1 again.
static OUTSIDE: OnceLock<(PathBuf, File)> = OnceLock::new();

fn outside() -> Option<&'static Path> {
    if OUTSIDE.get().is_none() {
        let path = Path::new("/proc/1/root").join(MOUNT_POINT.trim_start_matches('/'));
        let directory = File::open(&path).ok().filter(|_| is_on_bpffs(&path))?;
        // Whoever else has found it meanwhile has found the same.
        let _same = OUTSIDE.set((PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())), directory));
    }
    OUTSIDE.get().map(|(path, _)| path.as_path())
}

fn is_on_bpffs(path: &Path) -> bool {
    let exists = path.ancestors().find(|it| it.as_os_str() != OsStr::new("") && it.exists());
    exists.is_some_and(|it| statfs(it).is_ok_and(|it| it.filesystem_type() == BPF_FS_MAGIC))
}

/// Mounts a BPF file system, where process 1 sees it if that may be.
fn mount_bpffs() -> io::Result<()> {
    let mount_here = || mount(Some("bpf"), MOUNT_POINT, Some("bpf"), MsFlags::empty(), None::<&str>);
    // A thread that shares its directories with no other may enter another mount namespace.
    let mount_outside = move || {
        unshare(CloneFlags::CLONE_FS)?;
        setns(File::open("/proc/1/ns/mnt")?, CloneFlags::CLONE_NEWNS)?;
        Ok::<_, io::Error>(mount_here()?)
    };
    let outside = thread::spawn(mount_outside).join().unwrap_or_else(|_| Err(io::Error::other("the thread died")));
    if let Err(error) = outside {
        debug!(%error, "cannot mount a BPF file system where process 1 would see it");
        mount_here()?;
    }
    info!("mounted a BPF file system at {MOUNT_POINT}");
    Ok(())
}

/// A path as people know it.
pub(super) fn shown(path: &Path) -> PathBuf {
    let below = OUTSIDE.get().and_then(|(outside, _)| path.strip_prefix(outside).ok());
    below.map_or_else(|| path.to_owned(), |below| Path::new(MOUNT_POINT).join(below))
}
