//! A dataplane without a kernel: plain memory, for tests on the host.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use ipnet::IpNet;
use lb_common::abi::{self, Backend, Service, Slot, Whose};

use super::{
    Dataplane, DataplaneError, Sizes,
    region::Region,
    sources::{SourceRange, family},
};
use crate::model::Frontend;

/// The maps as plain memory.
#[derive(Debug)]
pub struct Memory {
    services: Region<Service>,
    table: Region<Slot>,
    backends: Region<Backend>,
    address_bits: Region<u64>,
    /// Frontend → service id and what holds for it.
    pub frontends: BTreeMap<Frontend, abi::Frontend>,
    /// Address → whether it refuses ports that no service takes.
    pub vips: BTreeMap<IpAddr, u32>,
    /// Which clients are let in → their IP family's number.
    pub sources: BTreeMap<SourceRange, u32>,
    grace_periods: AtomicU64,
}

impl Memory {
    /// Empty maps of these sizes.
    pub fn new(sizes: &Sizes) -> std::io::Result<Self> {
        Ok(Self {
            services: Region::anonymous(sizes.services)?,
            table: Region::anonymous(sizes.slots)?,
            backends: Region::anonymous(sizes.backends)?,
            address_bits: Region::anonymous(abi::ADDRESS_WORDS as u32)?,
            frontends: BTreeMap::new(),
            vips: BTreeMap::new(),
            sources: BTreeMap::new(),
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

    fn set_frontend(&mut self, frontend: &Frontend, value: abi::Frontend) -> Result<(), DataplaneError> {
        self.look_for(frontend.address.ip(), Whose::Services);
        self.frontends.insert(*frontend, value);
        Ok(())
    }

    fn remove_frontend(&mut self, frontend: &Frontend) -> Result<(), DataplaneError> {
        self.frontends.remove(frontend);
        Ok(())
    }

    fn set_vip(&mut self, address: IpAddr, flags: u32) -> Result<(), DataplaneError> {
        self.look_for(address, Whose::Services);
        self.vips.insert(address, flags);
        Ok(())
    }

    fn remove_vip(&mut self, address: IpAddr) -> Result<(), DataplaneError> {
        self.vips.remove(&address);
        Ok(())
    }

    fn add_source(&mut self, service: u32, range: &IpNet) -> Result<(), DataplaneError> {
        self.sources.insert(SourceRange::new(service, range), family(range));
        Ok(())
    }

    fn remove_source(&mut self, service: u32, range: &IpNet) -> Result<(), DataplaneError> {
        self.sources.remove(&SourceRange::new(service, range));
        Ok(())
    }

    fn forget_source(&mut self, range: &SourceRange) -> Result<(), DataplaneError> {
        self.sources.remove(range);
        Ok(())
    }

    fn address_bits(&self) -> &Region<u64> {
        &self.address_bits
    }

    fn frontends(&self) -> Result<BTreeMap<Frontend, abi::Frontend>, DataplaneError> {
        Ok(self.frontends.clone())
    }

    fn vips(&self) -> Result<BTreeMap<IpAddr, u32>, DataplaneError> {
        Ok(self.vips.clone())
    }

    fn sources(&self) -> Result<BTreeMap<SourceRange, u32>, DataplaneError> {
        Ok(self.sources.clone())
    }

    fn wait_for_readers(&self) -> Result<(), DataplaneError> {
        self.grace_periods.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
