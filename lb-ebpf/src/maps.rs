//! All maps, and the only places that read and write them.
//!
//! `SERVICE`, `TABLE`, `BACKENDS` and `EPOCH` are mapped into the agent's memory: it writes
//! them by plain stores, without a system call. Sizes here are the smallest that make sense;
//! the agent sets the real ones when it loads the object.

use core::{
    ptr,
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::{
    bindings::{BPF_EXIST, BPF_F_NO_PREALLOC, BPF_NOEXIST, bpf_fib_lookup},
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use lb_common::{
    abi::{BPF_F_MMAPABLE, Backend, Counter, Flow, FlowKey, InterfaceAddresses, Service, ServiceKey, Slot, TableRange},
    net::{Address, Family, IfIndex, Ipv4Be, Ipv6Be, V4, V6},
    verdict::COUNTERS as ALL_COUNTERS,
};

use crate::asm;

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
const N_COUNTERS: usize = ALL_COUNTERS.len();

type Services<A> = HashMap<ServiceKey<A>, u32, 1, NO_PREALLOC>;
type Flows<A> = LruHashMap<FlowKey<A>, Flow<A>, 2>;

/// IPv4 frontend → service id. The agent writes, the programs read; a miss means: not a service.
#[btf_map]
static SERVICES4: Services<Ipv4Be> = HashMap::new();

/// IPv6 frontend → service id. The agent writes, the programs read; a miss means: not a service.
#[btf_map]
static SERVICES6: Services<Ipv6Be> = HashMap::new();

/// Service id → table range and algorithm. The agent writes, all but the cursor; no miss for a known id.
#[btf_map]
static SERVICE: Array<Service, 1, BPF_F_MMAPABLE> = Array::new();

/// Slot → backend id. The agent writes, the programs read; no miss inside a published range.
#[btf_map]
static TABLE: Array<Slot, 1, BPF_F_MMAPABLE> = Array::new();

/// Backend id → address and port. The agent writes, all but the count of flows; no miss for a known id.
#[btf_map]
static BACKENDS: Array<Backend, 1, BPF_F_MMAPABLE> = Array::new();

/// IPv4 tuple → translation; one entry for each direction. The programs write and read; a miss means: no known flow.
#[btf_map]
static FLOWS4: Flows<Ipv4Be> = LruHashMap::new();

/// IPv6 tuple → translation; one entry for each direction. The programs write and read; a miss means: no known flow.
#[btf_map]
static FLOWS6: Flows<Ipv6Be> = LruHashMap::new();

/// Interface → our addresses there. The agent writes, the programs read; a miss means: not an interface of ours.
#[btf_map]
static ADDRESSES: HashMap<u32, InterfaceAddresses, 1024, NO_PREALLOC> = HashMap::new();

/// 0 → the epoch of next hops, never zero. The agent writes.
#[btf_map]
static EPOCH: Array<u32, 1, BPF_F_MMAPABLE> = Array::new();

/// Verdict → packets and bytes, for each CPU. The programs write, the agent reads.
#[btf_map]
static COUNTERS: PerCpuArray<Counter, N_COUNTERS> = PerCpuArray::new();

/// Where a new IPv4 flow's entries are built, on each CPU. The programs write and read; always there.
#[btf_map]
static WORKSPACE4: PerCpuArray<Workspace<Ipv4Be>, 1> = PerCpuArray::new();

/// Where a new IPv6 flow's entries are built, on each CPU. The programs write and read; always there.
#[btf_map]
static WORKSPACE6: PerCpuArray<Workspace<Ipv6Be>, 1> = PerCpuArray::new();

/// Where a number goes for the verifier to forget it, on each CPU. The programs write and read; always there.
#[btf_map]
static FORGOTTEN: PerCpuArray<u64, 1> = PerCpuArray::new();

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
}

/// The maps of one family.
pub(crate) trait FamilyMaps: Family {
    fn services() -> &'static Services<Self::Address>;
    fn flows() -> &'static Flows<Self::Address>;
    fn workspace() -> Option<&'static mut Workspace<Self::Address>>;
    fn source(addresses: &InterfaceAddresses) -> Self::Address;
}

impl FamilyMaps for V4 {
    #[inline(always)]
    fn services() -> &'static Services<Ipv4Be> {
        &SERVICES4
    }

    #[inline(always)]
    fn flows() -> &'static Flows<Ipv4Be> {
        &FLOWS4
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
    fn flows() -> &'static Flows<Ipv6Be> {
        &FLOWS6
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

/// The id of the service behind a frontend.
#[inline(always)]
pub(crate) fn service_id<F: FamilyMaps>(key: &ServiceKey<F::Address>) -> Option<u32> {
    // SAFETY: A single aligned word is copied out; the element may be freed only after this program's run.
    unsafe { F::services().get(key) }.copied()
}

/// A service: its table range, its algorithm, and a counter of picks to draw from.
pub(crate) struct ServiceEntry(*mut Service);

impl ServiceEntry {
    /// The entry of a service id.
    #[inline(always)]
    pub(crate) fn of(id: u32) -> Option<Self> {
        SERVICE.get_ptr_mut(id).map(Self)
    }

    /// The backend set, in one load: the old one or the new one, never a mixture.
    #[inline(always)]
    pub(crate) fn table(&self) -> TableRange {
        // SAFETY: An element of an array map, which is never freed; the field is aligned, so the volatile load is one load.
        TableRange::from_word(unsafe { ptr::read_volatile(&raw const (*self.0).table) })
    }

    /// The number of the algorithm.
    #[inline(always)]
    pub(crate) fn algorithm(&self) -> u8 {
        // SAFETY: As above; one byte.
        unsafe { (*self.0).algorithm }
    }

    /// Counts a pick, and gives how many there were before.
    #[inline(always)]
    pub(crate) fn next_pick(&self) -> u32 {
        // SAFETY: As above.
        unsafe { asm::fetch_add(&raw mut (*self.0).cursor, 1) as u32 }
    }
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

/// The epoch of next hops.
#[inline(always)]
pub(crate) fn epoch() -> Option<u32> {
    // SAFETY: An element of an array map, which is never freed; the volatile load is one load.
    EPOCH.get_ptr(0).map(|epoch| unsafe { ptr::read_volatile(epoch) })
}

/// Whether our program is on an interface.
#[inline(always)]
pub(crate) fn is_attached(interface: IfIndex) -> bool {
    // SAFETY: One field is copied out; the element may be freed only after this program's run.
    unsafe { ADDRESSES.get(interface.0) }.is_some_and(|addresses| addresses.is_attached != 0)
}

/// Our address on an interface; unspecified if there is none.
#[inline(always)]
pub(crate) fn address<F: FamilyMaps>(interface: IfIndex) -> F::Address {
    // SAFETY: Copied out; the element may be freed only after this program's run.
    match unsafe { ADDRESSES.get(interface.0) } {
        Some(addresses) => F::source(addresses),
        None => F::Address::UNSPECIFIED,
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
pub(crate) fn flow<F: FamilyMaps>(key: &FlowKey<F::Address>) -> Option<&'static mut Flow<F::Address>> {
    // SAFETY: Map memory, which outlives the run; each field is read and written by itself.
    F::flows().get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
}

/// Copies the entry of `key` to where no other CPU writes; says whether it was still that entry afterwards.
#[inline(always)]
pub(crate) fn copy_flow<A: Address>(key: &FlowKey<A>, entry: &Flow<A>, copy: &mut Flow<A>) -> bool {
    *copy = *entry;
    compiler_fence(Ordering::SeqCst);
    // SAFETY: A reference. Read again, and last; see `Flow::check`.
    let check = unsafe { ptr::read_volatile(&raw const entry.check) };
    check == key.check()
}

/// Adds a flow entry where there is none: whoever gets `Ok` owns the tuple.
#[inline(always)]
pub(crate) fn claim_flow<F: FamilyMaps>(key: &FlowKey<F::Address>, flow: &Flow<F::Address>) -> Result<(), i32> {
    F::flows().insert(key, flow, u64::from(BPF_NOEXIST))
}

/// Replaces a flow entry, whole; does nothing if it is gone.
#[inline(always)]
pub(crate) fn replace_flow<F: FamilyMaps>(key: &FlowKey<F::Address>, flow: &Flow<F::Address>) {
    let _gone = F::flows().insert(key, flow, u64::from(BPF_EXIST));
}

/// Removes a flow entry, if it is there.
#[inline(always)]
pub(crate) fn remove_flow<F: FamilyMaps>(key: &FlowKey<F::Address>) {
    let _gone = F::flows().remove(key);
}

/// The counter of a verdict, on this CPU.
#[inline(always)]
pub(crate) fn counter(index: u32) -> Option<*mut Counter> {
    COUNTERS.get_ptr_mut(index)
}
