//! The office of Wharf: desired state in, map contents out.
pub mod admin;
pub mod model;
