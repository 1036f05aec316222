//! What the agent tells about itself over the admin socket: the wire format of `status`, `services` and `backends`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::{Conditions, FrontendKind, IpFamily, Protocol, TrafficPolicy};

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
    /// What is measured.
    Metrics,
    /// What a probe of the agent's health is to be told.
    Health {
        /// Which one asks.
        probe: Probe,
    },
    /// Whether this node has endpoints of the service that load balancers ask for on a port.
    ServiceHealth {
        /// The port.
        port: u16,
        /// The family in which they ask, and of whose endpoints they are told.
        family: IpFamily,
    },
    /// Whether the maps say what they should.
    Verify {
        /// Whether they are to be made to, where they don't.
        repair: bool,
    },
}

/// Who asks for the agent's health over HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Probe {
    /// Whoever sends new traffic to the node.
    Healthz,
    /// Whoever starts the agent anew.
    Livez,
}

/// The answer, on one line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// To [`Request::Status`].
    Status(Box<StatusReport>),
    /// To [`Request::Services`].
    Services(Vec<ServiceReport>),
    /// To [`Request::Backends`].
    Backends(Vec<BackendReport>),
    /// To [`Request::Metrics`]: text of `OpenMetrics`.
    Metrics(String),
    /// To [`Request::Health`].
    Health(HealthReport),
    /// To [`Request::ServiceHealth`].
    ServiceHealth(ServiceHealthReport),
    /// To [`Request::Verify`].
    Verify(VerifyReport),
    /// The question could not be answered; the text says why.
    Error(String),
}

/// How the agent is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusReport {
    /// The version of the agent.
    pub version: String,
    /// The agent's process id.
    pub pid: u32,
    /// How long the agent has been running, in seconds.
    pub uptime_seconds: u64,
    /// The processes that are kube-proxy, where that would serve the same services.
    pub kube_proxies: Vec<u32>,
    /// Why not everything is pinned that is to outlive the agent.
    pub unpinned: Option<String>,
    /// Where the programs are attached.
    pub interfaces: Vec<InterfaceReport>,
    /// The pod-facing devices.
    pub pod_interfaces: PodInterfacesReport,
    /// Socket-level balancing.
    pub sockets: SocketsReport,
    /// Where services come from: a file's path, or `Kubernetes`.
    pub source: String,
    /// How many services are in force: ports of one protocol in one IP family.
    pub services: u64,
    /// How many times services were applied: goes up by one with each change that is in force.
    pub revision: u64,
    /// How long ago a services file was last applied, in seconds.
    pub applied_seconds_ago: u64,
    /// Why the file as it is now is not in force; the last good one is.
    pub services_error: Option<String>,
    /// How full the tables are; those of flows as the last garbage collection saw them.
    pub tables: Vec<TableReport>,
    /// What the agent's own looks at the maps have found.
    pub audit: AuditReport,
    /// The garbage collection, once it has gone through the flow tables.
    pub collector: Option<CollectorReport>,
    /// Packets by what became of them.
    pub counters: Vec<CounterReport>,
}

/// Socket-level balancing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SocketsReport {
    /// Of which network namespaces sockets are balanced: `on` (all), `host` (the node's own), `off` (none).
    pub mode: String,
    /// The control group that the programs are attached to.
    pub cgroup: Option<String>,
    /// To how many hooks they are attached.
    pub attached: usize,
    /// What is missing, and what that costs.
    pub missing: Vec<String>,
    /// How the program sits on the loopback interface, where processes are balanced by what they send: `tcx` or `clsact`.
    pub loopback: Option<String>,
    /// How many sockets were ended that had lost their backends.
    pub ended: u64,
}

/// Whether the agent is well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthReport {
    /// What the probe is told.
    pub is_good: bool,
    /// Whether this node is to have new traffic from outside, where the probe goes by that.
    pub is_node_eligible: Option<bool>,
    /// When the services were last what the source wants, as RFC 3339 has it.
    pub last_updated: String,
}

/// Whether this node has endpoints of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceHealthReport {
    /// The service, as `namespace/name`.
    pub service: String,
    /// How many addresses of endpoints on this node are ready.
    pub local_endpoints: usize,
    /// Whether the agent is well: the services of its source are in force, and changes of them come into force.
    pub is_healthy: bool,
}

/// Whether the maps say what they should.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifyReport {
    /// Whether the tables of services were looked at: what a former agent left stays as it is until the source has told what there is
    /// to be.
    pub is_compared: bool,
    /// How many entries were looked at.
    pub entries: u64,
    /// Whether not all that the source says is in force; the status says why.
    pub is_behind: bool,
    /// Changes that the services ask for and that are not in force; the status says why.
    pub unapplied: usize,
    /// Where the maps did not say what they should.
    pub drift: Vec<DriftReport>,
    /// Whether all of that was put right.
    pub repaired: bool,
}

/// A place where a map did not say what it should.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriftReport {
    /// The map.
    pub map: String,
    /// The entry.
    pub entry: String,
    /// What it should have said.
    pub expected: String,
    /// What it said.
    pub found: String,
}

/// What the agent's own looks at the maps have found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditReport {
    /// How many times everything was looked at.
    pub audits: u64,
    /// How many entries had to be put right.
    pub repaired: u64,
}

/// One interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceReport {
    /// The interface's name.
    pub name: String,
    /// The XDP mode of the program there: `native`, `generic`, or `off` where tc meets what comes in; `gone` if the
    /// interface is not there, or can't be attached to.
    pub xdp: String,
    /// How programs sit on tc's hooks there: `tcx` or `clsact`; `gone` as above.
    pub tc: String,
    /// Why there is no XDP program although one was to be there if possible; of one that is `gone`, why it can't be attached to now that
    /// it is back.
    pub why: Option<String>,
    /// The IPv4 address that packets to backends leave this interface with.
    pub source_ipv4: Option<Ipv4Addr>,
    /// The IPv6 address that packets to backends leave this interface with.
    pub source_ipv6: Option<Ipv6Addr>,
}

/// The devices towards pods that packets are met on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodInterfacesReport {
    /// What their names look like; `auto` alone where they are known by their kind.
    pub patterns: Vec<String>,
    /// How many have our programs.
    pub attached: usize,
    /// How many could not get them; the log says why.
    pub refused: usize,
}

/// What the garbage collector has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CollectorReport {
    /// How many times it went through the flow tables.
    pub passes: u64,
    /// How many flows it has removed since the agent started.
    pub removed: u64,
    /// Entries that the last pass saw: two a flow.
    pub entries: u64,
    /// How long the agent was busy with the last pass, in ms.
    pub milliseconds: u64,
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
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The IP family.
    pub family: IpFamily,
    /// Where clients send to.
    pub frontends: Vec<FrontendReport>,
    /// The port of the node's own addresses that clients may send to as well.
    pub node_port: Option<u16>,
    /// Which endpoints the clients of cluster IPs get.
    pub internal_traffic_policy: TrafficPolicy,
    /// Which endpoints the clients of all other addresses get.
    pub external_traffic_policy: TrafficPolicy,
    /// The clients that load balancer addresses serve; empty: all.
    pub source_ranges: Vec<IpNet>,
    /// For how many seconds a client stays at its backend; 0: no session affinity.
    pub affinity_seconds: u32,
    /// How backends are chosen.
    pub algorithm: String,
    /// How many backends it has.
    pub backends: usize,
    /// Flows opened to its present backends.
    pub flows: u64,
}

/// One address of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendReport {
    /// Address and port.
    pub address: SocketAddr,
    /// What kind of address that is.
    pub kind: FrontendKind,
}

/// One backend of one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendReport {
    /// The service's name.
    pub service: String,
    /// The port's name, or its number.
    pub port: String,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The backend's address and port.
    pub address: SocketAddr,
    /// Its share of new flows; 0: none.
    pub weight: u16,
    /// The node that it is on, where its source says so.
    pub node_name: Option<String>,
    /// Whether it is on this node.
    pub on_node: bool,
    /// How it is.
    pub conditions: Conditions,
    /// The policies by which it takes new flows.
    pub takes_new: Vec<TrafficPolicy>,
    /// Answered flows that it has now.
    pub active: u64,
    /// Flows opened to it.
    pub flows: u64,
}
