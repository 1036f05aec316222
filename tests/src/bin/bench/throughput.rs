//! What translating costs in throughput: iperf3 from a client outside to a pod, routed without an agent and then to a
//! service's address through the agent, in the same network and by the same hops.

use std::{net::IpAddr, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use tests::{
    agent::Agent,
    cluster::Cluster,
    services::{PORT, Service, TARGET_PORT, cluster_ips, file},
    throughput::{Flow, Path},
    variants::{PAIR, Variant},
};

/// For how many seconds each figure is measured.
const SECONDS: u32 = 1;
/// How often each is measured; the median counts.
pub(crate) const ROUNDS: usize = 9;

/// One path.
#[derive(Serialize)]
pub(crate) struct Throughput {
    /// The agent's `--xdp`: `native`, or `off` for tc.
    pub(crate) xdp: &'static str,
    pub(crate) family: &'static str,
    /// Where the backend is, seen from the balancer.
    pub(crate) backend: &'static str,
    /// Which way the bytes go.
    pub(crate) flow: &'static str,
    /// Without an agent, by the backend's address: bits per second, as all here.
    pub(crate) routed: f64,
    /// Through the agent, by the service's address.
    pub(crate) balanced: f64,
    /// Which part of the throughput is left, in one round with itself.
    pub(crate) part: f64,
}

/// All paths.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Throughputs {
    Measured(Vec<Throughput>),
    /// Why not.
    NotMeasured(&'static str),
}

/// Measures all paths.
pub(crate) fn throughputs() -> Result<Throughputs> {
    if Command::new("iperf3").arg("--version").output().is_err() {
        return Ok(Throughputs::NotMeasured("iperf3 cannot be run: install it (apt-get install iperf3)"));
    }
    let mut all = Vec::new();
    for variant in PAIR {
        all.extend(of(&variant)?);
    }
    Ok(Throughputs::Measured(all))
}

fn of(variant: &Variant) -> Result<Vec<Throughput>> {
    let cluster = variant.layout.clone().up();
    detour(&cluster)?;
    let client = cluster.client();
    let backends = [("local", 1, cluster.pod(1, 1)), ("remote", 2, cluster.pod(2, 1))];
    let services = file(backends.map(|(_, k, pod)| Service::new(k).endpoint(pod)));
    let mut all = Vec::new();
    for (backend, k, server) in backends {
        for ip in cluster_ips(k) {
            for (name, flow) in [("up", Flow::Up), ("down", Flow::Down)] {
                let to = (server.address_like(ip), TARGET_PORT).into();
                let path = Path { client, to, server, port: TARGET_PORT, flow };
                let mut rounds = Vec::new();
                // Turn by turn, as the machine does not stay equally fast.
                for _ in 0..ROUNDS {
                    let routed = path.throughput(SECONDS)?;
                    let agent = Agent::start_on(cluster.node(1), &services, &["--xdp", variant.xdp]);
                    let balanced = Path { to: (ip, PORT).into(), ..path }.throughput(SECONDS)?;
                    agent.stop();
                    rounds.push((routed, balanced));
                }
                all.push(Throughput {
                    xdp: variant.xdp,
                    family: if ip.is_ipv4() { "IPv4" } else { "IPv6" },
                    backend,
                    flow: name,
                    routed: median(rounds.iter().map(|round| round.0))?,
                    balanced: median(rounds.iter().map(|round| round.1))?,
                    part: median(rounds.iter().map(|(routed, balanced)| balanced / routed))?,
                });
            }
        }
    }
    Ok(all)
}

/// Makes the router send what goes from the client to pods of the second node, and back, by the first: there it passes
/// when it is balanced, too.
fn detour(cluster: &Cluster) -> Result<()> {
    const TABLE: &str = "100";
    let (client, pod, node) = (cluster.client(), cluster.pod(2, 1), cluster.node(1).host());
    for [client, pod, node] in
        [[client, pod, node].map(|host| IpAddr::from(host.v4())), [client, pod, node].map(|host| host.v6().into())]
    {
        let family = if node.is_ipv4() { "-4" } else { "-6" };
        let ip = |arguments: String| -> Result<()> {
            let output = cluster.router().namespace().command("ip").arg(family).args(arguments.split(' ')).output()?;
            ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        ip(format!("route add default via {node} table {TABLE}"))?;
        for (port, to) in [("client1-eth0", pod), ("n2-eth0", client)] {
            ip(format!("rule add iif {port} to {to} lookup {TABLE}"))?;
        }
    }
    Ok(())
}

/// The middle one of some figures.
pub(crate) fn median(figures: impl Iterator<Item = f64>) -> Result<f64> {
    let mut figures: Vec<_> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().context("there are rounds")
}
