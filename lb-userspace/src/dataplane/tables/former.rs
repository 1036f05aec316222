//! What the maps say already when an agent starts: read back, so that ids, sets and flows go on as they were.
//!
//! The maps don't hold the names of services, only a hash of each. So what was found has no names until a source has said
//! what there is to be: until then it stays as it is.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hasher as _,
    net::{IpAddr, SocketAddr},
    num::NonZeroU64,
    ops::Range,
    sync::Arc,
};

use fnv::FnvHasher;
use ipnet::IpNet;
use lb_common::{
    abi::{self, Backend, TableRange, Whose},
    net::{Address as _, Ipv4Be, Ipv6Be},
    select::Algorithm,
};

use super::{Entry, PerFamily, Standing, Tables, slots};
use crate::{
    dataplane::{Dataplane, DataplaneError},
    model::{Frontend, IpFamily, Protocol, ServiceName, Weight},
    policy::{self, Decided, Route, Serving},
};

/// What a former agent left.
#[derive(Debug, Default)]
pub(super) struct Former {
    services: BTreeMap<u32, FormerService>,
    frontends: BTreeMap<Frontend, abi::Frontend>,
    vips: BTreeMap<IpAddr, u32>,
    sources: BTreeSet<(u32, IpNet)>,
}

/// One service of a former agent.
#[derive(Debug)]
struct FormerService {
    identity: u64,
    entry: Entry,
    /// Whether its slots are those that its backends make: an agent may have been killed in the middle of a change.
    is_whole: bool,
}

/// By what a service is known in the maps.
pub(super) fn identity(name: &ServiceName) -> NonZeroU64 {
    let mut hasher = FnvHasher::default();
    // No part has a zero in it, and how `derive(Hash)` would do it may change from one compiler to the next.
    for part in [&*name.name, &*name.port, &name.protocol.to_string(), &name.family.to_string()] {
        hasher.write(part.as_bytes());
        hasher.write_u8(0);
    }
    NonZeroU64::new(hasher.finish()).unwrap_or(NonZeroU64::MIN)
}

impl Former {
    /// Reads what is in the maps.
    fn read(dataplane: &impl Dataplane) -> Result<Self, DataplaneError> {
        let (frontends, vips, sources) = (dataplane.frontends()?, dataplane.vips()?, dataplane.sources()?);
        let sources: BTreeSet<_> = sources.into_iter().filter_map(|(range, family)| range.range(family)).collect();
        let mut backends = backends(dataplane);
        // Only drift could make frontends or sources of a service that there is not; it is removed like others.
        let mentioned = frontends.values().map(|frontend| frontend.service).chain(sources.iter().map(|(id, _)| *id));
        let mut ids: BTreeSet<u32> = mentioned.filter(|&id| id < dataplane.services().length()).collect();
        ids.extend((0..dataplane.services().length()).filter(|&id| dataplane.services().get(id).name != 0));
        let mut taken = BTreeMap::new();
        let services = ids
            .into_iter()
            .map(|id| (id, FormerService::read(dataplane, id, backends.remove(&id).unwrap_or_default(), &mut taken)))
            .collect();
        Ok(Self { services, frontends, vips, sources })
    }

    fn is_empty(&self) -> bool {
        self.services.is_empty() && self.frontends.is_empty() && self.vips.is_empty() && self.sources.is_empty()
    }
}

impl FormerService {
    /// Reads one service; `taken` is the ranges of those before it, by where they begin, with their ends.
    fn read(
        dataplane: &impl Dataplane,
        id: u32,
        backends: BTreeMap<SocketAddr, (u32, Backend)>,
        taken: &mut BTreeMap<u32, u32>,
    ) -> Self {
        let service = dataplane.services().get(id);
        let (mut range_is_good, size) = (true, dataplane.table().length());
        let mut range = |word| {
            let TableRange { base, length } = TableRange::from_word(word);
            let range = base..base.saturating_add(length);
            let before = taken.range(..range.end).next_back().map(|(_, &end)| end);
            // Only drift makes a range that is outside, or another's.
            let is_good = length == 0 || range.end <= size && before.is_none_or(|end| end <= base);
            range_is_good &= is_good;
            if length == 0 || !is_good {
                return 0..0;
            }
            taken.insert(range.start, range.end);
            range
        };
        let (cluster, local) = (range(service.cluster), range(service.local));
        let ids = backends.values().map(|&(id, _)| id).collect();
        let backends = backends.into_iter().map(|(address, (_, backend))| (address, decided(&backend))).collect();
        let (algorithm, affinity) = (Algorithm::from_raw(service.algorithm), service.affinity);
        let entry = Entry { id, serving: Arc::new(Serving { algorithm, affinity, backends }), ids, cluster, local };
        let is_whole = range_is_good
            && algorithm as u8 == service.algorithm
            && has_slots(dataplane, &entry, &entry.cluster, |backend| backend.in_cluster)
            && has_slots(dataplane, &entry, &entry.local, |backend| backend.in_local);
        Self { identity: service.name, entry, is_whole }
    }

    /// The name of which the maps have the hash, or one that says that nobody knows it any more.
    fn name(&self, known: &HashMap<u64, &ServiceName>) -> ServiceName {
        known.get(&self.identity).map_or_else(
            || ServiceName {
                name: format!("service {} of a former agent", self.entry.id).into(),
                port: "".into(),
                protocol: Protocol::Tcp,
                family: IpFamily::V4,
            },
            |&name| name.clone(),
        )
    }
}

impl<D: Dataplane> Tables<D> {
    /// Takes over what a former agent left in the maps, which nobody else changes.
    pub(super) fn adopt(&mut self) -> Result<(), DataplaneError> {
        let former = Former::read(&self.dataplane)?;
        let entries = || former.services.values().map(|service| &service.entry);
        self.service_ids.take_all(entries().map(|entry| entry.id));
        self.backend_ids.take_all(entries().flat_map(|entry| entry.ids.iter().copied()));
        self.take_slots(entries().flat_map(|entry| [entry.cluster.clone(), entry.local.clone()]));
        for (standing, id) in self.standings.iter_mut().zip(0..) {
            let Backend { generation, withdrawals, .. } = self.dataplane.backends().get(id);
            *standing = Standing { generation, withdrawals };
        }
        // Ids that the former agent was about to give back: a packet may have made a flow of the backend just before.
        let ids: BTreeSet<_> = entries().flat_map(|entry| entry.ids.iter().copied()).collect();
        for id in (0..self.dataplane.backends().length()).filter(|id| !ids.contains(id)) {
            if self.standing(id).generation != 0 {
                self.retire(id);
            }
        }
        self.look_for_all(&former);
        self.former = (!former.is_empty()).then_some(former);
        Ok(())
    }

    /// Has the programs look for what they find in the tables: the bits may be lost, and what is there already is not set again.
    fn look_for_all(&self, former: &Former) {
        let frontends = former.frontends.keys().map(|frontend| frontend.address.ip());
        frontends.chain(former.vips.keys().copied()).for_each(|it| self.dataplane.look_for(it, Whose::Services));
        let members = former.services.values().flat_map(|service| service.entry.members());
        members.for_each(|(address, _)| self.dataplane.look_for(address.ip(), Whose::Backends));
    }

    /// Now that it is known which services there are to be, makes those of the former agent that are among them theirs. The
    /// others get names that nobody wants, and so will be removed.
    pub(super) fn recognize(&mut self, wanted: &Decided) {
        let Some(former) = self.former.take() else { return };
        let known: HashMap<_, _> = wanted.services.keys().map(|name| (identity(name).get(), name)).collect();
        let mut applied = Decided { vips: former.vips.into(), ..Decided::default() };
        let mut names = BTreeMap::new();
        for (id, service) in former.services {
            let name = service.name(&known);
            // One that is not whole counts as not applied, so that the plan sets it anew.
            if service.is_whole || !wanted.services.contains_key(&name) {
                applied.services.insert(name.clone(), Arc::clone(&service.entry.serving));
            }
            self.entries.insert(name.clone(), service.entry);
            names.insert(id, name);
        }
        applied.frontends = former
            .frontends
            .into_iter()
            .filter_map(|(frontend, value)| {
                let service = names.get(&value.service)?.clone();
                Some((frontend, Route { service, flags: value.flags }))
            })
            .collect();
        // One of the other family was written over: to be removed it would be by the key of the one that is wanted.
        let is_good = |(name, range): &(ServiceName, IpNet)| {
            !wanted.services.contains_key(name) || IpFamily::of(range.addr()) == name.family
        };
        let sources = former.sources.into_iter().filter_map(|(id, range)| Some((names.get(&id)?.clone(), range)));
        applied.sources = sources.filter(is_good).collect();
        self.frontends = PerFamily::count(applied.frontends.keys().map(|frontend| frontend.address.ip()));
        self.vips = PerFamily::count(applied.vips.keys().copied());
        self.applied = Arc::new(applied);
    }

    /// Marks ranges as used, which don't overlap.
    fn take_slots(&mut self, ranges: impl Iterator<Item = Range<u32>>) {
        let mut ranges: Vec<_> = ranges.filter(|range| !range.is_empty()).collect();
        ranges.sort_by_key(|range| range.start);
        // The allocator gives out what it likes: so it gives all, and gets back what lies between.
        let Ok(all) = self.ranges.allocate_range(self.sizes.slots) else { return };
        let mut free_from = all.start;
        for range in ranges {
            self.used_slots += u64::from(range.end - range.start);
            if free_from < range.start {
                self.ranges.free_range(free_from..range.start);
            }
            free_from = range.end;
        }
        if free_from < all.end {
            self.ranges.free_range(free_from..all.end);
        }
    }
}

/// The backends in the maps: those of each service by address. Of two with one address, which only drift makes, the first.
fn backends(dataplane: &impl Dataplane) -> HashMap<u32, BTreeMap<SocketAddr, (u32, Backend)>> {
    let mut all: HashMap<u32, BTreeMap<_, _>> = HashMap::new();
    for id in 0..dataplane.backends().length() {
        let backend = dataplane.backends().get(id);
        if backend.flags & Backend::TAKEN != 0 {
            all.entry(backend.service).or_default().entry(address(&backend)).or_insert((id, backend));
        }
    }
    all
}

/// Where a backend listens.
pub(super) fn address(backend: &Backend) -> SocketAddr {
    let ip: IpAddr = match backend.flags & Backend::IPV6 {
        0 => Ipv4Be::from_words(backend.address).into(),
        _ => Ipv6Be::from_words(backend.address).into(),
    };
    SocketAddr::new(ip, backend.port.to_host())
}

/// What was decided of a backend.
fn decided(backend: &Backend) -> policy::Backend {
    let has = |flag| backend.flags & flag != 0;
    policy::Backend {
        // No entry of ours has more than the maximum.
        weight: Weight::new(backend.weight).unwrap_or(Weight::ONE),
        is_on_node: has(Backend::ON_NODE),
        in_cluster: has(Backend::IN_CLUSTER),
        in_local: has(Backend::IN_LOCAL),
    }
}

/// Whether a range has the slots that a service's backends make.
fn has_slots(
    dataplane: &impl Dataplane,
    entry: &Entry,
    range: &Range<u32>,
    takes_new: fn(&policy::Backend) -> bool,
) -> bool {
    let slots = slots(&entry.serving, entry.ids.iter().copied(), takes_new);
    slots.into_iter().eq(range.clone().map(|index| dataplane.table().get(index).backend))
}
