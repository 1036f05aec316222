//! All maps, and the only places that read and write them.
//!
//! `SERVICE`, `TABLE`, `BACKENDS`, `EPOCH` and `ADDRESS_BITS` are mapped into the agent's memory: it writes
//! them by plain stores, without a system call. Sizes here are the smallest that make sense;
//! the agent sets the real ones when it loads the object.

use core::{
    ptr,
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::{
    bindings::{BPF_EXIST, BPF_F_NO_PREALLOC, BPF_NOEXIST, bpf_fib_lookup},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, SkStorage, lpm_trie::Key},
    macros::btf_map,
    programs::{SockAddrContext, TcContext, XdpContext},
};
use lb_common::{
    abi::{
        ADDRESS_WORDS, Affinity, AffinityKey, BPF_F_MMAPABLE, Backend, COUNTERS_MAX, Counter, Datagrams, Flow, FlowKey,
        Fragment, FragmentKey, Frontend, InterfaceAddresses, MAX_EXEMPT, MAX_INTERFACES, Service, ServiceKey, Slot,
        SourceKey, TableRange, Translation, VipKey, Whose, address_bit,
    },
    net::{Address, Family, IfIndex, Ipv4Be, Ipv6Be, V4, V6},
    parse::Segment,
    verdict::Stage,
};

use crate::asm;

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// How many datagrams in fragments are followed at a time, in each family: those of some seconds.
const N_FRAGMENTS: usize = 8192;

/// How many sockets are watched at a time. Of others those of UDP are served packet by packet where that is done, or else as those of TCP.
const N_WATCHED: usize = 1 << 18;

type Services<A> = HashMap<ServiceKey<A>, Frontend, 1, NO_PREALLOC>;
type Vips<A> = HashMap<VipKey<A>, u32, 1, NO_PREALLOC>;
pub(crate) type Flows<A> = LruHashMap<FlowKey<A>, Flow<A>, 2>;
type Fragments<A> = LruHashMap<FragmentKey<A>, Fragment, N_FRAGMENTS>;

/// IPv4 frontend → service id and flags. The agent writes, the programs read; a miss means: not a service.
#[btf_map]
static SERVICES4: Services<Ipv4Be> = HashMap::new();

/// IPv6 frontend → service id and flags. The agent writes, the programs read; a miss means: not a service.
#[btf_map]
static SERVICES6: Services<Ipv6Be> = HashMap::new();

/// IPv4 address that is a service's alone → what becomes of ports that no service takes. The agent writes, the programs
/// read; a miss means: this host's address, or nobody's.
#[btf_map]
static VIPS4: Vips<Ipv4Be> = HashMap::new();

/// IPv6 address that is a service's alone → what becomes of ports that no service takes. The agent writes, the programs
/// read; a miss means: this host's address, or nobody's.
#[btf_map]
static VIPS6: Vips<Ipv6Be> = HashMap::new();

/// Two bits for each hash of an address ([`address_bit`]), set if a service has such an address, and if a backend has. The agent sets
/// them before it adds a frontend or a backend, and clears none; one that is not set means: no such service, or backend, at no port.
#[btf_map]
static ADDRESS_BITS: Array<u64, ADDRESS_WORDS, BPF_F_MMAPABLE> = Array::new();

/// Service id and prefix of clients' addresses → the IP family's number. The agent writes, the programs read; a miss means: not allowed.
#[btf_map]
static SOURCES: LpmTrie<SourceKey, u32, 1> = LpmTrie::new();

/// Service id and client → backend of its last flow. The programs write and read; a miss means: any will do.
#[btf_map]
static AFFINITY: LruHashMap<AffinityKey, Affinity, 1> = LruHashMap::new();

/// Service id → table ranges and algorithm. The agent writes, all but the cursor; no miss for a known id.
#[btf_map]
static SERVICE: Array<Service, 1, BPF_F_MMAPABLE> = Array::new();

/// Slot → backend id. The agent writes, the programs read; no miss inside a published range.
#[btf_map]
static TABLE: Array<Slot, 1, BPF_F_MMAPABLE> = Array::new();

/// Backend id → address and port. The agent writes, all but the counts of flows; no miss for a known id.
#[btf_map]
static BACKENDS: Array<Backend, 1, BPF_F_MMAPABLE> = Array::new();

/// IPv4 tuple → translation of an established flow; one entry for each direction. The programs write and read; a miss
/// means: no established flow.
#[btf_map]
static FLOWS4: Flows<Ipv4Be> = LruHashMap::new();

/// IPv6 tuple → translation of an established flow; one entry for each direction. The programs write and read; a miss
/// means: no established flow.
#[btf_map]
static FLOWS6: Flows<Ipv6Be> = LruHashMap::new();

/// IPv4 tuple → translation of a flow that is not established yet, so that a flood of SYNs only ever forces out its like.
/// The programs write and read; a miss means: no such flow.
#[btf_map]
static PENDING4: Flows<Ipv4Be> = LruHashMap::new();

/// IPv6 tuple → translation of a flow that is not established yet. The programs write and read; a miss means: no such flow.
#[btf_map]
static PENDING6: Flows<Ipv6Be> = LruHashMap::new();

/// TCP socket, by its cookie → the service that it is connected to, and the backend that it got. The programs write and read; a miss
/// means: not connected to a service, or forgotten. It is removed with the socket, but the kernel does not tell of those of its own.
#[btf_map]
static PEERS: LruHashMap<u64, Translation, 1> = LruHashMap::new();

/// UDP socket → the same. A miss means: not connected to a service. It goes with the socket.
#[btf_map]
static CONNECTED: SkStorage<Translation> = SkStorage::new();

/// Socket, by its cookie → what it is connected to in place of a service, of those that are ended when that is gone. The programs write,
/// the agent reads; a miss means: it stays. It is removed with the socket.
#[btf_map]
static WATCHED: HashMap<u64, Translation, N_WATCHED, NO_PREALLOC> = HashMap::new();

/// Socket that is not connected → the services that it sends datagrams to, each with its backend. The programs write and read; a miss
/// means: to none. It goes with the socket.
#[btf_map]
static DATAGRAMS: SkStorage<Datagrams> = SkStorage::new();

/// Control group, by its id → 1. The agent writes, the programs read; a miss means: its sockets are balanced.
#[btf_map]
static EXEMPT: HashMap<u64, u32, MAX_EXEMPT, NO_PREALLOC> = HashMap::new();

/// IPv4 datagram → ports, from its first fragment. The programs write and read; a miss means: the first did not come yet.
#[btf_map]
static FRAGMENTS4: Fragments<Ipv4Be> = LruHashMap::new();

/// IPv6 datagram → ports, from its first fragment. The programs write and read; a miss means: the first did not come yet.
#[btf_map]
static FRAGMENTS6: Fragments<Ipv6Be> = LruHashMap::new();

/// Interface where our programs meet packets → our addresses there; 0 → those of the node. The agent writes, the programs read; a miss
/// means: packets are not met there.
#[btf_map]
static ADDRESSES: HashMap<u32, InterfaceAddresses, MAX_INTERFACES, NO_PREALLOC> = HashMap::new();

/// 0 → the epoch of next hops, never zero. The agent writes.
#[btf_map]
static EPOCH: Array<u32, 1, BPF_F_MMAPABLE> = Array::new();

/// Verdict → packets and bytes, for each CPU. The programs write, the agent reads.
#[btf_map]
static COUNTERS: PerCpuArray<Counter, COUNTERS_MAX> = PerCpuArray::new();

/// Where a new IPv4 flow's entries are built, on each CPU. The programs write and read; always there.
#[btf_map]
static WORKSPACE4: PerCpuArray<Workspace<Ipv4Be>, 1> = PerCpuArray::new();

/// Where a new IPv6 flow's entries are built, on each CPU. The programs write and read; always there.
#[btf_map]
static WORKSPACE6: PerCpuArray<Workspace<Ipv6Be>, 1> = PerCpuArray::new();

/// What was read of an IPv4 packet whose program needs its stack for other things, on each CPU. The programs write and
/// read; always there.
#[btf_map]
static SEGMENT4: PerCpuArray<Segment<Ipv4Be>, 1> = PerCpuArray::new();

/// What was read of an IPv6 packet whose program needs its stack for other things, on each CPU. The programs write and
/// read; always there.
#[btf_map]
static SEGMENT6: PerCpuArray<Segment<Ipv6Be>, 1> = PerCpuArray::new();

/// Where a number goes for the verifier to forget it, on each CPU. The programs write and read; always there.
#[btf_map]
static FORGOTTEN: PerCpuArray<u64, 1> = PerCpuArray::new();

/// What a program tells the one that it hands a packet on to, on each CPU. The programs write and read; always there.
#[btf_map]
static HANDOVER: PerCpuArray<Handover, 1> = PerCpuArray::new();

/// Stage → XDP program. The agent fills it before it attaches.
#[btf_map]
static XDP_STAGES: ProgramArray<{ Stage::ALL.len() }> = ProgramArray::new();

/// Stage → tc program. The agent fills it before it attaches.
#[btf_map]
static TC_STAGES: ProgramArray<{ Stage::ALL.len() }> = ProgramArray::new();

/// What a program tells the one that it hands a packet on to.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Handover {
    /// What the packet is answered with: an [`AnswerReason`](lb_common::verdict::AnswerReason).
    pub(crate) answer: u32,
    /// The MTU that the sender is told, in bytes.
    pub(crate) mtu: u32,
}

/// The most bytes of an answer, from its IP header on: the kernel's checksum helper takes no more than 512.
pub(crate) const ANSWER_MAX: usize = 304;

/// What would not fit on the stack, of which a program and all that it calls have 512 bytes.
/// A run has it to itself: XDP and tc programs run with softirqs off, so on one CPU one after another
/// (but for real-time kernels, and for test runs before Linux 6.10).
#[repr(C)]
pub(crate) struct Workspace<A: Address> {
    /// The packet's entry: a copy of the one that was found, or the one that is being made.
    pub(crate) flow: Flow<A>,
    /// The entry of the other direction.
    pub(crate) peer: Flow<A>,
    /// Its key.
    pub(crate) peer_key: FlowKey<A>,
    /// A question to the kernel's FIB, and the answer.
    pub(crate) fib: bpf_fib_lookup,
    /// An answer in the making.
    pub(crate) answer: [u8; ANSWER_MAX],
}

/// The maps of one family.
pub(crate) trait FamilyMaps: Family {
    fn services() -> &'static Services<Self::Address>;
    fn vips() -> &'static Vips<Self::Address>;
    /// Established flows.
    fn flows() -> &'static Flows<Self::Address>;
    /// Flows that are not established yet.
    fn pending() -> &'static Flows<Self::Address>;
    fn fragments() -> &'static Fragments<Self::Address>;
    fn segment() -> &'static PerCpuArray<Segment<Self::Address>, 1>;
    fn workspace() -> Option<&'static mut Workspace<Self::Address>>;
    fn source(addresses: &InterfaceAddresses) -> Self::Address;
}

impl FamilyMaps for V4 {
    #[inline(always)]
    fn services() -> &'static Services<Ipv4Be> {
        &SERVICES4
    }

    #[inline(always)]
    fn vips() -> &'static Vips<Ipv4Be> {
        &VIPS4
    }

    #[inline(always)]
    fn flows() -> &'static Flows<Ipv4Be> {
        &FLOWS4
    }

    #[inline(always)]
    fn pending() -> &'static Flows<Ipv4Be> {
        &PENDING4
    }

    #[inline(always)]
    fn fragments() -> &'static Fragments<Ipv4Be> {
        &FRAGMENTS4
    }

    #[inline(always)]
    fn segment() -> &'static PerCpuArray<Segment<Ipv4Be>, 1> {
        &SEGMENT4
    }

    #[inline(always)]
    fn workspace() -> Option<&'static mut Workspace<Ipv4Be>> {
        // SAFETY: This CPU's own, and taken once in a run of the function that uses it.
        WORKSPACE4.get_ptr_mut(0).map(|workspace| unsafe { &mut *workspace })
    }

    #[inline(always)]
    fn source(addresses: &InterfaceAddresses) -> Ipv4Be {
        addresses.v4
    }
}

impl FamilyMaps for V6 {
    #[inline(always)]
    fn services() -> &'static Services<Ipv6Be> {
        &SERVICES6
    }

    #[inline(always)]
    fn vips() -> &'static Vips<Ipv6Be> {
        &VIPS6
    }

    #[inline(always)]
    fn flows() -> &'static Flows<Ipv6Be> {
        &FLOWS6
    }

    #[inline(always)]
    fn pending() -> &'static Flows<Ipv6Be> {
        &PENDING6
    }

    #[inline(always)]
    fn fragments() -> &'static Fragments<Ipv6Be> {
        &FRAGMENTS6
    }

    #[inline(always)]
    fn segment() -> &'static PerCpuArray<Segment<Ipv6Be>, 1> {
        &SEGMENT6
    }

    #[inline(always)]
    fn workspace() -> Option<&'static mut Workspace<Ipv6Be>> {
        // SAFETY: This CPU's own, and taken once in a run of the function that uses it.
        WORKSPACE6.get_ptr_mut(0).map(|workspace| unsafe { &mut *workspace })
    }

    #[inline(always)]
    fn source(addresses: &InterfaceAddresses) -> Ipv6Be {
        addresses.v6
    }
}

/// Whether an address may be a service's, or a backend's: of those that are not, nearly none.
#[inline(always)]
pub(crate) fn may_be<A: Address>(whose: Whose, address: A) -> bool {
    let (word, bit) = address_bit(address.to_words(), whose);
    // SAFETY: An element of an array map, which is never freed; the volatile load is one load.
    ADDRESS_BITS.get_ptr(word).is_some_and(|word| unsafe { ptr::read_volatile(word) } & bit != 0)
}

/// The service behind a frontend, and what holds for it.
#[inline(always)]
pub(crate) fn frontend<F: FamilyMaps>(key: &ServiceKey<F::Address>) -> Option<Frontend> {
    // SAFETY: A single aligned word is copied out; the element may be freed only after this program's run.
    unsafe { F::services().get(key) }.copied()
}

/// The flags of an address that is a service's alone.
#[inline(always)]
pub(crate) fn vip<F: FamilyMaps>(address: F::Address) -> Option<u32> {
    // SAFETY: As above.
    unsafe { F::vips().get(VipKey { address }) }.copied()
}

/// Whether a service has a source range with this client in it.
#[inline(always)]
pub(crate) fn is_source_allowed<A: Address>(service: u32, client: A) -> bool {
    let length = SourceKey::prefix_length(8 * size_of::<A>() as u32);
    let key = Key::new(length, SourceKey::new(service, client.to_words()));
    SOURCES.get(&key).is_some()
}

/// A service: its table ranges, its algorithm, and a counter of picks to draw from.
pub(crate) struct ServiceEntry(*mut Service);

impl ServiceEntry {
    /// The entry of a service id.
    #[inline(always)]
    pub(crate) fn of(id: u32) -> Option<Self> {
        SERVICE.get_ptr_mut(id).map(Self)
    }

    /// The backends of policy Cluster, in one load: the old set or the new one, never a mixture.
    #[inline(always)]
    pub(crate) fn cluster(&self) -> TableRange {
        // SAFETY: An element of an array map, which is never freed; the field is aligned, so the volatile load is one load.
        TableRange::from_word(unsafe { ptr::read_volatile(&raw const (*self.0).cluster) })
    }

    /// The backends of policy Local, likewise.
    #[inline(always)]
    pub(crate) fn local(&self) -> TableRange {
        // SAFETY: As above.
        TableRange::from_word(unsafe { ptr::read_volatile(&raw const (*self.0).local) })
    }

    /// The number of the algorithm.
    #[inline(always)]
    pub(crate) fn algorithm(&self) -> u8 {
        // SAFETY: As above; one byte.
        unsafe { (*self.0).algorithm }
    }

    /// For how many seconds a client's flows go to one backend; zero: they need not.
    #[inline(always)]
    pub(crate) fn affinity(&self) -> u32 {
        // SAFETY: As above.
        unsafe { ptr::read_volatile(&raw const (*self.0).affinity) }
    }

    /// Counts a pick, and gives how many there were before.
    #[inline(always)]
    pub(crate) fn next_pick(&self) -> u32 {
        // SAFETY: As above.
        unsafe { asm::fetch_add(&raw mut (*self.0).cursor, 1) as u32 }
    }
}

/// Where a client's last flow to a service went, as it stands in the map. If that has become another client's meanwhile, the
/// caller finds out what is wrong with it, and that one's looks a little younger: no harm.
#[inline(always)]
pub(crate) fn affinity(key: &AffinityKey) -> Option<&'static mut Affinity> {
    // SAFETY: Map memory, which outlives the run; each field is read and written by itself.
    AFFINITY.get_ptr_mut(key).map(|affinity| unsafe { &mut *affinity })
}

/// Remembers where a client's first flow to a service goes. `false` if there is an entry already.
#[inline(always)]
pub(crate) fn claim_affinity(key: &AffinityKey, affinity: &Affinity) -> bool {
    AFFINITY.insert(key, affinity, u64::from(BPF_NOEXIST)).is_ok()
}

/// Remembers where a client's last flow to a service went.
#[inline(always)]
pub(crate) fn set_affinity(key: &AffinityKey, affinity: &Affinity) {
    // Where there is no room the client's next flow goes anywhere.
    let _no_room = AFFINITY.insert(key, affinity, 0);
}

/// The ports of a datagram, from its first fragment.
#[inline(always)]
pub(crate) fn fragment<F: FamilyMaps>(key: &FragmentKey<F::Address>) -> Option<Fragment> {
    // SAFETY: A single aligned word is copied out; if it has become another datagram's, its flow is not this one's.
    unsafe { F::fragments().get(key) }.copied()
}

/// Remembers the ports of a datagram.
#[inline(always)]
pub(crate) fn set_fragment<F: FamilyMaps>(key: &FragmentKey<F::Address>, fragment: &Fragment) {
    // Where there is no room the other fragments are lost.
    let _no_room = F::fragments().insert(key, fragment, 0);
}

/// What a program tells the next one.
#[inline(always)]
pub(crate) fn handover() -> Option<&'static mut Handover> {
    // SAFETY: This CPU's own, and taken once in a run of the program that uses it.
    HANDOVER.get_ptr_mut(0).map(|handover| unsafe { &mut *handover })
}

/// Goes on with another XDP program; comes back only if it is missing.
#[inline(always)]
pub(crate) fn call_xdp_stage(ctx: &XdpContext, stage: Stage) {
    // SAFETY: Programs of the same type; nothing here needs to be dropped.
    unsafe { XDP_STAGES.tail_call(ctx, stage as u32) };
}

/// Goes on with another tc program; comes back only if it is missing.
#[inline(always)]
pub(crate) fn call_tc_stage(ctx: &TcContext, stage: Stage) {
    // SAFETY: Programs of the same type; nothing here needs to be dropped.
    unsafe { TC_STAGES.tail_call(ctx, stage as u32) };
}

/// The backend id in a slot.
#[inline(always)]
pub(crate) fn slot(index: u32) -> Option<u32> {
    TABLE.get(index).map(|slot| slot.backend)
}

/// A backend as it is now.
#[inline(always)]
pub(crate) fn backend(id: u32) -> Option<&'static Backend> {
    BACKENDS.get(id)
}

/// Whether a backend is still the one that was chosen when it had this generation.
#[inline(always)]
pub(crate) fn is_current(id: u32, generation: u32) -> bool {
    BACKENDS.get(id).is_some_and(|backend| backend.generation == generation)
}

/// Counts a flow that was opened to a backend.
#[inline(always)]
pub(crate) fn count_flow(id: u32) {
    if let Some(backend) = BACKENDS.get_ptr_mut(id) {
        // SAFETY: An element of an array map, which is never freed; the field is aligned.
        unsafe { asm::fetch_add(&raw mut (*backend).flows, 1) };
    }
}

/// Counts an answered flow of a backend in, by 1, or out, by -1, if it is still the backend that it was.
#[inline(always)]
pub(crate) fn count_active(id: u32, generation: u32, change: i64) {
    if let Some(backend) = BACKENDS.get_ptr_mut(id) {
        // SAFETY: As above.
        unsafe {
            if (*backend).generation == generation {
                asm::fetch_add(&raw mut (*backend).active, change as u64);
            }
        }
    }
}

/// The epoch of next hops.
#[inline(always)]
pub(crate) fn epoch() -> Option<u32> {
    // SAFETY: An element of an array map, which is never freed; the volatile load is one load.
    EPOCH.get_ptr(0).map(|epoch| unsafe { ptr::read_volatile(epoch) })
}

/// Whether our program meets what comes in by an interface.
#[inline(always)]
pub(crate) fn is_met_at(interface: IfIndex) -> bool {
    // SAFETY: Nothing is read of it.
    unsafe { ADDRESSES.get(interface.0) }.is_some()
}

/// Whether our program is on an interface, and may send by it.
#[inline(always)]
pub(crate) fn is_attached(interface: IfIndex) -> bool {
    // SAFETY: One field is copied out; the element may be freed only after this program's run.
    unsafe { ADDRESSES.get(interface.0) }.is_some_and(|addresses| addresses.is_attached != 0)
}

/// Our address on an interface, or the node's for interface 0; unspecified if there is none.
#[inline(always)]
pub(crate) fn address<F: FamilyMaps>(interface: IfIndex) -> F::Address {
    // SAFETY: Copied out; the element may be freed only after this program's run.
    match unsafe { ADDRESSES.get(interface.0) } {
        Some(addresses) => F::source(addresses),
        None => F::Address::UNSPECIFIED,
    }
}

/// Moves what was read of a packet off the stack.
#[inline(always)]
pub(crate) fn off_stack<F: FamilyMaps>(segment: &Segment<F::Address>) -> Option<&'static Segment<F::Address>> {
    let place = F::segment().get_ptr_mut(0)?;
    // SAFETY: This CPU's own, and written here alone, once in a run of a program.
    unsafe {
        place.write(*segment);
        Some(&*place)
    }
}

/// Gives a number back, with all that the verifier knew of it forgotten. See [`lb_common::parse::Bytes::settle`].
#[inline(always)]
pub(crate) fn forget(number: usize) -> usize {
    let Some(place) = FORGOTTEN.get_ptr_mut(0) else { return 0 };
    // SAFETY: This CPU's own, aligned.
    unsafe {
        place.write_volatile(number as u64);
        place.read_volatile() as usize
    }
}

/// A flow's entry where it stands in the map: to note the time of use, or to look at a field for which it is
/// harmless to be of a flow that has just taken its place. For all else: [`copy_flow`].
#[inline(always)]
pub(crate) fn flow<A: Address>(flows: &Flows<A>, key: &FlowKey<A>) -> Option<&'static mut Flow<A>> {
    // SAFETY: Map memory, which outlives the run; each field is read and written by itself.
    flows.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
}

/// Copies the entry of `key` to where no other CPU writes; says whether it was still that entry afterwards.
#[inline(always)]
pub(crate) fn copy_flow<A: Address>(key: &FlowKey<A>, entry: &Flow<A>, copy: &mut Flow<A>) -> bool {
    const { assert!(size_of::<Flow<A>>().is_multiple_of(size_of::<u64>())) };
    // By words: an assignment would be a call of `memmove`, which copies byte by byte.
    // SAFETY: Two values of maps, which are aligned to 8 bytes; nobody else writes to the copy.
    unsafe {
        let (from, to) = ((&raw const *entry).cast::<u64>(), (&raw mut *copy).cast::<u64>());
        ptr::copy_nonoverlapping(from, to, size_of::<Flow<A>>() / size_of::<u64>());
    }
    compiler_fence(Ordering::SeqCst);
    // SAFETY: A reference. Read again, and last; see `Flow::check`.
    let check = unsafe { ptr::read_volatile(&raw const entry.check) };
    check == key.check()
}

/// Adds a flow entry where there is none: whoever gets `Ok` owns the tuple.
#[inline(always)]
pub(crate) fn claim_flow<A: Address>(flows: &Flows<A>, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), i32> {
    flows.insert(key, flow, u64::from(BPF_NOEXIST))
}

/// Replaces a flow entry, whole; does nothing if it is gone.
#[inline(always)]
pub(crate) fn replace_flow<A: Address>(flows: &Flows<A>, key: &FlowKey<A>, flow: &Flow<A>) {
    let _gone = flows.insert(key, flow, u64::from(BPF_EXIST));
}

/// Removes a flow entry, if it is there.
#[inline(always)]
pub(crate) fn remove_flow<A: Address>(flows: &Flows<A>, key: &FlowKey<A>) {
    let _gone = flows.remove(key);
}

/// The counter of a verdict, on this CPU.
#[inline(always)]
pub(crate) fn counter(index: u32) -> Option<*mut Counter> {
    COUNTERS.get_ptr_mut(index)
}

/// What a TCP socket is connected to, if that is a service and not forgotten.
#[inline(always)]
pub(crate) fn peer(cookie: u64) -> Option<Translation> {
    // SAFETY: Map memory, which outlives the run. The entry may become another socket's while it is copied: then it is not found again.
    let peer = unsafe { PEERS.get(cookie) }.copied()?;
    compiler_fence(Ordering::SeqCst);
    // SAFETY: Nothing is read of it.
    unsafe { PEERS.get(cookie) }.map(|_| peer)
}

/// Remembers what a TCP socket is connected to. `false` where there is no room.
#[inline(always)]
pub(crate) fn set_peer(cookie: u64, translation: &Translation) -> bool {
    PEERS.insert(cookie, translation, 0).is_ok()
}

/// Forgets what a TCP socket is connected to, if it is remembered.
#[inline(always)]
pub(crate) fn forget_peer(cookie: u64) {
    let _none = PEERS.remove(cookie);
}

/// What a UDP socket is connected to, if that is a service.
#[inline(always)]
pub(crate) fn connected(context: &SockAddrContext) -> Option<&'static mut Translation> {
    // SAFETY: The kernel gives nothing or a value that lives as long as the socket, which its caller has locked.
    unsafe { CONNECTED.get_ptr_mut(context).as_mut() }
}

/// The same, made if it is not there; nothing where there is no room.
#[inline(always)]
pub(crate) fn connected_or_new(context: &SockAddrContext) -> Option<&'static mut Translation> {
    // SAFETY: As above.
    unsafe { CONNECTED.get_or_insert_ptr_mut(context, None).as_mut() }
}

/// Watches whether the backend of a socket goes. `false` where there is no room for more.
#[inline(always)]
pub(crate) fn watch(cookie: u64, translation: &Translation) -> bool {
    WATCHED.insert(cookie, translation, 0).is_ok()
}

/// Watches a socket no more.
#[inline(always)]
pub(crate) fn unwatch(cookie: u64) {
    let _none = WATCHED.remove(cookie);
}

/// Where a socket that is not connected sends its datagrams, if any go to a service.
#[inline(always)]
pub(crate) fn datagrams(context: &SockAddrContext) -> Option<&'static mut Datagrams> {
    // SAFETY: As above: the kernel calls our programs with the socket locked.
    unsafe { DATAGRAMS.get_ptr_mut(context).as_mut() }
}

/// The same, made if it is not there; nothing where there is no room.
#[inline(always)]
pub(crate) fn datagrams_or_new(context: &SockAddrContext) -> Option<&'static mut Datagrams> {
    // SAFETY: As above.
    unsafe { DATAGRAMS.get_or_insert_ptr_mut(context, None).as_mut() }
}

/// Whether the sockets of a control group are left alone.
#[inline(always)]
pub(crate) fn is_exempt(control_group: u64) -> bool {
    // SAFETY: Nothing is read.
    unsafe { EXEMPT.get(control_group) }.is_some()
}
