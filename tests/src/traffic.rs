//! Traffic that goes on in the background while a test changes something.

use std::{
    io, mem,
    net::{SocketAddr, ToSocketAddrs},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    runtime, time,
};
use tokio_util::sync::CancellationToken;

use crate::{
    SOON,
    netns::Background,
    poll,
    probe::{Connection, TIMEOUT, Tally, address},
    topology::Host,
};

/// How long a connection rests between two lines, and how long between two connections.
const PAUSE: Duration = Duration::from_millis(5);

/// The shortest time between two lines of whichever connections, so that a thousand leave the machine room for other things.
const PACE: Duration = Duration::from_micros(200);

/// Connections that stay open, and send a line again and again.
#[derive(Debug)]
pub struct Conversations {
    all: Vec<Conversation>,
    talker: Background<Vec<End>>,
}

#[derive(Debug)]
struct Conversation {
    backend: String,
    lines: Arc<AtomicUsize>,
}

/// What ended a conversation, and for how long at most a line was underway.
type End = (io::Result<()>, Duration);

/// How one connection fared.
#[derive(Debug)]
pub struct Outcome {
    /// The backend at the other end.
    pub backend: String,
    /// How many lines came back.
    pub lines: usize,
    /// The longest time that a line took to come back.
    pub slowest: Duration,
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
        let opened = self.namespace().run(|| (0..count).map(|_| Connection::open(to)).collect::<io::Result<Vec<_>>>());
        let opened = opened.unwrap_or_else(|error| panic!("a connection to {to}: {error}"));
        let conversation =
            |connection: &Connection| Conversation { backend: connection.backend().to_owned(), lines: Arc::default() };
        let all: Vec<_> = opened.iter().map(conversation).collect();
        let counters: Vec<_> = all.iter().map(|conversation| Arc::clone(&conversation.lines)).collect();
        let pause = PAUSE.max(PACE * u32::try_from(count).expect("no test opens so many"));
        let talker = self.namespace().spawn(move |stop| {
            let runtime =
                runtime::Builder::new_current_thread().enable_all().build().expect("there are descriptors left");
            runtime.block_on(async {
                let talk = |(connection, lines)| tokio::spawn(talk(connection, lines, pause, stop.clone()));
                let mut ends = Vec::new();
                for talker in opened.into_iter().zip(counters).map(talk).collect::<Vec<_>>() {
                    ends.push(talker.await.expect("it does not panic"));
                }
                ends
            })
        });
        Conversations { all, talker }
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
        let before: Vec<_> = self.all.iter().map(lines).collect();
        let silent = || {
            let silent = self.all.iter().zip(&before).filter(|(conversation, before)| lines(conversation) == **before);
            silent.map(|(conversation, _)| conversation.backend.as_str()).collect::<Vec<_>>()
        };
        poll(limit, || silent().is_empty().then(Vec::new)).unwrap_or_else(silent)
    }

    /// Ends it: lines come back on each connection, and did all the time.
    #[track_caller]
    pub fn expect_unharmed(self) {
        assert_eq!(self.stuck(SOON), Vec::<&str>::new());
        for outcome in self.finish() {
            assert!(outcome.end.is_ok(), "{outcome:?}");
        }
    }

    /// Closes the connections that are still open.
    pub fn finish(self) -> Vec<Outcome> {
        let ends = self.talker.finish();
        let outcome = |(conversation, (end, slowest)): (Conversation, End)| {
            let lines = conversation.lines.load(Ordering::Relaxed);
            Outcome { backend: conversation.backend, lines, slowest, end }
        };
        self.all.into_iter().zip(ends).map(outcome).collect()
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

/// Sends lines and expects each back, until it is stopped or one does not come.
async fn talk(connection: Connection, lines: Arc<AtomicUsize>, pause: Duration, stop: CancellationToken) -> End {
    let mut slowest = Duration::ZERO;
    let conversation = async {
        let stream = connection.into_stream();
        stream.set_nonblocking(true)?;
        let mut stream = BufReader::new(TcpStream::from_std(stream)?);
        while !stop.is_cancelled() {
            let sent = Instant::now();
            let line = format!("line {}\n", lines.load(Ordering::Relaxed));
            let mut answer = String::new();
            time::timeout(*TIMEOUT, async {
                stream.write_all(line.as_bytes()).await?;
                stream.read_line(&mut answer).await
            })
            .await??;
            slowest = slowest.max(sent.elapsed());
            match answer.as_str() {
                answer if answer == line => lines.fetch_add(1, Ordering::Relaxed),
                "" => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the backend closed the connection")),
                other => return Err(io::Error::other(format!("sent {line:?}, got back {other:?}"))),
            };
            tokio::select! {
                () = time::sleep(pause) => {}
                () = stop.cancelled() => {}
            }
        }
        Ok(())
    };
    (conversation.await, slowest)
}

fn call(to: SocketAddr, tally: &Mutex<Tally>, stop: &CancellationToken) {
    while !stop.is_cancelled() {
        let attempt = Connection::open(to).map(|connection| connection.backend().to_owned());
        tally.lock().expect("a tally does not panic").count(attempt);
        thread::sleep(PAUSE);
    }
}
