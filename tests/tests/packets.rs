//! The packet table: packets through the loaded program, one by one, and what has to become of each.
//!
//! A row says which packet comes from where, after which others, and what is expected: the reason that is counted, and the
//! packet afterwards to the last byte. Rows with a family are run for IPv4 and for IPv6.
#![expect(clippy::indexing_slicing, reason = "this is test code: it fails by panicking")]

use std::{
    fmt::Write as _,
    panic::{self, AssertUnwindSafe},
};

use lb_userspace::dataplane::Sizes;
use tests::{
    datapath::{DOWN, DOWN_MAC, Datapath, ROUTER_MAC, UP, UP_MAC, backend_mac, with_datapath},
    packet::{OUR_MAC, Packet, THEIR_MAC, assert_packets_equal, describe, verify_checksums},
};

const SIZES: Sizes = Sizes { services: 64, backends: 64, slots: 4096, flows: 4096 };

/// One backend each, so that it is known where a packet goes.
const SERVICES: &str = r#"
services:
  - name: web
    addresses: [10.96.0.10, "fd00:96::10"]
    ports:
      - { name: http, port: 80, targetPort: 8080 }
      - { name: dns, port: 53, targetPort: 5353, protocol: UDP }
    backends: [10.0.1.10, "fd00:1::a"]
  - name: behind-the-router
    addresses: [10.96.0.20, "fd00:96::20"]
    ports: [{ name: tcp, port: 80 }, { name: udp, port: 80, protocol: UDP }]
    backends: [10.2.0.5, "fd00:b::5"]
  - name: empty
    addresses: [10.96.0.30, "fd00:96::30"]
    ports: [{ port: 80 }]
    backends: []
  - name: drained
    addresses: [10.96.0.31, "fd00:96::31"]
    ports: [{ port: 80 }]
    backends: [{ address: 10.0.1.10, weight: 0 }, { address: "fd00:1::a", weight: 0 }]
  - name: unreachable
    addresses: [10.96.0.40, "fd00:96::40"]
    ports: [{ port: 80 }]
    backends: [203.0.113.9, "2001:db8:dead::9"]
  - name: unresolved
    addresses: [10.96.0.50, "fd00:96::50"]
    ports: [{ name: tcp, port: 80 }, { name: udp, port: 80, protocol: UDP }]
    backends: [10.0.1.99, "fd00:1::99"]
  - name: here
    addresses: [10.96.0.60, "fd00:96::60"]
    ports: [{ port: 80 }]
    backends: [10.0.1.1, "fd00:1::1"]
"#;

/// The addresses of one family.
#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    client: &'static str,
    vip: &'static str,
    backend: &'static str,
    routed_vip: &'static str,
    routed_backend: &'static str,
    empty: &'static str,
    drained: &'static str,
    unreachable: &'static str,
    unresolved_vip: &'static str,
    unresolved_backend: &'static str,
    here: &'static str,
    packet: fn(&str, &str) -> Packet,
}

const V4: Family = Family {
    name: "IPv4",
    client: "192.0.2.7",
    vip: "10.96.0.10",
    backend: "10.0.1.10",
    routed_vip: "10.96.0.20",
    routed_backend: "10.2.0.5",
    empty: "10.96.0.30",
    drained: "10.96.0.31",
    unreachable: "10.96.0.40",
    unresolved_vip: "10.96.0.50",
    unresolved_backend: "10.0.1.99",
    here: "10.96.0.60",
    packet: Packet::v4,
};

const V6: Family = Family {
    name: "IPv6",
    client: "2001:db8::7",
    vip: "fd00:96::10",
    backend: "fd00:1::a",
    routed_vip: "fd00:96::20",
    routed_backend: "fd00:b::5",
    empty: "fd00:96::30",
    drained: "fd00:96::31",
    unreachable: "fd00:96::40",
    unresolved_vip: "fd00:96::50",
    unresolved_backend: "fd00:1::99",
    here: "fd00:96::60",
    packet: Packet::v6,
};

impl Family {
    /// From the client to a service.
    fn ask(&self, to: &str) -> Packet {
        (self.packet)(self.client, to)
    }

    /// From us to the backend on our link, as the frame looks there.
    fn forwarded(&self) -> Packet {
        (self.packet)(&self.down(), self.backend).ethernet(DOWN_MAC, backend_mac(10)).ttl(63)
    }

    /// From the backend on our link to us.
    fn reply(&self) -> Packet {
        (self.packet)(self.backend, &self.down())
    }

    /// From a service to the client, as the frame looks towards the router.
    fn returned(&self, from: &str) -> Packet {
        (self.packet)(from, self.client).ethernet(UP_MAC, ROUTER_MAC).ttl(63)
    }

    fn down(&self) -> String {
        if self.name == "IPv4" { DOWN.0.to_string() } else { DOWN.1.to_string() }
    }

    fn up(&self) -> String {
        if self.name == "IPv4" { UP.0.to_string() } else { UP.1.to_string() }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum From {
    Clients,
    Backends,
}

/// What has to become of a packet.
enum Expect {
    /// Counted so, and otherwise this.
    Sent(&'static str, Vec<u8>),
    /// Counted so, and given to the stack translated like this.
    Handed(&'static str, Vec<u8>),
    /// Counted so, and given to the stack as it was.
    Passed(&'static str),
    /// Counted so, and gone.
    Dropped(&'static str),
}

struct Row {
    name: String,
    before: Vec<(From, Vec<u8>)>,
    from: From,
    given: Vec<u8>,
    expect: Expect,
}

fn row(name: impl Into<String>, given: impl Into<Given>, expect: Expect) -> Row {
    let given = given.into();
    Row { name: name.into(), before: Vec::new(), from: given.0, given: given.1, expect }
}

/// A packet with the side that it comes from: clients, unless said otherwise.
struct Given(From, Vec<u8>);

impl std::convert::From<Packet> for Given {
    fn from(packet: Packet) -> Self {
        Self(From::Clients, packet.bytes())
    }
}

impl std::convert::From<Vec<u8>> for Given {
    fn from(bytes: Vec<u8>) -> Self {
        Self(From::Clients, bytes)
    }
}

fn by_backend(packet: &Packet) -> Given {
    Given(From::Backends, packet.bytes())
}

impl Row {
    fn after(mut self, packets: impl IntoIterator<Item = Given>) -> Self {
        self.before.extend(packets.into_iter().map(|Given(from, bytes)| (from, bytes)));
        self
    }
}

fn tx(packet: &Packet) -> Expect {
    Expect::Sent("tx", packet.bytes())
}

fn redirect(packet: &Packet) -> Expect {
    Expect::Sent("redirect", packet.bytes())
}

#[test]
fn every_row_holds() {
    let mut rows = Vec::new();
    for family in [V4, V6] {
        let mut of_family = Vec::new();
        of_family.extend(requests(family));
        of_family.extend(replies(family));
        of_family.extend(lives(family));
        of_family.extend(refusals(family));
        of_family.extend(tags(family));
        for row in &mut of_family {
            row.name = format!("{}: {}", family.name, row.name);
        }
        rows.extend(of_family);
    }
    rows.extend(ipv4_only());
    rows.extend(ipv6_only());
    rows.extend(malformed());
    println!("{} rows", rows.len());
    assert!(rows.len() >= 60, "the table has shrunk to {} rows", rows.len());
    let failures = with_datapath(SIZES, |datapath| {
        let mut failures = String::new();
        for row in &rows {
            // Each row begins with no flows: those of the row before lose their services, and the tables are made anew.
            if let Err(cause) = panic::catch_unwind(AssertUnwindSafe(|| datapath.afresh(SERVICES, |it| check(it, row))))
            {
                let text = cause.downcast_ref::<String>().cloned().unwrap_or_default();
                let _ = writeln!(failures, "── {}\n{text}\n", row.name);
            }
        }
        failures
    });
    assert!(failures.is_empty(), "\n{failures}");
}

#[track_caller]
fn check(datapath: &mut Datapath, row: &Row) {
    for (from, packet) in &row.before {
        run(datapath, *from, packet);
    }
    let (reason, action, expected) = match &row.expect {
        Expect::Sent(reason, packet) => (*reason, if *reason == "tx" { 3 } else { 4 }, packet),
        Expect::Handed(reason, packet) => (*reason, 2, packet),
        Expect::Passed(reason) => (*reason, 2, &row.given),
        Expect::Dropped(reason) => (*reason, 1, &row.given),
    };
    let before = datapath.counts();
    let (got_action, got) = run(datapath, row.from, &row.given);
    let after = datapath.counts();
    let counted: Vec<_> =
        after.iter().filter(|(name, count)| before[*name] != **count).map(|(name, _)| *name).collect();
    assert_eq!(counted, [reason], "counted for {}", describe_any(&row.given));
    assert_eq!(got_action, action, "the XDP action");
    assert_packets_equal(expected, &got);
    if matches!(row.expect, Expect::Sent(..) | Expect::Handed(..)) {
        verify_checksums(&got);
    }
}

fn run(datapath: &mut Datapath, from: From, packet: &[u8]) -> (u32, Vec<u8>) {
    let result = match from {
        From::Clients => datapath.from_clients(packet),
        From::Backends => datapath.from_backends(packet),
    };
    (result.action, result.packet)
}

/// Also of what can't be told in a line.
fn describe_any(bytes: &[u8]) -> String {
    panic::catch_unwind(|| describe(bytes)).unwrap_or_else(|_| format!("{} bytes", bytes.len()))
}

/// A client's packets on their way to a backend.
fn requests(f: Family) -> Vec<Row> {
    let syn = |to| f.ask(to).tcp(4242, 80).syn();
    let mut rows = vec![
        row("SYN to a backend on our link", syn(f.vip), redirect(&f.forwarded().tcp(4242, 8080).syn())),
        row(
            "SYN with options and payload",
            syn(f.vip).tcp_options(&[2, 4, 5, 180]).payload(b"fast open"),
            redirect(&f.forwarded().tcp(4242, 8080).syn().tcp_options(&[2, 4, 5, 180]).payload(b"fast open")),
        ),
        row(
            "UDP",
            f.ask(f.vip).udp(4242, 53).payload(b"query"),
            redirect(&f.forwarded().udp(4242, 5353).payload(b"query")),
        ),
        row(
            "UDP of odd length",
            f.ask(f.vip).udp(4242, 53).payload(b"odd"),
            redirect(&f.forwarded().udp(4242, 5353).payload(b"odd")),
        ),
        row("UDP without payload", f.ask(f.vip).udp(4242, 53), redirect(&f.forwarded().udp(4242, 5353))),
        row(
            "back out of the same interface, to the same port",
            syn(f.routed_vip),
            tx(&(f.packet)(&f.up(), f.routed_backend).tcp(4242, 80).syn().ethernet(UP_MAC, ROUTER_MAC).ttl(63)),
        ),
        row("DSCP and ECN stay", syn(f.vip).tos(0xBA), redirect(&f.forwarded().tcp(4242, 8080).syn().tos(0xBA))),
        row(
            "the next packet of a connection",
            f.ask(f.vip).tcp(4242, 80).ack().payload(b"GET /"),
            redirect(&f.forwarded().tcp(4242, 8080).ack().payload(b"GET /")),
        )
        .after([syn(f.vip).into()]),
        row("a SYN sent again goes to the same place", syn(f.vip), redirect(&f.forwarded().tcp(4242, 8080).syn()))
            .after([syn(f.vip).into()]),
        row("TTL 2 is enough", syn(f.vip).ttl(2), redirect(&f.forwarded().tcp(4242, 8080).syn().ttl(1))),
        row(
            "a full-sized packet",
            f.ask(f.vip).udp(4242, 53).payload(&vec![7; if f.name == "IPv4" { 1472 } else { 1452 }]),
            redirect(&f.forwarded().udp(4242, 5353).payload(&vec![7; if f.name == "IPv4" { 1472 } else { 1452 }])),
        ),
    ];
    rows.push(row(
        "the stack resolves the next hop: translated, TTL and frame left to it",
        f.ask(f.unresolved_vip).tcp(4242, 80).syn(),
        Expect::Handed(
            "neighbour-unresolved",
            (f.packet)(&f.down(), f.unresolved_backend).tcp(4242, 80).syn().ethernet(THEIR_MAC, OUR_MAC).bytes(),
        ),
    ));
    rows.push(
        row(
            "and again with the next packet, by UDP",
            f.ask(f.unresolved_vip).udp(4242, 80).payload(b"2"),
            Expect::Handed(
                "neighbour-unresolved",
                (f.packet)(&f.down(), f.unresolved_backend).udp(4242, 80).payload(b"2").bytes(),
            ),
        )
        .after([f.ask(f.unresolved_vip).udp(4242, 80).payload(b"1").into()]),
    );
    rows
}

/// A backend's packets on their way to the client.
fn replies(f: Family) -> Vec<Row> {
    let syn = || f.ask(f.vip).tcp(4242, 80).syn();
    vec![
        row(
            "SYN-ACK",
            by_backend(&f.reply().tcp(8080, 4242).syn().ack()),
            redirect(&f.returned(f.vip).tcp(80, 4242).syn().ack()),
        )
        .after([syn().into()]),
        row(
            "data",
            by_backend(&f.reply().tcp(8080, 4242).ack().payload(b"200 OK")),
            redirect(&f.returned(f.vip).tcp(80, 4242).ack().payload(b"200 OK")),
        )
        .after([syn().into()]),
        row(
            "RST",
            by_backend(&f.reply().tcp(8080, 4242).rst().ack()),
            redirect(&f.returned(f.vip).tcp(80, 4242).rst().ack()),
        )
        .after([syn().into()]),
        row(
            "UDP",
            by_backend(&f.reply().udp(5353, 4242).payload(b"answer")),
            redirect(&f.returned(f.vip).udp(53, 4242).payload(b"answer")),
        )
        .after([f.ask(f.vip).udp(4242, 53).payload(b"query").into()]),
        row(
            "by the interface that the client is on",
            (f.packet)(f.routed_backend, &f.up()).tcp(80, 4242).syn().ack(),
            tx(&f.returned(f.routed_vip).tcp(80, 4242).syn().ack()),
        )
        .after([f.ask(f.routed_vip).tcp(4242, 80).syn().into()]),
        row(
            "from another port than the flow's is the host's",
            by_backend(&f.reply().tcp(8081, 4242).ack()),
            Expect::Passed("not-service"),
        )
        .after([syn().into()]),
        row("of no flow is the host's", by_backend(&f.reply().tcp(8080, 4243).ack()), Expect::Passed("not-service"))
            .after([syn().into()]),
        row(
            "UDP where the flow is TCP is the host's",
            by_backend(&f.reply().udp(8080, 4242)),
            Expect::Passed("not-service"),
        )
        .after([syn().into()]),
        row(
            "with TTL 1 is the stack's",
            by_backend(&f.reply().tcp(8080, 4242).syn().ack().ttl(1)),
            Expect::Dropped("reply-ttl-expired"),
        )
        .after([syn().into()]),
    ]
}

/// How connections begin and end.
fn lives(f: Family) -> Vec<Row> {
    let packet = || f.ask(f.vip).tcp(4242, 80);
    let forwarded = || f.forwarded().tcp(4242, 8080);
    vec![
        row("the FIN goes through", packet().fin().ack(), redirect(&forwarded().fin().ack()))
            .after([packet().syn().into(), packet().ack().into()]),
        row("so does what follows it", packet().ack(), redirect(&forwarded().ack()))
            .after([packet().syn().into(), packet().fin().ack().into()]),
        row("the RST goes through", packet().rst(), redirect(&forwarded().rst())).after([packet().syn().into()]),
        row("a SYN after the RST opens anew", packet().syn(), redirect(&forwarded().syn()))
            .after([packet().syn().into(), packet().rst().into()]),
        row(
            "the backend's FIN goes through",
            by_backend(&f.reply().tcp(8080, 4242).fin().ack()),
            redirect(&f.returned(f.vip).tcp(80, 4242).fin().ack()),
        )
        .after([packet().syn().into(), packet().ack().into()]),
        row("the middle of an unknown connection opens nothing", packet().ack(), Expect::Dropped("no-flow")),
        row("an unknown SYN-ACK opens nothing", packet().syn().ack(), Expect::Dropped("no-flow")),
        row("an unknown FIN opens nothing", packet().fin().ack(), Expect::Dropped("no-flow")),
        row("an unknown RST opens nothing", packet().rst(), Expect::Dropped("no-flow")),
        row("SYN with FIN opens nothing", packet().syn().fin(), Expect::Dropped("no-flow")),
    ]
}

/// What is not balanced, and why.
fn refusals(f: Family) -> Vec<Row> {
    let big = if f.name == "IPv4" { 1473 } else { 1453 };
    vec![
        row("another port of a service's address", f.ask(f.vip).tcp(4242, 81).syn(), Expect::Passed("not-service")),
        row("another protocol on a service's port", f.ask(f.vip).udp(4242, 80), Expect::Passed("not-service")),
        row("another address", f.ask(f.client).tcp(4242, 80).syn(), Expect::Passed("not-service")),
        row("no backend", f.ask(f.empty).tcp(4242, 80).syn(), Expect::Dropped("no-backend")),
        row("no backend that takes new flows", f.ask(f.drained).tcp(4242, 80).syn(), Expect::Dropped("no-backend")),
        row("no route to the backend", f.ask(f.unreachable).tcp(4242, 80).syn(), Expect::Dropped("no-route")),
        row("the backend is this host", f.ask(f.here).tcp(4242, 80).syn(), Expect::Dropped("not-forwarded")),
        row("TTL 1", f.ask(f.vip).tcp(4242, 80).syn().ttl(1), Expect::Passed("ttl-expired")),
        row("TTL 0", f.ask(f.vip).tcp(4242, 80).syn().ttl(0), Expect::Passed("ttl-expired")),
        row(
            "larger than the way out takes",
            f.ask(f.vip).udp(4242, 53).payload(&vec![7; big]),
            Expect::Dropped("packet-too-big"),
        ),
        row("and in a flow", f.ask(f.vip).udp(4242, 53).payload(&vec![7; big]), Expect::Dropped("packet-too-big"))
            .after([f.ask(f.vip).udp(4242, 53).into()]),
        row("another protocol", f.ask(f.vip).protocol(132).payload(b"SCTP"), Expect::Passed("not-tcp-udp")),
        row(
            "a first fragment",
            f.ask(f.vip).udp(4242, 53).payload(&[0; 64]).fragment(0, true),
            Expect::Passed("fragment"),
        ),
        row(
            "a later fragment",
            f.ask(f.vip).udp(4242, 53).payload(&[0; 64]).fragment(8, false),
            Expect::Passed("fragment"),
        ),
    ]
}

/// Frames with VLAN tags.
fn tags(f: Family) -> Vec<Row> {
    let syn = || f.ask(f.routed_vip).tcp(4242, 80).syn();
    let sent = || (f.packet)(&f.up(), f.routed_backend).tcp(4242, 80).syn().ethernet(UP_MAC, ROUTER_MAC).ttl(63);
    vec![
        row("a tag stays, on the way back out", syn().vlan(7), tx(&sent().vlan(7))),
        row("two tags stay", syn().vlan(7).vlan(8), tx(&sent().vlan(7).vlan(8))),
        row(
            "to another device, the stack changes the tags",
            f.ask(f.vip).tcp(4242, 80).syn().vlan(7),
            Expect::Handed("routed-by-stack", (f.packet)(&f.down(), f.backend).tcp(4242, 8080).syn().vlan(7).bytes()),
        ),
        row(
            "three tags",
            syn().vlan(7).vlan(8).edit(|p| drop(p.splice(12..12, [0x88, 0xA8, 0, 9]))),
            Expect::Passed("vlan-too-deep"),
        ),
        row("a tag on what is not for us", f.ask(f.client).udp(1, 2).vlan(7), Expect::Passed("not-service")),
    ]
}

fn ipv4_only() -> Vec<Row> {
    let f = V4;
    vec![
        row(
            "IPv4: header options stay",
            f.ask(f.vip).tcp(4242, 80).syn().options(&[1; 8]),
            redirect(&f.forwarded().tcp(4242, 8080).syn().options(&[1; 8])),
        ),
        row(
            "IPv4: all forty bytes of options",
            f.ask(f.vip).udp(4242, 53).options(&[1; 40]),
            redirect(&f.forwarded().udp(4242, 5353).options(&[1; 40])),
        ),
        row(
            "IPv4: an absent UDP checksum stays absent",
            f.ask(f.vip).udp(4242, 53).without_checksum(),
            redirect(&f.forwarded().udp(4242, 5353).without_checksum()),
        ),
        row(
            "IPv4: and on the way back",
            by_backend(&f.reply().udp(5353, 4242).without_checksum()),
            redirect(&f.returned(f.vip).udp(53, 4242).without_checksum()),
        )
        .after([f.ask(f.vip).udp(4242, 53).into()]),
        row("IPv4: ICMP", f.ask(f.vip).protocol(1).payload(&[8, 0, 0, 0]), Expect::Passed("not-tcp-udp")),
        row("ARP", f.ask(f.vip).udp(1, 2).edit(|p| p[13] = 6), Expect::Passed("not-ip")),
        row(
            "IPv4: padding behind the packet is no part of it",
            f.ask(f.vip).udp(4242, 53).edit(|p| p.extend([0; 18])),
            Expect::Sent("redirect", f.forwarded().udp(4242, 5353).edit(|p| p.extend([0; 18]))),
        ),
    ]
}

fn ipv6_only() -> Vec<Row> {
    let f = V6;
    let syn = || f.ask(f.vip).tcp(4242, 80).syn();
    let sent = || f.forwarded().tcp(4242, 8080).syn();
    vec![
        row("IPv6: hop-by-hop options stay", syn().extension(0, 8), redirect(&sent().extension(0, 8))),
        row(
            "IPv6: four extension headers",
            syn().extension(0, 8).extension(60, 16).extension(43, 8).extension(60, 24),
            redirect(&sent().extension(0, 8).extension(60, 16).extension(43, 8).extension(60, 24)),
        ),
        row(
            "IPv6: five are too many",
            syn().extension(0, 8).extension(60, 8).extension(43, 8).extension(60, 8).extension(60, 8),
            Expect::Passed("extensions-too-deep"),
        ),
        row(
            "IPv6: the longest extension header",
            f.ask(f.routed_vip).udp(4242, 80).extension(60, 1400),
            tx(&(f.packet)(&f.up(), f.routed_backend)
                .udp(4242, 80)
                .extension(60, 1400)
                .ethernet(UP_MAC, ROUTER_MAC)
                .ttl(63)),
        ),
        row("IPv6: ICMPv6", f.ask(f.vip).protocol(58).payload(&[128, 0, 0, 0]), Expect::Passed("not-tcp-udp")),
        row("IPv6: no next header", f.ask(f.vip).protocol(59), Expect::Passed("not-tcp-udp")),
        row(
            "IPv6: an authentication header is not looked behind",
            f.ask(f.vip).protocol(51).payload(&[0; 24]),
            Expect::Passed("not-tcp-udp"),
        ),
    ]
}

/// Packets that end too early or contradict themselves: each goes to the stack as it came, with a reason of its own.
fn malformed() -> Vec<Row> {
    let tcp4 = || V4.ask(V4.vip).tcp(4242, 80).syn();
    let udp4 = || V4.ask(V4.vip).udp(4242, 53).payload(b"1234");
    let tcp6 = || V6.ask(V6.vip).tcp(4242, 80).syn();
    let udp6 = || V6.ask(V6.vip).udp(4242, 53).payload(b"1234");
    let passed = Expect::Passed;
    vec![
        row("a VLAN tag that is cut short", tcp4().vlan(7).edit(|p| p.truncate(15)), passed("malformed-ethernet")),
        row("IPv4: no header", tcp4().edit(|p| p.truncate(14)), passed("malformed-ipv4")),
        row("IPv4: header cut short", tcp4().edit(|p| p.truncate(33)), passed("malformed-ipv4")),
        row("IPv4: version 6", tcp4().edit(|p| p[14] = 0x65), passed("malformed-ipv4")),
        row("IPv4: header length of 16", tcp4().edit(|p| p[14] = 0x44), passed("malformed-ipv4")),
        row("IPv4: header longer than the packet", udp4().edit(|p| p[14] = 0x4F), passed("malformed-ipv4")),
        row("IPv4: total length below the header's", tcp4().edit(|p| p[17] = 19), passed("malformed-ipv4")),
        row("IPv4: total length beyond the frame", tcp4().edit(|p| p[17] = 41), passed("malformed-ipv4")),
        row("IPv4: TCP header cut short by the total length", tcp4().edit(|p| p[17] = 39), passed("malformed-tcp")),
        row("IPv4: TCP data offset of 4", tcp4().edit(|p| p[46] = 0x40), passed("malformed-tcp")),
        row("IPv4: TCP data offset beyond the packet", tcp4().edit(|p| p[46] = 0x60), passed("malformed-tcp")),
        row("IPv4: UDP header cut short", udp4().edit(|p| p[17] = 27), passed("malformed-udp")),
        row("IPv4: UDP length of 7", udp4().edit(|p| p[39] = 7), passed("malformed-udp")),
        row("IPv4: UDP length beyond the packet", udp4().edit(|p| p[39] = 13), passed("malformed-udp")),
        row("IPv6: no header", tcp6().edit(|p| p.truncate(14)), passed("malformed-ipv6")),
        row("IPv6: header cut short", tcp6().edit(|p| p.truncate(53)), passed("malformed-ipv6")),
        row("IPv6: version 4", tcp6().edit(|p| p[14] = 0x40), passed("malformed-ipv6")),
        row("IPv6: payload length beyond the frame", tcp6().edit(|p| p[19] = 21), passed("malformed-ipv6")),
        row(
            "IPv6: extension header beyond the packet",
            udp6().extension(0, 8).edit(|p| p[55] = 200),
            passed("malformed-ipv6"),
        ),
        row(
            "IPv6: extension header cut short",
            udp6().extension(0, 8).edit(|p| {
                p.truncate(55);
                p[19] = 1;
            }),
            passed("malformed-ipv6"),
        ),
        row("IPv6: TCP header cut short by the payload length", tcp6().edit(|p| p[19] = 19), passed("malformed-tcp")),
        row("IPv6: TCP data offset of 4", tcp6().edit(|p| p[66] = 0x40), passed("malformed-tcp")),
        row("IPv6: UDP length of 7", udp6().edit(|p| p[59] = 7), passed("malformed-udp")),
        row("IPv6: UDP length beyond the packet", udp6().edit(|p| p[59] = 13), passed("malformed-udp")),
    ]
}
