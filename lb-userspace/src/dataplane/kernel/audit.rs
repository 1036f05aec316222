//! Whether those maps say what they were made to say that don't go by services.

use lb_common::abi::InterfaceAddresses;

use super::{Kernel, listed, map_error};
use crate::dataplane::{
    DataplaneError,
    tables::{Drift, audit_keys},
};

impl Kernel {
    /// Looks for drift in what packets leave with, and in whose sockets are left alone, and puts it right if that is asked for.
    ///
    /// # Errors
    ///
    /// If a map can't be read, or repaired.
    pub fn audit(&mut self, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
        let mut drift = self.audit_addresses(repair)?;
        if repair && !drift.is_empty() {
            // Flows may have got their next hops by what was there.
            self.begin_epoch();
        }
        drift.extend(self.audit_exempt(repair)?);
        Ok(drift)
    }

    /// How many entries that looks at.
    pub fn audited(&self) -> u64 {
        (self.known_addresses.len() + self.known_exempt.len()) as u64
    }

    fn audit_addresses(&mut self, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
        let name = "ADDRESSES";
        let expected = self.known_addresses.iter().map(|(&interface, known)| (interface, known.entry())).collect();
        let found = listed(name, self.addresses.iter())?.into_iter().collect();
        let set = |kernel: &mut Self, interface: &u32, value: Option<InterfaceAddresses>| {
            match value {
                Some(value) => kernel.addresses.insert(interface, value, 0),
                None => kernel.addresses.remove(interface),
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
                None => kernel.exempt.remove(group),
            }
            .map_err(map_error(name))
        };
        let entry = |group: &u64, _: &u32| format!("control group {group}");
        audit_keys(self, name, &expected, &found, entry, u32::to_string, repair.then_some(set))
    }
}
