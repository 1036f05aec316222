//! Where the control groups of this machine are: version 2 (cgroups(7)), beside version 1 or alone.

mod watch;

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::fs::MetadataExt as _,
    },
    path::{Component, Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

pub use self::watch::Watch;
use crate::mounts;

/// Why the control groups can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No hierarchy of version 2 is mounted.
    #[error(
        "no cgroup v2 hierarchy is mounted: `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified` does that, or --cgroup names one"
    )]
    NotMounted,
    /// Only a part of it is.
    #[error("of the cgroup v2 hierarchy only the part at {} is to be seen here: mount the host's /sys/fs/cgroup, or name where it is with --cgroup", .0.display())]
    NoRoot(PathBuf),
    /// What was named is none.
    #[error("{} is no directory of a cgroup v2 hierarchy", .0.display())]
    NotCgroup2(PathBuf),
    /// The system refused.
    #[error("{} can't be read", path.display())]
    Refused {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The root of all control groups, reached for as long as this is held.
#[derive(Debug)]
pub struct Root {
    directory: PathBuf,
    /// A mount at no place.
    mount: Option<OwnedFd>,
}

impl Root {
    /// Finds it where it is mounted. What `ip netns exec` runs has a /sys of its own, without: there it is mounted anew, at no place.
    pub fn find() -> Result<Self, CgroupError> {
        let mounts = mounts::list().map_err(|source| CgroupError::Refused { path: mounts::PATH.into(), source })?;
        // One may lie under another mount, and is not to be reached then.
        let found = mounts.into_iter().filter(|it| it.kind == "cgroup2").map(|mount| mount.at);
        let found: Vec<_> = found.filter(|it| is_cgroup2(it)).collect();
        if let Some(root) = found.iter().find(|it| is_root(it)) {
            return Ok(Self { directory: root.clone(), mount: None });
        }
        if let Ok(mount) = mounted_nowhere() {
            let directory = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
            if is_root(&directory) {
                return Ok(Self { directory, mount: Some(mount) });
            }
        }
        Err(found.into_iter().next().map_or(CgroupError::NotMounted, CgroupError::NoRoot))
    }

    /// What people call it: where it is mounted, if it is.
    pub fn name(&self) -> String {
        match self.mount {
            None => self.directory.display().to_string(),
            Some(_) => "the root of all control groups".to_owned(),
        }
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The id of a control group that is named as in /proc/PID/cgroup; `None` if there is none of that name now.
    pub fn id(&self, name: &Path) -> Option<u64> {
        let below = name.strip_prefix("/").unwrap_or(name);
        fs::metadata(self.directory.join(below)).ok().map(|it| it.ino())
    }
}

/// Whether it is the root: all others have a type (`CFTYPE_NOT_ON_ROOT` in kernel/cgroup/cgroup.c).
fn is_root(directory: &Path) -> bool {
    is_cgroup2(directory) && !directory.join("cgroup.type").exists()
}

/// Mounts the hierarchy, at no place (fsopen(2), fsmount(2)).
fn mounted_nowhere() -> io::Result<OwnedFd> {
    /// `FSCONFIG_CMD_CREATE`.
    const CREATE: libc::c_int = 6;
    let descriptor = |result: libc::c_long| {
        // SAFETY: The kernel has just made the descriptor for us, if it has.
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) }) }
    };
    // SAFETY: The name is a string.
    let context = descriptor(unsafe { libc::syscall(libc::SYS_fsopen, c"cgroup2".as_ptr(), libc::FSOPEN_CLOEXEC) })?;
    let nothing = std::ptr::null::<libc::c_char>();
    // SAFETY: The command takes neither key nor value.
    let created = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), CREATE, nothing, nothing, 0) };
    if created < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: Numbers alone.
    descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), libc::FSMOUNT_CLOEXEC, 0) })
}

/// Makes sure that this is the directory of a control group.
pub fn check(directory: &Path) -> Result<(), CgroupError> {
    if is_cgroup2(directory) { Ok(()) } else { Err(CgroupError::NotCgroup2(directory.to_owned())) }
}

/// How deep below the root a control group is: it need not be there.
pub fn level(name: &Path) -> usize {
    name.components().filter(|it| matches!(it, Component::Normal(_))).count()
}

fn is_cgroup2(directory: &Path) -> bool {
    statfs(directory).is_ok_and(|it| it.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_counted_from_the_root() {
        for (name, expected) in [("/", 0), ("/a", 1), ("a/b/", 2), ("/a//b/./c", 3)] {
            assert_eq!(level(Path::new(name)), expected, "{name}");
        }
    }

    #[test]
    fn what_lies_over_the_root_of_all_is_not_taken_for_it() {
        assert!(!is_root(Path::new("/proc")));
    }

    #[test]
    fn what_is_no_control_group_is_refused() {
        let error = check(Path::new("/proc")).unwrap_err();
        assert!(error.to_string().starts_with("/proc is no directory"), "{error}");
    }
}
