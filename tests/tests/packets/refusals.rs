//! What is not balanced, and what is answered instead.

use tests::packet::{OUR_MAC, Packet, THEIR_MAC};

use super::{Expect, Family, Row, by_pod, redirect, row};

pub(super) fn rows(f: Family) -> Vec<Row> {
    [passed(f), refused(f), too_big(f)].into_iter().flatten().collect()
}

/// Our answer, on its way back to where the question came from.
pub(super) fn answer(f: Family, from: &str, to: &str) -> Packet {
    (f.packet)(from, to).ethernet(OUR_MAC, THEIR_MAC)
}

/// A service tells the sender of a packet that it may not be larger than so many bytes.
pub(super) fn told_too_big(f: Family, from: &str, to: &str, about: &Packet, mtu: u16) -> Expect {
    let (kind, code) = if f.name == "IPv4" { (3, 4) } else { (2, 0) };
    let [high, low] = mtu.to_be_bytes();
    let answer = answer(f, from, to).icmp(kind, code, [0, 0, high, low]).payload(&about.quote(200));
    Expect::Sent("answered-too-big", answer.bytes())
}

/// ICMP port unreachable about a packet, of which `quoted` bytes are in it.
fn unreachable(f: Family, about: &Packet, from: &str, quoted: usize) -> Packet {
    let (kind, code) = if f.name == "IPv4" { (3, 3) } else { (1, 4) };
    answer(f, from, f.client).icmp(kind, code, [0; 4]).payload(&about.quote(quoted))
}

fn passed(f: Family) -> Vec<Row> {
    vec![
        row("another address", f.ask(f.client).tcp(4242, 80).syn(), Expect::Passed("not-service")),
        row(
            "a broadcast, although it says a service's address",
            f.ask(f.vip).tcp(4242, 80).syn().ethernet(THEIR_MAC, [0xFF; 6]),
            Expect::Passed("not-service"),
        ),
        row(
            "a multicast that would be refused",
            f.ask(f.vip).tcp(4242, 81).syn().ethernet(THEIR_MAC, [1, 0, 0x5E, 0, 0, 1]),
            Expect::Passed("not-service"),
        ),
        row(
            "another port of a load balancer's address",
            f.ask(&f.service(97, 93)).tcp(4242, 81).syn(),
            Expect::Passed("not-service"),
        ),
        row(
            "another port of an external address",
            f.ask(&f.service(98, 70)).tcp(4242, 81).syn(),
            Expect::Passed("not-service"),
        ),
        row(
            "from a service's cluster address",
            (f.packet)(f.routed_vip, f.vip).udp(53, 53).payload(b"loop"),
            Expect::Dropped("source-is-service"),
        ),
        row("and from its own", (f.packet)(f.vip, f.vip).tcp(80, 80).syn(), Expect::Dropped("source-is-service")),
        row(
            "an external address may be another machine's",
            (f.packet)(&f.service(98, 70), f.vip).udp(4242, 53),
            redirect(&f.forwarded().udp(4242, 5353)),
        ),
        row("no route to the backend", f.ask(f.unreachable).tcp(4242, 80).syn(), Expect::Dropped("no-route")),
        row("TTL 1", f.ask(f.vip).tcp(4242, 80).syn().ttl(1), Expect::Passed("ttl-expired")),
        row("TTL 0", f.ask(f.vip).tcp(4242, 80).syn().ttl(0), Expect::Passed("ttl-expired")),
        row("another protocol", f.ask(f.vip).protocol(47).payload(b"GRE"), Expect::Passed("other-protocol")),
    ]
}

fn refused(f: Family) -> Vec<Row> {
    let reset = |from: &str, port, sequence, acknowledged| {
        answer(f, from, f.client).tcp(port, 4242).rst().ack().sequence(sequence, acknowledged).window(0)
    };
    let refused = |reason, packet: &Packet| Expect::Sent(reason, packet.bytes());
    let udp = || f.ask(f.empty).udp(4242, 53).payload(b"12345678");
    let long = || f.ask(f.empty).udp(4242, 53).payload(&[7; 1000]);
    let odd = || f.ask(f.empty).udp(4242, 53).payload(b"123");
    let sctp = || f.ask(f.empty).sctp(4242, 90, 1);
    let header = f.header;
    let from_pod = || (f.packet)(f.asking, f.empty).tcp(4242, 80).syn();
    vec![
        row(
            "no backend: a SYN gets a RST that acknowledges it",
            f.ask(f.empty).tcp(4242, 80).syn(),
            refused("refused-no-backend", &reset(f.empty, 80, 0, 1001)),
        ),
        row(
            "and the data that came with it",
            f.ask(f.empty).tcp(4242, 80).syn().tcp_options(&[2, 4, 5, 180]).payload(b"fast open"),
            refused("refused-no-backend", &reset(f.empty, 80, 0, 1010)),
        ),
        row(
            "no backend that takes new flows",
            f.ask(f.drained).tcp(4242, 80).syn(),
            refused("refused-no-backend", &reset(f.drained, 80, 0, 1001)),
        ),
        row(
            "a pod is refused likewise",
            by_pod(&from_pod()),
            refused(
                "refused-no-backend",
                &answer(f, f.empty, f.asking).tcp(80, 4242).rst().ack().sequence(0, 1001).window(0),
            ),
        ),
        row(
            "UDP gets port unreachable",
            udp(),
            refused("refused-no-backend", &unreachable(f, &udp(), f.empty, header + 16)),
        ),
        row(
            "with the beginning of what was sent",
            long(),
            refused("refused-no-backend", &unreachable(f, &long(), f.empty, 200)),
        ),
        row(
            "in words of four bytes",
            odd(),
            refused("refused-no-backend", &unreachable(f, &odd(), f.empty, header + 8)),
        ),
        row("SCTP, too", sctp(), refused("refused-no-backend", &unreachable(f, &sctp(), f.empty, header + 16))),
        row(
            "tags stay",
            udp().vlan(7),
            refused("refused-no-backend", &unreachable(f, &udp(), f.empty, header + 16).vlan(7)),
        ),
        row(
            "the middle of an unknown connection is no question",
            f.ask(f.empty).tcp(4242, 80).ack(),
            Expect::Dropped("no-flow"),
        ),
        row(
            "a wrong port of a cluster address",
            f.ask(f.vip).tcp(4242, 81).syn(),
            refused("refused-wrong-port", &reset(f.vip, 81, 0, 1001)),
        ),
        row(
            "a segment gets the RST that it waits for",
            f.ask(f.vip).tcp(4242, 81).ack().sequence(1000, 2000),
            refused("refused-wrong-port", &answer(f, f.vip, f.client).tcp(81, 4242).rst().sequence(2000, 0).window(0)),
        ),
        row(
            "a FIN counts as one",
            f.ask(f.vip).tcp(4242, 81).fin().payload(b"123"),
            refused("refused-wrong-port", &reset(f.vip, 81, 0, 1004)),
        ),
        row("a RST is never answered", f.ask(f.vip).tcp(4242, 81).rst(), Expect::Dropped("wrong-port")),
        row(
            "a wrong port by UDP",
            f.ask(f.vip).udp(4242, 80).payload(b"12345678"),
            refused(
                "refused-wrong-port",
                &unreachable(f, &f.ask(f.vip).udp(4242, 80).payload(b"12345678"), f.vip, header + 16),
            ),
        ),
        row(
            "nobody that is no single host is answered",
            (f.packet)(if f.name == "IPv4" { "127.0.0.1" } else { "ff02::1" }, f.vip).udp(4242, 80),
            Expect::Dropped("wrong-port"),
        ),
    ]
}

fn too_big(f: Family) -> Vec<Row> {
    let size = if f.name == "IPv4" { 1473 } else { 1453 };
    let big = || f.ask(f.vip).udp(4242, 53).payload(&vec![7; size]);
    let told = |about: &Packet| told_too_big(f, f.vip, f.client, about, 1500);
    let by_stack = f.service(96, 51);
    let narrow = |size| f.ask(&by_stack).udp(4242, 53).payload(&vec![7; size]);
    let handed = (f.packet)(&f.up(), if f.name == "IPv4" { "10.0.3.10" } else { "fd00:3::a" }).udp(4242, 5353);
    let segment = || f.ask(f.vip).tcp(4242, 80).ack().payload(&vec![7; size]);
    vec![
        row("larger than the way out takes: the sender is told", big(), told(&big())),
        row("and in a flow", big(), told(&big())).after([f.ask(f.vip).udp(4242, 53).into()]),
        row("by TCP likewise", segment(), told(&segment())).after([f.ask(f.vip).tcp(4242, 80).syn().into()]),
        row("what the stack can send, it does", narrow(0), Expect::Handed("routed-by-stack", handed.bytes())),
        row(
            "and what it can't, it would tell us",
            narrow(1373),
            told_too_big(f, &by_stack, f.client, &narrow(1373), 1400),
        ),
    ]
}
