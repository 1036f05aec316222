//! The HTTP endpoints, where kube-proxy has them: `/metrics` and `/proxyMode` on one port, `/healthz` and `/livez` on another.

use std::{
    collections::HashMap,
    fmt, io,
    net::{AddrParseError, IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Extension, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use imbl::{OrdMap, ordmap::DiffItem};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    task::JoinHandle,
    time,
};
use tracing::{info, warn};

use crate::{
    admin::{
        report::{self, Probe, Request},
        server::Query,
    },
    model::IpFamily,
};

/// Where metrics are unless said otherwise: kube-proxy's place.
pub const DEFAULT_METRICS: Listen = Listen(Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), METRICS_PORT)));

const METRICS_PORT: u16 = 10249;
/// Where health is told unless said otherwise, on all addresses: kube-proxy's place.
pub const HEALTH_PORT: u16 = 10256;

/// Connections at one time to one port; who comes later waits in the kernel's queue.
const CONNECTIONS: usize = 64;
/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait until a port that is taken is tried again.
const PAUSE: Duration = Duration::from_secs(5);

/// The content type of what `prometheus_client` writes.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where to listen, if anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen(pub Option<SocketAddr>);

impl Listen {
    /// Reads `ADDRESS:PORT`, `ADDRESS` for a port that is known, or nothing at all for nowhere.
    fn parse(text: &str, port: u16) -> Result<Self, AddrParseError> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        let address = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, port));
        address.or_else(|_| SocketAddr::from_str(text)).map(|address| Self(Some(address)))
    }

    /// Where metrics are to be.
    pub fn metrics(text: &str) -> Result<Self, AddrParseError> {
        Self::parse(text, METRICS_PORT)
    }

    /// Where health is to be told.
    pub fn health(text: &str) -> Result<Self, AddrParseError> {
        Self::parse(text, HEALTH_PORT)
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |address| address.fmt(f))
    }
}

/// Why there is no listening at a place.
#[derive(Debug, thiserror::Error)]
#[error(
    "{address} can't be listened on; {flag} names another place, and without --bind-address-hard-fail it is tried again"
)]
pub struct ListenError {
    flag: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// Makes sure that places can be had which flags name.
pub async fn expect_free(places: [(&'static str, Listen); 2]) -> Result<(), ListenError> {
    for (flag, Listen(address)) in places {
        if let Some(address) = address {
            TcpListener::bind(address).await.map_err(|source| ListenError { flag, address, source })?;
        }
    }
    Ok(())
}

/// The flag that says where metrics are to be.
pub const METRICS_FLAG: &str = "--metrics-bind-address";
/// The flag that says where health is to be told.
pub const HEALTH_FLAG: &str = "--healthz-bind-address";

/// Answers about metrics for as long as it is polled; `queries` leads to the agent's loop.
pub async fn serve_metrics(at: Listen, queries: mpsc::Sender<Query>) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        // The last word is the API's name of the mode: scripts tell by it what to look for on a node.
        .route("/proxyMode", get(|| async { "wharf" }))
        .with_state(queries);
    serve("metrics", METRICS_FLAG, at, router).await;
}

/// Answers about the agent's health for as long as it is polled; `queries` leads to the agent's loop.
pub async fn serve_health(at: Listen, queries: mpsc::Sender<Query>) {
    let router = Router::new().route("/healthz", get(healthz)).route("/livez", get(livez)).with_state(queries);
    serve("health", HEALTH_FLAG, at, router).await;
}

/// The ports on which load balancers ask whether this node has endpoints of a service; closed on drop.
#[derive(Debug)]
pub struct HealthChecks {
    queries: mpsc::Sender<Query>,
    known: OrdMap<u16, Arc<str>>,
    servers: HashMap<u16, JoinHandle<()>>,
}

impl HealthChecks {
    /// None yet; `queries` leads to the agent's loop.
    pub fn new(queries: mpsc::Sender<Query>) -> Self {
        Self { queries, known: OrdMap::new(), servers: HashMap::new() }
    }

    /// Listens on these ports, and on no others.
    pub fn follow(&mut self, wanted: &OrdMap<u16, Arc<str>>) {
        for change in self.known.diff(wanted) {
            match change {
                DiffItem::Add(&port, service) => {
                    let router = Router::new().fallback(service_health).with_state((port, self.queries.clone()));
                    let what = format!("health of {service}");
                    let server =
                        async move { serve(&what, "the service's healthCheckNodePort", any(port), router).await };
                    self.servers.insert(port, tokio::spawn(server));
                }
                DiffItem::Remove(port, _) => {
                    if let Some(server) = self.servers.remove(port) {
                        server.abort();
                    }
                }
                // Whose port it is, is asked for each time.
                DiffItem::Update { .. } => {}
            }
        }
        self.known = wanted.clone();
    }
}

impl Drop for HealthChecks {
    fn drop(&mut self) {
        self.servers.values().for_each(JoinHandle::abort);
    }
}

/// All addresses of this host, of both families where it has both.
pub fn any(port: u16) -> Listen {
    let has_ipv6 = Path::new("/proc/net/if_inet6").exists();
    let ip = if has_ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    Listen(Some(SocketAddr::new(ip, port)))
}

/// As kube-proxy answers (Kubernetes, `pkg/proxy/healthcheck/service_health.go`).
///
/// There each family has a proxy of its own, which knows of its own endpoints only.
async fn service_health(
    State((port, queries)): State<(u16, mpsc::Sender<Query>)>,
    Extension(peer): Extension<SocketAddr>,
) -> Response {
    let family = IpFamily::of(peer.ip().to_canonical());
    let report = match Query::ask(Request::ServiceHealth { port, family }, &queries).await {
        report::Response::ServiceHealth(report) => report,
        other => return unavailable(&other),
    };
    let is_good = report.is_healthy && report.local_endpoints > 0;
    let (namespace, name) = report.service.split_once('/').unwrap_or(("", &report.service));
    let body = json!({
        "service": { "namespace": namespace, "name": name },
        "localEndpoints": report.local_endpoints,
        "serviceProxyHealthy": report.is_healthy,
    });
    let weight = [("x-load-balancing-endpoint-weight", report.local_endpoints.to_string())];
    (weight, opinion(is_good, &body)).into_response()
}

async fn metrics(State(queries): State<mpsc::Sender<Query>>) -> Response {
    match Query::ask(Request::Metrics, &queries).await {
        report::Response::Metrics(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        other => unavailable(&other),
    }
}

async fn healthz(State(queries): State<mpsc::Sender<Query>>) -> Response {
    health(&queries, Probe::Healthz).await
}

async fn livez(State(queries): State<mpsc::Sender<Query>>) -> Response {
    health(&queries, Probe::Livez).await
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Health<'a> {
    last_updated: &'a str,
    current_time: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
}

/// As kube-proxy answers (Kubernetes, `pkg/proxy/healthcheck/proxy_health.go`).
async fn health(queries: &mpsc::Sender<Query>, probe: Probe) -> Response {
    match Query::ask(Request::Health { probe }, queries).await {
        report::Response::Health(report) => {
            let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
            // As kube-proxy has it: what is well is as of now, however long ago something changed.
            let updated = if report.is_good { &now } else { &report.last_updated };
            let body = Health { last_updated: updated, current_time: &now, node_eligible: report.is_node_eligible };
            opinion(report.is_good, &json!(body))
        }
        other => unavailable(&other),
    }
}

/// Whether all is well, and more about it.
fn opinion(is_good: bool, body: &Value) -> Response {
    let status = if is_good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status, headers, body.to_string()).into_response()
}

fn unavailable(answer: &report::Response) -> Response {
    let why = if let report::Response::Error(why) = answer { why } else { "not an answer to this question" };
    (StatusCode::SERVICE_UNAVAILABLE, why.to_owned()).into_response()
}

/// Serves `what` at a place. While that can't be had, which `flag` would change, it is tried again.
async fn serve(what: &str, flag: &str, at: Listen, router: Router) {
    let Some(address) = at.0 else { return };
    let mut said = None;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                let text = error.to_string();
                if said.as_ref() != Some(&text) {
                    warn!(
                        "no {what} over HTTP for now: {address} can't be listened on: {text}; {flag} names another place"
                    );
                    said = Some(text);
                }
            }
        }
        time::sleep(PAUSE).await;
    };
    info!("{what} over HTTP: {address}");
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Never closed.
        let permit = Arc::clone(&connections).acquire_owned().await;
        match listener.accept().await {
            Ok((stream, peer)) => {
                let router = router.clone().layer(Extension(peer));
                tokio::spawn(async move {
                    converse(stream, router).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of file descriptors, for one: that may pass.
                warn!(%error, "cannot accept connections for {what}");
                time::sleep(PAUSE).await;
            }
        }
    }
}

/// Answers one client until it goes, or wastes our time.
async fn converse(stream: TcpStream, router: Router) {
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    // That a client goes in the middle is its own affair.
    let _gone = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_an_address_with_or_without_a_port_or_nowhere() {
        let place = |text| Listen::metrics(text).map(|listen| listen.to_string());
        assert_eq!(place("127.0.0.1:10249"), Ok(DEFAULT_METRICS.to_string()));
        assert_eq!(place("0.0.0.0").as_deref(), Ok("0.0.0.0:10249"));
        assert_eq!(place("::1").as_deref(), Ok("[::1]:10249"));
        assert_eq!(place("[::1]:9").as_deref(), Ok("[::1]:9"));
        assert_eq!(Listen::metrics(""), Ok(Listen(None)));
        assert_eq!(Listen::health("::").unwrap().to_string(), "[::]:10256");
        for wrong in ["10249", "localhost:10249", "1.2.3.4:", "1.2.3.4:65536"] {
            assert!(place(wrong).is_err(), "{wrong}");
        }
    }
}
