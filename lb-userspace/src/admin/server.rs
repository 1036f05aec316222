//! The listening end of the admin socket. It reads requests, hands them to the agent's loop, and writes its answers.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use futures::{SinkExt as _, StreamExt as _};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::stat::{Mode, fchmod},
};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{UnixListener, UnixSocket, UnixStream},
    sync::{mpsc, oneshot},
    task::JoinSet,
    time,
};
use tokio_util::codec::{Framed, LinesCodec};
use tracing::warn;

use super::{
    DEFAULT_SOCKET,
    report::{Request, Response},
};

/// Conversations at one time; who comes later waits in the kernel's queue.
const CONVERSATIONS: usize = 16;
/// Bytes of a request.
pub const REQUEST_BYTES: usize = 1024;
/// How long a client may take to ask, and to take its answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A request for the agent's loop.
#[derive(Debug)]
pub struct Query {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Response>,
}

impl Query {
    /// Asks the agent's loop.
    pub async fn ask(request: Request, queries: &mpsc::Sender<Self>) -> Response {
        let (reply, response) = oneshot::channel();
        // Without a receiver the reply is dropped, which the line after it sees.
        let _ = queries.send(Self { request, reply }).await;
        response.await.unwrap_or_else(|_| Response::Error("the agent is stopping".to_owned()))
    }
}

/// The admin socket, open to its owner only; removed on drop.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
}

/// Why there is no admin socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// An agent has it.
    #[error("another wharf is running: it listens on {}", .0.display())]
    InUse(PathBuf),
    /// Its place is taken by something that is not ours to remove.
    #[error("{} is not a socket; remove it, or name another place with --admin", .0.display())]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Server {
    /// Opens the socket; its directory is made, for its owner only, where there is none.
    pub async fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |source| BindError::Listen { path: path.to_owned(), source };
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        // Of two agents that start at once, the second finds the first one's socket listening.
        let directory = File::open(directory).map_err(failed)?;
        let _turn = Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| failed(errno.into()))?;
        remove_stale(path).await?;
        let listen = || {
            let socket = UnixSocket::new_stream()?;
            // Before it has a name, so that nobody else can ever open it.
            fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
            socket.bind(path)?;
            socket.listen(CONVERSATIONS as u32)
        };
        Ok(Self { listener: listen().map_err(failed)?, path: path.to_owned() })
    }

    /// Answers clients for as long as it is polled; `queries` leads to the agent's loop.
    pub async fn serve(self, queries: mpsc::Sender<Query>) {
        let mut conversations = JoinSet::new();
        loop {
            while conversations.try_join_next().is_some() {}
            if conversations.len() >= CONVERSATIONS {
                conversations.join_next().await;
            }
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    conversations.spawn(converse(stream, queries.clone()));
                }
                Err(error) => {
                    // Out of file descriptors, for one: that may pass.
                    warn!(%error, "cannot accept on the admin socket");
                    time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            warn!(%error, "cannot remove {}", self.path.display());
        }
        // Nobody but us makes that one; a record of changes to the host may be in there.
        if let Some(directory) = self.path.parent().filter(|_| self.path == Path::new(DEFAULT_SOCKET)) {
            let _not_empty = fs::remove_dir(directory);
        }
    }
}

/// Removes the socket that an agent left behind which was killed.
async fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Listen { path: path.to_owned(), source };
    match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(BindError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(failed(error)),
        // It listens, or has so many clients that its queue is full.
        _ => Err(BindError::InUse(path.to_owned())),
    }
}

/// Answers one client, line by line, until it goes, or wastes our time.
pub async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin, queries: mpsc::Sender<Query>) {
    let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(REQUEST_BYTES));
    while let Ok(Some(line)) = time::timeout(PATIENCE, lines.next()).await {
        let request = line.map_err(|error| error.to_string());
        let request = request.and_then(|line| serde_json::from_str(&line).map_err(|error| error.to_string()));
        let response = match request {
            Ok(request) => Query::ask(request, &queries).await,
            Err(error) => Response::Error(format!("not a request: {error}")),
        };
        // A path that is not UTF-8 has no JSON.
        let response = serde_json::to_string(&response)
            .unwrap_or_else(|error| json!({ "error": format!("the answer has no JSON: {error}") }).to_string());
        if !matches!(time::timeout(PATIENCE, lines.send(response)).await, Ok(Ok(()))) {
            return;
        }
    }
}
