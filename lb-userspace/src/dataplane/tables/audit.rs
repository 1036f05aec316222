//! Whether the maps say what they were made to say: somebody else may have written to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    mem::{offset_of, size_of},
    net::IpAddr,
};

use lb_common::{
    abi::{self, Backend, Service, Slot, Whose},
    net,
};

use super::{Entry, Tables, flags, former::address, identity, settings, settings_word, slots, word};
use crate::{
    dataplane::{
        Dataplane, DataplaneError,
        sources::{SourceRange, family},
    },
    model::{Frontend, ServiceName},
};

/// Where the words of a service's entry are that the agent writes.
const WORDS: [usize; 4] = [
    offset_of!(Service, cluster),
    offset_of!(Service, local),
    offset_of!(Service, name),
    offset_of!(Service, affinity),
];

/// A place where a map does not say what it was made to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// The map, or the two of both families.
    pub map: &'static str,
    /// Which entry.
    pub entry: String,
    /// What it was made to say.
    pub expected: String,
    /// What it says.
    pub found: String,
}

impl Drift {
    fn new(map: &'static str, entry: impl fmt::Display, expected: impl fmt::Display, found: impl fmt::Display) -> Self {
        Self { map, entry: entry.to_string(), expected: expected.to_string(), found: found.to_string() }
    }
}

impl<D: Dataplane> Tables<D> {
    /// Looks for drift in everything that the agent writes, and puts it right if that is asked for. What only the programs write
    /// can't be told from what it should be. Finds none as long as it is not known which services there are to be.
    ///
    /// # Errors
    ///
    /// If a map can't be read, or repaired.
    pub fn audit(&mut self, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
        if !self.knows_services() {
            return Ok(Vec::new());
        }
        let mut drift = self.audit_services(repair);
        drift.extend(self.audit_backends(repair));
        drift.extend(self.audit_replies(repair));
        drift.extend(self.audit_slots(repair));
        drift.extend(self.audit_frontends(repair)?);
        drift.extend(self.audit_vips(repair)?);
        drift.extend(self.audit_sources(repair)?);
        Ok(drift)
    }

    /// Whether it is known which services there are to be, and so what the maps are to say.
    pub fn knows_services(&self) -> bool {
        self.former.is_none()
    }

    /// How many entries an audit looks at.
    pub fn audited(&self) -> u64 {
        if !self.knows_services() {
            return 0;
        }
        let applied = &self.applied;
        let in_hashes = applied.frontends.len() + applied.vips.len() + applied.sources.len();
        in_hashes as u64 + self.service_ids.used() + self.backend_ids.used() + self.used_slots
    }

    fn audit_services(&self, repair: bool) -> Vec<Drift> {
        let words = |name: &ServiceName, entry: &Entry| {
            [word(&entry.cluster), word(&entry.local), identity(name).get(), settings(&entry.serving)]
        };
        let expected: BTreeMap<_, _> =
            self.entries.iter().map(|(name, entry)| (entry.id, words(name, entry))).collect();
        let services = self.dataplane.services();
        let mut drift = Vec::new();
        for id in 0..services.length() {
            let Service { cluster, local, name, affinity, algorithm, .. } = services.get(id);
            let found = [cluster, local, name, settings_word(affinity, algorithm)];
            // Of an id that nobody has only that matters: an agent that starts again goes by it.
            let wanted = expected.get(&id).copied().unwrap_or([cluster, local, 0, settings_word(affinity, algorithm)]);
            if found != wanted {
                drift.push(Drift::new("SERVICE", id, format_args!("{wanted:x?}"), format_args!("{found:x?}")));
                for (offset, word) in WORDS.into_iter().zip(wanted).filter(|_| repair) {
                    services.publish(id, offset, word);
                }
            }
        }
        drift
    }

    fn audit_backends(&self, repair: bool) -> Vec<Drift> {
        let members = self.entries.values().flat_map(|entry| {
            entry.members().map(|(address, member)| (member.id, (entry.id, address, member.backend)))
        });
        let expected: BTreeMap<_, _> = members.collect();
        let backends = self.dataplane.backends();
        let mut drift = Vec::new();
        for id in 0..backends.length() {
            let found = backends.get(id);
            let wanted = self.standing(id).of(match expected.get(&id) {
                Some(&(service, address, backend)) => Backend {
                    address: net::words(address.ip()),
                    port: net::Port::from_host(address.port()),
                    flags: flags(address, backend),
                    weight: backend.weight.get(),
                    service,
                    ..found
                },
                None => Backend { flags: found.flags & !Backend::TAKEN, ..found },
            });
            if found != wanted {
                drift.push(Drift::new("BACKENDS", id, described(&wanted), described(&found)));
                if repair {
                    let [first, second] = wanted.address;
                    backends.publish(id, offset_of!(Backend, address), first);
                    backends.publish(id, offset_of!(Backend, address) + size_of::<u64>(), second);
                    self.store(id, wanted);
                }
            }
        }
        drift
    }

    /// A backend from whose address the programs look for no replies has none.
    fn audit_replies(&self, repair: bool) -> Vec<Drift> {
        let members = self.entries.values().flat_map(Entry::members);
        let addresses: BTreeSet<_> = members.map(|(address, _)| address.ip()).collect();
        let missed = addresses.into_iter().filter(|&it| !self.dataplane.is_looked_for(it, Whose::Backends));
        let drift = |address| {
            if repair {
                self.dataplane.look_for(address, Whose::Backends);
            }
            Drift::new("ADDRESS_BITS", address, "a backend's", "nobody's")
        };
        missed.map(drift).collect()
    }

    fn audit_slots(&self, repair: bool) -> Vec<Drift> {
        let mut drift = Vec::new();
        for entry in self.entries.values() {
            let ids = || entry.ids.iter().copied();
            let cluster = slots(&entry.serving, ids(), |backend| backend.in_cluster);
            let local = slots(&entry.serving, ids(), |backend| backend.in_local);
            let places = entry.cluster.clone().chain(entry.local.clone());
            for (index, id) in places.zip(cluster.into_iter().chain(local)) {
                let found = self.dataplane.table().get(index).backend;
                if found != id {
                    drift.push(Drift::new("TABLE", index, id, found));
                    if repair {
                        self.dataplane.table().set(index, Slot::new(id));
                    }
                }
            }
        }
        drift
    }

    fn audit_frontends(&mut self, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
        let expected = self.applied.frontends.iter().filter_map(|(&frontend, route)| {
            let service = self.entries.get(&route.service)?.id;
            Some((frontend, abi::Frontend { service, flags: route.flags }))
        });
        let (expected, mut found): (BTreeMap<_, _>, _) = (expected.collect(), self.dataplane.frontends()?);
        // One of ours whose address the programs don't look for is as good as not there.
        let is_looked_for = |it: &Frontend| self.dataplane.is_looked_for(it.address.ip(), Whose::Services);
        found.retain(|frontend, _| !expected.contains_key(frontend) || is_looked_for(frontend));
        let set = |dataplane: &mut D, frontend: &Frontend, value| match value {
            Some(value) => dataplane.set_frontend(frontend, value),
            None => dataplane.remove_frontend(frontend),
        };
        let text = |value: &abi::Frontend| format!("service {}, flags {:#x}", value.service, value.flags);
        let entry = |it: &Frontend, _: &abi::Frontend| it.to_string();
        audit_keys(&mut self.dataplane, "SERVICES4/6", &expected, &found, entry, text, repair.then_some(set))
    }

    fn audit_vips(&mut self, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
        let expected: BTreeMap<_, _> = self.applied.vips.iter().map(|(&address, &flags)| (address, flags)).collect();
        let mut found = self.dataplane.vips()?;
        let is_looked_for = |address| self.dataplane.is_looked_for(address, Whose::Services);
        found.retain(|address, _| !expected.contains_key(address) || is_looked_for(*address));
        let set = |dataplane: &mut D, &address: &IpAddr, flags| match flags {
            Some(flags) => dataplane.set_vip(address, flags),
            None => dataplane.remove_vip(address),
        };
        let text = |flags: &u32| format!("flags {flags:#x}");
        let entry = |it: &IpAddr, _: &u32| it.to_string();
        audit_keys(&mut self.dataplane, "VIPS4/6", &expected, &found, entry, text, repair.then_some(set))
    }

    fn audit_sources(&mut self, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
        let expected = self.applied.sources.iter().filter_map(|(name, range)| {
            let service = self.entries.get(name)?.id;
            Some((SourceRange::new(service, range), family(range)))
        });
        let (expected, found) = (expected.collect(), self.dataplane.sources()?);
        let set =
            |dataplane: &mut D, range: &SourceRange, value: Option<u32>| match value.and_then(|it| range.range(it)) {
                Some((service, range)) => dataplane.add_source(service, &range),
                None => dataplane.forget_source(range),
            };
        let entry = |range: &SourceRange, &family: &u32| range.text(family);
        let text = |family: &u32| format!("family {family}");
        audit_keys(&mut self.dataplane, "SOURCES", &expected, &found, entry, text, repair.then_some(set))
    }
}

/// The keys that don't lead to what they should; they are made to, if there is a way.
pub(in crate::dataplane) fn audit_keys<T, K: Ord, V: PartialEq + Copy>(
    owner: &mut T,
    map: &'static str,
    expected: &BTreeMap<K, V>,
    found: &BTreeMap<K, V>,
    entry: impl Fn(&K, &V) -> String,
    text: impl Fn(&V) -> String,
    mut set: Option<impl FnMut(&mut T, &K, Option<V>) -> Result<(), DataplaneError>>,
) -> Result<Vec<Drift>, DataplaneError> {
    let text = |value: Option<&V>| value.map_or_else(|| "not there".to_owned(), &text);
    let keys: BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    let mut drift = Vec::new();
    for key in keys {
        let (wanted, there) = (expected.get(key), found.get(key));
        if wanted != there {
            let entry = wanted.or(there).map_or_else(String::new, |value| entry(key, value));
            drift.push(Drift::new(map, entry, text(wanted), text(there)));
            if let Some(set) = &mut set {
                set(owner, key, wanted.copied())?;
            }
        }
    }
    Ok(drift)
}

fn described(backend: &Backend) -> String {
    let Backend { generation, flags, weight, withdrawals, service, .. } = backend;
    format!(
        "{} of service {service}, weight {weight}, flags {flags:#x}, generation {generation}, withdrawals {withdrawals}",
        address(backend)
    )
}
