use std::collections::BTreeMap;

use lb_common::{abi::FlowAbout, net::Port};

use super::*;

const TIMEOUTS: Timeouts = Timeouts { opening: 60, established: 8_000, closing: 10, datagram: 60 };

/// Entries by a number that stands for their bucket, some of which are read at a time.
#[derive(Default)]
struct Table<A: Address> {
    entries: BTreeMap<u32, (FlowKey<A>, Flow<A>)>,
    /// What becomes of the table once a chunk was read.
    meanwhile: Option<(FlowKey<A>, Flow<A>)>,
}

impl<A: Address> Table<A> {
    fn put(&mut self, key: FlowKey<A>, flow: Flow<A>) {
        let present = self.entries.iter().find(|(_, entry)| entry.0 == key).map(|(number, _)| *number);
        let number = present.unwrap_or(self.entries.len() as u32);
        self.entries.insert(number, (key, flow));
    }
}

impl<A: Address> FlowTable<A> for Table<A> {
    fn read(&mut self, cursor: Option<u32>, chunk: &mut Chunk<A>) -> Result<Option<u32>, DataplaneError> {
        let from = cursor.unwrap_or(0);
        (chunk.keys, chunk.flows) = self.entries.range(from..from + 3).map(|(_, entry)| *entry).unzip();
        if let Some((key, flow)) = self.meanwhile.take() {
            self.put(key, flow);
        }
        Ok(self.entries.range(from + 3..).next().map(|_| from + 3))
    }

    fn get(&self, key: &FlowKey<A>) -> Result<Option<Flow<A>>, DataplaneError> {
        Ok(self.entries.values().find(|entry| entry.0 == *key).map(|entry| entry.1))
    }

    fn remove(&mut self, key: &FlowKey<A>) -> Result<(), DataplaneError> {
        self.entries.retain(|_, entry| entry.0 != *key);
        Ok(())
    }
}

struct Lab {
    v4: Table<Ipv4Be>,
    backends: Region<Backend>,
    collector: Collector,
}

const BACKEND: u32 = 3;

impl Lab {
    fn new() -> Self {
        let backends = Region::anonymous(20_000).unwrap();
        Self { v4: Table { entries: BTreeMap::new(), meanwhile: None }, backends, collector: Collector::new(TIMEOUTS) }
    }

    /// A flow by its number, with the states and times of last use of its request and its reply.
    fn add(&mut self, number: u16, proto: IpProto, request: (State, u32), reply: (State, u32)) {
        for (key, flow) in self.flow(number, proto, request, reply) {
            self.v4.put(key, flow);
        }
    }

    fn flow(
        &self,
        number: u16,
        proto: IpProto,
        request: (State, u32),
        reply: (State, u32),
    ) -> [(FlowKey<Ipv4Be>, Flow<Ipv4Be>); 2] {
        let address = |byte| Ipv4Be::from_bytes([10, 0, 0, byte]);
        let ports = (Port::from_host(number), Port::from_host(80));
        let asked = FlowKey::new(address(1), address(2), ports, proto);
        let sent = FlowKey::new(address(3), address(4), ports, proto);
        let generation = self.backends.get(BACKEND).generation;
        let entry = |key: FlowKey<Ipv4Be>, answer: FlowKey<Ipv4Be>, direction, (state, last_seen): (State, u32)| {
            let about = FlowAbout { direction, backend: BACKEND, generation, flags: 0, now: Tick(last_seen) };
            (key, Flow { state: state as u8, ..Flow::new(&key, &answer, &about) })
        };
        [
            entry(asked, sent.reversed(), Direction::Request, request),
            entry(sent.reversed(), asked, Direction::Reply, reply),
        ]
    }

    fn pass(&mut self, now: u32) -> Pass {
        let mut v6 = Table::<Ipv6Be> { entries: BTreeMap::new(), meanwhile: None };
        while self.collector.step(&mut self.v4, &mut v6, &self.backends, Tick(now), Duration::ZERO).unwrap()
            == Progress::Underway
        {}
        *self.collector.last().unwrap()
    }

    fn active(&self) -> u64 {
        self.backends.get(BACKEND).active
    }

    fn set_active(&self, active: u64) {
        self.backends.set(BACKEND, Backend { active, ..self.backends.get(BACKEND) });
    }
}

#[test]
fn a_flow_goes_when_both_of_its_entries_have_been_idle() {
    use State::{Closing, Datagram, Established, Opening};
    let mut lab = Lab::new();
    for number in 0..10 {
        lab.add(number, IpProto::TCP, (Established, 1_000), (Established, 900));
    }
    lab.add(10, IpProto::TCP, (Closing, 8_000), (Established, 8_000));
    lab.add(11, IpProto::TCP, (Closing, 8_000), (Closing, 8_000));
    lab.add(12, IpProto::TCP, (Opening, 8_990), (Opening, 8_800));
    lab.add(13, IpProto::UDP, (Datagram, 8_800), (Datagram, 8_800));
    lab.add(14, IpProto::UDP, (Datagram, 8_939), (Datagram, 8_940));
    let pass = lab.pass(9_000);
    // One of the four entries had gone with its other one before it was read.
    assert_eq!((pass.entries4, pass.removed), (29, 2), "{:?}", lab.v4.entries.keys());
    // Those of the first kind are 8,000 ticks old in one direction, and 8,001 in both only a tick later.
    assert_eq!(lab.pass(9_001).removed, 11);
    assert_eq!(lab.v4.entries.len(), 4);
    assert_eq!((lab.collector.passes(), lab.collector.removed()), (2, 13));
}

#[test]
fn a_packet_at_the_last_moment_saves_its_flow() {
    let mut lab = Lab::new();
    let idle = (State::Datagram, 0);
    lab.add(1, IpProto::UDP, idle, idle);
    lab.v4.meanwhile = Some(lab.flow(1, IpProto::UDP, (State::Datagram, 100), idle)[0]);
    assert_eq!(lab.pass(100).removed, 0);
    assert_eq!(lab.pass(161).removed, 1);
    assert!(lab.v4.entries.is_empty());
}

#[test]
fn an_entry_whose_other_one_is_gone_or_is_not_its_own_goes_alone() {
    let mut lab = Lab::new();
    let (idle, busy) = ((State::Established, 0), (State::Established, 9_000));
    let [request, _] = lab.flow(1, IpProto::TCP, idle, idle);
    lab.v4.put(request.0, request.1);
    // Another client has the reply's tuple by now.
    let [stale, (tuple, reply)] = lab.flow(2, IpProto::TCP, idle, busy);
    lab.v4.put(stale.0, stale.1);
    lab.v4.put(tuple, Flow { destination: Ipv4Be::from_bytes([10, 9, 9, 9]), ..reply });
    assert_eq!(lab.pass(9_000).removed, 2);
    let left: Vec<_> = lab.v4.entries.values().map(|entry| entry.0).collect();
    assert_eq!(left, [tuple]);
}

#[test]
fn udp_flows_of_a_backend_that_has_left_go_at_once_and_connections_stay() {
    let mut lab = Lab::new();
    lab.add(1, IpProto::UDP, (State::Datagram, 100), (State::Datagram, 100));
    lab.add(1, IpProto::TCP, (State::Established, 100), (State::Established, 100));
    assert_eq!(lab.pass(100).removed, 0);
    lab.backends.set(BACKEND, Backend { generation: 1, ..lab.backends.get(BACKEND) });
    assert_eq!(lab.pass(100).removed, 1);
    assert!(lab.v4.entries.values().all(|(key, _)| key.proto == IpProto::TCP));
    assert_eq!(lab.v4.entries.len(), 2);
    assert_eq!(lab.active(), 0, "the next owner of the id has no flows yet");
}

#[test]
fn what_the_kernel_counted_is_corrected_by_what_lives() {
    let mut lab = Lab::new();
    let now = (State::Established, 100);
    for number in 0..5 {
        lab.add(number, IpProto::TCP, now, now);
    }
    lab.add(5, IpProto::TCP, (State::Closing, 100), now);
    lab.pass(100);
    assert_eq!(lab.active(), 5, "none was counted");
    lab.set_active(1_000);
    lab.pass(100);
    assert_eq!(lab.active(), 5, "many were evicted");
    lab.v4.entries.clear();
    lab.pass(100);
    assert_eq!(lab.active(), 0, "all were evicted");
}

#[test]
fn what_comes_and_goes_during_a_pass_is_no_drift() {
    assert_eq!(drift(10, 20, 15), 0);
    assert_eq!(drift(20, 10, 10), 0);
    assert_eq!(drift(10, 20, 9), -1);
    assert_eq!(drift(20, 10, 25), 5);
    assert_eq!(drift(0, 0, 0), 0);
}
