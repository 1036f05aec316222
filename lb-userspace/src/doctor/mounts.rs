//! The file systems that BPF needs.

use std::{
    io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    unistd::{AccessFlags, access},
};

use super::Check;
use crate::{
    cgroup::{CgroupError, Root},
    describe,
    mounts::{self, Mount},
};

/// What is so.
pub(super) struct Facts {
    /// Where things are to be pinned.
    bpffs: PathBuf,
    mounts: io::Result<Vec<Mount>>,
    /// What the root of all control groups is called, if it is found.
    cgroup: Result<String, CgroupError>,
    /// Whether this process may make something where things are to be pinned, or in the nearest directory that is there.
    writing: nix::Result<()>,
}

impl Facts {
    pub(super) fn gather(bpffs: &Path) -> Self {
        let nearest = bpffs.ancestors().find(|path| path.exists()).unwrap_or(bpffs);
        Self {
            bpffs: bpffs.to_owned(),
            mounts: mounts::list(),
            cgroup: Root::find().map(|root| root.name()),
            writing: access(nearest, AccessFlags::W_OK),
        }
    }
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let bpffs = match &facts.mounts {
        Ok(mounts) => bpffs(facts, mounts),
        Err(error) => Check::unknown("bpffs", format!("{} can't be read: {error}", mounts::PATH), MOUNT_PROC),
    };
    vec![bpffs, cgroup2(&facts.cgroup)]
}

const MOUNT_PROC: &str = "mount /proc";

fn bpffs(facts: &Facts, mounts: &[Mount]) -> Check {
    const NAME: &str = "bpffs";
    let path = facts.bpffs.display();
    // Of mounts that lie over each other the last one counts.
    let holds = mounts.iter().filter(|mount| facts.bpffs.starts_with(&mount.at));
    match holds.max_by_key(|mount| mount.at.components().count()) {
        Some(Mount { at, kind }) if kind == "bpf" => {
            let at = at.display();
            match facts.writing {
                Ok(()) => Check::ok(NAME, format!("{path} lies in the BPF file system at {at}, and is writable")),
                Err(Errno::EROFS) => Check::problem(
                    NAME,
                    format!(
                        "{path} lies in the BPF file system at {at}, which is mounted read-only: wharf run waits until it is not"
                    ),
                    format!("mount -o remount,rw {at}"),
                ),
                Err(_) => Check::warning(
                    NAME,
                    format!("{path} lies in the BPF file system at {at}, but this process may not write there"),
                    "run wharf as root, or let its user write there",
                ),
            }
        }
        _ => {
            let found = format!("{path} lies in no BPF file system");
            if facts.bpffs.starts_with("/sys/fs/bpf") {
                Check::note(
                    NAME,
                    found,
                    "nothing if wharf run is to run as root, which mounts one there; else mount -t bpf bpf /sys/fs/bpf",
                )
            } else {
                Check::problem(NAME, found, format!("mount -t bpf bpf {path}"))
            }
        }
    }
}

fn cgroup2(root: &Result<String, CgroupError>) -> Check {
    const NAME: &str = "cgroup2";
    match root {
        Ok(name) => Check::ok(NAME, format!("sockets can be balanced at {name}")),
        Err(CgroupError::NoRoot(part)) => Check::warning(
            NAME,
            format!("of the cgroup v2 hierarchy only the part at {} is to be seen here", part.display()),
            "mount the host's /sys/fs/cgroup, or name where it is with --cgroup; else what processes of this machine send is balanced \
             packet by packet, which is slower",
        ),
        Err(CgroupError::NotMounted) => Check::note(
            NAME,
            "no cgroup v2 hierarchy is mounted",
            "nothing if wharf run is to run as root, which finds it all the same; else mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified, \
             or what processes of this machine send is balanced packet by packet, which is slower",
        ),
        Err(error) => Check::unknown(NAME, describe(error), MOUNT_PROC),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    const HYBRID: &str = "\
        sysfs /sys sysfs rw 0 0\n\
        bpf /sys/fs/bpf bpf rw 0 0\n\
        tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";

    #[track_caller]
    fn says(bpffs: &str, text: &str, writing: nix::Result<()>, expected: [(Verdict, &str); 2]) {
        let cgroup =
            if text.is_empty() { Err(CgroupError::NotMounted) } else { Ok("/sys/fs/cgroup/unified".to_owned()) };
        let checks = checks(&Facts { bpffs: bpffs.into(), mounts: Ok(mounts::parse(text)), cgroup, writing });
        for (check, (verdict, words)) in checks.iter().zip(expected) {
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.found.contains(words), "{check:?}");
        }
    }

    #[test]
    fn what_is_mounted_is_found_in_hybrid_hierarchies_too() {
        let cgroup = (Verdict::Ok, "/sys/fs/cgroup/unified");
        says("/sys/fs/bpf/wharf", HYBRID, Ok(()), [(Verdict::Ok, "writable"), cgroup]);
        says("/sys/fs/bpf/wharf", HYBRID, Err(Errno::EACCES), [(Verdict::Warning, "may not write"), cgroup]);
        says("/sys/fs/bpf/wharf", HYBRID, Err(Errno::EROFS), [(Verdict::Problem, "read-only"), cgroup]);
        says("/run/wharf/bpf", HYBRID, Ok(()), [(Verdict::Problem, "no BPF file system"), cgroup]);
        says(
            "/run/a b/c",
            &format!("{HYBRID}none /run/a\\040b bpf rw 0 0\n"),
            Ok(()),
            [(Verdict::Ok, "/run/a b"), cgroup],
        );
    }

    #[test]
    fn what_is_not_mounted_is_missed() {
        says("/sys/fs/bpf", "", Ok(()), [(Verdict::Note, "no BPF file system"), (Verdict::Note, "no cgroup v2")]);
        let error = || io::Error::from_raw_os_error(libc::ENOENT);
        let hidden = Facts {
            bpffs: "/sys/fs/bpf".into(),
            mounts: Err(error()),
            cgroup: Err(CgroupError::Refused { path: mounts::PATH.into(), source: error() }),
            writing: Ok(()),
        };
        assert!(checks(&hidden).iter().all(|check| check.verdict == Verdict::Unknown));
    }

    /// As in a container with a namespace of control groups.
    #[test]
    fn a_part_of_the_control_groups_is_not_all() {
        let check = cgroup2(&Err(CgroupError::NoRoot("/sys/fs/cgroup".into())));
        assert!(check.verdict == Verdict::Warning && check.found.contains("/sys/fs/cgroup"), "{check:?}");
        assert!(check.remedy.is_some_and(|remedy| remedy.contains("--cgroup")));
    }
}
