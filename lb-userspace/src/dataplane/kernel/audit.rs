//! Whether those maps say what they were made to say that don't go by services.

use std::fmt;

use aya::{
    Pod,
    maps::{HashMap, MapData},
};
use lb_common::{
    abi::{Frontend, InterfaceAddresses, ServiceKey},
    net::Address,
};

use super::{
    Kernel, frontend,
    links::Place,
    listed, map_error,
    programs::{self, N_STAGES},
    removed,
};
use crate::dataplane::{
    DataplaneError,
    tables::{Drift, audit_keys},
};

impl Kernel {
    /// Looks for drift in what packets leave with, in whose sockets are left alone, in what leads from program to program, and for
    /// frontends that could not be, and puts it right if that is asked for.
    ///
    /// # Errors
    ///
    /// If a map can't be read, or repaired.
    pub fn audit(&mut self, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
        let mut drift = self.audit_addresses(repair)?;
        drift.extend(self.audit_epoch());
        if repair && !drift.is_empty() {
            // Flows may have got their next hops by what was there.
            self.begin_epoch();
        }
        drift.extend(self.audit_exempt(repair)?);
        drift.extend(audit_frontends("SERVICES4", &mut self.services4, repair)?);
        drift.extend(audit_frontends("SERVICES6", &mut self.services6, repair)?);
        drift.extend(programs::audit_stages(&mut self.object, repair)?);
        Ok(drift)
    }

    /// How many entries that looks at.
    pub fn audited(&self) -> u64 {
        (self.known_addresses.len() + self.known_exempt.len() + N_STAGES + self.attachments.holds().count() + 1) as u64
    }

    /// Looks for places that somebody else has detached programs from. If that is to be repaired they are forgotten, and so attached to
    /// again by who goes through all there are.
    pub fn audit_links(&mut self, repair: bool) -> Vec<Drift> {
        let [expected, found] = ["attached", "detached"].map(str::to_owned);
        let drift = |place: Place| Drift {
            map: "links",
            entry: place.to_string(),
            expected: expected.clone(),
            found: found.clone(),
        };
        let drift: Vec<_> = self.attachments.detached().map(drift).collect();
        if repair && !drift.is_empty() {
            self.attachments.forget_detached();
            // What is left of them may have no use any more.
            self.is_settled = false;
        }
        drift
    }

    fn audit_epoch(&self) -> Option<Drift> {
        let (expected, found) = (self.known_epoch, self.epoch.get(0));
        let drift =
            |map| Drift { map, entry: "0".to_owned(), expected: expected.to_string(), found: found.to_string() };
        (found != expected).then(|| drift("EPOCH"))
    }

    fn audit_addresses(&mut self, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
        let name = "ADDRESSES";
        let expected = self.known_addresses.iter().map(|(&interface, known)| (interface, known.entry())).collect();
        let found = listed(name, self.addresses.iter())?.into_iter().collect();
        let set = |kernel: &mut Self, interface: &u32, value: Option<InterfaceAddresses>| {
            match value {
                Some(value) => kernel.addresses.insert(interface, value, 0),
                None => removed(kernel.addresses.remove(interface)),
            }
            .map_err(map_error(name))
        };
        let entry = |interface: &u32, _: &InterfaceAddresses| format!("interface {interface}");
        let text = |InterfaceAddresses { v6, v4, is_attached }: &InterfaceAddresses| {
            format!("{v4:?}, {v6:?}, attached {is_attached}")
        };
        audit_keys(self, name, &expected, &found, entry, text, repair.then_some(set))
    }

    fn audit_exempt(&mut self, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
        let name = "EXEMPT";
        let expected = self.known_exempt.iter().map(|&group| (group, 1)).collect();
        let found = listed(name, self.exempt.iter())?.into_iter().collect();
        let set = |kernel: &mut Self, group: &u64, value: Option<u32>| {
            match value {
                Some(value) => kernel.exempt.insert(group, value, 0),
                None => removed(kernel.exempt.remove(group)),
            }
            .map_err(map_error(name))
        };
        let entry = |group: &u64, _: &u32| format!("control group {group}");
        audit_keys(self, name, &expected, &found, entry, u32::to_string, repair.then_some(set))
    }
}

/// Entries with keys that no frontend has, so that no packet finds them: all others are compared as frontends.
fn audit_frontends<A: Address>(
    name: &'static str,
    frontends: &mut HashMap<MapData, ServiceKey<A>, Frontend>,
    repair: bool,
) -> Result<Vec<Drift>, DataplaneError>
where
    ServiceKey<A>: Pod + fmt::Debug,
{
    let is_none = |(key, _): &(ServiceKey<A>, Frontend)| frontend(key).is_none();
    let mut drift = Vec::new();
    for (key, value) in listed(name, frontends.iter())?.into_iter().filter(is_none) {
        let (entry, found) = (format!("{key:?}"), format!("service {}, flags {:#x}", value.service, value.flags));
        drift.push(Drift { map: name, entry, expected: "not there".to_owned(), found });
        if repair {
            removed(frontends.remove(&key)).map_err(map_error(name))?;
        }
    }
    Ok(drift)
}
