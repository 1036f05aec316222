//! ICMP errors about packets of flows, and echo requests.

use tests::{
    datapath::{DOWN_MAC, ROUTER_MAC, UP_MAC, backend_mac},
    packet::Packet,
};

use super::{Expect, Family, From, Given, Row, by_backend, by_pod, leaving, row};

pub(super) fn rows(f: Family) -> Vec<Row> {
    [errors(f), errors_on_node(f), others(f)].into_iter().flatten().collect()
}

/// Type, code and the rest of an error: too big for 1,400 bytes.
fn narrow(f: Family) -> (u8, u8, [u8; 4]) {
    if f.name == "IPv4" { (3, 4, [0, 0, 5, 120]) } else { (2, 0, [0, 0, 5, 120]) }
}

/// A router on the way.
fn router(f: Family) -> &'static str {
    if f.name == "IPv4" { "203.0.113.1" } else { "2001:db8:ffff::1" }
}

/// An error from one to another about the first bytes of a packet.
pub(super) fn error(f: Family, from: &str, to: &str, about: &Packet, quoted: usize) -> Packet {
    let (kind, code, rest) = narrow(f);
    (f.packet)(from, to).icmp(kind, code, rest).payload(&about.quote(quoted))
}

fn errors(f: Family) -> Vec<Row> {
    let header = f.header;
    let redirect = |packet: Packet| Expect::Sent("redirect", packet.bytes());
    let asked = || f.ask(f.vip).tcp(4242, 80).syn();
    let query = || f.ask(f.vip).udp(4242, 53).payload(b"query");
    let to_client = |packet: Packet| redirect(packet.ethernet(UP_MAC, ROUTER_MAC).ttl(63));
    let to_backend = |packet: Packet| redirect(packet.ethernet(DOWN_MAC, backend_mac(10)).ttl(63));
    let handshake = || -> [Given; 3] {
        [
            asked().into(),
            by_backend(&f.reply().tcp(8080, 4242).syn().ack().sequence(7, 1001)),
            f.ask(f.vip).tcp(4242, 80).ack().sequence(1001, 8).into(),
        ]
    };
    let about_request = |quoted: usize| {
        (
            by_backend(&error(f, router(f), &f.down(), &f.forwarded().tcp(4242, 8080).syn(), quoted)),
            to_client(error(f, f.vip, f.client, &asked().ttl(63), quoted)),
        )
    };
    let (short, short_expected) = about_request(header + 8);
    let (whole, whole_expected) = about_request(header + 20);
    let (later, later_expected) = about_request(header + 8);
    vec![
        row("about a request, to the client", short, short_expected).after([asked().into()]),
        row("with all of the TCP header", whole, whole_expected).after([asked().into()]),
        row("in an established flow", later, later_expected).after(handshake()),
        row(
            "about a datagram",
            by_backend(&error(f, router(f), &f.down(), &f.forwarded().udp(4242, 5353).payload(b"query"), header + 13)),
            to_client(error(f, f.vip, f.client, &query().ttl(63), header + 13)),
        )
        .after([query().into()]),
        row(
            "from the backend itself",
            by_backend(&error(f, f.backend, &f.down(), &f.forwarded().udp(4242, 5353), header + 8)),
            to_client(error(f, f.vip, f.client, &f.ask(f.vip).udp(4242, 53).ttl(63), header + 8)),
        )
        .after([query().into()]),
        row(
            "about a reply, to the backend",
            error(f, router(f), f.vip, &f.returned(f.vip).tcp(80, 4242).syn().ack(), header + 8),
            to_backend(error(f, &f.down(), f.backend, &f.reply().tcp(8080, 4242).syn().ack().ttl(63), header + 8)),
        )
        .after([asked().into()]),
        row(
            "about a reply by UDP",
            error(f, router(f), f.vip, &f.returned(f.vip).udp(53, 4242).payload(b"answer"), header + 14),
            to_backend(error(
                f,
                &f.down(),
                f.backend,
                &f.reply().udp(5353, 4242).payload(b"answer").ttl(63),
                header + 14,
            )),
        )
        .after([query().into()]),
        row(
            "time exceeded",
            {
                let (kind, about) = (if f.name == "IPv4" { 11 } else { 3 }, f.forwarded().tcp(4242, 8080).syn().ttl(1));
                by_backend(&(f.packet)(router(f), &f.down()).icmp(kind, 0, [0; 4]).payload(&about.quote(header + 8)))
            },
            {
                let kind = if f.name == "IPv4" { 11 } else { 3 };
                let about = asked().ttl(1).quote(header + 8);
                to_client((f.packet)(f.vip, f.client).icmp(kind, 0, [0; 4]).payload(&about))
            },
        )
        .after([asked().into()]),
        row(
            "about no flow",
            by_backend(&error(f, router(f), &f.down(), &f.forwarded().tcp(4243, 8080).syn(), header + 8)),
            Expect::Passed("other-icmp"),
        )
        .after([asked().into()]),
        row(
            "of eight bytes, with others behind the packet that are none of it",
            {
                let about = f.forwarded().tcp(4242, 8080).syn();
                Given(From::Backends, error(f, router(f), &f.down(), &about, header + 8).edit(|p| p.extend([7; 16])))
            },
            {
                let told = error(f, f.vip, f.client, &asked().ttl(63), header + 8);
                Expect::Sent("redirect", told.ethernet(UP_MAC, ROUTER_MAC).ttl(63).edit(|p| p.extend([7; 16])))
            },
        )
        .after([asked().into()]),
        row(
            "that is cut short",
            by_backend(&error(f, router(f), &f.down(), &f.forwarded().tcp(4242, 8080).syn(), header + 7)),
            Expect::Passed("malformed-icmp"),
        )
        .after([asked().into()]),
    ]
}

fn errors_on_node(f: Family) -> Vec<Row> {
    let header = f.header;
    let vip = f.service(96, 70);
    let asked = || f.ask(&vip).tcp(4242, 80).syn();
    let seen = || (f.packet)(f.client, f.pod).tcp(4242, 8080).syn();
    let from_pod = || error(f, f.pod, f.client, &seen(), header + 8);
    vec![
        row("of a pod, where it comes in", by_pod(&from_pod()), Expect::Passed("reply-underway"))
            .after([asked().into()]),
        row(
            "and when it leaves",
            leaving(&from_pod()),
            Expect::Handed("reply-on-node", error(f, &vip, f.client, &asked(), header + 8).bytes()),
        )
        .after([asked().into()]),
        row(
            "of the node, about a request that is too big for the pod's device",
            leaving(&error(f, &f.up(), f.client, &seen(), header + 8)),
            Expect::Handed("reply-on-node", error(f, &vip, f.client, &asked(), header + 8).bytes()),
        )
        .after([asked().into()]),
        row(
            "about a pod's reply: whoever reports is not hidden from it",
            error(f, router(f), &vip, &(f.packet)(&vip, f.client).tcp(80, 4242).syn().ack(), header + 8),
            Expect::Handed(
                "request-on-node",
                error(f, router(f), f.pod, &(f.packet)(f.pod, f.client).tcp(8080, 4242).syn().ack(), header + 8)
                    .bytes(),
            ),
        )
        .after([asked().into()]),
    ]
}

fn others(f: Family) -> Vec<Row> {
    let reply = if f.name == "IPv4" { 0 } else { 129 };
    vec![
        row("an echo request to a service", f.ask(f.vip).echo(7, 1).payload(b"ping"), Expect::Dropped("echo-refused")),
        row("to a load balancer's address", f.ask(&f.service(97, 93)).echo(7, 1), Expect::Dropped("echo-refused")),
        row("to us", f.ask(&f.up()).echo(7, 1), Expect::Passed("other-icmp")),
        row("an echo reply to a service", f.ask(f.vip).icmp(reply, 0, [0; 4]), Expect::Dropped("icmp-lost")),
        row("and to us", f.ask(&f.up()).icmp(reply, 0, [0; 4]), Expect::Passed("other-icmp")),
        row(
            "ICMP without a header",
            Given(
                From::Clients,
                f.ask(f.vip).protocol(if f.name == "IPv4" { 1 } else { 58 }).payload(&[8, 0, 0, 0]).bytes(),
            ),
            Expect::Passed("malformed-icmp"),
        ),
    ]
}
