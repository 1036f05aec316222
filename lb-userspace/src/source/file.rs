//! The services file: what an engineer would write on a whiteboard, in YAML.
//!
//! ```yaml
//! services:
//!   - name: web
//!     addresses: [10.96.0.10, "fd00:96::10"]
//!     ports: [{ name: http, port: 80, targetPort: 8080 }]
//!     algorithm: maglev
//!     backends: [10.244.1.5, { address: 10.244.2.7, weight: 2 }]
//! ```
//!
//! A file is read in two steps. `wire` takes it apart and stops at the first thing of the wrong shape; `validate`
//! asks whether it makes sense, and reports every mistake. Either way a file with a mistake yields no state at all.
//!
//! A file may have Kubernetes objects instead (`objects`), as `kubectl get services,endpointslices -A -o yaml` prints them.
mod objects;
mod remarks;
#[cfg(test)]
mod tests;
mod validate;
mod value;
mod watch;
mod wire;

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
};

pub use self::watch::watch;
use super::{Loaded, kubernetes};

/// Bytes of a file that may be read; what kubectl prints of 44,000 services with 250,000 endpoints has a quarter of it.
const MAX_BYTES: u64 = 1 << 30;

/// Why a services file yields no state. Its text is one line for each mistake, with file, line, column and field.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It can't be read.
    #[error("{}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It makes no sense.
    #[error("{}", .0.join("\n"))]
    Invalid(Vec<String>),
}

/// Reads and parses a services file, for the node that is called so.
pub fn load(path: &Path, node: Option<&str>) -> Result<Loaded, FileError> {
    parse(path, &read(path)?, node)
}

/// Parses the content of a services file, for the node that is called so; `name` is what messages call the file.
pub fn parse(name: &Path, bytes: &[u8], node: Option<&str>) -> Result<Loaded, FileError> {
    let wrong = |mistake: remarks::Remarks| FileError::Invalid(mistake.lines(name));
    let text = wire::text(bytes).map_err(wrong)?;
    if let Some(objects) = objects::decode(text).transpose().map_err(wrong)? {
        let mut loaded = kubernetes::read(objects, node);
        loaded.warnings.iter_mut().for_each(|warning| *warning = format!("{}: {warning}", name.display()));
        return Ok(loaded);
    }
    let findings = validate::validate(&wire::decode(text).map_err(wrong)?);
    if findings.mistakes.is_empty() {
        let (desired, warnings) = (Arc::new(findings.desired), findings.warnings.lines(name));
        Ok(Loaded { desired, warnings, ..Loaded::default() })
    } else {
        Err(FileError::Invalid(findings.mistakes.lines(name)))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let refused = |cause| FileError::Read { path: path.to_owned(), cause };
    let mut bytes = Vec::new();
    // Looked at before it is opened: opening a pipe waits for its writer, for ever.
    let metadata = path.metadata().map_err(refused)?;
    if !metadata.is_file() {
        return Err(refused(io::Error::other("not a regular file")));
    }
    File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes)).map_err(refused)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(refused(io::Error::other(format!("larger than {} MiB", MAX_BYTES >> 20))));
    }
    Ok(bytes)
}
