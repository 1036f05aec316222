//! Which id, which slots, in which order: from a plan to the contents of the maps.
//!
//! A change is prepared where nobody looks, then published service by service with one 8-byte store each.
//! What it replaces rests until no packet in flight can hold it: [`Tables::reclaim`].
//!
//! A flow remembers id and generation of its backend, and is over, or chooses anew, once they no longer match. The
//! generation is raised as soon as no table word leads to the backend any more, so UDP flows leave it with their next
//! packet; and once more when its id is freed, as a packet that was in flight may have opened a flow in between. A
//! change of weight, conditions or policy does not raise it; one after which a backend takes no new flows is counted as
//! a withdrawal, which only session affinity goes by.

mod audit;
mod former;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap},
    mem::{self, offset_of},
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::Arc,
};

use lb_common::{
    abi::{self, Backend, FlowKey, Service, Slot, TableRange, Whose},
    net::{self, Address, Port},
    select::{prefers_second, slot_index},
};
use range_alloc::RangeAllocator;

pub use self::audit::Drift;
pub(super) use self::audit::audit_keys;
use self::former::{Former, identity};
use super::{
    Dataplane, DataplaneError, Sizes,
    slots::{self, Candidate},
};
use crate::{
    model::{Algorithm, ServiceName, TrafficPolicy},
    plan::{Op, plan},
    policy::{self, Decided, Serving},
};

/// The maps, with the knowledge of what in them is whose.
#[derive(Debug)]
pub struct Tables<D> {
    dataplane: D,
    sizes: Sizes,
    applied: Arc<Decided>,
    /// How many frontends there are of it, and addresses.
    frontends: PerFamily,
    vips: PerFamily,
    entries: HashMap<ServiceName, Entry>,
    service_ids: IdPool,
    backend_ids: IdPool,
    /// By the ids of backends.
    standings: Vec<Standing>,
    ranges: RangeAllocator<u32>,
    used_slots: u64,
    resting: Vec<Resting>,
    /// What rested already when the last wait for packets in flight began, as long as that is underway.
    awaiting: Vec<Resting>,
    /// How many such waits there were.
    waits: u64,
    /// How many backends have rested.
    gone: u64,
    /// What a former agent left, as long as it is not known which services there are to be.
    former: Option<Former>,
}

/// What the maps hold of one service.
#[derive(Clone, Debug)]
struct Entry {
    id: u32,
    serving: Arc<Serving>,
    /// The ids of its backends, in their order.
    ids: Vec<u32>,
    /// The slots of policy Cluster.
    cluster: Range<u32>,
    /// The slots of policy Local.
    local: Range<u32>,
}

/// A backend of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: u32,
    /// What was decided of it.
    pub backend: policy::Backend,
}

/// What flows and session affinity remember of a backend, beside its id: it stays with the id when the backend is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Standing {
    generation: u32,
    withdrawals: u16,
}

/// A wait until no packet in flight can hold what was unpublished before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "what waits is freed when it is over"]
pub struct Wait(u64);

/// What was unpublished, and may still be held by a packet in flight.
#[derive(Debug)]
enum Resting {
    Service(u32),
    Backend(u32),
    Slots(Range<u32>),
}

/// How many entries two tables have that are alike but for the IP family.
#[derive(Clone, Copy, Debug, Default)]
struct PerFamily {
    v4: usize,
    v6: usize,
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
    /// Over maps of these sizes, with all that is in them.
    ///
    /// # Errors
    ///
    /// If they can't be read.
    pub fn open(dataplane: D, sizes: Sizes) -> Result<Self, DataplaneError> {
        let mut tables = Self::new(dataplane, sizes);
        tables.adopt()?;
        Ok(tables)
    }

    /// Over empty maps of these sizes.
    pub fn new(dataplane: D, sizes: Sizes) -> Self {
        Self {
            dataplane,
            sizes,
            applied: Arc::default(),
            frontends: PerFamily::default(),
            vips: PerFamily::default(),
            entries: HashMap::new(),
            service_ids: IdPool::new(sizes.services),
            backend_ids: IdPool::new(sizes.backends),
            standings: vec![Standing::default(); sizes.backends as usize],
            ranges: RangeAllocator::new(0..sizes.slots),
            used_slots: 0,
            resting: Vec::new(),
            awaiting: Vec::new(),
            waits: 0,
            gone: 0,
            former: None,
        }
    }

    /// Makes the maps say what is wanted. Returns how many changes that took.
    ///
    /// # Errors
    ///
    /// [`DataplaneError::Full`] if it does not fit, and then nothing has changed. After any other error what was
    /// done stays, each service whole, and the next call goes on from there.
    pub fn apply(&mut self, wanted: &Arc<Decided>) -> Result<usize, DataplaneError> {
        self.recognize(wanted);
        let applied = Arc::clone(&self.applied);
        let ops = plan(wanted, &applied);
        let prepared = self.prepare(&ops)?;
        self.publish(&ops, prepared)?;
        self.applied = Arc::clone(wanted);
        Ok(ops.len())
    }

    /// Waits until no packet in flight can hold what was unpublished, and makes it free. Does nothing where nothing rests.
    pub fn reclaim(&mut self) -> Result<(), DataplaneError> {
        self.awaiting.append(&mut self.resting);
        if self.awaiting.is_empty() {
            return Ok(());
        }
        // If another wait is underway there is nothing left for it.
        self.waits += 1;
        self.dataplane.wait_for_readers()?;
        self.free(Wait(self.waits));
        Ok(())
    }

    /// For who waits until no packet in flight can hold what was unpublished, while other things go on. `None` where nothing rests, or
    /// such a wait is underway: after that there may be more to wait for.
    pub fn begin_wait(&mut self) -> Option<Wait> {
        if !self.awaiting.is_empty() || self.resting.is_empty() {
            return None;
        }
        mem::swap(&mut self.awaiting, &mut self.resting);
        self.waits += 1;
        Some(Wait(self.waits))
    }

    /// Such a wait has failed: what it was for goes on resting.
    pub fn give_up(&mut self, wait: Wait) {
        if wait == Wait(self.waits) {
            self.resting.append(&mut self.awaiting);
        }
    }

    /// Makes free what was waited for.
    pub fn free(&mut self, wait: Wait) {
        if wait != Wait(self.waits) {
            return;
        }
        for resting in mem::take(&mut self.awaiting) {
            match resting {
                Resting::Service(id) => self.service_ids.free(id),
                Resting::Slots(range) => self.free_slots(range),
                Resting::Backend(id) => {
                    // A packet that had read the slot before the backend left may have read the entry after, and made
                    // a flow of that generation: it must not pass for one of the backend that has the id next.
                    self.retire(id);
                    self.backend_ids.free(id);
                    self.gone += 1;
                }
            }
        }
    }

    /// How many backends have left their services and are held by no program any more, since the beginning.
    pub fn gone(&self) -> u64 {
        self.gone
    }

    /// What the maps say now.
    pub fn applied(&self) -> &Arc<Decided> {
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

    /// How full each table is; of two that are alike but for the IP family, the fuller one.
    pub fn usage(&self) -> [Usage; 6] {
        let Self { sizes, applied, .. } = self;
        let usage = |table, used, size| Usage { table, used, size: u64::from(size) };
        [
            usage("services", self.service_ids.used(), sizes.services),
            usage("frontends", self.frontends.of_fuller(), sizes.frontends()),
            usage("addresses", self.vips.of_fuller(), sizes.vips()),
            usage("source ranges", applied.sources.len() as u64, sizes.source_ranges),
            usage("backends", self.backend_ids.used(), sizes.backends),
            usage("slots", self.used_slots, sizes.slots),
        ]
    }

    /// The backend that the kernel's choice falls on for a new flow with this tuple, of the service that is called so,
    /// among those of a policy: the same functions over the same memory. `random` and `next` are drawn from as the
    /// algorithm needs it.
    pub fn choose<A: Address>(
        &self,
        name: &ServiceName,
        policy: TrafficPolicy,
        key: &FlowKey<A>,
        mut random: impl FnMut() -> u32,
        next: impl FnOnce() -> u32,
    ) -> Option<Backend> {
        let service = self.dataplane.services().get(self.entries.get(name)?.id);
        let range = TableRange::from_word(match policy {
            TrafficPolicy::Cluster => service.cluster,
            TrafficPolicy::Local => service.local,
        });
        if range.length == 0 {
            return None;
        }
        let algorithm = Algorithm::from_raw(service.algorithm);
        let backend_at = |index| self.dataplane.backends().get(self.dataplane.table().get(range.base + index).backend);
        let first = backend_at(slot_index(algorithm, range.length, key, &mut random, next));
        if algorithm != Algorithm::LeastConnections {
            return Some(first);
        }
        let second = backend_at(slot_index(algorithm, range.length, key, &mut random, || 0));
        let is_second = prefers_second(first.load(), second.load());
        Some(if is_second { second } else { first })
    }

    /// The backends of a service, each with its entry in the kernel, where what only the kernel knows of it is counted.
    pub fn members(&self, name: &ServiceName) -> impl Iterator<Item = (SocketAddr, Member, Backend)> {
        let members = self.entries.get(name).into_iter().flat_map(Entry::members);
        members.map(|(address, member)| (address, member, self.dataplane.backends().get(member.id)))
    }

    /// Writes everything new where nobody looks yet; gives it back whole if something doesn't fit.
    fn prepare(&mut self, ops: &[Op<'_>]) -> Result<Vec<Entry>, DataplaneError> {
        self.check_room(ops)?;
        match self.prepare_entries(ops) {
            // What rests may be all that is missing.
            Err(DataplaneError::Full { .. }) if !self.resting.is_empty() || !self.awaiting.is_empty() => {
                self.reclaim()?;
                self.prepare_entries(ops)
            }
            result => result,
        }
    }

    /// Whether what the kernel keeps in maps of its own fits. New entries are added before old ones are removed, so both have to
    /// fit for a moment.
    fn check_room(&self, ops: &[Op<'_>]) -> Result<(), DataplaneError> {
        let Self { sizes, applied, .. } = self;
        let (mut frontends, mut vips, mut sources) = (self.frontends, self.vips, applied.sources.len());
        for op in ops {
            match *op {
                Op::SetFrontend { frontend, .. } if !applied.frontends.contains_key(&frontend) => {
                    *frontends.of(frontend.address.ip()) += 1;
                }
                Op::SetVip { address, .. } if !applied.vips.contains_key(&address) => *vips.of(address) += 1,
                Op::AddSource { .. } => sources += 1,
                _ => {}
            }
        }
        check_size("frontends", frontends.of_fuller(), sizes.frontends(), "--max-services")?;
        check_size("addresses", vips.of_fuller(), sizes.vips(), "--max-services")?;
        check_size("source ranges", sources as u64, sizes.source_ranges, "--max-source-ranges")
    }

    fn prepare_entries(&mut self, ops: &[Op<'_>]) -> Result<Vec<Entry>, DataplaneError> {
        let mut prepared = Vec::new();
        for op in ops {
            let Op::SetService { name, serving } = *op else { continue };
            match self.prepare_entry(name, serving) {
                Ok(entry) => prepared.push((name, entry)),
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

    fn prepare_entry(&mut self, name: &ServiceName, serving: &Arc<Serving>) -> Result<Entry, DataplaneError> {
        let ids = Vec::with_capacity(serving.backends.len());
        let mut entry = Entry { id: u32::MAX, serving: Arc::clone(serving), ids, cluster: 0..0, local: 0..0 };
        // Taken out for the moment, so that ids can be taken meanwhile.
        let present = self.entries.remove(name);
        let filled = self.fill_entry(&mut entry, present.as_ref());
        self.entries.extend(present.map(|present| (name.clone(), present)));
        match filled {
            Ok(()) => Ok(entry),
            Err(error) => {
                self.give_back(name, entry);
                Err(error)
            }
        }
    }

    fn fill_entry(&mut self, entry: &mut Entry, present: Option<&Entry>) -> Result<(), DataplaneError> {
        entry.id = match present {
            Some(present) => present.id,
            None => self.service_ids.take().ok_or(self.full("services"))?,
        };
        for &(address, backend) in &entry.serving.backends {
            let id = match present.and_then(|present| present.member(&address)) {
                Some(member) => member.id,
                None => self.new_backend(entry.id, address, backend)?,
            };
            entry.ids.push(id);
        }
        entry.cluster = self.fill_slots(entry, |backend| backend.in_cluster)?;
        entry.local = self.fill_slots(entry, |backend| backend.in_local)?;
        Ok(())
    }

    /// Lays the backends that take new flows out in a free range.
    fn fill_slots(
        &mut self,
        entry: &Entry,
        takes_new: fn(&policy::Backend) -> bool,
    ) -> Result<Range<u32>, DataplaneError> {
        let slots = slots(&entry.serving, entry.ids.iter().copied(), takes_new);
        if slots.is_empty() {
            return Ok(0..0);
        }
        let length = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        let range = self.ranges.allocate_range(length).map_err(|_full| self.full("slots"))?;
        self.used_slots += u64::from(length);
        for (index, id) in range.clone().zip(slots) {
            self.dataplane.table().set(index, Slot::new(id));
        }
        Ok(range)
    }

    fn new_backend(
        &mut self,
        service: u32,
        address: SocketAddr,
        backend: policy::Backend,
    ) -> Result<u32, DataplaneError> {
        let id = self.backend_ids.take().ok_or(self.full("backends"))?;
        let Standing { generation, withdrawals } = self.standing(id);
        let backend = Backend {
            flows: 0,
            active: 0,
            address: net::words(address.ip()),
            generation,
            port: Port::from_host(address.port()),
            flags: flags(address, backend),
            weight: backend.weight.get(),
            withdrawals,
            service,
        };
        self.dataplane.look_for(address.ip(), Whose::Backends);
        self.dataplane.backends().set(id, backend);
        Ok(id)
    }

    /// Frees what was prepared and never published.
    fn give_back(&mut self, name: &ServiceName, entry: Entry) {
        let present = self.entries.get(name);
        let is_present = present.is_some();
        let is_new = |address| present.is_none_or(|present| present.member(&address).is_none());
        let new: Vec<_> =
            entry.members().filter(|&(address, _)| is_new(address)).map(|(_, member)| member.id).collect();
        for id in new {
            self.retire(id);
            self.backend_ids.free(id);
        }
        if !is_present && entry.id != u32::MAX {
            self.service_ids.free(entry.id);
        }
        for range in [entry.cluster, entry.local] {
            self.free_slots(range);
        }
    }

    fn free_slots(&mut self, range: Range<u32>) {
        if !range.is_empty() {
            self.used_slots -= u64::from(range.end - range.start);
            self.ranges.free_range(range);
        }
    }

    /// Makes the prepared entries visible, in the order of the plan. If the kernel refuses a change, `applied`
    /// says what was done until then.
    fn publish(&mut self, ops: &[Op<'_>], prepared: Vec<Entry>) -> Result<(), DataplaneError> {
        let mut prepared = prepared.into_iter();
        for (done, op) in ops.iter().enumerate() {
            if let Err(error) = self.publish_op(op, &mut prepared) {
                let applied = Arc::make_mut(&mut self.applied);
                ops.iter().take(done).for_each(|op| applied.advance(op));
                let unpublished = ops.iter().skip(done).filter_map(|op| match op {
                    Op::SetService { name, .. } => Some(*name),
                    _ => None,
                });
                unpublished.zip(prepared).for_each(|(name, entry)| self.give_back(name, entry));
                return Err(error);
            }
            self.count(op);
        }
        Ok(())
    }

    /// Counts what was changed in one table of two.
    fn count(&mut self, op: &Op<'_>) {
        match *op {
            Op::SetFrontend { frontend, .. } if !self.applied.frontends.contains_key(&frontend) => {
                *self.frontends.of(frontend.address.ip()) += 1;
            }
            Op::RemoveFrontend { frontend } => *self.frontends.of(frontend.address.ip()) -= 1,
            Op::SetVip { address, .. } if !self.applied.vips.contains_key(&address) => *self.vips.of(address) += 1,
            Op::RemoveVip { address } => *self.vips.of(address) -= 1,
            _ => {}
        }
    }

    fn publish_op(&mut self, op: &Op<'_>, prepared: &mut impl Iterator<Item = Entry>) -> Result<(), DataplaneError> {
        match *op {
            Op::SetService { name, .. } => {
                if let Some(entry) = prepared.next() {
                    self.publish_entry(name, entry);
                }
            }
            Op::AddSource { name, range } => {
                if let Some(entry) = self.entries.get(name) {
                    self.dataplane.add_source(entry.id, &range)?;
                }
            }
            Op::SetFrontend { frontend, route } => {
                if let Some(entry) = self.entries.get(&route.service) {
                    let value = abi::Frontend { service: entry.id, flags: route.flags };
                    self.dataplane.set_frontend(&frontend, value)?;
                }
            }
            Op::SetVip { address, flags } => self.dataplane.set_vip(address, flags)?,
            Op::RemoveVip { address } => self.dataplane.remove_vip(address)?,
            Op::RemoveFrontend { frontend } => self.dataplane.remove_frontend(&frontend)?,
            Op::RemoveSource { name, range } => {
                if let Some(entry) = self.entries.get(name) {
                    self.dataplane.remove_source(entry.id, &range)?;
                }
            }
            Op::RemoveService { name } => self.remove_entry(name),
        }
        Ok(())
    }

    /// A packet reads one of the two table words, so it sees the old set or the new one. What `BACKENDS` says of a
    /// backend that stays is stored apart, and a packet may see that a moment before or after: session affinity may keep
    /// a client where it is for one more flow, and least-connections may compare by the old weight once more.
    fn publish_entry(&mut self, name: &ServiceName, entry: Entry) {
        let (cluster, local) = (word(&entry.cluster), word(&entry.local));
        let services = self.dataplane.services();
        match self.entries.remove(name) {
            None => {
                let (affinity, algorithm) = (entry.serving.affinity, entry.serving.algorithm as u8);
                let name = identity(name).get();
                services.set(entry.id, Service { cluster, local, cursor: 0, name, affinity, algorithm, _pad: [0; 3] });
            }
            Some(present) => {
                // Any algorithm works on any table: the two need not change at once.
                services.publish(entry.id, offset_of!(Service, affinity), settings(&entry.serving));
                services.publish(entry.id, offset_of!(Service, cluster), cluster);
                services.publish(entry.id, offset_of!(Service, local), local);
                for (address, member) in entry.members() {
                    if present.member(&address).is_some_and(|before| before.backend != member.backend) {
                        let before = self.dataplane.backends().get(member.id);
                        let (flags, weight) = (flags(address, member.backend), member.backend.weight.get());
                        let after = Backend { flags, weight, ..before };
                        if before.takes_new() && !after.takes_new() {
                            self.change_standing(member.id, |it| it.withdrawals = it.withdrawals.wrapping_add(1));
                        }
                        self.store(member.id, after);
                    }
                }
                self.rest(present, |address| entry.member(address).is_some());
            }
        }
        self.entries.insert(name.clone(), entry);
    }

    fn remove_entry(&mut self, name: &ServiceName) {
        if let Some(entry) = self.entries.remove(name) {
            let services = self.dataplane.services();
            services.publish(entry.id, offset_of!(Service, cluster), TableRange::EMPTY.to_word());
            services.publish(entry.id, offset_of!(Service, local), TableRange::EMPTY.to_word());
            services.publish(entry.id, offset_of!(Service, name), 0);
            self.resting.push(Resting::Service(entry.id));
            self.rest(entry, |_| false);
        }
    }

    /// Puts aside what an unpublished entry held, but for the backends that live on. The flows of the others that end
    /// with their backend do so from now on.
    fn rest(&mut self, entry: Entry, lives_on: impl Fn(&SocketAddr) -> bool) {
        for (_, member) in entry.members().filter(|(address, _)| !lives_on(address)) {
            self.retire(member.id);
            self.resting.push(Resting::Backend(member.id));
        }
        for range in [entry.cluster, entry.local] {
            if !range.is_empty() {
                self.resting.push(Resting::Slots(range));
            }
        }
    }

    /// Ends the UDP flows to a backend that has left, and session affinity with it: they remember another generation.
    fn retire(&mut self, id: u32) {
        self.change_standing(id, |standing| standing.generation = standing.generation.wrapping_add(1));
        self.store(id, Backend { flags: 0, weight: 0, ..self.dataplane.backends().get(id) });
    }

    /// Stores what the agent says of a backend that packets may be using, each word at once, and how its id stands. What the kernel
    /// counts stays.
    fn store(&self, id: u32, backend: Backend) {
        let Backend { generation, port, flags, weight, withdrawals, service, .. } = self.standing(id).of(backend);
        let ([g0, g1, g2, g3], [p0, p1], [f0, f1]) = (generation.to_ne_bytes(), port.to_bytes(), flags.to_ne_bytes());
        let ([w0, w1], [x0, x1], [s0, s1, s2, s3]) =
            (weight.to_ne_bytes(), withdrawals.to_ne_bytes(), service.to_ne_bytes());
        let first = u64::from_ne_bytes([g0, g1, g2, g3, p0, p1, f0, f1]);
        let second = u64::from_ne_bytes([w0, w1, x0, x1, s0, s1, s2, s3]);
        self.dataplane.backends().publish(id, offset_of!(Backend, generation), first);
        self.dataplane.backends().publish(id, offset_of!(Backend, weight), second);
    }

    fn standing(&self, id: u32) -> Standing {
        self.standings.get(id as usize).copied().unwrap_or_default()
    }

    fn change_standing(&mut self, id: u32, change: impl FnOnce(&mut Standing)) {
        self.standings.get_mut(id as usize).map(change).unwrap_or_default();
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
        let sets = ops.iter().filter_map(|op| match *op {
            Op::SetService { name, serving } => Some((self.entries.get(name), serving)),
            _ => None,
        });
        let needed = match table {
            "services" => self.service_ids.used() + sets.filter(|(present, _)| present.is_none()).count() as u64,
            "backends" => {
                let is_new = |present: Option<&Entry>, address: &SocketAddr| {
                    present.is_none_or(|entry| entry.member(address).is_none())
                };
                let new = sets.map(|(present, serving)| {
                    serving.backends.iter().filter(|(address, _)| is_new(present, address)).count() as u64
                });
                self.backend_ids.used() + new.sum::<u64>()
            }
            _ => self.used_slots + sets.map(|(_, serving)| n_slots(serving)).sum::<u64>(),
        };
        DataplaneError::Full { table, needed, size, flag }
    }
}

impl Standing {
    /// A backend as it is with an id that stands so.
    fn of(self, backend: Backend) -> Backend {
        let Self { generation, withdrawals } = self;
        Backend { generation, withdrawals, ..backend }
    }
}

impl Entry {
    /// Its backends; of an entry that is not filled yet, those that have an id.
    fn members(&self) -> impl Iterator<Item = (SocketAddr, Member)> {
        self.serving.backends.iter().zip(&self.ids).map(|(&(address, backend), &id)| (address, Member { id, backend }))
    }

    fn member(&self, address: &SocketAddr) -> Option<Member> {
        let found = self.serving.backends.binary_search_by_key(address, |&(address, _)| address).ok()?;
        let (_, backend) = *self.serving.backends.get(found)?;
        self.ids.get(found).map(|&id| Member { id, backend })
    }
}

fn check_size(table: &'static str, needed: u64, size: u32, flag: &'static str) -> Result<(), DataplaneError> {
    let size = u64::from(size);
    if needed > size { Err(DataplaneError::Full { table, needed, size, flag }) } else { Ok(()) }
}

impl PerFamily {
    fn count(addresses: impl Iterator<Item = IpAddr>) -> Self {
        let mut counts = Self::default();
        addresses.for_each(|address| *counts.of(address) += 1);
        counts
    }

    /// That of an address's family.
    fn of(&mut self, address: IpAddr) -> &mut usize {
        if address.is_ipv4() { &mut self.v4 } else { &mut self.v6 }
    }

    fn of_fuller(self) -> u64 {
        self.v4.max(self.v6) as u64
    }
}

/// A range of slots as a service's entry has it.
fn word(range: &Range<u32>) -> u64 {
    TableRange { base: range.start, length: range.end - range.start }.to_word()
}

/// The last word of a service's entry: affinity and algorithm.
fn settings(serving: &Serving) -> u64 {
    settings_word(serving.affinity, serving.algorithm as u8)
}

fn settings_word(affinity: u32, algorithm: u8) -> u64 {
    let [a, b, c, d] = affinity.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, algorithm, 0, 0, 0])
}

/// What was decided of a backend, as its entry says it.
fn flags(address: SocketAddr, backend: policy::Backend) -> u16 {
    let flag = |is_set, flag| if is_set { flag } else { 0 };
    Backend::TAKEN
        | flag(address.is_ipv6(), Backend::IPV6)
        | flag(backend.is_on_node, Backend::ON_NODE)
        | flag(backend.in_cluster, Backend::IN_CLUSTER)
        | flag(backend.in_local, Backend::IN_LOCAL)
}

/// The slots of those backends that take new flows, for backends of these ids.
fn slots(serving: &Serving, ids: impl Iterator<Item = u32>, takes_new: fn(&policy::Backend) -> bool) -> Vec<u32> {
    let eligible = serving.backends.iter().zip(ids).filter(|((_, backend), _)| takes_new(backend));
    let candidates = eligible.map(|(&(address, backend), id)| Candidate { id, address, weight: backend.weight.get() });
    slots::build(serving.algorithm, &candidates.collect::<Vec<_>>())
}

/// How many slots a service takes.
fn n_slots(serving: &Serving) -> u64 {
    let n_slots = |takes_new| slots(serving, 0.., takes_new).len() as u64;
    n_slots(|backend| backend.in_cluster) + n_slots(|backend| backend.in_local)
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

    /// Takes these, of which none was taken before.
    fn take_all(&mut self, ids: impl Iterator<Item = u32>) {
        let taken: BTreeSet<_> = ids.collect();
        self.next = taken.last().map_or(0, |last| last + 1);
        // The lowest one last, which is given out first.
        self.free = (0..self.next).rev().filter(|id| !taken.contains(id)).collect();
    }

    fn free(&mut self, id: u32) {
        self.free.push(id);
    }

    fn used(&self) -> u64 {
        u64::from(self.next) - self.free.len() as u64
    }
}
