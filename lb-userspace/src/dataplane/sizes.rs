//! How much the tables hold.

use std::fs;

/// How much the tables hold. The kernel's memory for most of it is taken when they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Ports of services, counted for each IP family.
    pub services: u32,
    /// Backends, counted for each service port.
    pub backends: u32,
    /// Slots of all backend sets.
    pub slots: u32,
    /// Established flows in each IP family.
    pub flows: u32,
    /// Flows in each IP family that are not established yet.
    pub pending_flows: u32,
    /// Clients of services with session affinity.
    pub affinity_clients: u32,
    /// Source ranges, counted for each service port.
    pub source_ranges: u32,
}

/// The sizes that the operator asks for. What is not said stays as the tables have it, and goes by the machine's memory
/// where there are none yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args)]
#[expect(clippy::struct_field_names, reason = "the names are those of the flags")]
pub struct SizeOptions {
    /// How many services there may be: ports of services, counted for each IP family [default: 131072]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 22))]
    max_services: Option<u32>,
    /// How many backends there may be, counted for each service port [default: by memory, 524288 from 2 GiB on]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_backends: Option<u32>,
    /// How many slots the backend sets may have in all: one a unit of weight, or about 100 a backend with maglev and
    /// source-hash [default: by memory, at most 4194304]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    max_slots: Option<u32>,
    /// How many flows are remembered in each IP family; beyond that the least recently used one is forgotten
    /// [default: by memory, 16384 to 1048576]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(128..=1 << 26))]
    max_flows: Option<u32>,
    /// How many flows that no backend has answered yet are remembered in each IP family; beyond that the least recently
    /// used one is forgotten [default: a quarter of --max-flows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(128..=1 << 26))]
    max_pending_flows: Option<u32>,
    /// How many clients of services with session affinity are remembered; beyond that the least recently used one is
    /// forgotten [default: half of --max-flows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(128..=1 << 26))]
    max_affinity_clients: Option<u32>,
    /// How many source ranges there may be, counted for each service port [default: 65536]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_source_ranges: Option<u32>,
}

impl Sizes {
    /// Those of a machine with 8 GiB of memory: about 280 MiB of it for the kernel's tables, most of that for flows.
    pub const DEFAULT: Self = Self::for_memory(8 << 30);

    /// The sizes for a machine with so many bytes of memory: tables take about a thirtieth of it, somewhat more below 4 GiB, and
    /// no more than 1 GiB.
    pub const fn for_memory(bytes: u64) -> Self {
        // A flow is four entries, of 128 bytes over IPv4 and 176 over IPv6 with what the kernel adds to each. To the nearest power of
        // two: a machine always has somewhat less than it is called after.
        let wanted = bytes >> 15;
        let flows = match (wanted + wanted / 3).checked_ilog2() {
            Some(power @ 14..20) => 1 << power,
            Some(20..) => 1 << 20,
            _ => 1 << 14,
        };
        Self {
            services: 1 << 17,
            // The largest clusters have 250,000 endpoints, of two ports each: at 48 bytes these are for smaller machines, too.
            backends: if flows < 1 << 16 { 8 * flows } else { 1 << 19 },
            // Two for each backend at least, which may be in the sets of both policies.
            slots: if flows < 1 << 18 { 16 * flows } else { 1 << 22 },
            flows,
            pending_flows: flows / 4,
            affinity_clients: flows / 2,
            source_ranges: 1 << 16,
        }
    }

    /// Frontends in one family: a service may have several.
    pub const fn frontends(&self) -> u32 {
        self.services * 2
    }

    /// Addresses in one family that are services' alone: each has a frontend at least.
    pub const fn vips(&self) -> u32 {
        self.frontends()
    }

    /// Entries of a flow table: one for each direction.
    pub const fn flow_entries(&self) -> u32 {
        self.flows * 2
    }

    /// Entries of a table of pending flows: one for each direction.
    pub const fn pending_entries(&self) -> u32 {
        self.pending_flows * 2
    }

    /// TCP sockets whose services are remembered, of 128 bytes each with what the kernel adds: little beside the flows. The kernel
    /// hands out entries to CPUs in batches of 128, and evicts where one CPU has none while others have: so there are some more.
    pub fn peers(&self) -> u32 {
        (self.flows / 4).max(1 << 14)
    }
}

impl Default for Sizes {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl SizeOptions {
    /// The sizes that hold: those asked for, and else those of the tables that are there.
    pub fn settle(&self, present: Option<Sizes>) -> Sizes {
        let base = present.unwrap_or_else(|| {
            let sizes = Sizes::for_memory(memory());
            let flows = self.max_flows.unwrap_or(sizes.flows);
            Sizes { flows, pending_flows: (flows / 4).max(128), affinity_clients: (flows / 2).max(128), ..sizes }
        });
        Sizes {
            services: self.max_services.unwrap_or(base.services),
            backends: self.max_backends.unwrap_or(base.backends),
            slots: self.max_slots.unwrap_or(base.slots),
            flows: self.max_flows.unwrap_or(base.flows),
            pending_flows: self.max_pending_flows.unwrap_or(base.pending_flows),
            affinity_clients: self.max_affinity_clients.unwrap_or(base.affinity_clients),
            source_ranges: self.max_source_ranges.unwrap_or(base.source_ranges),
        }
    }
}

/// How much memory there is for this process, in bytes: the machine's, or what its control group may take. What the kernel takes
/// for maps counts for the group.
fn memory() -> u64 {
    let information = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = information.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next());
    let total = total.and_then(|kilobytes| kilobytes.parse::<u64>().ok()).map_or(8 << 30, |kilobytes| kilobytes << 10);
    // Inside of a container its own group is the root of what it sees.
    let limit = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|limit| limit.trim().parse().ok());
    limit.map_or(total, |limit: u64| limit.min(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_go_by_memory_within_bounds() {
        let flows = |bytes| Sizes::for_memory(bytes).flows;
        assert_eq!([0, 512 << 20, 1 << 30, 8 << 30, 9 << 30].map(flows), [1 << 14, 1 << 14, 1 << 15, 1 << 18, 1 << 18]);
        assert_eq!([32 << 30, u64::MAX].map(flows), [1 << 20, 1 << 20]);
        // As `/proc/meminfo` has it on machines that are called after 2 GiB, 4 GiB and 8 GiB.
        assert_eq!(
            [1_980_000, 3_900_000, 8_000_000].map(|kilobytes| flows(kilobytes << 10)),
            [1 << 16, 1 << 17, 1 << 18]
        );
        let backends = |bytes| {
            let Sizes { backends, slots, .. } = Sizes::for_memory(bytes);
            (backends, slots)
        };
        assert_eq!([0, 1 << 30].map(backends), [(1 << 17, 1 << 18), (1 << 18, 1 << 19)]);
        assert_eq!([1_980_000 << 10, 2 << 30].map(backends), [(1 << 19, 1 << 20); 2]);
        assert_eq!(
            [4 << 30, 8 << 30, u64::MAX].map(backends),
            [(1 << 19, 1 << 21), (1 << 19, 1 << 22), (1 << 19, 1 << 22)]
        );
    }

    #[test]
    fn what_is_not_asked_for_stays_as_it_is() {
        let present = Sizes { services: 77, flows: 1000, ..Sizes::DEFAULT };
        let options = SizeOptions { max_flows: Some(2000), ..SizeOptions::default() };
        assert_eq!(SizeOptions::default().settle(Some(present)), present);
        assert_eq!(options.settle(Some(present)), Sizes { flows: 2000, ..present });
        assert_eq!(options.settle(None).pending_flows, 500);
        assert!(SizeOptions::default().settle(None).flows >= 1 << 14);
    }
}
