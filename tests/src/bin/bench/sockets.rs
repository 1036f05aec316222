//! What balancing of sockets costs: a process of a node that talks to a pod there, by the pod's address and by that of its service,
//! in turns, beside the same agent. The packets are the same, so what differs is the calls.

use std::{
    io::{self, Read as _},
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    thread,
    time::Instant,
};

use anyhow::{Result, ensure};
use nix::sys::socket::{setsockopt, sockopt::Linger};
use serde::Serialize;
use tests::{
    agent::Agent,
    cluster::{Layout, PodNetwork, Uplinks},
    netns::Background,
    services::{PORT, Service, TARGET_PORT, cluster_ips, file},
    throughput::{Flow, Path},
    topology::Host,
};

use crate::throughput::median;

/// How many connections make a turn. Turns are short, as the machine does not stay equally fast.
const CONNECTIONS: u32 = 200;
/// How often they are measured each way; the median counts.
const ROUNDS: usize = 201;
/// For how many seconds bytes are counted in each turn of theirs, and in how many rounds.
const SECONDS: u32 = 1;
const ROUNDS_OF_BYTES: usize = 11;

/// One figure.
#[derive(Serialize)]
pub(crate) struct Sockets {
    /// What is counted in a second.
    pub(crate) what: &'static str,
    pub(crate) family: &'static str,
    /// By the backend's address.
    pub(crate) straight: f64,
    /// By the service's.
    pub(crate) balanced: f64,
    /// Which part is left, in one round with itself.
    pub(crate) part: f64,
}

/// Measures connections, and where iperf3 is there throughput.
pub(crate) fn sockets() -> Result<Vec<Sockets>> {
    let cluster = Layout::new(PodNetwork::Routed).uplinks(Uplinks::Veth).up();
    let (client, server) = (cluster.node(1).host(), cluster.pod(1, 1));
    let agent = Agent::start_on(cluster.node(1), &file([Service::new(1).endpoint(server)]), &[]);
    let has_iperf3 = Command::new("iperf3").arg("--version").output().is_ok();
    let mut all = Vec::new();
    for ip in cluster_ips(1) {
        let (straight, balanced) = ((server.address_like(ip), TARGET_PORT).into(), (ip, PORT).into());
        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        {
            let _acceptor = accept(server)?;
            all.push(in_turns("connections", family, ROUNDS, [straight, balanced], |to| connections(client, to))?);
        }
        if has_iperf3 {
            let bits = |to| Path { client, to, server, port: TARGET_PORT, flow: Flow::Up }.throughput(SECONDS);
            all.push(in_turns("Gbit up", family, ROUNDS_OF_BYTES, [straight, balanced], |to| Ok(bits(to)? / 1e9))?);
        }
    }
    ensure!(agent.count("socket") > 0, "the service is not reached by sockets");
    Ok(all)
}

fn in_turns(
    what: &'static str,
    family: &'static str,
    count: usize,
    [straight, balanced]: [SocketAddr; 2],
    measure: impl Fn(SocketAddr) -> Result<f64>,
) -> Result<Sockets> {
    let mut rounds = Vec::new();
    for round in 0..count {
        // Neither is always the first.
        let (first, second) = if round % 2 == 0 { (straight, balanced) } else { (balanced, straight) };
        let figures = (measure(first)?, measure(second)?);
        rounds.push(if round % 2 == 0 { figures } else { (figures.1, figures.0) });
    }
    Ok(Sockets {
        what,
        family,
        straight: median(rounds.iter().map(|round| round.0))?,
        balanced: median(rounds.iter().map(|round| round.1))?,
        part: median(rounds.iter().map(|(straight, balanced)| balanced / straight))?,
    })
}

/// Accepts connections, and closes each at once.
fn accept(server: &Host) -> io::Result<Background<()>> {
    let listener = server.namespace().run(|| TcpListener::bind(("::", TARGET_PORT)))?;
    listener.set_nonblocking(true)?;
    Ok(server.namespace().spawn(move |stop| {
        while !stop.is_cancelled() {
            if listener.accept().is_err() {
                thread::yield_now();
            }
        }
    }))
}

/// How many connections there are in a second, one after the other: each is opened, accepted, and closed by both.
fn connections(client: &Host, to: SocketAddr) -> Result<f64> {
    client.namespace().run(|| {
        let begin = Instant::now();
        for _ in 0..CONNECTIONS {
            let mut stream = TcpStream::connect(to)?;
            // The other end has closed it by then.
            let _nothing = stream.read(&mut [0])?;
            // None is left behind, for which ports would run out.
            setsockopt(&stream, Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        }
        Ok(f64::from(CONNECTIONS) / begin.elapsed().as_secs_f64())
    })
}
