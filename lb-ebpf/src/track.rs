//! Established flows: found, kept up to date, closed.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use lb_common::{
    abi::{Flow, FlowAbout, FlowKey},
    flow::{Direction, State, Tick},
    net::{Address, IpProto},
    parse::Segment,
    verdict::{DropReason, Verdict},
};

use crate::{
    config, emit,
    maps::{self, FamilyMaps, Flows, Workspace},
    packet::Packet,
};

/// A packet looks after the entry of the other direction every four ticks (2^2), 4.3 s: it is one more lookup, and for
/// a million flows one more cache miss.
const HOLD_SHIFT: u32 = 2;

/// `EEXIST` of the kernel (include/uapi/asm-generic/errno-base.h), as map updates return it.
pub(crate) const EEXIST: i32 = -17;

/// When a packet is looked at.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    /// The time, to about a second: a flow's time of use is written once a tick, not once a packet.
    pub(crate) tick: Tick,
    /// The epoch of next hops.
    pub(crate) epoch: u32,
}

impl Moment {
    #[inline(always)]
    pub(crate) fn now() -> Result<Self, Verdict> {
        let epoch = maps::epoch().ok_or(DropReason::MapMissing)?;
        Ok(Self { tick: now(), epoch })
    }
}

/// The time, to about a second.
#[inline(always)]
pub(crate) fn now() -> Tick {
    // SAFETY: The helper takes nothing and always succeeds.
    Tick::from_ns(unsafe { bpf_ktime_get_coarse_ns() })
}

/// The live flow of a packet, copied from its entry. One that is over is removed, so that the packet may open it anew.
#[inline(always)]
pub(crate) fn find<F: FamilyMaps>(
    segment: &Segment<F::Address>,
    moment: Moment,
) -> Option<&'static mut Flow<F::Address>> {
    let entry = maps::flow(F::flows(), &segment.key)?;
    let flow = &mut F::workspace()?.flow;
    if !maps::copy_flow(&segment.key, entry, flow) {
        return None;
    }
    let is_due = moment.tick.since(flow.last_seen) > 0;
    let is_peer_due = is_due && flow.last_seen >> HOLD_SHIFT != moment.tick.0 >> HOLD_SHIFT;
    if is_over(F::flows(), segment, flow, moment.tick) || (is_peer_due && !hold_peer::<F>(&segment.key, moment.tick)) {
        close(F::flows(), &segment.key, flow);
        return None;
    }
    if is_due {
        // Has the memory become another flow's meanwhile, then that one looks a little younger: no harm.
        entry.last_seen = moment.tick.0;
    }
    Some(flow)
}

/// Notes what the packet says about its flow: the TCP state, and the next hop if the one that it remembers is of
/// another epoch.
#[inline(always)]
pub(crate) fn update<P: Packet, F: FamilyMaps>(
    packet: &P,
    segment: &Segment<F::Address>,
    moment: Moment,
    flow: &mut Flow<F::Address>,
) -> Result<(), Verdict> {
    let before = flow.state();
    let state = before.after(segment.flags);
    let is_lost = emit::has_lost_its_hop(flow, moment);
    if state != before || is_lost {
        if is_lost {
            emit::lookup::<P, F>(packet, segment, moment, flow)?;
        }
        flow.state = state as u8;
        flow.last_seen = moment.tick.0;
        maps::replace_flow(F::flows(), &segment.key, flow);
        if before != State::Closing && state == State::Closing {
            count_out(flow);
        }
    }
    // A FIN ends one direction, and the other may go on for long; a RST ends both, whatever came before.
    if segment.flags.resets() {
        close_peer::<F>(&segment.key, moment.tick);
    }
    Ok(())
}

/// Removes the flow that holds a tuple if it has been idle for too long; says whether the tuple is free now.
#[inline(never)] // The stack: with its frame in its caller's, the 512 bytes would not do.
pub(crate) fn reap<A: Address>(flows: &Flows<A>, key: &FlowKey<A>, now: Tick) -> bool {
    let Some(holder) = maps::flow(flows, key) else { return true };
    let is_free = is_idle(flows, key, holder, now);
    if is_free {
        close(flows, key, holder);
    }
    is_free
}

/// Whether the flow has ended, so that this packet has to open a new one or has none.
#[inline(always)]
pub(crate) fn is_over<A: Address>(flows: &Flows<A>, segment: &Segment<A>, flow: &Flow<A>, now: Tick) -> bool {
    is_idle(flows, &segment.key, flow, now)
        || match (flow.direction(), flow.state()) {
            // UDP has no end of its own: with its backend the flow goes, and what is left of it among the pending ones.
            (_, State::Datagram | State::Promoted) if segment.key.proto == IpProto::UDP => {
                !maps::is_current(flow.backend, flow.generation)
            }
            (Direction::Reply, _) => false,
            (Direction::Request, State::Closing | State::Promoted) => segment.flags.opens(),
            (Direction::Request, _) => {
                segment.flags.opens()
                    && (!maps::is_current(flow.backend, flow.generation) || is_peer_closing(flows, &segment.key, flow))
            }
        }
}

/// Whether neither direction has seen a packet for the state's timeout.
#[inline(always)]
fn is_idle<A: Address>(flows: &Flows<A>, key: &FlowKey<A>, flow: &Flow<A>, now: Tick) -> bool {
    flow.is_expired(now, &config::timeouts()) && is_peer_idle(flows, key, flow, now)
}

#[inline(never)] // The stack, as above.
fn is_peer_idle<A: Address>(flows: &Flows<A>, key: &FlowKey<A>, flow: &Flow<A>, now: Tick) -> bool {
    let peer_key = flow.answer(key.proto);
    peer(flows, key, &peer_key).is_none_or(|peer| peer.is_expired(now, &config::timeouts()))
}

/// Whether the other direction has ended, which leaves this one open: the backend may have closed first.
#[inline(never)] // The stack, as above.
fn is_peer_closing<A: Address>(flows: &Flows<A>, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
    let peer_key = flow.answer(key.proto);
    peer(flows, key, &peer_key).is_some_and(|peer| peer.state() == State::Closing)
}

/// Removes both directions of a flow.
#[inline(never)] // The stack, as above.
pub(crate) fn close<A: Address>(flows: &Flows<A>, key: &FlowKey<A>, flow: &Flow<A>) {
    let peer_key = flow.answer(key.proto);
    if let Some(peer) = peer(flows, key, &peer_key) {
        count_out_if_live(peer);
        maps::remove_flow(flows, &peer_key);
    }
    // Another CPU may have closed it, too, and opened a new flow in its place: that one stays.
    if let Some(entry) = maps::flow(flows, key)
        && entry.leaves_like(flow)
    {
        count_out_if_live(entry);
        maps::remove_flow(flows, key);
    }
}

/// Keeps the entry of the other direction from being the least recently used one while only this direction has packets,
/// and makes it again if it was forgotten all the same. `false` if its tuple is another flow's by now.
#[inline(never)] // The stack, as above.
fn hold_peer<F: FamilyMaps>(key: &FlowKey<F::Address>, now: Tick) -> bool {
    let Some(Workspace { flow, peer, peer_key, .. }) = F::workspace() else { return false };
    *peer_key = flow.answer(key.proto);
    // The lookup itself marks the entry as used.
    if let Some(entry) = maps::flow(F::flows(), peer_key) {
        return entry.leads_to(key);
    }
    let about = FlowAbout {
        direction: flow.direction().opposite(),
        backend: flow.backend,
        generation: flow.generation,
        flags: flow.flags,
        now,
    };
    peer.set(peer_key, key, &about);
    peer.state = flow.state;
    match maps::claim_flow(F::flows(), peer_key, peer) {
        Ok(()) => {
            // A flow that is not established may have claimed the tuple meanwhile: without its entry it is opened again.
            maps::remove_flow(F::pending(), peer_key);
            true
        }
        // Where there is no room at this moment there will be in a second.
        Err(error) => error != EEXIST,
    }
}

/// A RST ends the connection in the other direction's entry, too.
#[inline(never)] // The stack, as above.
fn close_peer<F: FamilyMaps>(key: &FlowKey<F::Address>, now: Tick) {
    let Some(Workspace { flow, peer, peer_key, .. }) = F::workspace() else { return };
    *peer_key = flow.answer(key.proto);
    let Some(entry) = self::peer(F::flows(), key, peer_key) else { return };
    if maps::copy_flow(peer_key, entry, peer) && peer.state() != State::Closing {
        count_out(peer);
        peer.state = State::Closing as u8;
        peer.last_seen = now.0;
        maps::replace_flow(F::flows(), peer_key, peer);
    }
}

/// The entry of the other direction. It has to lead back to `key`: its tuple may be another flow's by now.
#[inline(always)]
pub(crate) fn peer<A: Address>(
    flows: &Flows<A>,
    key: &FlowKey<A>,
    peer_key: &FlowKey<A>,
) -> Option<&'static mut Flow<A>> {
    let peer = maps::flow(flows, peer_key)?;
    peer.leads_to(key).then_some(peer)
}

/// Counts a flow out of its backend's live ones when its requests end.
#[inline(always)]
fn count_out<A: Address>(flow: &Flow<A>) {
    if flow.direction() == Direction::Request {
        maps::count_active(flow.backend, flow.generation, -1);
    }
}

/// The same where it is removed without having ended. Pending flows were never counted in.
#[inline(always)]
fn count_out_if_live<A: Address>(flow: &Flow<A>) {
    if flow.is_counted() && flow.state() != State::Closing {
        count_out(flow);
    }
}
