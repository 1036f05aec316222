//! The flow tables, as the garbage collector walks them.

use std::io;

use aya::{
    Pod,
    maps::{HashMap, IterableMap as _, MapData, MapError},
};
use lb_common::{
    abi::{Flow, FlowKey},
    flow::Tick,
    net::Address,
};

use super::batch::lookup_batch;
use crate::dataplane::{
    DataplaneError,
    collect::{Chunk, FlowTable},
};

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
