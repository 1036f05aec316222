//! The admin socket: what the agent tells about itself, one JSON value a line each way.
pub mod client;
pub mod report;
pub mod server;

/// Where the socket is unless said otherwise.
pub const DEFAULT_SOCKET: &str = "/run/wharf/admin.sock";
