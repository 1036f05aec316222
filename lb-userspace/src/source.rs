//! Where services come from. Every source yields whole states of the model.
pub mod file;
pub mod kubernetes;
mod text;

use std::{fmt, path::PathBuf, sync::Arc, time::SystemTime};

use self::{
    file::FileError,
    kubernetes::{Connection, KubernetesError},
};
use crate::model::{Desired, IpFamily};

/// One source.
#[derive(Clone, Debug)]
pub enum Source {
    /// A services file.
    File(PathBuf),
    /// An API server.
    Kubernetes(Connection),
}

/// What a source has to say whenever something changes.
pub type Update = Result<Loaded, SourceError>;

/// What a source wants.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// The services.
    pub desired: Arc<Desired>,
    /// What it knows of this node.
    pub node: NodeObject,
    /// What is allowed, but hardly meant: one line each, with its place.
    pub warnings: Vec<String>,
    /// Why it may not know of all changes.
    pub troubles: Option<String>,
    /// What has changed since it was told last, of a source that tells of changes.
    pub changes: Changes,
}

/// Changes of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// How many there were of Services.
    pub services: u64,
    /// How many there were of `EndpointSlices`.
    pub slices: u64,
    /// When those of `EndpointSlices` have begun: with a pod that became ready, for one. Not all say so.
    pub begun: Vec<(IpFamily, SystemTime)>,
}

/// What a source knows of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeObject {
    /// The zone that it is in.
    pub zone: Option<Arc<str>>,
    /// Whether it is to have new traffic from outside: it is not about to go.
    pub is_eligible: bool,
}

/// Why a source has nothing to say; what it said last stays.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The services file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The API server.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
}

impl Source {
    /// Whether its services change each by itself, and what it says at once is by chance; a file is written as a whole.
    pub fn has_independent_services(&self) -> bool {
        matches!(self, Self::Kubernetes(_))
    }

    /// The files that it reads for as long as it is followed.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Self::File(path) => vec![path.clone()],
            Self::Kubernetes(connection) => connection.files(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Kubernetes(_) => f.write_str("Kubernetes"),
        }
    }
}

impl Default for NodeObject {
    fn default() -> Self {
        Self { zone: None, is_eligible: true }
    }
}
