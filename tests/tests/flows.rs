//! Real sockets through the real agent: what clients and backends see, while all is well and while it is not.
#![expect(clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use tests::{
    agent::Agent,
    poll,
    probe::{Connection, TIMEOUT, Tally, assert_spread, assert_weighted_spread},
    topology::{Host, Lab, Topology, VIP4, VIP6},
    traffic::Conversations,
};

/// The virtual addresses at the port of [`web`].
const WEB: [SocketAddr; 2] = [at(VIP4, VIP6, 80).0, at(VIP4, VIP6, 80).1];

/// Longer than anything takes that happens by itself.
const SOON: Duration = Duration::from_secs(10);

/// Long enough for traffic to be seen, or its absence.
const MOMENT: Duration = Duration::from_millis(300);

const fn at(v4: Ipv4Addr, v6: Ipv6Addr, port: u16) -> (SocketAddr, SocketAddr) {
    (SocketAddr::new(IpAddr::V4(v4), port), SocketAddr::new(IpAddr::V6(v6), port))
}

/// A services file with one service at port 80 of both virtual addresses, which the backends take in turns.
fn web<'a>(backends: impl IntoIterator<Item = &'a Host>) -> String {
    let backends: Vec<_> = backends.into_iter().map(|backend| (backend, 1)).collect();
    services(&[(80, "round-robin", &backends)])
}

/// A services file with a service at each of these ports of both virtual addresses, over TCP and UDP.
/// Backends listen on port 8080 and have weights.
fn services(all: &[(u16, &str, &[(&Host, u16)])]) -> String {
    let service = |&(port, algorithm, backends): &(u16, &str, &[(&Host, u16)])| {
        let backends = backends.iter().flat_map(|(host, weight)| {
            host.addresses().map(move |address| format!("{{ address: \"{address}\", weight: {weight} }}"))
        });
        format!(
            "\n  - name: at-{port}
    addresses: [{VIP4}, \"{VIP6}\"]
    ports:
      - {{ name: tcp, port: {port}, targetPort: 8080 }}
      - {{ name: udp, port: {port}, targetPort: 8080, protocol: UDP }}
    algorithm: {algorithm}
    backends: [{}]",
            backends.collect::<Vec<_>>().join(", ")
        )
    };
    format!("services:{}\n", all.iter().map(service).collect::<String>())
}
