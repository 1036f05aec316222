//! Which backend takes a new flow: `lb_common::select` decides, here are the tables that it decides over.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use lb_common::{
    abi::FlowKey,
    net::Address,
    select::{Algorithm, slot_index},
    verdict::DropReason,
};

use crate::maps::{self, ServiceEntry};

/// The id of the backend for a flow that this packet opens.
///
/// Slot and backend are read in one run of the program, so from one backend set: what the agent
/// takes away it gives to another use only after every run that could have seen it is over.
#[inline(always)]
pub(crate) fn backend<A: Address>(service: u32, key: &FlowKey<A>) -> Result<u32, DropReason> {
    let service = ServiceEntry::of(service).ok_or(DropReason::MapMissing)?;
    let table = service.table();
    if table.length == 0 {
        return Err(DropReason::NoBackend);
    }
    let algorithm = Algorithm::from_raw(service.algorithm());
    let index = slot_index(algorithm, table.length, key, random, || service.next_pick());
    maps::slot(table.base.wrapping_add(index)).ok_or(DropReason::MapMissing)
}

/// 32 random bits.
#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: The helper takes nothing and always succeeds.
    unsafe { bpf_get_prandom_u32() }
}
