//! What the datapath remembers of flows, step by step through the loaded program.
#![expect(clippy::panic, reason = "this is test code: it fails by panicking")]

use std::process::Command;

use lb_common::parse::{self, AnySegment};
use lb_userspace::dataplane::Sizes;
use tests::{
    datapath::{Datapath, with_datapath},
    packet::{Packet, assert_packets_equal, describe, verify_checksums},
};

const SIZES: Sizes = Sizes { services: 16, backends: 16, slots: 1024, flows: 1 << 12 };
const TX: u32 = 3;

fn services(backends: &str) -> String {
    format!(
        "services:\n  - name: web\n    addresses: [10.96.0.10]\n    ports: [{{ name: tcp, port: 80 }}, \
         {{ name: udp, port: 80, protocol: UDP }}]\n    backends: [{backends}]\n"
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
        refuse(datapath, &datagram("192.0.2.7", 4242), "no-backend");
        datapath.apply(&services("10.2.0.3"));
        assert_eq!(send(datapath, &datagram("192.0.2.7", 4242)).0, "10.2.0.3:80");
        datapath.apply("services: []");
        let result = datapath.from_clients(&datagram("192.0.2.7", 4242));
        assert_eq!((result.action, datapath.count("not-service")), (2, 1), "with its service, too");
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
        datapath.tables.dataplane().begin_epoch();
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
        refuse(datapath, &syn("192.0.2.7", 4242), "no-backend");
        refuse(datapath, &data("192.0.2.7", 4242), "no-flow");
        datapath.apply(&services("203.0.113.9"));
        refuse(datapath, &syn("192.0.2.7", 4242), "no-route");
        refuse(datapath, &data("192.0.2.7", 4242), "no-flow");
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
        let (_, our_port) = send(datapath, &syn("192.0.2.7", 4242));
        let reply = Packet::v4("10.2.0.1", "10.0.0.1").tcp(80, our_port).ack().payload(b"at last").bytes();
        // Others come and go, so many that the entry for the replies, which nobody sends, is forgotten.
        for port in 1024..8000 {
            send(datapath, &syn("192.0.2.8", port));
            if port % 8 == 0 {
                send(datapath, &data("192.0.2.7", 4242));
            }
        }
        assert_eq!(datapath.from_clients(&reply).action, 2, "the table is too large for this test");
        std::thread::sleep(std::time::Duration::from_millis(4400));
        assert_eq!(send(datapath, &data("192.0.2.7", 4242)).1, our_port, "the connection goes on");
        let result = datapath.from_clients(&reply);
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
    });
}
