//! Backends and clients on this node: the stack takes requests to where they go after they were translated, and replies are
//! translated when they leave.

use tests::{
    datapath::{DOWN_MAC, backend_mac},
    packet::{OUR_MAC, Packet, THEIR_MAC},
};

use super::{Expect, Family, Row, SNAT_PORT, by_backend, by_pod, leaving, leaving_to_pod, redirect, row, tx};

pub(super) fn rows(f: Family) -> Vec<Row> {
    [backends(f), clients(f), hairpin(f), policies(f), source_ranges(f), node_ports(f)].into_iter().flatten().collect()
}

/// From one address to another, as it came.
fn between(f: Family, from: &str, to: &str) -> Packet {
    (f.packet)(from, to)
}

fn handed(reason: &'static str, packet: &Packet) -> Expect {
    Expect::Handed(reason, packet.bytes())
}

fn backends(f: Family) -> Vec<Row> {
    let vip = f.service(96, 70);
    let external = f.service(98, 70);
    let syn = || f.ask(&vip).tcp(4242, 80).syn();
    let query = || f.ask(&vip).udp(4242, 53).payload(b"query");
    vec![
        row(
            "to a pod: the client stays",
            syn(),
            handed("request-on-node", &between(f, f.client, f.pod).tcp(4242, 8080).syn()),
        ),
        row(
            "by UDP",
            query(),
            handed("request-on-node", &between(f, f.client, f.pod).udp(4242, 5353).payload(b"query")),
        ),
        row(
            "by an external address",
            f.ask(&external).tcp(4242, 80).syn(),
            handed("request-on-node", &between(f, f.client, f.pod).tcp(4242, 8080).syn()),
        ),
        row(
            "TTL 1 is the stack's to judge",
            syn().ttl(1),
            handed("request-on-node", &between(f, f.client, f.pod).tcp(4242, 8080).syn().ttl(1)),
        ),
        row(
            "to an address of the host itself",
            f.ask(f.here).tcp(4242, 80).syn(),
            handed("request-on-node", &between(f, f.client, &f.down()).tcp(4242, 80).syn()),
        ),
        row(
            "the pod's answer waits where it comes in",
            by_pod(&between(f, f.pod, f.client).tcp(8080, 4242).syn().ack()),
            Expect::Passed("reply-underway"),
        )
        .after([syn().into()]),
        row(
            "and is the service's when it leaves",
            leaving(&between(f, f.pod, f.client).tcp(8080, 4242).syn().ack()),
            handed("reply-on-node", &between(f, &vip, f.client).tcp(80, 4242).syn().ack()),
        )
        .after([syn().into()]),
        row(
            "in an established flow, too",
            leaving(&between(f, f.pod, f.client).tcp(8080, 4242).ack().payload(b"data")),
            handed("reply-on-node", &between(f, &vip, f.client).tcp(80, 4242).ack().payload(b"data")),
        )
        .after([
            syn().into(),
            leaving(&between(f, f.pod, f.client).tcp(8080, 4242).syn().ack().sequence(7, 1001)),
            f.ask(&vip).tcp(4242, 80).ack().sequence(1001, 8).into(),
        ]),
        row(
            "by UDP likewise",
            leaving(&between(f, f.pod, f.client).udp(5353, 4242).payload(b"odd")),
            handed("reply-on-node", &between(f, &vip, f.client).udp(53, 4242).payload(b"odd")),
        )
        .after([query().into()]),
        row(
            "what else leaves is not ours",
            leaving(&between(f, f.pod, f.client).udp(5354, 4242)),
            Expect::Passed("not-service"),
        )
        .after([query().into()]),
        row("nor is what goes to a service", leaving(&query()), Expect::Passed("not-service")).after([query().into()]),
        row(
            "a second service to the same pod: the client's port changes",
            leaving(&between(f, f.pod, f.client).tcp(8080, 4242).syn().ack()),
            handed("reply-on-node", &between(f, &vip, f.client).tcp(80, 4242).syn().ack()),
        )
        .after([syn().into(), f.ask(&external).tcp(4242, 80).syn().into()]),
    ]
}

fn clients(f: Family) -> Vec<Row> {
    let ask = |to: &str| between(f, f.asking, to);
    let vip = f.service(96, 70);
    vec![
        row(
            "a pod's request to another node keeps its source",
            by_pod(&ask(f.vip).tcp(4242, 80).syn()),
            handed("request-on-node", &between(f, f.asking, f.backend).tcp(4242, 8080).syn()),
        ),
        row(
            "the answer is the stack's to bring",
            by_backend(&between(f, f.backend, f.asking).tcp(8080, 4242).syn().ack()),
            Expect::Passed("reply-underway"),
        )
        .after([by_pod(&ask(f.vip).tcp(4242, 80).syn())]),
        row(
            "and the service's when it reaches the pod",
            leaving_to_pod(&between(f, f.backend, f.asking).tcp(8080, 4242).syn().ack()),
            handed("reply-on-node", &between(f, f.vip, f.asking).tcp(80, 4242).syn().ack()),
        )
        .after([by_pod(&ask(f.vip).tcp(4242, 80).syn())]),
        row(
            "a pod's request to another pod",
            by_pod(&ask(&vip).udp(4242, 53)),
            handed("request-on-node", &between(f, f.asking, f.pod).udp(4242, 5353)),
        ),
        row("what else a pod sends", by_pod(&ask(f.client).udp(4242, 53)), Expect::Passed("not-service")),
    ]
}

fn hairpin(f: Family) -> Vec<Row> {
    let vip = f.service(96, 70);
    let us = f.up();
    let back = |packet: Packet| Expect::Sent("tx", packet.ethernet(OUR_MAC, THEIR_MAC).ttl(63).bytes());
    vec![
        row(
            "a pod that asks itself is asked by us",
            by_pod(&between(f, f.pod, &vip).tcp(4242, 80).syn()),
            back(between(f, &us, f.pod).tcp(4242, 8080).syn()),
        ),
        row(
            "and answered by the service",
            by_pod(&between(f, f.pod, &us).tcp(8080, 4242).syn().ack()),
            back(between(f, &vip, f.pod).tcp(80, 4242).syn().ack()),
        )
        .after([by_pod(&between(f, f.pod, &vip).tcp(4242, 80).syn())]),
    ]
}

fn policies(f: Family) -> Vec<Row> {
    let syn = |to: &str| f.ask(to).tcp(4242, 80).syn();
    let from_pod = |to: &str| by_pod(&between(f, f.asking, to).tcp(4242, 80).syn());
    let to_pod = || handed("request-on-node", &between(f, f.client, f.pod).tcp(4242, 8080).syn());
    let elsewhere = f.service(97, 91);
    vec![
        row("policy Local: only the pod here", syn(&f.service(97, 90)), to_pod()),
        row("by NodePort likewise", f.ask(&f.up()).tcp(4242, 30090).syn(), to_pod()),
        row("policy Local, and all are elsewhere", syn(&elsewhere), Expect::Dropped("no-local-endpoints")),
        row("by NodePort likewise", f.ask(&f.up()).tcp(4242, 30091).syn(), Expect::Dropped("no-local-endpoints")),
        row(
            "but the policy is for those outside",
            from_pod(&elsewhere),
            handed("request-on-node", &between(f, f.asking, f.backend).tcp(4242, 8080).syn()),
        ),
        row("inside policy Cluster holds", syn(&f.service(96, 91)), redirect(&f.forwarded().tcp(4242, 8080).syn())),
        row("internal policy Local", syn(&f.service(96, 92)), Expect::Dropped("no-local-endpoints")),
        row("also for pods", from_pod(&f.service(96, 92)), Expect::Dropped("no-local-endpoints")),
        row(
            "where none is ready, those that end still serve",
            syn(&f.service(96, 94)),
            redirect(&f.forwarded().tcp(4242, 8080).syn()),
        ),
    ]
}

fn source_ranges(f: Family) -> Vec<Row> {
    let balanced = f.service(97, 93);
    let strange = |to: &str, port| between(f, f.stranger, to).tcp(4242, port).syn();
    let forwarded = || f.forwarded().tcp(4242, 8080).syn();
    vec![
        row("inside of the source ranges", f.ask(&balanced).tcp(4242, 80).syn(), redirect(&forwarded())),
        row("outside of the source ranges", strange(&balanced, 80), Expect::Dropped("source-not-allowed")),
        row("which come before all else", strange(&balanced, 80).rst(), Expect::Dropped("source-not-allowed")),
        row("they are not for NodePorts", strange(&f.up(), 30093), redirect(&forwarded())),
        row("nor for cluster addresses", strange(&f.service(96, 93), 80), redirect(&forwarded())),
        row(
            "nor for pods",
            by_pod(&between(f, f.asking, &balanced).tcp(4242, 80).syn()),
            handed("request-on-node", &between(f, f.asking, f.backend).tcp(4242, 8080).syn()),
        ),
    ]
}

fn node_ports(f: Family) -> Vec<Row> {
    let unspecified = if f.name == "IPv4" { "0.0.0.0" } else { "::" };
    let forwarded = || f.forwarded().tcp(4242, 8080).syn();
    vec![
        row(
            "a NodePort on the address towards the client",
            f.ask(&f.up()).tcp(4242, 30093).syn(),
            redirect(&forwarded()),
        ),
        row("and on any other", f.ask(&f.down()).tcp(4242, 30093).syn(), redirect(&forwarded())),
        row("but not on what stands for all", f.ask(unspecified).tcp(4242, 30093).syn(), Expect::Passed("not-service")),
        row(
            "is answered from there",
            by_backend(&f.reply().tcp(8080, 4242).syn().ack()),
            redirect(&f.returned(&f.down()).tcp(30093, 4242).syn().ack()),
        )
        .after([f.ask(&f.down()).tcp(4242, 30093).syn().into()]),
        row(
            "and the host's where it began the connection",
            f.ask(&f.up()).tcp(443, 30093).syn().ack(),
            Expect::Passed("not-service"),
        ),
        row("by UDP it is another port", f.ask(&f.up()).udp(4242, 30093), Expect::Passed("not-service")),
        row("other ports are the host's", f.ask(&f.up()).tcp(4242, 30092).syn(), Expect::Passed("not-service")),
    ]
}

/// A backend asks for itself, from the port that it listens on, at a NodePort of that number: with the client's port kept, requests and
/// replies would be of one tuple.
pub(super) fn symmetric(f: Family) -> Vec<Row> {
    vec![
        row(
            "a client that looks like its backend leaves from another port",
            by_backend(&f.reply().udp(30095, 30095)),
            tx(&f.forwarded().udp(SNAT_PORT, 30095)),
        ),
        row(
            "and is answered",
            by_backend(&f.reply().udp(30095, SNAT_PORT)),
            tx(&(f.packet)(&f.down(), f.backend).ethernet(DOWN_MAC, backend_mac(10)).ttl(63).udp(30095, 30095)),
        )
        .after([by_backend(&f.reply().udp(30095, 30095))]),
        row(
            "by SCTP there is none",
            by_backend(&f.reply().sctp(30095, 30095, 1)),
            Expect::Dropped("snat-ports-exhausted"),
        ),
    ]
}
