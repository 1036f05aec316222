//! Every rule of policy, as a table.

use proptest::prelude::*;

use super::*;
use crate::model::Protocol;

const READY: Conditions = Conditions::READY;
const TERMINATING: Conditions = Conditions { ready: false, serving: true, terminating: true };
const NOT_READY: Conditions = Conditions { ready: false, serving: false, terminating: false };
const GONE: Conditions = Conditions { ready: false, serving: false, terminating: true };
/// Kubernetes sets this where `publishNotReadyAddresses` is set.
const PUBLISHED: Conditions = Conditions { ready: true, serving: false, terminating: true };

fn name(name: &str) -> ServiceName {
    ServiceName { name: name.into(), port: "http".into(), protocol: Protocol::Tcp, family: IpFamily::V4 }
}

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A node called `here`, with the address 192.0.2.1, which node ports are on.
fn node() -> Node {
    let addresses: BTreeSet<_> = [address("192.0.2.1"), address("2001:db8::1")].into();
    Node {
        name: Some("here".into()),
        zone: Some("a".into()),
        node_port_addresses: addresses.clone(),
        addresses,
        bind_only: BTreeSet::new(),
        pod_subnets: ["10.244.1.0/24".parse().unwrap()].into(),
    }
}

/// A node, weight and conditions.
type Row = (&'static str, u16, Conditions);

fn service(rows: &[Row]) -> Service {
    let endpoints = (1_u8..).zip(rows).map(|(last, &(node, weight, conditions))| {
        let weight = Weight::new(weight).unwrap();
        let endpoint = Endpoint { weight, node: Some(node.into()), conditions, ..Endpoint::READY };
        (SocketAddr::from(([10, 1, 0, last], 80)), endpoint)
    });
    Service {
        frontends: [(socket("10.96.0.1:80"), FrontendKind::ClusterIp)].into(),
        internal_policy: TrafficPolicy::Local,
        endpoints: endpoints.collect(),
        ..Service::default()
    }
}

fn decided(services: &[(&str, Service)], node: &Node) -> Decided {
    let mut desired = Desired::default();
    for (of, service) in services {
        desired.add(name(of), service.clone()).unwrap();
    }
    decide(&desired, node)
}

/// Which endpoints, by their place, take new flows by policy Cluster and by policy Local.
#[track_caller]
fn check(rows: &[Row], cluster: &[usize], local: &[usize]) {
    let decided = decided(&[("web", service(rows))], &node());
    let backends = &decided.services[&name("web")].backends;
    assert_eq!(backends.len(), rows.len(), "an endpoint that takes no new flow may keep old ones");
    let taking = |takes_new: fn(&Backend) -> bool| -> Vec<usize> {
        (0..).zip(backends).filter(|(_, (_, backend))| takes_new(backend)).map(|(index, _)| index).collect()
    };
    assert_eq!((taking(|b| b.in_cluster), taking(|b| b.in_local)), (cluster.to_vec(), local.to_vec()));
}

#[test]
fn which_endpoints_take_a_new_flow() {
    check(&[], &[], &[]);
    check(&[("here", 1, READY), ("there", 1, READY)], &[0, 1], &[0]);
    check(&[("there", 1, READY)], &[0], &[]);
    // Neither ready nor terminating.
    check(&[("here", 1, READY), ("here", 1, NOT_READY)], &[0], &[0]);
    check(&[("here", 1, NOT_READY), ("there", 1, NOT_READY)], &[], &[]);
    // Terminating ones only where no other is ready.
    check(&[("here", 1, READY), ("here", 1, TERMINATING)], &[0], &[0]);
    check(&[("here", 1, TERMINATING), ("there", 1, TERMINATING)], &[0, 1], &[0]);
    check(&[("here", 1, TERMINATING), ("here", 1, GONE)], &[0], &[0]);
    check(&[("here", 1, GONE), ("there", 1, GONE)], &[], &[]);
    // Local is decided by itself.
    check(&[("here", 1, TERMINATING), ("there", 1, READY)], &[1], &[0]);
    check(&[("here", 1, READY), ("there", 1, TERMINATING)], &[0], &[0]);
    check(&[("here", 1, NOT_READY), ("there", 1, TERMINATING)], &[1], &[]);
    // `publishNotReadyAddresses`.
    check(&[("here", 1, PUBLISHED), ("here", 1, TERMINATING)], &[0], &[0]);
}

/// An endpoint's conditions, and the zones and nodes that it is hinted for.
type Hinted = (Conditions, &'static str, &'static str);

/// Which endpoints, by their place, take new flows by policy Cluster on node `here` in zone `a`.
#[track_caller]
fn check_hints(node: &Node, endpoints: &[Hinted], cluster: &[usize]) {
    let set = |text: &str| text.split_whitespace().map(Into::into).collect();
    let mut service = service(&vec![("there", 1, READY); endpoints.len()]);
    for (endpoint, &(conditions, zones, nodes)) in service.endpoints.values_mut().zip(endpoints) {
        let hints = Some(Arc::new(Hints { zones: set(zones), nodes: set(nodes) }));
        *endpoint = Endpoint { conditions, hints, ..endpoint.clone() };
    }
    let decided = decided(&[("web", service)], node);
    let backends = decided.services[&name("web")].backends.iter();
    let taking = (0..).zip(backends).filter(|(_, (_, backend))| backend.in_cluster).map(|(index, _)| index);
    assert_eq!(taking.collect::<Vec<_>>(), cluster);
}

/// The cases of Kubernetes' `pkg/proxy/topology_test.go` that are about hints, and some more.
#[test]
fn hints_count_where_all_that_are_ready_have_them_and_one_is_for_us() {
    let spread = [(READY, "a", ""), (READY, "b", ""), (READY, "c", ""), (READY, "a", "")];
    check_hints(&node(), &spread, &[0, 3]);
    check_hints(&Node { zone: None, ..node() }, &[(READY, "a", "")], &[0]);
    check_hints(&Node { zone: None, ..node() }, &spread, &[0, 1, 2, 3]);
    check_hints(&Node { zone: Some("z".into()), ..node() }, &spread, &[0, 1, 2, 3]);
    // What is not ready neither counts nor needs a hint.
    check_hints(&node(), &[(READY, "a", ""), (READY, "b", ""), (READY, "c", ""), (NOT_READY, "a", "")], &[0]);
    check_hints(&node(), &[(NOT_READY, "a", ""), (READY, "b", ""), (READY, "c", "")], &[1, 2]);
    check_hints(&node(), &[(READY, "a", ""), (READY, "b", ""), (NOT_READY, "", "")], &[0]);
    check_hints(&node(), &[(READY, "a", ""), (READY, "b", ""), (READY, "", "")], &[0, 1, 2]);
    check_hints(&node(), &[(READY, "c b a", ""), (READY, "b c", ""), (READY, "b d", ""), (READY, "a", "")], &[0, 3]);
    // This node comes before this zone.
    let both = [(READY, "a", "here"), (READY, "b", "n2"), (READY, "c", "n3"), (READY, "a", "n4")];
    check_hints(&node(), &both, &[0]);
    check_hints(&Node { name: Some("n0".into()), ..node() }, &both, &[0, 3]);
    check_hints(&Node { name: None, ..node() }, &both, &[0, 3]);
    check_hints(&node(), &[(READY, "a", "here"), (READY, "", ""), (READY, "a", "n4")], &[0, 1, 2]);
    check_hints(&node(), &[(READY, "", "here"), (READY, "", "n2")], &[0]);
    check_hints(&node(), &[(READY, "", "n1"), (READY, "", "n2")], &[0, 1]);
    // Where none is ready, those that serve until they end count without hints.
    check_hints(&node(), &[(TERMINATING, "a", ""), (TERMINATING, "b", "")], &[0, 1]);
    check_hints(&node(), &[(PUBLISHED, "a", ""), (READY, "b", "")], &[0]);
}

#[test]
fn policy_local_does_not_ask_for_hints() {
    let mut service = service(&[("here", 1, READY), ("here", 1, READY), ("there", 1, READY)]);
    for (endpoint, zone) in service.endpoints.values_mut().zip(["a", "b", "a"]) {
        let hints = Hints { zones: [zone.into()].into(), nodes: BTreeSet::new() };
        *endpoint = Endpoint { hints: Some(Arc::new(hints)), ..endpoint.clone() };
    }
    let decided = decided(&[("web", service)], &node());
    let sets: Vec<_> =
        decided.services[&name("web")].backends.iter().map(|(_, it)| (it.in_cluster, it.in_local)).collect();
    assert_eq!(sets, [(true, true), (false, true), (true, false)]);
}

/// Kubernetes' `TestNoEndpointsMetric`, in `pkg/proxy/nftables/proxier_test.go`, and more.
#[test]
fn services_without_the_local_endpoints_that_they_want_are_counted() {
    use TrafficPolicy::{Cluster, Local};
    let [here, there, nowhere] = [[("here", 1, READY)], [("there", 1, READY)], [("there", 1, NOT_READY)]];
    for (rows, internal, external, expected) in [
        (&here[..], Local, Local, (0, 0)),
        (&there, Local, Cluster, (1, 0)),
        (&there, Cluster, Local, (0, 1)),
        (&there, Local, Local, (1, 1)),
        (&there, Cluster, Cluster, (0, 0)),
        (&nowhere, Local, Local, (0, 0)),
        (&[], Local, Local, (0, 0)),
    ] {
        let web =
            Service { internal_policy: internal, external_policy: external, node_port: Some(30080), ..service(rows) };
        let inside_alone = Service { node_port: None, ..web.clone() };
        let mut desired = Desired::default();
        desired.add(name("web"), web).unwrap();
        let count = |desired: &Desired, family| {
            let decision = Decision::default().next(&Arc::new(desired.clone()), &Arc::new(node()));
            (decision.without_local(family, Clients::Inside), decision.without_local(family, Clients::Outside))
        };
        assert_eq!(count(&desired, IpFamily::V4), expected, "{rows:?}, {internal:?}, {external:?}");
        assert_eq!(count(&desired, IpFamily::V6), (0, 0));
        desired.set(name("web"), Arc::new(inside_alone));
        assert_eq!(count(&desired, IpFamily::V4), (expected.0, 0), "nothing outside leads to it");
    }
}

/// One of a few services, which want each other's frontends; `None` for one that goes.
fn change() -> impl Strategy<Value = (u8, Option<Service>)> {
    let kind =
        || prop::sample::select(vec![FrontendKind::ClusterIp, FrontendKind::ExternalIp, FrontendKind::LoadBalancer]);
    let frontends = prop::collection::btree_map(
        prop::sample::select(vec!["10.96.0.1:80", "10.96.0.1:81", "10.96.0.2:80", "192.0.2.1:80", "192.0.2.1:30080"]),
        kind(),
        0..4,
    );
    let fields = (frontends, 0_u16..2, 0_u64..2, 0_u8..3, any::<bool>(), any::<bool>());
    let service = fields.prop_map(|(frontends, port, created, ranges, is_local, is_ready)| Service {
        frontends: frontends.into_iter().map(|(at, kind)| (socket(at), kind)).collect(),
        node_port: (port > 0).then_some(30080),
        source_ranges: (0..ranges).map(|i| IpNet::new([10, i, 0, 0].into(), 16).unwrap()).collect(),
        external_policy: if is_local { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
        created,
        ..service(&[("here", 1, if is_ready { READY } else { TERMINATING }), ("there", 1, READY)])
    });
    (0_u8..4, prop::option::weighted(0.7, service))
}

proptest! {
    #[test]
    fn what_is_decided_of_changes_is_what_is_decided_of_all(
        states in prop::collection::vec((prop::collection::vec(change(), 0..4), any::<bool>()), 1..8),
    ) {
        let (mut desired, mut decision) = (Desired::default(), Decision::default());
        for (changes, is_served) in states {
            for (i, service) in changes {
                match service {
                    Some(service) => desired.set(name(&i.to_string()), Arc::new(service)),
                    None => desired.remove(&name(&i.to_string())),
                }
            }
            let unserved = Node { node_port_addresses: BTreeSet::new(), ..node() };
            let node = Arc::new(if is_served { node() } else { unserved });
            decision = decision.next(&Arc::new(desired.clone()), &node);
            prop_assert_eq!(&**decision.decided(), &decide(&desired, &node));
        }
        for i in 0..4_u8 {
            desired.remove(&name(&i.to_string()));
        }
        prop_assert_eq!(&desired, &Desired::default());
        let decision = decision.next(&Arc::new(desired), &Arc::new(node()));
        prop_assert_eq!(&**decision.decided(), &Decided::default());
    }
}

#[test]
fn weight_0_takes_no_new_flow_and_makes_no_other_eligible() {
    check(&[("here", 0, READY), ("here", 256, READY), ("there", 0, READY)], &[1], &[1]);
    check(&[("here", 0, READY), ("here", 1, TERMINATING)], &[], &[]);
    check(&[("here", 0, TERMINATING), ("there", 1, TERMINATING)], &[1], &[]);
}

#[test]
fn an_endpoint_is_on_this_node_by_name_or_else_by_address() {
    let nameless = Node { name: None, ..node() };
    for (at, of, node, expected) in [
        ("10.1.0.1", Some("here"), node(), true),
        ("10.1.0.1", Some("there"), node(), false),
        ("10.1.0.1", None, node(), false),
        ("192.0.2.1", None, node(), true),
        ("10.244.1.7", None, node(), true),
        ("10.244.2.7", None, node(), false),
        // The name decides where both are known.
        ("10.244.1.7", Some("there"), node(), false),
        ("10.244.1.7", Some("there"), nameless.clone(), true),
        ("10.1.0.1", Some("here"), nameless, false),
    ] {
        let endpoint = Endpoint { node: of.map(Into::into), ..Endpoint::READY };
        let service = Service { endpoints: [(SocketAddr::new(address(at), 80), endpoint)].into(), ..service(&[]) };
        let decided = decided(&[("web", service)], &node);
        let (_, backend) = decided.services[&name("web")].backends[0];
        assert_eq!((backend.is_on_node, backend.in_local), (expected, expected), "{at} on {of:?}");
        assert!(backend.in_cluster);
    }
}

#[test]
fn an_endpoint_of_a_cluster_is_local_by_name_alone() {
    let nameless = Node { name: None, ..node() };
    for (of, node, expected) in [
        (None, node(), false),
        (Some("here"), node(), true),
        (None, nameless.clone(), true),
        (Some("here"), nameless, true),
    ] {
        let endpoint = Endpoint { node: of.map(Into::into), is_local_by_name: true, ..Endpoint::READY };
        let terminating = Endpoint { node: Some("here".into()), conditions: TERMINATING, ..endpoint.clone() };
        let endpoints = [(socket("10.244.1.7:80"), endpoint), (socket("10.244.1.8:80"), terminating)];
        let service = Service { endpoints: endpoints.into(), ..service(&[]) };
        let decided = decided(&[("web", service)], &node);
        let [first, second] = [0, 1].map(|i| decided.services[&name("web")].backends[i].1);
        assert!(first.is_on_node && first.in_cluster, "{of:?}");
        // As long as no other is, one that ends is for clients of this node.
        assert_eq!((first.in_local, second.in_local), (expected, !expected), "{of:?}");
    }
}

#[test]
fn what_holds_for_a_frontend_of_each_kind() {
    use TrafficPolicy::{Cluster, Local};
    const LOCAL: u32 = abi::Frontend::LOCAL_POLICY;
    const EXTERNAL: u32 = abi::Frontend::EXTERNAL;
    const CHECKED: u32 = abi::Frontend::SOURCE_RANGES;
    let kinds = [
        ("10.96.0.1:80", FrontendKind::ClusterIp),
        ("198.51.100.1:80", FrontendKind::ExternalIp),
        ("203.0.113.1:80", FrontendKind::LoadBalancer),
    ];
    // The flags of the three, and of the node port.
    for (internal_policy, external_policy, ranges, expected) in [
        (Cluster, Cluster, &[][..], [0, EXTERNAL, EXTERNAL, EXTERNAL]),
        (Local, Cluster, &[], [LOCAL, EXTERNAL, EXTERNAL, EXTERNAL]),
        (Cluster, Local, &[], [0, EXTERNAL | LOCAL, EXTERNAL | LOCAL, EXTERNAL | LOCAL]),
        (Cluster, Cluster, &["10.0.0.0/8"], [0, EXTERNAL, EXTERNAL | CHECKED, EXTERNAL]),
        (Local, Local, &["::/0"], [LOCAL, EXTERNAL | LOCAL, EXTERNAL | LOCAL | CHECKED, EXTERNAL | LOCAL]),
    ] {
        let service = Service {
            frontends: kinds.map(|(address, kind)| (socket(address), kind)).into(),
            node_port: Some(30080),
            source_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            internal_policy,
            external_policy,
            ..service(&[("here", 1, READY)])
        };
        let decided = decided(&[("web", service)], &node());
        let flags = ["10.96.0.1:80", "198.51.100.1:80", "203.0.113.1:80", "192.0.2.1:30080"]
            .map(|at| decided.frontends[&Frontend { address: socket(at), protocol: Protocol::Tcp }].flags);
        let [cluster, external, load_balancer, node_port] = expected;
        assert_eq!(flags, [cluster, external, load_balancer, node_port | abi::Frontend::NODE_PORT]);
        assert_eq!(decided.frontends.len(), 4);
        // IPv6 ranges let nobody in over IPv4.
        let sources: Vec<_> = decided.sources.iter().map(|(_, range)| range.to_string()).collect();
        assert_eq!(sources, ranges.iter().filter(|range| !range.contains(':')).copied().collect::<Vec<_>>());
        let (_, backend) = decided.services[&name("web")].backends[0];
        assert_eq!(backend.in_local, internal_policy == Local || external_policy == Local);
    }
}

#[test]
fn local_backends_are_a_set_only_where_a_frontend_asks_for_it() {
    let in_local = |service: Service| {
        let decided = decided(&[("web", service)], &node());
        decided.services[&name("web")].backends[0].1.in_local
    };
    let plain = service(&[("here", 1, READY)]);
    assert!(in_local(plain.clone()));
    let external = Service { internal_policy: TrafficPolicy::Cluster, external_policy: TrafficPolicy::Local, ..plain };
    assert!(!in_local(external.clone()), "a cluster IP does not follow the external policy");
    assert!(in_local(Service { node_port: Some(30080), ..external.clone() }));
    let ranges = ["10.0.0.0/8".parse().unwrap()].into();
    let decided = decided(&[("web", Service { source_ranges: ranges, ..external })], &node());
    assert!(decided.sources.is_empty(), "source ranges are of load balancer addresses");
}

#[test]
fn node_ports_are_on_the_addresses_of_their_family_that_are_given() {
    let service = |frontends: &[(&str, FrontendKind)]| Service {
        frontends: frontends.iter().map(|&(at, kind)| (socket(at), kind)).collect(),
        node_port: Some(30080),
        ..Service::default()
    };
    let frontends = |decided: &Decided| -> Vec<String> {
        let frontends = decided.frontends.iter();
        frontends.map(|(frontend, route)| format!("{} {}", frontend.address, route.service.name)).collect()
    };
    assert_eq!(frontends(&decided(&[("web", service(&[]))], &node())), ["192.0.2.1:30080 web"]);
    let none = Node { node_port_addresses: BTreeSet::new(), ..node() };
    assert_eq!(frontends(&decided(&[("web", service(&[]))], &none)), [""; 0]);
    let guarded = decided(&[("web", service(&[]))], &Node { bind_only: [address("0.0.0.0")].into(), ..node() });
    assert_eq!(frontends(&guarded), ["0.0.0.0:30080 web", "192.0.2.1:30080 web"]);
    let is_bind_only: Vec<_> =
        guarded.frontends.values().map(|route| route.flags & abi::Frontend::BIND_ONLY != 0).collect();
    assert_eq!(is_bind_only, [true, false]);
    // An address that a service names is that service's.
    let other = Service { node_port: None, ..service(&[("192.0.2.1:30080", FrontendKind::ExternalIp)]) };
    assert_eq!(frontends(&decided(&[("a", service(&[])), ("b", other)], &node())), ["192.0.2.1:30080 b"]);
    let mut desired = Desired::default();
    let v6 = ServiceName { family: IpFamily::V6, ..name("web") };
    desired.add(v6, service(&[])).unwrap();
    assert_eq!(frontends(&decide(&desired, &node())), ["[2001:db8::1]:30080 web"]);
}

#[test]
fn an_address_is_a_services_alone_unless_the_node_has_it() {
    let service = |frontends: &[(&str, FrontendKind)]| Service {
        frontends: frontends.iter().map(|&(at, kind)| (socket(at), kind)).collect(),
        node_port: Some(30080),
        ..Service::default()
    };
    let a = service(&[
        ("10.96.0.1:80", FrontendKind::ClusterIp),
        ("10.96.0.2:80", FrontendKind::ExternalIp),
        ("10.96.0.3:80", FrontendKind::LoadBalancer),
        ("192.0.2.1:80", FrontendKind::ExternalIp),
    ]);
    let b = Service { node_port: None, ..service(&[("10.96.0.2:81", FrontendKind::ClusterIp)]) };
    let decided = decided(&[("a", a), ("b", b)], &node());
    let refuses = abi::VipKey::REFUSES;
    let expected = [("10.96.0.1", refuses), ("10.96.0.2", refuses), ("10.96.0.3", 0)];
    assert_eq!(decided.vips, expected.map(|(at, flags)| (address(at), flags)).into_iter().collect());
}
