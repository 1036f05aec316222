//! The asking end of the admin socket.

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::Duration,
};

use futures::{SinkExt as _, StreamExt as _};
use tokio::{net::UnixStream, time};
use tokio_util::codec::{Framed, LinesCodec, LinesCodecError};

use super::report::{Request, Response};

/// How long an agent may take to answer: it may be applying a large file.
const PATIENCE: Duration = Duration::from_secs(15);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no agent answers on {}: is `wharf run` running? --admin names another socket", .0.display())]
    NotRunning(PathBuf),
    /// The socket is somebody else's.
    #[error("no permission to ask the agent on {}: run this as the agent's user, root as a rule", .0.display())]
    Denied(PathBuf),
    /// The connection broke.
    #[error("the agent on {} cannot be asked", path.display())]
    Connection {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It listens, but does not answer.
    #[error("the agent on {} has not answered for {} seconds", .0.display(), PATIENCE.as_secs())]
    Silent(PathBuf),
    /// It closed the connection instead of answering.
    #[error("the agent on {} closed the connection without an answer", .0.display())]
    Closed(PathBuf),
    /// What it answers makes no sense to this version.
    #[error("the agent on {} gave an answer that this version does not understand; is it another version?", path.display())]
    Misunderstood {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It answers that it can't answer.
    #[error("the agent says: {0}")]
    Refused(String),
}

/// Asks the agent that listens on a socket; the answer is never [`Response::Error`].
pub async fn ask(socket: &Path, request: Request) -> Result<Response, ClientError> {
    let answer = time::timeout(PATIENCE, exchange(socket, request)).await;
    match answer.unwrap_or_else(|_| Err(ClientError::Silent(socket.to_owned())))? {
        Response::Error(text) => Err(ClientError::Refused(text)),
        response => Ok(response),
    }
}

async fn exchange(socket: &Path, request: Request) -> Result<Response, ClientError> {
    let path = || socket.to_owned();
    let connection = |source| ClientError::Connection { path: path(), source };
    let misunderstood = |source| ClientError::Misunderstood { path: path(), source };
    let stream = UnixStream::connect(socket).await.map_err(|source| match source.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => ClientError::NotRunning(path()),
        ErrorKind::PermissionDenied => ClientError::Denied(path()),
        _ => connection(source),
    })?;
    let broken = |error| match error {
        LinesCodecError::Io(source) => connection(source),
        LinesCodecError::MaxLineLengthExceeded => connection(ErrorKind::FileTooLarge.into()),
    };
    let mut lines = Framed::new(stream, LinesCodec::new());
    lines.send(serde_json::to_string(&request).map_err(misunderstood)?).await.map_err(broken)?;
    let answer = lines.next().await.ok_or_else(|| ClientError::Closed(path()))?.map_err(broken)?;
    serde_json::from_str(&answer).map_err(misunderstood)
}
