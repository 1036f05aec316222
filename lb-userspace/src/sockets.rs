//! Sockets that are connected to backends that are gone are ended, so that their processes connect anew.
//!
//! Their packets meet no program of ours any more: a client of UDP would talk to a removed backend for ever. What a socket was
//! connected to in place of a service is in the map `WATCHED`.

mod diag;

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
    thread,
    time::Duration,
};

use lb_common::{abi::Translation, net};
use nix::sched::{CloneFlags, setns};
use tracing::{error, info, warn};

use self::diag::{Connection, SockDiag};
use crate::{
    dataplane::kernel::{Ended, SocketSettings, Watched},
    model::Protocol,
    privileges,
};

/// How long to wait for more changes, and then once more for connections that were just being made.
const PAUSE: Duration = Duration::from_millis(100);

/// How often to do both where something is not settled yet: for some five seconds.
const TRIES: u32 = 25;

/// Ends sockets, in a thread of its own.
#[derive(Debug)]
pub struct Ender {
    changes: SyncSender<()>,
    ended: Arc<AtomicU64>,
}

/// Makes sure that this kernel ends UDP sockets.
///
/// # Errors
/// Of the kind `Unsupported` where it does not.
pub fn check() -> io::Result<()> {
    SockDiag::open()?.check()
}

/// Sockets that are connected to backends that are gone, by their cookies.
type Lost = BTreeMap<u64, Translation>;

/// What the thread knows.
struct Worker {
    watched: Watched,
    protocols: &'static [Protocol],
    /// Whether sockets are ended in all network namespaces, not in this one alone.
    in_all: bool,
    ended: Arc<AtomicU64>,
    /// What went wrong last, as it is said once.
    failure: Option<String>,
    /// Whether the last sweep has left something that may be found by another one soon.
    is_unsettled: bool,
    /// What the last sweep has found, and could not end.
    survivors: HashSet<u64>,
}

impl Ender {
    /// Begins to end sockets that lose their backend.
    pub fn start(watched: Watched, settings: &SocketSettings) -> io::Result<Self> {
        let protocols: &[_] = match settings.ended {
            Ended::None => &[],
            Ended::Udp => &[Protocol::Udp],
            Ended::All => &[Protocol::Udp, Protocol::Tcp],
        };
        // One waiting change stands for all.
        let (changes, receiver) = mpsc::sync_channel(1);
        let ended = Arc::new(AtomicU64::new(0));
        let in_all = settings.ends_all;
        let mut worker = Worker {
            watched,
            protocols,
            in_all,
            ended: Arc::clone(&ended),
            failure: None,
            is_unsettled: false,
            survivors: HashSet::new(),
        };
        thread::Builder::new().name("sockets".to_owned()).spawn(move || {
            privileges::settle_ender_of_sockets(in_all);
            // What a former agent had no time for comes first.
            let mut tries = 0;
            loop {
                thread::sleep(PAUSE);
                let before = worker.sweep();
                match receiver.recv_timeout(PAUSE) {
                    Ok(()) => continue,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                let after = worker.sweep();
                worker.forget(&before, &after);
                tries += 1;
                if !worker.is_unsettled || tries == TRIES {
                    tries = 0;
                    if receiver.recv().is_err() {
                        return;
                    }
                }
            }
        })?;
        Ok(Self { changes, ended })
    }

    /// Backends are gone, and no program holds them any more.
    pub fn look(&self) {
        // If it is full, somebody has said so already.
        let _known = self.changes.try_send(());
    }

    /// How many sockets were ended.
    pub fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }
}

impl Worker {
    /// Ends what is to be ended now. What it looked for and did not find; nothing where it could not look everywhere.
    fn sweep(&mut self) -> Lost {
        self.survivors.clear();
        let (mut missed, failure) = match self.end_lost() {
            Ok(missed) => (missed, None),
            Err(error) => (Lost::new(), Some(error.to_string())),
        };
        missed.retain(|cookie, _| !self.survivors.contains(cookie));
        if failure != self.failure
            && let Some(error) = &failure
        {
            error!("sockets of removed backends stay as they are: {error}");
        }
        // The call that connects one may still be underway.
        self.is_unsettled = failure.is_some() || !self.survivors.is_empty() || missed.values().any(Watched::is_recent);
        self.failure = failure;
        missed
    }

    /// Forgets what was looked for in vain twice: such sockets are closed, and nobody noticed.
    fn forget(&mut self, before: &Lost, after: &Lost) {
        let missed = after.iter().filter(|(cookie, it)| before.get(cookie) == Some(it) && !Watched::is_recent(it));
        for (&cookie, translation) in missed {
            self.watched.forget(cookie, translation);
        }
    }

    fn end_lost(&mut self) -> io::Result<Lost> {
        let mut lost = self.watched.lost()?;
        if lost.is_empty() {
            return Ok(lost);
        }
        let number = lost.len();
        let result = if self.in_all { self.end_everywhere(&mut lost) } else { self.end_here(&mut lost) };
        let ended = number - lost.len();
        if ended > 0 {
            self.ended.fetch_add(ended as u64, Ordering::Relaxed);
            info!("ended {ended} sockets that were connected to backends that are gone");
        }
        result.map(|()| lost)
    }

    /// In the network namespaces of all processes; then in those of threads and mounts, where something is still looked for that is not
    /// just being connected.
    fn end_everywhere(&mut self, lost: &mut Lost) -> io::Result<()> {
        let home = File::open("/proc/thread-self/ns/net")?;
        let mut seen = HashSet::new();
        let mut result = self.end_in(namespaces()?, &mut seen, lost);
        if lost.values().any(|it| !Watched::is_recent(it)) {
            result = result.and(hidden_namespaces().and_then(|paths| self.end_in(paths, &mut seen, lost)));
        }
        // A namespace that a thread is in does not go, nor do its devices.
        setns(home, CloneFlags::CLONE_NEWNET)?;
        result
    }

    /// In those of these network namespaces that were not seen, by their numbers: in all of them, even if something is wrong with one.
    /// The thread stays in the last.
    fn end_in(
        &mut self,
        paths: impl Iterator<Item = PathBuf>,
        seen: &mut HashSet<u64>,
        lost: &mut Lost,
    ) -> io::Result<()> {
        let mut result = Ok(());
        for path in paths {
            // Processes come and go.
            let Ok(number) = fs::metadata(&path).map(|it| it.ino()) else { continue };
            if seen.insert(number) {
                let Ok(namespace) = File::open(&path) else { continue };
                let entered = setns(namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
                result = result.and(entered.and_then(|()| self.end_here(lost)));
            }
        }
        result
    }

    /// In the network namespace that the thread is in. What is ended is lost no more.
    fn end_here(&mut self, lost: &mut Lost) -> io::Result<()> {
        let diag = SockDiag::open()?;
        let mut connections = Vec::new();
        for &protocol in self.protocols {
            connections.extend(diag.connections(false, protocol)?);
            connections.extend(diag.connections(true, protocol)?);
        }
        for connection in connections {
            let cookie = connection.cookie();
            let Some(translation) = lost.get(&cookie).copied().filter(|it| is_connected_to(&connection, it)) else {
                continue;
            };
            // Before its process knows of it: that may connect the same socket anew, which is then watched again.
            self.watched.forget(cookie, &translation);
            let Err(error) = diag.destroy(&connection) else {
                lost.remove(&cookie);
                continue;
            };
            self.watched.remember(cookie, &translation);
            self.survivors.insert(cookie);
            match error.kind() {
                // Its process was faster, the kernel was just moving it from one list to another, or has found another one with the same
                // addresses, which is ended first.
                io::ErrorKind::NotFound => {}
                io::ErrorKind::Unsupported => return Err(error),
                _ => {
                    let peer = connection.peer();
                    warn!(%error, "a socket that is connected to a backend that is gone stays: {peer:?}");
                }
            }
        }
        Ok(())
    }
}

/// Whether a socket was not connected elsewhere since.
fn is_connected_to(connection: &Connection, translation: &Translation) -> bool {
    connection.peer().is_some_and(|peer| {
        net::words(peer.ip()) == translation.backend_address && peer.port() == translation.backend_port.to_host()
    })
}

/// The network namespaces of all processes: of each that of its first thread.
fn namespaces() -> io::Result<impl Iterator<Item = PathBuf>> {
    Ok(processes()?.map(|process| process.join("ns/net")))
}

/// The network namespaces of all threads, and those that are mounted somewhere, as process 1 sees it: nothing else may hold one.
fn hidden_namespaces() -> io::Result<impl Iterator<Item = PathBuf>> {
    let threads = processes()?.flat_map(|process| fs::read_dir(process.join("task"))).flatten().flatten();
    let mounted = mounted_namespaces(&String::from_utf8_lossy(&fs::read("/proc/1/mountinfo")?));
    // Another mount may lie over one. Where process 1 is closed to us, its root is ours as a rule.
    let mounted = mounted.into_iter().filter_map(|(place, number)| {
        let candidates = ["/proc/1/root", "/"].map(|root| Path::new(root).join(&place));
        candidates.into_iter().find(|path| fs::metadata(path).is_ok_and(|it| it.ino() == number))
    });
    Ok(threads.map(|thread| thread.path().join("ns/net")).chain(mounted))
}

fn processes() -> io::Result<impl Iterator<Item = PathBuf>> {
    let is_process =
        |path: &PathBuf| path.file_name().is_some_and(|it| it.as_encoded_bytes().iter().all(u8::is_ascii_digit));
    Ok(fs::read_dir("/proc")?.flatten().map(|it| it.path()).filter(is_process))
}

/// Where network namespaces are mounted, seen from the root, and their numbers. The fourth word of a line is what is mounted, the
/// fifth its place, in which blanks are written `\040` (`man 5 proc_pid_mountinfo`).
fn mounted_namespaces(text: &str) -> Vec<(PathBuf, u64)> {
    let mounted = |line: &str| {
        let mut words = line.split(' ').skip(3);
        let number = words.next()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()?;
        let place = words.next()?.replace("\\040", " ");
        Some((place.trim_start_matches('/').into(), number))
    };
    text.lines().filter_map(mounted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_that_are_mounted_are_found() {
        let text = "\
            24 1 0:22 / /proc rw,nosuid - proc proc rw\n\
            301 25 0:4 net:[4026532281] /run/netns/a\\040b rw shared:5 - nsfs nsfs rw\n\
            302 25 0:4 mnt:[4026532282] /run/mnt rw - nsfs nsfs rw\n\
            broken\n";
        assert_eq!(mounted_namespaces(text), [(PathBuf::from("run/netns/a b"), 4_026_532_281)]);
    }
}
