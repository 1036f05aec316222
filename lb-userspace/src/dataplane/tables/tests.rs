//! The tables over plain memory: what is in there is what is desired, however it came to be.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use lb_common::net::{Address as _, IpProto, Ipv4Be};
use proptest::prelude::*;

use super::*;
use crate::{
    dataplane::{memory::Memory, region::Region, sources::SourceRange},
    model::{Conditions, Desired, Endpoint, Frontend, FrontendKind, IpFamily, Protocol, Service, Weight},
    policy::{Node, decide},
};

const SIZES: Sizes = Sizes { services: 8, backends: 16, slots: 1200, flows: 128, source_ranges: 8, ..Sizes::DEFAULT };

/// The endpoints that are on the node.
const HERE: u8 = 128;

fn name(name: &str) -> ServiceName {
    ServiceName { name: name.into(), port: "http".into(), protocol: Protocol::Tcp, family: IpFamily::V4 }
}

fn node() -> Node {
    let addresses: BTreeSet<_> = (HERE..=255).map(|j| IpAddr::from([10, 1, 0, j])).collect();
    let node_port_addresses = [IpAddr::from([192, 0, 2, 1])].into();
    Node { addresses, node_port_addresses, ..Node::default() }
}

fn decided(services: impl IntoIterator<Item = (u8, Service)>) -> Arc<Decided> {
    let mut desired = Desired::default();
    for (i, service) in services {
        desired.add(name(&i.to_string()), service).unwrap();
    }
    Arc::new(decide(&desired, &node()))
}

/// Endpoints 10.1.0.`j`:80 of these weights.
fn endpoints(weights: &[(u8, u16)]) -> BTreeMap<SocketAddr, Endpoint> {
    let endpoint = |weight| Endpoint { weight: Weight::new(weight).unwrap(), ..Endpoint::READY };
    weights.iter().map(|&(j, weight)| (([10, 1, 0, j], 80).into(), endpoint(weight))).collect()
}

/// The last byte of a service's address, its algorithm, and the last bytes and weights of its endpoints.
type Row<'a> = (u8, Algorithm, &'a [(u8, u16)]);

/// Services 10.0.0.`i`:80 of nothing but an algorithm and endpoints.
fn plain(services: &[Row<'_>]) -> Arc<Decided> {
    decided(services.iter().map(|&(i, algorithm, weights)| {
        let frontends = [(([10, 0, 0, i], 80).into(), FrontendKind::ClusterIp)].into();
        (i, Service { frontends, algorithm, endpoints: endpoints(weights), ..Service::default() })
    }))
}

fn tables() -> Tables<Memory> {
    Tables::new(Memory::new(&SIZES).unwrap(), SIZES)
}

/// What the kernel finds behind a frontend: flags of the frontend, algorithm, affinity, slots of both policies with
/// address, port, flags and weight of their backends, and sources.
type Seen = (u32, u8, u32, [Vec<(SocketAddr, u16, u16)>; 2], BTreeSet<IpNet>);

/// Reads the memory as the kernel does: what it finds does not depend on which ids and slots were taken for it.
fn seen(memory: &Memory) -> (BTreeMap<Frontend, Seen>, BTreeMap<IpAddr, u32>) {
    let mut owners = HashMap::new();
    let frontends = memory.frontends.iter().map(|(&frontend, &abi::Frontend { service: id, flags })| {
        let service = memory.services().get(id);
        let slots = [service.cluster, service.local].map(|word| {
            let range = TableRange::from_word(word);
            let slots = (range.base..range.base + range.length).map(|index| {
                assert_eq!(*owners.entry(index).or_insert(id), id, "slot {index} is of two services");
                let Backend { address, port, flags, weight, .. } =
                    memory.backends().get(memory.table().get(index).backend);
                let address = std::net::Ipv4Addr::from(Ipv4Be::from_words(address));
                (SocketAddr::new(address.into(), port.to_host()), flags, weight)
            });
            slots.collect()
        });
        let sources = memory.sources.iter().filter_map(|(range, &family)| range.range(family));
        let sources = sources.filter(|(service, _)| *service == id).map(|(_, range)| range).collect();
        (frontend, (flags, service.algorithm, service.affinity, slots, sources))
    });
    (frontends.collect(), memory.vips.clone())
}

/// The memory must say what memory says that has never said anything else.
#[track_caller]
fn check(tables: &Tables<Memory>, wanted: &Arc<Decided>) {
    assert_eq!(tables.applied(), wanted);
    let mut fresh = self::tables();
    fresh.apply(wanted).expect("what fits beside other things fits alone");
    let memory = tables.dataplane();
    assert_eq!(seen(memory), seen(fresh.dataplane()));
    assert_eq!(memory.sources.len(), wanted.sources.len(), "no sources of services that are gone");
    for (name, serving) in &wanted.services {
        let backends = tables.members(name).map(|(address, member, entry)| {
            assert_eq!((entry.flags, entry.weight), (flags(address, member.backend), member.backend.weight.get()));
            (address, member.backend)
        });
        assert_eq!(backends.collect::<Vec<_>>(), serving.backends);
    }
}

#[test]
fn what_is_applied_twice_changes_nothing() {
    let mut tables = tables();
    let state = plain(&[(1, Algorithm::Random, &[(1, 1), (2, 3)]), (2, Algorithm::Maglev, &[(1, 1)])]);
    assert_eq!(tables.apply(&state).unwrap(), 6, "two services, two frontends, two addresses");
    check(&tables, &state);
    assert_eq!(tables.apply(&state).unwrap(), 0);
}

#[test]
fn what_is_decided_is_what_the_kernel_finds() {
    let mut tables = tables();
    let frontends = [
        (([10, 0, 0, 1], 80).into(), FrontendKind::ClusterIp),
        (([10, 0, 0, 2], 80).into(), FrontendKind::LoadBalancer),
    ];
    let service = Service {
        frontends: frontends.into(),
        node_port: Some(30080),
        external_policy: TrafficPolicy::Local,
        affinity: 10_800,
        source_ranges: ["198.51.100.0/24".parse().unwrap()].into(),
        endpoints: endpoints(&[(1, 1), (HERE, 2)]),
        ..Service::default()
    };
    tables.apply(&decided([(1, service)])).unwrap();
    let (frontends, vips) = seen(tables.dataplane());
    let backend = |j, flags, weight| (SocketAddr::from(([10, 1, 0, j], 80)), flags, weight);
    let local = backend(HERE, Backend::TAKEN | Backend::ON_NODE | Backend::IN_CLUSTER | Backend::IN_LOCAL, 2);
    let slots = [vec![local, backend(1, Backend::TAKEN | Backend::IN_CLUSTER, 1), local], vec![local]];
    let sources = ["198.51.100.0/24".parse().unwrap()].into();
    let expected = |at: ([u8; 4], u16), flags| {
        let frontend = Frontend { address: at.into(), protocol: Protocol::Tcp };
        (frontend, (flags, Algorithm::Random as u8, 10_800, slots.clone(), BTreeSet::clone(&sources)))
    };
    let local_policy = abi::Frontend::EXTERNAL | abi::Frontend::LOCAL_POLICY;
    assert_eq!(
        frontends,
        [
            expected(([10, 0, 0, 1], 80), 0),
            expected(([10, 0, 0, 2], 80), local_policy | abi::Frontend::SOURCE_RANGES),
            expected(([192, 0, 2, 1], 30080), local_policy | abi::Frontend::NODE_PORT),
        ]
        .into()
    );
    assert_eq!(vips, [([10, 0, 0, 1].into(), abi::VipKey::REFUSES), ([10, 0, 0, 2].into(), 0)].into());
}

#[test]
fn a_backend_that_stays_keeps_its_id_its_generation_and_its_counts() {
    let mut tables = tables();
    tables.apply(&plain(&[(1, Algorithm::Random, &[(1, 1), (HERE, 1)])])).unwrap();
    let members = |tables: &Tables<Memory>| tables.members(&name("1")).map(|(_, m, e)| (m.id, e)).collect::<Vec<_>>();
    let [(gone, _), (id, before)] = members(&tables)[..] else { panic!("two backends") };
    // The kernel counts.
    let before = Backend { flows: 7, active: 5, ..before };
    tables.dataplane().backends().set(id, before);
    let counted = |weight, flags, withdrawals| (id, Backend { weight, flags, withdrawals, ..before });
    let on_node = Backend::TAKEN | Backend::ON_NODE;
    let in_cluster = on_node | Backend::IN_CLUSTER;

    tables.apply(&plain(&[(1, Algorithm::Maglev, &[(2, 1), (HERE, 9)])])).unwrap();
    tables.reclaim().unwrap();
    assert_eq!(members(&tables)[1], counted(9, in_cluster, 0));
    assert_ne!(members(&tables)[0].0, id);

    tables.apply(&plain(&[(1, Algorithm::Maglev, &[(HERE, 0)])])).unwrap();
    assert_eq!(members(&tables), [counted(0, on_node, 1)]);

    let service = |conditions| Service {
        frontends: [(([10, 0, 0, 1], 80).into(), FrontendKind::ClusterIp)].into(),
        internal_policy: TrafficPolicy::Local,
        endpoints: [(([10, 1, 0, HERE], 80).into(), Endpoint { conditions, ..Endpoint::READY })].into(),
        ..Service::default()
    };
    let unready = Conditions { ready: false, serving: false, terminating: false };
    tables.apply(&decided([(1, service(unready))])).unwrap();
    assert_eq!(members(&tables), [counted(1, on_node, 1)]);
    tables.apply(&decided([(1, service(Conditions::READY))])).unwrap();
    assert_eq!(members(&tables), [counted(1, in_cluster | Backend::IN_LOCAL, 1)]);
    tables.apply(&decided([(1, service(unready))])).unwrap();
    assert_eq!(members(&tables), [counted(1, on_node, 2)], "that it takes no new flows is counted each time");
    assert_ne!(tables.dataplane().backends().get(gone).generation, 0, "the other one has left");
}

#[test]
fn round_robin_goes_on_where_it_was() {
    let mut tables = tables();
    tables.apply(&plain(&[(1, Algorithm::RoundRobin, &[(1, 1)])])).unwrap();
    let id = tables.entries[&name("1")].id;
    let counted = abi::Service { cursor: 41, ..tables.dataplane().services().get(id) };
    tables.dataplane().services().set(id, counted);
    tables.apply(&plain(&[(1, Algorithm::Random, &[(1, 1), (2, 1)])])).unwrap();
    let after = tables.dataplane().services().get(id);
    assert_eq!((after.cursor, after.algorithm), (41, Algorithm::Random as u8));
}

#[test]
fn flows_to_a_backend_that_left_are_over_at_once_and_its_id_rests() {
    let mut tables = tables();
    tables.apply(&plain(&[(1, Algorithm::Random, &[(1, 1)])])).unwrap();
    let (_, gone, before) = tables.members(&name("1")).next().unwrap();
    let entry = |tables: &Tables<Memory>| tables.dataplane().backends().get(gone.id);
    tables.apply(&plain(&[(1, Algorithm::Random, &[(2, 1)])])).unwrap();
    let left = entry(&tables);
    assert_ne!(left.generation, before.generation, "its flows remember another generation");
    assert_eq!((left.flags, left.weight), (0, 0));
    assert_eq!((left.address, left.port), (before.address, before.port), "a packet may still read it");
    assert_eq!(tables.dataplane().grace_periods(), 0);
    tables.reclaim().unwrap();
    assert_eq!(tables.dataplane().grace_periods(), 1);
    let generations = [before, left, entry(&tables)].map(|entry| entry.generation);
    assert_eq!(BTreeSet::from(generations).len(), 3, "nor is a flow that was made meanwhile one of the next backend");
    tables.reclaim().unwrap();
    assert_eq!(tables.dataplane().grace_periods(), 1, "nothing rests, so nobody is waited for");
    tables.apply(&Arc::default()).unwrap();
    tables.apply(&plain(&[(1, Algorithm::Random, &[(3, 1)])])).unwrap();
    let (_, next, entry) = tables.members(&name("1")).next().unwrap();
    assert!(next.id != gone.id || !generations[..2].contains(&entry.generation));
}

#[test]
fn least_connections_takes_the_less_busy_of_two() {
    let mut tables = tables();
    tables.apply(&plain(&[(1, Algorithm::LeastConnections, &[(1, 1), (2, 1)])])).unwrap();
    let members: Vec<_> = tables.members(&name("1")).collect();
    for (active, (_, member, entry)) in [9, 3].into_iter().zip(&members) {
        tables.dataplane().backends().set(member.id, Backend { active, ..*entry });
    }
    let key =
        FlowKey::new(Ipv4Be::default(), Ipv4Be::default(), (Port::from_host(1), Port::from_host(2)), IpProto::TCP);
    let choose = |policy, draws: [u32; 2]| {
        let mut draws = draws.into_iter();
        let chosen = tables.choose(&name("1"), policy, &key, || draws.next().unwrap(), || unreachable!());
        chosen.map(|backend| backend.active)
    };
    let (first, second) = (0, u32::MAX);
    assert_eq!(choose(TrafficPolicy::Cluster, [first, first]), Some(9));
    assert_eq!(choose(TrafficPolicy::Cluster, [first, second]), Some(3));
    assert_eq!(choose(TrafficPolicy::Cluster, [second, first]), Some(3));
    assert_eq!(choose(TrafficPolicy::Local, [first, first]), None);
}

#[test]
fn a_change_that_does_not_fit_changes_nothing_and_says_what_it_needs() {
    let mut tables = tables();
    let state = plain(&[(1, Algorithm::Random, &[(1, 1), (2, 1)])]);
    tables.apply(&state).unwrap();
    let many: Vec<_> = (1..=20).map(|j| (j, 1)).collect();
    let services: Vec<Row<'_>> = (1..=9).map(|i| (i, Algorithm::Random, &[][..])).collect();
    let of_kind = |kind, count: u8| Service {
        frontends: (1..=count).map(|i| (([10, 0, 1, i], 80).into(), kind)).collect(),
        source_ranges: (1..=count).map(|i| IpNet::from(IpAddr::from([10, 9, 0, i]))).collect(),
        ..Service::default()
    };
    let cases: [(_, &str, u64); 5] = [
        (plain(&[(1, Algorithm::Random, &many)]), "--max-backends", 20),
        (plain(&services), "--max-services", 9),
        (plain(&[(1, Algorithm::Maglev, &many[..15])]), "--max-slots", 2039 + 2),
        (decided([(1, of_kind(FrontendKind::ExternalIp, 17))]), "--max-services", 18),
        (decided([(1, of_kind(FrontendKind::LoadBalancer, 9))]), "--max-source-ranges", 9),
    ];
    for (too_much, expected_flag, expected_need) in cases {
        let usage = tables.usage();
        match tables.apply(&too_much) {
            Err(DataplaneError::Full { flag, needed, .. }) => {
                assert_eq!((flag, needed), (expected_flag, expected_need));
            }
            other => panic!("{other:?}"),
        }
        check(&tables, &state);
        assert_eq!(tables.usage(), usage, "nothing leaked");
    }
    tables.apply(&Arc::default()).unwrap();
    tables.reclaim().unwrap();
    assert!(tables.usage().iter().all(|usage| usage.used == 0), "{:?}", tables.usage());
}

#[test]
fn a_wait_that_others_overtake_frees_what_rested_before_it_and_nothing_else() {
    let mut tables = tables();
    let set = |tables: &mut Tables<Memory>, backend| {
        tables.apply(&plain(&[(1, Algorithm::Random, &[(backend, 1)])])).unwrap();
    };
    set(&mut tables, 1);
    assert_eq!(tables.begin_wait(), None, "nothing rests");
    set(&mut tables, 2);
    let first = tables.begin_wait().unwrap();
    set(&mut tables, 3);
    assert_eq!(tables.begin_wait(), None, "one at a time");
    tables.free(first);
    assert_eq!(tables.gone(), 1);
    // A wait that failed: the next one is for all.
    let second = tables.begin_wait().unwrap();
    set(&mut tables, 4);
    tables.give_up(second);
    let third = tables.begin_wait().unwrap();
    assert_eq!(tables.gone(), 1);
    // Meanwhile there is no room, and all is reclaimed at once.
    tables.reclaim().unwrap();
    assert_eq!(tables.gone(), 3);
    set(&mut tables, 5);
    let fourth = tables.begin_wait().unwrap();
    for late in [first, second, third] {
        tables.free(late);
        tables.give_up(late);
    }
    assert_eq!(tables.gone(), 3, "their time is over");
    tables.free(fourth);
    assert_eq!((tables.gone(), tables.usage()[4].used), (4, 1));
}

#[test]
fn a_full_table_is_reclaimed_before_it_is_refused() {
    let mut tables = tables();
    for round in 0..50_u8 {
        let first = round % 2 * 10;
        let backends: Vec<_> = (first..first + 10).map(|j| (j, 1)).collect();
        tables.apply(&plain(&[(1, Algorithm::Maglev, &backends)])).unwrap_or_else(|error| {
            panic!("round {round}: {error}");
        });
        // Two Maglev tables of 1,021 slots do not fit beside one another, and the third round would be one too many.
        tables.apply(&Arc::default()).unwrap();
    }
}

/// From what a source says to what the kernel finds: some 60 ms of CPU time from nothing.
#[test]
#[cfg_attr(debug_assertions, ignore = "about speed: run with --release --nocapture")]
fn large_states_are_applied_in_time() {
    let mut desired = Desired::default();
    let sizes = Sizes::DEFAULT;
    for i in 0..5_000_u32 {
        let [.., high, low] = i.to_be_bytes();
        let backend = |j| (SocketAddr::from(([11, j, high, low], 8080)), Endpoint::READY);
        let service = Service {
            frontends: [(([10, 0, high, low], 80).into(), FrontendKind::ClusterIp)].into(),
            node_port: Some(30_000 + i as u16),
            endpoints: (0..50).map(backend).collect(),
            ..Service::default()
        };
        desired.add(name(&i.to_string()), service).unwrap();
    }
    let mut tables = Tables::new(Memory::new(&sizes).unwrap(), sizes);
    let node_port_addresses: BTreeSet<_> = [[192, 0, 2, 1].into()].into();
    let node = Node { addresses: node_port_addresses.clone(), node_port_addresses, ..Node::default() };
    for round in ["from nothing", "again"] {
        let start = std::time::Instant::now();
        tables.apply(&Arc::new(decide(&desired, &node))).unwrap();
        let took = start.elapsed();
        println!("250,000 backends, {round}: {took:?}");
        assert!(took < std::time::Duration::from_millis(500), "{took:?}");
    }
}

prop_compose! {
    fn endpoint()(
        weight in 0_u16..4,
        ready in any::<bool>(), serving in any::<bool>(), terminating in any::<bool>(),
    ) -> Endpoint {
        let conditions = Conditions { ready, serving, terminating };
        Endpoint { weight: Weight::new(weight).unwrap(), conditions, ..Endpoint::READY }
    }
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    prop::sample::select(&[TrafficPolicy::Cluster, TrafficPolicy::Local][..])
}

prop_compose! {
    /// A service of frontends 10.0.`i`.0 to 10.0.`i`.2, some of which another `i` has had before.
    fn service(i: u8)(
        frontends in prop::collection::btree_map(
            0_u8..3,
            prop::sample::select(&[FrontendKind::ClusterIp, FrontendKind::ExternalIp, FrontendKind::LoadBalancer][..]),
            0..3,
        ),
        has_node_port in any::<bool>(),
        external_policy in policy(), internal_policy in policy(),
        algorithm in prop::sample::select(&Algorithm::ALL[..]),
        affinity in 0_u32..2,
        ranges in prop::collection::btree_set(0_u8..3, 0..3),
        endpoints in prop::collection::btree_map(prop::sample::select(vec![0, 1, 2, HERE, HERE + 1]), endpoint(), 0..4),
    ) -> (u8, Service) {
        let range = |prefix: u8| IpNet::new([172, 16, 0, 0].into(), 16 + prefix).unwrap();
        let service = Service {
            frontends: frontends.into_iter().map(|(j, kind)| (([10, 0, i, j], 80).into(), kind)).collect(),
            node_port: has_node_port.then_some(30000 + u16::from(i)),
            source_ranges: ranges.into_iter().map(range).collect(),
            endpoints: endpoints.into_iter().map(|(j, endpoint)| (([10, 1, 0, j], 80).into(), endpoint)).collect(),
            external_policy, internal_policy, algorithm, affinity,
            ..Service::default()
        };
        (i, service)
    }
}

prop_compose! {
    /// Services by any names: what leads to one of them leads to another one in the next state.
    fn state()(
        services in (prop::option::of(service(0)), prop::option::of(service(1)), prop::option::of(service(2))),
        names in Just([0_u8, 1, 2, 3]).prop_shuffle(),
    ) -> Arc<Decided> {
        let (a, b, c) = services;
        let services = [a, b, c].into_iter().flatten();
        decided(services.map(|(i, service)| (names[usize::from(i)], service)))
    }
}

/// Memory that refuses a change now and then, as a kernel may that is short of memory.
struct Refusing {
    memory: Memory,
    /// How many changes are taken before the next one is refused.
    patience: usize,
}

impl Refusing {
    fn take(&mut self) -> Result<&mut Memory, DataplaneError> {
        let refused = || DataplaneError::Grace(std::io::ErrorKind::OutOfMemory.into());
        self.patience = self.patience.checked_sub(1).ok_or_else(refused)?;
        Ok(&mut self.memory)
    }
}

impl Dataplane for Refusing {
    fn services(&self) -> &Region<abi::Service> {
        self.memory.services()
    }

    fn table(&self) -> &Region<Slot> {
        self.memory.table()
    }

    fn backends(&self) -> &Region<Backend> {
        self.memory.backends()
    }

    fn set_frontend(&mut self, frontend: &Frontend, value: abi::Frontend) -> Result<(), DataplaneError> {
        self.take()?.set_frontend(frontend, value)
    }

    fn remove_frontend(&mut self, frontend: &Frontend) -> Result<(), DataplaneError> {
        self.take()?.remove_frontend(frontend)
    }

    fn set_vip(&mut self, address: IpAddr, flags: u32) -> Result<(), DataplaneError> {
        self.take()?.set_vip(address, flags)
    }

    fn remove_vip(&mut self, address: IpAddr) -> Result<(), DataplaneError> {
        self.take()?.remove_vip(address)
    }

    fn add_source(&mut self, service: u32, range: &IpNet) -> Result<(), DataplaneError> {
        self.take()?.add_source(service, range)
    }

    fn remove_source(&mut self, service: u32, range: &IpNet) -> Result<(), DataplaneError> {
        self.take()?.remove_source(service, range)
    }

    fn forget_source(&mut self, range: &SourceRange) -> Result<(), DataplaneError> {
        self.take()?.forget_source(range)
    }

    fn address_bits(&self) -> &Region<u64> {
        self.memory.address_bits()
    }

    fn frontends(&self) -> Result<BTreeMap<Frontend, abi::Frontend>, DataplaneError> {
        self.memory.frontends()
    }

    fn vips(&self) -> Result<BTreeMap<IpAddr, u32>, DataplaneError> {
        self.memory.vips()
    }

    fn sources(&self) -> Result<BTreeMap<SourceRange, u32>, DataplaneError> {
        self.memory.sources()
    }

    fn wait_for_readers(&self) -> Result<(), DataplaneError> {
        self.memory.wait_for_readers()
    }
}

#[test]
fn an_agent_that_starts_again_finds_everything_as_it_was() {
    let mut tables = tables();
    let services: &[Row<'_>] =
        &[(1, Algorithm::Random, &[(1, 1), (HERE, 3), (3, 0)]), (2, Algorithm::Maglev, &[(1, 1)])];
    let state = plain(services);
    tables.apply(&state).unwrap();
    let members = |tables: &Tables<Memory>| tables.members(&name("1")).collect::<Vec<_>>();
    let (before, usage) = (members(&tables), tables.usage());
    let mut again = Tables::open(tables.dataplane, SIZES).unwrap();
    assert_eq!(again.apply(&state).unwrap(), 0);
    check(&again, &state);
    assert_eq!((members(&again), again.usage()), (before, usage));
    // What is there is looked for, whatever became of the bits.
    let bits = again.dataplane().address_bits();
    (0..bits.length()).for_each(|word| bits.set(word, 0));
    assert_ne!(again.audit(false).unwrap(), []);
    let mut again = Tables::open(again.dataplane, SIZES).unwrap();
    assert_eq!(again.apply(&state).unwrap(), 0);
    assert_eq!(again.audit(false).unwrap(), []);
    // A service that nobody wants any more goes, with all that it had.
    let mut third = Tables::open(again.dataplane, SIZES).unwrap();
    let state = plain(&services[..1]);
    third.apply(&state).unwrap();
    check(&third, &state);
    third.apply(&Arc::default()).unwrap();
    third.reclaim().unwrap();
    assert!(third.usage().iter().all(|usage| usage.used == 0), "{:?}", third.usage());
}

/// What somebody does to the maps who should not.
type Spoil<'a> = &'a dyn Fn(&mut Memory);

#[test]
fn drift_is_found_and_repaired() {
    let state = plain(&[(1, Algorithm::Random, &[(1, 1), (2, 1)]), (2, Algorithm::Maglev, &[(HERE, 1)])]);
    let frontend = |text: &str| Frontend { address: text.parse().unwrap(), protocol: Protocol::Tcp };
    let backend = |memory: &Memory, change: &dyn Fn(Backend) -> Backend| {
        memory.backends().set(0, change(memory.backends().get(0)));
    };
    let spoil: [(&str, Spoil<'_>); 16] = [
        ("TABLE 1: 1, not 7", &|memory| memory.table().set(1, Slot::new(7))),
        ("SERVICE 0", &|memory| memory.services().publish(0, offset_of!(abi::Service, cluster), 0)),
        ("SERVICE 1", &|memory| memory.services().publish(1, offset_of!(abi::Service, affinity), 3)),
        ("SERVICE 5", &|memory| memory.services().publish(5, offset_of!(abi::Service, name), 4711)),
        ("BACKENDS 0", &|memory| backend(memory, &|it| Backend { address: [1, 2], ..it })),
        ("BACKENDS 0", &|memory| backend(memory, &|it| Backend { port: Port::from_host(9), ..it })),
        ("BACKENDS 0", &|memory| backend(memory, &|it| Backend { flags: 0, weight: 0, ..it })),
        ("SERVICES4/6 TCP 10.0.0.1:80", &|memory| {
            memory.frontends.remove(&frontend("10.0.0.1:80"));
        }),
        ("SERVICES4/6 TCP 10.0.0.9:80", &|memory| {
            memory.set_frontend(&frontend("10.0.0.9:80"), abi::Frontend { service: 1, flags: 0 }).unwrap();
        }),
        ("SERVICES4/6 TCP 10.0.0.2:80", &|memory| {
            memory.frontends.insert(frontend("10.0.0.2:80"), abi::Frontend { service: 0, flags: 0 });
        }),
        // Nobody looks for it yet.
        ("SERVICES4/6 TCP 203.0.113.9:80: not there", &|memory| {
            memory.frontends.insert(frontend("203.0.113.9:80"), abi::Frontend { service: 1, flags: 0 });
        }),
        ("VIPS4/6 10.0.0.1: flags 0x1, not not there", &|memory| memory.vips.clear()),
        ("VIPS4/6 203.0.113.9: not there", &|memory| {
            memory.vips.insert("203.0.113.9".parse().unwrap(), 1);
        }),
        // All flows to it would be over.
        ("BACKENDS 0: ", &|memory| {
            backend(memory, &|it| Backend { generation: it.generation + 1, ..it });
        }),
        ("BACKENDS 0: ", &|memory| backend(memory, &|it| Backend { withdrawals: it.withdrawals + 1, ..it })),
        ("SOURCES 10.0.0.0/8 to service 1", &|memory| {
            memory.add_source(1, &"10.0.0.0/8".parse().unwrap()).unwrap();
        }),
    ];
    let mut tables = tables();
    tables.apply(&state).unwrap();
    let before = seen(tables.dataplane());
    for (expected, spoil) in spoil {
        spoil(&mut tables.dataplane);
        let text = |drift: &Drift| format!("{} {}: {}, not {}", drift.map, drift.entry, drift.expected, drift.found);
        let found = tables.audit(false).unwrap();
        assert!(found.first().is_some_and(|first| text(first).starts_with(expected)), "{expected}: {found:?}");
        assert_eq!(tables.audit(true).unwrap(), found, "looking changes nothing");
        assert_eq!(tables.audit(false).unwrap(), [], "{expected}");
        assert_eq!(seen(tables.dataplane()), before);
        check(&tables, &state);
    }
}

#[test]
fn source_ranges_that_somebody_else_has_changed_are_put_right() {
    let range = "172.16.0.0/12".parse().unwrap();
    let service = Service {
        frontends: [(([10, 0, 0, 1], 80).into(), FrontendKind::LoadBalancer)].into(),
        source_ranges: [range].into(),
        ..Service::default()
    };
    let state = decided([(1, service)]);
    let ours = SourceRange::new(0, &range);
    let key = |length, service, address| SourceRange::of_key(length, abi::SourceKey::new(service, [address, 0]));
    // The bits after the prefix are nothing to the kernel.
    assert_eq!(key(32 + 12, 0, u64::from_ne_bytes([172, 31, 9, 9, 0, 0, 0, 0])), ours);
    assert_eq!(key(8, u32::from_ne_bytes([0, 1, 2, 3]), 4), key(8, 0, 0));
    let spoil: [(&str, Spoil<'_>); 5] = [
        ("172.16.0.0/12 to service 0: family 4, not family 6", &|memory| {
            memory.sources.insert(ours, abi::SOURCES_IPV6);
        }),
        ("172.16.0.0/12 to service 0: family 4, not family 9", &|memory| {
            memory.sources.insert(ours, 9);
        }),
        ("172.16.0.0/12 to service 0: family 4, not not there", &|memory| memory.sources.clear()),
        // It lets in everybody to all services.
        ("0 bits of [0, 0, 0, 0, 0]: not there, not family 4", &|memory| {
            memory.sources.insert(key(0, 0, 0), abi::SOURCES_IPV4);
        }),
        ("40 bits of ", &|memory| {
            memory.sources.insert(key(40, 0, 1), 7);
        }),
    ];
    let mut tables = tables();
    tables.apply(&state).unwrap();
    for (expected, spoil) in spoil {
        spoil(&mut tables.dataplane);
        let found = tables.audit(true).unwrap();
        let [Drift { map: "SOURCES", entry, expected: wanted, found: said }] = &found[..] else { panic!("{found:?}") };
        assert!(format!("{entry}: {wanted}, not {said}").starts_with(expected), "{expected}: {found:?}");
        assert_eq!(tables.audit(false).unwrap(), [], "{expected}");
        assert_eq!(tables.dataplane().sources, [(ours, abi::SOURCES_IPV4)].into(), "{expected}");
    }
    // While no agent ran, too.
    tables.dataplane_mut().sources.insert(ours, abi::SOURCES_IPV6);
    let mut again = Tables::open(tables.dataplane, SIZES).unwrap();
    again.apply(&state).unwrap();
    check(&again, &state);
}

#[test]
fn what_made_no_sense_in_the_tables_is_set_anew() {
    let state = plain(&[(1, Algorithm::Random, &[(1, 1), (2, 1)]), (2, Algorithm::Random, &[(1, 1), (2, 1)])]);
    let word = |base, length| TableRange { base, length }.to_word();
    let (frontend, nowhere) = (Frontend { address: "10.0.0.9:80".parse().unwrap(), protocol: Protocol::Udp }, 7);
    let spoil: [Spoil<'_>; 6] = [
        &|memory| memory.table().set(0, Slot::new(11)),
        &|memory| memory.services().publish(0, offset_of!(abi::Service, cluster), word(1100, 200)),
        &|memory| memory.services().publish(0, offset_of!(abi::Service, cluster), word(1, 2)),
        &|memory| memory.services().publish(0, offset_of!(abi::Service, name), 4711),
        &|memory| memory.backends().set(0, Backend { weight: 9, ..memory.backends().get(0) }),
        &|memory| {
            memory.frontends.insert(frontend, abi::Frontend { service: nowhere, flags: 0 });
        },
    ];
    for spoil in spoil {
        let mut tables = tables();
        tables.apply(&state).unwrap();
        assert_eq!(tables.audit(false).unwrap(), []);
        spoil(&mut tables.dataplane);
        let mut again = Tables::open(tables.dataplane, SIZES).unwrap();
        again.apply(&state).unwrap();
        check(&again, &state);
        again.apply(&Arc::default()).unwrap();
        again.reclaim().unwrap();
        assert!(again.usage().iter().all(|usage| usage.used == 0), "{:?}", again.usage());
    }
}

proptest! {
    #[test]
    fn what_the_kernel_refuses_is_done_later_and_nothing_leaks(
        history in proptest::collection::vec((state(), 0_usize..12), 1..8),
    ) {
        let sizes = Sizes { services: 64, backends: 256, slots: 1 << 16, source_ranges: 64, ..SIZES };
        let mut tables = Tables::new(Refusing { memory: Memory::new(&sizes).unwrap(), patience: 0 }, sizes);
        for (state, patience) in history {
            tables.dataplane_mut().patience = patience;
            if tables.apply(&state).is_err() {
                tables.dataplane_mut().patience = usize::MAX;
                tables.apply(&state).unwrap();
            }
            let mut fresh = Tables::new(Memory::new(&sizes).unwrap(), sizes);
            fresh.apply(&state).unwrap();
            prop_assert_eq!(seen(&tables.dataplane().memory), seen(fresh.dataplane()));
            tables.reclaim().unwrap();
            prop_assert_eq!(tables.usage(), fresh.usage());
        }
    }

    #[test]
    fn what_an_agent_left_that_was_killed_in_the_middle_becomes_what_is_wanted(
        history in proptest::collection::vec((state(), 0_usize..12, any::<bool>()), 1..8),
    ) {
        let sizes = Sizes { services: 64, backends: 256, slots: 1 << 16, source_ranges: 64, ..SIZES };
        let mut tables = Tables::new(Refusing { memory: Memory::new(&sizes).unwrap(), patience: 0 }, sizes);
        for (state, patience, reclaims) in history {
            tables.dataplane_mut().patience = patience;
            let _killed = tables.apply(&state);
            if reclaims {
                tables.reclaim().unwrap();
            }
            let mut dataplane = tables.dataplane;
            dataplane.patience = usize::MAX;
            tables = Tables::open(dataplane, sizes).unwrap();
            tables.apply(&state).unwrap();
            let mut fresh = Tables::new(Memory::new(&sizes).unwrap(), sizes);
            fresh.apply(&state).unwrap();
            prop_assert_eq!(seen(&tables.dataplane().memory), seen(fresh.dataplane()));
            tables.reclaim().unwrap();
            prop_assert_eq!(tables.usage(), fresh.usage());
        }
    }

    #[test]
    fn after_any_history_the_memory_says_what_is_wanted(
        history in proptest::collection::vec((state(), any::<bool>()), 1..24),
    ) {
        let mut tables = tables();
        for (state, reclaims) in history {
            let before = Arc::clone(&tables.applied);
            match tables.apply(&state) {
                Ok(_) => check(&tables, &state),
                Err(DataplaneError::Full { .. }) => check(&tables, &before),
                Err(error) => return Err(TestCaseError::fail(error.to_string())),
            }
            if reclaims {
                tables.reclaim().unwrap();
            }
        }
        tables.apply(&Arc::default()).unwrap();
        tables.reclaim().unwrap();
        prop_assert!(tables.usage().iter().all(|usage| usage.used == 0), "{:?}", tables.usage());
    }
}
