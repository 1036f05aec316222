//! The proving ground proves itself: without a balancer, and without an agent.
#![expect(clippy::panic, clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::{
    fs,
    net::{IpAddr, SocketAddr, TcpStream},
    panic,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use tests::{
    cluster::{FORGED, Layout, NARROW_MTU, PodNetwork, Uplinks},
    eventually,
    netns::{self, NetNs},
    packet::{Packet, assert_packets_equal, describe, verify_checksums},
    poll,
    probe::{Fate, Tally, assert_spread, assert_weighted_spread},
    raise_descriptor_limit,
    services::{cluster_ips, external_ips, load_balancer_ips},
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
    eventually("all are cut off", || conversations.stuck(Duration::from_millis(100)) == ["b1"; 3]);
    eventually("nobody answers", || !arrivals.take().errors.is_empty());
    let outcomes = conversations.finish();
    assert!(outcomes.iter().all(|outcome| outcome.lines > 0 && outcome.end.is_err()), "{outcomes:?}");
    arrivals.finish();
}

/// Both ways to link pods, each with one of the ways to link nodes.
const LAYOUTS: [Layout; 2] =
    [Layout::new(PodNetwork::Bridged).uplinks(Uplinks::Cards), Layout::new(PodNetwork::Routed).uplinks(Uplinks::Veth)];

/// Much more than a segment takes.
const BULK: usize = 4 << 20;

/// The two addresses of `to` answer `from`, over TCP and UDP, small and large; the server sees the client's own address.
#[track_caller]
fn assert_answers(from: &Host, to: &Host) {
    for address in to.addresses().take(2) {
        let place = format!("{} to {address} of {}", from.name(), to.name());
        for seen in from.exchange((address, 8080)).unwrap_or_else(|error| panic!("{place}: {error}")) {
            assert_eq!(seen.backend, to.name(), "{place}");
            assert_eq!(seen.client.port(), seen.own.port(), "{place}");
            assert!(from.addresses().any(|own| own == seen.client.ip()), "{place}: {seen:?}");
        }
        let datagrams = from.udp((address, 8080)).unwrap();
        for size in [4_000, 8_000] {
            let answer =
                datagrams.ask(&"x".repeat(size)).unwrap_or_else(|error| panic!("{place}, {size} bytes: {error}"));
            assert_eq!(answer, to.name(), "{place}");
        }
    }
}

#[test]
fn clients_pods_and_nodes_of_a_cluster_reach_each_other() {
    for layout in LAYOUTS {
        let cluster = layout.up();
        assert_eq!(cluster.pod(2, 1).v4().to_string(), "10.244.2.11");
        assert_eq!(cluster.pod(2, 1).v6().to_string(), "fd44:2::11");
        assert_eq!((cluster.pod(2, 1).node(), cluster.client().node()), (Some("n2"), None));
        let (client, node) = (cluster.client(), cluster.node(1).host());
        let servers = [cluster.pod(1, 1), cluster.pod(1, 2), cluster.pod(2, 1), node];
        let _servers = servers.map(|host| host.serve(8080));
        for server in servers {
            assert_answers(client, server);
        }
        for server in [cluster.pod(1, 2), cluster.pod(2, 1), node] {
            assert_answers(cluster.pod(1, 1), server);
        }
        assert_answers(node, cluster.pod(1, 1));
    }
}

#[test]
fn pods_hand_large_segments_to_their_node_and_cards_are_sent_small_ones() {
    for (uplinks, are_small) in [(Uplinks::Cards, true), (Uplinks::Veth, false)] {
        let cluster = Layout::new(PodNetwork::Routed).uplinks(uplinks).up();
        let _server = cluster.pod(1, 1).serve(8080);
        let mut connection = cluster.client().tcp((cluster.pod(1, 1).v4(), 8080)).unwrap();
        connection.echo(&"x".repeat(BULK)).unwrap();
        let segments = (BULK / 1_460) as u64;
        let node = cluster.node(1).host();
        assert!(node.received("cali1") < segments / 4, "pods send large segments");
        assert_eq!(node.received("eth0") > segments, are_small, "{uplinks:?}");
    }
}

#[test]
fn a_pod_may_come_later() {
    for layout in LAYOUTS {
        let mut cluster = layout.up();
        cluster.add_pod(2);
        let pod = cluster.pod(2, 3);
        assert_eq!((pod.name(), pod.v4().to_string().as_str()), ("n2-p3", "10.244.2.13"));
        let _server = pod.serve(8080);
        assert_answers(cluster.client(), pod);
    }
}

#[test]
fn attempts_end_as_they_should() {
    let cluster = LAYOUTS[0].clone().up();
    let (client, pod) = (cluster.client(), cluster.pod(1, 1));
    let _server = pod.serve(8080);
    cluster.router().namespace().ip("route add blackhole 192.0.2.1\nroute add blackhole 2001:db8::1");
    for (address, silent) in pod.addresses().zip(["192.0.2.1", "2001:db8::1"]) {
        client.assert_fates((address, 8080), &Fate::answered(pod));
        client.assert_fates((address, 81), &Fate::REFUSED);
        client.assert_fates((silent, 8080), &Fate::SILENT);
    }
}

#[test]
fn replies_leave_by_the_second_uplink() {
    let cluster = Layout::new(PodNetwork::Bridged).second_uplink().up();
    assert_eq!(cluster.node(1).uplinks(), ["eth0", "eth1"]);
    let _server = cluster.pod(1, 1).serve(8080);
    for address in cluster.pod(1, 1).addresses() {
        let mut connection = cluster.client().tcp((address, 8080)).unwrap();
        let router = cluster.router();
        let before = ["n1-eth0", "n1-eth1"].map(|port| router.received(port));
        connection.echo(&"x".repeat(100_000)).unwrap();
        let after = ["n1-eth0", "n1-eth1"].map(|port| router.received(port));
        assert!(after[0] - before[0] < 5 && after[1] - before[1] > 20, "{before:?} {after:?}");
    }
}

#[test]
fn a_narrow_link_has_both_ends_send_less() {
    for layout in LAYOUTS {
        for layout in [layout.clone().narrow_clients(), layout.narrow_node(2)] {
            let cluster = layout.up();
            let pod = cluster.pod(2, 1);
            let _server = pod.serve(8080);
            assert_answers(cluster.client(), pod);
            assert_answers(cluster.pod(1, 1), pod);
            for address in pod.addresses() {
                let datagrams = cluster.client().udp((address, 8080)).unwrap();
                datagrams.never_fragment().unwrap();
                // Without the IP header of either family there is room for 60 bytes less.
                datagrams.ask(&"x".repeat(usize::from(NARROW_MTU) - 60)).unwrap();
                let too_big = datagrams.ask(&"x".repeat(usize::from(NARROW_MTU))).unwrap_err();
                assert_eq!(too_big.raw_os_error(), Some(libc::EMSGSIZE), "{too_big}");
            }
        }
    }
}

#[test]
fn a_hop_says_that_a_datagram_has_expired() {
    let cluster = Layout::new(PodNetwork::Bridged).narrow_node(2).up();
    let _server = cluster.pod(2, 1).serve(8080);
    for address in cluster.pod(2, 1).addresses() {
        // The router, the hop, the node.
        for (ttl, host) in [(1, cluster.router()), (2, cluster.hop()), (3, cluster.node(2).host())] {
            let by = cluster.client().udp((address, 8080)).unwrap().expire(ttl).unwrap();
            assert!(host.addresses().any(|own| own == by), "{by} is not {}", host.name());
        }
        assert!(cluster.client().udp((address, 8080)).unwrap().expire(4).is_err(), "it arrives");
    }
}

#[test]
fn the_way_to_services_is_by_the_first_node() {
    for layout in [LAYOUTS[0].clone(), LAYOUTS[1].clone().narrow_node(1).second_uplink()] {
        let cluster = layout.up();
        let node = cluster.node(1).host();
        let addresses = [cluster_ips(1), external_ips(1), load_balancer_ips(1)].concat();
        let add = addresses.iter().map(|address| format!("addr add {address} dev lo\n"));
        node.namespace().ip(&add.collect::<String>());
        let _server = node.serve(8080);
        for address in addresses {
            for host in [cluster.client(), cluster.pod(1, 1), cluster.pod(2, 1)] {
                assert_eq!(host.tcp((address, 8080)).unwrap().backend(), "n1");
            }
        }
    }
}

#[test]
fn programs_of_interfaces_are_listed() {
    let lab = Topology::new().up();
    assert_eq!(lab.client().programs(), ["eth0 xdp"], "what makes a card of it");
    assert_eq!(lab.lb().programs(), Vec::<String>::new());
    assert!(
        lab.lb().namespace().command("tc").args(["qdisc", "add", "dev", "lo", "clsact"]).status().unwrap().success()
    );
    assert_eq!(lab.lb().programs(), ["lo clsact"]);
}

#[test]
fn a_flood_is_as_large_as_it_says_and_reaches_its_server() {
    let cluster = LAYOUTS[0].clone().up();
    let _server = cluster.pod(1, 1).serve(8080);
    for address in cluster.pod(1, 1).addresses() {
        let before = cluster.node(1).host().received("eth0");
        let begin = Instant::now();
        let flood = cluster.client().flood((address, 8080), 10_000);
        assert!(poll(Duration::from_secs(10), || (flood.sent() >= 5_000).then_some(())).is_some(), "{}", flood.sent());
        let sent = u64::from(flood.finish());
        assert!(begin.elapsed() > Duration::from_millis(400), "it is not faster than it should be");
        let arrived = cluster.node(1).host().received("eth0") - before;
        assert!(arrived >= sent * 9 / 10, "{arrived} of {sent}");
        assert_eq!(cluster.client().tcp((address, 8080)).unwrap().backend(), "n1-p1");
        let forged = if address.is_ipv4() { IpAddr::from(FORGED.0) } else { FORGED.1.into() };
        assert!(cluster.pod(1, 1).ping(forged).is_err(), "answers to forged addresses end somewhere");
    }
}

#[test]
fn a_thousand_conversations_go_on_at_once() {
    raise_descriptor_limit();
    let cluster = LAYOUTS[0].clone().up();
    let _server = cluster.pod(2, 1).serve(8080);
    let conversations = cluster.client().converse((cluster.pod(2, 1).v6(), 8080), 1_000);
    assert_eq!(conversations.stuck(Duration::from_secs(5)), Vec::<&str>::new());
    for outcome in conversations.finish() {
        assert!(outcome.end.is_ok(), "{outcome:?}");
    }
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
