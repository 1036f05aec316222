//! A dataplane without a kernel: plain memory, for tests on the host.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
};

use lb_common::abi::{Backend, Service, Slot};

use super::{Dataplane, DataplaneError, Sizes, region::Region};
use crate::model::Frontend;

/// The maps as plain memory.
#[derive(Debug)]
pub struct Memory {
    services: Region<Service>,
    table: Region<Slot>,
    backends: Region<Backend>,
    /// Frontend → service id.
    pub frontends: BTreeMap<Frontend, u32>,
    grace_periods: AtomicU64,
}

impl Memory {
    /// Empty maps of these sizes.
    pub fn new(sizes: &Sizes) -> std::io::Result<Self> {
        Ok(Self {
            services: Region::anonymous(sizes.services)?,
            table: Region::anonymous(sizes.slots)?,
            backends: Region::anonymous(sizes.backends)?,
            frontends: BTreeMap::new(),
            grace_periods: AtomicU64::new(0),
        })
    }

    /// How often the readers were waited for.
    pub fn grace_periods(&self) -> u64 {
        self.grace_periods.load(Ordering::Relaxed)
    }
}

impl Dataplane for Memory {
    fn services(&self) -> &Region<Service> {
        &self.services
    }

    fn table(&self) -> &Region<Slot> {
        &self.table
    }

    fn backends(&self) -> &Region<Backend> {
        &self.backends
    }

    fn set_frontend(&mut self, frontend: &Frontend, service: u32) -> Result<(), DataplaneError> {
        self.frontends.insert(*frontend, service);
        Ok(())
    }

    fn remove_frontend(&mut self, frontend: &Frontend) -> Result<(), DataplaneError> {
        self.frontends.remove(frontend);
        Ok(())
    }

    fn wait_for_readers(&self) -> Result<(), DataplaneError> {
        self.grace_periods.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
