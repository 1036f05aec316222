//! Random services and packet sequences, played to the programs and to the reference alike.
//!
//! A [`Case`] says everything by small numbers: the third client, the flow before last. Few of each make for many
//! meetings, of flows in one tuple, of packets with a change, and for small cases after shrinking. What the numbers stand for
//! differs from one time that a case is played to the next ([`Stage`]), so that the programs need not forget what was before.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use proptest::{
    prelude::*,
    sample::{select, subsequence},
    test_runner::{Config, RngSeed, TestCaseError, TestError, TestRunner},
};

use super::{
    Direction, Effect, Fate, Flow, Hook, Link, Outcome, Protocol, Ran, Reach, Reference, Settings, Timeouts, Tuple,
    Way,
    packet::{Body, Error, Flags, Header, Packet, SCTP_INIT, Segment},
    service::{Condition, Endpoint, Policy, Service, ServicePort, yaml},
};
use crate::datapath::{DOWN, DOWN_MAC, POD, POD_MAC, ROUTER_MAC, UP, UP_MAC, backend_mac, pod_mac};

/// The programs under test.
pub trait Programs {
    /// Serves these services from now on.
    fn apply(&mut self, services: &[Service]);

    /// Lets time pass.
    fn wait(&mut self, seconds: u32);

    /// Ends what has lost its backend. Only called where there is such a thing: it may take long.
    fn reclaim(&mut self);

    /// Runs a packet through the program of a hook, where there are two kinds the one for tc if `is_tc`. `None`: there is none.
    fn run(&mut self, hook: Hook, is_tc: bool, packet: &Packet) -> Option<Ran>;
}

/// The link towards the clients, among [`Settings::links`].
pub const UPLINK: usize = 0;
/// The link towards backends.
pub const DOWNLINK: usize = 1;

/// How many times cases are played, each differently, before the programs have to be loaded anew: so many times
/// there are other source ports and fragments' identifications.
pub const STAGES: u32 = 9_000;

/// The SNAT range that programs are to be loaded with: apart from the clients' ports.
pub const SNAT_PORTS: std::ops::RangeInclusive<u16> = 61_000..=65_535;

/// The ports that clients send from: above those of services, and below the SNAT range.
const FIRST_PORT: u16 = 33_000;
const CLIENT_PORTS: u32 = 3;
/// The clients: so many outside, then those on pods of this node, then the node itself.
const OUTSIDE: usize = 3;
const CLIENTS: usize = OUTSIDE + PODS.len() + 1;

/// All that services may serve: protocol, port, endpoints' port, and NodePort less that of the service.
const PORTS: [(Protocol, u16, u16, Option<u16>); 4] = [
    (Protocol::Tcp, 80, 8080, Some(0)),
    (Protocol::Udp, 53, 5353, Some(1)),
    (Protocol::Udp, 80, 8080, Some(2)),
    (Protocol::Sctp, 90, 90, None),
];

/// What one stage gives the numbers in a case for meaning: names of services, addresses and ports of clients,
/// identifications of fragments.
#[derive(Clone, Copy, Debug)]
pub struct Stage(pub u32);

/// Services, and what happens to them.
#[derive(Clone, Debug)]
pub struct Case {
    services: Vec<Plan>,
    steps: Vec<Step>,
    is_tc: bool,
}

#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a field of a services file that is there or not")]
struct Plan {
    ports: Vec<usize>,
    has_external: bool,
    has_load_balancer: bool,
    has_node_ports: bool,
    external_policy: Policy,
    internal_policy: Policy,
    /// The clients that its source ranges let in; none: no ranges.
    admitted: BTreeSet<usize>,
    has_affinity: bool,
    algorithm: &'static str,
    /// By [`endpoint`].
    endpoints: BTreeMap<usize, (u16, Condition)>,
}

#[derive(Clone, Debug)]
enum Step {
    /// A client sends to a frontend, or to a port beside it.
    Ask(Ask),
    /// The client of a flow sends on.
    Again { flow: usize, say: Say, is_last_hop: bool },
    /// The backend of a flow sends.
    Reply { flow: usize, say: Say, is_last_hop: bool, is_seen_coming: bool },
    /// Fragments from a client or a backend, in this order.
    Pieces { of: Whole, order: Vec<usize>, identification: u16, is_seen_coming: bool },
    /// Someone on the way could not take a packet of a flow any further.
    Complain(Complaint),
    /// A client pings.
    Ping { client: usize, at: Place },
    /// A packet that has nothing to do with services.
    Stray { which: usize, is_ipv6: bool },
    /// Time passes, in seconds.
    Wait(u32),
    /// The services change.
    Change { service: usize, change: Change },
}

#[derive(Clone, Debug)]
struct Ask {
    client: usize,
    from: u16,
    at: Place,
    port: usize,
    /// Whether address and port are meant to be ones that the service has.
    is_apt: bool,
    say: Say,
    is_last_hop: bool,
}

/// An address of a service.
#[derive(Clone, Copy, Debug)]
struct Place {
    service: usize,
    which: Which,
    is_ipv6: bool,
}

#[derive(Clone, Copy, Debug)]
enum Which {
    Cluster,
    External,
    LoadBalancer,
    Node(usize),
}

/// What is said, as far as the protocol has it.
#[derive(Clone, Copy, Debug)]
struct Say {
    flags: Flags,
    has_checksum: bool,
    length: usize,
}

#[derive(Clone, Debug)]
enum Whole {
    Asked(Ask),
    Flow(usize, Direction),
}

#[derive(Clone, Debug)]
struct Complaint {
    flow: usize,
    /// Whether it is about a packet to the backend.
    is_about_request: bool,
    is_by_router: bool,
    kind: usize,
    length: usize,
    is_seen_coming: bool,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Endpoint(usize, u16, Condition),
    NoEndpoint(usize),
    External(Policy),
    Internal(Policy),
    NoService,
}

/// The node of the lab, with these settings besides.
pub fn node(answers_echo: bool, timeouts: Timeouts) -> Settings {
    let both = |addresses: (Ipv4Addr, Ipv6Addr)| vec![addresses.0.into(), addresses.1.into()];
    let neighbours = |mac: fn(u8) -> [u8; 6], indices: [usize; 2]| {
        let addresses = indices.into_iter().flat_map(|index| [false, true].map(|is_ipv6| endpoint(index, is_ipv6)));
        addresses.map(|address| (Reach::Host(address), mac(last_byte(address)))).collect()
    };
    Settings {
        links: vec![
            Link { mac: UP_MAC, addresses: both(UP), neighbours: vec![(Reach::Everyone, ROUTER_MAC)] },
            Link { mac: DOWN_MAC, addresses: both(DOWN), neighbours: neighbours(backend_mac, [0, 1]) },
            Link { mac: POD_MAC, addresses: both(POD), neighbours: neighbours(pod_mac, [3, 4]) },
        ],
        snat_ports: SNAT_PORTS,
        answers_echo,
        timeouts,
    }
}

/// The addresses of endpoints: two on the link of backends, one behind the router of the clients, two on this node.
const ENDPOINTS: [[&str; 2]; 5] = [
    ["10.0.1.10", "fd00:1::a"],
    ["10.0.1.11", "fd00:1::b"],
    ["10.2.0.5", "fd00:b::5"],
    ["10.0.2.13", "fd00:2::d"],
    ["10.0.2.14", "fd00:2::e"],
];

/// The addresses of clients on this node, of which the first is an endpoint as well.
const PODS: [[&str; 2]; 2] = [ENDPOINTS[3], ["10.0.2.19", "fd00:2::13"]];

fn address(of: [&str; 2], is_ipv6: bool) -> IpAddr {
    of[usize::from(is_ipv6)].parse().expect("an address")
}

fn endpoint(index: usize, is_ipv6: bool) -> IpAddr {
    address(ENDPOINTS[index], is_ipv6)
}

/// Whether an address is one of this node's pods: a client there, or an endpoint.
fn is_on_node(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[..3] == [10, 0, 2],
        IpAddr::V6(address) => address.segments()[..2] == [0xfd00, 2],
    }
}

fn last_byte(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => address.octets()[15],
    }
}

/// Where what a client sends is seen first.
fn client_hook(client: IpAddr) -> Hook {
    if [UP.0.into(), UP.1.into()].contains(&client) {
        Hook::Own
    } else if is_on_node(client) {
        Hook::Pod
    } else {
        Hook::Uplink(UPLINK)
    }
}

/// The address of a service; its number is the same in every stage.
fn place(at: Place) -> IpAddr {
    let number = 10 + at.service as u16;
    let (v4, v6) = match at.which {
        Which::Cluster => (Ipv4Addr::new(10, 96, 0, number as u8), 0x96),
        Which::External => (Ipv4Addr::new(198, 18, 1, number as u8), 0x97),
        Which::LoadBalancer => (Ipv4Addr::new(198, 18, 2, number as u8), 0x98),
        Which::Node(link) => {
            let (v4, v6) = [UP, DOWN, POD][link];
            return if at.is_ipv6 { v6.into() } else { v4.into() };
        }
    };
    if at.is_ipv6 { Ipv6Addr::new(0xfd00, v6, 0, 0, 0, 0, 0, number).into() } else { v4.into() }
}

impl Stage {
    fn client(self, client: usize, is_ipv6: bool) -> IpAddr {
        match client.checked_sub(OUTSIDE) {
            Some(pod) if pod < PODS.len() => address(PODS[pod], is_ipv6),
            Some(_) if is_ipv6 => UP.1.into(),
            Some(_) => UP.0.into(),
            None if is_ipv6 => {
                let number = u128::from(self.0) << 16 | client as u128;
                Ipv6Addr::from_bits(0x2001_0db8_000c_u128 << 80 | number).into()
            }
            // 100.64.0.0/10 has 2^22 addresses.
            None => Ipv4Addr::from_bits(0x6440_0000 | (self.0 % (1 << 20)) << 2 | client as u32).into(),
        }
    }

    fn port(self, from: u16) -> u16 {
        FIRST_PORT + (self.0 % STAGES * CLIENT_PORTS) as u16 + from
    }

    fn identification(self, identification: u16) -> u16 {
        (self.0 % STAGES * 4) as u16 | identification
    }

    fn service(self, index: usize, plan: &Plan) -> Service {
        let addresses = |which| [false, true].map(|is_ipv6| place(Place { service: index, which, is_ipv6 })).to_vec();
        let given = |is_given: bool, which| if is_given { addresses(which) } else { Vec::new() };
        // A service has node ports for all of its ports, or for none; SCTP's would have to be the port itself.
        let has_node_ports = plan.has_node_ports && plan.ports.iter().all(|&port| PORTS[port].3.is_some());
        let ports = plan.ports.iter().map(|&port| {
            let (protocol, port, target_port, node_port) = PORTS[port];
            let node_port = node_port.filter(|_| has_node_ports).map(|port| node_port_of(index, port));
            ServicePort { protocol, port, target_port, node_port }
        });
        let endpoints = plan.endpoints.iter().flat_map(|(&index, &(weight, condition))| {
            [false, true].map(|is_ipv6| {
                let address = endpoint(index, is_ipv6);
                Endpoint { address, weight, is_on_node: is_on_node(address), condition }
            })
        });
        let admitted = plan
            .admitted
            .iter()
            .flat_map(|&client| [(self.client(client, false), 32), (self.client(client, true), 128)]);
        Service {
            name: format!("s{index}-{}", self.0),
            addresses: addresses(Which::Cluster),
            external_addresses: given(plan.has_external, Which::External),
            load_balancer_addresses: given(plan.has_load_balancer, Which::LoadBalancer),
            ports: ports.collect(),
            external_policy: plan.external_policy,
            internal_policy: plan.internal_policy,
            source_ranges: if plan.has_load_balancer { admitted.collect() } else { Vec::new() },
            affinity: plan.has_affinity.then_some(10_800),
            algorithm: plan.algorithm,
            endpoints: endpoints.collect(),
        }
    }
}

fn node_port_of(service: usize, port: u16) -> u16 {
    30_080 + 10 * service as u16 + port
}

/// A mismatch, after shrinking.
#[derive(Debug)]
pub struct Mismatch {
    /// How many steps the case has.
    pub steps: usize,
    /// The services, what became of each packet, and what may have become of the last.
    pub story: String,
}

/// How many cases [`explore`] plays at most: with the plays that shrinking takes that makes [`STAGES`].
pub const CASES: u32 = STAGES / 3;
/// How often a smaller case is played before it is taken for right: what fails may depend on a choice that the programs draw.
const ATTEMPTS: u32 = 5;

/// Plays random cases, each on a stage of its own, until all are played or one fails; that one is made small.
///
/// # Errors
///
/// The mismatch.
pub fn explore(
    cases: u32,
    seed: RngSeed,
    mut play: impl FnMut(&Case, Stage) -> Result<(), String>,
) -> Result<(), Mismatch> {
    assert!(cases <= CASES, "the stages would not do");
    let config = Config {
        cases,
        rng_seed: seed,
        failure_persistence: None,
        max_shrink_iters: (STAGES - CASES) / ATTEMPTS,
        ..Config::default()
    };
    // The runner takes a closure that may be called from anywhere.
    let shared = RefCell::new((0, 1, &mut play));
    let result = TestRunner::new(config).run(&any_case(), |case| {
        let (stage, attempts, play) = &mut *shared.borrow_mut();
        for _ in 0..*attempts {
            *stage += 1;
            if let Err(story) = play(&case, Stage(*stage)) {
                *attempts = ATTEMPTS;
                return Err(TestCaseError::fail(story));
            }
        }
        Ok(())
    });
    match result {
        Ok(()) => Ok(()),
        Err(TestError::Fail(story, case)) => {
            Err(Mismatch { steps: case.steps.len(), story: story.message().to_owned() })
        }
        Err(TestError::Abort(reason)) => panic!("no case could be made: {reason}"),
    }
}

/// One time that a case is played.
struct Play<'a, P> {
    programs: &'a mut P,
    reference: Reference,
    stage: Stage,
    is_tc: bool,
    plans: Vec<Option<Plan>>,
    story: Vec<Event>,
}

/// What has happened: told if it ends in a mismatch.
#[derive(Debug)]
enum Event {
    Applied(Vec<Service>),
    Waited(u32),
    Became(Hook, Packet, Box<Outcome>),
}

/// What flows have to live by for [`Case::aging`].
pub const SHORT: Timeouts = Timeouts { opening: 4, established: 12, closing: 4, datagram: 4 };

impl Case {
    /// Flows in every state, looked at after a time that only established ones outlive, and after a time that none does.
    /// Takes 24 seconds, with programs and a reference that are told to go by [`SHORT`].
    pub fn aging(is_tc: bool) -> Self {
        let flags = |syn, ack, fin, rst| Flags { syn, ack, fin, rst };
        let (syn, ack) = (flags(true, false, false, false), flags(false, true, false, false));
        let (syn_ack, fin, rst) =
            (flags(true, true, false, false), flags(false, true, true, false), flags(false, false, false, true));
        let [client, backend] = [Direction::Request, Direction::Reply];
        let established = [(backend, syn_ack), (client, ack), (backend, ack)];
        let and = |then: &[_]| [&established, then].concat();
        // Who says what after the client's first packet: over TCP, over UDP.
        let conversations = [
            (0, vec![]),
            (0, vec![(backend, syn_ack)]),
            (0, and(&[])),
            (0, and(&[(client, fin)])),
            (0, and(&[(client, fin), (backend, fin)])),
            (0, and(&[(backend, rst)])),
            (1, vec![]),
            (1, vec![(backend, ack)]),
        ];
        let asks: Vec<_> = [false, true]
            .into_iter()
            .flat_map(|is_ipv6| conversations.iter().enumerate().map(move |it| (is_ipv6, it)))
            .map(|(is_ipv6, (index, (port, said)))| {
                let at = Place { service: 0, which: Which::Cluster, is_ipv6 };
                let say = Say { flags: syn, ..Say::plain() };
                let (client, from) = (index % OUTSIDE, (index / OUTSIDE) as u16);
                (Ask { client, from, at, port: *port, is_apt: true, say, is_last_hop: false }, said)
            })
            .collect();
        let say = |flow, direction, flags| {
            let say = Say { flags, ..Say::plain() };
            match direction {
                Direction::Request => Step::Again { flow, say, is_last_hop: false },
                Direction::Reply => Step::Reply { flow, say, is_last_hop: false, is_seen_coming: true },
            }
        };
        let talk = asks.iter().flat_map(|(ask, said)| {
            [Step::Ask(ask.clone())].into_iter().chain(said.iter().map(|&(direction, flags)| say(0, direction, flags)))
        });
        // The backends' replies open nothing, and so they do not change which flow is the latest.
        let look = || (0..asks.len()).map(|flow| say(flow, backend, ack));
        let again = asks.iter().map(|(ask, _)| Step::Ask(ask.clone()));
        let steps = talk.chain([Step::Wait(8)]).chain(look()).chain([Step::Wait(16)]).chain(look()).chain(again);
        let plan = Plan {
            ports: vec![0, 1],
            has_external: false,
            has_load_balancer: false,
            has_node_ports: false,
            external_policy: Policy::Cluster,
            internal_policy: Policy::Cluster,
            admitted: BTreeSet::new(),
            has_affinity: false,
            algorithm: "random",
            endpoints: [(0, (1, Condition::Ready)), (3, (1, Condition::Ready))].into(),
        };
        Self { services: vec![plan], steps: steps.collect(), is_tc }
    }

    /// Plays the case to the programs; `reference` begins as a node without services.
    ///
    /// # Errors
    ///
    /// If a packet met another fate than it may: the whole story.
    pub fn play(&self, stage: Stage, reference: Reference, programs: &mut impl Programs) -> Result<(), String> {
        let plans = self.services.iter().cloned().map(Some).collect();
        let mut play = Play { programs, reference, stage, is_tc: self.is_tc, plans, story: Vec::new() };
        play.apply();
        self.steps.iter().try_for_each(|step| play.step(step))
    }
}

impl<P: Programs> Play<'_, P> {
    fn apply(&mut self) {
        let plans = self.plans.iter().enumerate();
        let services: Vec<_> =
            plans.filter_map(|(index, plan)| Some(self.stage.service(index, plan.as_ref()?))).collect();
        self.programs.apply(&services);
        if self.reference.apply(&services) {
            self.programs.reclaim();
        }
        self.story.push(Event::Applied(services));
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Ask(ask) => {
                let packet = self.asked(ask);
                self.send(client_hook(packet.source), &packet)
            }
            Step::Again { flow, say, is_last_hop } => self.of_flow(*flow, Direction::Request, say, *is_last_hop, true),
            Step::Reply { flow, say, is_last_hop, is_seen_coming } => {
                self.of_flow(*flow, Direction::Reply, say, *is_last_hop, *is_seen_coming)
            }
            Step::Pieces { of, order, identification, is_seen_coming } => {
                self.pieces(of, order, *identification, *is_seen_coming)
            }
            Step::Complain(complaint) => self.complain(complaint),
            Step::Ping { client, at } => {
                let (source, destination) = (self.stage.client(*client, at.is_ipv6), place(*at));
                let hook = client_hook(source);
                let body = Body::Echo { identifier: 1, sequence: 2, payload: b"echo".to_vec() };
                self.send(hook, &Packet { ethernet: frame(hook, source), source, destination, ttl: 64, body })
            }
            Step::Stray { which, is_ipv6 } => self.stray(*which, *is_ipv6),
            Step::Wait(seconds) => {
                self.programs.wait(*seconds);
                self.reference.wait(*seconds);
                self.story.push(Event::Waited(*seconds));
                Ok(())
            }
            Step::Change { service, change } => {
                self.change(*service, *change);
                Ok(())
            }
        }
    }

    fn change(&mut self, service: usize, change: Change) {
        let index = service % self.plans.len();
        let Some(plan) = &mut self.plans[index] else { return };
        match change {
            Change::Endpoint(endpoint, weight, condition) => {
                plan.endpoints.insert(endpoint, (weight, condition));
            }
            Change::NoEndpoint(endpoint) => {
                plan.endpoints.remove(&endpoint);
            }
            Change::External(policy) => plan.external_policy = policy,
            Change::Internal(policy) => plan.internal_policy = policy,
            Change::NoService => self.plans[index] = None,
        }
        self.apply();
    }

    /// Sends a packet to both; they have to agree.
    fn send(&mut self, hook: Hook, packet: &Packet) -> Result<(), String> {
        let Some(ran) = self.programs.run(hook, self.is_tc, packet) else { return Ok(()) };
        match self.reference.judge(hook, packet, &ran) {
            Ok(outcome) => {
                self.story.push(Event::Became(hook, packet.clone(), Box::new(outcome)));
                Ok(())
            }
            Err(allowed) => {
                let mut report = String::new();
                for event in &self.story {
                    let _ = writeln!(report, "{}", event.told(self.is_tc));
                }
                let _ = write!(report, "{}: {packet}\n    became {ran}", name(hook, self.is_tc));
                let _ = write!(report, "\n    {:02x?}", ran.packet);
                for outcome in allowed {
                    let _ = write!(report, "\n    instead of {}", explained(&outcome, packet, &ran));
                }
                Err(report)
            }
        }
    }

    /// Sends what a backend or someone near it sends, where it comes in and where it leaves.
    fn send_back(&mut self, way: Way, is_seen_coming: bool, from: IpAddr, packet: &Packet) -> Result<(), String> {
        let came_by = if is_on_node(from) {
            Hook::Pod
        } else if (0..2).any(|index| endpoint(index, from.is_ipv6()) == from) {
            Hook::Uplink(DOWNLINK)
        } else {
            Hook::Uplink(UPLINK)
        };
        if way != Way::Stack || is_seen_coming {
            self.send(came_by, &Packet { ethernet: frame(came_by, from), ..packet.clone() })?;
        }
        if way == Way::Stack {
            self.send(Hook::Egress, &Packet { ethernet: (UP_MAC, ROUTER_MAC), ..packet.clone() })?;
        }
        Ok(())
    }

    fn asked(&self, ask: &Ask) -> Packet {
        let Ask { client, from, at, port, is_apt, say, is_last_hop } = ask;
        let (at, port) = if *is_apt { self.apt(*at, *port) } else { (*at, *port) };
        let (protocol, number, _, node_port) = PORTS[port];
        let number = match (at.which, node_port) {
            (Which::Node(_), Some(node_port)) => node_port_of(at.service, node_port),
            _ => number,
        };
        let tuple = Tuple {
            protocol,
            source: SocketAddr::new(self.stage.client(*client, at.is_ipv6), self.stage.port(*from)),
            destination: SocketAddr::new(place(at), number),
        };
        // Whether a packet that gets no further ends a flow that it means to follow is nobody's concern.
        let is_last_hop = *is_last_hop && !self.reference.has_flow(&tuple);
        let hook = client_hook(tuple.source.ip());
        segment(frame(hook, tuple.source.ip()), &tuple, say, Direction::Request, is_last_hop)
    }

    /// An address and a port like these, but such as a service has that is there.
    fn apt(&self, at: Place, port: usize) -> (Place, usize) {
        let service = at.service % self.plans.len();
        let Some(plan) = &self.plans[service] else { return (at, port) };
        let has = match at.which {
            Which::Cluster => true,
            Which::External => plan.has_external,
            Which::LoadBalancer => plan.has_load_balancer,
            Which::Node(_) => plan.has_node_ports,
        };
        let which = if has { at.which } else { Which::Cluster };
        (Place { service, which, ..at }, plan.ports[port % plan.ports.len()])
    }

    fn flow(&self, index: usize) -> Option<Flow> {
        let flows = self.reference.flows();
        // From the last one back: the latest are of the most interest.
        flows.len().checked_sub(1).map(|last| flows[last - index % flows.len()].clone())
    }

    fn of_flow(
        &mut self,
        index: usize,
        direction: Direction,
        say: &Say,
        is_last_hop: bool,
        is_seen_coming: bool,
    ) -> Result<(), String> {
        let Some(flow) = self.flow(index) else { return Ok(()) };
        let (tuple, _) = flow.translation(direction);
        let client = tuple.source.ip();
        let ends = say.flags.fin || say.flags.rst || say.flags.syn;
        let is_last_hop = is_last_hop && !ends && tuple.protocol == Protocol::Tcp && self.reference.has_flow(&tuple);
        let hook = client_hook(client);
        let packet = segment(frame(hook, client), &tuple, say, direction, is_last_hop);
        match direction {
            Direction::Request => self.send(hook, &packet),
            Direction::Reply => self.send_back(flow.way, is_seen_coming, client, &packet),
        }
    }

    fn pieces(&mut self, of: &Whole, order: &[usize], identification: u16, is_seen_coming: bool) -> Result<(), String> {
        let say = Say { length: 40, ..Say::plain() };
        let (whole, way) = match of {
            Whole::Asked(ask) => (self.asked(&Ask { is_last_hop: false, say, ..ask.clone() }), None),
            Whole::Flow(index, direction) => {
                let Some(flow) = self.flow(*index) else { return Ok(()) };
                let (tuple, _) = flow.translation(*direction);
                let ethernet = frame(client_hook(tuple.source.ip()), tuple.source.ip());
                let way = (*direction == Direction::Reply).then_some(flow.way);
                (segment(ethernet, &tuple, &say, *direction, false), way)
            }
        };
        if whole.tuple().is_some_and(|tuple| tuple.protocol == Protocol::Sctp) {
            return Ok(());
        }
        let pieces = whole.pieces(self.stage.identification(identification), &[24, 40]);
        order.iter().try_for_each(|&index| match way {
            None => self.send(client_hook(whole.source), &pieces[index]),
            Some(way) => self.send_back(way, is_seen_coming, whole.source, &pieces[index]),
        })
    }

    fn complain(&mut self, complaint: &Complaint) -> Result<(), String> {
        let Some(flow) = self.flow(complaint.flow) else { return Ok(()) };
        // About what was sent, as it was sent on.
        let direction = if complaint.is_about_request { Direction::Request } else { Direction::Reply };
        let (_, sent) = flow.translation(direction);
        let say = Say { length: 30, ..Say::plain() };
        let quoted = Box::new(segment(([0; 6], [0; 6]), &sent, &say, direction, false));
        let is_ipv6 = sent.source.is_ipv6();
        let kinds = if is_ipv6 {
            [(1, 4), (2, 0), (3, 0), (4, 1), (100, 0)]
        } else {
            [(3, 3), (3, 4), (11, 0), (12, 0), (4, 0)]
        };
        let (kind, code) = kinds[complaint.kind];
        let rest = if complaint.kind == 1 { [0, 0, 5, 0] } else { [0; 4] };
        let length = complaint.length + if is_ipv6 { 40 } else { 20 };
        let receiver = sent.destination.ip();
        let router: IpAddr = if is_ipv6 {
            Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 1).into()
        } else {
            Ipv4Addr::new(198, 18, 9, 1).into()
        };
        let source = if complaint.is_by_router { router } else { receiver };
        let packet = Packet {
            ethernet: frame(client_hook(receiver), receiver),
            source,
            destination: sent.source.ip(),
            ttl: 64,
            body: Body::Error(Error { kind, code, rest, quoted, length }),
        };
        if complaint.is_about_request {
            self.send_back(flow.way, complaint.is_seen_coming, receiver, &packet)
        } else {
            self.send(client_hook(receiver), &packet)
        }
    }

    fn stray(&mut self, which: usize, is_ipv6: bool) -> Result<(), String> {
        let client = SocketAddr::new(self.stage.client(0, is_ipv6), self.stage.port(0));
        let elsewhere = SocketAddr::new(self.stage.client(1, is_ipv6), 80);
        let node = Place { service: 0, which: Which::Node(UPLINK), is_ipv6 };
        let node = SocketAddr::new(place(node), 22);
        let backend = SocketAddr::new(endpoint(0, is_ipv6), 8080);
        let (hook, source, destination) = [
            (Hook::Uplink(UPLINK), client, elsewhere),
            (Hook::Uplink(UPLINK), client, node),
            (Hook::Uplink(UPLINK), client, backend),
            (Hook::Uplink(DOWNLINK), backend, elsewhere),
            (Hook::Egress, backend, elsewhere),
            (Hook::Egress, node, client),
            (Hook::Own, node, client),
            (Hook::Own, node, backend),
        ][which];
        let protocol = [Protocol::Tcp, Protocol::Udp][which % 2];
        let tuple = Tuple { protocol, source, destination };
        self.send(hook, &segment(frame(hook, source.ip()), &tuple, &Say::plain(), Direction::Request, false))
    }
}

fn name(hook: Hook, is_tc: bool) -> &'static str {
    match (hook, is_tc) {
        (Hook::Uplink(UPLINK), false) => "xdp on the uplink",
        (Hook::Uplink(_), false) => "xdp on the downlink",
        (Hook::Uplink(UPLINK), true) => "tc ingress on the uplink",
        (Hook::Uplink(_), true) => "tc ingress on the downlink",
        (Hook::Pod, _) => "tc ingress from a pod",
        (Hook::Egress, _) => "tc egress",
        (Hook::Own, _) => "tc egress, from the node itself",
    }
}

impl Event {
    fn told(&self, is_tc: bool) -> String {
        match self {
            Self::Applied(services) => format!("services of node \"here\":\n{}", yaml(services, "here")),
            Self::Waited(seconds) => format!("{seconds} s later"),
            Self::Became(hook, packet, outcome) => {
                let mut told = format!("{}: {packet}\n    {outcome}", name(*hook, is_tc));
                if let Effect::Opens(flow) = &outcome.effect {
                    let (from, to) = (flow.reply.source, flow.reply.destination);
                    let _ = write!(told, "\n    opens a flow ({:?}), answered by {from} > {to}", flow.way);
                }
                told
            }
        }
    }
}

/// An outcome that was not met, and for an answer why.
fn explained(outcome: &Outcome, given: &Packet, ran: &Ran) -> String {
    match &outcome.fate {
        Fate::Answered(answer) => match answer.faults(given, &ran.packet) {
            Err(fault) => format!("{outcome} ({fault})"),
            Ok(()) => outcome.to_string(),
        },
        Fate::Handed(packet) | Fate::Sent(packet) => {
            format!("{outcome}\n    {:02x?}", packet.bytes())
        }
        _ => outcome.to_string(),
    }
}

/// The addresses of a frame that comes in by a hook from this sender.
fn frame(hook: Hook, from: IpAddr) -> ([u8; 6], [u8; 6]) {
    match hook {
        Hook::Uplink(UPLINK) => (ROUTER_MAC, UP_MAC),
        Hook::Uplink(_) => (backend_mac(last_byte(from)), DOWN_MAC),
        Hook::Pod => (pod_mac(last_byte(from)), POD_MAC),
        Hook::Egress | Hook::Own => (UP_MAC, ROUTER_MAC),
    }
}

impl Say {
    fn plain() -> Self {
        Self { flags: Flags { ack: true, ..Flags::default() }, has_checksum: true, length: 4 }
    }
}

/// A packet of a conversation in which both sides count right.
fn segment(ethernet: ([u8; 6], [u8; 6]), tuple: &Tuple, say: &Say, direction: Direction, is_last_hop: bool) -> Packet {
    let (ours, theirs) = if direction == Direction::Request { (1_000, 2_000) } else { (2_000, 1_000) };
    let header = match tuple.protocol {
        Protocol::Tcp => {
            let sequence = if say.flags.syn { ours - 1 } else { ours };
            Header::Tcp { flags: say.flags, sequence, acknowledgment: if say.flags.ack { theirs } else { 0 } }
        }
        Protocol::Udp => Header::Udp { has_checksum: say.has_checksum || tuple.source.is_ipv6() },
        Protocol::Sctp => {
            let init_ack = 2;
            let chunk = match (say.flags.syn, say.flags.ack) {
                (true, false) => SCTP_INIT,
                (true, true) => init_ack,
                (false, _) => 0,
            };
            Header::Sctp { chunk }
        }
    };
    let payload = if tuple.protocol == Protocol::Sctp { Vec::new() } else { (0..say.length as u8).collect() };
    Packet {
        ethernet,
        source: tuple.source.ip(),
        destination: tuple.destination.ip(),
        ttl: if is_last_hop { 1 } else { 64 },
        body: Body::Segment(Segment {
            source_port: tuple.source.port(),
            destination_port: tuple.destination.port(),
            header,
            payload,
            cut: None,
        }),
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let services = prop::collection::vec(plans(), 1..=3);
    let steps = prop::collection::vec(any_step(), 1..=24);
    (services, steps, any::<bool>()).prop_map(|(services, steps, is_tc)| Case { services, steps, is_tc })
}

fn plans() -> impl Strategy<Value = Plan> {
    let some = |least| prop::collection::btree_map(0..ENDPOINTS.len(), (weights(), conditions()), least..=4_usize);
    let endpoints = prop_oneof![1 => some(0), 3 => some(1)];
    let ports = subsequence((0..PORTS.len()).collect::<Vec<_>>(), 1..=3);
    let algorithms = select(&["random", "round-robin", "maglev", "source-hash", "least-connections"][..]);
    let admitted = prop_oneof![3 => Just(BTreeSet::new()), 1 => prop::collection::btree_set(0..CLIENTS, 1..=2)];
    let addresses = (any::<bool>(), any::<bool>(), any::<bool>());
    (ports, addresses, policies(), policies(), admitted, any::<bool>(), algorithms, endpoints).prop_map(
        |(ports, addresses, external_policy, internal_policy, admitted, has_affinity, algorithm, endpoints)| {
            let (has_external, has_load_balancer, has_node_ports) = addresses;
            Plan {
                ports,
                has_external,
                has_load_balancer,
                has_node_ports,
                external_policy,
                internal_policy,
                admitted,
                has_affinity,
                algorithm,
                endpoints,
            }
        },
    )
}

fn any_step() -> impl Strategy<Value = Step> {
    let flow = || 0..4_usize;
    let rarely = || prop::bool::weighted(0.1);
    let whole = prop_oneof![
        asks().prop_map(Whole::Asked),
        (flow(), select(&[Direction::Request, Direction::Reply][..])).prop_map(|(flow, way)| Whole::Flow(flow, way)),
    ];
    let complaints = (flow(), any::<bool>(), any::<bool>(), 0..5_usize, select(&[8_usize, 20, 100][..]), any::<bool>())
        .prop_map(|(flow, is_about_request, is_by_router, kind, length, is_seen_coming)| Complaint {
            flow,
            is_about_request,
            is_by_router,
            kind,
            length,
            is_seen_coming,
        });
    prop_oneof![
        6 => asks().prop_map(Step::Ask),
        4 => (flow(), says(), rarely()).prop_map(|(flow, say, is_last_hop)| Step::Again { flow, say, is_last_hop }),
        4 => (flow(), says(), rarely(), any::<bool>()).prop_map(|(flow, say, is_last_hop, is_seen_coming)| {
            Step::Reply { flow, say, is_last_hop, is_seen_coming }
        }),
        2 => (whole, prop::collection::vec(0..3_usize, 1..=4), 0..4_u16, any::<bool>()).prop_map(
            |(of, order, identification, is_seen_coming)| Step::Pieces { of, order, identification, is_seen_coming }
        ),
        2 => complaints.prop_map(Step::Complain),
        1 => (0..CLIENTS, places()).prop_map(|(client, at)| Step::Ping { client, at }),
        1 => (0..8_usize, any::<bool>()).prop_map(|(which, is_ipv6)| Step::Stray { which, is_ipv6 }),
        2 => (0..3_usize, changes()).prop_map(|(service, change)| Step::Change { service, change }),
    ]
}

fn asks() -> impl Strategy<Value = Ask> {
    let openings = prop_oneof![4 => Just(Flags { syn: true, ..Flags::default() }), 1 => flags()];
    let says = (openings, prop::bool::weighted(0.9), 0..9_usize).prop_map(|(flags, has_checksum, length)| Say {
        flags,
        has_checksum,
        length,
    });
    let last_hops = prop::bool::weighted(0.1);
    let apts = prop::bool::weighted(0.85);
    (0..CLIENTS, 0..CLIENT_PORTS as u16, places(), 0..PORTS.len(), apts, says, last_hops).prop_map(
        |(client, from, at, port, is_apt, say, is_last_hop)| Ask { client, from, at, port, is_apt, say, is_last_hop },
    )
}

fn places() -> impl Strategy<Value = Place> {
    let which = prop_oneof![
        3 => Just(Which::Cluster),
        1 => Just(Which::External),
        1 => Just(Which::LoadBalancer),
        1 => (0..3_usize).prop_map(Which::Node),
    ];
    (0..3_usize, which, any::<bool>()).prop_map(|(service, which, is_ipv6)| Place { service, which, is_ipv6 })
}

fn says() -> impl Strategy<Value = Say> {
    (flags(), prop::bool::weighted(0.9), 0..9_usize).prop_map(|(flags, has_checksum, length)| Say {
        flags,
        has_checksum,
        length,
    })
}

fn flags() -> impl Strategy<Value = Flags> {
    let none = Flags::default();
    let ack = Flags { ack: true, ..none };
    select(vec![
        ack,
        Flags { syn: true, ..none },
        Flags { syn: true, ..ack },
        Flags { fin: true, ..ack },
        Flags { rst: true, ..none },
        Flags { rst: true, ..ack },
    ])
}

fn weights() -> impl Strategy<Value = u16> {
    prop_oneof![4 => Just(1_u16), 1 => Just(2), 1 => Just(0)]
}

fn conditions() -> impl Strategy<Value = Condition> {
    use Condition::{NotReady, Ready, ServingTerminating, Terminating};
    prop_oneof![5 => Just(Ready), 1 => Just(NotReady), 2 => Just(ServingTerminating), 1 => Just(Terminating)]
}

fn policies() -> impl Strategy<Value = Policy> {
    prop_oneof![2 => Just(Policy::Cluster), 1 => Just(Policy::Local)]
}

fn changes() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (0..ENDPOINTS.len(), weights(), conditions()).prop_map(|(it, weight, condition)| Change::Endpoint(it, weight, condition)),
        3 => (0..ENDPOINTS.len()).prop_map(Change::NoEndpoint),
        1 => policies().prop_map(Change::External),
        1 => policies().prop_map(Change::Internal),
        1 => Just(Change::NoService),
    ]
}
