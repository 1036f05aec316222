//! The structs that live in the kernel's maps. Addresses and ports are in network order, all else in host order.

use crate::{
    checksum::Delta,
    flow::{Direction, State, Tick, Timeouts},
    net::{Address, IfIndex, IpProto, Ipv4Be, Ipv6Be, MacAddr, Port, halves, whole},
};

abi! {
    /// Key of `SERVICES4` and `SERVICES6`: a frontend.
    pub struct ServiceKey<A> where Ipv4Be => 8, Ipv6Be => 24 {
        /// The address that clients send to.
        pub address: A,
        /// The port that clients send to.
        pub port: Port,
        /// TCP, UDP or SCTP; one port number may be a service of each.
        pub proto: IpProto,
        /// Zero.
        pub _pad: A::Padding,
    }
}

abi! {
    /// Value of `SERVICES4` and `SERVICES6`: whose frontend it is, and what holds for it.
    pub struct Frontend where 8 {
        /// The id of the service, an index of `SERVICE`.
        pub service: u32,
        /// [`Frontend::LOCAL_POLICY`] and the others, combined.
        pub flags: u32,
    }
}

abi! {
    /// Key of `VIPS4` and `VIPS6`: an address that is a service's alone, and none of this host's.
    pub struct VipKey<A> where Ipv4Be => 4, Ipv6Be => 16 {
        /// The address.
        pub address: A,
    }
}

abi! {
    /// The data of a key of `SOURCES`, after the prefix length in bits that the kernel demands: 32 bits of service id,
    /// then an address or the beginning of one.
    pub struct SourceKey where 20 {
        /// The id of the service.
        pub service: u32,
        /// The client's address, as [`Address::to_words`] gives it, in halves: the struct is read unaligned.
        pub address: [u32; 4],
    }
}

abi! {
    /// Value of `SERVICE`, at a service's id.
    pub struct Service where 40 {
        /// The range of `TABLE` with the backends of policy Cluster, as [`TableRange::to_word`] packs it: changed by
        /// one aligned 8-byte store.
        pub cluster: u64,
        /// The same with the backends of policy Local: those on this node. Empty where no frontend has that policy.
        pub local: u64,
        /// How many picks round robin has made; the only field that the kernel writes.
        pub cursor: u64,
        /// A hash of the service's name, by which an agent that starts again knows it; zero: nobody has the id.
        pub name: u64,
        /// For how many seconds a client's new flows go where its last one went; zero: no session affinity.
        pub affinity: u32,
        /// A [`crate::select::Algorithm`].
        pub algorithm: u8,
        /// Zero.
        pub _pad: [u8; 3],
    }
}

abi! {
    /// Value of `TABLE`: one slot of a service's backend set.
    pub struct Slot where 8 {
        /// The id of the backend, an index of `BACKENDS`.
        pub backend: u32,
        /// Zero.
        pub _pad: u32,
    }
}

abi! {
    /// Value of `BACKENDS`, at a backend's id. A backend belongs to one service.
    pub struct Backend where 48 {
        /// How many flows were opened to it; the kernel writes it.
        pub flows: u64,
        /// How many answered flows it has now, for least-connections; the kernel counts, the agent corrects what was evicted.
        pub active: u64,
        /// The address, as [`Address::to_words`] gives it.
        pub address: [u64; 2],
        /// Raised when the id is freed: a flow that remembers another generation has lost its backend.
        pub generation: u32,
        /// The port that the backend listens on.
        pub port: Port,
        /// [`Backend::ON_NODE`] and the others, combined.
        pub flags: u16,
        /// Its share of new flows; zero: none.
        pub weight: u16,
        /// How often it was taken out of those that take new flows, and stayed; it wraps.
        pub withdrawals: u16,
        /// The id of its service.
        pub service: u32,
    }
}

abi! {
    /// Key of `AFFINITY`: a client of a service.
    pub struct AffinityKey where 24 {
        /// The client's address, as [`Address::to_words`] gives it.
        pub client: [u64; 2],
        /// The id of the service.
        pub service: u32,
        /// Zero.
        pub _pad: u32,
    }
}

abi! {
    /// Value of `AFFINITY`: where the client's last flow went.
    pub struct Affinity where 16 {
        /// The id of the backend.
        pub backend: u32,
        /// What [`Backend::standing`] was when it was chosen.
        pub standing: u32,
        /// When the last flow was opened, in [`crate::flow::Tick`]s.
        pub last_used: u32,
        /// The id of the service, again: the memory of an evicted entry may have become another one's while it is read.
        pub service: u32,
    }
}

abi! {
    /// Value of `CONNECTED`, `PEERS` and `WATCHED`, and a part of that of `DATAGRAMS`: what a socket named, and what it got in its place.
    pub struct Translation where 56 {
        /// The service's address, as [`Address::to_words`] gives it.
        pub service_address: [u64; 2],
        /// The backend's address, likewise.
        pub backend_address: [u64; 2],
        /// The service's port.
        pub service_port: Port,
        /// The backend's port.
        pub backend_port: Port,
        /// The id of the backend.
        pub backend: u32,
        /// The generation of the backend when it was chosen.
        pub generation: u32,
        /// When the socket last sent by it, in [`crate::flow::Tick`]s.
        pub last_used: u32,
        /// In `DATAGRAMS`: the turn in which the socket last sent by it; zero: none.
        pub turn: u32,
        /// The number of the IP family: 4 or 6.
        pub family: u32,
    }
}

abi! {
    /// Value of `DATAGRAMS`: where a socket that is not connected sends its datagrams, and so whom answers come from.
    pub struct Datagrams where 456 {
        /// The services that it sent to last, each with its backend.
        pub translations: [Translation; DATAGRAM_SERVICES],
        /// How many datagrams it has sent to services.
        pub turn: u32,
        /// Zero.
        pub _pad: u32,
    }
}

abi! {
    /// Key of `FRAGMENTS4` and `FRAGMENTS6`: a datagram that comes in pieces (RFC 791, RFC 8200 section 4.5).
    pub struct FragmentKey<A> where Ipv4Be => 16, Ipv6Be => 40 {
        /// The sender.
        pub source: A,
        /// The receiver.
        pub destination: A,
        /// What its fragments have in common, as it stands in the header.
        pub identification: u32,
        /// TCP, UDP or SCTP.
        pub proto: IpProto,
        /// Zero.
        pub _pad: u16,
    }
}

abi! {
    /// Value of `FRAGMENTS4` and `FRAGMENTS6`: what only the first fragment says.
    pub struct Fragment where 8 {
        /// The sender's port.
        pub source_port: Port,
        /// The receiver's port.
        pub destination_port: Port,
        /// When the first fragment came, in [`crate::flow::Tick`]s.
        pub seen: u32,
    }
}

abi! {
    /// Key of `FLOWS4`, `FLOWS6`, `PENDING4` and `PENDING6`: a packet's tuple as it comes in.
    pub struct FlowKey<A> where Ipv4Be => 16, Ipv6Be => 40 {
        /// The sender.
        pub source: A,
        /// The receiver.
        pub destination: A,
        /// The sender's port.
        pub source_port: Port,
        /// The receiver's port.
        pub destination_port: Port,
        /// TCP, UDP or SCTP.
        pub proto: IpProto,
        /// Zero.
        pub _pad: u16,
    }
}

abi! {
    /// Where packets of a flow leave to, as the kernel's FIB said in some epoch.
    /// The agent begins a new epoch whenever a route, a neighbour or a link changes.
    pub struct Hop where 24 {
        /// The epoch of the answer: in another one it has to be asked for again. Zero, which is no epoch: no answer yet.
        pub epoch: u32,
        /// The interface.
        pub interface: IfIndex,
        /// The next hop's Ethernet address.
        pub destination: MacAddr,
        /// Our Ethernet address there.
        pub source: MacAddr,
        /// The largest IP packet, in bytes, that goes this way; zero: not known, and the stack alone sends this way.
        pub mtu: u16,
        /// Not zero: the stack alone sends this way.
        pub is_by_stack: u16,
    }
}

abi! {
    /// Value of `FLOWS4`, `FLOWS6`, `PENDING4` and `PENDING6`: what becomes of the packets of one direction of a flow.
    /// For IPv4 exactly one cache line.
    pub struct Flow<A> where Ipv4Be => 64, Ipv6Be => 88 {
        /// [`FlowKey::check`] of the entry's key. The kernel may give the memory of an evicted entry to another flow
        /// while a reader still holds it, and writes it in ascending order: a reader that reads this field
        /// last and finds its own key's check has read nothing of the other flow.
        pub check: u32,
        /// When a packet last used the entry, in [`crate::flow::Tick`]s.
        pub last_seen: u32,
        /// A [`State`].
        pub state: u8,
        /// A [`Direction`].
        pub direction: u8,
        /// [`Flow::ON_NODE`] and the others, combined.
        pub flags: u16,
        /// While the flow is not established, in the entry of the replies: the sequence number of the backend's SYN,
        /// in host order.
        pub sequence: u32,
        /// The id of the flow's backend.
        pub backend: u32,
        /// The generation of the backend when it was chosen.
        pub generation: u32,
        /// The source address that the packet leaves with.
        pub source: A,
        /// The destination address that the packet leaves with.
        pub destination: A,
        /// The source port that the packet leaves with.
        pub source_port: Port,
        /// The destination port that the packet leaves with.
        pub destination_port: Port,
        /// What the new addresses add to the IPv4 header checksum ([`Delta::fold`]).
        pub ip_delta: u16,
        /// What the new addresses and ports add to the TCP or UDP checksum.
        pub l4_delta: u16,
        /// The next hop.
        pub hop: Hop,
    }
}

abi! {
    /// Value of `ADDRESSES`, at the number of an interface where our programs meet packets: what those are sent from that leave there for a
    /// backend.
    pub struct InterfaceAddresses where 24 {
        /// The IPv6 address; unspecified: none.
        pub v6: Ipv6Be,
        /// The IPv4 address; unspecified: none.
        pub v4: Ipv4Be,
        /// 1 if our program is on the interface and may send by it, 0 if the stack has to: see `Kernel::sends_by` of the agent.
        pub is_attached: u32,
    }
}

abi! {
    /// Value of `COUNTERS`, on each CPU.
    pub struct Counter where 16 {
        /// How many packets.
        pub packets: u64,
        /// Their bytes, with the Ethernet header.
        pub bytes: u64,
    }
}

/// How many services a socket that is not connected may talk to at a time, and have answers shown as theirs.
pub const DATAGRAM_SERVICES: usize = 8;

/// `BPF_F_MMAPABLE` (include/uapi/linux/bpf.h): the agent maps the array into its memory.
pub const BPF_F_MMAPABLE: usize = 1 << 10;

impl Frontend {
    /// The policy is Local: clients get the backends on this node alone.
    pub const LOCAL_POLICY: u32 = 1;
    /// Clients come from outside of the cluster: for those on this node the policy is Cluster all the same.
    pub const EXTERNAL: u32 = 2;
    /// Only clients in the service's `SOURCES` are served, but for those on this node.
    pub const SOURCE_RANGES: u32 = 4;
    /// It is a NodePort at an address of this node: nobody else may have it.
    pub const NODE_PORT: u32 = 8;
    /// Nobody is served there: it stands for all addresses of a node in bind(2), of which not all are served.
    pub const BIND_ONLY: u32 = 16;
}

impl SourceKey {
    /// Of a client's address, or of a range's, as [`Address::to_words`] gives it.
    #[inline(always)]
    pub const fn new(service: u32, [first, second]: [u64; 2]) -> Self {
        Self { service, address: [halves(first).0, halves(first).1, halves(second).0, halves(second).1] }
    }

    /// How many bits of a key have to match for a range with a prefix of this length.
    pub const fn prefix_length(address_bits: u32) -> u32 {
        u32::BITS + address_bits
    }
}

impl SourceKey {
    /// The address, as [`Address::to_words`] gives it.
    pub const fn words(&self) -> [u64; 2] {
        let [a, b, c, d] = self.address;
        [whole(a, b), whole(c, d)]
    }
}

/// The value of an entry of `SOURCES` with an IPv4 range.
pub const SOURCES_IPV4: u32 = 4;
/// The value of an entry of `SOURCES` with an IPv6 range.
pub const SOURCES_IPV6: u32 = 6;

impl VipKey<Ipv4Be> {
    /// A value of `VIPS4` and `VIPS6`: ports that no service takes are refused, and not left to the stack.
    pub const REFUSES: u32 = 1;
}

impl Backend {
    /// The backend is on this node: it sees its clients' addresses.
    pub const ON_NODE: u16 = 1;
    /// It takes new flows by policy Cluster.
    pub const IN_CLUSTER: u16 = 2;
    /// It takes new flows by policy Local.
    pub const IN_LOCAL: u16 = 4;
    /// The id is a backend's; without, nobody has it.
    pub const TAKEN: u16 = 8;
    /// Its address is of IPv6.
    pub const IPV6: u16 = 16;

    /// Whether it takes new flows by any policy.
    pub const fn takes_new(&self) -> bool {
        self.flags & (Self::IN_CLUSTER | Self::IN_LOCAL) != 0
    }

    /// What session affinity remembers of a backend: another number once it has left its service, or for some time took no new
    /// flows. Only after 65,536 such changes it may be the same again.
    #[inline(always)]
    pub const fn standing(&self) -> u32 {
        self.generation.wrapping_add((self.withdrawals as u32) << 16)
    }

    /// How many live flows it has, and its weight: what least-connections compares.
    #[inline(always)]
    pub const fn load(&self) -> (u64, u16) {
        // Evicted flows were not counted out until the agent does it, and a count may be below zero for a moment.
        let is_negative = self.active.cast_signed() < 0;
        (if is_negative { 0 } else { self.active }, self.weight)
    }
}

/// The version of what stands in the maps: agents that differ in it can't take over from each other.
pub const LAYOUT: u32 = 1;

/// For how many counters `COUNTERS` has room: more than there are, so that the map outlives an upgrade to more.
pub const COUNTERS_MAX: usize = 128;

/// For how many interfaces `ADDRESSES` has room: more than a node has pods.
pub const MAX_INTERFACES: usize = 4096;

/// For how many control groups `EXEMPT` has room.
pub const MAX_EXEMPT: usize = 1024;

/// How many words of 64 bits `ADDRESS_BITS` has: as many for services as for backends.
pub const ADDRESS_WORDS: usize = 2 * WORDS_EACH;
const WORDS_EACH: usize = 1 << 14;

/// Whose address a bit of `ADDRESS_BITS` stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whose {
    /// A service has it: packets of flows go there.
    Services,
    /// A backend has it: packets of flows come from there.
    Backends,
}

/// Where the bit of an address, as [`Address::to_words`] gives it, is in `ADDRESS_BITS`: the word's index, and the bit in it.
#[inline(always)]
pub const fn address_bit([a, b]: [u64; 2], whose: Whose) -> (u32, u64) {
    // In a product with a large odd number the high bits depend on all bits, but addresses in a row would share some
    // without the second one.
    const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
    // So does the first factor keep what IPv6's prefixes and its hosts have in the same places from cancelling each other out.
    let product = (a.wrapping_mul(FACTOR) ^ b.rotate_left(32)).wrapping_mul(FACTOR);
    let hash = (product ^ product >> 32).wrapping_mul(FACTOR);
    let word = (hash >> (u64::BITS - WORDS_EACH.ilog2())) as u32;
    (whose as u32 * WORDS_EACH as u32 + word, 1 << (hash >> 32 & 63))
}

/// A range of `TABLE`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableRange {
    /// The first slot.
    pub base: u32,
    /// How many slots; zero: no backends.
    pub length: u32,
}

impl TableRange {
    /// No slots.
    pub const EMPTY: Self = Self { base: 0, length: 0 };

    /// The range in one word, so that one store changes both ends.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        (self.base as u64) << 32 | self.length as u64
    }

    /// The inverse of [`TableRange::to_word`].
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self { base: (word >> 32) as u32, length: word as u32 }
    }
}

impl<A: Address> Flow<A> {
    /// The backend or the client is on this node: the stack takes the packets to where they go, and replies
    /// are translated on their way out.
    pub const ON_NODE: u16 = 1;
    /// In the entry of the replies: there was one.
    pub const ANSWERED: u16 = 2;
    /// The backend is the client itself, on a pod-facing device: packets go back there by the way that they came.
    pub const HAIRPIN: u16 = 4;
    /// The flow is established: it is one of its backend's live flows.
    pub const ESTABLISHED: u16 = 8;
    /// The client is a process of the node itself: requests are translated as they leave it, and replies where they come in.
    pub const OWN: u16 = 16;

    /// The entry's state.
    #[inline(always)]
    pub const fn state(&self) -> State {
        State::from_raw(self.state)
    }

    /// Which way the entry's packets go.
    #[inline(always)]
    pub const fn direction(&self) -> Direction {
        if self.direction == Direction::Reply as u8 { Direction::Reply } else { Direction::Request }
    }

    /// Whether the stack takes the packets to where they go; see [`Flow::ON_NODE`].
    #[inline(always)]
    pub const fn is_on_node(&self) -> bool {
        self.flags & Self::ON_NODE != 0
    }

    /// Whether there was a reply.
    #[inline(always)]
    pub const fn is_answered(&self) -> bool {
        self.flags & Self::ANSWERED != 0
    }

    /// Whether the flow is one of its backend's live flows, if it has not ended.
    #[inline(always)]
    pub const fn is_counted(&self) -> bool {
        self.flags & Self::ESTABLISHED != 0
    }

    /// Whether packets go back by the way that they came.
    #[inline(always)]
    pub const fn is_hairpin(&self) -> bool {
        self.flags & Self::HAIRPIN != 0
    }

    /// Whether the client is a process of the node itself; see [`Flow::OWN`].
    #[inline(always)]
    pub const fn is_own(&self) -> bool {
        self.flags & Self::OWN != 0
    }

    /// Whether packets go where the kernel's FIB says.
    #[inline(always)]
    pub const fn needs_hop(&self) -> bool {
        let is_for_us = self.is_own() && self.direction == Direction::Reply as u8;
        self.flags & (Self::ON_NODE | Self::HAIRPIN) == 0 && !is_for_us
    }

    /// Whether the entry has outlived its state's timeout.
    #[inline(always)]
    pub const fn is_expired(&self, now: Tick, timeouts: &Timeouts) -> bool {
        now.since(self.last_seen) > timeouts.of(self.state())
    }
}

impl<A: Address> Flow<A> {
    /// An entry for packets that come in as `key`, where those of the other direction come in as `answer`.
    pub fn new(key: &FlowKey<A>, answer: &FlowKey<A>, about: &FlowAbout) -> Self {
        let mut flow = Self {
            check: 0,
            last_seen: 0,
            state: 0,
            direction: 0,
            flags: 0,
            sequence: 0,
            backend: 0,
            generation: 0,
            source: A::UNSPECIFIED,
            destination: A::UNSPECIFIED,
            source_port: Port::default(),
            destination_port: Port::default(),
            ip_delta: 0,
            l4_delta: 0,
            hop: Hop::UNKNOWN,
        };
        flow.set(key, answer, about);
        flow
    }

    /// Makes this what [`Flow::new`] gives: in place, since a program's stack has no room for it.
    #[inline(always)]
    pub fn set(&mut self, key: &FlowKey<A>, answer: &FlowKey<A>, about: &FlowAbout) {
        // The packet leaves as what the answer answers.
        self.source = answer.destination;
        self.destination = answer.source;
        self.source_port = answer.destination_port;
        self.destination_port = answer.source_port;
        let addresses =
            Delta::NONE.replace_address(key.source, answer.destination).replace_address(key.destination, answer.source);
        let all = addresses
            .replace_port(key.source_port, answer.destination_port)
            .replace_port(key.destination_port, answer.source_port);
        self.ip_delta = addresses.fold();
        self.l4_delta = all.fold();
        let state = if key.proto == IpProto::UDP { State::Datagram } else { State::Opening };
        self.check = key.check();
        self.last_seen = about.now.0;
        self.state = state as u8;
        self.direction = about.direction as u8;
        self.flags = about.flags;
        self.sequence = 0;
        self.backend = about.backend;
        self.generation = about.generation;
        self.hop = Hop::UNKNOWN;
    }

    /// Makes this the entry for packets of `key` at another destination port.
    #[inline(always)]
    pub fn arrive_at_port(&mut self, key: &mut FlowKey<A>, port: Port) {
        // The translated port now replaces another word than the delta was made with.
        self.l4_delta = Delta::from_folded(self.l4_delta).replace_port(port, key.destination_port).fold();
        key.destination_port = port;
        self.check = key.check();
    }

    /// Makes the packets leave from another source address.
    #[inline(always)]
    pub fn leave_from(&mut self, source: A) {
        self.ip_delta = Delta::from_folded(self.ip_delta).replace_address(self.source, source).fold();
        self.l4_delta = Delta::from_folded(self.l4_delta).replace_address(self.source, source).fold();
        self.source = source;
    }

    /// Makes the packets leave from another source port.
    #[inline(always)]
    pub fn leave_from_port(&mut self, port: Port) {
        self.l4_delta = Delta::from_folded(self.l4_delta).replace_port(self.source_port, port).fold();
        self.source_port = port;
    }

    /// The tuple that a packet of the other direction comes in with: the key of the other entry.
    #[inline(always)]
    pub const fn answer(&self, proto: IpProto) -> FlowKey<A> {
        FlowKey::new(self.destination, self.source, (self.destination_port, self.source_port), proto)
    }

    /// Whether this entry's packets leave as answers to those that come in as `key`: it is the other direction's entry.
    #[inline(always)]
    pub fn leads_to(&self, key: &FlowKey<A>) -> bool {
        self.destination_port == key.source_port
            && self.source_port == key.destination_port
            && self.destination == key.source
            && self.source == key.destination
    }

    /// Whether both entries' packets leave with one tuple: for one key they are of one flow.
    #[inline(always)]
    pub fn leaves_like(&self, other: &Self) -> bool {
        self.destination_port == other.destination_port
            && self.source_port == other.source_port
            && self.destination == other.destination
            && self.source == other.source
    }
}

/// What there is to know of a flow's entry beside its tuples.
#[derive(Clone, Copy, Debug)]
pub struct FlowAbout {
    /// Which way its packets go.
    pub direction: Direction,
    /// The id of its backend.
    pub backend: u32,
    /// The generation of its backend.
    pub generation: u32,
    /// [`Flow::ON_NODE`] and the others, combined.
    pub flags: u16,
    /// When it was last used.
    pub now: Tick,
}

impl Hop {
    /// Not asked for yet.
    pub const UNKNOWN: Self = Self {
        epoch: 0,
        interface: IfIndex(0),
        destination: MacAddr([0; 6]),
        source: MacAddr([0; 6]),
        mtu: 0,
        is_by_stack: 0,
    };

    /// Makes this that of packets that the stack takes further.
    #[inline(always)]
    pub const fn leave_to_stack(&mut self, epoch: u32) {
        self.epoch = epoch;
        self.interface = IfIndex(0);
        self.mtu = 0;
    }
}

impl<A: Address> ServiceKey<A> {
    /// The key of a frontend.
    #[inline(always)]
    pub fn new(address: A, port: Port, proto: IpProto) -> Self {
        Self { address, port, proto, _pad: A::Padding::default() }
    }
}

impl Slot {
    /// A slot that gives this backend.
    pub const fn new(backend: u32) -> Self {
        Self { backend, _pad: 0 }
    }
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn words_unpack_to_what_was_packed() {
        let range = TableRange { base: 0xDEAD_BEEF, length: 65_537 };
        assert_eq!(TableRange::from_word(range.to_word()), range);
    }

    #[test]
    fn an_entry_changed_step_by_step_is_the_entry_made_at_once() {
        let address = |byte| Ipv4Be::from_bytes([byte; 4]);
        let ports = |a, b| (Port::from_host(a), Port::from_host(b));
        let asked = FlowKey::new(address(1), address(2), ports(4242, 80), IpProto::TCP);
        let about = |direction| FlowAbout { direction, backend: 7, generation: 8, flags: 0, now: Tick(9) };
        let sent = |port| FlowKey::new(address(3), address(4), ports(port, 8080), IpProto::TCP);

        let from_nowhere = FlowKey { source: Ipv4Be::UNSPECIFIED, ..sent(4242) };
        let mut request = Flow::new(&asked, &from_nowhere.reversed(), &about(Direction::Request));
        request.leave_from(address(3));
        request.leave_from_port(Port::from_host(61_234));
        assert_eq!(request, Flow::new(&asked, &sent(61_234).reversed(), &about(Direction::Request)));

        let mut key = sent(4242).reversed();
        let mut reply = Flow::new(&key, &asked, &about(Direction::Reply));
        reply.arrive_at_port(&mut key, Port::from_host(61_234));
        assert_eq!(reply, Flow::new(&sent(61_234).reversed(), &asked, &about(Direction::Reply)));
    }

    #[test]
    fn addresses_have_bits_of_their_own_where_there_is_room() {
        let addresses = 1_u32 << 14;
        let v4 = (0..addresses).map(|number| Ipv4Be::from_bytes((0x0A60_0000 + number).to_be_bytes()).to_words());
        let v6 = (0..addresses).map(|number| {
            let mut bytes = [0; 16];
            bytes[..2].copy_from_slice(&[0xFD, 0]);
            bytes[12..].copy_from_slice(&number.to_be_bytes());
            Ipv6Be::from_bytes(bytes).to_words()
        });
        let both = |words| [Whose::Services, Whose::Backends].map(|whose| address_bit(words, whose));
        let bits: std::collections::HashSet<_> = v4.chain(v6).flat_map(both).collect();
        assert!(bits.iter().all(|&(word, bit)| (word as usize) < ADDRESS_WORDS && bit.is_power_of_two()));
        let near = (0..1 << 12).map(|number: u16| {
            let mut bytes = [0; 16];
            (bytes[3], bytes[15]) = ((number >> 6) as u8, (number & 63) as u8);
            Ipv6Be::from_bytes(bytes).to_words()
        });
        let of_near: std::collections::HashSet<_> = near.map(|words| address_bit(words, Whose::Backends)).collect();
        assert!(of_near.len() > 4_000, "{} bits for {} hosts in 64 networks", of_near.len(), 1 << 12);
        // By chance, 1 in 64 would share theirs.
        assert!(bits.len() > 64_000, "{} bits for {} addresses of each", bits.len(), 2 * addresses);
    }

    #[test]
    fn the_fields_that_are_stored_whole_are_aligned() {
        assert_eq!(offset_of!(Service, cluster) % 8, 0);
        assert_eq!(offset_of!(Service, local) % 8, 0);
        assert_eq!(offset_of!(Backend, flows) % 8, 0);
        assert_eq!(offset_of!(Backend, active) % 8, 0);
        assert_eq!(offset_of!(Backend, generation) % 4, 0);
        assert_eq!(offset_of!(Flow<Ipv4Be>, check), 0);
        assert_eq!(offset_of!(Flow<Ipv6Be>, last_seen) % 4, 0);
        assert_eq!(size_of::<SourceKey>(), 20);
    }
}
