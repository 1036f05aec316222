//! What others may see of the agent over HTTP: its metrics, and whether it is well.
//!
//! Every answer is the agent's loop's, so it is of one moment, and none comes from an agent that hangs.
pub mod http;
pub mod metrics;
