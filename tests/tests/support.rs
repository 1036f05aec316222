//! The proving ground proves itself: without a balancer, and without an agent.
#![expect(clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::{
    fs,
    net::{IpAddr, SocketAddr, TcpStream},
    panic,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use tests::{
    netns::{self, NetNs},
    packet::{Packet, assert_packets_equal, describe, verify_checksums},
    probe::{Tally, assert_spread, assert_weighted_spread},
    topology::{Host, Lab, Topology},
};

fn exists(namespace: &str) -> bool {
    Path::new("/run/netns").join(namespace).exists()
}

#[test]
fn a_namespace_goes_when_a_test_panics() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let panicked = thread::spawn(move || {
        let namespace = NetNs::new("panics");
        sender.send(namespace.name().to_owned()).unwrap();
        namespace.run(|| panic::resume_unwind(Box::new("as a failing assertion inside would")))
    });
    let cause = panicked.join().unwrap_err();
    assert_eq!(cause.downcast_ref(), Some(&"as a failing assertion inside would"));
    let name = receiver.recv().unwrap();
    assert!(name.starts_with("wharf-") && name.ends_with("-panics"), "{name}");
    assert!(!exists(&name), "{name}");
}

#[test]
fn namespaces_of_a_killed_run_go_at_the_next() {
    // Like a killed test run, this process is gone without having removed what it made.
    let mut killed = Command::new("true").spawn().unwrap();
    killed.wait().unwrap();
    let name = format!("wharf-{}-1-killed", killed.id());
    assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
    netns::remove_leftovers();
    assert!(!exists(&name), "{name}");
}

#[test]
fn a_process_runs_inside_its_namespace() {
    let namespace = NetNs::new("process");
    let links = namespace.command("ip").args(["-brief", "link"]).output().unwrap();
    assert!(String::from_utf8(links.stdout).unwrap().starts_with("lo "));
    let own = namespace.run(|| fs::read_link("/proc/thread-self/ns/net").unwrap());
    assert_ne!(own, fs::read_link("/proc/thread-self/ns/net").unwrap());
}

#[test]
fn a_background_thread_ends_with_its_guard() {
    let namespace = NetNs::new("background");
    let thread = namespace.spawn(|stop| {
        while !stop.is_cancelled() {
            thread::sleep(Duration::from_millis(1));
        }
        "stopped"
    });
    assert_eq!(thread.finish(), "stopped");
}

/// Every host can be reached from the client, over both families and both protocols, and sees who asks.
fn assert_backends_answer(lab: &Lab) {
    let _servers = lab.serve(8080);
    let client = lab.client();
    for backend in lab.backends() {
        for (to, from) in [
            (IpAddr::from(backend.v4()), IpAddr::from(client.v4())),
            (IpAddr::from(backend.v6()), IpAddr::from(client.v6())),
        ] {
            let mut connection = client.tcp((to, 8080)).unwrap();
            assert_eq!(connection.backend(), backend.name());
            connection.echo("a line").unwrap();
            connection.echo(&"a long line ".repeat(100_000)).unwrap();
            let own = connection.local_address().unwrap();
            assert_eq!((connection.whoami().unwrap(), own.ip()), (own, from));

            let datagrams = client.udp((to, 8080)).unwrap();
            assert_eq!(datagrams.ask("a datagram").unwrap(), backend.name());
            let (name, seen) = datagrams.whoami().unwrap();
            assert_eq!((name.as_str(), seen.ip()), (backend.name(), from));
        }
    }
}

#[test]
fn hosts_of_a_routed_lab_reach_each_other_when_forwarding_is_on() {
    let lab = Topology::new().client("client").backends(2).up();
    assert_eq!(lab.lb().interfaces().collect::<Vec<_>>(), ["eth-client", "eth-b1", "eth-b2"]);
    assert_eq!(lab.backend(2).v4().to_string(), "10.2.0.2");
    assert_eq!(lab.backend(2).v6().to_string(), "fd00:2::2");
    lab.lb().namespace().sysctl("ipv4/ip_forward", "1");
    lab.lb().namespace().sysctl("ipv6/conf/all/forwarding", "1");
    assert_backends_answer(&lab);
}

#[test]
fn hosts_of_a_one_armed_lab_reach_each_other_by_the_switch() {
    let lab = Topology::new().client("client").backends(2).one_armed().up();
    assert_eq!(lab.lb().interfaces().collect::<Vec<_>>(), ["eth0"]);
    assert_backends_answer(&lab);
}

#[test]
fn the_balancer_of_a_lab_is_no_router_until_an_agent_makes_it_one() {
    let lab = Topology::new().backends(1).up();
    let backend = SocketAddr::from((lab.backend(1).v4(), 8080));
    let attempt = || TcpStream::connect_timeout(&backend, Duration::from_millis(200));
    assert!(lab.client().namespace().run(attempt).is_err());
}

#[test]
fn neighbours_are_resolved_and_forgotten() {
    for lab in [Topology::new().backends(2).up(), Topology::new().backends(2).one_armed().up()] {
        lab.resolve_neighbours();
        let hosts = lab.clients().iter().chain(lab.backends()).flat_map(Host::addresses);
        let known = lab.neighbours();
        assert!(hosts.into_iter().all(|host| known.contains(&host)), "{known:?}");
        lab.flush_neighbours();
        assert_eq!(lab.neighbours(), Vec::<IpAddr>::new());
    }
}

#[test]
fn many_connections_are_counted_by_backend() {
    let lab = Topology::new().backends(1).one_armed().up();
    let _servers = lab.serve(8080);
    let backend = (lab.backend(1).v6(), 8080);
    assert_spread(&lab.client().get_many(backend, 1_000, 16), &["b1"]);
    assert_spread(&lab.client().ask_many(backend, 1_000, 16), &["b1"]);
    let nobody = lab.client().get_many((lab.backend(1).v6(), 81), 3, 2);
    assert_eq!((nobody.total(), nobody.errors.len()), (0, 3), "{nobody}");
}

#[test]
fn traffic_in_the_background_notices_a_cut() {
    let lab = Topology::new().backends(1).one_armed().up();
    let server = lab.backend(1).serve(8080);
    let backend = (lab.backend(1).v4(), 8080);
    let (conversations, arrivals) = (lab.client().converse(backend, 3), lab.client().keep_calling(backend));
    thread::sleep(Duration::from_millis(200));
    assert_spread(&arrivals.take(), &["b1"]);
    assert_eq!(conversations.stuck(Duration::from_secs(1)), Vec::<&str>::new());
    drop(server);
    assert_eq!(conversations.stuck(Duration::from_millis(100)), ["b1"; 3]);
    let outcomes = conversations.finish();
    assert!(outcomes.iter().all(|outcome| outcome.lines > 0 && outcome.end.is_err()), "{outcomes:?}");
    assert!(!arrivals.finish().errors.is_empty());
}

fn tally(answers: &[(&str, usize)]) -> Tally {
    let answers = answers.iter().map(|&(backend, count)| (backend.to_owned(), count)).collect();
    Tally { answers, errors: Vec::new() }
}

#[test]
fn an_even_spread_may_be_off_by_chance_alone() {
    assert_spread(&tally(&[("b1", 330), ("b2", 340), ("b3", 320)]), &["b1", "b2", "b3"]);
    assert_weighted_spread(&tally(&[("b1", 320), ("b2", 670)]), &[("b1", 1), ("b2", 2)]);
    for (skewed, what) in [
        (tally(&[("b1", 500), ("b2", 500)]), "b3 gets nothing"),
        (tally(&[("b1", 250), ("b2", 420), ("b3", 330)]), "b2 gets too much"),
        (tally(&[("b1", 333), ("b2", 333), ("b3", 333), ("b4", 1)]), "b4 is a stranger"),
    ] {
        let assertion = panic::catch_unwind(|| assert_spread(&skewed, &["b1", "b2", "b3"]));
        assert!(assertion.is_err(), "{what}");
    }
}

#[test]
fn a_packet_is_what_its_description_says() {
    let v4 = Packet::v4("192.0.2.7", "10.96.0.10");
    let v6 = Packet::v6("2001:db8::7", "fd00:96::10");
    for (packet, description) in [
        (v4.clone().tcp(4242, 80).syn(), "tcp 192.0.2.7:4242 > 10.96.0.10:80 [S] ttl 64 len 54"),
        (v4.clone().tcp(4242, 80).ack().payload(b"odd").ttl(2), "tcp 192.0.2.7:4242 > 10.96.0.10:80 [.] ttl 2 len 57"),
        (
            v4.clone().tcp(1, 2).syn().ack().options(&[1; 8]).tcp_options(&[1; 4]),
            "tcp 192.0.2.7:1 > 10.96.0.10:2 [S.] ttl 64 len 66",
        ),
        (v4.clone().udp(4242, 53).payload(b"?").vlan(7), "udp 192.0.2.7:4242 > 10.96.0.10:53 ttl 64 vlan 7 len 47"),
        (v4.clone().udp(4242, 53).without_checksum(), "udp 192.0.2.7:4242 > 10.96.0.10:53 ttl 64 len 42"),
        (v4.clone().udp(1, 2).fragment(0, true), "fragment of protocol 17 192.0.2.7 > 10.96.0.10 ttl 64 len 42"),
        (
            v4.clone().udp(1, 2).fragment(1, false).payload(b"rest"),
            "fragment of protocol 17 192.0.2.7 > 10.96.0.10 ttl 64 len 38",
        ),
        (v4.protocol(132), "protocol 132 192.0.2.7 > 10.96.0.10 ttl 64 len 34"),
        (v6.clone().tcp(4242, 80).rst().tos(0xb9), "tcp [2001:db8::7]:4242 > [fd00:96::10]:80 [R] ttl 64 len 74"),
        (
            v6.clone().udp(4242, 53).vlan(7).vlan(8),
            "udp [2001:db8::7]:4242 > [fd00:96::10]:53 ttl 64 vlan 7 vlan 8 len 70",
        ),
        (
            v6.clone().tcp(1, 2).fin().extension(0, 8).extension(60, 24),
            "tcp [2001:db8::7]:1 > [fd00:96::10]:2 [F] ttl 64 len 106",
        ),
        (v6.udp(1, 2).fragment(3, true), "fragment of protocol 17 2001:db8::7 > fd00:96::10 ttl 64 len 62"),
    ] {
        let bytes = packet.bytes();
        assert_eq!(describe(&bytes), description);
        verify_checksums(&bytes);
    }
    assert_eq!(describe(&[0; 14]), "not IP len 14");
    assert_eq!(describe(&[0; 5]), "malformed len 5");
}

/// A SYN as Linux sent it (seen through a packet socket): what builds and checks packets here may not only agree with itself.
#[test]
fn a_packet_from_elsewhere_has_the_right_checksums() {
    let hexadecimal = "624da805f198 de6c299e6b58 0800 \
        4500003c 77934000 40063f25 c0000201 c0000202 \
        10920050 ae760177 00000000 a002faf0 7d800000 020405b4 0402080a 64832635 00000000 0103030a";
    let digits: Vec<_> = hexadecimal.chars().filter_map(|c| c.to_digit(16)).collect();
    let bytes: Vec<_> = digits.chunks(2).map(|pair| u8::try_from(pair[0] << 4 | pair[1]).unwrap()).collect();
    assert_eq!(describe(&bytes), "tcp 192.0.2.1:4242 > 192.0.2.2:80 [S] ttl 64 len 74");
    verify_checksums(&bytes);
}

#[test]
fn every_wrong_checksum_is_found() {
    let tcp4 = Packet::v4("192.0.2.7", "10.96.0.10").tcp(4242, 80).syn();
    let udp4 = Packet::v4("192.0.2.7", "10.96.0.10").udp(4242, 53);
    let tcp6 = Packet::v6("2001:db8::7", "fd00:96::10").tcp(4242, 80).ack().payload(b"payload");
    let udp6 = Packet::v6("2001:db8::7", "fd00:96::10").udp(4242, 53);
    for (bytes, what) in [
        (tcp4.edit(|bytes| bytes[22] -= 1), "a TTL changed without the IPv4 checksum"),
        (tcp4.edit(|bytes| bytes[37] += 1), "a TCP port changed without the checksum"),
        (udp4.edit(|bytes| bytes[35] += 1), "a UDP port changed without the checksum"),
        (tcp6.edit(|bytes| bytes[37] += 1), "an IPv6 address changed without the TCP checksum"),
        (tcp6.edit(|bytes| *bytes.last_mut().unwrap() += 1), "a payload changed"),
        (udp6.without_checksum().bytes(), "IPv6 needs a UDP checksum"),
    ] {
        assert!(panic::catch_unwind(|| verify_checksums(&bytes)).is_err(), "{what}");
    }
}

#[test]
fn packets_that_differ_are_shown_side_by_side() {
    let expected = Packet::v4("192.0.2.7", "10.96.0.10").udp(4242, 53);
    let got = expected.clone().ttl(63).bytes();
    assert_packets_equal(&got, &got);
    let message = panic::catch_unwind(|| assert_packets_equal(&expected.bytes(), &got)).unwrap_err();
    let message = message.downcast_ref::<String>().unwrap();
    assert!(message.contains("expected: udp 192.0.2.7:4242 > 10.96.0.10:53 ttl 64 len 42"), "{message}");
    assert!(message.contains("\n     got: udp 192.0.2.7:4242 > 10.96.0.10:53 ttl 63 len 42"), "{message}");
    assert!(message.contains("\n- 0010  00 1c 00 00 40 00 40 11"), "{message}");
    assert!(message.contains("\n+ 0010  00 1c 00 00 40 00 3f 11"), "{message}");
}
