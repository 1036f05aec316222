//! Connections: how fast bytes leave, and how they are cut off.

use std::{
    convert::Infallible,
    future::pending,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{self, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch::Receiver,
    time::sleep,
};

use super::{
    answer::answer,
    state::{Cut, Pace, State},
};

/// How many bytes wait to leave; a connection that is stalled takes no more.
const BUFFER: usize = 1 << 16;

/// A slow connection's piece; a prime, so that in time it is cut everywhere.
const PIECE: usize = 61;

/// A chunk that says that it is longer, and a line that could have become one.
const HALF: &[u8] =
    b"400\r\n{\"type\":\"MODIFIED\",\"object\":{\"kind\":\"Service\",\"metadata\":{\"name\":\"half-of-\xc3";

/// What ends a chunk that ends with a line, or the head of an answer.
const CHUNK_END: &[u8] = b"\n\r\n";

/// Accepts connections whenever the server is to listen.
pub(super) async fn listen(state: Arc<State>, address: SocketAddr) {
    let mut wanted = state.listen.subscribe();
    // The sender of what is wanted is in the state: there is always one.
    while wanted.wait_for(|wanted| *wanted).await.is_ok() {
        let listener = TcpListener::bind(address).await.expect("the port is kept for us");
        state.listens.send_replace(true);
        tokio::select! {
            () = accept(&listener, &state) => {}
            _ = wanted.wait_for(|wanted| !wanted) => {}
        }
        drop(listener);
        state.listens.send_replace(false);
    }
}

async fn accept(listener: &TcpListener, state: &Arc<State>) {
    loop {
        // A connection that was reset before it was accepted is no reason to stop.
        if let Ok((stream, _)) = listener.accept().await {
            // From now on it can be cut, even before it is first looked at.
            tokio::spawn(connection(stream, Arc::clone(state), state.cut.subscribe()));
        }
    }
}

async fn connection(stream: TcpStream, state: Arc<State>, mut cut: Receiver<Cut>) {
    let mut pace = state.pace.subscribe();
    let watches = Arc::new(AtomicUsize::new(0));
    let _ = stream.set_nodelay(true);
    let (read, mut write) = stream.into_split();
    let (mut answers, served) = io::simplex(BUFFER);
    let mut whole = false;
    let mid_line = tokio::select! {
        biased;
        mid_line = cut_off(&mut cut, &watches) => mid_line,
        _ = send(&mut answers, &mut write, &mut pace, &mut whole) => false,
        () = serve(read, served, &state, &watches) => false,
    };
    if mid_line && whole {
        let _ = write.try_write(HALF);
    }
}

/// Until it is to be cut; whether that is in the middle of a line.
async fn cut_off(cut: &mut Receiver<Cut>, watches: &AtomicUsize) -> bool {
    loop {
        // The sender is in the state.
        let _ = cut.changed().await;
        match *cut.borrow_and_update() {
            Cut::All => return false,
            Cut::Watches if watches.load(Ordering::Relaxed) > 0 => return true,
            Cut::Watches => {}
        }
    }
}

/// Answers requests until there are no more, and then waits until the answers have left.
async fn serve(
    read: OwnedReadHalf,
    write: io::WriteHalf<io::SimplexStream>,
    state: &Arc<State>,
    watches: &Arc<AtomicUsize>,
) {
    let service = service_fn(|request: hyper::Request<Incoming>| async {
        Ok::<_, Infallible>(answer(state, watches, request).await)
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(io::join(read, write)), service).await;
    pending::<()>().await;
}

/// Sends what there is to be sent, at its pace. `whole` says whether what has been sent ends with a line.
async fn send(
    answers: &mut (impl AsyncRead + Unpin),
    to: &mut OwnedWriteHalf,
    pace: &mut Receiver<Pace>,
    whole: &mut bool,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = answers.read(&mut buffer).await?;
        let mut rest = &buffer[..length];
        if rest.is_empty() {
            return to.shutdown().await;
        }
        *whole = false;
        while !rest.is_empty() {
            let pause = turn(pace).await;
            let (piece, others) = rest.split_at(pause.map_or(rest.len(), |_| slow_piece(rest)));
            to.write_all(piece).await?;
            rest = others;
            if let Some(pause) = pause {
                sleep(pause).await;
            }
        }
        *whole = buffer[..length].ends_with(CHUNK_END);
    }
}

/// Waits until something may be sent; what pause is to be made after it, if it is to be sent slowly.
async fn turn(pace: &mut Receiver<Pace>) -> Option<Duration> {
    let pace = pace.wait_for(|pace| !matches!(pace, Pace::Stalled)).await;
    match pace.map(|pace| *pace) {
        Ok(Pace::Slow(pause)) => Some(pause),
        _ => None,
    }
}

/// The length of the next piece of a slow connection: it ends within a character, where there is one of more than one byte.
fn slow_piece(bytes: &[u8]) -> usize {
    let most = bytes.len().min(PIECE);
    bytes[..most].iter().position(|byte| *byte >= 0xC0).map_or(most, |at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_pieces_end_within_characters() {
        assert_eq!(slow_piece("Käse".as_bytes()), 2);
        assert_eq!(slow_piece(&[b'a'; 100]), PIECE);
        assert_eq!(slow_piece(b"a"), 1);
    }
}
