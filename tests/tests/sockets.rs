//! Socket-level balancing: processes of a node, and of its pods, that call services.
//!
//! The programs are attached at the root of all control groups, and each agent has its own: so a process of a node meets those of
//! other tests, too, which leave alone what is in another network namespace than theirs. Where all namespaces are balanced, the
//! agent is given a control group of the test's own.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "this is test code: it fails by panicking"
)]

use std::{
    array,
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map};
use lb_common::abi::{Backend, Translation};
use lb_userspace::dataplane::kernel::SocketHook;
use nix::sys::{
    signal::Signal,
    socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrStorage, connect, setsockopt, sockopt},
};
use serde_json::{Value, json};
use tests::{
    agent::Agent,
    cluster::{Cluster, Layout, PodNetwork},
    control_group::{CONNECT4, ControlGroup, RECVMSG},
    eventually,
    home::Home,
    servers::Server,
    services::{PORT, Service, TARGET_PORT, cluster_ips, external_ips, file, load_balancer_ips, node_port, vips},
    slowness,
    sockets::{Call, disconnect, mapped},
    topology::Host,
    traffic::Conversations,
};
use tokio_util::sync::CancellationToken;

/// Services by what their only endpoint is, seen from `n1`.
const LOCAL: u8 = 1;
const REMOTE: u8 = 2;
const HOST: u8 = 3;

fn cluster() -> Cluster {
    Layout::new(PodNetwork::Routed).up()
}

fn endpoint(cluster: &Cluster, service: u8) -> &Host {
    match service {
        LOCAL => cluster.pod(1, 1),
        REMOTE => cluster.pod(2, 1),
        HOST => cluster.node(1).host(),
        _ => unreachable!("there are three services"),
    }
}

/// The node and all pods serve.
fn serve(cluster: &Cluster) -> Vec<Server> {
    let pods = [(1, 1), (1, 2), (2, 1), (2, 2)].map(|(i, k)| cluster.pod(i, k));
    pods.into_iter().chain([cluster.node(1).host()]).map(|host| host.serve(TARGET_PORT)).collect()
}

/// All that a service is reached by from `n1`.
fn frontends(cluster: &Cluster, service: u8) -> Vec<SocketAddr> {
    let with = |port: u16, addresses: Vec<IpAddr>| addresses.into_iter().map(move |ip| SocketAddr::new(ip, port));
    let own = [cluster_ips(service), external_ips(service), load_balancer_ips(service)].concat();
    let localhost = [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        Ipv4Addr::new(127, 3, 2, 1).into(),
        Ipv4Addr::UNSPECIFIED.into(),
        Ipv6Addr::LOCALHOST.into(),
    ];
    let node = cluster.node(1).host().addresses().chain(localhost).collect();
    with(PORT, own).chain(with(node_port(service), node)).collect()
}

#[test]
fn processes_reach_services_by_every_address_and_every_kind_of_socket() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let node = cluster.node(1);
    let services = file([LOCAL, REMOTE, HOST].map(|service| {
        // These are not for clients in the cluster.
        let service_of = Service::new(service).everywhere().endpoint(endpoint(&cluster, service));
        service_of.set("loadBalancerSourceRanges", vec!["198.51.100.0/24", "2001:db8:1::/48"])
    }));
    let agent = Agent::start_on(node, &services, &[]);
    assert_eq!(agent.status()["sockets"]["attached"], SocketHook::ALL.len(), "{}", agent.log());
    let mut mistakes = Vec::new();
    for service in [LOCAL, REMOTE, HOST] {
        for to in frontends(&cluster, service) {
            for (call, to) in Call::ALL.into_iter().flat_map(|call| [(call, to), (call, mapped(to))]) {
                match node.host().call(call, to) {
                    Ok(backend) if backend == endpoint(&cluster, service).name() => {}
                    other => mistakes.push(format!("{call:?} to {to}, service {service}: {other:?}")),
                }
            }
        }
    }
    assert!(mistakes.is_empty(), "{}\n{}", mistakes.join("\n"), agent.log());
}

// Which backend.

/// The node calls this service a few times in each way.
fn answers(host: &Host, to: SocketAddr) -> BTreeSet<String> {
    let calls = Call::ALL.into_iter().flat_map(|call| [call; 6]);
    calls.map(|call| host.call(call, to).unwrap_or_else(|error| panic!("{call:?} to {to}: {error}"))).collect()
}

fn names<'a>(hosts: impl IntoIterator<Item = &'a Host>) -> BTreeSet<String> {
    hosts.into_iter().map(|host| host.name().to_owned()).collect()
}

#[test]
fn a_socket_that_is_not_connected_talks_to_many_services_and_stays_with_a_backend_of_each() {
    const SERVICES: u8 = 12;
    let cluster = cluster();
    let _servers = serve(&cluster);
    let pods = [cluster.pod(1, 1), cluster.pod(2, 1)];
    let host = cluster.node(1).host();
    let agent = Agent::start_on(cluster.node(1), &file((1..=SERVICES).map(|k| Service::new(k).endpoints(pods))), &[]);
    for like in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        let to = |k: u8| if like.is_ipv4() { vips(k)[0] } else { vips(k)[1] };
        let mut first = BTreeSet::new();
        for _ in 0..4 {
            let socket = host.datagrams(like);
            let before = [1, 2].map(|k| socket.ask(to(k)).unwrap());
            for _ in 0..5 {
                assert_eq!([1, 2].map(|k| socket.ask(to(k)).unwrap()), before);
            }
            // There are more of them than are remembered, and all of them answer.
            for k in 1..=SERVICES {
                assert!(socket.ask(to(k)).is_ok_and(|backend| names(pods).contains(&backend)));
            }
            first.extend(before);
        }
        assert_eq!(first, names(pods), "each socket makes a choice of its own");
        // It goes elsewhere when its backend is gone.
        let socket = host.datagrams(like);
        let [gone, stays] = match socket.ask(to(1)).unwrap() {
            backend if backend == pods[0].name() => pods,
            _ => [pods[1], pods[0]],
        };
        agent.apply(&file([Service::new(1).endpoint(stays)]));
        assert_eq!(socket.ask(to(1)).unwrap(), stays.name(), "after {}", gone.name());
        agent.apply(&file((1..=SERVICES).map(|k| Service::new(k).endpoints(pods))));
    }
    // A socket of IPv6 that talks to addresses of both families.
    let socket = host.datagrams(Ipv6Addr::UNSPECIFIED.into());
    for to in [vips(1).map(mapped), vips(1).map(mapped), vips(2).map(mapped)].concat() {
        socket.ask(to).unwrap();
    }
}

/// It asks once, and is told for longer than a flow lives without a packet.
#[test]
fn a_socket_that_is_not_connected_stays_with_a_backend_that_goes_on_answering() {
    let cluster = cluster();
    let pods = [cluster.pod(1, 1), cluster.pod(2, 1)];
    let tell = |name: String| {
        move |stop: CancellationToken| {
            let socket = UdpSocket::bind(("::", TARGET_PORT)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let mut client = None;
            while !stop.is_cancelled() {
                client = socket.recv_from(&mut [0; 8]).ok().map(|(_, from)| from).or(client);
                client.map(|client| socket.send_to(name.as_bytes(), client).unwrap());
            }
        }
    };
    let _tellers = pods.map(|pod| pod.namespace().spawn(tell(pod.name().to_owned())));
    let services = file([Service::new(1).endpoints(pods)]);
    let _agent = Agent::start_on(cluster.node(1), &services, &["--timeout-udp", "2s"]);
    for to in vips(1) {
        let socket = cluster.node(1).host().namespace().run(|| UdpSocket::bind(("::", 0)).unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut buffer = [0; 64];
        let mut told = || {
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!((from.ip().to_canonical(), from.port()), (to.ip(), to.port()));
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        socket.send_to(b"begin", mapped(to)).unwrap();
        let (first, begin) = (told(), Instant::now());
        while begin.elapsed() < Duration::from_secs(4) {
            assert_eq!(told(), first);
        }
        socket.send_to(b"again", mapped(to)).unwrap();
        // Another one would tell it, too, and be told by itself as soon as it is asked.
        for _ in 0..10 {
            assert_eq!(told(), first, "it went elsewhere");
        }
    }
}

#[test]
fn a_udp_socket_may_be_connected_elsewhere() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let pod = cluster.pod(2, 1);
    let _agent = Agent::start_on(cluster.node(1), &file([1, 2].map(|k| Service::new(k).endpoint(pod))), &[]);
    let host = cluster.node(1).host();
    for (first, second, straight) in [
        (vips(1)[0], vips(2)[0], SocketAddr::from((pod.v4(), TARGET_PORT))),
        (vips(1)[1], vips(2)[1], SocketAddr::from((pod.v6(), TARGET_PORT))),
    ] {
        let socket = host.datagrams(first.ip());
        // The last one is no service: what is remembered of the others is not shown.
        for to in [first, second, straight, first] {
            socket.connect(to).unwrap();
            assert_eq!((socket.peer().unwrap(), socket.ask_peer().unwrap()), (to, pod.name().to_owned()));
        }
    }
}

#[test]
fn what_a_udp_socket_was_connected_to_is_not_shown_once_it_is_not_and_the_other_way_round() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let pod = cluster.pod(2, 1);
    let _agent = Agent::start_on(cluster.node(1), &file([1, 2].map(|k| Service::new(k).endpoint(pod))), &[]);
    for (first, second, straight) in [
        (vips(1)[0], vips(2)[0], SocketAddr::from((pod.v4(), TARGET_PORT))),
        (vips(1)[1], vips(2)[1], SocketAddr::from((pod.v6(), TARGET_PORT))),
    ] {
        let socket = cluster.node(1).host().datagrams(first.ip());
        socket.connect(first).unwrap();
        assert_eq!(socket.ask_peer().unwrap(), pod.name());
        socket.disconnect().unwrap();
        assert_eq!(socket.ask(second).unwrap(), pod.name());
        socket.connect(straight).unwrap();
        assert_eq!((socket.peer().unwrap(), socket.ask_peer().unwrap()), (straight, pod.name().to_owned()));
    }
}

/// It is given nobody else's answers.
#[test]
fn a_udp_socket_that_is_connected_stays_with_its_backend_when_it_names_the_service() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let pods = [(1, 1), (1, 2), (2, 1), (2, 2)].map(|(i, k)| cluster.pod(i, k));
    let _agent = Agent::start_on(cluster.node(1), &file([Service::new(1).endpoints(pods)]), &[]);
    for to in vips(1) {
        for _ in 0..10 {
            let socket = cluster.node(1).host().datagrams(to.ip());
            socket.connect(to).unwrap();
            let backend = socket.ask_peer().unwrap();
            for _ in 0..3 {
                assert_eq!(socket.ask(to).unwrap(), backend, "{to}");
            }
        }
    }
}

/// For a socket of IPv6 that talks IPv4 the kernel asks again at each send(2), and names the backend.
#[test]
fn a_udp_socket_of_ipv6_that_talks_ipv4_stays_with_a_backend_that_is_a_frontend_too() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let [backend, other] = [cluster.pod(1, 1), cluster.pod(2, 1)];
    let ports = json!([{ "name": "udp", "protocol": "UDP", "port": TARGET_PORT, "targetPort": TARGET_PORT }]);
    let at_backend = Service::new(2).set("externalIPs", json!([backend.v4().to_string()])).set("ports", ports);
    let services = file([Service::new(1).endpoint(backend), at_backend.endpoint(other)]);
    let _agent = Agent::start_on(cluster.node(1), &services, &[]);
    let to = mapped(vips(1)[0]);
    let socket = cluster.node(1).host().datagrams(to.ip());
    socket.connect(to).unwrap();
    for _ in 0..3 {
        assert_eq!(socket.ask_peer().unwrap(), backend.name());
    }
}

#[test]
fn who_finds_no_backend_is_told_at_once() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let (host, remote) = (cluster.node(1).host(), cluster.pod(2, 1));
    let agent = Agent::start_on(cluster.node(1), &file([Service::new(LOCAL).everywhere().endpoint(remote)]), &[]);
    let refused = |to: SocketAddr, expected: ErrorKind| {
        for (call, to) in Call::ALL.into_iter().flat_map(|call| [(call, to), (call, mapped(to))]) {
            let kind = host.call(call, to).map_err(|error| error.kind());
            assert_eq!(kind, Err(expected), "{call:?} to {to}");
        }
    };
    for ip in cluster_ips(LOCAL) {
        refused((ip, PORT + 1).into(), ErrorKind::ConnectionRefused);
    }
    agent.apply(&file([Service::new(LOCAL).everywhere()]));
    for to in frontends(&cluster, LOCAL) {
        refused(to, ErrorKind::ConnectionRefused);
    }
    let of = |field| Service::new(LOCAL).everywhere().endpoint(remote).set(field, "Local");
    agent.apply(&file([of("internalTrafficPolicy")]));
    let before = agent.count("no-local-endpoints");
    for ip in cluster_ips(LOCAL) {
        refused((ip, PORT).into(), ErrorKind::PermissionDenied);
    }
    // Mapped or not is the same for IPv6.
    assert_eq!(agent.count("no-local-endpoints"), before + 12);
    // To addresses outside, and by the policy for these, a client on the node is one of the cluster.
    for policy in ["internalTrafficPolicy", "externalTrafficPolicy"] {
        if policy == "externalTrafficPolicy" {
            agent.apply(&file([of(policy)]));
        }
        for to in frontends(&cluster, LOCAL).into_iter().filter(|to| !cluster_ips(LOCAL).contains(&to.ip())) {
            assert_eq!(answers(host, to), names([remote]), "{policy}: {to}");
        }
    }
}

#[test]
fn connections_stay_where_they_are_when_their_backend_takes_no_new_ones() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let (host, [local, remote]) = (cluster.node(1).host(), [cluster.pod(1, 1), cluster.pod(2, 1)]);
    let with = |fields: Value| file([Service::new(1).endpoint(remote).endpoint_with(local, &fields)]);
    let agent = Agent::start_on(cluster.node(1), &file([Service::new(1).endpoint(local)]), &[]);
    let conversations = vips(1).map(|to| host.converse(to, 5));
    let sockets = vips(1).map(|to| {
        let socket = host.datagrams(to.ip());
        socket.connect(to).unwrap();
        socket
    });
    for fields in
        [json!({ "weight": 0 }), json!({ "conditions": { "ready": false, "serving": true, "terminating": true } })]
    {
        agent.apply(&with(fields));
        for (to, socket) in vips(1).into_iter().zip(&sockets) {
            assert_eq!(answers(host, to), names([remote]));
            assert_eq!(socket.ask_peer().unwrap(), local.name());
        }
    }
    conversations.into_iter().for_each(Conversations::expect_unharmed);
}

// Ports.

/// What becomes of sockets that are to have an address: TCP, UDP.
fn bind(host: &Host, ip: IpAddr, port: u16) -> [Result<(), ErrorKind>; 2] {
    host.namespace().run(|| {
        let tcp = TcpListener::bind((ip, port)).map(drop);
        [tcp, UdpSocket::bind((ip, port)).map(drop)].map(|result| result.map_err(|error| error.kind()))
    })
}

/// Expects that a port can be had. A program that another test is just starting has a copy of each socket for a moment.
#[track_caller]
fn expect_free(host: &Host, ip: IpAddr, port: u16) {
    eventually(&format!("{ip} of {} has port {port}", host.name()), || bind(host, ip, port) == [Ok(()); 2]);
}

#[test]
fn what_is_a_node_port_is_no_port_of_anybody_else() {
    const TAKEN: [Result<(), ErrorKind>; 2] = [Err(ErrorKind::AddrInUse); 2];
    let cluster = cluster();
    let (host, pod) = (cluster.node(1).host(), cluster.pod(1, 1));
    let agent = Agent::start_on(cluster.node(1), &file([Service::new(1).everywhere()]), &[]);
    let localhost = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    let any = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
    let all: Vec<_> = host.addresses().chain(localhost).chain(any).collect();
    let before = agent.count("port-in-use");
    for &ip in &all {
        assert_eq!(bind(host, ip, node_port(1)), TAKEN, "{ip}");
        expect_free(host, ip, node_port(2));
        expect_free(host, ip, 0);
    }
    assert_eq!(agent.count("port-in-use"), before + 2 * all.len() as u64);
    let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped().into();
    assert_eq!(bind(host, mapped, node_port(1)), TAKEN);
    // Pods have ports of their own.
    for ip in pod.addresses().chain(localhost).chain(any) {
        expect_free(pod, ip, node_port(1));
    }
    agent.apply(&file([Service::new(1)]));
    for &ip in &all {
        expect_free(host, ip, node_port(1));
    }
    // What was there before is left alone.
    let listener = host.namespace().run(|| TcpListener::bind(("::", node_port(1))).unwrap());
    agent.apply(&file([Service::new(1).everywhere()]));
    assert_eq!(listener.local_addr().unwrap().port(), node_port(1));
}

#[test]
fn node_ports_are_taken_where_they_are_served() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let host = cluster.node(1).host();
    let services = file([Service::new(1).everywhere().endpoint(cluster.pod(1, 1))]);
    // No range of IPv6 would mean all of its addresses.
    let own = format!("{}/32,2001:db8::/32", host.v4());
    let _agent = Agent::start_on(cluster.node(1), &services, &["--nodeport-addresses", &own]);
    assert_eq!(bind(host, host.v4().into(), node_port(1)), [Err(ErrorKind::AddrInUse); 2]);
    assert_eq!(bind(host, Ipv4Addr::LOCALHOST.into(), node_port(1)), [Ok(()); 2]);
    assert_eq!(bind(host, host.v6().into(), node_port(1)), [Ok(()); 2]);
    assert_eq!(bind(host, Ipv6Addr::LOCALHOST.into(), node_port(1)), [Ok(()); 2]);
    // Who has all addresses has this one, too.
    for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        assert_eq!(bind(host, any, node_port(1)), [Err(ErrorKind::AddrInUse); 2], "{any}");
        expect_free(host, any, node_port(2));
    }
    assert_eq!(answers(host, (host.v4(), node_port(1)).into()), names([cluster.pod(1, 1)]));
    let refused = host.call(Call::Tcp, (Ipv4Addr::LOCALHOST, node_port(1)).into()).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::ConnectionRefused));
}

// Sockets whose backend is gone.

/// Cuts a pod off: nobody answers for it any more, not even with an error.
fn cut(pod: &Host) {
    pod.namespace().ip("link set eth0 down");
}

/// Connected UDP sockets that ask again and again, and are connected anew when the kernel ends them.
struct Clients {
    sockets: Vec<(UdpSocket, Instant, String)>,
    to: SocketAddr,
    silence: Duration,
}

impl Clients {
    fn new(count: usize, to: SocketAddr) -> Self {
        let sockets = (0..count).map(|_| (Self::connected(to), Instant::now(), String::new())).collect();
        Self { sockets, to, silence: Duration::ZERO }
    }

    fn connected(to: SocketAddr) -> UdpSocket {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        socket.connect(to).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }

    /// Who answers in the end, and the longest time for which a socket got no answer.
    fn talk(mut self, stop: &CancellationToken) -> (BTreeSet<String>, Duration) {
        let mut buffer = [0; 64];
        while !stop.is_cancelled() {
            for (socket, heard, backend) in &mut self.sockets {
                self.silence = self.silence.max(heard.elapsed());
                let asked = match socket.recv(&mut buffer) {
                    Ok(length) => {
                        let text = String::from_utf8_lossy(&buffer[..length]);
                        (*heard, *backend) = (Instant::now(), text.split(' ').next().unwrap().to_owned());
                        socket.send(b"who?")
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => socket.send(b"who?"),
                    Err(error) => Err(error),
                };
                // Of its end a socket tells once: whoever sends or receives first.
                if let Err(error) = asked {
                    let is_end = [libc::ECONNABORTED, libc::EDESTADDRREQ].map(Some).contains(&error.raw_os_error());
                    assert!(is_end, "{error}");
                    *socket = Self::connected(self.to);
                }
            }
            thread::sleep(Duration::from_millis(20));
        }
        (self.sockets.into_iter().map(|(.., backend)| backend).collect(), self.silence)
    }
}

/// How long a socket has to be silent to be taken for one that stays so. One that is ended is silent for a tenth of a second or two, and
/// for as long as the machine has no time for whoever is involved.
fn long() -> Duration {
    Duration::from_secs(4) + Duration::from_secs(1) * slowness()
}

#[test]
fn no_client_of_udp_stays_on_a_dead_backend_while_all_are_replaced() {
    const CLIENTS: usize = 100;
    let cluster = cluster();
    let _servers = serve(&cluster);
    let pods = [(1, 1), (1, 2), (2, 1), (2, 2)].map(|(i, k)| cluster.pod(i, k));
    let with = |pods: &[&Host]| file([Service::new(1).endpoints(pods.iter().copied())]);
    let agent = Agent::start_on(cluster.node(1), &with(&pods[..2]), &[]);
    let [v4, v6] = vips(1);
    let clients = [v4, v6, mapped(v4)]
        .map(|to| cluster.node(1).host().namespace().spawn(move |stop| Clients::new(CLIENTS / 3, to).talk(&stop)));
    for step in 1..=2 {
        thread::sleep(Duration::from_millis(300));
        agent.apply(&with(&pods[step..step + 2]));
        cut(pods[step - 1]);
    }
    thread::sleep(long());
    for clients in clients {
        let (backends, silence) = clients.finish();
        println!("no socket was silent for longer than {silence:?}");
        assert_eq!(backends, names(pods[2..].iter().copied()));
        assert!(silence < long(), "{silence:?}\n{}", agent.log());
    }
    // Some were never on one that went.
    let ended = agent.status()["sockets"]["ended"].as_u64().unwrap();
    assert!(ended >= CLIENTS as u64 / 2, "{ended}");
}

/// The kernel ends a socket by cutting its connection, which wakes its process: that connects it once more while others are ended.
#[test]
fn a_socket_of_udp_that_is_connected_once_more_is_ended_once_more() {
    const CLIENTS: usize = 40;
    let cluster = cluster();
    let pods = [(1, 1), (1, 2), (2, 1)].map(|(i, k)| cluster.pod(i, k));
    let with = |pod| file([Service::new(1).endpoint(pod)]);
    let agent = Agent::start_on(cluster.node(1), &with(pods[0]), &[]);
    let ended = || agent.status()["sockets"]["ended"].as_u64().unwrap();
    let to = vips(1)[0];
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            cluster.node(1).host().namespace().spawn(move |stop| {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
                socket.connect(to).unwrap();
                while !stop.is_cancelled() {
                    // Nobody answers: it waits for its end.
                    if socket.recv(&mut [0; 8]).is_err_and(|error| error.kind() == ErrorKind::ConnectionAborted) {
                        socket.connect(to).unwrap();
                    }
                }
            })
        })
        .collect();
    eventually("all are connected", || watched(cluster.node(1).host()).iter().count() == CLIENTS);
    for (step, pod) in (1..).zip([pods[1], pods[2], pods[0]]) {
        agent.apply(&with(pod));
        eventually("all are ended", || ended() == (CLIENTS * step) as u64);
        eventually("all are connected again", || {
            let address = lb_common::net::words(pod.v4().into());
            watched(cluster.node(1).host())
                .iter()
                .filter(|it| it.as_ref().unwrap().1.backend_address == address)
                .count()
                == CLIENTS
        });
    }
    for client in clients {
        client.finish();
    }
}

/// The sockets that are ended when their backends go.
fn watched(host: &Host) -> HashMap<aya::maps::MapData, u64, Translation> {
    Map::HashMap(host.pinned_map("WATCHED")).try_into().unwrap()
}

#[test]
fn what_is_ended_is_what_was_asked_for() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let (host, [first, second]) = (cluster.node(1).host(), [cluster.pod(1, 1), cluster.pod(1, 2)]);
    for (ended, [ends_udp, ends_tcp]) in [("none", [false, false]), ("udp", [true, false]), ("all", [true, true])] {
        let with = |pod| file([Service::new(1).endpoint(pod)]);
        let agent = Agent::start_on(cluster.node(1), &file([]), &["--socket-lb-end", ended]);
        for to in vips(1) {
            agent.apply(&with(first));
            let mut connection = host.tcp(to).unwrap();
            let socket = host.datagrams(to.ip());
            socket.connect(to).unwrap();
            // These are none of ours.
            let straight = SocketAddr::new(first.address_like(to.ip()), TARGET_PORT);
            let mut others = (host.tcp(straight).unwrap(), host.datagrams(to.ip()));
            others.1.connect(straight).unwrap();
            agent.apply(&with(second));
            if ends_udp {
                eventually("the socket of UDP is ended", || socket.is_ended());
            } else {
                thread::sleep(Duration::from_millis(500));
                assert_eq!(socket.ask_peer().unwrap(), first.name());
            }
            if ends_tcp {
                let is_ended = || connection.echo("a line").is_err_and(|it| it.kind() == ErrorKind::ConnectionAborted);
                eventually("the connection is ended", is_ended);
            } else {
                connection.echo("a line").unwrap();
            }
            others.0.echo("a line").unwrap();
            assert_eq!(others.1.ask_peer().unwrap(), first.name());
        }
    }
}

/// Sockets that share a port, as workers do: the kernel is asked to end one by its addresses, and finds the first that has them.
#[test]
fn all_sockets_of_udp_that_share_a_port_are_ended() {
    let cluster = cluster();
    let (host, pods) = (cluster.node(1).host(), [cluster.pod(1, 1), cluster.pod(1, 2)]);
    let with = |pod| file([Service::new(1).endpoint(pod)]);
    let agent = Agent::start_on(cluster.node(1), &with(pods[0]), &[]);
    let sockets = host.namespace().run(|| {
        let sockets: [_; 5] = array::from_fn(|_| {
            let socket = socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None).unwrap();
            setsockopt(&socket, sockopt::ReusePort, &true).unwrap();
            socket::bind(socket.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, 4242)).unwrap();
            UdpSocket::from(socket)
        });
        sockets.iter().rev().for_each(|socket| socket.connect(vips(1)[0]).unwrap());
        sockets
    });
    // Then none of them may be one that is just being connected.
    thread::sleep(Duration::from_secs(4));
    agent.apply(&with(pods[1]));
    let mut left: Vec<_> = sockets.iter().collect();
    let is_ended = |socket: &UdpSocket| socket.take_error().unwrap().is_some();
    eventually("all are ended", || {
        left.retain(|socket| !is_ended(socket));
        left.is_empty()
    });
}

/// Packets of the node's own processes are not looked at, so that a call that is left to packets reaches nobody.
#[test]
fn sockets_of_udp_are_served_where_no_more_of_them_can_be_watched() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let (host, pod) = (cluster.node(1).host(), cluster.pod(1, 1));
    let _agent = Agent::start_on(cluster.node(1), &file([Service::new(1).endpoint(pod)]), &[]);
    let mut watched = watched(host);
    let open = host.datagrams(vips(1)[0].ip());
    open.connect(vips(1)[0]).unwrap();
    let example = watched.iter().next().unwrap().unwrap().1;
    // No socket has numbers like these.
    let is_full = (0..1 << 20).any(|number| watched.insert(u64::MAX - number, example, 0).is_err());
    assert!(is_full, "a million sockets are watched");
    for to in vips(1) {
        let socket = host.datagrams(to.ip());
        socket.connect(to).unwrap();
        assert_eq!((socket.peer().unwrap(), socket.ask_peer().unwrap()), (to, pod.name().to_owned()));
        assert_eq!(answers(host, to), names([pod]));
    }
}

/// The kernel's memory for a connection's service is bounded, and is not to be taken by what is over.
#[test]
fn the_service_of_a_tcp_socket_is_forgotten_with_it_and_when_it_is_connected_elsewhere() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let (host, pod) = (cluster.node(1).host(), cluster.pod(1, 1));
    let agent = Agent::start_on(cluster.node(1), &file([Service::new(1).endpoint(pod)]), &[]);
    let peers = || {
        let peers: HashMap<_, u64, Translation> = Map::LruHashMap(host.pinned_map("PEERS")).try_into().unwrap();
        peers.iter().count()
    };
    for to in vips(1) {
        let straight = SocketAddr::new(pod.address_like(to.ip()), TARGET_PORT);
        let open = host.namespace().run(|| TcpStream::connect(to)).unwrap();
        let closed = host.tcp(to).unwrap();
        let _other = host.tcp(straight).unwrap();
        assert_eq!(peers(), 2);
        drop(closed);
        assert_eq!(peers(), 1);
        assert_eq!(open.peer_addr().unwrap(), to);
        disconnect(&open).unwrap();
        assert_eq!(peers(), 1, "it may be connected to nothing for good: it goes with the socket");
        connect(open.as_raw_fd(), &SockaddrStorage::from(straight)).unwrap();
        assert_eq!((open.peer_addr().unwrap(), peers()), (straight, 0));
    }
    assert!(agent.count("socket") > 0);
}

/// Such sockets would stay on backends that are gone.
#[test]
fn connected_sockets_of_udp_are_left_to_packets_where_none_can_be_ended() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let (node, [first, second]) = (cluster.node(1), [cluster.pod(1, 1), cluster.pod(2, 1)]);
    let with = |pod| file([Service::new(1).endpoint(pod)]);
    let agent = Agent::start_at(Home::without_sock_diag(&with(first)), node, &[]);
    assert!(agent.log().contains("sock-destroy is missing: connected UDP"), "{}", agent.log());
    let status = agent.status();
    assert_eq!(status["sockets"]["attached"], SocketHook::ALL.len());
    let missing = status["sockets"]["missing"].as_array().unwrap();
    assert!(missing.len() == 1 && missing[0].as_str().unwrap().starts_with("sock-destroy: "), "{missing:?}");
    let sockets = vips(1).map(|to| {
        let socket = node.host().datagrams(to.ip());
        socket.connect(to).unwrap();
        assert_eq!((socket.peer().unwrap(), socket.ask_peer().unwrap()), (to, first.name().to_owned()));
        // It is connected to the service itself: a backend's answers would not be its peer's.
        assert_eq!(socket.ask(to).unwrap(), first.name());
        assert_eq!(answers(node.host(), to), names([first]));
        socket
    });
    assert_eq!(watched(node.host()).iter().count(), 0);
    agent.apply(&with(second));
    for socket in &sockets {
        eventually("it talks to the other one", || socket.ask_peer().is_ok_and(|backend| backend == second.name()));
    }
    // Who says that they may stay has them balanced all the same.
    drop(agent);
    let agent = Agent::start_at(Home::without_sock_diag(&with(first)), node, &["--socket-lb-end", "none"]);
    assert_eq!(agent.status()["sockets"]["missing"], json!([]));
    for to in vips(1) {
        let socket = node.host().datagrams(to.ip());
        socket.connect(to).unwrap();
        assert_eq!(socket.ask_peer().unwrap(), first.name());
        agent.apply(&with(second));
        assert_eq!(socket.ask_peer().unwrap(), first.name());
        agent.apply(&with(first));
    }
}

// Without an agent, and after it.

#[test]
fn sockets_are_balanced_without_the_agent_and_by_the_next_one_until_one_is_told_not_to() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let (node, host) = (cluster.node(1), cluster.node(1).host());
    let (pod, other) = (cluster.pod(1, 1), cluster.pod(1, 2));
    // At localhost packets are not balanced.
    let to =
        [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()].map(|ip| SocketAddr::new(ip, node_port(1)));
    let services = |pod| file([Service::new(1).everywhere().endpoint(pod)]);
    let mut agent = Agent::start_on(node, &services(pod), &[]);
    let sockets = to.map(|to| {
        let socket = host.datagrams(to.ip());
        socket.connect(to).unwrap();
        socket
    });
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        agent.signal(signal);
        agent.wait();
        for (to, socket) in to.iter().zip(&sockets) {
            assert_eq!(answers(host, *to), names([pod]));
            assert_eq!(socket.ask_peer().unwrap(), pod.name());
        }
        agent = agent.restart_on(node, &[]);
        for (to, socket) in to.iter().zip(&sockets) {
            assert_eq!(answers(host, *to), names([pod]));
            assert_eq!(socket.ask_peer().unwrap(), pod.name());
        }
    }
    // The next agent ends what was connected under the one before.
    agent.apply(&services(other));
    for socket in &sockets {
        eventually("the socket is ended", || socket.is_ended());
    }
    agent.signal(Signal::SIGTERM);
    agent.wait();
    let agent = agent.restart_on(node, &["--socket-lb", "off"]);
    for to in to {
        for call in [Call::Tcp, Call::Connected] {
            let refused = host.call(call, to).map_err(|error| error.kind());
            assert_eq!(refused, Err(ErrorKind::ConnectionRefused), "{call:?}");
        }
    }
    let status = agent.status();
    assert_eq!((&status["sockets"]["mode"], &status["sockets"]["attached"]), (&json!("off"), &json!(0)));
}

/// An agent that takes a backend away, and dies before it ends the sockets, leaves tables in which all is as it should be.
#[test]
fn sockets_that_an_agent_had_no_time_to_end_are_ended_by_the_next_one() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let (node, host, pod) = (cluster.node(1), cluster.node(1).host(), cluster.pod(1, 1));
    for arguments in [&[][..], &["--socket-lb", "off"]] {
        let mut agent = Agent::start_on(node, &file([Service::new(1).endpoint(pod)]), &[]);
        let sockets = vips(1).map(|to| {
            let socket = host.datagrams(to.ip());
            socket.connect(to).unwrap();
            socket
        });
        agent.signal(Signal::SIGKILL);
        agent.wait();
        let mut backends: Array<_, Backend> = Map::Array(host.pinned_map("BACKENDS")).try_into().unwrap();
        for (_, it) in watched(host).iter().map(Result::unwrap) {
            let backend = backends.get(&it.backend, 0).unwrap();
            backends.set(it.backend, Backend { generation: it.generation + 1, ..backend }, 0).unwrap();
        }
        agent = agent.restart_on(node, arguments);
        for socket in &sockets {
            eventually("the socket is ended", || socket.is_ended());
        }
        agent.signal(Signal::SIGTERM);
        agent.wait();
        assert!(agent.cleanup().status.success());
    }
}

#[test]
fn programs_come_and_go_with_their_agent_beside_those_of_others() {
    const HOOKS: usize = SocketHook::ALL.len();
    let cluster = cluster();
    let group = ControlGroup::new("both");
    group.attach_stranger();
    let run = |node: usize, mode: &str| {
        let arguments = ["--cgroup", group.directory(), "--socket-lb", mode];
        Agent::start_on(cluster.node(node), &file([]), &arguments)
    };
    let mut agent = run(1, "host");
    assert_eq!(group.programs(), HOOKS + 1);
    let another = run(2, "on");
    assert_eq!(group.programs(), 2 * HOOKS + 1);
    for (mode, programs) in [("on", HOOKS), ("off", 0), ("off", 0), ("host", HOOKS)] {
        agent.signal(Signal::SIGKILL);
        agent.wait();
        agent = agent.restart_on(cluster.node(1), &["--cgroup", group.directory(), "--socket-lb", mode]);
        eventually(mode, || group.programs() == HOOKS + programs + 1);
        assert_eq!(agent.status()["sockets"]["attached"], programs);
    }
    drop(another);
    eventually("those of the other are gone", || group.programs() == HOOKS + 1);
    agent.signal(Signal::SIGKILL);
    agent.wait();
    assert_eq!(group.programs(), HOOKS + 1);
    let output = agent.cleanup();
    assert!(output.status.success(), "{output:?}");
    eventually("all but a stranger's are gone", || group.programs() == 1);
}

#[test]
fn programs_move_to_another_control_group() {
    let cluster = cluster();
    let [first, second] = ["first", "second"].map(ControlGroup::new);
    let agent = Agent::start_on(cluster.node(1), &file([]), &["--cgroup", first.directory()]);
    agent.signal(Signal::SIGKILL);
    let mut agent = agent;
    agent.wait();
    let agent = agent.restart_on(cluster.node(1), &["--cgroup", second.directory()]);
    eventually("they have moved", || (first.programs(), second.programs()) == (0, SocketHook::ALL.len()));
    // One that is gone.
    agent.signal(Signal::SIGKILL);
    let mut agent = agent;
    agent.wait();
    drop(second);
    let agent = agent.restart_on(cluster.node(1), &["--cgroup", first.directory()]);
    assert_eq!(
        (first.programs(), &agent.status()["sockets"]["attached"]),
        (SocketHook::ALL.len(), &json!(SocketHook::ALL.len()))
    );
}

#[test]
fn the_root_of_all_control_groups_is_found_where_it_is_not_mounted() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let (node, pod) = (cluster.node(1), cluster.pod(1, 1));
    let services = file([Service::new(1).everywhere().endpoint(pod)]);
    let agent = Agent::start_at(Home::of_netns_exec(&services, node.host()), node, &[]);
    assert_eq!(answers(node.host(), (Ipv4Addr::LOCALHOST, node_port(1)).into()), names([pod]));
    assert_eq!(agent.status()["sockets"]["attached"], SocketHook::ALL.len());
}

#[test]
fn what_is_no_control_group_is_named_and_packets_are_balanced_all_the_same() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let pod = cluster.pod(1, 1);
    let agent = Agent::start_on(cluster.node(1), &file([Service::new(1).endpoint(pod)]), &["--cgroup", "/proc"]);
    assert!(agent.log().contains("/proc is no directory of a cgroup v2 hierarchy"), "{}", agent.log());
    assert_eq!(agent.status()["sockets"]["attached"], 0);
    for client in [cluster.client(), cluster.node(1).host()] {
        assert_eq!(client.tcp(vips(1)[0]).unwrap().backend(), pod.name());
    }
}

#[test]
fn a_hook_that_somebody_has_for_himself_is_named_and_all_others_are_used() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let group = ControlGroup::new("taken");
    group.attach_exclusive_stranger(CONNECT4);
    let (node, pod) = (cluster.node(1).host(), cluster.pod(1, 1));
    let services = file([Service::new(1).everywhere().endpoint(pod)]);
    let agent = Agent::start_on(cluster.node(1), &services, &["--cgroup", group.directory(), "--socket-lb", "on"]);
    assert!(agent.log().contains("connect4 is missing: what processes connect to"), "{}", agent.log());
    let status = agent.status();
    assert_eq!(status["sockets"]["attached"], SocketHook::ALL.len() - 1);
    let missing = status["sockets"]["missing"].as_array().unwrap();
    assert!(missing.len() == 1 && missing[0].as_str().unwrap().starts_with("connect4: "), "{missing:?}");
    let metrics = node.http("http://127.0.0.1:10249/metrics").unwrap();
    assert_eq!(metrics.metric("wharf_socket_hooks_missing"), Some(1.0));
    let shown = |to: SocketAddr| Some(BTreeSet::from([format!("{} {} {}", pod.name(), to.ip(), to.port())]));
    let [v4, v6] = vips(1);
    let connect = |host: &Host, to| python(&group, host, &KINDS[..2], to, 2);
    if connect(node, v6).is_none() {
        return;
    }
    assert_eq!(connect(node, v6), shown(v6));
    // The hook for datagrams is another one.
    assert_eq!(python(&group, node, &KINDS[2..], v4, 2), shown(v4));
    // Packets meet programs of their own: those of the node where they leave, those of pods where they come in.
    for (client, counted) in [(node, "own"), (cluster.pod(1, 2), "request-on-node")] {
        let before = agent.count(counted);
        for to in [v4, (node.v4(), node_port(1)).into()] {
            assert_eq!(connect(client, to), shown(to), "{} to {to}", client.name());
        }
        assert!(agent.count(counted) > before, "{:?}", agent.status()["counters"]);
    }
}

#[test]
fn where_answers_would_be_shown_as_the_backends_datagrams_are_left_to_packets() {
    for hook in RECVMSG {
        let cluster = cluster();
        let _servers = serve(&cluster);
        let group = ControlGroup::new("shown");
        group.attach_exclusive_stranger(hook);
        let pod = cluster.pod(1, 1);
        let services = file([Service::new(1).endpoint(pod)]);
        let agent = Agent::start_on(cluster.node(1), &services, &["--cgroup", group.directory(), "--socket-lb", "on"]);
        let missing = agent.status()["sockets"]["missing"].as_array().unwrap().len();
        assert_eq!(missing, 3, "that one, and those that send: {}", agent.log());
        for (client, counted) in [(cluster.node(1).host(), "own"), (cluster.pod(1, 2), "request-on-node")] {
            for to in vips(1) {
                let before = agent.count(counted);
                let Some(lines) = python(&group, client, &KINDS, to, 2) else { return };
                assert_eq!(lines, BTreeSet::from([format!("{} {} {}", pod.name(), to.ip(), to.port())]));
                assert!(agent.count(counted) >= before + 4, "{:?}", agent.status()["counters"]);
            }
        }
    }
}

/// What pods send is met by programs for packets only where the agent is told of their devices.
#[test]
fn sockets_of_pods_are_balanced_where_their_packets_are_not() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let group = ControlGroup::new("pods");
    let (node, [pod, remote]) = (cluster.node(1), [cluster.pod(1, 1), cluster.pod(2, 1)]);
    let mut first = Agent::start_by_default(Home::new(&file([Service::new(1).endpoint(remote)])), node);
    first.signal(Signal::SIGTERM);
    first.wait();
    let uplinks: Vec<_> = node.uplinks().iter().flat_map(|name| ["--interface", name]).collect();
    for ended in ["none", "udp"] {
        let own = ["--cgroup", group.directory(), "--socket-lb", "on", "--socket-lb-end", ended];
        let mut agent = first.relaunch(node.host(), &[&uplinks[..], &own].concat()).ready();
        for to in vips(1) {
            for kind in KINDS {
                let before = agent.count("socket");
                let Some(lines) = python(&group, pod, &[kind], to, 2) else { return };
                assert_eq!(lines, BTreeSet::from([format!("{} {} {}", remote.name(), to.ip(), to.port())]));
                assert!(agent.count("socket") > before, "{kind} to {to}: {}", agent.log());
            }
        }
        agent.signal(Signal::SIGTERM);
        agent.wait();
    }
}

// Real programs, in control groups: those of the node and of pods.

/// Runs a program to its end; what it wrote. `None`, with a reason, if it is not installed.
fn output(mut command: Command) -> Option<String> {
    let output = match command.stderr(Stdio::inherit()).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("skipped: {} is not installed", command.get_program().display());
            return None;
        }
        output => output.unwrap(),
    };
    Some(String::from_utf8(output.stdout).unwrap())
}

/// Ways to call over Python's sockets.
const KINDS: [&str; 3] = ["tcp", "connected", "unconnected"];

/// A process that calls a service so many times in each of these ways: each line that it wrote, once.
fn python(group: &ControlGroup, host: &Host, kinds: &[&str], to: SocketAddr, count: usize) -> Option<BTreeSet<String>> {
    let mut lines = BTreeSet::new();
    for kind in kinds {
        let mut command = group.command(host.namespace(), PYTHON);
        let (ip, port, count) = (to.ip().to_string(), to.port().to_string(), count.to_string());
        command.args(["-c", include_str!("sockets/call.py"), kind, &ip, &port, &count]);
        lines.extend(output(command)?.lines().map(str::to_owned));
    }
    Some(lines)
}

/// By its path, as a shim that stands for it takes time.
const PYTHON: &str = "/usr/bin/python3";

#[test]
fn processes_of_pods_are_balanced_as_those_of_the_node_where_all_are() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let group = ControlGroup::new("all");
    let exempt = group.child("exempt");
    let (host, [pod, neighbour], remote) =
        (cluster.node(1).host(), [cluster.pod(1, 1), cluster.pod(1, 2)], cluster.pod(2, 1));
    let services = file([
        Service::new(1).everywhere().endpoint(pod),
        Service::new(2).everywhere().endpoint(remote),
        Service::new(3),
        Service::new(4).endpoints([pod, remote]).set("sessionAffinity", "ClientIP"),
    ]);
    let arguments = ["--cgroup", group.directory(), "--socket-lb", "on", "--socket-lb-exempt", exempt.name()];
    let agent = Agent::start_on(cluster.node(1), &services, &arguments);
    let calls = |host: &Host, to: SocketAddr| python(&group, host, &KINDS, to, 2);
    // A socket that is not connected is not told by the kernel that there is nobody.
    let connects = |group: &ControlGroup, host: &Host, to: SocketAddr| python(group, host, &KINDS[..2], to, 1);
    let shown = |host: &Host, to: SocketAddr| BTreeSet::from([format!("{} {} {}", host.name(), to.ip(), to.port())]);
    let error = |name: &str| BTreeSet::from([name.to_owned()]);
    let before = agent.count("socket");
    for client in [host, pod, neighbour] {
        for (service, backend) in [(1, pod), (2, remote)] {
            // A pod that is its own backend is no special case.
            for to in [
                vips(service)[0],
                vips(service)[1],
                (external_ips(service)[0], PORT).into(),
                (host.v4(), node_port(service)).into(),
            ] {
                let Some(lines) = calls(client, to) else { return };
                assert_eq!(lines, shown(backend, to), "{} to {to}\n{}", client.name(), agent.log());
            }
        }
        assert_eq!(calls(client, vips(3)[0]), Some(error("ECONNREFUSED")));
        // A pod's own loopback is nobody else's.
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, node_port(2)));
        let expected = if client.name() == host.name() { shown(remote, local) } else { error("ECONNREFUSED") };
        assert_eq!(connects(&group, client, local), Some(expected));
        // By session affinity.
        assert_eq!(python(&group, client, &KINDS, vips(4)[1], 6).map(|lines| lines.len()), Some(1));
    }
    assert!(agent.count("socket") > before);
    // What is left alone.
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, node_port(1)));
    assert_eq!(connects(&exempt, host, local), Some(error("ECONNREFUSED")));
    let below = exempt.child("below");
    assert_eq!(connects(&below, host, local), Some(error("ECONNREFUSED")));
    drop(below);
    // A control group that comes later by that name is meant, too.
    let name = exempt.name().to_owned();
    drop(exempt);
    let exempt = group.child("exempt");
    assert_eq!(name, exempt.name());
    eventually("the new control group is left alone", || connects(&exempt, host, local) == Some(error("ECONNREFUSED")));
}

/// Ends a program when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail if it has ended, which is what they are for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn sockets_of_pods_that_lose_their_backend_are_ended_too() {
    let cluster = cluster();
    let _servers = serve(&cluster);
    let group = ControlGroup::new("ended");
    let (client, [first, second]) = (cluster.pod(1, 2), [cluster.pod(1, 1), cluster.pod(2, 1)]);
    let with = |pod| file([Service::new(1).endpoint(pod)]);
    let arguments = ["--cgroup", group.directory(), "--socket-lb", "on"];
    let agent = Agent::start_on(cluster.node(1), &with(first), &arguments);
    let mut talkers = Vec::new();
    for to in vips(1) {
        let mut command = group.command(client.namespace(), PYTHON);
        command.args(["-c", include_str!("sockets/stay.py"), &to.ip().to_string(), &to.port().to_string(), "50"]);
        let Ok(mut child) = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
            println!("skipped: python3 is not installed");
            return;
        };
        let ends = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        talkers.push((Running(child), ends));
    }
    let mut ask = || {
        let mut lines = Vec::new();
        for (_, (stdin, stdout)) in &mut talkers {
            stdin.write_all(b"\n").unwrap();
            let mut line = String::new();
            stdout.read_line(&mut line).unwrap();
            let (silence, backends) = line.trim_end().split_once(' ').unwrap();
            lines.push((Duration::from_millis(silence.parse().unwrap()), backends.to_owned()));
        }
        lines
    };
    eventually("all are answered", || ask().into_iter().all(|(_, backends)| backends == first.name()));
    ask();
    agent.apply(&with(second));
    cut(first);
    thread::sleep(long());
    for (silence, backends) in ask() {
        println!("no socket was silent for longer than {silence:?}");
        assert_eq!(backends, second.name(), "{}", agent.log());
        assert!(silence < long(), "{silence:?}");
    }
    assert_eq!(agent.status()["sockets"]["ended"], 100);
    // A thread that stayed would keep the pod's devices.
    let namespace = |path: String| fs::read_link(path).unwrap();
    let own = namespace(format!("/proc/{}/ns/net", agent.pid()));
    for thread in fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap() {
        assert_eq!(namespace(format!("{}/ns/net", thread.unwrap().path().display())), own);
    }
}

/// As where a runtime makes a namespace, and nobody is in it, or one thread of many.
#[test]
fn sockets_are_ended_in_namespaces_that_no_process_is_in() {
    let cluster = cluster();
    let group = ControlGroup::new("left");
    let (client, [first, second]) = (cluster.pod(1, 2), [cluster.pod(1, 1), cluster.pod(2, 1)]);
    let with = |pod| file([Service::new(1).endpoint(pod)]);
    let arguments = ["--cgroup", group.directory(), "--socket-lb", "on"];
    let agent = Agent::start_on(cluster.node(1), &with(first), &arguments);
    let mut clients = Vec::new();
    for to in vips(1) {
        let mut command = group.command(client.namespace(), PYTHON);
        command.args(["-c", include_str!("sockets/leave.py"), &to.ip().to_string(), &to.port().to_string()]);
        let Ok(mut child) = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
            println!("skipped: python3 is not installed");
            return;
        };
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "left\n");
        clients.push(Running(child));
    }
    agent.apply(&with(second));
    eventually("both are ended", || agent.status()["sockets"]["ended"] == clients.len());
}

#[test]
fn real_programs_reach_services() {
    let cluster = cluster();
    let (host, pod) = (cluster.node(1).host(), cluster.pod(2, 1));
    let group = ControlGroup::new("programs");
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("name"), "a page").unwrap();
    let mut server = pod.namespace().command(PYTHON);
    server.args(["-c", include_str!("sockets/web.py"), &TARGET_PORT.to_string()]).current_dir(directory.path());
    let Ok(server) = server.stderr(Stdio::null()).stdout(Stdio::null()).spawn() else {
        println!("skipped: python3 is not installed");
        return;
    };
    let _server = Running(server);
    eventually("it listens", || pod.namespace().run(|| TcpStream::connect(("::1", TARGET_PORT))).is_ok());
    let dns = pod.namespace().run(|| UdpSocket::bind(("::", 5353)).unwrap());
    let _dns = pod.namespace().spawn(move |stop| answer_names(&dns, &stop));
    let ports = json!([
        { "name": "http", "port": PORT, "targetPort": TARGET_PORT },
        { "name": "dns", "port": 53, "targetPort": 5353, "protocol": "UDP" },
    ]);
    let services = file([Service::new(1).endpoint(pod).set("ports", ports)]);
    let arguments = ["--cgroup", group.directory(), "--socket-lb", "on"];
    let _agent = Agent::start_on(cluster.node(1), &services, &arguments);
    for client in [host, cluster.pod(1, 1)] {
        for ip in cluster_ips(1) {
            let url = format!("http://{}/name", SocketAddr::new(ip, PORT));
            let mut curl = group.command(client.namespace(), "curl");
            curl.args(["--silent", "--show-error", "--write-out", " from %{remote_ip}", &url]);
            if let Some(page) = output(curl) {
                assert_eq!(page, format!("a page from {ip}"));
            }
            // The C library's own client of DNS, which has a resolv.conf of its own.
            let resolv = directory.path().join("resolv.conf");
            fs::write(&resolv, format!("nameserver {ip}\noptions timeout:5 attempts:2\n")).unwrap();
            let script = "mount --bind \"$0\" /etc/resolv.conf && getent ahostsv4 www.wharf.test";
            let mut getent = group.command(client.namespace(), "unshare");
            getent.args(["--mount", "sh", "-c", script]).arg(&resolv);
            let found = output(getent).unwrap();
            assert!(found.starts_with("192.0.2.53"), "{found:?}");
        }
    }
}

/// A DNS server that knows one address (RFC 1035, section 4.1).
fn answer_names(socket: &UdpSocket, stop: &CancellationToken) {
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut buffer = [0; 512];
    while !stop.is_cancelled() {
        let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
        // The question ends with the end of its name, a type and a class; what else was asked along is not answered.
        let name = buffer[12..length].iter().position(|byte| *byte == 0).unwrap();
        let question = &buffer[12..12 + name + 5];
        let head = [&buffer[..2], &[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]].concat();
        let record = [0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 53];
        socket.send_to(&[&head, question, &record[..]].concat(), client).unwrap();
    }
}
