//! What processes of the node itself send where no hook of sockets sees to it: translated as it leaves, and the answers where they come in.

use tests::{
    datapath::{DOWN_MAC, POD_MAC, ROUTER_MAC, UP_MAC, backend_mac, pod_mac},
    packet::{Packet, THEIR_MAC},
};

use super::{
    Expect, Family, Row, SNAT_PORT, by_backend, by_pod,
    icmp::error,
    leaving, own, own_at_once,
    refusals::{answer, told_too_big},
    row,
};

pub(super) fn rows(f: Family) -> Vec<Row> {
    [asks(f), is_answered(f), answers_itself(f), is_refused(f), others(f)].into_iter().flatten().collect()
}

/// From us to a service, or to whatever else.
fn ask(f: Family, to: &str) -> Packet {
    (f.packet)(&f.up(), to)
}

/// From us to the backend on our link, as the frame looks there: from our address on that link.
fn to_backend(f: Family) -> Packet {
    (f.packet)(&f.down(), f.backend).ethernet(DOWN_MAC, backend_mac(10))
}

/// From us to the pod, as the frame looks there.
fn to_pod(f: Family) -> Packet {
    ask(f, f.pod).ethernet(POD_MAC, pod_mac(10))
}

/// Translated and sent.
fn sent(packet: &Packet) -> Expect {
    Expect::Sent("own", packet.bytes())
}

fn handed(packet: &Packet) -> Expect {
    Expect::Handed("reply-on-node", packet.bytes())
}

fn asks(f: Family) -> Vec<Row> {
    let syn = |to: &str| ask(f, to).tcp(4242, 80).syn();
    let pod = f.service(96, 70);
    let chunks = || [&[1, 0, 0, 4][..], &[7; 2800]].concat();
    vec![
        row(
            "a connection leaves from a port of ours",
            own(&syn(f.vip)),
            sent(&to_backend(f).tcp(SNAT_PORT, 8080).syn()),
        ),
        row(
            "and stays there",
            own(&ask(f, f.vip).tcp(4242, 80).ack().sequence(1001, 8).payload(b"data")),
            sent(&to_backend(f).tcp(SNAT_PORT, 8080).ack().sequence(1001, 8).payload(b"data")),
        )
        .after([own(&syn(f.vip)), by_backend(&reply(f).syn().ack().sequence(7, 1001))]),
        row("by UDP", own(&ask(f, f.vip).udp(4242, 53)), sent(&to_backend(f).udp(SNAT_PORT, 5353))),
        row(
            "from whatever address",
            own(&(f.packet)(&f.pod_side(), f.vip).tcp(4242, 80).syn()),
            sent(&to_backend(f).tcp(SNAT_PORT, 8080).syn()),
        ),
        row("to a pod", own(&syn(&pod)), sent(&to_pod(f).tcp(SNAT_PORT, 8080).syn())),
        row(
            "whose TTL is its own business",
            own(&syn(&pod).ttl(1)),
            sent(&to_pod(f).tcp(SNAT_PORT, 8080).syn().ttl(1)),
        ),
        row(
            "of a neighbour that the kernel finds",
            own(&syn(f.unresolved_vip)),
            sent(&(f.packet)(&f.down(), f.unresolved_backend).tcp(SNAT_PORT, 80).syn()),
        ),
        row(
            "by SCTP from its own port",
            own(&ask(f, &f.service(96, 80)).sctp(4242, 90, 1)),
            sent(&to_backend(f).sctp(4242, 90, 1)),
        ),
        row(
            "several at once, none of which is too big",
            own_at_once(&ask(f, f.vip).udp(4242, 53).payload(&[7; 2800]), 1400),
            sent(&to_backend(f).udp(SNAT_PORT, 5353).payload(&[7; 2800])),
        ),
        row(
            "which SCTP has cut as it likes (GSO_BY_FRAGS)",
            own_at_once(&ask(f, &f.service(96, 80)).sctp(4242, 90, 1).payload(&chunks()), 0xFFFF),
            sent(&to_backend(f).sctp(4242, 90, 1).payload(&chunks())),
        ),
        row(
            "to a NodePort",
            own(&ask(f, &f.down()).tcp(4242, 30093).syn()),
            sent(&to_backend(f).tcp(SNAT_PORT, 8080).syn()),
        ),
        row(
            "policy Local is for those outside",
            own(&syn(&f.service(97, 91))),
            sent(&to_backend(f).tcp(SNAT_PORT, 8080).syn()),
        ),
        row("and so are source ranges", own(&syn(&f.service(97, 93))), sent(&to_backend(f).tcp(SNAT_PORT, 8080).syn())),
        row(
            "two to one backend need two ports",
            own(&ask(f, f.vip).tcp(4243, 80).syn()),
            Expect::Dropped("snat-ports-exhausted"),
        )
        .after([own(&syn(f.vip))]),
    ]
}

/// What the backend answers to the first of them.
fn reply(f: Family) -> Packet {
    (f.packet)(f.backend, &f.down()).tcp(8080, SNAT_PORT)
}

fn is_answered(f: Family) -> Vec<Row> {
    let syn = |to: &str| own(&ask(f, to).tcp(4242, 80).syn());
    let from_service = |vip: &str| (f.packet)(vip, &f.up()).tcp(80, 4242).syn().ack();
    vec![
        row(
            "the answer is the service's where it comes in",
            by_backend(&reply(f).syn().ack()),
            handed(&from_service(f.vip)),
        )
        .after([syn(f.vip)]),
        row(
            "and that of a pod, which goes on by loopback",
            by_pod(&(f.packet)(f.pod, &f.up()).tcp(8080, SNAT_PORT).syn().ack()),
            sent(&from_service(&f.service(96, 70)).ethernet(THEIR_MAC, [0; 6])),
        )
        .after([syn(&f.service(96, 70))]),
        row(
            "an error about a request, too",
            error(f, f.client, &f.down(), &to_backend(f).tcp(SNAT_PORT, 8080).syn(), f.header + 8),
            handed(&error(f, f.vip, &f.up(), &ask(f, f.vip).tcp(4242, 80).syn(), f.header + 8)),
        )
        .after([syn(f.vip)]),
        row("its sender can't be someone outside", ask(f, f.vip).tcp(4242, 80).ack(), Expect::Passed("not-service"))
            .after([syn(f.vip)]),
    ]
}

/// The backend is another process of the node.
fn answers_itself(f: Family) -> Vec<Row> {
    let syn = || ask(f, f.here).tcp(4242, 80).syn();
    vec![
        row(
            "to the node itself: as if it came in",
            own(&syn().ethernet(UP_MAC, ROUTER_MAC)),
            sent(&ask(f, &f.down()).tcp(SNAT_PORT, 80).syn().ethernet(UP_MAC, UP_MAC)),
        ),
        row(
            "and the answer is the service's, which goes on by loopback",
            own(&(f.packet)(&f.down(), &f.up()).tcp(80, SNAT_PORT).syn().ack()),
            sent(&(f.packet)(f.here, &f.up()).tcp(80, 4242).syn().ack().ethernet(THEIR_MAC, [0; 6])),
        )
        .after([own(&syn())]),
    ]
}

fn is_refused(f: Family) -> Vec<Row> {
    let reset = |from: &str, port| answer(f, from, &f.up()).tcp(port, 4242).rst().ack().sequence(0, 1001).window(0);
    let too_big = || ask(f, f.vip).udp(4242, 53).payload(&[7; 1473]);
    vec![
        row(
            "no backend",
            own(&ask(f, f.empty).tcp(4242, 80).syn()),
            Expect::Sent("refused-no-backend", reset(f.empty, 80).bytes()),
        ),
        row(
            "a wrong port",
            own(&ask(f, f.vip).tcp(4242, 81).syn()),
            Expect::Sent("refused-wrong-port", reset(f.vip, 81).bytes()),
        ),
        row("too big for the way", own(&too_big()), told_too_big(f, f.vip, &f.up(), &too_big(), 1500)),
        row("each of several", own_at_once(&too_big(), 1473), told_too_big(f, f.vip, &f.up(), &too_big(), 1500)),
        row(
            "internal policy Local",
            own(&ask(f, &f.service(96, 92)).tcp(4242, 80).syn()),
            Expect::Dropped("no-local-endpoints"),
        ),
        row("no route", own(&ask(f, f.unreachable).tcp(4242, 80).syn()), Expect::Dropped("no-route")),
        row("no connection", own(&ask(f, f.vip).tcp(4242, 80).ack()), Expect::Dropped("no-flow")),
        row("a ping", own(&ask(f, f.vip).echo(7, 1)), Expect::Dropped("echo-refused")),
    ]
}

fn others(f: Family) -> Vec<Row> {
    vec![
        row("what else it sends", own(&ask(f, f.client).tcp(4242, 80).syn()), Expect::Passed("not-service")),
        row(
            "also to a backend itself",
            own(&(f.packet)(&f.down(), f.backend).tcp(4242, 8080).syn()),
            Expect::Passed("not-service"),
        ),
        row(
            "what it has to say to an external address, which may be another machine's",
            own(&ask(f, &f.service(98, 70)).echo(7, 1)),
            Expect::Passed("other-icmp"),
        ),
        row(
            "and a connection that it had there before",
            own(&ask(f, &f.service(98, 70)).tcp(4242, 80).ack()),
            Expect::Passed("not-service"),
        ),
        row(
            "what others sent was looked at when it came in",
            leaving(&ask(f, f.vip).tcp(4242, 80).syn()),
            Expect::Passed("not-service"),
        ),
    ]
}
