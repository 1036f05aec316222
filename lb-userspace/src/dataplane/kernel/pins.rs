//! Where maps, programs and links outlive the agent: directories of the BPF file system.
//!
//! ```text
//! /sys/fs/bpf/wharf/v1/netns-1/maps/FLOWS4, …        what the tables hold
//!                             /programs/3/…          the programs of the third agent, and the arrays by which they call each other
//!                             /links/tc-egress-2, …  what holds a program at a hook of the interface with that number
//! ```
//! `v1` is the layout of the maps ([`LAYOUT`]). Each network namespace has a directory, named by the number that the kernel
//! gives to no other one until it is booted again (`SO_NETNS_COOKIE`); the host's own is 1.

mod place;

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use lb_common::abi::LAYOUT;
use nix::fcntl::{Flock, FlockArg};
use tracing::{debug, info, warn};

use self::place::{MOUNT_POINT, existing, place, shown};
use super::{
    links::SOCKETS,
    programs::Hook,
    sys::{self, LinkPlace},
};

/// Where pins are unless said otherwise.
pub const DEFAULT: &str = "/sys/fs/bpf/wharf";

/// How long a lock is waited for that may be held by who looks whether the namespace is gone.
const SWEEP: Duration = Duration::from_secs(2);

/// How long to wait before trying again.
const PAUSE: Duration = Duration::from_millis(10);

/// The pins of one network namespace, held by one agent at a time.
#[derive(Debug)]
pub struct Pins {
    directory: PathBuf,
    /// Others wait for it, or are refused.
    _turn: Flock<File>,
}

/// What is wrong with pins.
#[derive(Debug, thiserror::Error)]
pub enum PinsError {
    /// They are another agent's.
    #[error("another wharf runs with the pins in {}: stop it first, or name another place with --bpffs", .0.display())]
    Busy(PathBuf),
    /// They are somewhere else.
    #[error("the last wharf has its pins in {pins}: `wharf cleanup --bpffs {pins}` takes away what it left", pins = .0.display())]
    Elsewhere(PathBuf),
    /// There is no BPF file system.
    #[error("{} is not on a BPF file system: mount one (`mount -t bpf bpf DIRECTORY`), or name a place on one with --bpffs", .0.display())]
    NotBpffs(PathBuf),
    /// It could not be mounted.
    #[error(
        "no BPF file system could be mounted at {MOUNT_POINT}: `mount -t bpf bpf {MOUNT_POINT}` as root, or name a place on one with --bpffs"
    )]
    Mount(#[source] io::Error),
    /// The system refused.
    #[error("cannot {what} {} ({})", path.display(), remedy(source))]
    Refused {
        /// To do what.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another version made them, with other tables.
    #[error(
        "{} is of another version of wharf, whose tables have another layout than v{LAYOUT}: their flows can't be taken over. \
         Traffic goes on by them; `wharf cleanup` removes them, and ends the connections", .0.display()
    )]
    OtherLayout(PathBuf),
    /// The network namespace has no number.
    #[error("the kernel does not say which network namespace this is (Linux 5.14 or later does)")]
    Namespace(#[source] io::Error),
}

impl PinsError {
    /// Whether a directory is not there.
    fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { source, .. } if source.kind() == ErrorKind::NotFound)
    }

    /// Whether it may pass without anybody starting the agent another way.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Refused { source, .. } if matches!(source.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::StorageFull | ErrorKind::OutOfMemory))
    }
}

/// What to do about a refusal.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ReadOnlyFilesystem => "the BPF file system is read-only: `mount -o remount,rw` makes it writable",
        ErrorKind::PermissionDenied => {
            "it belongs to another user: `chown -R` gives it to the one that wharf runs as, or --bpffs names another place"
        }
        ErrorKind::StorageFull | ErrorKind::OutOfMemory => "there is no room: free some memory",
        _ => "is that place on a BPF file system?",
    }
}

impl Pins {
    /// Takes the pins of this network namespace, made or found below a directory of a BPF file system.
    pub fn take(bpffs: &Path) -> Result<Self, PinsError> {
        let root = place(bpffs)?;
        let namespace = namespace()?;
        let layouts = entries(&root).map(|version| root.join(version).join(&namespace));
        let directory = root.join(format!("v{LAYOUT}")).join(&namespace);
        if let Some(other) = layouts.filter(|it| *it != directory).find(|it| it.exists()) {
            return Err(PinsError::OtherLayout(shown(&other)));
        }
        let turn = make_and_lock(&directory)?;
        // Not before: until it was locked, another agent could take it for what is left of a namespace that is gone.
        for part in ["maps", "programs", "links"].map(|it| directory.join(it)) {
            fs::create_dir_all(&part).map_err(refused("make", &part))?;
        }
        let pins = Self { directory, _turn: turn };
        pins.check_writable()?;
        sweep(&root, &namespace);
        Ok(pins)
    }

    /// The directory that holds all of them.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether a former agent left something.
    pub fn are_new(&self) -> bool {
        entries(&self.directory.join("maps")).next().is_none()
    }

    /// Where a map is or will be pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        self.directory.join("maps").join(name)
    }

    /// Where a link is or will be pinned.
    pub fn link(&self, name: &str) -> PathBuf {
        self.directory.join("links").join(name)
    }

    /// The links that are pinned, by name.
    pub fn links(&self) -> Vec<String> {
        entries(&self.directory.join("links")).collect()
    }

    /// Whether the interface or control group of a link is gone.
    pub(super) fn is_dead(&self, name: &str) -> bool {
        is_dead(&self.link(name))
    }

    /// Removes a link that is of no use.
    pub(super) fn remove_link(&self, name: &str) -> Result<(), PinsError> {
        let path = self.link(name);
        fs::remove_file(&path).map_err(refused("remove", &path))
    }

    /// An error if nothing can be pinned now.
    pub(super) fn check_writable(&self) -> Result<(), PinsError> {
        let probe = self.directory.join("links/probe");
        // Of an agent that was killed just then.
        let _left = fs::remove_dir(&probe);
        fs::create_dir(&probe)
            .and_then(|()| fs::remove_dir(&probe))
            .map_err(refused("pin anything in", &self.directory))
    }

    /// Notes that programs sit in filters of clsact qdiscs, of which the file system knows nothing.
    pub(super) fn note_filters(&self) -> Result<(), PinsError> {
        let mark = self.directory.join("links/filters");
        fs::create_dir_all(&mark).map_err(refused("make", &mark))
    }

    /// Makes a directory for the programs of one more agent.
    pub(super) fn new_programs(&self) -> Result<PathBuf, PinsError> {
        let programs = self.directory.join("programs");
        let last = entries(&programs).filter_map(|name| name.parse::<u64>().ok()).max().unwrap_or(0);
        let new = programs.join((last + 1).to_string());
        fs::create_dir(&new).map_err(refused("make", &new))?;
        Ok(new)
    }

    /// Removes the programs of former agents, which no link leads to any more.
    pub(super) fn remove_other_programs(&self, ours: &Path) {
        let programs = self.directory.join("programs");
        for other in entries(&programs).map(|name| programs.join(name)).filter(|path| path != ours) {
            if let Err(error) = fs::remove_dir_all(&other) {
                warn!(%error, "cannot remove {}", other.display());
            }
        }
    }
}

/// Whether agents of this network namespace have left pins at a place.
pub fn has_pins(bpffs: &Path) -> Result<bool, PinsError> {
    let Some(root) = existing(bpffs) else { return Ok(false) };
    let namespace = namespace()?;
    Ok(entries(&root).any(|version| root.join(version).join(&namespace).exists()))
}

/// Whether two names are of one place: by a link, or where the BPF file system is mounted once more.
pub fn is_same_place(one: &Path, other: &Path) -> bool {
    let number = |bpffs| existing(bpffs).and_then(|root| fs::metadata(root).ok()).map(|it| (it.dev(), it.ino()));
    one == other || number(one).is_some_and(|it| Some(it) == number(other))
}

/// Removes the pins of this network namespace and of those that are gone. Says whether there were any.
pub fn remove_pins(bpffs: &Path) -> Result<bool, PinsError> {
    let Some(root) = existing(bpffs) else { return Ok(false) };
    let namespace = namespace()?;
    sweep(&root, &namespace);
    let mut found = false;
    for directory in entries(&root).map(|version| root.join(version).join(&namespace)).filter(|it| it.exists()) {
        let _turn = match lock_soon(&directory) {
            // Another agent has swept it away.
            Err(error) if error.is_missing() => continue,
            turn => turn?,
        };
        remove(&directory)?;
        found = true;
    }
    Ok(found)
}

/// Removes a namespace's directory, and those above that are empty then.
fn remove(directory: &Path) -> Result<(), PinsError> {
    // What opens flows goes before what brings replies back.
    let (last, first): (Vec<_>, Vec<_>) =
        entries(&directory.join("links")).partition(|name| name.starts_with(Hook::TcEgress.name()));
    for link in first.into_iter().chain(last).map(|name| directory.join("links").join(name)) {
        let _directory = fs::remove_file(link);
    }
    for part in ["links", "programs", "maps", ""].map(|part| directory.join(part)) {
        match fs::remove_dir_all(&part) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(refused("remove", &part)(error)),
            _ => {}
        }
    }
    for parent in directory.ancestors().skip(1).take(2) {
        // Others may have something there.
        if fs::remove_dir(parent).is_err() {
            break;
        }
    }
    Ok(())
}

/// Removes the pins of network namespaces that are gone, with all interfaces that programs were on: they hold memory for nothing.
fn sweep(root: &Path, ours: &str) {
    for version in entries(root).map(|version| root.join(version)) {
        let others = entries(&version).filter(|name| name.starts_with(NAMESPACE) && name != ours);
        for directory in others.map(|name| version.join(name)) {
            let links = directory.join("links");
            let Ok(_turn) = lock(&directory) else { continue };
            // Control groups outlive network namespaces, and so tell nothing.
            let mut on_interfaces = entries(&links).filter(|name| !name.starts_with(SOCKETS));
            if on_interfaces.all(|name| is_dead(&links.join(name))) {
                match remove(&directory) {
                    Ok(()) => {
                        info!("removed what was left of a network namespace that is gone: {}", directory.display());
                    }
                    Err(error) => debug!(%error, "cannot remove {}", directory.display()),
                }
            }
        }
    }
}

/// Whether a pinned link is on nothing any more: its interface or control group is gone, or somebody else has detached it.
pub(super) fn is_dead(link: &Path) -> bool {
    sys::link_place(link).is_ok_and(|place| matches!(place, LinkPlace::Interface(0) | LinkPlace::ControlGroup(0)))
}

fn refused(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PinsError {
    let path = shown(path);
    move |source| PinsError::Refused { what, path, source }
}

/// Locks a directory that an agent of another namespace may be looking at, which it does in its `sweep`, and not for long.
fn lock_soon(directory: &Path) -> Result<Flock<File>, PinsError> {
    let deadline = Instant::now() + SWEEP;
    loop {
        match lock(directory) {
            Err(PinsError::Busy(_)) if Instant::now() < deadline => thread::sleep(PAUSE),
            turn => return turn,
        }
    }
}

/// Makes a directory and locks it: the one that is there then, as those who sweep may remove it until it is locked.
fn make_and_lock(directory: &Path) -> Result<Flock<File>, PinsError> {
    let deadline = Instant::now() + SWEEP;
    loop {
        let made = fs::create_dir_all(directory).map_err(refused("make", directory));
        match made.and_then(|()| lock_soon(directory)) {
            Ok(turn) if is_at(&turn, directory) => return Ok(turn),
            Err(error) if !error.is_missing() || Instant::now() > deadline => return Err(error),
            _ => {}
        }
    }
}

/// Whether an open directory is the one at this path.
fn is_at(open: &File, path: &Path) -> bool {
    let number = |of: fs::Metadata| (of.dev(), of.ino());
    let (open, at) = (open.metadata().map(number), fs::metadata(path).map(number));
    open.is_ok_and(|open| at.is_ok_and(|at| open == at))
}

fn lock(directory: &Path) -> Result<Flock<File>, PinsError> {
    let file = File::open(directory).map_err(refused("open", directory))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::Error::EWOULDBLOCK => PinsError::Busy(shown(directory)),
        errno => refused("lock", directory)(errno.into()),
    })
}

/// The names in a directory; none if it is not there.
fn entries(directory: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// What the names of namespaces' directories begin with.
const NAMESPACE: &str = "netns-";

/// The name of this network namespace's directory.
pub fn namespace() -> Result<String, PinsError> {
    Ok(format!("{NAMESPACE}{}", sys::namespace_cookie().map_err(PinsError::Namespace)?))
}
