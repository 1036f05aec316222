//! The structs that live in the kernel's maps. Addresses and ports are in network order, all else in host order.

use crate::{
    checksum::Delta,
    flow::{Direction, State},
    net::{Address, IfIndex, IpProto, Ipv4Be, Ipv6Be, MacAddr, Port},
};

abi! {
    /// Key of `SERVICES4` and `SERVICES6`: a frontend.
    pub struct ServiceKey<A> where Ipv4Be => 8, Ipv6Be => 24 {
        /// The address that clients send to.
        pub address: A,
        /// The port that clients send to.
        pub port: Port,
        /// TCP or UDP; one port number may be two services.
        pub proto: IpProto,
        /// Zero.
        pub _pad: A::Padding,
    }
}

abi! {
    /// Value of `SERVICE`, at a service's id.
    pub struct Service where 24 {
        /// The service's range of `TABLE`, as [`TableRange::to_word`] packs it: changed by one aligned 8-byte store.
        pub table: u64,
        /// How many picks round robin has made; the only field that the kernel writes.
        pub cursor: u64,
        /// A [`crate::select::Algorithm`].
        pub algorithm: u8,
        /// Zero.
        pub _pad: [u8; 7],
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
    pub struct Backend where 32 {
        /// How many flows were opened to it; the only field that the kernel writes.
        pub flows: u64,
        /// The address, as [`Address::to_words`] gives it.
        pub address: [u64; 2],
        /// Raised when the id is freed: a flow that remembers another generation has lost its backend.
        pub generation: u32,
        /// The port that the backend listens on.
        pub port: Port,
        /// Zero.
        pub _pad: u16,
    }
}

abi! {
    /// Key of `FLOWS4` and `FLOWS6`: a packet's tuple as it comes in.
    pub struct FlowKey<A> where Ipv4Be => 16, Ipv6Be => 40 {
        /// The sender.
        pub source: A,
        /// The receiver.
        pub destination: A,
        /// The sender's port.
        pub source_port: Port,
        /// The receiver's port.
        pub destination_port: Port,
        /// TCP or UDP.
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
        /// The largest IP packet, in bytes, that goes this way.
        pub mtu: u16,
        /// Zero.
        pub _pad: u16,
    }
}

abi! {
    /// Value of `FLOWS4` and `FLOWS6`: what becomes of the packets of one direction of a flow.
    /// For IPv4 exactly one cache line.
    pub struct Flow<A> where Ipv4Be => 64, Ipv6Be => 88 {
        /// [`FlowKey::check`] of the entry's key. The kernel may give the memory of an evicted entry to another flow
        /// while a reader still holds it, and writes it in ascending order: a reader that reads this field
        /// last and finds its own key's check has read nothing of the other flow.
        pub check: u32,
        /// A [`State`].
        pub state: u8,
        /// A [`Direction`].
        pub direction: u8,
        /// Zero.
        pub _pad: u16,
        /// When a packet last used the entry, to about a second: ns of `CLOCK_MONOTONIC`, coarse.
        pub last_seen: u64,
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
    /// Value of `ADDRESSES`, at an interface's number: what packets that leave there for a backend are sent from.
    pub struct InterfaceAddresses where 24 {
        /// The IPv6 address; unspecified: none.
        pub v6: Ipv6Be,
        /// The IPv4 address; unspecified: none.
        pub v4: Ipv4Be,
        /// 1 if our program is on the interface, 0 if it is on the device below.
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

/// `BPF_F_MMAPABLE` (include/uapi/linux/bpf.h): the agent maps the array into its memory.
pub const BPF_F_MMAPABLE: usize = 1 << 10;

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

    /// Whether the entry has outlived its state's timeout at `now`, in ns.
    #[inline(always)]
    pub const fn is_expired(&self, now: u64) -> bool {
        now.saturating_sub(self.last_seen) > self.state().timeout()
    }
}

impl<A: Address> Flow<A> {
    /// An entry for packets that come in as `key` and leave as `translated`, towards a backend or back from it.
    #[inline(always)]
    pub fn new(
        key: &FlowKey<A>,
        translated: &FlowKey<A>,
        direction: Direction,
        (backend, generation): (u32, u32),
        now: u64,
    ) -> Self {
        let addresses = Delta::NONE
            .replace_address(key.source, translated.source)
            .replace_address(key.destination, translated.destination);
        let all = addresses
            .replace_port(key.source_port, translated.source_port)
            .replace_port(key.destination_port, translated.destination_port);
        let state = if key.proto == IpProto::UDP { State::Datagram } else { State::Opening };
        Self {
            check: key.check(),
            state: state as u8,
            direction: direction as u8,
            _pad: 0,
            last_seen: now,
            backend,
            generation,
            source: translated.source,
            destination: translated.destination,
            source_port: translated.source_port,
            destination_port: translated.destination_port,
            ip_delta: addresses.fold(),
            l4_delta: all.fold(),
            hop: Hop::UNKNOWN,
        }
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

    /// The tuple that the packet leaves with.
    #[inline(always)]
    pub const fn translated(&self, proto: IpProto) -> FlowKey<A> {
        FlowKey::new(self.source, self.destination, (self.source_port, self.destination_port), proto)
    }
}

impl Hop {
    /// Not asked for yet.
    pub const UNKNOWN: Self = Self {
        epoch: 0,
        interface: IfIndex(0),
        destination: MacAddr([0; 6]),
        source: MacAddr([0; 6]),
        mtu: 0,
        _pad: 0,
    };
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
        let sent = |port| FlowKey::new(address(3), address(4), ports(port, 8080), IpProto::TCP);

        let from_nowhere = FlowKey { source: Ipv4Be::UNSPECIFIED, ..sent(4242) };
        let mut request = Flow::new(&asked, &from_nowhere, Direction::Request, (7, 8), 9);
        request.leave_from(address(3));
        request.leave_from_port(Port::from_host(61_234));
        assert_eq!(request, Flow::new(&asked, &sent(61_234), Direction::Request, (7, 8), 9));

        let mut key = sent(4242).reversed();
        let mut reply = Flow::new(&key, &asked.reversed(), Direction::Reply, (7, 8), 9);
        reply.arrive_at_port(&mut key, Port::from_host(61_234));
        assert_eq!(reply, Flow::new(&sent(61_234).reversed(), &asked.reversed(), Direction::Reply, (7, 8), 9));
    }

    #[test]
    fn the_fields_that_are_stored_whole_are_aligned() {
        assert_eq!(offset_of!(Service, table) % 8, 0);
        assert_eq!(offset_of!(Backend, flows) % 8, 0);
        assert_eq!(offset_of!(Backend, generation) % 4, 0);
        assert_eq!(offset_of!(Flow<Ipv4Be>, check), 0);
        assert_eq!(offset_of!(Flow<Ipv6Be>, last_seen) % 8, 0);
    }
}
