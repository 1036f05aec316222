//! The admin socket: what the agent tells about itself.
pub mod report;
