//! Flows: found, kept up to date, opened, closed.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use lb_common::{
    abi::{Flow, FlowKey},
    flow::{Direction, State},
    net::{Address, IfIndex, Port},
    parse::Segment,
    verdict::{DropReason, Verdict},
};

use crate::{
    config, emit,
    maps::{self, FamilyMaps, Workspace},
    packet::Packet,
    select, socket,
};

/// How many source ports are tried for a new flow: the client's own, then random ones of the SNAT range.
/// With half of the range in use towards one backend, one flow in 2^15 finds none.
const SNAT_TRIES: u32 = 16;

/// How old, in ns, the time of last use may get before a packet renews it: a store a second, not a store a packet.
const TOUCH_AFTER: u64 = 1_000_000_000;

/// A packet looks after the entry of the other direction when time has passed a multiple of 2^32 ns, 4.3 s: it is one
/// more lookup, and for a million flows one more cache miss.
const HOLD_SHIFT: u32 = 32;

/// `EEXIST` of the kernel (include/uapi/asm-generic/errno-base.h), as map updates return it.
const EEXIST: i32 = -17;

/// When a packet is looked at.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    /// The time: ns of `CLOCK_MONOTONIC`, coarse.
    pub(crate) time: u64,
    /// The epoch of next hops.
    pub(crate) epoch: u32,
}

impl Moment {
    #[inline(always)]
    pub(crate) fn now() -> Result<Self, Verdict> {
        let epoch = maps::epoch().ok_or(DropReason::MapMissing)?;
        // SAFETY: The helper takes nothing and always succeeds.
        Ok(Self { time: unsafe { bpf_ktime_get_coarse_ns() }, epoch })
    }
}

/// The live flow of a packet, copied from its entry. One that is over is removed, so that the packet may open it anew.
#[inline(always)]
pub(crate) fn find<F: FamilyMaps>(
    segment: &Segment<F::Address>,
    moment: &Moment,
) -> Option<&'static mut Flow<F::Address>> {
    let entry = maps::flow::<F>(&segment.key)?;
    let flow = &mut F::workspace()?.flow;
    if !maps::copy_flow(&segment.key, entry, flow) {
        return None;
    }
    let is_due = moment.time.saturating_sub(flow.last_seen) > TOUCH_AFTER;
    let is_peer_due = is_due && flow.last_seen >> HOLD_SHIFT != moment.time >> HOLD_SHIFT;
    if is_over::<F>(segment, flow, moment.time) || (is_peer_due && !hold_peer::<F>(&segment.key, moment.time)) {
        close::<F>(&segment.key, flow);
        return None;
    }
    if is_due {
        // Has the memory become another flow's meanwhile, then that one looks a little younger: no harm.
        entry.last_seen = moment.time;
    }
    Some(flow)
}

/// Notes what the packet says about its flow: the TCP state, and the next hop if the one that it remembers is of
/// another epoch.
#[inline(always)]
pub(crate) fn update<F: FamilyMaps>(
    packet: &Packet,
    segment: &Segment<F::Address>,
    moment: &Moment,
    flow: &mut Flow<F::Address>,
) -> Result<(), Verdict> {
    let before = flow.state();
    let state = before.after(segment.flags);
    if state == before && flow.hop.epoch == moment.epoch {
        return Ok(());
    }
    if flow.hop.epoch != moment.epoch {
        emit::lookup::<F>(packet, segment, moment, flow)?;
    }
    flow.state = state as u8;
    flow.last_seen = moment.time;
    maps::replace_flow::<F>(&segment.key, flow);
    // A FIN ends one direction, and the other may go on for long; a RST ends both.
    if segment.flags.resets() && before != State::Closing {
        close_peer::<F>(&segment.key, moment.time);
    }
    Ok(())
}

/// Makes the entries of a new flow: one for the replies, whose tuple no other flow may have, and one for the requests.
/// Where another CPU opens the same flow meanwhile, its entries stay.
#[inline(never)] // The stack: with its frame in its caller's, the 512 bytes would not do.
pub(crate) fn open<F: FamilyMaps>(
    packet: &Packet,
    segment: &Segment<F::Address>,
    moment: &Moment,
    service: u32,
) -> Result<(), DropReason> {
    let id = select::backend(service, &segment.key)?;
    let backend = maps::backend(id).ok_or(DropReason::MapMissing)?;
    let workspace = F::workspace().ok_or(DropReason::MapMissing)?;
    let identity = (id, backend.generation);
    workspace.peer_key = FlowKey::new(
        F::Address::from_words(backend.address),
        F::Address::UNSPECIFIED,
        (backend.port, segment.key.source_port),
        segment.key.proto,
    );
    // The way out is asked for first: our address depends on it, and a packet that can't leave makes no entry.
    workspace.flow = Flow::new(&segment.key, &workspace.peer_key.reversed(), Direction::Request, identity, moment.time);
    emit::lookup::<F>(packet, segment, moment, &mut workspace.flow)?;
    workspace.peer_key.destination = source::<F>(packet, workspace.flow.hop.interface)?;
    workspace.flow.leave_from(workspace.peer_key.destination);
    workspace.peer = Flow::new(&workspace.peer_key, &segment.key.reversed(), Direction::Reply, identity, moment.time);
    claim::<F>(packet, workspace, moment.time)?;
    match maps::claim_flow::<F>(&segment.key, &workspace.flow) {
        Ok(()) => {
            maps::count_flow(id);
            Ok(())
        }
        Err(error) => {
            maps::remove_flow::<F>(&workspace.peer_key);
            if error == EEXIST { Ok(()) } else { Err(DropReason::FlowTableFull) }
        }
    }
}

/// Claims a tuple for the replies by adding their entry: to the client's port, or else to a random one of the SNAT range.
/// A tuple that a socket of the host has or listens for is the host's.
#[inline(always)]
fn claim<F: FamilyMaps>(packet: &Packet, workspace: &mut Workspace<F::Address>, now: u64) -> Result<(), DropReason> {
    let Workspace { flow, peer, peer_key, .. } = workspace;
    for _ in 0..SNAT_TRIES {
        let is_ours = !socket::has_tuple::<F>(packet, peer_key);
        if is_ours {
            match maps::claim_flow::<F>(peer_key, peer) {
                Ok(()) => return Ok(()),
                Err(EEXIST) => {}
                Err(_no_room) => return Err(DropReason::FlowTableFull),
            }
        }
        if !is_ours || !reap::<F>(peer_key, now) {
            let port = random_port();
            flow.leave_from_port(port);
            peer.arrive_at_port(peer_key, port);
        }
    }
    Err(DropReason::SnatPortsExhausted)
}

/// The address that packets leave with: ours on the interface that they leave by, as for the kernel's masquerading.
/// Only where the FIB does not say which (a tunnel), ours on the one that they came in by.
#[inline(always)]
fn source<F: FamilyMaps>(packet: &Packet, egress: IfIndex) -> Result<F::Address, DropReason> {
    let interface = if egress == IfIndex(0) { packet.ingress() } else { egress };
    let address = maps::address::<F>(interface);
    if address == F::Address::UNSPECIFIED { Err(DropReason::NoSourceAddress) } else { Ok(address) }
}

/// A random port of the SNAT range.
#[inline(always)]
fn random_port() -> Port {
    let (first, n_ports) = config::snat_ports();
    let offset = (u64::from(select::random()) * u64::from(n_ports)) >> 32;
    Port::from_host(first.wrapping_add(offset as u16))
}

/// Removes the flow that holds a tuple if it has been idle for too long; says whether the tuple is free now.
#[inline(never)] // The stack, as above.
fn reap<F: FamilyMaps>(key: &FlowKey<F::Address>, now: u64) -> bool {
    let Some(holder) = maps::flow::<F>(key) else { return false };
    let is_idle = holder.is_expired(now) && is_peer_idle::<F>(key, holder, now);
    if is_idle {
        close::<F>(key, holder);
    }
    is_idle
}

/// Whether the flow has ended, so that this packet has to open a new one or has none.
#[inline(always)]
fn is_over<F: FamilyMaps>(segment: &Segment<F::Address>, flow: &Flow<F::Address>, now: u64) -> bool {
    is_idle::<F>(&segment.key, flow, now)
        || match (flow.direction(), flow.state()) {
            (Direction::Reply, _) => false,
            // UDP has no end of its own: with its backend the flow goes.
            (Direction::Request, State::Datagram) => !maps::is_current(flow.backend, flow.generation),
            (Direction::Request, State::Closing) => segment.flags.opens(),
            (Direction::Request, _) => segment.flags.opens() && !maps::is_current(flow.backend, flow.generation),
        }
}

/// Whether neither direction has seen a packet for the state's timeout.
#[inline(always)]
fn is_idle<F: FamilyMaps>(key: &FlowKey<F::Address>, flow: &Flow<F::Address>, now: u64) -> bool {
    flow.is_expired(now) && is_peer_idle::<F>(key, flow, now)
}

#[inline(never)] // The stack, as above.
fn is_peer_idle<F: FamilyMaps>(key: &FlowKey<F::Address>, flow: &Flow<F::Address>, now: u64) -> bool {
    let peer_key = flow.translated(key.proto).reversed();
    peer::<F>(key, &peer_key).is_none_or(|peer| peer.is_expired(now))
}

/// Removes both directions of a flow.
#[inline(never)] // The stack, as above.
fn close<F: FamilyMaps>(key: &FlowKey<F::Address>, flow: &Flow<F::Address>) {
    let peer_key = flow.translated(key.proto).reversed();
    if peer::<F>(key, &peer_key).is_some() {
        maps::remove_flow::<F>(&peer_key);
    }
    // Another CPU may have closed it, too, and opened a new flow in its place: that one stays.
    if maps::flow::<F>(key).is_some_and(|entry| entry.translated(key.proto) == flow.translated(key.proto)) {
        maps::remove_flow::<F>(key);
    }
}

/// Keeps the entry of the other direction from being the least recently used one while only this direction has packets,
/// and makes it again if it was forgotten all the same. `false` if its tuple is another flow's by now.
#[inline(never)] // The stack, as above.
fn hold_peer<F: FamilyMaps>(key: &FlowKey<F::Address>, now: u64) -> bool {
    let Some(Workspace { flow, peer, peer_key, .. }) = F::workspace() else { return false };
    *peer_key = flow.translated(key.proto).reversed();
    // The lookup itself marks the entry as used.
    if let Some(entry) = maps::flow::<F>(peer_key) {
        return entry.translated(key.proto) == key.reversed();
    }
    let identity = (flow.backend, flow.generation);
    *peer = Flow::new(peer_key, &key.reversed(), flow.direction().opposite(), identity, now);
    peer.state = flow.state;
    // Where there is no room at this moment there will be in a second.
    maps::claim_flow::<F>(peer_key, peer) != Err(EEXIST)
}

/// A RST ends the connection in the other direction's entry, too.
#[inline(never)] // The stack, as above.
fn close_peer<F: FamilyMaps>(key: &FlowKey<F::Address>, now: u64) {
    let Some(Workspace { flow, peer, peer_key, .. }) = F::workspace() else { return };
    *peer_key = flow.translated(key.proto).reversed();
    let Some(entry) = self::peer::<F>(key, peer_key) else { return };
    if maps::copy_flow(peer_key, entry, peer) {
        peer.state = State::Closing as u8;
        peer.last_seen = now;
        maps::replace_flow::<F>(peer_key, peer);
    }
}

/// The entry of the other direction. It has to lead back to `key`: its tuple may be another flow's by now.
#[inline(always)]
fn peer<F: FamilyMaps>(key: &FlowKey<F::Address>, peer_key: &FlowKey<F::Address>) -> Option<&'static Flow<F::Address>> {
    let peer = maps::flow::<F>(peer_key)?;
    (peer.translated(key.proto) == key.reversed()).then_some(peer)
}
