//! The flow tables, as the garbage collector walks them.

use std::{io, os::fd::AsFd as _, os::fd::AsRawFd as _};

use aya::{
    Pod,
    maps::{HashMap, IterableMap as _, MapData, MapError},
};
use lb_common::{
    abi::{Flow, FlowKey},
    flow::Tick,
    net::Address,
};

use super::sys::bpf;
use crate::dataplane::{
    DataplaneError,
    collect::{Chunk, FlowTable},
};

/// How many entries are read at once. A bucket of the kernel's hash table is read whole or not at all, and has few.
const BATCH: usize = 1024;

impl<A: Address> FlowTable<A> for HashMap<MapData, FlowKey<A>, Flow<A>>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    fn read(&mut self, cursor: Option<u32>, chunk: &mut Chunk<A>) -> Result<Option<u32>, DataplaneError> {
        let read = lookup_batch(self.map(), cursor, &mut chunk.keys, &mut chunk.flows);
        read.map_err(|source| DataplaneError::Flows { what: "read", source })
    }

    fn get(&self, key: &FlowKey<A>) -> Result<Option<Flow<A>>, DataplaneError> {
        match self.get(key, 0) {
            Ok(flow) => Ok(Some(flow)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(DataplaneError::Flows { what: "look up", source: io::Error::other(error) }),
        }
    }

    fn remove(&mut self, key: &FlowKey<A>) -> Result<(), DataplaneError> {
        match self.remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            // It was evicted or removed by a packet.
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(DataplaneError::Flows { what: "remove", source: io::Error::other(error) }),
        }
    }
}

/// The member `batch` of `union bpf_attr` (include/uapi/linux/bpf.h).
#[repr(C, align(8))]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Reads entries of a hash map from a place on, which `None` puts at the beginning; gives the place to go on, `None` at the end.
fn lookup_batch<K: Pod, V: Pod>(
    map: &MapData,
    cursor: Option<u32>,
    keys: &mut Vec<K>,
    values: &mut Vec<V>,
) -> io::Result<Option<u32>> {
    const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
    const {
        // The kernel rounds values up to that.
        assert!(size_of::<V>().is_multiple_of(8));
    }
    keys.clear();
    values.clear();
    keys.reserve(BATCH);
    values.reserve(BATCH);
    let from = cursor.unwrap_or_default();
    let mut next = 0_u32;
    let mut attr = BatchAttr {
        in_batch: if cursor.is_some() { (&raw const from).expose_provenance() as u64 } else { 0 },
        out_batch: (&raw mut next).expose_provenance() as u64,
        keys: keys.as_mut_ptr().expose_provenance() as u64,
        values: values.as_mut_ptr().expose_provenance() as u64,
        count: BATCH as u32,
        map_fd: map.fd().as_fd().as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: The structure is what the command takes, and there is room for as many keys and values as `count` says,
    // of the map's own sizes; in_batch and out_batch are a bucket's number, of 32 bits (kernel/bpf/hashtab.c).
    let is_end = match unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) } {
        Ok(_) => false,
        // The end of the table is an error that says so, with the last entries beside it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(error),
    };
    let count = (attr.count as usize).min(BATCH);
    // SAFETY: The kernel has written so many, there is room for them, and any bytes are a value.
    unsafe {
        keys.set_len(count);
        values.set_len(count);
    }
    Ok((!is_end).then_some(next))
}

/// The time as the programs read it.
pub(super) fn now() -> Tick {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: The clock is one that every kernel has, and the structure is there to be written.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    debug_assert_eq!(result, 0, "the clock is always there");
    Tick::from_ns(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lb_common::{
        abi::FlowAbout,
        flow::{Direction, State},
        net::{IpProto, Ipv4Be, Port},
    };

    use super::*;
    use crate::dataplane::{
        Sizes,
        collect::{Collector, Progress},
        kernel::{Kernel, Settings},
    };

    /// A million flows of which every tenth is over, in tables of twice the room. Run it with `--nocapture` and in release for figures.
    #[test]
    #[ignore = "needs root and 500 MiB of kernel memory, and takes seconds"]
    fn a_million_flows_are_gone_through_in_steps() {
        const FLOWS: u32 = 1_000_000;
        const STEP: Duration = Duration::from_millis(5);
        let settings = Settings::default();
        let sizes = Sizes { flows: 2 * FLOWS, ..Sizes::DEFAULT };
        let mut kernel = Kernel::load(&sizes, &settings).unwrap();
        let now = now();
        for number in 0..FLOWS {
            let client = Ipv4Be::from_bytes((0x0A00_0000 + number / 4).to_be_bytes());
            let address = |byte| Ipv4Be::from_bytes([192, 0, 2, byte]);
            let ports = (Port::from_host(1024 + (number % 4) as u16), Port::from_host(80));
            let asked = FlowKey::new(client, address(1), ports, IpProto::TCP);
            let sent = FlowKey::new(client, address(2), ports, IpProto::TCP);
            let age = if number % 10 == 0 { settings.timeouts.closing + 1 } else { 0 };
            let last_seen = Tick(now.0.saturating_sub(age));
            let answer = sent.reversed();
            let about =
                |direction| FlowAbout { direction, backend: number % 1000, generation: 0, flags: 0, now: last_seen };
            let pair = [
                (asked, Flow::new(&asked, &answer, &about(Direction::Request))),
                (answer, Flow::new(&answer, &asked, &about(Direction::Reply))),
            ];
            for (key, flow) in pair {
                let state = if age > 0 { State::Closing } else { State::Established };
                kernel.flows4.insert(key, Flow { state: state as u8, ..flow }, 0).unwrap();
            }
        }
        let mut collector = Collector::new(settings.timeouts);
        for _ in 0..2 {
            let (mut steps, mut longest) = (0, Duration::ZERO);
            loop {
                let begin = std::time::Instant::now();
                let progress = kernel.collect(&mut collector, STEP).unwrap();
                longest = longest.max(begin.elapsed());
                steps += 1;
                if progress == Progress::Done {
                    break;
                }
            }
            println!("{:?} in {steps} steps, the longest {longest:?}", collector.last().unwrap());
        }
        let left = collector.last().unwrap().entries4;
        assert!(
            (1_750_000..=1_800_000).contains(&left),
            "{left} entries are left of two million, but for some evicted"
        );
        let active: u64 = (0..1000).map(|id| kernel.backends.get(id).active).sum();
        assert_eq!(active, left / 2);
    }
}
