//! What the agent tells about itself over the admin socket: the wire format of `status`, `services` and `backends`.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use crate::model::{IpFamily, Protocol};

/// A question to the agent: one JSON value on one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// How the agent is.
    Status,
    /// Every service.
    Services,
    /// Every backend.
    Backends,
}

/// The answer, on one line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// To [`Request::Status`].
    Status(StatusReport),
    /// To [`Request::Services`].
    Services(Vec<ServiceReport>),
    /// To [`Request::Backends`].
    Backends(Vec<BackendReport>),
    /// The question could not be answered; the text says why.
    Error(String),
}

/// How the agent is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusReport {
    /// The version of the agent.
    pub version: String,
    /// The agent's process id.
    pub pid: u32,
    /// How long the agent has been running, in seconds.
    pub uptime_seconds: u64,
    /// Where the programs are attached.
    pub interfaces: Vec<InterfaceReport>,
    /// The file that services come from.
    pub services_file: PathBuf,
    /// How many times services were applied: goes up by one with each change that is in force.
    pub revision: u64,
    /// How long ago a services file was last applied, in seconds.
    pub applied_seconds_ago: u64,
    /// Why the file as it is now is not in force; the last good one is.
    pub services_error: Option<String>,
    /// How full the tables are.
    pub tables: Vec<TableReport>,
    /// Packets by what became of them.
    pub counters: Vec<CounterReport>,
}

/// One interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceReport {
    /// The interface's name.
    pub name: String,
    /// The XDP mode of the program there: `native` or `generic`; `gone` if the interface is not there.
    pub xdp: String,
    /// The IPv4 address that packets to backends leave this interface with.
    pub source_ipv4: Option<Ipv4Addr>,
    /// The IPv6 address that packets to backends leave this interface with.
    pub source_ipv6: Option<Ipv6Addr>,
}

/// How full one table is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TableReport {
    /// What the table holds.
    pub name: String,
    /// Entries in use.
    pub used: u64,
    /// Entries that it can hold.
    pub size: u64,
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CounterReport {
    /// What was done: `forward`, `pass` or `drop`.
    pub action: String,
    /// The reason.
    pub name: String,
    /// Packets since the agent started.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// One service: a port of one protocol in one family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceReport {
    /// The service's name.
    pub name: String,
    /// The port's name, or its number.
    pub port: String,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The IP family.
    pub family: IpFamily,
    /// Where clients send to.
    pub frontends: Vec<SocketAddr>,
    /// How backends are chosen.
    pub algorithm: String,
    /// How many backends it has.
    pub backends: usize,
    /// Flows opened to its present backends.
    pub flows: u64,
}

/// One backend of one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendReport {
    /// The service's name.
    pub service: String,
    /// The port's name, or its number.
    pub port: String,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The backend's address and port.
    pub address: SocketAddr,
    /// Its share of new flows; 0: none.
    pub weight: u16,
    /// Flows opened to it.
    pub flows: u64,
}
