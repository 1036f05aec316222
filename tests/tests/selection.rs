//! Which backend a new flow gets: the kernel agrees with the host, and never sees a backend set that was none.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "this is test code: it fails by panicking")]

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use lb_common::{
    abi::FlowKey,
    net::{Address, Ipv4Be, Ipv6Be},
    parse::{self, AnySegment},
};
use lb_userspace::{
    dataplane::{
        Sizes,
        kernel::{Hook, Origin},
    },
    model::{
        Algorithm, Desired, Endpoint, FrontendKind, IpFamily, Protocol, Service, ServiceName, TrafficPolicy, Weight,
    },
    policy::{self, Decided, Node},
};
use proptest::{
    prelude::any,
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use tests::{
    datapath::{Datapath, Link, with_datapath},
    packet::Packet,
};

const SIZES: Sizes =
    Sizes { services: 64, backends: 256, slots: 1 << 16, flows: 1 << 15, pending_flows: 1 << 15, ..Sizes::DEFAULT };

/// 10,000 random flows, half of each family.
const FLOWS: u32 = 10_000;

fn name(name: &str, family: IpFamily) -> ServiceName {
    ServiceName { name: name.into(), port: "80".into(), protocol: Protocol::Tcp, family }
}

fn services(algorithm: &str) -> String {
    let list = |first: &str| {
        (1..=9).map(|i| format!("{{ address: \"{first}{i}\", weight: {} }}", 1 + i % 3)).collect::<Vec<_>>().join(", ")
    };
    format!(
        "services:\n  - name: web\n    addresses: [10.96.0.10, \"fd00:96::10\"]\n    ports: [{{ port: 80 }}]\n    \
         algorithm: {algorithm}\n    backends: [{}, {}]\n",
        list("10.2.0."),
        list("fd00:b::")
    )
}

/// Where a packet of each family goes that opens a flow from a random client.
fn for_random_flows(datapath: &mut Datapath, mut each: impl FnMut(&Datapath, AnySegment, AnySegment)) {
    let mut runner = TestRunner::deterministic();
    let clients = (any::<[u8; 3]>(), any::<[u8; 8]>(), 1..=u16::MAX);
    for flow in 0..FLOWS {
        let ([a, b, c], low, port) = clients.new_tree(&mut runner).expect("a client").current();
        let packet = if flow % 2 == 0 {
            Packet::v4(&Ipv4Addr::new(172, a, b, c).to_string(), "10.96.0.10")
        } else {
            let low = low.map(|byte| format!("{byte:02x}")).concat();
            let groups = [&low[0..4], &low[4..8], &low[8..12], &low[12..16]].join(":");
            Packet::v6(&format!("2001:db8:0:0:{groups}"), "fd00:96::10")
        };
        let packet = packet.tcp(port, 80).syn().bytes();
        let sent = datapath.from_clients(&packet);
        assert_eq!(sent.action, 3, "XDP_TX");
        let [given, sent] = [&packet, &sent.packet].map(|bytes| parse::packet(&bytes[..]).expect("it is a segment"));
        each(datapath, given, sent);
    }
}

#[test]
fn the_kernel_chooses_what_the_host_chooses() {
    with_datapath(SIZES, |datapath| {
        for algorithm in ["maglev", "source-hash", "round-robin"] {
            datapath.afresh(&services(algorithm), |datapath| {
                // Each family is a service of its own, with its own turns.
                let mut turns = BTreeMap::from([(4, 0_u32), (6, 0_u32)]);
                for_random_flows(datapath, |datapath, given, sent| match (given, sent) {
                    (AnySegment::V4(given), AnySegment::V4(sent)) => {
                        agree(datapath, IpFamily::V4, &given.key, &sent.key, turns.get_mut(&4).expect("it is there"));
                    }
                    (AnySegment::V6(given), AnySegment::V6(sent)) => {
                        agree(datapath, IpFamily::V6, &given.key, &sent.key, turns.get_mut(&6).expect("it is there"));
                    }
                    other => panic!("the family changed: {other:?}"),
                });
            });
        }
    });
}

#[track_caller]
fn agree<A: Address + std::fmt::Debug>(
    datapath: &Datapath,
    family: IpFamily,
    given: &FlowKey<A>,
    sent: &FlowKey<A>,
    turns: &mut u32,
) {
    let turn = *turns;
    *turns += 1;
    let chosen = datapath
        .tables
        .choose(
            &name("web", family),
            TrafficPolicy::Cluster,
            given,
            || unreachable!("no random algorithm is under test"),
            || turn,
        )
        .expect("there are backends");
    assert_eq!(
        (sent.destination, sent.destination_port),
        (A::from_words(chosen.address), chosen.port),
        "the kernel's choice for {given:?}"
    );
}

#[test]
fn every_algorithm_keeps_to_the_weights() {
    with_datapath(SIZES, |datapath| {
        for algorithm in Algorithm::ALL {
            let mut counts: BTreeMap<String, f64> = BTreeMap::new();
            datapath.afresh(&services(algorithm.name()), |datapath| {
                for_random_flows(datapath, |_, _, sent| {
                    let to = match sent {
                        AnySegment::V4(sent) => format!("{:?}", sent.key.destination),
                        AnySegment::V6(sent) => format!("{:?}", sent.key.destination),
                    };
                    *counts.entry(to).or_default() += 1.0;
                });
            });
            assert_eq!(counts.len(), 18, "{algorithm:?}: {counts:?}");
            for (backend, count) in counts {
                let last: u32 = backend.rsplit(['.', ':']).next().expect("it ends somehow").parse().expect("a digit");
                // Weights 1 + i % 3 for i from 1 to 9 sum to 18; half of the flows are of each family.
                let share = f64::from(1 + last % 3) / 18.0;
                let expected = share * f64::from(FLOWS) / 2.0;
                let deviation = (expected * (1.0 - share)).sqrt();
                // Six standard deviations, and one percent that a Maglev table may be uneven by.
                let tolerance = 6.0 * deviation + 0.01 * f64::from(FLOWS) / 2.0;
                assert!((count - expected).abs() < tolerance, "{algorithm:?}: {backend} has {count}, not {expected}");
            }
        }
    });
}

/// Two hundred changes a second of a service's backend set, number and algorithm, in tables so small that each slot and
/// each backend id is used again within a few changes, while packets flow: every packet has to go to a backend of
/// a set that was in force while it was on its way, and to that backend's own port.
#[test]
fn no_packet_sees_a_mixture_a_freed_slot_or_a_wrong_backend() {
    // Two sets of at most seven backends and a Maglev table each have to fit beside one another, and little more.
    let sizes =
        Sizes { services: 4, backends: 24, slots: 2600, flows: 1 << 12, pending_flows: 1 << 12, ..Sizes::DEFAULT };
    with_datapath(sizes, |datapath| {
        datapath.tables.apply(&decided(0)).expect("it fits");
        let mut runner = datapath.tables.dataplane_mut().runner(Hook::Xdp).expect("the program is loaded");
        let ingress = datapath.link(Link::Up);
        let (begun, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let stop = Instant::now() + Duration::from_secs(5);
        let (packets, in_between) = thread::scope(|scope| {
            let packets = scope.spawn(|| {
                let (mut packets, mut in_between) = (0_u64, 0_u64);
                while Instant::now() < stop {
                    let client = Ipv4Addr::from(0xAC10_0000 | (packets >> 14) as u32 & 0xFFFF);
                    let port = 1024 + (packets & 0x3FFF) as u16;
                    let packet = Packet::v4(&client.to_string(), "10.96.0.10").tcp(port, 80).syn().bytes();
                    let first = done.load(Ordering::SeqCst);
                    let sent = runner.run(&packet, ingress, Origin::Received).expect("the program runs");
                    let last = begun.load(Ordering::SeqCst);
                    assert_eq!(sent.action, 3, "XDP_TX between changes {first} and {last}");
                    let Ok(AnySegment::V4(segment)) = parse::packet(&sent.packet[..]) else {
                        panic!("not IPv4 any more")
                    };
                    let to = SocketAddr::new(
                        Ipv4Addr::from(segment.key.destination).into(),
                        segment.key.destination_port.to_host(),
                    );
                    assert!(
                        (first..=last).any(|number| backends(number).contains_key(&to)),
                        "{to} is of no set between changes {first} and {last}"
                    );
                    packets += 1;
                    in_between += u64::from(first != last);
                }
                (packets, in_between)
            });
            let mut number = 0;
            while Instant::now() < stop {
                number += 1;
                begun.store(number, Ordering::SeqCst);
                datapath.tables.apply(&decided(number)).expect("it fits, once what rests is reclaimed");
                done.store(number, Ordering::SeqCst);
                // Sometimes nothing is reclaimed until there is no room left.
                if number % 3 == 0 {
                    datapath.tables.reclaim().expect("the kernel has membarrier");
                }
            }
            println!("{number} changes");
            assert!(number > 100, "only {number} changes: nothing was hammered");
            packets.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))
        });
        println!("{packets} packets, {in_between} of them while a change was on its way");
        assert!(packets > 1000 && in_between > 10, "{packets} packets, {in_between} of them during a change");
    });
}

/// The backends of a set: no two sets that stand near one another share a backend or a port.
fn backends(number: u64) -> BTreeMap<SocketAddr, Weight> {
    let [a, b] = ((number % 60_000) as u16).to_be_bytes();
    (0..=number % 7)
        .map(|i| {
            let address = Ipv4Addr::new(10, 2 ^ (a & 0xF0) >> 4, a << 4 | i as u8, b);
            (SocketAddr::new(address.into(), 1000 + (number % 60_000) as u16), Weight::ONE)
        })
        .collect()
}

/// The state with such a set, and with a second service that comes and goes, so that service ids do, too.
fn decided(number: u64) -> Arc<Decided> {
    let mut desired = Desired::default();
    let algorithm = Algorithm::ALL[(number % 5) as usize];
    let service = |address: &str, algorithm, endpoints: BTreeMap<SocketAddr, Weight>| Service {
        frontends: [(address.parse().expect("an address"), FrontendKind::ClusterIp)].into(),
        algorithm,
        endpoints: endpoints.into_iter().map(|(to, weight)| (to, Endpoint { weight, ..Endpoint::READY })).collect(),
        ..Service::default()
    };
    let web = service("10.96.0.10:80", algorithm, backends(number));
    desired.add(name("web", IpFamily::V4), web).expect("it is the first");
    if number.is_multiple_of(2) {
        let to = [("10.3.0.1:80".parse().expect("an address"), Weight::ONE)].into();
        let other = service(&format!("10.96.1.{}:80", number % 250), Algorithm::RoundRobin, to);
        desired.add(name(&format!("other-{number}"), IpFamily::V4), other).expect("it is the only one");
    }
    Arc::new(policy::decide(&desired, &Node::default()))
}

#[test]
fn hashes_of_both_sides_are_of_the_same_bytes() {
    // The words of an address are its bytes in memory order, in the kernel's maps as in the agent.
    assert_eq!(Ipv4Be::from_bytes([1, 2, 3, 4]).to_words(), [u64::from_ne_bytes([1, 2, 3, 4, 0, 0, 0, 0]), 0]);
    assert_eq!(Ipv6Be::from_bytes([7; 16]).to_words(), [u64::from_ne_bytes([7; 8]); 2]);
}
