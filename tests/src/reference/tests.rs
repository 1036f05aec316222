//! The reference, sentence by sentence; and that a program which errs in any of them is found out.

use std::net::IpAddr;

use proptest::test_runner::RngSeed;

use super::{
    Action, Answer, Effect, Fate, Hook, Outcome, Protocol, Ran, Reference, Timeouts,
    packet::{Body, Error, Flags, Header, LaterPiece, Packet, SCTP_INIT, Segment},
    sequence::{self, CASES, Case, Mismatch, Programs, Stage, UPLINK, explore},
    service::{Condition, Endpoint, Policy, Service, ServicePort},
};
use crate::packet;

const TIMEOUTS: Timeouts = Timeouts { opening: 60, established: 8_000, closing: 10, datagram: 60 };
const OUTSIDE: Hook = Hook::Uplink(UPLINK);
const FROM_BACKENDS: Hook = Hook::Uplink(sequence::DOWNLINK);

const CLIENT: &str = "192.0.2.7";
const VIP: &str = "10.96.0.10";
const BALANCED: &str = "198.18.2.10";
const REMOTE: &str = "10.0.1.10";
const OTHER: &str = "10.0.1.11";
const POD: &str = "10.0.2.13";
const NODE: &str = "10.0.1.1";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn ready(address: &str) -> Endpoint {
    Endpoint {
        address: ip(address),
        weight: 1,
        is_on_node: address.starts_with("10.0.2."),
        condition: Condition::Ready,
    }
}

fn service(endpoints: &[Endpoint]) -> Service {
    let port = |protocol, port, target_port| ServicePort { protocol, port, target_port, node_port: None };
    Service {
        name: "web".into(),
        addresses: vec![ip(VIP)],
        external_addresses: Vec::new(),
        load_balancer_addresses: vec![ip(BALANCED)],
        ports: vec![port(Protocol::Tcp, 80, 8080), port(Protocol::Udp, 53, 5353), port(Protocol::Sctp, 90, 90)],
        external_policy: Policy::Cluster,
        internal_policy: Policy::Cluster,
        source_ranges: Vec::new(),
        affinity: None,
        algorithm: "random",
        endpoints: endpoints.to_vec(),
    }
}

fn serving(service: &Service) -> Reference {
    let mut reference = Reference::new(sequence::node(false, TIMEOUTS));
    reference.apply(std::slice::from_ref(service));
    reference
}

fn packet(from: (&str, u16), to: (&str, u16), header: Header) -> Packet {
    Packet {
        ethernet: ([1; 6], [2; 6]),
        source: ip(from.0),
        destination: ip(to.0),
        ttl: 64,
        body: Body::Segment(Segment {
            source_port: from.1,
            destination_port: to.1,
            header,
            payload: b"payload of some length".to_vec(),
            cut: None,
        }),
    }
}

fn tcp(from: (&str, u16), to: (&str, u16), flags: Flags) -> Packet {
    packet(from, to, Header::Tcp { flags, sequence: 1_000, acknowledgment: 2_000 })
}

fn udp(from: (&str, u16), to: (&str, u16)) -> Packet {
    packet(from, to, Header::Udp { has_checksum: true })
}

const NONE: Flags = Flags { syn: false, ack: false, fin: false, rst: false };
const SYN: Flags = Flags { syn: true, ..NONE };
const ACK: Flags = Flags { ack: true, ..NONE };
const FIN: Flags = Flags { fin: true, ..ACK };
const RST: Flags = Flags { rst: true, ..NONE };

fn syn(to: &str) -> Packet {
    tcp((CLIENT, 4242), (to, 80), SYN)
}

/// The reasons that a packet may be counted for.
fn reasons(reference: &mut Reference, hook: Hook, packet: &Packet) -> Vec<&'static str> {
    let mut reasons: Vec<_> = reference.expect(hook, packet).iter().map(|outcome| outcome.reason).collect();
    reasons.sort_unstable();
    reasons.dedup();
    reasons
}

/// Takes the only thing that may become of a packet, and lets it happen.
#[track_caller]
fn only(reference: &mut Reference, hook: Hook, packet: &Packet) -> Outcome {
    let allowed = reference.expect(hook, packet);
    let [outcome] = &allowed[..] else { panic!("{packet} may become {allowed:#?}") };
    reference.learn(packet, outcome);
    outcome.clone()
}

/// How the packet looks that the only outcome makes.
#[track_caller]
fn sent(reference: &mut Reference, hook: Hook, packet: &Packet) -> Packet {
    match only(reference, hook, packet).fate {
        Fate::Sent(packet) | Fate::Handed(packet) => packet,
        other => panic!("{packet} became {other:?}"),
    }
}

/// Where packets may go to.
fn destinations(reference: &mut Reference, hook: Hook, packet: &Packet) -> Vec<IpAddr> {
    let allowed = reference.expect(hook, packet);
    let destination = |outcome: &Outcome| match &outcome.fate {
        Fate::Sent(packet) | Fate::Handed(packet) => packet.destination,
        other => panic!("{packet} may become {other:?}"),
    };
    allowed.iter().map(destination).collect()
}

#[test]
fn a_remote_backend_sees_our_address_and_its_reply_comes_from_the_service() {
    let mut reference = serving(&service(&[ready(REMOTE)]));
    let forwarded = sent(&mut reference, OUTSIDE, &syn(VIP));
    let (source, destination) = (forwarded.source, forwarded.destination);
    assert_eq!((source, destination, forwarded.ttl), (ip(NODE), ip(REMOTE), 63));
    let tuple = forwarded.tuple().expect("it is TCP");
    assert_eq!((tuple.source.port(), tuple.destination.port()), (4242, 8080));
    let reply = tcp((REMOTE, 8080), (NODE, 4242), Flags { syn: true, ..ACK });
    let returned = sent(&mut reference, FROM_BACKENDS, &reply).tuple().expect("it is TCP");
    assert_eq!(returned, syn(VIP).tuple().expect("it is TCP").reversed());
}

#[test]
fn a_backend_on_this_node_sees_the_client_and_its_reply_is_translated_on_its_way_out() {
    let mut reference = serving(&service(&[ready(POD)]));
    let handed = only(&mut reference, OUTSIDE, &syn(VIP));
    assert_eq!(handed.reason, "request-on-node");
    let Fate::Handed(handed) = handed.fate else { panic!("{handed}") };
    assert_eq!((handed.source, handed.destination, handed.ttl), (ip(CLIENT), ip(POD), 64));
    let reply = tcp((POD, 8080), (CLIENT, 4242), Flags { syn: true, ..ACK });
    assert_eq!(only(&mut reference, Hook::Pod, &reply).reason, "reply-underway");
    let left = only(&mut reference, Hook::Egress, &reply);
    assert_eq!(left.reason, "reply-on-node");
    assert!(matches!(left.fate, Fate::Handed(packet) if packet.source == ip(VIP)));
}

#[test]
fn a_client_that_is_its_own_backend_sees_the_node() {
    let mut reference = serving(&service(&[ready(POD)]));
    let allowed = reference.expect(Hook::Pod, &tcp((POD, 4242), (VIP, 80), SYN));
    assert!(!allowed.is_empty());
    for outcome in allowed {
        let Fate::Sent(packet) = outcome.fate else { panic!("{outcome}") };
        assert!([ip("10.0.0.1"), ip(NODE), ip("10.0.2.1")].contains(&packet.source), "{packet}");
        assert_eq!(packet.destination, ip(POD));
    }
}

#[test]
fn only_ready_endpoints_take_new_flows_and_where_there_are_none_those_that_terminate() {
    let in_condition = |address, condition| Endpoint { condition, ..ready(address) };
    let terminating = in_condition(OTHER, Condition::ServingTerminating);
    let mut reference = serving(&service(&[ready(REMOTE), terminating]));
    assert_eq!(destinations(&mut reference, OUTSIDE, &syn(VIP)), [ip(REMOTE)]);
    let mut reference = serving(&service(&[in_condition(REMOTE, Condition::NotReady), terminating]));
    assert_eq!(destinations(&mut reference, OUTSIDE, &syn(VIP)), [ip(OTHER)]);
    // Of weight zero is not the same as not ready.
    let mut reference = serving(&service(&[Endpoint { weight: 0, ..ready(REMOTE) }, terminating]));
    assert_eq!(reasons(&mut reference, OUTSIDE, &syn(VIP)), ["refused-no-backend"]);
}

#[test]
fn the_local_policy_keeps_to_this_node_for_clients_from_outside() {
    let local = Service { external_policy: Policy::Local, ..service(&[ready(REMOTE), ready(POD)]) };
    assert_eq!(destinations(&mut serving(&local), OUTSIDE, &syn(BALANCED)), [ip(POD)]);
    assert_eq!(destinations(&mut serving(&local), OUTSIDE, &syn(VIP)), [ip(REMOTE), ip(POD)]);
    let from_pod = tcp(("10.0.2.19", 4242), (BALANCED, 80), SYN);
    assert_eq!(destinations(&mut serving(&local), Hook::Pod, &from_pod), [ip(REMOTE), ip(POD)]);
    let elsewhere = Service { endpoints: vec![ready(REMOTE)], ..local.clone() };
    assert_eq!(reasons(&mut serving(&elsewhere), OUTSIDE, &syn(BALANCED)), ["no-local-endpoints"]);
    let nowhere = Service { endpoints: Vec::new(), ..local };
    assert_eq!(reasons(&mut serving(&nowhere), OUTSIDE, &syn(BALANCED)), ["refused-no-backend"]);
}

#[test]
fn source_ranges_hold_for_load_balancer_addresses_and_clients_from_outside() {
    let ranges = vec![(ip("192.0.2.8"), 29), (ip("2001:db8::"), 32)];
    let mut reference = serving(&Service { source_ranges: ranges, ..service(&[ready(REMOTE)]) });
    assert_eq!(reasons(&mut reference, OUTSIDE, &syn(BALANCED)), ["source-not-allowed"]);
    assert_eq!(reasons(&mut reference, OUTSIDE, &syn(VIP)), ["redirect"]);
    assert_eq!(reasons(&mut reference, OUTSIDE, &tcp(("192.0.2.9", 4242), (BALANCED, 80), SYN)), ["redirect"]);
    assert_eq!(reasons(&mut reference, Hook::Pod, &tcp((POD, 4242), (BALANCED, 80), SYN)), ["request-on-node"]);
}

#[test]
fn wrong_ports_are_refused_at_cluster_addresses_alone_and_a_rst_is_never_answered() {
    let mut reference = serving(&service(&[ready(REMOTE)]));
    let to = |vip, flags| tcp((CLIENT, 4242), (vip, 81), flags);
    let refused = only(&mut reference, OUTSIDE, &to(VIP, SYN));
    assert!(matches!(refused.fate, Fate::Answered(Answer::Reset)) && refused.reason == "refused-wrong-port");
    assert_eq!(reasons(&mut reference, OUTSIDE, &to(VIP, RST)), ["wrong-port"]);
    assert_eq!(reasons(&mut reference, OUTSIDE, &to(BALANCED, SYN)), ["not-service"]);
    let datagram = only(&mut reference, OUTSIDE, &udp((CLIENT, 4242), (VIP, 54)));
    assert!(matches!(datagram.fate, Fate::Answered(Answer::Unreachable)));
}

#[test]
fn only_a_syn_opens_and_a_flow_keeps_its_backend_whatever_changes() {
    let mut web = service(&[ready(REMOTE)]);
    web.ports[0].node_port = Some(30_080);
    let mut reference = serving(&web);
    let ack = tcp((CLIENT, 4242), (VIP, 80), ACK);
    assert_eq!(reasons(&mut reference, OUTSIDE, &ack), ["no-flow"]);
    let answer = tcp((CLIENT, 443), (NODE, 30_080), Flags { ack: true, ..SYN });
    assert_eq!(reasons(&mut reference, OUTSIDE, &answer), ["not-service"], "it may be the node's own connection");
    sent(&mut reference, OUTSIDE, &syn(VIP));
    for endpoints in [vec![ready(OTHER), Endpoint { weight: 0, ..ready(REMOTE) }], vec![ready(OTHER)], vec![]] {
        reference.apply(&[service(&endpoints)]);
        assert_eq!(sent(&mut reference, OUTSIDE, &ack).destination, ip(REMOTE), "{endpoints:?}");
    }
    reference.apply(&[service(&[ready(OTHER)])]);
    assert_eq!(sent(&mut reference, OUTSIDE, &syn(VIP)).destination, ip(OTHER), "it lost its backend");
}

#[test]
fn datagrams_choose_anew_when_their_backend_leaves() {
    let mut reference = serving(&service(&[ready(REMOTE)]));
    let datagram = udp((CLIENT, 4242), (VIP, 53));
    assert_eq!(sent(&mut reference, OUTSIDE, &datagram).destination, ip(REMOTE));
    reference.apply(&[service(&[Endpoint { weight: 0, ..ready(REMOTE) }, ready(OTHER)])]);
    assert_eq!(sent(&mut reference, OUTSIDE, &datagram).destination, ip(REMOTE), "it drains");
    let answer = udp((REMOTE, 5353), (NODE, 4242));
    assert_eq!(sent(&mut reference, FROM_BACKENDS, &answer).destination, ip(CLIENT));
    reference.apply(&[service(&[ready(OTHER)])]);
    let after = reference.clone();
    assert_eq!(reasons(&mut reference, FROM_BACKENDS, &answer), ["not-service"], "nobody's any more");
    reference = after;
    assert_eq!(sent(&mut reference, OUTSIDE, &datagram).destination, ip(OTHER));
}

#[test]
fn a_syn_opens_anew_after_either_ends_fin_or_rst() {
    let endings = [(true, FIN, true), (false, RST, true), (true, RST, true), (false, FIN, true), (true, ACK, false)];
    for (is_clients, flags, ends) in endings {
        let mut reference = serving(&service(&[ready(REMOTE)]));
        sent(&mut reference, OUTSIDE, &syn(VIP));
        if is_clients {
            sent(&mut reference, OUTSIDE, &tcp((CLIENT, 4242), (VIP, 80), flags));
        } else {
            sent(&mut reference, FROM_BACKENDS, &tcp((REMOTE, 8080), (NODE, 4242), flags));
        }
        reference.apply(&[service(&[Endpoint { weight: 0, ..ready(REMOTE) }, ready(OTHER)])]);
        let expected = if ends { OTHER } else { REMOTE };
        assert_eq!(sent(&mut reference, OUTSIDE, &syn(VIP)).destination, ip(expected), "{is_clients} {flags:?}");
    }
}

#[test]
fn no_two_flows_have_one_reverse_tuple() {
    let mut reference = serving(&service(&[ready(REMOTE)]));
    sent(&mut reference, OUTSIDE, &syn(VIP));
    let allowed = reference.expect(OUTSIDE, &tcp(("192.0.2.8", 4242), (VIP, 80), SYN));
    let [outcome] = &allowed[..] else { panic!("{allowed:?}") };
    let choice = outcome.source_port.clone().expect("the client's port is taken");
    assert_eq!(choice.range, sequence::SNAT_PORTS);
    // The checksum of SCTP is of the ports as well, and can't be changed with them.
    let init = |client| packet((client, 4242), (VIP, 90), Header::Sctp { chunk: SCTP_INIT });
    sent(&mut reference, OUTSIDE, &init(CLIENT));
    assert_eq!(reasons(&mut reference, OUTSIDE, &init("192.0.2.8")), ["snat-ports-exhausted"]);
}

#[test]
fn a_clients_new_flows_stay_with_a_backend_that_takes_them() {
    let sticky = |endpoints: &[Endpoint]| Service { affinity: Some(100), ..service(endpoints) };
    let both = [ready(REMOTE), ready(OTHER)];
    let next = |port| tcp((CLIENT, port), (VIP, 80), SYN);
    let mut reference = serving(&sticky(&both));
    let first = reference.expect(OUTSIDE, &next(1)).swap_remove(1);
    reference.learn(&next(1), &first);
    assert_eq!(destinations(&mut reference, OUTSIDE, &next(2)), [ip(OTHER)]);
    reference.apply(&[sticky(&[ready(REMOTE), Endpoint { weight: 0, ..ready(OTHER) }])]);
    assert_eq!(destinations(&mut reference, OUTSIDE, &next(3)), [ip(REMOTE)]);
    reference.apply(&[sticky(&both)]);
    assert_eq!(destinations(&mut reference, OUTSIDE, &next(4)).len(), 2, "it may have been forgotten");
    assert_eq!(sent_to_any(&mut reference, &next(5)), ip(REMOTE));
    let expired = Packet { ttl: 1, ..next(6) };
    assert_eq!(only(&mut reference, OUTSIDE, &expired).reason, "ttl-expired");
    assert_eq!(destinations(&mut reference, OUTSIDE, &next(7)).len(), 2, "another one may have been chosen");
    assert_eq!(sent_to_any(&mut reference, &next(8)), ip(REMOTE));
    reference.wait(101);
    assert_eq!(destinations(&mut reference, OUTSIDE, &next(9)).len(), 2);
}

fn sent_to_any(reference: &mut Reference, packet: &Packet) -> IpAddr {
    let first = reference.expect(OUTSIDE, packet).swap_remove(0);
    reference.learn(packet, &first);
    let Effect::Opens(flow) = first.effect else { panic!("{first}") };
    flow.reply.source.ip()
}

#[test]
fn a_flow_is_over_when_both_directions_have_been_idle() {
    let mut reference = serving(&service(&[ready(REMOTE)]));
    let ack = tcp((CLIENT, 4242), (VIP, 80), ACK);
    let reply = tcp((REMOTE, 8080), (NODE, 4242), ACK);
    sent(&mut reference, OUTSIDE, &syn(VIP));
    reference.wait(61);
    assert_eq!(reasons(&mut reference, OUTSIDE, &ack), ["no-flow"]);
    assert_eq!(reasons(&mut reference, FROM_BACKENDS, &reply), ["not-service"]);
    for packet in [&syn(VIP), &ack] {
        sent(&mut reference, OUTSIDE, packet);
    }
    sent(&mut reference, OUTSIDE, &tcp((CLIENT, 4242), (VIP, 80), FIN));
    sent(&mut reference, FROM_BACKENDS, &reply);
    reference.wait(7_999);
    sent(&mut reference, FROM_BACKENDS, &reply);
    sent(&mut reference, FROM_BACKENDS, &tcp((REMOTE, 8080), (NODE, 4242), FIN));
    reference.wait(11);
    assert_eq!(reasons(&mut reference, FROM_BACKENDS, &reply), ["not-service"]);
}

#[test]
fn time_to_live_ends_here_for_what_we_forward() {
    let mut reference = serving(&service(&[ready(REMOTE)]));
    let last = |packet: Packet| Packet { ttl: 1, ..packet };
    assert_eq!(reasons(&mut reference, OUTSIDE, &last(syn(VIP))), ["ttl-expired"]);
    assert!(reference.flows().is_empty());
    sent(&mut reference, OUTSIDE, &syn(VIP));
    let reply = tcp((REMOTE, 8080), (NODE, 4242), ACK);
    assert_eq!(reasons(&mut reference, FROM_BACKENDS, &last(reply)), ["reply-ttl-expired"]);
    let mut reference = serving(&service(&[ready(POD)]));
    assert_eq!(sent(&mut reference, OUTSIDE, &last(syn(VIP))).ttl, 1);
}

#[test]
fn an_error_tells_each_side_of_its_own_packet() {
    let mut reference = serving(&service(&[ready(REMOTE)]));
    let forwarded = sent(&mut reference, OUTSIDE, &syn(VIP));
    let error = |source, quoted: &Packet| {
        let quoted = Box::new(quoted.clone());
        let destination = quoted.source;
        let body = Body::Error(Error { kind: 3, code: 4, rest: [0, 0, 5, 0], quoted, length: 28 });
        Packet { ethernet: ([1; 6], [2; 6]), source: ip(source), destination, ttl: 64, body }
    };
    let told = sent(&mut reference, FROM_BACKENDS, &error("10.9.9.9", &forwarded));
    assert_eq!((told.source, told.destination), (ip(VIP), ip(CLIENT)));
    let Body::Error(of_client) = told.body else { panic!("{told}") };
    assert_eq!(of_client.quoted.tuple(), syn(VIP).tuple());

    let reply = tcp((REMOTE, 8080), (NODE, 4242), ACK);
    let returned = sent(&mut reference, FROM_BACKENDS, &reply);
    let told = sent(&mut reference, OUTSIDE, &error("10.9.9.9", &returned));
    assert_eq!((told.source, told.destination), (ip(NODE), ip(REMOTE)));
    let Body::Error(of_backend) = told.body else { panic!("{told}") };
    assert_eq!(of_backend.quoted.tuple(), reply.tuple());

    let stranger = error("10.9.9.9", &tcp((VIP, 80), (CLIENT, 1), ACK));
    assert_eq!(reasons(&mut reference, OUTSIDE, &stranger), ["icmp-lost"]);
    let other = error("10.9.9.9", &tcp((NODE, 80), (CLIENT, 1), ACK));
    assert_eq!(reasons(&mut reference, OUTSIDE, &other), ["other-icmp"]);
}

#[test]
fn fragments_follow_their_first() {
    let mut reference = serving(&service(&[ready(REMOTE)]));
    let pieces = udp((CLIENT, 4242), (VIP, 53)).pieces(7, &[16]);
    assert_eq!(reasons(&mut reference, OUTSIDE, &pieces[1]), ["fragment-lost"]);
    let first = sent(&mut reference, OUTSIDE, &pieces[0]);
    let later = sent(&mut reference, OUTSIDE, &pieces[1]);
    assert_eq!((later.source, later.destination), (first.source, first.destination));
    assert!(matches!(later.body, Body::LaterPiece(LaterPiece { offset: 16, .. })));
    let stranger = Packet { destination: ip("198.18.9.9"), ..pieces[1].clone() };
    assert_eq!(reasons(&mut reference, OUTSIDE, &stranger), ["fragment"]);
}

#[test]
fn a_fragment_of_a_refused_first_may_be_lost_though_a_flow_opens_between_them() {
    let mut reference = serving(&service(&[]));
    let whole = udp((CLIENT, 4242), (VIP, 53));
    let pieces = whole.pieces(7, &[16]);
    assert_eq!(only(&mut reference, OUTSIDE, &pieces[0]).reason, "refused-no-backend");
    reference.apply(&[service(&[ready(REMOTE)])]);
    sent(&mut reference, OUTSIDE, &whole);
    let reasons = reasons(&mut reference, OUTSIDE, &pieces[1]);
    assert!(["fragment-lost", "redirect"].iter().all(|it| reasons.contains(it)), "{reasons:?}");
}

#[test]
fn a_service_without_endpoints_refuses_and_a_ping_is_refused_unless_answers_are_on() {
    let mut reference = serving(&service(&[]));
    assert_eq!(reasons(&mut reference, OUTSIDE, &syn(VIP)), ["refused-no-backend"]);
    assert_eq!(reasons(&mut reference, OUTSIDE, &tcp((CLIENT, 1), (VIP, 80), RST)), ["no-backend", "no-flow"]);
    let body = Body::Echo { identifier: 1, sequence: 2, payload: Vec::new() };
    let ping = |to| Packet { destination: ip(to), body: body.clone(), ..syn(VIP) };
    assert_eq!(reasons(&mut reference, OUTSIDE, &ping(VIP)), ["echo-refused"]);
    assert_eq!(reasons(&mut reference, OUTSIDE, &ping(NODE)), ["other-icmp"]);
    reference.settings.answers_echo = true;
    assert_eq!(reasons(&mut reference, OUTSIDE, &ping(VIP)), ["answered-echo"]);
}

/// A program that does what the reference says, but for one fault.
struct Simulated {
    reference: Reference,
    fault: Fault,
    /// Says what it chooses where it may.
    draw: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    KeepsTtl,
    LeavesChecksum,
    TakesAnyEndpoint,
    IgnoresSourceRanges,
    IgnoresAffinity,
    ForgetsNoEndpoint,
    SharesTuples,
    QuotesAsItCame,
    ResetsFromZero,
    TakesLaterPieces,
    CountsAsTx,
    NeverForgets,
}

impl Programs for Simulated {
    fn apply(&mut self, services: &[Service]) {
        let mut services = services.to_vec();
        for service in &mut services {
            match self.fault {
                Fault::TakesAnyEndpoint => {
                    service.endpoints.iter_mut().for_each(|endpoint| endpoint.condition = Condition::Ready);
                }
                Fault::IgnoresSourceRanges => service.source_ranges.clear(),
                Fault::IgnoresAffinity => service.affinity = None,
                Fault::ForgetsNoEndpoint => {
                    let before = self.reference.services.iter().find(|it| it.name == service.name);
                    let before = before.map_or(Vec::new(), |it| it.endpoints.clone());
                    let is_missing = |old: &Endpoint| service.endpoints.iter().all(|it| it.address != old.address);
                    let missing: Vec<_> = before.into_iter().filter(is_missing).collect();
                    service.endpoints.extend(missing.into_iter().map(|it| Endpoint { weight: 0, ..it }));
                }
                _ => {}
            }
        }
        self.reference.apply(&services);
    }

    fn wait(&mut self, seconds: u32) {
        if self.fault != Fault::NeverForgets {
            self.reference.wait(seconds);
        }
    }

    fn reclaim(&mut self) {}

    fn run(&mut self, hook: Hook, _is_tc: bool, packet: &Packet) -> Option<Ran> {
        self.draw = self.draw.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let draw = (self.draw >> 16) as usize;
        let allowed = self.reference.expect(hook, packet);
        let mut outcome = allowed[draw % allowed.len()].clone();
        if let Some(choice) = outcome.source_port.clone() {
            let free: Vec<_> = choice.range.filter(|port| !choice.taken.contains(port)).collect();
            let port = match packet.tuple() {
                Some(tuple) if self.fault == Fault::SharesTuples => tuple.source.port(),
                _ => free[draw % free.len()],
            };
            outcome = outcome.with_source_port(port);
        }
        self.reference.learn(packet, &outcome);
        let mut reason = outcome.reason;
        let (action, bytes) = match outcome.fate {
            Fate::Untouched => (Action::Pass, packet.bytes()),
            Fate::Dropped => (Action::Drop, packet.bytes()),
            Fate::Handed(translated) => (Action::Pass, self.spoilt(packet, translated)),
            Fate::Sent(translated) => (Action::Send, self.spoilt(packet, translated)),
            Fate::Answered(answer) => (Action::Send, answered(answer, packet, self.fault == Fault::ResetsFromZero)),
        };
        if self.fault == Fault::CountsAsTx && reason == "redirect" {
            reason = "tx";
        }
        if self.fault == Fault::TakesLaterPieces && reason == "fragment-lost" {
            return Some(Ran { action: Action::Pass, reason: "fragment".into(), packet: packet.bytes() });
        }
        Some(Ran { action, reason: reason.into(), packet: bytes })
    }
}

impl Simulated {
    fn spoilt(&self, given: &Packet, mut packet: Packet) -> Vec<u8> {
        if self.fault == Fault::KeepsTtl {
            packet.ttl = given.ttl;
        }
        if let (Fault::QuotesAsItCame, Body::Error(_)) = (self.fault, &given.body) {
            packet.body = given.body.clone();
        }
        let mut bytes = packet.bytes();
        if let (Fault::LeavesChecksum, Body::Segment(Segment { header: Header::Tcp { .. }, .. })) =
            (self.fault, &packet.body)
        {
            let (from, to) = (given.transport_offset() + 16, packet.transport_offset() + 16);
            bytes[to..to + 2].copy_from_slice(&given.bytes()[from..from + 2]);
        }
        bytes
    }
}

fn answered(answer: Answer, given: &Packet, is_from_zero: bool) -> Vec<u8> {
    let (source, destination) = (given.destination.to_string(), given.source.to_string());
    let make = if given.source.is_ipv4() { packet::Packet::v4 } else { packet::Packet::v6 };
    let reply = make(&source, &destination).ethernet(given.ethernet.1, given.ethernet.0);
    match (answer, &given.body) {
        (Answer::Reset, Body::Segment(asked)) => {
            let Header::Tcp { flags, sequence, acknowledgment } = asked.header else { panic!("{given}") };
            let reset = reply.tcp(asked.destination_port, asked.source_port).rst();
            let end = sequence + asked.payload.len() as u32 + u32::from(flags.syn) + u32::from(flags.fin);
            match (flags.ack, is_from_zero) {
                (true, false) => reset.sequence(acknowledgment, 0).bytes(),
                _ => reset.ack().sequence(0, end).bytes(),
            }
        }
        (Answer::Unreachable, _) => {
            let (kind, code) = if given.source.is_ipv4() { (3, 3) } else { (1, 4) };
            reply.icmp(kind, code, [0; 4]).payload(&given.bytes()[14..]).bytes()
        }
        (Answer::Echo, Body::Echo { identifier, sequence, payload }) => {
            let kind = if given.source.is_ipv4() { 0 } else { 129 };
            let [[a, b], [c, d]] = [*identifier, *sequence].map(u16::to_be_bytes);
            reply.icmp(kind, 0, [a, b, c, d]).payload(payload).bytes()
        }
        _ => panic!("{given} is not answered like that"),
    }
}

/// What a fault shows in.
fn found(fault: Fault) -> Option<Mismatch> {
    let found = explore(CASES, RngSeed::Fixed(1), |case, stage| {
        let reference = Reference::new(sequence::node(true, TIMEOUTS));
        let mut programs = Simulated { reference: reference.clone(), fault, draw: stage.0 };
        case.play(stage, reference, &mut programs)
    });
    found.err()
}

#[test]
fn a_program_without_fault_is_found_right() {
    if let Some(mismatch) = found(Fault::None) {
        panic!("{}", mismatch.story);
    }
}

#[test]
fn every_fault_is_found_and_told_in_a_few_steps() {
    for fault in [
        Fault::KeepsTtl,
        Fault::LeavesChecksum,
        Fault::TakesAnyEndpoint,
        Fault::IgnoresSourceRanges,
        Fault::IgnoresAffinity,
        Fault::ForgetsNoEndpoint,
        Fault::SharesTuples,
        Fault::QuotesAsItCame,
        Fault::ResetsFromZero,
        Fault::TakesLaterPieces,
        Fault::CountsAsTx,
    ] {
        let Mismatch { steps, story } = found(fault).unwrap_or_else(|| panic!("{fault:?} was not found"));
        assert!(steps <= 6, "{fault:?} takes {steps} steps:\n{story}");
        println!("── {fault:?}, {steps} steps:\n{story}\n");
    }
}

#[test]
fn that_flows_grow_old_is_seen_and_that_they_do_not() {
    for (fault, is_right) in [(Fault::None, true), (Fault::NeverForgets, false)] {
        let reference = Reference::new(sequence::node(true, sequence::SHORT));
        let mut programs = Simulated { reference: reference.clone(), fault, draw: 1 };
        let played = Case::aging(true).play(Stage(0), reference, &mut programs);
        assert_eq!(played.is_ok(), is_right, "{played:?}");
    }
}
