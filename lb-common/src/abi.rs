//! The structs that live in the kernel's maps. Addresses and ports are in network order, all else in host order.

use crate::{
    flow::{Direction, State},
    net::{Address, IfIndex, IpProto, Ipv4Be, Ipv6Be, MacAddr, Port},
};

abi! {
    /// Key of `SERVICES4` and `SERVICES6`: a frontend.
    pub struct ServiceKey<A> where Ipv4Be => 8, Ipv6Be => 20 {
        /// The address that clients send to.
        pub address: A,
        /// The port that clients send to.
        pub port: Port,
        /// TCP or UDP; one port number may be two services.
        pub proto: IpProto,
        /// Zero.
        pub _pad: [u8; 1],
    }
}

abi! {
    /// Value of `SERVICE`, at a service's id.
    pub struct Service where 16 {
        /// The service's range of `TABLE`, as [`TableRange::to_word`] packs it: changed by one aligned 8-byte store.
        pub table: u64,
        /// How many picks round robin has made; the only field that the kernel writes.
        pub cursor: u32,
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
        pub _pad: [u8; 4],
    }
}

abi! {
    /// Value of `BACKENDS`, at a backend's id. A backend belongs to one service.
    pub struct Backend where 32 {
        /// How many flows were opened to it; the only field that the kernel writes.
        pub flows: u64,
        /// The address, as [`Address::to_words`] gives it.
        pub address: [u32; 4],
        /// Raised when the id is freed: a flow that remembers another generation has lost its backend.
        pub generation: u32,
        /// The port that the backend listens on.
        pub port: Port,
        /// Zero.
        pub _pad: [u8; 2],
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
        pub _pad: [u8; 3],
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
        /// The largest IP packet, in bytes, that the cached next hop takes.
        pub mtu: u16,
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
        /// What the new addresses add to the IPv4 header checksum ([`crate::checksum::Delta::fold`]).
        pub ip_delta: u16,
        /// What the new addresses and ports add to the TCP or UDP checksum.
        pub l4_delta: u16,
        /// The epoch in which the next hop was found; another epoch than the present one: look it up again.
        pub hop_epoch: u32,
        /// The interface that the next hop is reached by.
        pub hop_interface: IfIndex,
        /// The next hop's Ethernet address.
        pub hop_destination: MacAddr,
        /// Our Ethernet address towards the next hop.
        pub hop_source: MacAddr,
        /// Zero.
        pub _pad: [u8; 4],
    }
}

abi! {
    /// Value of `NODE`: what the datapath knows of the machine. There are two; [`NodeState`] says which counts.
    pub struct Node where 24 {
        /// The IPv6 address that packets to backends leave with; unspecified: none.
        pub source6: Ipv6Be,
        /// The IPv4 address that packets to backends leave with; unspecified: none.
        pub source4: Ipv4Be,
        /// The first port of the SNAT range, in host order: the search counts through it.
        pub snat_first: u16,
        /// The last port of the SNAT range, in host order, not less than the first.
        pub snat_last: u16,
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

/// What of the machine may change at any time, in the one word of the map `NODE_STATE`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeState {
    /// Raised with every change of routes and neighbours: a next hop remembered from another epoch is not used.
    /// Never zero, which flow entries without a next hop carry.
    pub epoch: u32,
    /// Which of the two entries of `NODE` counts: 0 or 1.
    pub node: u32,
}

impl NodeState {
    /// Both in one word, so that one store changes them together.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        (self.epoch as u64) << 32 | self.node as u64
    }

    /// The inverse of [`NodeState::to_word`].
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self { epoch: (word >> 32) as u32, node: word as u32 }
    }
}

impl<A> Flow<A> {
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
    /// The tuple that the packet leaves with.
    #[inline(always)]
    pub const fn translated(&self, proto: IpProto) -> FlowKey<A> {
        FlowKey::new(self.source, self.destination, (self.source_port, self.destination_port), proto)
    }
}

impl<A> ServiceKey<A> {
    /// The key of a frontend.
    #[inline(always)]
    pub const fn new(address: A, port: Port, proto: IpProto) -> Self {
        Self { address, port, proto, _pad: [0] }
    }
}

impl Slot {
    /// A slot that gives this backend.
    pub const fn new(backend: u32) -> Self {
        Self { backend, _pad: [0; 4] }
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
        let state = NodeState { epoch: u32::MAX, node: 1 };
        assert_eq!(NodeState::from_word(state.to_word()), state);
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
