//! The garbage collector: removes flows that are over and that no packet will ever meet again, and counts the living.
//!
//! The programs remove an entry that is over when a packet meets it, and the kernel evicts the least recently used one
//! where there is no room. What neither sees would fill the table with the dead, and count for its backend under
//! least-connections. A pass over both tables is made in steps of bounded time, between which the agent does other things.

use std::{
    collections::HashMap,
    mem::offset_of,
    time::{Duration, Instant},
};

use lb_common::{
    abi::{Backend, Flow, FlowKey},
    flow::{Direction, State, Tick, Timeouts},
    net::{Address, IpProto, Ipv4Be, Ipv6Be},
};

use super::{DataplaneError, region::Region};

/// A table of flows that others change while it is read.
pub trait FlowTable<A: Address> {
    /// Reads some entries from a place on, which `None` puts at the beginning, in place of what the chunk had. Gives the
    /// place to go on, `None` at the end.
    fn read(&mut self, cursor: Option<u32>, chunk: &mut Chunk<A>) -> Result<Option<u32>, DataplaneError>;
    /// An entry as it is now.
    fn get(&self, key: &FlowKey<A>) -> Result<Option<Flow<A>>, DataplaneError>;
    /// Removes an entry; it may be gone already.
    fn remove(&mut self, key: &FlowKey<A>) -> Result<(), DataplaneError>;
}

/// Some entries: each key with the flow at the same place.
#[derive(Debug)]
pub struct Chunk<A: Address> {
    /// The keys.
    pub keys: Vec<FlowKey<A>>,
    /// Their entries.
    pub flows: Vec<Flow<A>>,
}

/// Whether a pass goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do.
    Underway,
    /// The pass is over; the next step begins another one.
    Done,
}

/// What a pass saw and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Entries of the IPv4 table that were there.
    pub entries4: u64,
    /// Entries of the IPv6 table that were there.
    pub entries6: u64,
    /// Flows that were removed.
    pub removed: u64,
    /// How long the agent was busy with it.
    pub busy: Duration,
}

/// The collector, somewhere in a pass or between two.
#[derive(Debug)]
pub struct Collector {
    timeouts: Timeouts,
    place: Place,
    census: Census,
    chunk4: Chunk<Ipv4Be>,
    chunk6: Chunk<Ipv6Be>,
    pass: Pass,
    last: Option<Pass>,
    passes: u64,
    removed: u64,
}

/// Where a pass is.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// Noting what the backends' counts are, from this id on.
    Backends(u32),
    /// In the IPv4 table.
    V4(Option<u32>),
    /// In the IPv6 table.
    V6(Option<u32>),
    /// Correcting counts.
    Counts,
}

/// The living flows of each backend that has some, or has a count.
#[derive(Debug, Default)]
struct Census(HashMap<u32, Count>);

#[derive(Clone, Copy, Debug)]
struct Count {
    generation: u32,
    /// What the kernel counted when the pass began.
    before: u64,
    /// How many the pass has seen.
    seen: u64,
}

impl Collector {
    /// With these timeouts, which have to be those of the programs.
    pub fn new(timeouts: Timeouts) -> Self {
        Self {
            timeouts,
            place: Place::Backends(0),
            census: Census::default(),
            chunk4: Chunk::default(),
            chunk6: Chunk::default(),
            pass: Pass::default(),
            last: None,
            passes: 0,
            removed: 0,
        }
    }

    /// The last whole pass.
    pub fn last(&self) -> Option<&Pass> {
        self.last.as_ref()
    }

    /// How many whole passes there were.
    pub fn passes(&self) -> u64 {
        self.passes
    }

    /// How many flows all whole passes removed.
    pub fn removed(&self) -> u64 {
        self.removed
    }

    /// Goes on with the pass, or begins one, for about as long as said and at least one chunk.
    pub fn step(
        &mut self,
        v4: &mut impl FlowTable<Ipv4Be>,
        v6: &mut impl FlowTable<Ipv6Be>,
        backends: &Region<Backend>,
        now: Tick,
        budget: Duration,
    ) -> Result<Progress, DataplaneError> {
        let begin = Instant::now();
        loop {
            let result = self.advance(v4, v6, backends, now);
            let busy = begin.elapsed();
            if !matches!(result, Ok(Progress::Underway)) || busy >= budget {
                self.pass.busy += busy;
                if !matches!(result, Ok(Progress::Underway)) {
                    self.finish(result.is_ok());
                }
                return result;
            }
        }
    }

    /// One chunk.
    fn advance(
        &mut self,
        v4: &mut impl FlowTable<Ipv4Be>,
        v6: &mut impl FlowTable<Ipv6Be>,
        backends: &Region<Backend>,
        now: Tick,
    ) -> Result<Progress, DataplaneError> {
        let mut sweep = Sweep { timeouts: self.timeouts, now, backends, census: &mut self.census };
        match self.place {
            Place::Backends(from) => {
                let until = from.saturating_add(BACKENDS_AT_ONCE).min(backends.length());
                sweep.census.begin(from..until, backends);
                self.place = if until < backends.length() { Place::Backends(until) } else { Place::V4(None) };
            }
            Place::V4(cursor) => {
                let next = v4.read(cursor, &mut self.chunk4)?;
                self.pass.entries4 += self.chunk4.keys.len() as u64;
                self.pass.removed += sweep.chunk(&self.chunk4, v4)?;
                self.place = next.map_or(Place::V6(None), |next| Place::V4(Some(next)));
            }
            Place::V6(cursor) => {
                let next = v6.read(cursor, &mut self.chunk6)?;
                self.pass.entries6 += self.chunk6.keys.len() as u64;
                self.pass.removed += sweep.chunk(&self.chunk6, v6)?;
                self.place = next.map_or(Place::Counts, |next| Place::V6(Some(next)));
            }
            Place::Counts => {
                if sweep.census.correct(BACKENDS_AT_ONCE, backends) {
                    return Ok(Progress::Done);
                }
            }
        }
        Ok(Progress::Underway)
    }

    /// Ends a pass; one that failed is forgotten.
    fn finish(&mut self, whole: bool) {
        self.place = Place::Backends(0);
        self.census.0.clear();
        let pass = std::mem::take(&mut self.pass);
        if whole {
            self.passes += 1;
            self.removed += pass.removed;
            self.last = Some(pass);
        }
    }
}

/// How many backends are looked at between two looks at the clock: less than a millisecond's worth.
const BACKENDS_AT_ONCE: u32 = 8192;

/// What one chunk is judged by.
struct Sweep<'a> {
    timeouts: Timeouts,
    now: Tick,
    backends: &'a Region<Backend>,
    census: &'a mut Census,
}

impl Sweep<'_> {
    /// Removes what is over, counts the rest. Gives the number of flows removed.
    fn chunk<A: Address>(&mut self, chunk: &Chunk<A>, table: &mut impl FlowTable<A>) -> Result<u64, DataplaneError> {
        let mut removed = 0;
        for (key, flow) in chunk.keys.iter().zip(&chunk.flows) {
            if self.may_be_over(key, flow) && self.remove(key, table)? {
                removed += 1;
            } else if flow.direction() == Direction::Request && flow.state() != State::Closing {
                self.census.count(flow.backend, flow.generation, self.backends);
            }
        }
        Ok(removed)
    }

    fn may_be_over<A: Address>(&self, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
        flow.is_expired(self.now, &self.timeouts) || self.has_lost_its_backend(key, flow)
    }

    /// A UDP flow whose backend has left its service is over; a TCP connection goes on.
    fn has_lost_its_backend<A: Address>(&self, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
        key.proto == IpProto::UDP
            && (flow.backend >= self.backends.length() || self.backends.get(flow.backend).generation != flow.generation)
    }

    /// Removes both entries of a flow if it is over, going by what they say right now: time has passed since they were
    /// read. A flow is over when both are idle, or have no backend. Where the other entry is gone, or belongs to another
    /// flow by now, this one goes alone.
    fn remove<A: Address>(&self, key: &FlowKey<A>, table: &mut impl FlowTable<A>) -> Result<bool, DataplaneError> {
        let Some(flow) = table.get(key)? else { return Ok(false) };
        if !self.may_be_over(key, &flow) {
            return Ok(false);
        }
        let other_key = flow.answer(key.proto);
        let other = table.get(&other_key)?.filter(|other| other.leads_to(key));
        if let Some(other) = other {
            if !self.may_be_over(&other_key, &other) {
                return Ok(false);
            }
            table.remove(&other_key)?;
        }
        table.remove(key)?;
        Ok(true)
    }
}

impl Census {
    /// Notes the counts of these backends, before their flows are seen.
    fn begin(&mut self, ids: std::ops::Range<u32>, backends: &Region<Backend>) {
        for id in ids {
            let Backend { active, generation, .. } = backends.get(id);
            if active != 0 {
                self.0.insert(id, Count { generation, before: active, seen: 0 });
            }
        }
    }

    /// Counts a living flow.
    fn count(&mut self, id: u32, generation: u32, backends: &Region<Backend>) {
        if id < backends.length() {
            let count = self.0.entry(id).or_insert_with(|| {
                let Backend { active, generation, .. } = backends.get(id);
                Count { generation, before: active, seen: 0 }
            });
            if count.generation == generation {
                count.seen += 1;
            }
        }
    }

    /// Corrects some of the counts that the kernel keeps. Says whether that was the last of them.
    fn correct(&mut self, at_most: u32, backends: &Region<Backend>) -> bool {
        let some: Vec<_> = self.0.keys().copied().take(at_most as usize).collect();
        for id in some {
            let Some(count) = self.0.remove(&id) else { continue };
            let now = backends.get(id);
            let difference = drift(count.before, now.active, count.seen);
            // A freed id's count is of no use, and the next one to get the id begins at zero.
            if now.generation == count.generation && difference != 0 {
                backends.add(id, offset_of!(Backend, active), difference);
            }
        }
        self.0.is_empty()
    }
}

/// How wrong a count is that was `before` when the pass began and is `after` now, if the pass has seen so many flows.
/// Between the two any number may be right, as flows come and go during a pass.
fn drift(before: u64, after: u64, seen: u64) -> i64 {
    seen.cast_signed() - seen.clamp(before.min(after), before.max(after)).cast_signed()
}

impl<A: Address> Default for Chunk<A> {
    fn default() -> Self {
        Self { keys: Vec::new(), flows: Vec::new() }
    }
}

#[cfg(test)]
mod tests;
