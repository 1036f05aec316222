//! Which id, which slots, in which order: from a plan to the contents of the maps.
//!
//! A change is prepared where nobody looks, then published service by service with one 8-byte store each.
//! What it replaces rests until no packet in flight can hold it: [`Tables::reclaim`].

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    mem::offset_of,
    net::SocketAddr,
    ops::Range,
    sync::Arc,
};

use lb_common::{
    abi::{Backend, FlowKey, Service, Slot, TableRange},
    net::{self, Address, Port},
    select::slot_index,
};
use range_alloc::RangeAllocator;

use super::{
    Dataplane, DataplaneError, Sizes,
    slots::{self, Candidate},
};
use crate::{
    model::{self, Algorithm, Desired, ServiceName, Weight},
    plan::{Op, plan},
};

/// The maps, with the knowledge of what in them is whose.
#[derive(Debug)]
pub struct Tables<D> {
    dataplane: D,
    sizes: Sizes,
    applied: Arc<Desired>,
    entries: HashMap<ServiceName, Entry>,
    service_ids: IdPool,
    backend_ids: IdPool,
    ranges: RangeAllocator<u32>,
    used_slots: u64,
    resting: Vec<Resting>,
}

/// What the maps hold of one service.
#[derive(Clone, Debug)]
struct Entry {
    id: u32,
    algorithm: Algorithm,
    range: Range<u32>,
    backends: BTreeMap<SocketAddr, Member>,
}

/// A backend of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: u32,
    /// Its share of new flows.
    pub weight: Weight,
}

/// What was unpublished, and may still be held by a packet in flight.
#[derive(Debug)]
enum Resting {
    Service(u32),
    Backend(u32),
    Slots(Range<u32>),
}

/// How full a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// What the table holds.
    pub table: &'static str,
    /// Entries in use, those at rest included.
    pub used: u64,
    /// Entries that it can hold.
    pub size: u64,
}

impl<D: Dataplane> Tables<D> {
    /// Over empty maps of these sizes.
    pub fn new(dataplane: D, sizes: Sizes) -> Self {
        Self {
            dataplane,
            sizes,
            applied: Arc::default(),
            entries: HashMap::new(),
            service_ids: IdPool::new(sizes.services),
            backend_ids: IdPool::new(sizes.backends),
            ranges: RangeAllocator::new(0..sizes.slots),
            used_slots: 0,
            resting: Vec::new(),
        }
    }

    /// Makes the maps say what is desired. Returns how many changes that took.
    ///
    /// # Errors
    ///
    /// [`DataplaneError::Full`] if it does not fit, and then nothing has changed. After any other error what was
    /// done stays, each service whole, and the next call goes on from there.
    pub fn apply(&mut self, desired: &Arc<Desired>) -> Result<usize, DataplaneError> {
        let applied = Arc::clone(&self.applied);
        let ops = plan(desired, &applied);
        let prepared = self.prepare(desired, &ops)?;
        self.publish(&ops, prepared)?;
        self.applied = Arc::clone(desired);
        Ok(ops.len())
    }

    /// Waits until no packet in flight can hold what was unpublished, and makes it free. Does nothing where nothing rests.
    /// UDP flows of backends that are gone end with this.
    pub fn reclaim(&mut self) -> Result<(), DataplaneError> {
        if self.resting.is_empty() {
            return Ok(());
        }
        self.dataplane.wait_for_readers()?;
        for resting in self.resting.drain(..) {
            match resting {
                Resting::Service(id) => self.service_ids.free(id),
                Resting::Slots(range) => {
                    self.used_slots -= u64::from(range.end - range.start);
                    self.ranges.free_range(range);
                }
                Resting::Backend(id) => {
                    let mut backend = self.dataplane.backends().get(id);
                    backend.generation = backend.generation.wrapping_add(1);
                    self.dataplane.backends().set(id, backend);
                    self.backend_ids.free(id);
                }
            }
        }
        Ok(())
    }

    /// What the maps say now.
    pub fn applied(&self) -> &Arc<Desired> {
        &self.applied
    }

    /// The maps.
    pub fn dataplane(&self) -> &D {
        &self.dataplane
    }

    /// The maps, to attach programs and the like.
    pub fn dataplane_mut(&mut self) -> &mut D {
        &mut self.dataplane
    }

    /// How full each table is.
    pub fn usage(&self) -> [Usage; 4] {
        let sizes = &self.sizes;
        let usage = |table, used, size| Usage { table, used, size: u64::from(size) };
        [
            usage("services", self.service_ids.used(), sizes.services),
            usage("frontends", self.applied.frontends().len() as u64, sizes.frontends()),
            usage("backends", self.backend_ids.used(), sizes.backends),
            usage("slots", self.used_slots, sizes.slots),
        ]
    }

    /// The backend that the kernel's choice falls on for a new flow with this tuple, of the service that is called so:
    /// the same function over the same memory. `random` and `next` are drawn from as the algorithm needs it.
    pub fn choose<A: Address>(
        &self,
        name: &ServiceName,
        key: &FlowKey<A>,
        random: impl FnOnce() -> u32,
        next: impl FnOnce() -> u32,
    ) -> Option<Backend> {
        let service = self.dataplane.services().get(self.entries.get(name)?.id);
        let range = TableRange::from_word(service.table);
        if range.length == 0 {
            return None;
        }
        let algorithm = Algorithm::from_raw(service.algorithm);
        let index = slot_index(algorithm, range.length, key, random, next);
        let slot = self.dataplane.table().get(range.base + index);
        Some(self.dataplane.backends().get(slot.backend))
    }

    /// The backends of a service, with what only the kernel knows of each: how many flows were opened to it.
    pub fn members(&self, name: &ServiceName) -> impl Iterator<Item = (SocketAddr, Member, u64)> {
        self.entries.get(name).into_iter().flat_map(|entry| {
            entry
                .backends
                .iter()
                .map(|(&address, &member)| (address, member, self.dataplane.backends().get(member.id).flows))
        })
    }

    /// Writes everything new where nobody looks yet; gives it back whole if something doesn't fit.
    fn prepare(&mut self, desired: &Desired, ops: &[Op<'_>]) -> Result<Vec<Entry>, DataplaneError> {
        self.check_frontends(desired)?;
        match self.prepare_entries(ops) {
            // What rests may be all that is missing.
            Err(DataplaneError::Full { .. }) if !self.resting.is_empty() => {
                self.reclaim()?;
                self.prepare_entries(ops)
            }
            result => result,
        }
    }

    /// Frontends are added before others are removed, so both have to fit for a moment.
    fn check_frontends(&self, desired: &Desired) -> Result<(), DataplaneError> {
        for is_v4 in [true, false] {
            let of_family = |state: &Desired| {
                state.frontends().keys().filter(|frontend| frontend.address.is_ipv4() == is_v4).count() as u64
            };
            let needed = of_family(desired) + of_family(&self.applied);
            let size = u64::from(self.sizes.frontends());
            // The union is at most the sum; count it only if the sum could be too much.
            if needed > size {
                let union = desired.frontends().keys().chain(self.applied.frontends().keys());
                let union: std::collections::BTreeSet<_> =
                    union.filter(|frontend| frontend.address.is_ipv4() == is_v4).collect();
                let needed = union.len() as u64;
                if needed > size {
                    return Err(DataplaneError::Full { table: "frontends", needed, size, flag: "--max-services" });
                }
            }
        }
        Ok(())
    }

    fn prepare_entries(&mut self, ops: &[Op<'_>]) -> Result<Vec<Entry>, DataplaneError> {
        let mut prepared = Vec::new();
        for op in ops {
            let Op::SetService { name, service } = op else { continue };
            match self.prepare_entry(name, service) {
                Ok(entry) => prepared.push((*name, entry)),
                Err(error) => {
                    for (name, entry) in prepared {
                        self.give_back(name, entry);
                    }
                    return Err(self.whole_need(error, ops));
                }
            }
        }
        Ok(prepared.into_iter().map(|(_, entry)| entry).collect())
    }

    fn prepare_entry(&mut self, name: &ServiceName, service: &model::Service) -> Result<Entry, DataplaneError> {
        let present = self.entries.get(name);
        let present_id = present.map(|entry| entry.id);
        let kept: BTreeMap<SocketAddr, Member> = present.map(|entry| entry.backends.clone()).unwrap_or_default();
        let mut entry = Entry { id: u32::MAX, algorithm: service.algorithm, range: 0..0, backends: BTreeMap::new() };
        match self.fill_entry(&mut entry, present_id, &kept, service) {
            Ok(()) => Ok(entry),
            Err(error) => {
                self.give_back(name, entry);
                Err(error)
            }
        }
    }

    fn fill_entry(
        &mut self,
        entry: &mut Entry,
        present_id: Option<u32>,
        kept: &BTreeMap<SocketAddr, Member>,
        service: &model::Service,
    ) -> Result<(), DataplaneError> {
        entry.id = match present_id {
            Some(id) => id,
            None => self.service_ids.take().ok_or(self.full("services"))?,
        };
        for (&address, &weight) in &service.backends {
            let id = match kept.get(&address) {
                Some(member) => member.id,
                None => self.new_backend(address)?,
            };
            entry.backends.insert(address, Member { id, weight });
        }
        let candidates: Vec<_> = entry
            .backends
            .iter()
            .filter(|(_, member)| member.weight.get() > 0)
            .map(|(&address, member)| Candidate { id: member.id, address, weight: member.weight.get() })
            .collect();
        let slots = slots::build(service.algorithm, &candidates);
        if !slots.is_empty() {
            let length = u32::try_from(slots.len()).unwrap_or(u32::MAX);
            entry.range = self.ranges.allocate_range(length).map_err(|_full| self.full("slots"))?;
            self.used_slots += u64::from(length);
            for (index, id) in entry.range.clone().zip(slots) {
                self.dataplane.table().set(index, Slot::new(id));
            }
        }
        Ok(())
    }

    fn new_backend(&mut self, address: SocketAddr) -> Result<u32, DataplaneError> {
        let id = self.backend_ids.take().ok_or(self.full("backends"))?;
        let generation = self.dataplane.backends().get(id).generation;
        let backend = Backend {
            flows: 0,
            address: net::words(address.ip()),
            generation,
            port: Port::from_host(address.port()),
            _pad: 0,
        };
        self.dataplane.backends().set(id, backend);
        Ok(id)
    }

    /// Frees what was prepared and never published.
    fn give_back(&mut self, name: &ServiceName, entry: Entry) {
        let present = self.entries.get(name);
        for (address, member) in entry.backends {
            if present.is_none_or(|present| !present.backends.contains_key(&address)) {
                self.backend_ids.free(member.id);
            }
        }
        if present.is_none() && entry.id != u32::MAX {
            self.service_ids.free(entry.id);
        }
        if !entry.range.is_empty() {
            self.used_slots -= u64::from(entry.range.end - entry.range.start);
            self.ranges.free_range(entry.range);
        }
    }

    /// Makes the prepared entries visible, in the order of the plan. If the kernel refuses a change, `applied`
    /// says what was done until then.
    fn publish(&mut self, ops: &[Op<'_>], prepared: Vec<Entry>) -> Result<(), DataplaneError> {
        let mut prepared = prepared.into_iter();
        for (done, op) in ops.iter().enumerate() {
            let result = match op {
                Op::SetService { name, .. } => {
                    prepared.next().into_iter().for_each(|entry| self.publish_entry(name, entry));
                    Ok(())
                }
                Op::SetFrontend { frontend, name } => match self.entries.get(*name).map(|entry| entry.id) {
                    Some(id) => self.dataplane.set_frontend(frontend, id),
                    None => Ok(()),
                },
                Op::RemoveFrontend { frontend } => self.dataplane.remove_frontend(frontend),
                Op::RemoveService { name } => {
                    self.remove_entry(name);
                    Ok(())
                }
            };
            if let Err(error) = result {
                let applied = Arc::make_mut(&mut self.applied);
                ops.iter().take(done).for_each(|op| applied.advance(op));
                return Err(error);
            }
        }
        Ok(())
    }

    fn publish_entry(&mut self, name: &ServiceName, entry: Entry) {
        let range = TableRange { base: entry.range.start, length: entry.range.end - entry.range.start };
        let services = self.dataplane.services();
        match self.entries.remove(name) {
            None => {
                let service =
                    Service { table: range.to_word(), cursor: 0, algorithm: entry.algorithm as u8, _pad: [0; 7] };
                services.set(entry.id, service);
            }
            Some(present) => {
                if present.algorithm != entry.algorithm {
                    // Any algorithm works on any table: the two need not change at once. The kernel's cursor starts again.
                    services.set(entry.id, Service { algorithm: entry.algorithm as u8, ..services.get(entry.id) });
                }
                services.publish(entry.id, offset_of!(Service, table), range.to_word());
                self.rest(present, |address| entry.backends.contains_key(address));
            }
        }
        self.entries.insert(name.clone(), entry);
    }

    fn remove_entry(&mut self, name: &ServiceName) {
        if let Some(entry) = self.entries.remove(name) {
            self.dataplane.services().publish(entry.id, offset_of!(Service, table), TableRange::EMPTY.to_word());
            self.resting.push(Resting::Service(entry.id));
            self.rest(entry, |_| false);
        }
    }

    /// Puts aside what an unpublished entry held, but for the backends that live on.
    fn rest(&mut self, entry: Entry, lives_on: impl Fn(&SocketAddr) -> bool) {
        if !entry.range.is_empty() {
            self.resting.push(Resting::Slots(entry.range));
        }
        let gone = entry.backends.iter().filter(|(address, _)| !lives_on(address));
        self.resting.extend(gone.map(|(_, member)| Resting::Backend(member.id)));
    }

    fn full(&self, table: &'static str) -> DataplaneError {
        let (size, flag) = match table {
            "services" => (self.sizes.services, "--max-services"),
            "backends" => (self.sizes.backends, "--max-backends"),
            _ => (self.sizes.slots, "--max-slots"),
        };
        DataplaneError::Full { table, needed: 0, size: u64::from(size), flag }
    }

    /// Says in an error about a full table what the whole change needs, present contents included.
    fn whole_need(&self, error: DataplaneError, ops: &[Op<'_>]) -> DataplaneError {
        let DataplaneError::Full { table, size, flag, .. } = error else { return error };
        let sets = ops.iter().filter_map(|op| match op {
            Op::SetService { name, service } => Some((self.entries.get(*name), *service)),
            _ => None,
        });
        let needed = match table {
            "services" => self.service_ids.used() + sets.filter(|(present, _)| present.is_none()).count() as u64,
            "backends" => {
                let is_new = |present: Option<&Entry>, address: &SocketAddr| {
                    present.is_none_or(|entry| !entry.backends.contains_key(address))
                };
                let new = sets.map(|(present, service)| {
                    service.backends.keys().filter(|address| is_new(present, address)).count() as u64
                });
                self.backend_ids.used() + new.sum::<u64>()
            }
            _ => self.used_slots + sets.map(|(_, service)| n_slots(service)).sum::<u64>(),
        };
        DataplaneError::Full { table, needed, size, flag }
    }
}

/// How many slots a service takes.
fn n_slots(service: &model::Service) -> u64 {
    let candidates: Vec<_> = service
        .backends
        .iter()
        .filter(|(_, weight)| weight.get() > 0)
        .map(|(&address, weight)| Candidate { id: 0, address, weight: weight.get() })
        .collect();
    slots::build(service.algorithm, &candidates).len() as u64
}

/// Gives out the numbers below a limit, low ones first.
#[derive(Debug)]
struct IdPool {
    next: u32,
    free: Vec<u32>,
    size: u32,
}

impl IdPool {
    fn new(size: u32) -> Self {
        Self { next: 0, free: Vec::new(), size }
    }

    fn take(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let id = self.next;
            (id < self.size).then(|| {
                self.next += 1;
                id
            })
        })
    }

    fn free(&mut self, id: u32) {
        self.free.push(id);
    }

    fn used(&self) -> u64 {
        u64::from(self.next) - self.free.len() as u64
    }
}
