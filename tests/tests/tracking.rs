//! What the datapath remembers of flows, step by step through the loaded program.
#![expect(clippy::panic, reason = "this is test code: it fails by panicking")]

use std::process::Command;

use lb_common::{
    abi::Flow,
    flow::{Direction, State, Timeouts},
    net::Ipv4Be,
    parse::{self, AnySegment},
};
use lb_userspace::dataplane::{Sizes, kernel::Settings};
use tests::{
    datapath::{Datapath, with_datapath},
    packet::{OUR_MAC, Packet, THEIR_MAC, assert_packets_equal, describe, verify_checksums},
};

const SIZES: Sizes =
    Sizes { services: 16, backends: 16, slots: 1024, flows: 1 << 12, pending_flows: 1 << 12, ..Sizes::DEFAULT };
const TX: u32 = 3;

fn services(backends: &str) -> String {
    format!(
        "services:\n  - name: web\n    addresses: [10.96.0.10]\n    ports: [{{ name: tcp, port: 80 }}, \
         {{ name: udp, port: 80, protocol: UDP }}, {{ name: sctp, port: 90, protocol: SCTP }}]\n    backends: [{backends}]\n"
    )
}

fn syn(client: &str, port: u16) -> Vec<u8> {
    Packet::v4(client, "10.96.0.10").tcp(port, 80).syn().bytes()
}

fn data(client: &str, port: u16) -> Vec<u8> {
    Packet::v4(client, "10.96.0.10").tcp(port, 80).ack().payload(b"data").bytes()
}

fn datagram(client: &str, port: u16) -> Vec<u8> {
    Packet::v4(client, "10.96.0.10").udp(port, 80).payload(b"data").bytes()
}

/// Where a packet was sent, as address:port; and from which port of ours.
#[track_caller]
fn send(datapath: &mut Datapath, packet: &[u8]) -> (String, u16) {
    let result = datapath.from_clients(packet);
    assert_eq!(result.action, TX, "{}: {:?}", describe(packet), datapath.counts());
    verify_checksums(&result.packet);
    let Ok(AnySegment::V4(sent)) = parse::packet(&result.packet[..]) else { panic!("not IPv4") };
    (format!("{:?}:{:?}", sent.key.destination, sent.key.destination_port), sent.key.source_port.to_host())
}

#[track_caller]
fn refuse(datapath: &mut Datapath, packet: &[u8], reason: &str) {
    let before = datapath.count(reason);
    let result = datapath.from_clients(packet);
    assert_eq!((result.action, datapath.count(reason) - before), (1, 1), "{}", describe(packet));
}

/// A packet gets an answer of ours, since there is no backend.
#[track_caller]
fn assert_answered(datapath: &mut Datapath, packet: &[u8]) {
    let before = datapath.count("refused-no-backend");
    let result = datapath.from_clients(packet);
    let answers = datapath.count("refused-no-backend") - before;
    assert_eq!((result.action, answers), (TX, 1), "{}", describe(packet));
}

/// The sequence number of every SYN-ACK here.
const ISN: u32 = 7_000;

/// Opens a connection, all three packets of the handshake. From which port of ours.
#[track_caller]
fn connect(datapath: &mut Datapath, client: &str, port: u16) -> u16 {
    let (_, ours) = send(datapath, &syn(client, port));
    let answer = reply(ours).syn().ack().sequence(ISN, 1001).bytes();
    assert_eq!(datapath.from_clients(&answer).action, TX, "{}", describe(&answer));
    send(datapath, &acknowledge(client, port, ISN + 1));
    ours
}

/// A packet of the first backend to a port of ours.
fn reply(to: u16) -> Packet {
    Packet::v4("10.2.0.1", "10.0.0.1").tcp(80, to)
}

fn acknowledge(client: &str, port: u16, number: u32) -> Vec<u8> {
    Packet::v4(client, "10.96.0.10").tcp(port, 80).ack().sequence(1001, number).bytes()
}

#[test]
fn a_connection_is_established_by_who_has_seen_the_answer() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        send(datapath, &syn("192.0.2.7", 4242));
        assert_eq!(datapath.entries(), (0, 2), "a SYN makes a pending flow");
        send(datapath, &acknowledge("192.0.2.7", 4242, ISN + 1));
        assert_eq!(datapath.entries(), (0, 2), "there was no answer to acknowledge");
        let answer = reply(4242).syn().ack().sequence(ISN, 1001).bytes();
        assert_eq!(datapath.from_clients(&answer).action, TX);
        for wrong in [ISN, ISN.wrapping_sub(1), ISN + (2 << 20), 0] {
            send(datapath, &acknowledge("192.0.2.7", 4242, wrong));
            assert_eq!(datapath.entries(), (0, 2), "{wrong} does not acknowledge {ISN}");
        }
        send(datapath, &acknowledge("192.0.2.7", 4242, ISN + 1));
        assert_eq!(datapath.entries().0, 2, "now it is established");
        assert_eq!(send(datapath, &data("192.0.2.7", 4242)).1, 4242, "and goes on");
    });
}

#[test]
fn datagrams_establish_a_flow_when_they_are_answered() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        send(datapath, &datagram("192.0.2.7", 4242));
        let answer = Packet::v4("10.2.0.1", "10.0.0.1").udp(80, 4242).bytes();
        assert_eq!(datapath.from_clients(&answer).action, TX);
        assert_eq!(datapath.entries().0, 0, "one question and one answer are soon forgotten");
        send(datapath, &datagram("192.0.2.7", 4242));
        assert_eq!(datapath.entries().0, 2);
    });
}

#[test]
fn an_answered_flow_of_datagrams_leaves_its_backend_at_once() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        send(datapath, &datagram("192.0.2.7", 4242));
        let answer = Packet::v4("10.2.0.1", "10.0.0.1").udp(80, 4242).bytes();
        assert_eq!(datapath.from_clients(&answer).action, TX);
        send(datapath, &datagram("192.0.2.7", 4242));
        assert_eq!(datapath.entries().0, 2, "it is established");
        datapath.apply(&services("10.2.0.2"));
        assert_eq!(send(datapath, &datagram("192.0.2.7", 4242)).0, "10.2.0.2:80");
    });
}

#[test]
fn a_later_fragment_of_a_flow_that_has_ended_opens_none() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        let pieces = Packet::v4("192.0.2.7", "10.96.0.10").udp(4242, 80).payload(&[7; 64]).pieces(&[16]);
        send_piece(datapath, &pieces[0]);
        datapath.apply(&services("10.2.0.2"));
        refuse(datapath, &pieces[1].bytes(), "fragment-lost");
    });
}

#[track_caller]
fn send_piece(datapath: &mut Datapath, piece: &Packet) {
    assert_eq!(datapath.from_clients(&piece.bytes()).action, TX, "{}", describe(&piece.bytes()));
}

#[test]
fn syns_force_out_no_established_flow() {
    let sizes = Sizes { flows: 1024, pending_flows: 1024, ..SIZES };
    with_datapath(sizes, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        let ports: Vec<_> = (1024..1224).map(|port| (port, connect(datapath, "192.0.2.7", port))).collect();
        for number in 0..20_000_u32 {
            let client = format!("198.51.{}.{}", number >> 8 & 0xFF, number & 0xFF);
            datapath.from_clients(&syn(&client, (number % 50_000 + 1024) as u16));
        }
        for (port, ours) in ports {
            assert_eq!(send(datapath, &data("192.0.2.7", port)).1, ours, "its translation is as it was");
            assert_eq!(datapath.from_clients(&reply(ours).ack().bytes()).action, TX, "and so is that of its replies");
        }
        connect(datapath, "192.0.2.8", 1024);
    });
}

#[test]
fn syns_do_not_take_all_ports_towards_a_backend_from_those_who_mean_it() {
    with_datapath(SIZES, |datapath| {
        datapath.with_snat_ports(6000..=6099, &services("10.2.0.1"), |datapath| {
            // Twenty forged senders from each of the ports that there are, who never say more.
            for host in 0..20_u32 {
                for port in 6000..6100 {
                    datapath.from_clients(&syn(&format!("198.51.100.{host}"), port));
                }
            }
            refuse(datapath, &syn("192.0.2.7", 6042), "snat-ports-exhausted");
            std::thread::sleep(std::time::Duration::from_millis(4400));
            let ours = connect(datapath, "192.0.2.7", 6042);
            std::thread::sleep(std::time::Duration::from_millis(4400));
            for port in 6000..6050 {
                assert_ne!(connect(datapath, "192.0.2.8", port), ours, "who has connected keeps its port");
            }
        });
    });
}

#[test]
fn a_syn_whose_answer_has_no_way_back_any_more_opens_anew() {
    with_datapath(Sizes { pending_flows: 256, ..SIZES }, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        send(datapath, &syn("192.0.2.7", 4242));
        // Its own entry is kept by sending again; that of the replies, which do not come, is forced out.
        for port in 1024..4000 {
            send(datapath, &syn("192.0.2.8", port));
            let (_, ours) = send(datapath, &syn("192.0.2.7", 4242));
            let answer = reply(ours).syn().ack().sequence(ISN, 1001).bytes();
            let told = describe(&datapath.from_clients(&answer).packet);
            assert!(told.contains("10.96.0.10:80 > 192.0.2.7:4242"), "{told}");
        }
    });
}

#[test]
fn a_rst_after_a_fin_ends_the_other_direction_too() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        datapath.with_snat_ports(6000..=6000, &services("10.2.0.1"), |datapath| {
            let ours = connect(datapath, "192.0.2.7", 4242);
            send(datapath, &Packet::v4("192.0.2.7", "10.96.0.10").tcp(4242, 80).fin().ack().bytes());
            send(datapath, &Packet::v4("192.0.2.7", "10.96.0.10").tcp(4242, 80).rst().bytes());
            let (flows, _) = datapath.tables.dataplane_mut().flows();
            let states: Vec<_> = flows.iter().map(|entry| entry.expect("it is there").1.state()).collect();
            assert_eq!(states, [State::Closing; 2], "from port {ours}");
        });
    });
}

#[test]
fn a_rst_that_acknowledges_the_answer_establishes_nothing() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        let (_, ours) = send(datapath, &syn("192.0.2.7", 4242));
        let answer = reply(ours).syn().ack().sequence(ISN, 1001).bytes();
        assert_eq!(datapath.from_clients(&answer).action, TX);
        let rst = Packet::v4("192.0.2.7", "10.96.0.10").tcp(4242, 80).rst().ack().sequence(1001, ISN + 1);
        send(datapath, &rst.bytes());
        assert_eq!(datapath.entries().0, 0, "its replies would be remembered for hours");
        connect(datapath, "192.0.2.7", 4242);
    });
}

#[test]
fn an_entry_for_replies_that_is_made_again_takes_its_tuple_back() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        let ours = connect(datapath, "192.0.2.7", 4242);
        // The kernel forgets the entry for the replies, and another client's flow claims their tuple.
        datapath.forget_pending();
        let (flows, _) = datapath.tables.dataplane_mut().flows();
        let is_reply = |flow: &Flow<Ipv4Be>| flow.direction() == Direction::Reply;
        let keys: Vec<_> = flows.iter().filter_map(Result::ok).filter(|(_, flow)| is_reply(flow)).collect();
        for (key, _) in &keys {
            flows.remove(key).expect("it is there");
        }
        assert_eq!(send(datapath, &syn("192.0.2.8", 4242)).1, ours, "nobody holds the tuple");
        // The connection makes its entry again when it is due.
        std::thread::sleep(std::time::Duration::from_millis(4400));
        assert_eq!(send(datapath, &data("192.0.2.7", 4242)).1, ours);
        let told = describe(&datapath.from_clients(&reply(ours).ack().bytes()).packet);
        assert!(told.contains("10.96.0.10:80 > 192.0.2.7:4242"), "{told}");
        // The other client asks again, and gets a tuple of its own.
        let other = connect(datapath, "192.0.2.8", 4242);
        assert_ne!(other, ours);
        let told = describe(&datapath.from_clients(&reply(other).ack().bytes()).packet);
        assert!(told.contains("10.96.0.10:80 > 192.0.2.8:4242"), "{told}");
    });
}

#[test]
fn what_is_idle_for_longer_than_its_timeout_is_over() {
    let short = Timeouts { opening: 1, established: 2, closing: 1, datagram: 1 };
    with_datapath(SIZES, |datapath| {
        datapath.with(Settings { timeouts: short, ..Settings::default() }, &services("10.2.0.1"), |datapath| {
            connect(datapath, "192.0.2.7", 4242);
            send(datapath, &syn("192.0.2.7", 4243));
            send(datapath, &datagram("192.0.2.7", 4244));
            datapath.apply(&services("10.2.0.2"));
            std::thread::sleep(std::time::Duration::from_millis(4400));
            refuse(datapath, &data("192.0.2.7", 4242), "no-flow");
            refuse(datapath, &data("192.0.2.7", 4243), "no-flow");
            assert_eq!(send(datapath, &datagram("192.0.2.7", 4244)).0, "10.2.0.2:80");
            assert_eq!(send(datapath, &syn("192.0.2.7", 4242)).0, "10.2.0.2:80");
        });
    });
}

/// Who sends now and then, and never hears anything, is not idle in between.
#[test]
fn who_sends_within_the_timeout_stays_with_a_backend_without_answers() {
    let slow = Timeouts { datagram: 5, ..Settings::default().timeouts };
    with_datapath(SIZES, |datapath| {
        let services = services("10.2.0.1, 10.2.0.2, 10.2.0.3, 10.2.0.4");
        datapath.with(Settings { timeouts: slow, ..Settings::default() }, &services, |datapath| {
            let clients: Vec<_> = (1..=40).map(|host| format!("192.0.2.{host}")).collect();
            let mut to = || clients.iter().map(|it| send(datapath, &datagram(it, 4242))).collect::<Vec<_>>();
            let first = to();
            for _ in 0..3 {
                std::thread::sleep(std::time::Duration::from_millis(3200));
                assert_eq!(to(), first);
            }
        });
    });
}

#[test]
fn live_connections_are_counted() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        for port in 1000..1010 {
            connect(datapath, "192.0.2.7", port);
        }
        send(datapath, &syn("192.0.2.7", 2000));
        assert_eq!(active(datapath), 10, "one that is opening is not alive yet");
        send(datapath, &Packet::v4("192.0.2.7", "10.96.0.10").tcp(1000, 80).fin().ack().bytes());
        send(datapath, &Packet::v4("192.0.2.7", "10.96.0.10").tcp(1000, 80).rst().bytes());
        assert_eq!(active(datapath), 9, "an end counts once");
        assert_eq!(datapath.from_clients(&reply(1001).rst().bytes()).action, TX);
        assert_eq!(active(datapath), 8, "whoever ends it");
    });
}

/// How many live flows all backends have.
fn active(datapath: &Datapath) -> u64 {
    let names = datapath.tables.applied().services.keys();
    names.flat_map(|name| datapath.tables.members(name).map(|(_, _, backend)| backend.active)).sum()
}

#[test]
fn new_connections_go_where_fewer_are_alive() {
    let services = |weights: [u16; 2]| {
        let backends: Vec<_> =
            (1..).zip(weights).map(|(i, weight)| format!("{{ address: 10.2.0.{i}, weight: {weight} }}")).collect();
        services(&backends.join(", ")).replace("backends:", "algorithm: least-connections\n    backends:")
    };
    with_datapath(SIZES, |datapath| {
        // Ten connections to one of two backends; those that come next are never drawn so unluckily that none goes to the other.
        datapath.apply(&services([1, 0]));
        for port in 1000..1010 {
            connect(datapath, "192.0.2.7", port);
        }
        datapath.apply(&services([1, 1]));
        let mut to_idle = 0;
        for port in 2000..2100 {
            to_idle += u32::from(send(datapath, &syn("192.0.2.7", port)).0 == "10.2.0.2:80");
        }
        // Both draws fall on the busy one in a quarter of the cases.
        assert!((58..=92).contains(&to_idle), "{to_idle} of 100 went to the idle backend, and not about 75");
    });
}

#[test]
fn a_client_stays_where_it_was_for_as_long_as_that_takes_new_flows() {
    let services = |backends: &str| services(backends).replace("backends:", "affinity: 1h\n    backends:");
    let four = "10.2.0.1, 10.2.0.2, 10.2.0.3, 10.2.0.4";
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services(four));
        let clients: Vec<_> = (1..=20).map(|host| format!("192.0.2.{host}")).collect();
        let first: Vec<_> = clients.iter().map(|client| send(datapath, &syn(client, 1000)).0).collect();
        assert!(first.iter().any(|to| *to != first[0]), "twenty clients went to one backend");
        for (client, to) in clients.iter().zip(&first) {
            for port in 1001..1010 {
                assert_eq!(send(datapath, &syn(client, port)).0, *to);
            }
            send(datapath, &datagram(client, 1000));
        }
        // One takes no new flows, and one leaves and comes back: their clients go elsewhere, and stay there.
        datapath.apply(&services("{ address: 10.2.0.1, weight: 0 }, 10.2.0.3, 10.2.0.4"));
        let second: Vec<_> = clients.iter().map(|client| send(datapath, &syn(client, 2000)).0).collect();
        for (before, after) in first.iter().zip(&second) {
            match before.as_str() {
                "10.2.0.1:80" | "10.2.0.2:80" => assert_ne!(before, after),
                _ => assert_eq!(before, after),
            }
        }
        datapath.apply(&services(four));
        for (client, to) in clients.iter().zip(&second) {
            assert_eq!(send(datapath, &syn(client, 3000)).0, *to);
        }
    });
}

#[test]
fn affinity_to_a_backend_that_takes_no_new_flows_is_forgotten_even_if_it_does_so_again() {
    let services = |backends: &str| services(backends).replace("backends:", "affinity: 1h\n    backends:");
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1, 10.2.0.2"));
        let clients: Vec<_> = (1..=80).map(|host| format!("192.0.2.{host}")).collect();
        let first: Vec<_> = clients.iter().map(|client| send(datapath, &syn(client, 1000)).0).collect();
        // Nobody asks meanwhile.
        for backends in ["{ address: 10.2.0.1, weight: 0 }, 10.2.0.2", "10.2.0.1, { address: 10.2.0.2, weight: 9 }"] {
            datapath.apply(&services(backends));
        }
        let second: Vec<_> = clients.iter().map(|client| send(datapath, &syn(client, 2000)).0).collect();
        let (back, stayed): (Vec<_>, Vec<_>) =
            first.iter().zip(&second).partition(|(before, _)| *before == "10.2.0.1:80");
        assert!(back.iter().any(|(before, after)| before != after), "clients of the one that was away: {back:?}");
        assert!(stayed.iter().all(|(before, after)| before == after), "clients of the other one: {stayed:?}");
    });
}

#[test]
fn affinity_ends_when_it_was_not_used_for_its_time() {
    let services = services("10.2.0.1, 10.2.0.2").replace("backends:", "affinity: 1s\n    backends:");
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services);
        let clients: Vec<_> = (1..=60).map(|host| format!("192.0.2.{host}")).collect();
        let mut to = |port| clients.iter().map(|client| send(datapath, &syn(client, port)).0).collect::<Vec<_>>();
        let first = to(1000);
        assert_eq!(first, to(1001));
        std::thread::sleep(std::time::Duration::from_millis(4400));
        assert_ne!(first, to(1002), "with two backends, sixty clients chose as before: that is one in 2^60");
    });
}

#[test]
fn a_ping_is_answered_where_that_is_asked_for() {
    with_datapath(SIZES, |datapath| {
        datapath.with(Settings { answer_ping: true, ..Settings::default() }, &services("10.2.0.1"), |datapath| {
            let ping = Packet::v4("192.0.2.7", "10.96.0.10").echo(7, 1).payload(b"odd");
            let result = datapath.from_clients(&ping.ttl(2).bytes());
            let answer = Packet::v4("10.96.0.10", "192.0.2.7").icmp(0, 0, [0, 7, 0, 1]).payload(b"odd");
            assert_packets_equal(&answer.ethernet(OUR_MAC, THEIR_MAC).bytes(), &result.packet);
            assert_eq!((result.action, datapath.count("answered-echo")), (TX, 1));
        });
        let services =
            services("10.2.0.1").replace("10.96.0.10", "\"fd00:96::10\"").replace("10.2.0.1", "\"fd00:b::1\"");
        datapath.with(Settings { answer_ping: true, ..Settings::default() }, &services, |datapath| {
            let ping = Packet::v6("2001:db8::7", "fd00:96::10").echo(7, 1).payload(b"odd");
            let result = datapath.from_clients(&ping.bytes());
            let answer = Packet::v6("fd00:96::10", "2001:db8::7").icmp(129, 0, [0, 7, 0, 1]).payload(b"odd");
            assert_packets_equal(&answer.ethernet(OUR_MAC, THEIR_MAC).bytes(), &result.packet);
        });
    });
}

#[test]
fn a_connection_stays_with_a_backend_that_has_left_and_a_new_one_does_not() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        assert_eq!(send(datapath, &syn("192.0.2.7", 4242)).0, "10.2.0.1:80");
        datapath.apply(&services("10.2.0.2"));
        assert_eq!(send(datapath, &data("192.0.2.7", 4242)).0, "10.2.0.1:80", "the connection goes on");
        assert_eq!(send(datapath, &syn("192.0.2.7", 4243)).0, "10.2.0.2:80", "a new one has the new backend");
        assert_eq!(send(datapath, &syn("192.0.2.7", 4242)).0, "10.2.0.2:80", "nor is one opened to what is gone");
    });
}

#[test]
fn datagrams_leave_a_backend_with_it() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        assert_eq!(send(datapath, &datagram("192.0.2.7", 4242)).0, "10.2.0.1:80");
        datapath.apply(&services("10.2.0.2"));
        assert_eq!(send(datapath, &datagram("192.0.2.7", 4242)).0, "10.2.0.2:80");
        datapath.apply(&services(""));
        assert_answered(datapath, &datagram("192.0.2.7", 4242));
        datapath.apply(&services("10.2.0.3"));
        assert_eq!(send(datapath, &datagram("192.0.2.7", 4242)).0, "10.2.0.3:80");
        datapath.apply("services: []");
        let result = datapath.from_clients(&datagram("192.0.2.7", 4242));
        assert_eq!((result.action, datapath.count("not-service")), (2, 1), "with its service, too");
    });
}

#[test]
fn nor_are_those_of_a_backend_that_has_left_the_services() {
    with_datapath(SIZES, |datapath| {
        let answer = || Packet::v4("10.2.0.1", "10.0.0.1").udp(80, 4242).bytes();
        for is_established in [false, true] {
            datapath.apply(&services("10.2.0.1"));
            for _ in 0..if is_established { 2 } else { 1 } {
                send(datapath, &datagram("192.0.2.7", 4242));
                assert_eq!(datapath.from_clients(&answer()).action, TX);
            }
            datapath.apply(&services("10.2.0.2"));
            let before = datapath.count("not-service");
            let result = datapath.from_clients(&answer());
            assert_eq!((result.action, datapath.count("not-service") - before), (2, 1), "{is_established}");
        }
    });
}

#[test]
fn a_drained_backend_keeps_what_it_has() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        send(datapath, &syn("192.0.2.7", 4242));
        send(datapath, &datagram("192.0.2.7", 4242));
        datapath.apply(&services("{ address: 10.2.0.1, weight: 0 }, 10.2.0.2"));
        assert_eq!(send(datapath, &data("192.0.2.7", 4242)).0, "10.2.0.1:80");
        assert_eq!(send(datapath, &datagram("192.0.2.7", 4242)).0, "10.2.0.1:80");
        for port in 5000..5020 {
            assert_eq!(send(datapath, &syn("192.0.2.7", port)).0, "10.2.0.2:80");
        }
    });
}

#[test]
fn an_ended_connection_is_chosen_for_anew() {
    with_datapath(SIZES, |datapath| {
        for end in [Packet::fin as fn(Packet) -> Packet, Packet::rst] {
            datapath.apply(&services("10.2.0.1"));
            send(datapath, &syn("192.0.2.7", 4242));
            send(datapath, &end(Packet::v4("192.0.2.7", "10.96.0.10").tcp(4242, 80)).ack().bytes());
            datapath.apply(&services("10.2.0.1, { address: 10.2.0.2, weight: 256 }"));
            // Of 257 slots one is the old backend's.
            let chosen = (0..8).any(|_| {
                send(datapath, &end(Packet::v4("192.0.2.7", "10.96.0.10").tcp(4242, 80)).ack().bytes());
                send(datapath, &syn("192.0.2.7", 4242)).0 == "10.2.0.2:80"
            });
            assert!(chosen, "eight new connections went to where the old one was");
        }
    });
}

#[test]
fn a_connection_that_its_backend_has_ended_is_chosen_for_anew() {
    with_datapath(SIZES, |datapath| {
        for is_established in [false, true] {
            datapath.apply(&services("10.2.0.1"));
            let ours = if is_established {
                connect(datapath, "192.0.2.7", 4242)
            } else {
                send(datapath, &syn("192.0.2.7", 4242)).1
            };
            let end = reply(ours).fin().ack().sequence(ISN + 1, 1001).bytes();
            assert_eq!(datapath.from_clients(&end).action, TX);
            datapath.apply(&services("{ address: 10.2.0.1, weight: 0 }, 10.2.0.2"));
            assert_eq!(send(datapath, &data("192.0.2.7", 4242)).0, "10.2.0.1:80", "the client may have more to say");
            assert_eq!(send(datapath, &syn("192.0.2.7", 4242)).0, "10.2.0.2:80", "{is_established}");
            datapath.forget();
        }
    });
}

#[test]
fn two_clients_with_the_same_port_do_not_share_a_tuple() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        let clients: Vec<_> = (1..=200).map(|host| format!("192.0.2.{host}")).collect();
        let mut ports: Vec<_> = clients.iter().map(|client| send(datapath, &syn(client, 4242)).1).collect();
        assert_eq!(ports[0], 4242, "the first keeps its port");
        for (client, &port) in clients.iter().zip(&ports) {
            let reply = Packet::v4("10.2.0.1", "10.0.0.1").tcp(80, port).syn().ack();
            let result = datapath.from_clients(&reply.bytes());
            let expected = Packet::v4("10.96.0.10", client).tcp(80, 4242).syn().ack().ttl(63);
            let expected = expected.ethernet(tests::datapath::UP_MAC, tests::datapath::ROUTER_MAC);
            assert_packets_equal(&expected.bytes(), &result.packet);
            assert_eq!(send(datapath, &data(client, 4242)).1, port, "and keeps it");
        }
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), clients.len(), "each has a port of its own");
    });
}

#[test]
fn one_backend_behind_two_services_answers_for_the_right_one() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(
            "services:\n  - { name: a, addresses: [10.96.0.10], ports: [{ port: 80 }], backends: [10.2.0.1] }\n  \
             - { name: b, addresses: [10.96.0.11], ports: [{ port: 80 }], backends: [10.2.0.1] }\n",
        );
        for vip in ["10.96.0.10", "10.96.0.11"] {
            let (to, port) = send(datapath, &Packet::v4("192.0.2.7", vip).tcp(4242, 80).syn().bytes());
            assert_eq!(to, "10.2.0.1:80");
            let result = datapath.from_clients(&Packet::v4("10.2.0.1", "10.0.0.1").tcp(80, port).syn().ack().bytes());
            assert!(
                describe(&result.packet).contains(&format!("{vip}:80 > 192.0.2.7:4242")),
                "{}",
                describe(&result.packet)
            );
        }
    });
}

#[test]
fn when_every_port_towards_a_backend_is_taken_that_is_counted() {
    with_datapath(SIZES, |datapath| {
        datapath.with_snat_ports(6000..=6003, &services("10.2.0.1"), |datapath| {
            // The client's own port and the four of the range.
            let mut ports: Vec<u16> = Vec::new();
            let mut refused = 0;
            for host in 1..=60 {
                let result = datapath.from_clients(&syn(&format!("192.0.2.{host}"), 4242));
                match result.action {
                    TX => {
                        let Ok(AnySegment::V4(sent)) = parse::packet(&result.packet[..]) else { panic!("not IPv4") };
                        ports.push(sent.key.source_port.to_host());
                    }
                    _ => refused += 1,
                }
            }
            ports.sort_unstable();
            assert_eq!(ports, [4242, 6000, 6001, 6002, 6003], "random tries find a free port sooner or later");
            assert_eq!(datapath.count("snat-ports-exhausted"), refused);
            // A connection that ends frees its port for the next one only when it has been quiet for a while.
            refuse(datapath, &syn("192.0.2.99", 4242), "snat-ports-exhausted");
        });
    });
}

#[test]
fn a_next_hop_is_remembered_until_the_epoch_ends() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        let to = |packet: &[u8]| <[u8; 6]>::try_from(&packet[0..6]).expect("six bytes");
        let result = datapath.from_clients(&syn("192.0.2.7", 4242));
        assert_eq!(to(&result.packet), tests::datapath::ROUTER_MAC);
        let status = Command::new("ip")
            .args(["neigh", "replace", "10.0.0.2", "lladdr", "02:00:00:00:00:99", "dev", "up0", "nud", "permanent"])
            .status();
        assert!(status.is_ok_and(|status| status.success()), "the router's address can't be changed");
        let result = datapath.from_clients(&data("192.0.2.7", 4242));
        assert_eq!(to(&result.packet), tests::datapath::ROUTER_MAC, "the entry holds the next hop");
        datapath.tables.dataplane_mut().begin_epoch();
        for _ in 0..2 {
            let result = datapath.from_clients(&data("192.0.2.7", 4242));
            assert_eq!(to(&result.packet), [2, 0, 0, 0, 0, 0x99], "a new epoch, a new answer");
            assert_eq!(result.action, TX);
        }
    });
}

#[test]
fn flows_are_counted_where_they_are_opened() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1, 10.2.0.2"));
        for port in 1000..1100 {
            send(datapath, &syn("192.0.2.7", port));
            send(datapath, &syn("192.0.2.7", port));
            send(datapath, &data("192.0.2.7", port));
        }
        assert_eq!(datapath.flows(), 100);
    });
}

#[test]
fn a_packet_without_a_backend_leaves_no_flow() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services(""));
        assert_answered(datapath, &syn("192.0.2.7", 4242));
        refuse(datapath, &data("192.0.2.7", 4242), "no-flow");
        datapath.apply(&services("203.0.113.9"));
        refuse(datapath, &syn("192.0.2.7", 4242), "no-route");
        refuse(datapath, &data("192.0.2.7", 4242), "no-flow");
        assert_eq!(datapath.entries(), (0, 0));
    });
}

#[test]
fn the_oldest_flows_make_room_when_the_table_is_full() {
    with_datapath(Sizes { flows: 512, ..SIZES }, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        for port in 1024..11_024 {
            send(datapath, &syn("192.0.2.7", port));
        }
        assert_eq!(datapath.count("flow-table-full"), 0);
        send(datapath, &data("192.0.2.7", 11_023));
    });
}

#[test]
fn a_connection_in_which_only_the_client_talks_can_still_be_answered() {
    with_datapath(Sizes { flows: 512, ..SIZES }, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        let ours = connect(datapath, "192.0.2.7", 4242);
        let answer = reply(ours).ack().payload(b"at last").bytes();
        // Others come and go, so many that the entry for the replies, which nobody sends, is forgotten.
        for port in 1024..8000 {
            connect(datapath, "192.0.2.8", port);
            if port % 8 == 0 {
                send(datapath, &data("192.0.2.7", 4242));
            }
        }
        datapath.tables.dataplane_mut().begin_epoch();
        std::thread::sleep(std::time::Duration::from_millis(4400));
        assert_eq!(send(datapath, &data("192.0.2.7", 4242)).1, ours, "the connection goes on");
        let result = datapath.from_clients(&answer);
        let told = describe(&result.packet);
        assert!(result.action == TX && told.contains("10.96.0.10:80 > 192.0.2.7:4242"), "{told}");
    });
}

#[test]
fn the_ports_of_the_hosts_own_sockets_stay_theirs() {
    with_datapath(SIZES, |datapath| {
        datapath.apply(&services("10.2.0.1"));
        let _udp = std::net::UdpSocket::bind("10.0.0.1:4242").expect("the address is ours");
        let _tcp = std::net::TcpListener::bind("10.0.0.1:4243").expect("the address is ours");
        let (_, port) = send(datapath, &datagram("192.0.2.7", 4242));
        assert_ne!(port, 4242, "a socket of the host has it");
        let (_, port) = send(datapath, &syn("192.0.2.7", 4243));
        assert_ne!(port, 4243, "a socket of the host listens there");
        assert_eq!(send(datapath, &syn("192.0.2.7", 4242)).1, 4242, "by TCP it is free");
        assert_eq!(send(datapath, &datagram("192.0.2.7", 4243)).1, 4243, "by UDP it is free");
        let _any = std::net::UdpSocket::bind("0.0.0.0:4244").expect("the port is free");
        let init = Packet::v4("192.0.2.7", "10.96.0.10").sctp(4244, 90, 1).bytes();
        assert_eq!(send(datapath, &init).1, 4244, "by SCTP it is free");
    });
}
