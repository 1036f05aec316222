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
    path::PathBuf,
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

/// Ends sockets, in a thread of its own.
#[derive(Debug)]
pub struct Ender {
    changes: SyncSender<()>,
    ended: Arc<AtomicU64>,
}

/// What the thread knows.
struct Worker {
    watched: Watched,
    protocols: &'static [Protocol],
    /// Whether sockets are ended in all network namespaces, not in this one alone.
    in_all: bool,
    ended: Arc<AtomicU64>,
    /// What went wrong last, as it is said once.
    failure: Option<String>,
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
        let mut worker = Worker { watched, protocols, in_all, ended: Arc::clone(&ended), failure: None };
        thread::Builder::new().name("sockets".to_owned()).spawn(move || {
            privileges::settle_ender_of_sockets(in_all);
            while receiver.recv().is_ok() {
                loop {
                    thread::sleep(PAUSE);
                    worker.sweep();
                    match receiver.recv_timeout(PAUSE) {
                        Ok(()) => {}
                        Err(RecvTimeoutError::Timeout) => break,
                        Err(RecvTimeoutError::Disconnected) => return,
                    }
                }
                worker.sweep();
                worker.forget();
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
    /// Ends what is to be ended now.
    fn sweep(&mut self) {
        let failure = self.end_lost().err().map(|error| error.to_string());
        if failure != self.failure
            && let Some(error) = &failure
        {
            error!("sockets of removed backends stay as they are: {error}");
        }
        self.failure = failure;
    }

    /// Forgets what was looked for in vain: such sockets are closed, and nobody noticed.
    fn forget(&mut self) {
        for cookie in self.watched.lost().unwrap_or_default().into_keys() {
            self.watched.forget(cookie);
        }
    }

    fn end_lost(&mut self) -> io::Result<()> {
        let lost = self.watched.lost()?;
        if lost.is_empty() {
            return Ok(());
        }
        let ended = if self.in_all { self.end_everywhere(&lost)? } else { self.end_here(&lost)? };
        for cookie in &ended {
            self.watched.forget(*cookie);
        }
        if !ended.is_empty() {
            self.ended.fetch_add(ended.len() as u64, Ordering::Relaxed);
            info!("ended {} sockets that were connected to backends that are gone", ended.len());
        }
        Ok(())
    }

    /// In the network namespaces of all processes.
    fn end_everywhere(&self, lost: &BTreeMap<u64, Translation>) -> io::Result<Vec<u64>> {
        let (mut seen, mut ended) = (HashSet::new(), Vec::new());
        for path in namespaces()? {
            // Processes come and go.
            let Ok(number) = fs::metadata(&path).map(|it| it.ino()) else { continue };
            if seen.insert(number) {
                let Ok(namespace) = File::open(&path) else { continue };
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                ended.extend(self.end_here(lost)?);
            }
        }
        Ok(ended)
    }

    /// In the network namespace that the thread is in.
    fn end_here(&self, lost: &BTreeMap<u64, Translation>) -> io::Result<Vec<u64>> {
        let diag = SockDiag::open()?;
        let mut connections = Vec::new();
        for &protocol in self.protocols {
            connections.extend(diag.connections(false, protocol)?);
            connections.extend(diag.connections(true, protocol)?);
        }
        let mut ended = Vec::new();
        for connection in connections {
            let cookie = connection.cookie();
            if lost.get(&cookie).is_none_or(|translation| !is_connected_to(&connection, translation)) {
                continue;
            }
            match diag.destroy(&connection) {
                Ok(()) => ended.push(cookie),
                // Its process was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    let why = "this kernel ends no sockets (CONFIG_INET_DIAG_DESTROY)";
                    return Err(io::Error::new(error.kind(), why));
                }
                Err(error) => {
                    let peer = connection.peer();
                    warn!(%error, "a socket that is connected to a backend that is gone stays: {peer:?}");
                }
            }
        }
        Ok(ended)
    }
}

/// Whether a socket was not connected elsewhere since.
fn is_connected_to(connection: &Connection, translation: &Translation) -> bool {
    connection.peer().is_some_and(|peer| {
        net::words(peer.ip()) == translation.backend_address && peer.port() == translation.backend_port.to_host()
    })
}

/// The network namespaces of all processes.
fn namespaces() -> io::Result<impl Iterator<Item = PathBuf>> {
    let is_process =
        |path: &PathBuf| path.file_name().is_some_and(|it| it.as_encoded_bytes().iter().all(u8::is_ascii_digit));
    let processes = fs::read_dir("/proc")?.flatten().map(|it| it.path()).filter(is_process);
    Ok(processes.map(|process| process.join("ns/net")))
}
