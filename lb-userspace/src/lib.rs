//! The office of Wharf: desired state in, map contents out.
pub mod admin;
pub mod agent;
pub mod cgroup;
pub mod cleanup;
pub mod cli;
pub mod dataplane;
pub mod doctor;
pub mod model;
pub mod network;
pub mod observe;
pub mod plan;
pub mod policy;
pub mod privileges;
pub mod sockets;
pub mod source;
pub mod supervisor;
pub mod sysctl;
