//! What stands in headers beside addresses and ports, and headers that are cut short or contradict themselves.

use tests::{
    datapath::{ROUTER_MAC, UP_MAC},
    packet::Packet,
};

use super::{Expect, Row, V4, V6, by_backend, redirect, row, tx};

pub(super) fn rows() -> Vec<Row> {
    [ipv4_only(), ipv6_only(), malformed()].into_iter().flatten().collect()
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
        row("ARP", f.ask(f.vip).udp(1, 2).edit(|p| p[13] = 6), Expect::Passed("not-ip")),
        row(
            "IPv4: padding behind the packet is no part of it",
            f.ask(f.vip).udp(4242, 53).edit(|p| p.extend([0; 18])),
            Expect::Sent("redirect", f.forwarded().udp(4242, 5353).edit(|p| p.extend([0; 18]))),
        ),
    ]
}

/// A fragment of what a packet of IPv6 becomes whose source puts destination options behind the fragment header, as RFC 8200,
/// section 4.1, has them.
fn in_fragments(packet: &Packet, number: usize) -> Packet {
    const ETHERNET_AND_IPV6: usize = 14 + 40;
    let bytes = packet.bytes();
    // Eight bytes of options, all of them padding (PadN).
    let mut payload = vec![bytes[14 + 6], 0, 1, 4, 0, 0, 0, 0];
    payload.extend(&bytes[ETHERNET_AND_IPV6..]);
    packet.clone().protocol(60).payload(&payload).pieces(&[32, 64])[number].clone()
}

fn ipv6_only() -> Vec<Row> {
    let f = V6;
    let syn = || f.ask(f.vip).tcp(4242, 80).syn();
    let sent = || f.forwarded().tcp(4242, 8080).syn();
    let asked = |number| in_fragments(&f.ask(f.vip).udp(4242, 53).payload(&[7; 64]), number);
    let forwarded = |number| in_fragments(&f.forwarded().udp(4242, 5353).payload(&[7; 64]), number);
    let segment = |number| in_fragments(&syn().payload(&[7; 64]), number);
    let sent_on = |number| in_fragments(&sent().payload(&[7; 64]), number);
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
        row("IPv6: a routing header at its end", syn().routing(0), redirect(&sent().routing(0))),
        row("IPv6: one that names further hops", syn().routing(1), Expect::Passed("source-routed")),
        row(
            "IPv6: the longest extension header",
            f.ask(f.routed_vip).udp(4242, 80).extension(60, 1400),
            tx(&(f.packet)(&f.up(), f.routed_backend)
                .udp(4242, 80)
                .extension(60, 1400)
                .ethernet(UP_MAC, ROUTER_MAC)
                .ttl(63)),
        ),
        row("IPv6: a datagram with options, in fragments", asked(0), redirect(&forwarded(0))),
        row("IPv6: its other fragments name the options", asked(1), redirect(&forwarded(1))).after([asked(0).into()]),
        row("IPv6: and the last of a segment with options", segment(2), redirect(&sent_on(2)))
            .after([segment(0).into()]),
        row("IPv6: they are of nothing before the first", asked(1), Expect::Dropped("fragment-lost")),
        row("IPv6: nor after that of another", asked(1).identification(7), Expect::Dropped("fragment-lost"))
            .after([asked(0).into()]),
        row(
            "IPv6: a later fragment with options to nobody of ours",
            (f.packet)(f.client, f.backend).protocol(60).payload(&[0; 64]).fragment(8, false),
            Expect::Passed("fragment"),
        ),
        row("IPv6: no next header", f.ask(f.vip).protocol(59), Expect::Passed("other-protocol")),
        row(
            "IPv6: an authentication header is not looked behind",
            f.ask(f.vip).protocol(51).payload(&[0; 24]),
            Expect::Passed("other-protocol"),
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
        row("IPv4: no header", tcp4().edit(|p| p.truncate(14)), passed("malformed-ipv4")).by_xdp_alone(),
        row("IPv4: header cut short", tcp4().edit(|p| p.truncate(33)), passed("malformed-ipv4")).by_xdp_alone(),
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
        row("IPv6: no header", tcp6().edit(|p| p.truncate(14)), passed("malformed-ipv6")).by_xdp_alone(),
        row("IPv6: header cut short", tcp6().edit(|p| p.truncate(53)), passed("malformed-ipv6")).by_xdp_alone(),
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
