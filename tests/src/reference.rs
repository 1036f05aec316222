//! What has to become of packets, as a model: written from the rules of service semantics and not from the programs,
//! in the plainest way that there is, so that it can be checked by reading.
//!
//! The rules are kube-proxy's (Kubernetes, `pkg/proxy`) for services, RFC 5508 for ICMP errors, RFC 9293 for refusals.
//! Where they leave a choice, of the backend or of a source port, the model says what may be chosen, and learns
//! from what was.
//!
//! ```
//! # use tests::reference::{Hook, Ran, Action, Reference, Settings, packet::Packet};
//! # fn judge(reference: &mut Reference, packet: &Packet, ran: &Ran) {
//! match reference.judge(Hook::Uplink(0), packet, ran) {
//!     Ok(outcome) => println!("{outcome}"),
//!     Err(allowed) => allowed.iter().for_each(|outcome| println!("rather than {ran}: {outcome}")),
//! }
//! # }
//! ```

pub mod outcome;
pub mod packet;
pub mod sequence;
pub mod service;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

pub use outcome::{Action, Answer, Choice, Effect, Fate, Outcome, Ran};
pub use packet::{Protocol, Tuple};

use packet::{Body, Ethernet, Flags, LaterPiece, Packet, Segment};
use service::{Backend, Eligible, Endpoint, Frontend, Policy, Service};

/// Where a packet is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Where it comes in by this one of the node's links.
    Uplink(usize),
    /// Where it comes in from a pod of this node.
    Pod,
    /// Where it leaves, by any interface, after it came in by another.
    Egress,
    /// Where it leaves, by any interface: a process of the node has sent it.
    Own,
}

/// An interface of the node towards others.
#[derive(Clone, Debug)]
pub struct Link {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Its address of each family.
    pub addresses: Vec<IpAddr>,
    /// Who is reached by it, and under which Ethernet address.
    pub neighbours: Vec<(Reach, [u8; 6])>,
}

/// Whom a neighbour leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Itself alone.
    Host(IpAddr),
    /// All that nobody else leads to.
    Everyone,
}

/// The node and how the programs are set up on it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The links towards others.
    pub links: Vec<Link>,
    /// Source ports for flows whose client's port is taken.
    pub snat_ports: RangeInclusive<u16>,
    /// Whether echo requests to services are answered.
    pub answers_echo: bool,
    /// For how long each direction of a flow lasts.
    pub timeouts: Timeouts,
}

/// How long, in seconds, a direction of a flow lasts without a packet.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// TCP and SCTP: nothing but the opening went this way.
    pub opening: u32,
    /// More did.
    pub established: u32,
    /// The sender is done, or the flow was reset.
    pub closing: u32,
    /// UDP.
    pub datagram: u32,
}

/// A flow.
#[derive(Clone, Debug)]
pub struct Flow {
    /// What the client sends: from itself to a frontend.
    pub request: Tuple,
    /// What the backend sends: from itself to whom it takes for the client.
    pub reply: Tuple,
    /// Who takes its packets to where they go.
    pub way: Way,
    backend: Backend,
    /// Whether the backend has left its service since.
    is_orphaned: bool,
    /// Whether there is no more of it.
    is_gone: bool,
    sides: [Side; 2],
}

/// Who takes a flow's packets to where they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// We do.
    Forwarded,
    /// The stack does: the backend or the client is on this node.
    Stack,
    /// We do, back to where they come from: the backend is the client.
    Hairpin,
    /// We send requests of the node itself, as they are, and the stack takes the replies.
    Own,
}

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the backend.
    Request = 0,
    /// To the client.
    Reply = 1,
}

/// One direction of a flow.
#[derive(Clone, Copy, Debug)]
struct Side {
    state: State,
    last_used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Opening,
    Established,
    Closing,
    Datagram,
}

/// Where a client's last flow to a port of a service went.
#[derive(Clone, Debug)]
struct Remembered {
    backend: Backend,
    /// Whether it has taken new flows ever since, and no other one was chosen for a flow that was not opened then. If not, it may be
    /// forgotten.
    is_firm: bool,
    last_used: u64,
}

/// The model: what is there, and what has happened so far.
#[derive(Clone, Debug)]
pub struct Reference {
    settings: Settings,
    services: Vec<Service>,
    frontends: BTreeMap<(Protocol, SocketAddr), Frontend>,
    vips: BTreeMap<IpAddr, bool>,
    /// All that ever were.
    flows: Vec<Flow>,
    /// First fragments, by addresses, protocol and identification.
    firsts: BTreeMap<(IpAddr, IpAddr, Protocol, u16), First>,
    /// By client, and by service as backends know it.
    remembered: BTreeMap<(IpAddr, (String, Protocol, u16)), Remembered>,
    /// In seconds.
    now: u64,
}

impl Settings {
    /// All addresses of the node.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.links.iter().flat_map(|link| link.addresses.iter().copied()).collect()
    }

    /// By which link an address is reached, and the frame's addresses there.
    fn way_to(&self, address: IpAddr) -> Option<(usize, Ethernet)> {
        let by = |reach: Reach| {
            let mut links = self.links.iter().enumerate();
            links.find_map(|(index, link)| {
                let neighbour = link.neighbours.iter().find(|(it, _)| *it == reach)?;
                Some((index, (link.mac, neighbour.1)))
            })
        };
        by(Reach::Host(address)).or_else(|| by(Reach::Everyone))
    }
}

impl Flow {
    /// What packets of a direction come in as, and what they leave as.
    pub const fn translation(&self, direction: Direction) -> (Tuple, Tuple) {
        match direction {
            Direction::Request => (self.request, self.reply.reversed()),
            Direction::Reply => (self.reply, self.request.reversed()),
        }
    }

    /// Whether packets still find it.
    pub const fn is_gone(&self) -> bool {
        self.is_gone
    }

    fn is_orphaned_datagrams(&self) -> bool {
        self.is_orphaned && self.request.protocol == Protocol::Udp
    }

    /// Whether this packet is not of this flow any more: the client begins again what either end has ended, or what has lost
    /// its backend; and UDP, which has no end of its own, is over with its backend.
    fn is_left_by(&self, direction: Direction, segment: &Segment) -> bool {
        let has_ended = self.sides.iter().any(|side| side.state == State::Closing);
        let begins_again = direction == Direction::Request && segment.opens();
        self.is_orphaned_datagrams() || begins_again && (has_ended || self.is_orphaned)
    }

    fn carry(&mut self, direction: Direction, segment: &Segment, now: u64) {
        let Flags { syn, fin, rst, .. } = segment.flags();
        let side = &mut self.sides[direction as usize];
        side.last_used = now;
        side.state = match side.state {
            State::Opening | State::Established if fin || rst => State::Closing,
            State::Opening if syn || segment.opens() => State::Opening,
            State::Opening | State::Established => State::Established,
            over => over,
        };
        if rst {
            // Nobody answers a RST: it ends the other direction as well.
            self.sides.iter_mut().for_each(|side| side.state = State::Closing);
        }
    }
}

impl Timeouts {
    fn of(&self, state: State) -> u64 {
        let seconds = match state {
            State::Opening => self.opening,
            State::Established => self.established,
            State::Closing => self.closing,
            State::Datagram => self.datagram,
        };
        seconds.into()
    }
}

impl Reference {
    /// A node without services.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            services: Vec::new(),
            frontends: BTreeMap::new(),
            vips: BTreeMap::new(),
            flows: Vec::new(),
            firsts: BTreeMap::new(),
            remembered: BTreeMap::new(),
            now: 0,
        }
    }

    /// Every flow that ever was, in the order of their opening.
    pub fn flows(&self) -> &[Flow] {
        &self.flows
    }

    /// The node.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where clients send to.
    pub fn frontends(&self) -> &BTreeMap<(Protocol, SocketAddr), Frontend> {
        &self.frontends
    }

    /// Whether packets of this tuple are a flow's.
    pub fn has_flow(&self, tuple: &Tuple) -> bool {
        self.find(tuple).is_some()
    }

    /// Lets time pass.
    pub fn wait(&mut self, seconds: u32) {
        self.now += u64::from(seconds);
        let Self { flows, settings, now, .. } = self;
        for flow in flows {
            flow.is_gone |= flow.sides.iter().all(|side| *now - side.last_used > settings.timeouts.of(side.state));
        }
    }

    /// From now on there are these services. Says whether a flow or a client has lost its backend by that.
    pub fn apply(&mut self, services: &[Service]) -> bool {
        self.services = services.to_vec();
        self.frontends = service::frontends(services, &self.settings.addresses());
        self.vips = service::vips(services);
        let present: BTreeSet<_> = service::backends(services).collect();
        let is_lost = |backend: &Backend| !present.contains(backend);
        let has_lost = self.flows.iter().any(|flow| !flow.is_orphaned && is_lost(&flow.backend))
            || self.remembered.values().any(|it| is_lost(&it.backend));
        for flow in &mut self.flows {
            flow.is_orphaned |= is_lost(&flow.backend);
        }
        self.remembered.retain(|_, it| !is_lost(&it.backend));
        let takers = self.takers();
        for it in self.remembered.values_mut() {
            it.is_firm &= takers.contains(&it.backend);
        }
        has_lost
    }

    /// Says whether this may become of a packet, and learns from it.
    ///
    /// # Errors
    ///
    /// All that might have become of it instead.
    pub fn judge(&mut self, hook: Hook, packet: &Packet, ran: &Ran) -> Result<Outcome, Vec<Outcome>> {
        let allowed = self.expect(hook, packet);
        let Some(outcome) = allowed.iter().find_map(|outcome| outcome.confirmed(packet, ran)) else {
            return Err(allowed);
        };
        self.learn(packet, &outcome);
        Ok(outcome)
    }

    /// All that may become of a packet. One of them has to be learned before the next packet comes.
    pub fn expect(&mut self, hook: Hook, packet: &Packet) -> Vec<Outcome> {
        match &packet.body {
            Body::Segment(segment) => self.segment(hook, packet, segment),
            Body::LaterPiece(piece) => self.later_piece(hook, packet, piece),
            Body::Error(error) => self.error(hook, packet, error),
            Body::Echo { .. } => vec![self.echo(hook, packet)],
        }
    }

    /// Remembers what has become of a packet.
    pub fn learn(&mut self, packet: &Packet, outcome: &Outcome) {
        if let Body::Segment(segment) = &packet.body
            && let Some(cut) = segment.cut
        {
            let key = (packet.source, packet.destination, segment.protocol(), cut.identification);
            let (source_port, destination_port) = (segment.source_port, segment.destination_port);
            let has_way = matches!(outcome.effect, Effect::Opens(_) | Effect::Carries(_));
            self.firsts.insert(key, First { source_port, destination_port, has_way });
        }
        match &outcome.effect {
            Effect::Nothing => {}
            Effect::Opens(flow) => self.open((**flow).clone()),
            Effect::Tries(service) => {
                self.remembered.entry((packet.source, service.clone())).and_modify(|it| it.is_firm = false);
            }
            Effect::Carries(index) => {
                if let (Body::Segment(segment), Some(tuple)) = (&packet.body, packet.tuple()) {
                    let flow = &mut self.flows[*index];
                    let direction = if tuple == flow.request { Direction::Request } else { Direction::Reply };
                    flow.carry(direction, segment, self.now);
                }
            }
        }
    }

    fn open(&mut self, flow: Flow) {
        // A flow without its backend may have held the tuple until now.
        for other in &mut self.flows {
            other.is_gone |= other.reply == flow.reply;
        }
        let service = flow.backend.service.clone();
        let has_affinity = self.services.iter().any(|it| it.name == service.0 && it.affinity.is_some());
        if has_affinity {
            let remembered = Remembered { backend: flow.backend.clone(), is_firm: true, last_used: self.now };
            self.remembered.insert((flow.request.source.ip(), service), remembered);
        }
        self.flows.push(flow);
    }

    /// A transport packet: of a flow, or one that may open one.
    fn segment(&mut self, hook: Hook, packet: &Packet, segment: &Segment) -> Vec<Outcome> {
        let Some(tuple) = packet.tuple() else { return Vec::new() };
        match self.find(&tuple) {
            Some((index, direction)) if self.flows[index].is_left_by(direction, segment) => {
                self.flows[index].is_gone = true;
                self.newcomer(hook, packet, segment, &tuple)
            }
            Some((index, direction)) => vec![self.underway(hook, packet, index, direction)],
            None => self.newcomer(hook, packet, segment, &tuple),
        }
    }

    /// A packet of a known flow, whole or a piece, or an error about one.
    fn underway(&self, hook: Hook, packet: &Packet, index: usize, direction: Direction) -> Outcome {
        let flow = &self.flows[index];
        let (from, to) = flow.translation(direction);
        let translated = packet.translated(&from, &to);
        let outcome = match (flow.way, direction, hook) {
            (Way::Forwarded | Way::Hairpin, Direction::Request, _) if packet.ttl <= 1 => {
                Outcome::untouched("ttl-expired")
            }
            (Way::Forwarded | Way::Hairpin, Direction::Reply, _) if packet.ttl <= 1 => {
                Outcome::dropped("reply-ttl-expired")
            }
            (Way::Forwarded, ..) | (Way::Own, Direction::Request, Hook::Own) => self.sent(hook, translated),
            (Way::Hairpin, ..) => returned(translated),
            (Way::Stack, Direction::Request, _) => Outcome::new("request-on-node", Fate::Handed(translated)),
            (Way::Own, Direction::Reply, Hook::Pod | Hook::Own) => {
                let ethernet = (translated.ethernet.0, [0; 6]);
                Outcome::new("own", Fate::Sent(translated.framed(ethernet)))
            }
            (Way::Stack, Direction::Reply, Hook::Egress | Hook::Own) | (Way::Own, Direction::Reply, _) => {
                Outcome::new("reply-on-node", Fate::Handed(translated))
            }
            (Way::Stack, Direction::Reply, _) => Outcome::untouched("reply-underway"),
            (Way::Own, Direction::Request, _) => Outcome::untouched("not-service"),
        };
        outcome.with(Effect::Carries(index))
    }

    /// A packet that is sent on to where it is addressed. The node is no hop for what it sends itself.
    fn sent(&self, hook: Hook, packet: Packet) -> Outcome {
        let Some((link, ethernet)) = self.settings.way_to(packet.destination) else {
            return Outcome::dropped("not-forwarded");
        };
        match hook {
            Hook::Own => Outcome::new("own", Fate::Sent(packet.framed(ethernet))),
            Hook::Uplink(from) if from == link => Outcome::new("tx", Fate::Sent(packet.forwarded(ethernet))),
            _ => Outcome::new("redirect", Fate::Sent(packet.forwarded(ethernet))),
        }
    }

    /// A transport packet of no flow.
    fn newcomer(&self, hook: Hook, packet: &Packet, segment: &Segment, tuple: &Tuple) -> Vec<Outcome> {
        if hook == Hook::Egress {
            return vec![Outcome::untouched("not-service")];
        }
        let is_client_on_node = matches!(hook, Hook::Pod | Hook::Own);
        let Some(frontend) = self.frontends.get(&tuple.frontend()) else {
            return if self.vips.get(&packet.destination) == Some(&true) {
                vec![refusal(segment, "refused-wrong-port", "wrong-port")]
            } else {
                vec![Outcome::untouched("not-service")]
            };
        };
        let service = &self.services[frontend.service];
        if !frontend.is_open_to_all(is_client_on_node) && !service.admits(packet.source) {
            return vec![Outcome::dropped("source-not-allowed")];
        }
        if self.vips.get(&packet.source) == Some(&true) {
            return vec![Outcome::dropped("source-is-service")];
        }
        let policy = service.policy(frontend.kind, is_client_on_node);
        // The node may have begun it, from a port that is a NodePort as well, or to another machine that has the address, too.
        let may_be_anothers = self.vips.get(&packet.destination).is_none_or(|refuses| hook == Hook::Own && !refuses);
        let unknown = if may_be_anothers { Outcome::untouched("not-service") } else { Outcome::dropped("no-flow") };
        let refused = match service.eligible(packet.source.is_ipv4(), policy) {
            Eligible::Some(_) if !segment.opens() => return vec![unknown],
            Eligible::Some(endpoints) => {
                let endpoints = self.preferred(frontend, packet.source, endpoints);
                let opening = |endpoint: &&Endpoint| self.opening(hook, packet, tuple, frontend, endpoint);
                let port = &service.ports[frontend.port];
                let tried = |outcome: Outcome| match outcome.effect {
                    Effect::Nothing => outcome.with(Effect::Tries((service.name.clone(), port.protocol, port.port))),
                    _ => outcome,
                };
                return endpoints.iter().flat_map(opening).map(tried).collect();
            }
            Eligible::Elsewhere => Outcome::dropped("no-local-endpoints"),
            Eligible::None => refusal(segment, "refused-no-backend", "no-backend"),
        };
        // No rule says what comes first where two hold: for a packet in the middle of no connection, or on its last hop.
        let unknown = (!segment.opens()).then_some(unknown);
        let expired = (packet.ttl <= 1).then(|| Outcome::untouched("ttl-expired"));
        [refused].into_iter().chain(unknown).chain(expired).collect()
    }

    /// Of the endpoints that may take a client's new flow the one that took its last, where the service wants that.
    fn preferred<'a>(&self, frontend: &Frontend, client: IpAddr, endpoints: Vec<&'a Endpoint>) -> Vec<&'a Endpoint> {
        let service = &self.services[frontend.service];
        let port = &service.ports[frontend.port];
        let backend_of = |endpoint: &Endpoint| service.backend(port, endpoint.address);
        let key = (client, (service.name.clone(), port.protocol, port.port));
        let remembered = self.remembered.get(&key).filter(|it| {
            let age = self.now - it.last_used;
            it.is_firm && service.affinity.is_some_and(|seconds| age <= u64::from(seconds))
        });
        match endpoints.iter().find(|it| remembered.is_some_and(|last| last.backend == backend_of(it))) {
            Some(&last) => vec![last],
            None => endpoints,
        }
    }

    /// What becomes of a packet that opens a flow to an endpoint.
    fn opening(&self, hook: Hook, packet: &Packet, tuple: &Tuple, to: &Frontend, endpoint: &Endpoint) -> Vec<Outcome> {
        let service = &self.services[to.service];
        let backend = service.backend(&service.ports[to.port], endpoint.address);
        let way = match hook {
            Hook::Pod if endpoint.address == packet.source => Way::Hairpin,
            Hook::Pod => Way::Stack,
            Hook::Own => Way::Own,
            _ if endpoint.is_on_node => Way::Stack,
            _ => Way::Forwarded,
        };
        if matches!(way, Way::Forwarded | Way::Hairpin) && packet.ttl <= 1 {
            return vec![Outcome::untouched("ttl-expired")];
        }
        self.sources(way, packet.source, endpoint.address)
            .into_iter()
            .flat_map(|source| {
                let destination = SocketAddr::new(source, tuple.source.port());
                let reply = Tuple { protocol: tuple.protocol, source: backend.address, destination };
                let state = if tuple.protocol == Protocol::Udp { State::Datagram } else { State::Opening };
                let sides = [Side { state, last_used: self.now }; 2];
                let backend = backend.clone();
                let flow = Flow { request: *tuple, reply, way, backend, is_orphaned: false, is_gone: false, sides };
                self.claiming(hook, packet, &flow)
            })
            .collect()
    }

    /// The addresses that a backend may see as its client's.
    fn sources(&self, way: Way, client: IpAddr, backend: IpAddr) -> Vec<IpAddr> {
        let mut ours = match way {
            Way::Stack => return vec![client],
            Way::Hairpin | Way::Own => self.settings.addresses(),
            Way::Forwarded => match self.settings.way_to(backend) {
                Some((link, _)) => self.settings.links[link].addresses.clone(),
                None => Vec::new(),
            },
        };
        ours.retain(|address| address.is_ipv4() == client.is_ipv4());
        ours
    }

    /// What becomes of a packet that opens this flow: it keeps its port where the replies' tuple is free, and else gets another, as
    /// the node's own always do: the port is one that the node's connections take. SCTP's can't be changed: its checksum is of the whole
    /// packet.
    fn claiming(&self, hook: Hook, packet: &Packet, flow: &Flow) -> Vec<Outcome> {
        let (from, to) = flow.translation(Direction::Request);
        let translated = packet.translated(&from, &to);
        let outcome = match flow.way {
            Way::Forwarded | Way::Own => self.sent(hook, translated),
            Way::Hairpin => returned(translated),
            Way::Stack => Outcome::new("request-on-node", Fate::Handed(translated)),
        };
        let outcome = outcome.with(Effect::Opens(Box::new(flow.clone())));
        let is_sctp = flow.request.protocol == Protocol::Sctp;
        let keeps_port = flow.way != Way::Own || is_sctp;
        // By the client's own port both directions may look alike.
        let is_taken = |for_sure| flow.reply == flow.request || self.is_taken(&flow.reply, for_sure);
        let mut allowed = Vec::new();
        if keeps_port && !is_taken(true) {
            allowed.push(outcome.clone());
        }
        if !keeps_port || is_taken(false) {
            if is_sctp {
                allowed.push(Outcome::dropped("snat-ports-exhausted"));
            } else {
                let range = self.settings.snat_ports.clone();
                let at = |port| Tuple { destination: SocketAddr::new(flow.reply.destination.ip(), port), ..flow.reply };
                let taken = range.clone().filter(|&port| self.is_taken(&at(port), true)).collect();
                allowed.push(Outcome { source_port: Some(Choice { range, taken }), ..outcome });
            }
        }
        allowed
    }

    /// Whether packets of this tuple are a flow's; `for_sure`, for it may be that of a flow that has lost its backend.
    fn is_taken(&self, tuple: &Tuple, for_sure: bool) -> bool {
        self.find(tuple).is_some_and(|(index, _)| !for_sure || !self.flows[index].is_orphaned_datagrams())
    }

    fn find(&self, tuple: &Tuple) -> Option<(usize, Direction)> {
        let present = || self.flows.iter().enumerate().filter(|(_, flow)| !flow.is_gone);
        let request = present().find(|(_, flow)| flow.request == *tuple);
        let reply = present().find(|(_, flow)| flow.reply == *tuple);
        request.map(|(index, _)| (index, Direction::Request)).or(reply.map(|(index, _)| (index, Direction::Reply)))
    }

    /// A fragment that is not the first goes where that went, or nowhere.
    fn later_piece(&self, hook: Hook, packet: &Packet, piece: &LaterPiece) -> Vec<Outcome> {
        let key = (packet.source, packet.destination, piece.protocol, piece.identification);
        let is_vip = self.is_to_vip(hook, packet);
        let Some(&First { source_port, destination_port, has_way }) = self.firsts.get(&key) else {
            return vec![if is_vip { Outcome::dropped("fragment-lost") } else { Outcome::untouched("fragment") }];
        };
        let tuple = Tuple {
            protocol: piece.protocol,
            source: SocketAddr::new(packet.source, source_port),
            destination: SocketAddr::new(packet.destination, destination_port),
        };
        let followed = self.find(&tuple).map(|(index, direction)| {
            let outcome = self.underway(hook, packet, index, direction).with(Effect::Nothing);
            (outcome, !has_way || self.flows[index].is_orphaned_datagrams())
        });
        match followed {
            Some((outcome, false)) => vec![outcome],
            // The first was not taken to a backend, or is not any more: no reason is better than another.
            Some((outcome, true)) => lost(is_vip).chain([outcome]).collect(),
            None => lost(is_vip).collect(),
        }
    }

    /// An error about a packet goes to who sent that.
    fn error(&self, hook: Hook, packet: &Packet, error: &packet::Error) -> Vec<Outcome> {
        let about = error.quoted.tuple().filter(|_| error.is_of_flows());
        let Some((index, direction)) = about.and_then(|tuple| self.find(&tuple.reversed())) else {
            return vec![self.unrelated(hook, packet)];
        };
        let outcome = self.underway(hook, packet, index, direction).with(Effect::Nothing);
        if self.flows[index].is_orphaned_datagrams() {
            return vec![outcome, self.unrelated(hook, packet)];
        }
        vec![outcome]
    }

    /// An ICMP message that is about no flow: at an address that is a service's alone nobody waits for it.
    fn unrelated(&self, hook: Hook, packet: &Packet) -> Outcome {
        if self.is_to_vip(hook, packet) { Outcome::dropped("icmp-lost") } else { Outcome::untouched("other-icmp") }
    }

    fn echo(&self, hook: Hook, packet: &Packet) -> Outcome {
        match (self.is_to_vip(hook, packet), self.settings.answers_echo) {
            (false, _) => Outcome::untouched("other-icmp"),
            (true, true) => Outcome::new("answered-echo", Fate::Answered(Answer::Echo)),
            (true, false) => Outcome::dropped("echo-refused"),
        }
    }

    /// Whether a packet is to an address that is a service's alone. To the node itself it may be another machine's, unless it is one
    /// of the cluster.
    fn is_to_vip(&self, hook: Hook, packet: &Packet) -> bool {
        match (hook, self.vips.get(&packet.destination)) {
            (_, None) | (Hook::Egress, _) => false,
            (Hook::Own, Some(is_of_cluster)) => *is_of_cluster,
            (_, Some(_)) => true,
        }
    }

    /// The backends that take new flows by any policy.
    fn takers(&self) -> BTreeSet<Backend> {
        let mut takers = BTreeSet::new();
        for service in &self.services {
            for (is_ipv4, policy) in
                [(true, Policy::Cluster), (true, Policy::Local), (false, Policy::Cluster), (false, Policy::Local)]
            {
                if let Eligible::Some(endpoints) = service.eligible(is_ipv4, policy) {
                    let backends = endpoints
                        .iter()
                        .flat_map(|it| service.ports.iter().map(|port| service.backend(port, it.address)));
                    takers.extend(backends);
                }
            }
        }
        takers
    }
}

/// A packet that is sent back to whom it came from.
fn returned(packet: Packet) -> Outcome {
    let (theirs, ours) = packet.ethernet;
    Outcome::new("tx", Fate::Sent(packet.forwarded((ours, theirs))))
}

/// A refusal, which its sender is told of, unless it is a RST.
fn refusal(segment: &Segment, told: &'static str, untold: &'static str) -> Outcome {
    match segment.protocol() {
        Protocol::Tcp if segment.flags().rst => Outcome::dropped(untold),
        Protocol::Tcp => Outcome::new(told, Fate::Answered(Answer::Reset)),
        Protocol::Udp | Protocol::Sctp => Outcome::new(told, Fate::Answered(Answer::Unreachable)),
    }
}

/// What a first fragment says, and what became of it.
#[derive(Clone, Copy, Debug)]
struct First {
    source_port: u16,
    destination_port: u16,
    /// Whether it was a flow's: what was refused or dropped may be forgotten, also where a flow of its tuple opens after it.
    has_way: bool,
}

/// What may become of a fragment whose first has no flow: it is never answered, and never sent on.
fn lost(is_vip: bool) -> impl Iterator<Item = Outcome> {
    let dropped = ["fragment-lost", "no-flow", "no-backend", "no-local-endpoints", "source-not-allowed", "wrong-port"];
    let passed = ["fragment", "not-service"].into_iter().filter(move |_| !is_vip);
    dropped.into_iter().map(Outcome::dropped).chain(passed.map(Outcome::untouched))
}
