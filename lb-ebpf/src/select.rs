//! Which backend takes a new flow: `lb_common::select` decides, here are the tables that it decides over.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use lb_common::{
    abi::{Affinity, AffinityKey, Backend, FlowKey, Frontend, TableRange},
    flow::Tick,
    net::Address,
    select::{Algorithm, prefers_second, slot_index},
    verdict::{AnswerReason, DropReason, Verdict},
};

use crate::maps::{self, ServiceEntry};

/// Who may take a new flow.
#[derive(Clone, Copy)]
pub(crate) struct Choice {
    service: u32,
    range: TableRange,
    /// What a backend's flags say if it is in the range.
    membership: u16,
}

/// The backends that a client of a frontend may get.
///
/// Slot and backend are read in one run of the program, so from one backend set: what the agent
/// takes away it gives to another use only after every run that could have seen it is over.
#[inline(always)]
pub(crate) fn choice(frontend: Frontend, is_on_node: bool) -> Result<Choice, Verdict> {
    let service = ServiceEntry::of(frontend.service).ok_or(DropReason::MapMissing)?;
    let is_local = frontend.flags & Frontend::LOCAL_POLICY != 0;
    // To a client in the cluster a policy for those outside of it does not apply (kube-proxy's "short-circuit").
    if is_local && !(is_on_node && frontend.flags & Frontend::EXTERNAL != 0) {
        let range = service.local();
        return match range.length {
            0 if service.cluster().length > 0 => Err(DropReason::NoLocalEndpoints.into()),
            0 => Err(AnswerReason::NoBackend.into()),
            _ => Ok(Choice { service: frontend.service, range, membership: Backend::IN_LOCAL }),
        };
    }
    let range = service.cluster();
    match range.length {
        0 => Err(AnswerReason::NoBackend.into()),
        _ => Ok(Choice { service: frontend.service, range, membership: Backend::IN_CLUSTER }),
    }
}

/// The id of the backend for a flow that this packet opens.
#[inline(never)] // The stack, as in `track`.
pub(crate) fn backend<A: Address>(choice: Choice, key: &FlowKey<A>, now: Tick) -> Result<u32, DropReason> {
    let service = ServiceEntry::of(choice.service).ok_or(DropReason::MapMissing)?;
    let affinity = service.affinity();
    if affinity == 0 {
        return by_algorithm(&service, choice.range, key);
    }
    let client = AffinityKey { client: key.source.to_words(), service: choice.service, _pad: 0 };
    if let Some(id) = known(&client, affinity, choice, now) {
        return Ok(id);
    }
    let id = by_algorithm(&service, choice.range, key)?;
    let standing = maps::backend(id).ok_or(DropReason::MapMissing)?.standing();
    let chosen = Affinity { backend: id, standing, last_used: now.0, service: choice.service };
    if !maps::claim_affinity(&client, &chosen) {
        // A client may open several flows at once: all go where the one goes whose CPU was first.
        if let Some(id) = known(&client, affinity, choice, now) {
            return Ok(id);
        }
        maps::set_affinity(&client, &chosen);
    }
    Ok(id)
}

/// The backend of the client's last flow, if that was not too long ago and the backend still takes new flows; the client is
/// taken to have used it now.
#[inline(always)]
fn known(client: &AffinityKey, timeout: u32, choice: Choice, now: Tick) -> Option<u32> {
    let entry = maps::affinity(client)?;
    let last = *entry;
    let backend = maps::backend(last.backend)?;
    let is_good = last.service == choice.service
        && now.since(last.last_used) <= Tick::from_seconds(timeout)
        && backend.standing() == last.standing
        && backend.flags & choice.membership != 0;
    if !is_good {
        return None;
    }
    entry.last_used = now.0;
    Some(last.backend)
}

#[inline(always)]
fn by_algorithm<A: Address>(service: &ServiceEntry, range: TableRange, key: &FlowKey<A>) -> Result<u32, DropReason> {
    let algorithm = Algorithm::from_raw(service.algorithm());
    let first = draw(algorithm, service, range, key)?;
    if algorithm != Algorithm::LeastConnections {
        return Ok(first);
    }
    let second = draw(Algorithm::Random, service, range, key)?;
    let load = |id| maps::backend(id).map(Backend::load).ok_or(DropReason::MapMissing);
    Ok(if prefers_second(load(first)?, load(second)?) { second } else { first })
}

/// The backend in one slot.
#[inline(always)]
fn draw<A: Address>(
    algorithm: Algorithm,
    service: &ServiceEntry,
    range: TableRange,
    key: &FlowKey<A>,
) -> Result<u32, DropReason> {
    let index = slot_index(algorithm, range.length, key, random, || service.next_pick());
    maps::slot(range.base.wrapping_add(index)).ok_or(DropReason::MapMissing)
}

/// 32 random bits.
#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: The helper takes nothing and always succeeds.
    unsafe { bpf_get_prandom_u32() }
}
