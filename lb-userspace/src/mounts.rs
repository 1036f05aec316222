//! The file systems that this process sees.

use std::{fs, io, path::PathBuf};

/// Where they are read.
pub const PATH: &str = "/proc/self/mounts";

/// A file system at its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its place.
    pub at: PathBuf,
    /// Its kind, as `mount -t` has it.
    pub kind: String,
}

/// All of them. One that lies over another comes later.
pub fn list() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read_to_string(PATH)?))
}

/// Device, place, kind, options and two numbers a line; blanks in it are written `\040` (`man 5 proc_pid_mounts`).
pub(crate) fn parse(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let mut words = line.split(' ').skip(1);
        Some(Mount { at: words.next()?.replace("\\040", " ").into(), kind: words.next()?.to_owned() })
    };
    text.lines().filter_map(mount).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_kinds_are_read() {
        let text = "tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0\n\
                    cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
                    none /run/a\\040b cgroup2 rw 0 0\n\
                    broken\n";
        let found: Vec<_> = parse(text).into_iter().map(|mount| (mount.at, mount.kind)).collect();
        let expected = [("/sys/fs/cgroup", "tmpfs"), ("/sys/fs/cgroup/unified", "cgroup2"), ("/run/a b", "cgroup2")];
        assert_eq!(found, expected.map(|(at, kind)| (at.into(), kind.to_owned())));
    }
}
