//! Traffic that goes on in the background while a test changes something.

use std::{
    io, mem,
    net::{SocketAddr, ToSocketAddrs},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use crate::{
    netns::Background,
    poll,
    probe::{Connection, Tally, address},
    topology::Host,
};

/// How long a connection rests between two lines, and how long between two connections.
const PAUSE: Duration = Duration::from_millis(5);

/// Connections that stay open, and send a line again and again.
#[derive(Debug)]
pub struct Conversations(Vec<Conversation>);

#[derive(Debug)]
struct Conversation {
    backend: String,
    lines: Arc<AtomicUsize>,
    talker: Background<io::Result<()>>,
}

/// How one connection fared.
#[derive(Debug)]
pub struct Outcome {
    /// The backend at the other end.
    pub backend: String,
    /// How many lines came back.
    pub lines: usize,
    /// What ended it; `Ok` if that was us.
    pub end: io::Result<()>,
}

/// New connections, one after the other.
#[derive(Debug)]
pub struct Arrivals {
    tally: Arc<Mutex<Tally>>,
    caller: Background<()>,
}

impl Host {
    /// Opens `count` connections and keeps them busy.
    #[track_caller]
    pub fn converse(&self, to: impl ToSocketAddrs, count: usize) -> Conversations {
        let to = address(to);
        let open = || self.tcp(to).unwrap_or_else(|error| panic!("a connection to {to}: {error}"));
        let start = |connection: Connection| {
            let backend = connection.backend().to_owned();
            let lines = Arc::new(AtomicUsize::new(0));
            let counter = Arc::clone(&lines);
            let talker = self.namespace().spawn(move |stop| talk(connection, &counter, &stop));
            Conversation { backend, lines, talker }
        };
        Conversations((0..count).map(|_| start(open())).collect())
    }

    /// Keeps opening and closing connections.
    pub fn keep_calling(&self, to: impl ToSocketAddrs) -> Arrivals {
        let to = address(to);
        let tally = Arc::new(Mutex::new(Tally::default()));
        let shared = Arc::clone(&tally);
        let caller = self.namespace().spawn(move |stop| call(to, &shared, &stop));
        Arrivals { tally, caller }
    }
}

impl Conversations {
    /// The backends of those connections on which no line comes back within `limit`.
    pub fn stuck(&self, limit: Duration) -> Vec<&str> {
        let lines = |conversation: &Conversation| conversation.lines.load(Ordering::Relaxed);
        let before: Vec<_> = self.0.iter().map(lines).collect();
        let silent = || {
            let silent = self.0.iter().zip(&before).filter(|(conversation, before)| lines(conversation) == **before);
            silent.map(|(conversation, _)| conversation.backend.as_str()).collect::<Vec<_>>()
        };
        poll(limit, || silent().is_empty().then(Vec::new)).unwrap_or_else(silent)
    }

    /// Closes the connections that are still open.
    pub fn finish(self) -> Vec<Outcome> {
        let finish = |Conversation { backend, lines, talker }| {
            let end = talker.finish();
            Outcome { backend, lines: lines.load(Ordering::Relaxed), end }
        };
        self.0.into_iter().map(finish).collect()
    }
}

impl Arrivals {
    /// The connections since the last time that this was asked.
    pub fn take(&self) -> Tally {
        mem::take(&mut *self.tally.lock().expect("a tally does not panic"))
    }

    /// Opens no more; the connections since [`Arrivals::take`].
    pub fn finish(self) -> Tally {
        self.caller.finish();
        mem::take(&mut *self.tally.lock().expect("a tally does not panic"))
    }
}

fn talk(mut connection: Connection, lines: &AtomicUsize, stop: &CancellationToken) -> io::Result<()> {
    while !stop.is_cancelled() {
        let number = lines.load(Ordering::Relaxed);
        connection.echo(&format!("line {number}"))?;
        lines.store(number + 1, Ordering::Relaxed);
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn call(to: SocketAddr, tally: &Mutex<Tally>, stop: &CancellationToken) {
    while !stop.is_cancelled() {
        let attempt = Connection::open(to).map(|connection| connection.backend().to_owned());
        tally.lock().expect("a tally does not panic").count(attempt);
        thread::sleep(PAUSE);
    }
}
