//! Fragments follow the first of them.

use tests::packet::Packet;

use super::{Expect, Family, Row, by_backend, leaving, redirect, row};

pub(super) fn rows(f: Family) -> Vec<Row> {
    let datagram = || f.ask(f.vip).udp(4242, 53).payload(&[7; 64]);
    let sent = || f.forwarded().udp(4242, 5353).payload(&[7; 64]);
    let piece = |packet: &Packet, number: usize| packet.pieces(&[16, 40])[number].clone();
    let asked = |number| piece(&datagram(), number);
    let reply = |number| piece(&f.reply().udp(5353, 4242).payload(&[9; 64]), number);
    let returned = |number| piece(&f.returned(f.vip).udp(53, 4242).payload(&[9; 64]), number);
    let vip = f.service(96, 70);
    let pods = |number| piece(&(f.packet)(f.pod, f.client).udp(5353, 4242).payload(&[9; 64]), number);
    let services = |number| piece(&(f.packet)(&vip, f.client).udp(53, 4242).payload(&[9; 64]), number);
    let segment = || f.ask(f.vip).tcp(4242, 80).syn().payload(&[7; 64]).pieces(&[24]);
    let forwarded = || f.forwarded().tcp(4242, 8080).syn().payload(&[7; 64]).pieces(&[24]);
    vec![
        row("the first fragment goes as a whole datagram would", asked(0), redirect(&piece(&sent(), 0))),
        row("the next follows it", asked(1), redirect(&piece(&sent(), 1))).after([asked(0).into()]),
        row("and the last", asked(2), redirect(&piece(&sent(), 2))).after([asked(0).into(), asked(1).into()]),
        row("in any order", asked(1), redirect(&piece(&sent(), 1))).after([asked(0).into(), asked(2).into()]),
        row("but not before the first", asked(1), Expect::Dropped("fragment-lost")),
        row("nor after that of another", asked(1).identification(7), Expect::Dropped("fragment-lost"))
            .after([asked(0).into()]),
        row("in a flow that is there", asked(2), redirect(&piece(&sent(), 2))).after([
            datagram().into(),
            by_backend(&f.reply().udp(5353, 4242)),
            datagram().into(),
            asked(0).into(),
        ]),
        row("replies likewise", by_backend(&reply(0)), redirect(&returned(0))).after([datagram().into()]),
        row("and what follows them", by_backend(&reply(1)), redirect(&returned(1)))
            .after([datagram().into(), by_backend(&reply(0))]),
        row("what may be the host's goes to the stack", by_backend(&reply(1)), Expect::Passed("fragment"))
            .after([datagram().into()]),
        row(
            "of a pod's reply, when it leaves",
            leaving(&pods(1)),
            Expect::Handed("reply-on-node", services(1).bytes()),
        )
        .after([f.ask(&vip).udp(4242, 53).into(), leaving(&pods(0))]),
        row("the first of a TCP segment", segment().remove(0), redirect(&forwarded()[0])),
        row("and the rest", segment().remove(1), redirect(&forwarded()[1])).after([segment().remove(0).into()]),
        row(
            "what follows a first that opens nothing is not of the one before it",
            segment().remove(1),
            Expect::Dropped("fragment-lost"),
        )
        .after([
            segment().remove(0).into(),
            f.ask(f.vip).tcp(4243, 80).ack().payload(&[7; 64]).pieces(&[24]).remove(0).into(),
        ]),
        row(
            "of another protocol",
            f.ask(f.vip).protocol(47).payload(&[0; 64]).fragment(8, false),
            Expect::Passed("other-protocol"),
        ),
        row(
            "of an echo request",
            f.ask(f.vip).echo(7, 1).payload(&[0; 64]).pieces(&[16]).remove(1),
            Expect::Dropped("fragment-lost"),
        ),
    ]
}
