//! What the server's parts share: what there is, how it behaves, and what is going on.

use std::{
    sync::{Mutex, MutexGuard, atomic::AtomicUsize},
    time::Duration,
};

use tokio::sync::watch;

use super::store::Store;

/// A request that came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: String,
    /// The path.
    pub path: String,
    /// What stands behind the question mark.
    pub query: String,
}

impl Request {
    /// The value of a parameter, if it was given.
    pub fn parameter(&self, name: &str) -> Option<String> {
        let mut pairs = form_urlencoded::parse(self.query.as_bytes());
        pairs.find_map(|(key, value)| (key == name).then(|| value.into_owned()))
    }
}

/// How fast bytes leave.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pace {
    Free,
    /// Piece by piece, with this pause between them.
    Slow(Duration),
    Stalled,
}

/// How connections were last cut.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    /// All, anywhere.
    All,
    /// Those of watches, in the middle of a line.
    Watches,
}

/// How the server behaves.
#[derive(Debug)]
pub(super) struct Manner {
    pub(super) token: Option<String>,
    /// Verb and plural.
    pub(super) forbidden: Vec<(String, String)>,
    /// How many requests fail yet, and with what.
    pub(super) failures: (usize, u16),
    pub(super) bookmark_every: Duration,
    pub(super) streaming_lists: bool,
    /// Whether a version that is too old is refused by the answer's own status.
    pub(super) plain_gone: bool,
}

/// What all parts of a server know.
#[derive(Debug)]
pub(super) struct State {
    store: Mutex<Store>,
    manner: Mutex<Manner>,
    requests: Mutex<Vec<Request>>,
    pub(super) watchers: AtomicUsize,
    /// Told of each change.
    pub(super) changed: watch::Sender<()>,
    /// Told of each time that watches are to end.
    pub(super) ended: watch::Sender<()>,
    pub(super) cut: watch::Sender<Cut>,
    pub(super) pace: watch::Sender<Pace>,
    /// Whether there should be something that listens, and whether there is.
    pub(super) listen: watch::Sender<bool>,
    pub(super) listens: watch::Sender<bool>,
}

impl State {
    pub(super) fn new() -> Self {
        let manner = Manner {
            token: None,
            forbidden: Vec::new(),
            failures: (0, 0),
            bookmark_every: Duration::from_secs(60),
            streaming_lists: true,
            plain_gone: false,
        };
        Self {
            store: Mutex::default(),
            manner: Mutex::new(manner),
            requests: Mutex::default(),
            watchers: AtomicUsize::new(0),
            changed: watch::Sender::new(()),
            ended: watch::Sender::new(()),
            cut: watch::Sender::new(Cut::All),
            pace: watch::Sender::new(Pace::Free),
            listen: watch::Sender::new(false),
            listens: watch::Sender::new(false),
        }
    }

    pub(super) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().expect("nobody panics who holds it")
    }

    pub(super) fn manner(&self) -> MutexGuard<'_, Manner> {
        self.manner.lock().expect("nobody panics who holds it")
    }

    pub(super) fn requests(&self) -> MutexGuard<'_, Vec<Request>> {
        self.requests.lock().expect("nobody panics who holds it")
    }
}
