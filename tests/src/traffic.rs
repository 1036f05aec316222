//! Traffic that goes on in the background while a test changes something.

use std::{
    io, mem,
    net::{SocketAddr, ToSocketAddrs},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use crate::{
    netns::Background,
    probe::{Connection, Tally, address},
    topology::Host,
};

/// How long a connection rests between two lines, and how long between two connections.
const PAUSE: Duration = Duration::from_millis(5);

/// Connections that stay open and send a line again and again.
#[derive(Debug)]
pub struct Conversations {
    talkers: Vec<Background<Conversation>>,
}

/// How one connection fared.
#[derive(Debug)]
pub struct Conversation {
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
        let start = |connection| self.namespace().spawn(move |stop| Conversation::hold(connection, &stop));
        Conversations { talkers: (0..count).map(|_| start(open())).collect() }
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
    /// Closes the connections that are still open.
    pub fn finish(self) -> Vec<Conversation> {
        self.talkers.into_iter().map(Background::finish).collect()
    }
}

impl Conversation {
    fn hold(mut connection: Connection, stop: &CancellationToken) -> Self {
        let (mut lines, mut end) = (0, Ok(()));
        while end.is_ok() && !stop.is_cancelled() {
            end = connection.echo(&format!("line {lines}"));
            lines += usize::from(end.is_ok());
            thread::sleep(PAUSE);
        }
        Self { backend: connection.backend().to_owned(), lines, end }
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

fn call(to: SocketAddr, tally: &Mutex<Tally>, stop: &CancellationToken) {
    while !stop.is_cancelled() {
        let attempt = Connection::open(to).map(|connection| connection.backend().to_owned());
        tally.lock().expect("a tally does not panic").count(attempt);
        thread::sleep(PAUSE);
    }
}
