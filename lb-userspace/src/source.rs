//! Where the desired state comes from. A source parses its own format into the validated model,
//! and yields whole snapshots of it: what is not in the latest one is not wanted any more.
pub mod file;
