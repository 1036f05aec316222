//! The office of Wharf: desired state in, map contents out.
pub mod admin;
pub mod agent;
pub mod cgroup;
pub mod cleanup;
pub mod cli;
pub mod dataplane;
pub mod doctor;
pub mod model;
pub mod mounts;
pub mod network;
pub mod observe;
pub mod plan;
pub mod policy;
pub mod privileges;
pub mod sockets;
pub mod source;
pub mod supervisor;
pub mod sysctl;

/// An error with all of its causes, on one line each way that it is shown. Some have their cause in their own text.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source()).map(ToString::to_string);
    causes.fold(error.to_string(), |text, cause| if text.contains(&cause) { text } else { format!("{text}: {cause}") })
}
