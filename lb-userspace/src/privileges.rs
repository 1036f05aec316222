//! Capabilities: what the agent can't do without, and that it holds no more than that once it balances.
//!
//! They are each thread's own, and a thread begins with those of the one that starts it. The agent has one thread, and
//! helpers that read files or end sockets, which give up everything else as they begin ([`settle_reader`],
//! [`settle_ender_of_sockets`]).

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};
use nix::{sys::prctl::set_no_new_privs, unistd::geteuid};
use tracing::{error, info};

/// A capability that the agent can't do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    capability: Capability,
    /// What can't be done without it.
    why: &'static str,
    /// Whether it is needed for as long as the agent runs.
    lasts: bool,
    /// Whether `CAP_SYS_ADMIN` has it in itself, of which it was a part until Linux 5.8.
    in_sys_admin: bool,
}

/// All that the agent can't do without.
const NEEDS: [Need; 3] = [
    Need {
        capability: Capability::CAP_BPF,
        why: "the kernel makes no maps and loads no programs",
        lasts: false,
        in_sys_admin: true,
    },
    Need {
        capability: Capability::CAP_NET_ADMIN,
        why: "the kernel takes no programs for packets, attaches to nothing and keeps its network settings",
        lasts: true,
        in_sys_admin: false,
    },
    Need {
        capability: Capability::CAP_PERFMON,
        why: "the verifier refuses what the programs do with pointers into packets",
        lasts: false,
        in_sys_admin: true,
    },
];

/// Why the agent has not the privileges that it is to have.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegesError {
    /// It lacks some.
    #[error(
        "{}: run wharf as root, or as a user with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (in a systemd unit, AmbientCapabilities=)",
        join(.0, "; ")
    )]
    Missing(Vec<Need>),
    /// The kernel does not tell which it has, or does not take them.
    #[error("cannot {what}")]
    Refused {
        /// What could not be done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What the agent reads and writes for as long as it runs.
#[derive(Clone, Debug)]
pub struct Places {
    /// What it reads again: the services file, or what its source is reached by.
    pub read: Vec<PathBuf>,
    /// Where it makes and removes files.
    pub written: Vec<PathBuf>,
}

/// Makes sure that all is there that the agent needs, and that nothing is ever added.
pub fn check() -> Result<(), PrivilegesError> {
    let missing = missing(&effective()?);
    if !missing.is_empty() {
        return Err(PrivilegesError::Missing(missing));
    }
    set_no_new_privs()
        .map_err(|errno| PrivilegesError::Refused { what: "rule out new privileges", source: errno.into() })
}

/// The capabilities that this thread can use.
pub fn effective() -> Result<CapsHashSet, PrivilegesError> {
    caps::read(None, CapSet::Effective).map_err(refused("read the capabilities of this process"))
}

/// Those of the agent's needs that are not met.
pub fn missing(held: &CapsHashSet) -> Vec<Need> {
    let is_met =
        |need: &Need| held.contains(&need.capability) || need.in_sys_admin && held.contains(&Capability::CAP_SYS_ADMIN);
    NEEDS.into_iter().filter(|need| !is_met(need)).collect()
}

/// Gives up for good what an agent that has loaded and attached its programs needs no more.
pub fn settle(places: &Places) -> Result<(), PrivilegesError> {
    let lasting = NEEDS.into_iter().filter(|need| need.lasts).map(|need| need.capability);
    let before = permitted()?;
    let of_files: Vec<_> = over_files(places).into_iter().filter(|(it, _)| before.contains(it)).collect();
    let kept = lasting.chain(of_files.iter().map(|(it, _)| *it)).filter(|it| before.contains(it)).collect();
    keep_only(&kept)?;
    info!("capabilities: from now on {}; dropped for good: {}", names(&kept), dropped(&before, &kept));
    for (capability, path) in of_files {
        info!("{capability} stays because {} is, or may become, somebody else's", path.display());
    }
    Ok(())
}

/// What it takes to enter other network namespaces: to do so, and to find them.
const TO_ENTER_NAMESPACES: [Capability; 2] = [Capability::CAP_SYS_ADMIN, Capability::CAP_SYS_PTRACE];

/// Whether this process can enter all network namespaces of the machine: it sees all processes, and may.
pub fn reaches_all_namespaces() -> bool {
    /// `PROC_PID_INIT_INO` (`include/linux/proc_ns.h`): the machine's own namespace of processes.
    const INITIAL: u64 = 0xEFFF_FFFC;
    let sees_all = fs::metadata("/proc/self/ns/pid").is_ok_and(|it| it.ino() == INITIAL);
    sees_all && effective().is_ok_and(|held| TO_ENTER_NAMESPACES.iter().all(|it| held.contains(it)))
}

/// Gives up everything that a thread does not need which does no more than reading these files.
pub fn settle_reader(files: &[PathBuf]) {
    let places = Places { read: files.to_owned(), written: Vec::new() };
    settle_helper(over_files(&places).into_iter().map(|(capability, _)| capability));
}

/// Gives up everything that a thread does not need which ends sockets: in this network namespace, or in all.
pub fn settle_ender_of_sockets(in_all: bool) {
    let entering = TO_ENTER_NAMESPACES.into_iter().filter(|_| in_all);
    settle_helper([Capability::CAP_NET_ADMIN].into_iter().chain(entering));
}

fn settle_helper(needed: impl Iterator<Item = Capability>) {
    let settled = permitted().and_then(|before| keep_only(&needed.filter(|it| before.contains(it)).collect()));
    if let Err(error) = settled {
        error!("a helping thread keeps its capabilities: {error}");
    }
}

/// The capabilities that this thread may use or take up.
fn permitted() -> Result<CapsHashSet, PrivilegesError> {
    caps::read(None, CapSet::Permitted).map_err(refused("read the capabilities of this process"))
}

/// The capabilities that root goes on to need where files are not its own alone, each with such a file. Others than root have
/// none of the kind: a file of theirs they can read and write, or not.
fn over_files(places: &Places) -> Vec<(Capability, &Path)> {
    let foreign = |path: &PathBuf| !is_in_own_hands(path);
    let read = places.read.iter().find(|it| foreign(it)).map(|it| (Capability::CAP_DAC_READ_SEARCH, it.as_path()));
    let written = places.written.iter().find(|it| foreign(it)).map(|it| (Capability::CAP_DAC_OVERRIDE, it.as_path()));
    read.into_iter().chain(written).collect()
}

/// Whether nobody but this user, or root, can take a file away from it: neither by the file's mode, nor by that of a directory
/// above it, nor by putting another one there.
fn is_in_own_hands(path: &Path) -> bool {
    const WRITABLE: u32 = 0o022;
    const STICKY: u32 = 0o1000;
    let own = geteuid().as_raw();
    let is_safe = |path: &Path| {
        let metadata = fs::metadata(path);
        metadata.is_ok_and(|it| {
            (it.uid() == own || it.uid() == 0) && (it.mode() & WRITABLE == 0 || it.mode() & STICKY != 0)
        })
    };
    let written = std::path::absolute(path).ok();
    // Links lead elsewhere.
    let real = path.canonicalize().ok();
    written.is_some() && written.iter().chain(&real).flat_map(|path| path.ancestors()).all(is_safe)
}

/// Drops everything else.
fn keep_only(kept: &CapsHashSet) -> Result<(), PrivilegesError> {
    let failed = "drop capabilities";
    caps::clear(None, CapSet::Ambient).map_err(refused(failed))?;
    // What programs that are executed later could get: the agent executes none. Without this capability it stays, but there
    // are no new privileges in any case.
    if effective()?.contains(&Capability::CAP_SETPCAP) {
        caps::clear(None, CapSet::Bounding).map_err(refused(failed))?;
    }
    caps::clear(None, CapSet::Inheritable).map_err(refused(failed))?;
    caps::set(None, CapSet::Effective, kept).map_err(refused(failed))?;
    caps::set(None, CapSet::Permitted, kept).map_err(refused(failed))
}

fn refused(what: &'static str) -> impl FnOnce(CapsError) -> PrivilegesError {
    move |error| PrivilegesError::Refused { what, source: io::Error::other(error) }
}

fn names(capabilities: &CapsHashSet) -> String {
    join(&capabilities.iter().map(ToString::to_string).collect::<BTreeSet<_>>(), ", ")
}

/// What an agent needs to begin by name, and how many others.
fn dropped(before: &CapsHashSet, kept: &CapsHashSet) -> String {
    let dropped: CapsHashSet = before.difference(kept).copied().collect();
    let named: CapsHashSet = NEEDS.iter().map(|need| need.capability).filter(|it| dropped.contains(it)).collect();
    match (named.len(), dropped.len() - named.len()) {
        (0, 0) => "none".to_owned(),
        (_, 0) => names(&named),
        (0, others) => format!("{others}"),
        (_, others) => format!("{} and {others} others", names(&named)),
    }
}

fn join<'a, T: fmt::Display + 'a>(items: impl IntoIterator<Item = &'a T>, between: &str) -> String {
    items.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(between)
}

impl Need {
    /// Its name, as the kernel has it.
    pub fn name(&self) -> String {
        self.capability.to_string()
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is missing, without which {}", self.capability, self.why)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn set(capabilities: &[Capability]) -> CapsHashSet {
        capabilities.iter().copied().collect()
    }

    #[test]
    fn what_is_missing_is_named_with_what_it_is_for() {
        use Capability::{CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN};
        let names = |held: &[Capability]| missing(&set(held)).iter().map(Need::name).collect::<Vec<_>>();
        assert!(names(&[CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON]).is_empty());
        assert!(names(&[CAP_SYS_ADMIN, CAP_NET_ADMIN]).is_empty());
        assert_eq!(names(&[CAP_SYS_ADMIN]), ["CAP_NET_ADMIN"]);
        assert_eq!(names(&[CAP_BPF, CAP_NET_ADMIN]), ["CAP_PERFMON"]);
        let text = PrivilegesError::Missing(missing(&set(&[CAP_NET_ADMIN]))).to_string();
        assert!(text.starts_with("CAP_BPF is missing, without which the kernel makes no maps"), "{text}");
        assert!(text.contains("; CAP_PERFMON is missing, without which the verifier"), "{text}");
    }

    #[test]
    fn what_was_dropped_is_named_where_it_is_of_use_to_know() {
        let all = caps::all();
        let kept = set(&[Capability::CAP_NET_ADMIN]);
        assert_eq!(dropped(&all, &kept), format!("CAP_BPF, CAP_PERFMON and {} others", all.len() - 3));
        assert_eq!(dropped(&set(&[Capability::CAP_NET_ADMIN, Capability::CAP_BPF]), &kept), "CAP_BPF");
        assert_eq!(dropped(&kept, &kept), "none");
    }

    #[test]
    fn a_file_is_in_others_hands_if_one_of_its_directories_is() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("s.yaml");
        assert!(!is_in_own_hands(&file), "it is not there");
        fs::write(&file, "").unwrap();
        assert!(is_in_own_hands(&file));
        let link = directory.path().join("link.yaml");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(is_in_own_hands(&link));
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(!is_in_own_hands(&file) && !is_in_own_hands(&link));
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(is_in_own_hands(&file));
    }
}
