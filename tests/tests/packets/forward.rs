//! Packets between clients outside and backends on other nodes.

use tests::{
    datapath::{ROUTER_MAC, UP_MAC},
    packet::{OUR_MAC, Packet, THEIR_MAC},
};

use super::{Expect, Family, Row, by_backend, redirect, row, tx};

pub(super) fn rows(f: Family) -> Vec<Row> {
    [requests(f), replies(f), lives(f), tags(f)].into_iter().flatten().collect()
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

/// Frames with VLAN tags.
fn tags(f: Family) -> Vec<Row> {
    let syn = || f.ask(f.routed_vip).tcp(4242, 80).syn();
    let sent = || (f.packet)(&f.up(), f.routed_backend).tcp(4242, 80).syn();
    let handed = |packet: Packet| Expect::Handed("routed-by-stack", packet.bytes());
    vec![
        // The backend is on the untagged network of this device.
        row("out of the VLAN, the stack takes off the tag", syn().vlan(7), handed(sent().vlan(7))),
        row("or both", syn().vlan(7).vlan(8), handed(sent().vlan(7).vlan(8))),
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
