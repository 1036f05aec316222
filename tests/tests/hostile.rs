//! Any bytes as a packet: the loaded program and the parser on the host say the same of them, and nothing else happens.
//!
//! `WHARF_PACKETS` says how many packets there are.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "this is test code: it fails by panicking"
)]

use std::panic;

use lb_common::{
    parse::{self, AnySegment},
    verdict::Verdict,
};
use lb_userspace::dataplane::Sizes;
use proptest::{
    collection::vec,
    prelude::*,
    sample::Index,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};
use tests::{
    datapath::{Datapath, with_datapath},
    number,
    packet::Packet,
};

const SIZES: Sizes = Sizes { services: 16, backends: 16, slots: 256, flows: 4096, ..Sizes::DEFAULT };
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;

/// How many packets there are where nothing is said.
const PACKETS: u64 = 20_000;

const SERVICES: &str = r#"
services:
  - name: everything
    addresses: [10.96.0.10, "fd00:96::10"]
    ports: [{ name: tcp, port: 80 }, { name: udp, port: 80, protocol: UDP }]
    backends: [10.2.0.5, 10.0.1.10, "fd00:b::5", "fd00:1::a"]
"#;

/// Noise, and good packets with some bytes changed and some cut off or added: the second kind gets deep.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let noise = vec(any::<u8>(), 14..256);
    let good = (any::<bool>(), any::<bool>(), 0..3_usize, 0..6_usize, vec(any::<u8>(), 0..64), any::<u8>()).prop_map(
        |(is_v6, is_tcp, tags, headers, payload, flags)| {
            let mut packet =
                if is_v6 { Packet::v6("2001:db8::7", "fd00:96::10") } else { Packet::v4("192.0.2.7", "10.96.0.10") };
            for tag in 0..tags {
                packet = packet.vlan(7 + tag as u16);
            }
            if is_v6 {
                for header in 0..headers {
                    packet = packet.extension([0, 43, 60][header % 3], 8 * (1 + header));
                }
            } else {
                packet = packet.options(&vec![1; 4 * headers]);
            }
            let packet = if is_tcp { packet.tcp(4242, 80) } else { packet.udp(4242, 80) }.payload(&payload);
            packet.edit(|bytes| {
                if is_tcp && tags == 0 && headers == 0 {
                    let transport = 14 + if is_v6 { 40 } else { 20 };
                    bytes[transport + 13] = flags;
                }
            })
        },
    );
    let damage = vec((any::<Index>(), any::<u8>()), 0..4);
    let damaged =
        (good, damage, any::<Index>(), 0..8_usize, any::<bool>()).prop_map(|(mut bytes, damage, cut, more, is_cut)| {
            for (index, byte) in damage {
                let index = index.index(bytes.len());
                bytes[index] = byte;
            }
            bytes.extend(vec![0xEE; more]);
            if is_cut {
                bytes.truncate(14.max(cut.index(bytes.len())));
            }
            bytes
        });
    prop_oneof![1 => noise, 4 => damaged]
}

#[test]
fn any_bytes_end_in_one_counted_verdict_and_are_changed_only_if_they_are_a_flow() {
    let packets = number("WHARF_PACKETS").unwrap_or(PACKETS);
    with_datapath(SIZES, |datapath| {
        datapath.apply(SERVICES);
        let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::default() });
        let (mut understood, mut sent) = (0, 0);
        for _ in 0..packets {
            let bytes = bytes().new_tree(&mut runner).expect("there are always bytes").current();
            let outcome = panic::catch_unwind(panic::AssertUnwindSafe(|| check(datapath, &bytes)));
            match outcome {
                Ok((is_segment, is_sent)) => {
                    understood += u64::from(is_segment);
                    sent += u64::from(is_sent);
                }
                Err(cause) => {
                    eprintln!("the packet: {bytes:02x?}");
                    panic::resume_unwind(cause);
                }
            }
        }
        println!("{packets} packets, {understood} of them whole, {sent} sent on");
        assert!(understood > packets / 10 && sent > packets / 100, "the generator makes nothing that gets deep");
    });
}

/// Whether the packet was whole, and whether it was sent on.
fn check(datapath: &mut Datapath, bytes: &[u8]) -> (bool, bool) {
    let before = datapath.counts();
    let result = datapath.from_clients(bytes);
    let after = datapath.counts();
    let counted: Vec<_> =
        after.iter().filter(|(name, count)| before[*name] != **count).map(|(name, _)| *name).collect();
    let [reason] = counted[..] else { panic!("counted as {counted:?}") };
    assert_eq!(after[reason], before[reason] + 1);
    // What is answered is another packet.
    if reason.starts_with("refused-") || reason.starts_with("answered-") {
        assert_eq!(result.action, XDP_TX);
        parse::packet(&result.packet[..]).expect("an answer is whole");
        return (true, true);
    }
    assert_eq!(result.packet.len(), bytes.len());
    match parse::packet(bytes) {
        Err(refusal) => {
            let index = Verdict::from(refusal).counter();
            let expected =
                lb_common::verdict::COUNTERS.iter().find(|counter| counter.index == index).expect("it has one").name;
            assert_eq!(reason, expected, "kernel and host parse differently");
            assert_eq!((result.action, &result.packet[..]), (XDP_PASS, bytes));
            (false, false)
        }
        Ok(segment) => {
            let is_sent = reason == "tx" || reason == "redirect";
            if is_sent {
                let frame = parse::packet(&result.packet[..]).expect("what is sent is as whole as what came");
                assert_eq!(untranslated(&frame), untranslated(&segment), "only the tuple and the TTL may change");
            } else if !["neighbour-unresolved", "routed-by-stack"].contains(&reason) {
                assert_eq!(&result.packet[..], bytes, "{reason}");
            }
            (true, is_sent)
        }
    }
}

/// What of a segment a translation leaves alone.
fn untranslated(segment: &AnySegment) -> (usize, usize, u16, u8, u8) {
    match segment {
        AnySegment::V4(s) => (s.network, s.transport, s.ip_length, s.traffic_class, s.flags.0),
        AnySegment::V6(s) => (s.network, s.transport, s.ip_length, s.traffic_class, s.flags.0),
    }
}
