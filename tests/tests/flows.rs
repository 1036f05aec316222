//! Real sockets through the real agent: what clients and backends see of it, in good days and bad ones.
use std::{
    collections::{BTreeMap, HashSet},
    io::ErrorKind,
    iter,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use tests::{
    SOON,
    agent::Agent,
    eventually, poll,
    probe::{TIMEOUT, Tally, assert_spread, assert_weighted_spread},
    topology::{Host, Lab, Topology, VIP4, VIP6},
    traffic::{Arrivals, Conversations},
};

/// Time for some traffic.
const MOMENT: Duration = Duration::from_millis(300);

/// Both virtual addresses, with a port.
fn vips(port: u16) -> [SocketAddr; 2] {
    [(VIP4, port).into(), (VIP6, port).into()]
}

/// Both kinds of network.
fn labs(backends: u8) -> [Lab; 2] {
    [Topology::new().backends(backends).up(), Topology::new().backends(backends).one_armed().up()]
}

/// A services file: port 80 of the virtual addresses, over TCP and UDP, with port 8080 of the backends in turn.
fn web<'a>(backends: impl IntoIterator<Item = &'a Host>) -> String {
    weighted_web(backends.into_iter().map(|backend| (backend, 1)))
}

fn weighted_web<'a>(backends: impl IntoIterator<Item = (&'a Host, u16)>) -> String {
    format!("services:\n{}", service(80, "round-robin", backends))
}

/// One service of a services file.
fn service<'a>(port: u16, algorithm: &str, backends: impl IntoIterator<Item = (&'a Host, u16)>) -> String {
    let backends = backends.into_iter().flat_map(|(host, weight)| {
        host.addresses().map(move |address| format!("{{ address: \"{address}\", weight: {weight} }}"))
    });
    let backends = backends.collect::<Vec<_>>().join(", ");
    format!(
        "  - name: at-{port}
    addresses: [{VIP4}, \"{VIP6}\"]
    ports:
      - {{ name: tcp, port: {port}, targetPort: 8080, protocol: TCP }}
      - {{ name: udp, port: {port}, targetPort: 8080, protocol: UDP }}
    algorithm: {algorithm}
    backends: [{backends}]\n"
    )
}

/// The host's address of the same family.
fn address_for(host: &Host, other: SocketAddr) -> IpAddr {
    if other.is_ipv4() { host.v4().into() } else { host.v6().into() }
}

/// Asserts that every attempt was answered, and by whom exactly.
#[track_caller]
fn assert_answers(tally: &Tally, expected: &[(&str, usize)]) {
    assert!(tally.errors.is_empty(), "{tally}");
    let expected = expected.iter().map(|&(backend, count)| (backend.to_owned(), count)).collect::<BTreeMap<_, _>>();
    assert_eq!(tally.answers, expected);
}

// Which backend.

#[test]
fn random_and_maglev_spread_evenly() {
    for lab in labs(3) {
        let _servers = lab.serve(8080);
        let all = || lab.backends().iter().zip(iter::repeat(1));
        let file = ["services:\n", &service(80, "random", all()), &service(81, "maglev", all())].concat();
        let _agent = Agent::start(&lab, &file, &[]);
        for vip in [vips(80), vips(81)].concat() {
            assert_spread(&lab.client().get_many(vip, 300, 16), &["b1", "b2", "b3"]);
            assert_spread(&lab.client().ask_many(vip, 300, 16), &["b1", "b2", "b3"]);
        }
    }
}

#[test]
fn round_robin_takes_turns() {
    for lab in labs(3) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        for vip in vips(80) {
            assert_answers(&lab.client().get_many(vip, 30, 1), &[("b1", 10), ("b2", 10), ("b3", 10)]);
            assert_answers(&lab.client().ask_many(vip, 30, 1), &[("b1", 10), ("b2", 10), ("b3", 10)]);
        }
    }
}

#[test]
fn source_hash_spreads_clients_and_keeps_each_where_it_is() {
    let lab = Topology::new().backends(3).up();
    let _servers = lab.serve(8080);
    let all = lab.backends().iter().zip(iter::repeat(1));
    let _agent = Agent::start(&lab, &format!("services:\n{}", service(80, "source-hash", all)), &[]);
    let [v4, v6] = vips(80);
    for (vip, prefix, flag) in [(v4, "192.168.1.", ""), (v6, "fd01:1::", "nodad")] {
        let addresses = || (100..200).map(|number| format!("{prefix}{number}").parse::<IpAddr>().unwrap());
        let add = addresses().map(|address| format!("addr add {address} dev eth0 {flag}"));
        lab.client().namespace().ip(&add.collect::<Vec<_>>().join("\n"));
        let mut tally = Tally::default();
        for address in addresses() {
            let tcp = |port| lab.client().tcp_from((address, port), vip).unwrap().backend().to_owned();
            let udp = |port| lab.client().udp_from((address, port), vip).unwrap().ask("who?").unwrap();
            let backend = tcp(1);
            assert_eq!([tcp(2), tcp(3), udp(1), udp(2), udp(3)], [(); 5].map(|()| backend.clone()), "for {address}");
            tally.count(Ok(backend));
        }
        assert_spread(&tally, &["b1", "b2", "b3"]);
    }
}

#[test]
fn weights_are_shares() {
    let lab = Topology::new().backends(3).up();
    let _servers = lab.serve(8080);
    let all = || lab.backends().iter().zip([1, 2, 5]);
    let file = [service(80, "round-robin", all()), service(81, "random", all()), service(82, "maglev", all())].concat();
    let _agent = Agent::start(&lab, &format!("services:\n{file}"), &[]);
    for vip in vips(80) {
        assert_answers(&lab.client().get_many(vip, 40, 1), &[("b1", 5), ("b2", 10), ("b3", 25)]);
        assert_answers(&lab.client().ask_many(vip, 40, 1), &[("b1", 5), ("b2", 10), ("b3", 25)]);
    }
    for vip in [vips(81), vips(82)].concat() {
        assert_weighted_spread(&lab.client().get_many(vip, 400, 16), &[("b1", 1), ("b2", 2), ("b3", 5)]);
        assert_weighted_spread(&lab.client().ask_many(vip, 400, 16), &[("b1", 1), ("b2", 2), ("b3", 5)]);
    }
}

// Backends come and go.

#[test]
fn a_removed_backend_gets_no_new_connections_and_the_others_keep_theirs() {
    for lab in labs(3) {
        let _servers = lab.serve(8080);
        let (client, agent) = (lab.client(), Agent::start(&lab, &web(lab.backends()), &[]));
        let conversations = vips(80).map(|vip| client.converse(vip, 6));
        for edit in [Agent::edit, Agent::edit_in_place] {
            agent.wait_until_applied(|| edit(&agent, &web([lab.backend(1), lab.backend(2)])));
            for vip in vips(80) {
                assert_answers(&client.get_many(vip, 20, 1), &[("b1", 10), ("b2", 10)]);
            }
            agent.wait_until_applied(|| edit(&agent, &web(lab.backends())));
            for vip in vips(80) {
                assert_answers(&client.get_many(vip, 30, 1), &[("b1", 10), ("b2", 10), ("b3", 10)]);
            }
        }
        for outcome in conversations.into_iter().flat_map(Conversations::finish) {
            assert!(outcome.backend == "b3" || outcome.end.is_ok(), "{outcome:?}");
        }
    }
}

#[test]
fn no_connection_fails_while_backends_change() {
    for lab in labs(3) {
        let _servers = lab.serve(8080);
        let agent = Agent::start(&lab, &web(lab.backends()), &[]);
        let arrivals = vips(80).map(|vip| lab.client().keep_calling(vip));
        for _ in 0..10 {
            agent.apply(&web([lab.backend(2), lab.backend(3)]));
            agent.apply(&web([lab.backend(1), lab.backend(2)]));
        }
        for tally in arrivals.map(Arrivals::finish) {
            assert!(tally.errors.is_empty(), "{tally}");
            assert_eq!(tally.answers.keys().collect::<Vec<_>>(), ["b1", "b2", "b3"]);
        }
    }
}

#[test]
fn a_drained_backend_keeps_what_it_has_and_gets_nothing_new() {
    let lab = Topology::new().backends(2).up();
    let _servers = lab.serve(8080);
    let (client, agent) = (lab.client(), Agent::start(&lab, &web(lab.backends()), &[]));
    let conversations = vips(80).map(|vip| client.converse(vip, 2));
    let flows = vips(80).map(|vip| [client.udp(vip).unwrap(), client.udp(vip).unwrap()]);
    let before = flows.each_ref().map(|flows| flows.each_ref().map(|flow| flow.ask("before").unwrap()));
    agent.apply(&weighted_web([(lab.backend(1), 1), (lab.backend(2), 0)]));
    for vip in vips(80) {
        assert_answers(&client.get_many(vip, 10, 1), &[("b1", 10)]);
        assert_answers(&client.ask_many(vip, 10, 1), &[("b1", 10)]);
    }
    let after = flows.each_ref().map(|flows| flows.each_ref().map(|flow| flow.ask("after").unwrap()));
    assert_eq!(before, after);
    for conversations in conversations {
        assert_eq!(conversations.stuck(SOON), Vec::<&str>::new());
        let outcomes = conversations.finish();
        assert!(outcomes.iter().any(|outcome| outcome.backend == "b2"), "{outcomes:?}");
        assert!(outcomes.iter().all(|outcome| outcome.end.is_ok()), "{outcomes:?}");
    }
}

#[test]
fn a_udp_flow_leaves_a_removed_backend_with_its_next_datagram() {
    let lab = Topology::new().backends(2).up();
    let _servers = lab.serve(8080);
    let agent = Agent::start(&lab, &web(lab.backends()), &[]);
    let flows = [vips(80), vips(80)].concat().into_iter().map(|vip| lab.client().udp(vip).unwrap()).collect::<Vec<_>>();
    let ask = || flows.iter().map(|flow| flow.ask("who?").unwrap()).collect::<Vec<_>>();
    let before = ask();
    assert_eq!(before.iter().filter(|backend| *backend == "b1").count(), 2, "turn by turn in each family");
    agent.apply(&web([lab.backend(2)]));
    assert_eq!(ask(), ["b2"; 4]);
    agent.apply(&web(lab.backends()));
    assert_eq!(ask(), ["b2"; 4]);
}

#[test]
fn udp_recovers_when_the_last_backend_returns() {
    let lab = Topology::new().backends(1).up();
    let _servers = lab.serve(8080);
    let agent = Agent::start(&lab, &web(lab.backends()), &[]);
    let flows = vips(80).map(|vip| lab.client().udp(vip).unwrap());
    assert_eq!(flows.each_ref().map(|flow| flow.ask("before").unwrap()), ["b1", "b1"]);
    agent.apply(&web([]));
    for flow in &flows {
        assert_eq!(flow.ask("nobody").unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(agent.count("refused-no-backend"), 2);
    agent.apply(&web(lab.backends()));
    assert_eq!(flows.each_ref().map(|flow| flow.ask("after").unwrap()), ["b1", "b1"]);
}

#[test]
fn udp_recovers_when_its_service_returns() {
    let lab = Topology::new().backends(1).up();
    let _servers = lab.serve(8080);
    let agent = Agent::start(&lab, &web(lab.backends()), &[]);
    let flows = vips(80).map(|vip| lab.client().udp(vip).unwrap());
    assert_eq!(flows.each_ref().map(|flow| flow.ask("before").unwrap()), ["b1", "b1"]);
    agent.apply("services: []");
    for flow in &flows {
        // To the stack it is no address at all, and that says so.
        flow.ask("nobody").unwrap_err();
    }
    agent.apply(&web(lab.backends()));
    assert_eq!(flows.each_ref().map(|flow| flow.ask("after").unwrap()), ["b1", "b1"]);
}

/// From one source port: were the refused attempt remembered, the next one would not find the backend.
#[test]
fn a_connection_is_refused_as_long_as_there_is_no_backend() {
    let lab = Topology::new().backends(1).up();
    let _servers = lab.serve(8080);
    let agent = Agent::start(&lab, &web([]), &[]);
    let connect = |vip| lab.client().tcp_from((address_for(lab.client(), vip), 4242), vip);
    for vip in vips(80) {
        assert_eq!(connect(vip).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(agent.count("refused-no-backend"), 2);
    agent.apply(&web(lab.backends()));
    for vip in vips(80) {
        assert_eq!(connect(vip).unwrap().backend(), "b1");
    }
}

// Addresses and ports.

#[test]
fn clients_that_share_source_ports_do_not_mix() {
    for topology in [Topology::new(), Topology::new().one_armed()] {
        let lab = topology.client("alice").client("bob").backends(1).up();
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        for vip in vips(80) {
            let call = |client: &Host| {
                let from = |port| (address_for(client, vip), port);
                let tcp = |port| client.tcp_from(from(port), vip).unwrap();
                let udp = |port| client.udp_from(from(port), vip).unwrap();
                (20_000..20_200).map(|port| (tcp(port), udp(port))).collect::<Vec<_>>()
            };
            let (alice, bob) = thread::scope(|scope| {
                let alice = scope.spawn(|| call(&lab.clients()[0]));
                let bob = call(&lab.clients()[1]);
                (alice.join().unwrap(), bob)
            });
            let (mut by_tcp, mut by_udp) = (HashSet::new(), HashSet::new());
            for (number, (mut connection, datagrams)) in alice.into_iter().chain(bob).enumerate() {
                connection.echo(&number.to_string()).unwrap();
                datagrams.ask(&number.to_string()).unwrap();
                by_tcp.insert(connection.whoami().unwrap());
                by_udp.insert(datagrams.whoami().unwrap().1);
            }
            assert_eq!((by_tcp.len(), by_udp.len()), (400, 400), "each has a port of its own");
        }
    }
}

#[test]
fn services_that_share_a_backend_do_not_mix() {
    let lab = Topology::new().backends(1).up();
    let _servers = lab.serve(8080);
    let one = || [(lab.backend(1), 1)];
    let file = ["services:\n", &service(80, "random", one()), &service(81, "random", one())].concat();
    let _agent = Agent::start(&lab, &file, &[]);
    for (first, second) in vips(80).into_iter().zip(vips(81)) {
        let from = |port| (address_for(lab.client(), first), port);
        let open = |port| [first, second].map(|vip| lab.client().tcp_from(from(port), vip).unwrap());
        let connections = (20_000..20_200).map(open).collect::<Vec<_>>();
        let mut seen = HashSet::new();
        for (number, mut connection) in connections.into_iter().flatten().enumerate() {
            connection.echo(&number.to_string()).unwrap();
            seen.insert(connection.whoami().unwrap());
        }
        assert_eq!(seen.len(), 400, "each has a port of its own");
    }
}

/// Both would be the same to the backend if the flow kept the client's port, as it does where nobody has it.
#[test]
fn connections_of_the_balancer_itself_stay_its_own() {
    for lab in labs(1) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        for (vip, backend) in vips(80).into_iter().zip(lab.backend(1).addresses()) {
            let mut own = lab.lb().tcp((backend, 8080)).unwrap();
            let port = own.local_address().unwrap().port();
            let mut other = lab.client().tcp_from((address_for(lab.client(), vip), port), vip).unwrap();
            assert_ne!(other.whoami().unwrap().port(), port);
            own.echo("a line").unwrap();
        }
    }
}

#[test]
fn a_source_port_may_be_used_again_at_once() {
    for lab in labs(2) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        for vip in vips(80) {
            let mut tally = Tally::default();
            for _ in 0..20 {
                let connection = lab.client().tcp_from((address_for(lab.client(), vip), 4242), vip).unwrap();
                tally.count(Ok(connection.backend().to_owned()));
                connection.reset();
            }
            assert_answers(&tally, &[("b1", 10), ("b2", 10)]);
        }
    }
}

#[test]
fn a_backend_sees_the_balancer() {
    for lab in labs(1) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        for vip in vips(80) {
            // Its address on the link to the backend, which in a routed lab is the last.
            let own = lab.lb().addresses().filter(|address| address.is_ipv4() == vip.is_ipv4()).last().unwrap();
            let mut connection = lab.client().tcp(vip).unwrap();
            let kept = connection.local_address().unwrap().port();
            assert_eq!(connection.whoami().unwrap(), SocketAddr::new(own, kept));
            assert_eq!(lab.client().udp(vip).unwrap().whoami().unwrap().1.ip(), own);
        }
    }
}

/// What comes back to it by the balancer is from the balancer, not from itself, whose packets it would not take.
#[test]
fn a_backend_may_be_its_own_client() {
    for lab in labs(1) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        for vip in vips(80) {
            let mut connection = lab.backend(1).tcp(vip).unwrap();
            connection.echo(&"a long line ".repeat(100_000)).unwrap();
            assert!(lab.lb().addresses().any(|own| own == connection.whoami().unwrap().ip()));
            assert_eq!(lab.backend(1).udp(vip).unwrap().ask("who?").unwrap(), "b1");
        }
    }
}

/// A connected socket takes nothing else, so it takes one that is not.
#[test]
fn a_client_is_answered_from_where_it_asked() {
    for lab in labs(1) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        let socket = lab.client().namespace().run(|| UdpSocket::bind("[::]:0")).unwrap();
        socket.set_read_timeout(Some(*TIMEOUT)).unwrap();
        for vip in vips(80) {
            socket.send_to(b"who?", vip).unwrap();
            let (_, from) = socket.recv_from(&mut [0; 16]).unwrap();
            assert_eq!(SocketAddr::new(from.ip().to_canonical(), from.port()), vip);
        }
    }
}

// The network changes.

/// The balancer forgets its neighbours last. One that speaks to it right after that, be it to ask for a neighbour of its own, is known
/// again without a question: then all forget once more.
#[test]
fn unknown_neighbours_are_found() {
    for lab in labs(1) {
        let _servers = lab.serve(8080);
        let agent = Agent::start(&lab, &web(lab.backends()), &[]);
        let is_asked_for = |traffic: &dyn Fn()| {
            let before = agent.count("neighbour-unresolved");
            for host in lab.clients().iter().chain(lab.backends()).chain([lab.lb()]) {
                host.namespace().ip("neigh flush all");
            }
            traffic();
            agent.count("neighbour-unresolved") > before
        };
        for vip in vips(80) {
            let connection = || lab.client().tcp(vip).unwrap().echo("a line").unwrap();
            let datagram = || assert_eq!(lab.client().udp(vip).unwrap().ask("a datagram").unwrap(), "b1");
            eventually("the stack is asked for a connection", || is_asked_for(&connection));
            eventually("the stack is asked for a datagram", || is_asked_for(&datagram));
        }
    }
}

#[test]
fn connections_outlive_forgotten_neighbours() {
    for lab in labs(2) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        let conversations = vips(80).map(|vip| lab.client().converse(vip, 4));
        for _ in 0..5 {
            lab.flush_neighbours();
            thread::sleep(MOMENT);
        }
        conversations.into_iter().for_each(Conversations::expect_unharmed);
    }
}

#[test]
fn a_backend_may_change_its_ethernet_address() {
    for lab in labs(1) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        let conversations = vips(80).map(|vip| lab.client().converse(vip, 2));
        let backend = lab.backend(1).namespace();
        // As a failover or the move of a virtual machine does, it says so.
        backend.sysctl("ipv4/conf/eth0/arp_notify", "1");
        backend.sysctl("ipv6/conf/eth0/ndisc_notify", "1");
        backend.ip("link set eth0 address 02:00:00:00:00:99");
        thread::sleep(MOMENT);
        conversations.into_iter().for_each(Conversations::expect_unharmed);
    }
}

#[test]
fn a_new_address_of_the_balancer_is_taken_up() {
    let lab = Topology::new().backends(1).up();
    let _servers = lab.serve(8080);
    let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
    let [v4, v6] = vips(80);
    for (vip, old, new, prefix) in [(v4, "10.1.0.1", "10.1.0.9", 24), (v6, "fd00:1::1", "fd00:1::9", 64)] {
        let seen = || Some(lab.client().tcp(vip).ok()?.whoami().ok()?.ip().to_string());
        assert_eq!(seen().as_deref(), Some(old));
        let change = format!("addr del {old}/{prefix} dev eth-b1\naddr add {new}/{prefix} dev eth-b1");
        lab.lb().namespace().ip(&change);
        eventually("the backend sees the new address", || seen().as_deref() == Some(new));
    }
}

/// The other path is by another backend, which is the proof that it is taken: no packet gets through once that one
/// ceases to forward.
#[test]
fn connections_follow_a_route() {
    let lab = Topology::new().backends(2).one_armed().up();
    let (backend, detour) = (lab.backend(1), lab.backend(2));
    let _servers = lab.serve(8080);
    let _agent = Agent::start(&lab, &web([backend]), &[]);
    let routes = |verb: &str| {
        let by = |to: IpAddr, via: IpAddr| format!("route {verb} {to} via {via}\n");
        let both = [by(backend.v4().into(), detour.v4().into()), by(backend.v6().into(), detour.v6().into())];
        lab.lb().namespace().ip(&both.concat());
    };
    let forward = |value: &str| {
        detour.namespace().sysctl("ipv4/conf/eth0/forwarding", value);
        detour.namespace().sysctl("ipv6/conf/all/forwarding", value);
    };
    detour.namespace().sysctl("ipv4/conf/all/send_redirects", "0");
    detour.namespace().sysctl("ipv4/conf/eth0/send_redirects", "0");
    forward("1");
    let conversations = vips(80).map(|vip| lab.client().converse(vip, 2));
    let all_alive = || conversations.iter().all(|conversations| conversations.stuck(SOON).is_empty());
    routes("add");
    thread::sleep(MOMENT);
    assert!(all_alive(), "by the detour");
    // For less time than TCP takes to despair.
    forward("0");
    thread::sleep(MOMENT / 3);
    for conversations in &conversations {
        assert_eq!(conversations.stuck(MOMENT / 3), ["b1", "b1"]);
    }
    routes("del");
    thread::sleep(MOMENT);
    conversations.into_iter().for_each(Conversations::expect_unharmed);
}

#[test]
fn what_is_not_for_a_service_is_left_to_the_stack() {
    for lab in labs(1) {
        let _servers = (lab.serve(8080), lab.lb().serve(22));
        let agent = Agent::start(&lab, &web(lab.backends()), &[]);
        for own in [IpAddr::from(lab.lb().v4()), lab.lb().v6().into()] {
            lab.client().ping(own).unwrap();
            assert_eq!(lab.client().tcp((own, 22)).unwrap().backend(), "lb");
            assert_eq!(lab.client().udp((own, 22)).unwrap().ask("who?").unwrap(), "lb");
        }
        for backend in lab.backend(1).addresses() {
            lab.lb().ping(backend).unwrap();
            assert_eq!(lab.lb().tcp((backend, 8080)).unwrap().backend(), "b1");
            // Straight to the backend: routed, and not translated.
            let mut connection = lab.client().tcp((backend, 8080)).unwrap();
            assert_eq!(connection.whoami().unwrap(), connection.local_address().unwrap());
        }
        assert!(agent.count("other-icmp") > 0 && agent.count("not-service") > 0);
        assert_eq!(agent.count("tx") + agent.count("redirect"), 0);
    }
}

// Much of it.

#[test]
fn megabytes_arrive_as_they_were_sent() {
    for lab in labs(1) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        let line = (0..600_000).map(|number| number.to_string()).collect::<Vec<_>>().join(" ");
        for vip in vips(80) {
            lab.client().tcp(vip).unwrap().echo(&line).unwrap();
        }
    }
}

#[test]
fn a_datagram_may_fill_the_frame() {
    const MTU: usize = 1500;
    for lab in labs(1) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        for (vip, headers) in vips(80).into_iter().zip([20 + 8, 40 + 8]) {
            // The answer is longer by the name and a space.
            let answer = MTU - headers;
            lab.client().udp(vip).unwrap().ask(&"x".repeat(answer - "b1 ".len())).unwrap();
        }
    }
}

#[test]
fn two_thousand_connections_are_open_at_once() {
    let descriptors = tests::raise_descriptor_limit();
    if descriptors < 10_000 {
        println!("skipped: this process may have {descriptors} file descriptors, and needs 10,000");
        return;
    }
    for lab in labs(3) {
        let _servers = lab.serve(8080);
        let _agent = Agent::start(&lab, &web(lab.backends()), &[]);
        let open = (0..1000).flat_map(|_| vips(80)).map(|vip| lab.client().tcp(vip).unwrap());
        let mut connections: Vec<_> = open.collect();
        for (number, connection) in connections.iter_mut().enumerate() {
            connection.echo(&format!("line {number}")).unwrap();
        }
    }
}

// The life of an agent.

#[test]
fn a_broken_file_changes_nothing() {
    let lab = Topology::new().backends(1).up();
    let _servers = lab.serve(8080);
    let good = web(lab.backends());
    let agent = Agent::start(&lab, &good, &[]);
    let conversations = vips(80).map(|vip| lab.client().converse(vip, 1));
    agent.edit_in_place(&good.replace("port: 80,", "port: 80000,"));
    eventually("the mistake is told", || !agent.status()["servicesError"].is_null());
    let error = agent.status()["servicesError"].as_str().unwrap().to_owned();
    let place = format!("{}:5:28: services[0].ports[0].port: 80000 is not a port", agent.services_file().display());
    assert!(error.starts_with(&place), "{error}");
    assert!(agent.log().contains(&error));
    for vip in vips(80) {
        assert_answers(&lab.client().get_many(vip, 3, 1), &[("b1", 3)]);
    }
    agent.apply(&good);
    assert_eq!(agent.status()["servicesError"], Value::Null);
    conversations.into_iter().for_each(Conversations::expect_unharmed);
}

#[test]
fn a_file_that_does_not_fit_changes_nothing() {
    let lab = Topology::new().backends(2).up();
    let _servers = lab.serve(8080);
    // Two protocols in two families.
    let agent = Agent::start(&lab, &web([lab.backend(1)]), &["--max-backends", "4"]);
    agent.edit(&web(lab.backends()));
    eventually("the lack of room is told", || !agent.status()["servicesError"].is_null());
    let error = agent.status()["servicesError"].as_str().unwrap().to_owned();
    assert!(error.contains("needs 8 entries and 4 are there") && error.contains("--max-backends"), "{error}");
    for vip in vips(80) {
        assert_answers(&lab.client().get_many(vip, 3, 1), &[("b1", 3)]);
    }
}

#[test]
fn sighup_reads_the_file_again() {
    let lab = Topology::new().up();
    let agent = Agent::start(&lab, "services: []", &[]);
    agent.wait_until_applied(|| agent.signal(Signal::SIGHUP));
    agent.stop();
}

#[test]
fn without_its_file_the_agent_goes_on() {
    let lab = Topology::new().backends(2).up();
    let _servers = lab.serve(8080);
    let agent = Agent::start(&lab, &web([lab.backend(1)]), &[]);
    agent.remove_services();
    eventually("the loss is told", || {
        agent.status()["servicesError"].as_str().is_some_and(|e| e.contains("No such file"))
    });
    assert_answers(&lab.client().get_many(vips(80)[0], 3, 1), &[("b1", 3)]);
    agent.wait_until_applied(|| agent.edit(&web([lab.backend(2)])));
    assert_answers(&lab.client().get_many(vips(80)[0], 3, 1), &[("b2", 3)]);
    assert_eq!(agent.status()["servicesError"], Value::Null);
}

#[test]
fn a_second_agent_is_refused_and_the_first_goes_on() {
    let lab = Topology::new().backends(1).up();
    let _servers = lab.serve(8080);
    let agent = Agent::start(&lab, &web(lab.backends()), &[]);
    let mut second = agent.launch_another(&lab, &[]);
    assert_eq!(second.wait().code(), Some(1));
    let error = format!("error: another wharf is running: it listens on {}", agent.admin_socket().display());
    assert!(second.log().contains(&error), "{}", second.log());
    assert_answers(&lab.client().get_many(vips(80)[0], 3, 1), &[("b1", 3)]);
}

#[test]
fn a_missing_interface_is_named() {
    let lab = Topology::new().up();
    let mut agent = Agent::launch(&lab, "services: []", &["--interface", "eth9"]);
    assert_eq!(agent.wait().code(), Some(1));
    assert!(agent.log().contains("error: there is no network interface eth9"), "{}", agent.log());
    lab.lb().assert_no_programs();
}

#[test]
fn an_agent_does_not_start_with_a_broken_file() {
    let lab = Topology::new().up();
    let mut agent = Agent::launch(&lab, "services: [{ name: web }]", &[]);
    assert_eq!(agent.wait().code(), Some(1));
    let error = format!("error: {}:1:12: services[0].addresses: missing", agent.services_file().display());
    assert!(agent.log().contains(&error), "{}", agent.log());
    assert!(!agent.admin_socket().exists());
}

#[test]
fn generic_mode_balances_too() {
    for lab in labs(2) {
        let _servers = lab.serve(8080);
        let agent = Agent::start(&lab, &web(lab.backends()), &["--xdp", "generic"]);
        assert_eq!(agent.status()["interfaces"][0]["xdp"], "generic");
        for vip in vips(80) {
            assert_answers(&lab.client().get_many(vip, 10, 1), &[("b1", 5), ("b2", 5)]);
            assert_answers(&lab.client().ask_many(vip, 10, 1), &[("b1", 5), ("b2", 5)]);
        }
    }
}

/// How fast that goes is shown, and judged by people: it depends on the machine, and on what else it does.
#[test]
fn a_quarter_of_a_million_backends_are_taken_up() {
    let lab = Topology::new().backends(2).up();
    let _servers = lab.serve(8080);
    let agent = Agent::start(&lab, &web([lab.backend(2)]), &[]);
    let many = many_services(4_999, 50);
    let took = |file: String, backend: &str| {
        let begin = Instant::now();
        agent.edit(&file);
        let answers = || lab.client().tcp(vips(80)[0]).is_ok_and(|connection| connection.backend() == backend);
        assert!(poll(6 * SOON, || answers().then_some(())).is_some(), "{backend} does not answer");
        begin.elapsed()
    };
    let all = took(web([lab.backend(1)]) + &many, "b1");
    let one = took(web([lab.backend(2)]) + &many, "b2");
    let services = agent.ask("services");
    assert_eq!(services.as_array().unwrap().len(), 4_999 + 4, "one for each protocol and family");
    println!("5,000 services with 250,000 backends: all took {all:.2?}, then one change {one:.2?}, and of that");
    agent.log().lines().filter(|line| line.contains("services applied")).for_each(|line| println!("  {line}"));
}

/// Called so that the service of [`web`] comes after them, in the order in which the agent works.
fn many_services(services: u32, backends: u32) -> String {
    let address = |network: [u8; 4], number| Ipv4Addr::from_bits(u32::from_be_bytes(network) + number).to_string();
    let service = |i| {
        let backends = (i * backends..(i + 1) * backends).map(|number| address([10, 128, 0, 0], number));
        format!(
            "  - {{ name: a{i}, addresses: [{}], ports: [{{ port: 80 }}], backends: [{}] }}\n",
            address([10, 100, 0, 0], i),
            backends.collect::<Vec<_>>().join(", ")
        )
    };
    (0..services).map(service).collect()
}
