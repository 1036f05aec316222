use std::{
    fmt::Write as _,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use super::*;
use crate::model::{
    Algorithm, Conditions, Endpoint, FrontendKind, IpFamily, Protocol, Service, ServiceName, TrafficPolicy, Weight,
};

/// A file with one of everything; tests spoil it.
const GOOD: &str = r#"services:
  - name: web
    addresses: [10.96.0.10, "fd00:96::10"]
    ports: [{ name: http, port: 80, targetPort: 8080 }]
    algorithm: maglev
    backends: [10.244.1.5, { address: 10.244.2.7, weight: 2 }, "fd00:244::5"]
  - name: dns
    addresses:
      - 10.96.0.53
    ports:
      - port: 53
      - port: 53
        protocol: UDP
    backends:
      - 10.244.1.9
"#;

/// The fields of a service, a port and a backend, as messages list them.
const FIELDS: &str = "name, type, addresses, externalIPs, loadBalancerIPs, ports, externalTrafficPolicy, \
                      internalTrafficPolicy, loadBalancerSourceRanges, sessionAffinity, sessionAffinityConfig, \
                      affinity, algorithm, backends";
const PORT_FIELDS: &str = "name, port, targetPort, nodePort, protocol";
const BACKEND_FIELDS: &str = "address, weight, nodeName, conditions";

fn parsed(content: impl AsRef<[u8]>) -> Result<Loaded, FileError> {
    parse(Path::new("s.yaml"), content.as_ref(), None)
}

/// The content must be refused with exactly these lines.
#[track_caller]
fn check(content: impl AsRef<[u8]>, expected: &[&str]) {
    match parsed(content) {
        Ok(_) => panic!("accepted; expected {expected:#?}"),
        Err(error) => assert_eq!(error.to_string().lines().collect::<Vec<_>>(), expected),
    }
}

/// A service whose fields are these lines must be refused with exactly these lines. The fields start in line 3.
#[track_caller]
fn check_service(fields: &str, expected: &[&str]) {
    check(format!("services:\n  - name: a\n    {}\n", fields.replace('\n', "\n    ")), expected);
}

/// The good file must be accepted when it is changed so, with exactly these warnings.
#[track_caller]
fn check_warnings(from: &str, to: &str, expected: &[&str]) {
    assert!(GOOD.contains(from));
    match parsed(GOOD.replacen(from, to, 1)) {
        Ok(loaded) => assert_eq!(loaded.warnings, expected),
        Err(error) => panic!("{error}"),
    }
}

fn name(name: &str, port: &str, protocol: Protocol, family: IpFamily) -> ServiceName {
    ServiceName { name: name.into(), port: port.into(), protocol, family }
}

#[test]
fn a_file_becomes_a_service_for_each_port_and_family() {
    let loaded = parsed(GOOD).unwrap();
    assert!(loaded.warnings.is_empty());
    let services = loaded.desired.services();
    let socket = |text: &str| text.parse::<SocketAddr>().unwrap();
    assert_eq!(
        services.keys().cloned().collect::<Vec<_>>(),
        [
            name("dns", "53", Protocol::Tcp, IpFamily::V4),
            name("dns", "53", Protocol::Udp, IpFamily::V4),
            name("web", "http", Protocol::Tcp, IpFamily::V4),
            name("web", "http", Protocol::Tcp, IpFamily::V6),
        ]
    );
    let web = &services[&name("web", "http", Protocol::Tcp, IpFamily::V4)];
    assert_eq!(web.algorithm, Algorithm::Maglev);
    let cluster_ip = |text: &str| [(socket(text), FrontendKind::ClusterIp)].into();
    assert_eq!(web.frontends, cluster_ip("10.96.0.10:80"));
    let heavy = Endpoint { weight: Weight::new(2).unwrap(), ..Endpoint::READY };
    assert_eq!(
        web.endpoints,
        [(socket("10.244.1.5:8080"), Endpoint::READY), (socket("10.244.2.7:8080"), heavy)].into()
    );
    let web6 = &services[&name("web", "http", Protocol::Tcp, IpFamily::V6)];
    assert_eq!(web6.frontends, cluster_ip("[fd00:96::10]:80"));
    assert_eq!(web6.endpoints, [(socket("[fd00:244::5]:8080"), Endpoint::READY)].into());
    let dns = &services[&name("dns", "53", Protocol::Udp, IpFamily::V4)];
    assert_eq!(dns.algorithm, Algorithm::Random);
    assert_eq!(
        **dns,
        Service {
            frontends: cluster_ip("10.96.0.53:53"),
            endpoints: [(socket("10.244.1.9:53"), Endpoint::READY)].into(),
            ..Service::default()
        }
    );
}

/// The example in the README, which has every field.
fn readme() -> &'static str {
    let section = include_str!("../../../../README.md").split("## The services file").nth(1).unwrap();
    section.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap()
}

#[test]
fn the_readmes_example_is_right() {
    let loaded = parsed(readme()).unwrap();
    assert_eq!(loaded.warnings, [""; 0]);
    let services = loaded.desired.services();
    let socket = |text: &str| text.parse::<SocketAddr>().unwrap();
    let web = &services[&name("web", "http", Protocol::Tcp, IpFamily::V4)];
    let frontends = [
        (socket("10.96.0.10:80"), FrontendKind::ClusterIp),
        (socket("192.0.2.10:80"), FrontendKind::ExternalIp),
        (socket("203.0.113.10:80"), FrontendKind::LoadBalancer),
    ];
    let terminating = Conditions { ready: false, serving: true, terminating: true };
    let endpoints = [
        (socket("10.244.1.5:8080"), Endpoint { node: Some("node-1".into()), ..Endpoint::READY }),
        (socket("10.244.2.7:8080"), Endpoint { weight: Weight::new(2).unwrap(), ..Endpoint::READY }),
        (socket("10.244.2.8:8080"), Endpoint { conditions: terminating, ..Endpoint::READY }),
    ];
    let expected = Service {
        frontends: frontends.into(),
        node_port: Some(30080),
        external_policy: TrafficPolicy::Local,
        internal_policy: TrafficPolicy::Cluster,
        algorithm: Algorithm::Maglev,
        affinity: 10_800,
        source_ranges: ["198.51.100.0/24", "2001:db8::/32"].map(|range| range.parse().unwrap()).into(),
        endpoints: endpoints.into(),
        ..Service::default()
    };
    assert_eq!(**web, expected);
    let dns = &services[&name("dns", "53", Protocol::Udp, IpFamily::V6)];
    assert_eq!(dns.affinity, 1_800);
    for field in [FIELDS, PORT_FIELDS, BACKEND_FIELDS].into_iter().flat_map(|fields| fields.split(", ")) {
        assert!(readme().contains(&format!("{field}:")), "{field} is not in the example");
    }
}

#[test]
fn no_services_must_be_said() {
    assert!(parsed("services: []").unwrap().desired.services().is_empty());
    let missing = ["s.yaml:1:1: services: missing; a file without services says `services: []`"];
    check("", &missing);
    check("# nothing yet\n", &missing);
    check("services:\n", &missing);
    check("{}", &missing);
    check("---\n", &["s.yaml:1:4: a map of fields is expected here"]);
}

#[test]
fn names_of_all_kinds() {
    for good in ["web", "ns/web", "10", "yes", "3.10", "Straße", "a:b"] {
        let loaded = parsed(GOOD.replace("name: web", &format!("name: {good}"))).unwrap();
        assert!(loaded.desired.services().keys().any(|name| &*name.name == good), "{good}");
    }
}

#[test]
fn what_is_wrong_with_names() {
    let rest = "addresses: [10.0.0.1], ports: [{ port: 80 }], backends: []";
    let check = |name: &str, expected: &str| check(format!("services: [{{ name: {name}, {rest} }}]"), &[expected]);
    check("''", "s.yaml:1:20: services[0].name: empty; a name has at least one character");
    check("a b", "s.yaml:1:20: services[0].name: `a b` has ' ' in it; a name has no blanks and no control characters");
    check(
        r#""\e[1m""#,
        r"s.yaml:1:20: services[0].name: `\u{1b}[1m` has '\u{1b}' in it; a name has no blanks and no control characters",
    );
    check(&"x".repeat(254), "s.yaml:1:20: services[0].name: longer than 253 characters");
    check("~", "s.yaml:1:12: services[0].name: missing");
}

#[test]
fn every_mistake_is_told_in_the_order_of_the_file() {
    check(
        "services:\n\
         - ports: [{ port: 0, targetPort: 70000 }, { protocol: DCCP, port: 5 }, {}]\n  \
           algorithm: fastest\n  \
           addresses: [127.0.0.1, '::', 10.0.0.256]\n  \
           backends: [{ weight: 257 }, 10.0.0.1:80, { address: 224.0.0.1 }]\n",
        &[
            "s.yaml:2:3: services[0].name: missing",
            "s.yaml:2:19: services[0].ports[0].port: 0 is not a port (1 to 65535)",
            "s.yaml:2:34: services[0].ports[0].targetPort: 70000 is not a port (1 to 65535)",
            "s.yaml:2:55: services[0].ports[1].protocol: DCCP is not a protocol that Wharf balances (TCP, UDP, SCTP)",
            "s.yaml:2:72: services[0].ports[2].port: missing",
            "s.yaml:3:14: services[0].algorithm: fastest is not an algorithm \
             (random, round-robin, maglev, source-hash, least-connections)",
            "s.yaml:4:15: services[0].addresses[0]: 127.0.0.1 is a loopback address: it can't be reached over a wire",
            "s.yaml:4:26: services[0].addresses[1]: :: is the unspecified address; name the address itself",
            "s.yaml:4:32: services[0].addresses[2]: 10.0.0.256 is not an IP address (without port, prefix length or interface)",
            "s.yaml:5:14: services[0].backends[0].address: missing",
            "s.yaml:5:24: services[0].backends[0].weight: 257 is not a weight (0 to 256; 0: no new connections)",
            "s.yaml:5:31: services[0].backends[1]: 10.0.0.1:80 is not an IP address (without port, prefix length or interface)",
            "s.yaml:5:55: services[0].backends[2].address: 224.0.0.1 is a multicast address: a connection has one other end",
        ],
    );
}

#[test]
fn twenty_mistakes_are_enough() {
    let mut content = "services:\n".to_owned();
    for index in 0..30 {
        write!(content, "- name: s{index}\n  addresses: [10.0.0.{index}]\n  ports: [{{ port: x }}]\n  backends: []\n")
            .unwrap();
    }
    let error = parsed(content).unwrap_err().to_string();
    let lines: Vec<_> = error.lines().collect();
    assert_eq!(lines.len(), 21);
    assert_eq!(lines[19], "s.yaml:80:19: services[19].ports[0].port: x is not a port (1 to 65535)");
    assert_eq!(lines[20], "s.yaml: and 10 more");
}

#[test]
fn what_nothing_can_reach() {
    for (address, reason) in [
        ("0.0.0.0", "is the unspecified address; name the address itself"),
        ("::1", "is a loopback address: it can't be reached over a wire"),
        ("ff02::1", "is a multicast address: a connection has one other end"),
        ("255.255.255.255", "is the broadcast address: a connection has one other end"),
        ("::ffff:10.0.0.1", "is an IPv4 address in IPv6 notation; write it as an IPv4 address"),
        ("fe80::1", "is a link-local address: it means nothing without an interface, so no route leads to it"),
    ] {
        check_service(
            &format!("addresses: ['{address}']\nports: [{{ port: 80 }}]\nbackends: []"),
            &[&format!("s.yaml:3:17: services[0].addresses[0]: {address} {reason}")],
        );
        check_service(
            &format!("addresses: [10.0.0.1]\nports: [{{ port: 80 }}]\nbackends: ['{address}']"),
            &[&format!("s.yaml:5:16: services[0].backends[0]: {address} {reason}")],
        );
    }
}

#[test]
fn what_is_missing() {
    check_service(
        "algorithm: random",
        &[
            "s.yaml:2:5: services[0].addresses: missing; a service has at least one address, of any kind, or a nodePort",
            "s.yaml:2:5: services[0].ports: missing; a service has at least one port",
            "s.yaml:2:5: services[0].backends: missing; a service without backends says `backends: []`",
        ],
    );
}

#[test]
fn what_is_there_twice() {
    check_service(
        "addresses: [10.0.0.1, 'fd00::1', 'fd00:0::1']\n\
         ports: [{ port: 80, name: x }, { port: 81, name: x }, { port: 80 }, { port: 80, protocol: UDP }]\n\
         backends: [10.0.0.9, { address: 10.0.0.9, weight: 3 }]",
        &[
            "s.yaml:3:38: services[0].addresses[2]: fd00::1 is listed twice",
            "s.yaml:4:36: services[0].ports[1]: the service has another port called x",
            "s.yaml:4:59: services[0].ports[2]: TCP port 80 is listed twice",
            "s.yaml:5:26: services[0].backends[1]: 10.0.0.9 is listed twice; say it once, with a weight",
        ],
    );
    check(
        GOOD.replace("name: dns", "name: web"),
        &["s.yaml:7:5: services[1].name: web is also the name of the service in line 2"],
    );
    check_service(
        "addresses: [10.0.0.1]\nports: [{ port: 80, name: '443' }]\nbackends: []",
        &["s.yaml:4:31: services[0].ports[0].name: 443 reads like a port number; a port's name has a letter in it"],
    );
}

#[test]
fn a_frontend_belongs_to_one_service() {
    check(
        GOOD.replace("10.96.0.53", "10.96.0.10").replacen("port: 53", "port: 80", 1),
        &["s.yaml:9:9: services[1].addresses[0]: TCP 10.96.0.10:80 of dns is already a frontend of web in line 2"],
    );
    // The other protocol's port of the same number is free.
    assert!(
        parsed(GOOD.replace("10.96.0.53", "10.96.0.10").replace("port: 53", "port: 80").replacen("80\n", "81\n", 1))
            .is_ok()
    );
}

#[test]
fn families_without_a_counterpart() {
    check_warnings(
        ", \"fd00:244::5\"",
        "",
        &["s.yaml:2:5: services[0]: no IPv6 backends: what is sent to fd00:96::10 is refused"],
    );
    check_warnings(
        ", \"fd00:96::10\"",
        "",
        &["s.yaml:2:5: services[0]: its IPv6 backends serve nothing: it has no IPv6 address"],
    );
    check_warnings(
        "backends: [10.244.1.5, { address: 10.244.2.7, weight: 2 }, \"fd00:244::5\"]",
        "backends: []",
        &[
            "s.yaml:2:5: services[0]: no IPv4 backends: what is sent to 10.96.0.10 is refused",
            "s.yaml:2:5: services[0]: no IPv6 backends: what is sent to fd00:96::10 is refused",
        ],
    );
}

#[test]
fn fields_that_are_not_there() {
    for (line, at, path, field, fields) in [
        ("\"\\e\": 5", 5, ".\\u{1b}", "\\u{1b}", FIELDS),
        ("adresses: []", 5, ".adresses", "adresses", FIELDS),
        ("ports: [{ hostPort: 1 }]", 15, ".ports[0].hostPort", "hostPort", PORT_FIELDS),
        ("backends: [{ value: 5 }]", 18, ".backends[0]", "value", BACKEND_FIELDS),
        ("backends: [{ port: 1 }]", 18, ".backends[0].port", "port", BACKEND_FIELDS),
        (
            "backends: [{ conditions: { live: true } }]",
            32,
            ".backends[0].conditions.live",
            "live",
            "ready, serving, terminating",
        ),
        ("sessionAffinityConfig: { clientIp: {} }", 30, ".sessionAffinityConfig.clientIp", "clientIp", "clientIP"),
    ] {
        let expected = format!("s.yaml:3:{at}: services[0]{path}: `{field}` is no field; the fields here are {fields}");
        check_service(line, &[&expected]);
    }
    check_service(
        "clusterIP: 10.0.0.1",
        &["s.yaml:3:5: services[0].clusterIP: the list of cluster IPs is called `addresses` here"],
    );
}

#[test]
fn objects_of_kubernetes_in_place_of_services() {
    let none = "s.yaml:1:1: no Service, EndpointSlice or List of them is here; an empty List says that there are none";
    check("apiVersion: v1\nkind: ConfigMap\n", &[none]);
    check("{\"kind\": \"Pod\"}", &[none]);
    let list = "apiVersion: v1\nitems: []\nkind: List\n";
    assert!(parsed(list).unwrap().desired.services().is_empty());
    let service = "kind: Service\napiVersion: v1\nmetadata: { namespace: ns, name: a }\n\
                   spec: { clusterIP: 10.0.0.1, ports: [{ port: 80 }] }\n";
    assert_eq!(
        parsed(format!("{service}---\n{list}---\n{}", service.replace("name: a", "name: b")))
            .unwrap()
            .desired
            .services()
            .len(),
        2
    );
}

#[test]
fn each_object_may_be_a_document_of_its_own() {
    let services = (0..1_500).map(|i| {
        let [high, low] = u16::to_be_bytes(i);
        let spec = format!("{{ clusterIP: 10.0.{high}.{low}, ports: [{{ port: 80 }}] }}");
        format!("---\nkind: Service\napiVersion: v1\nmetadata: {{ namespace: ns, name: s{i} }}\nspec: {spec}\n")
    });
    assert_eq!(parsed(services.collect::<String>()).unwrap().desired.services().len(), 1_500);
}

/// What kubectl prints of 44,128 services with 250,011 endpoints has 11.3 million nodes, 85 MiB of scalars, and 290 MiB as JSON.
#[test]
fn there_is_room_for_the_largest_clusters() {
    let budget = super::wire::options().budget.unwrap();
    assert!(budget.max_nodes > 22_600_000 && budget.max_events >= 3 * budget.max_nodes);
    assert!(budget.max_total_scalar_bytes > 170 << 20 && budget.max_documents > 500_000);
    const { assert!(super::MAX_BYTES > 580 << 20) };
}

#[test]
fn mistakes_in_objects_have_their_places() {
    for (text, expected) in [
        ("kind: Service\nmetadata: { name: a }\nspec: { ports: [{ port: x }] }\n", "3:25: invalid i32"),
        (
            "apiVersion: v1\nitems:\n- kind: Node\n- kind: Service\n  spec:\n    ports: 80\nkind: List\n",
            "6:12: a list is expected here",
        ),
        ("kind: Node\n---\nkind: Service\nmetadata: []\n", "4:11: a map of fields is expected here"),
        (
            "apiVersion: discovery.k8s.io/v1\nendpoints:\n- addresses: 10.0.0.1\nkind: EndpointSlice\n",
            "3:14: a list is expected here",
        ),
        ("spec:\n  ports: [{ port: x }]\nkind: Service\n", "1:1: spec: invalid type: string \"x\", expected i32"),
        ("kind: List\nitems:\n- metadata: { name: a }\n", "3:3: missing field `kind`"),
        (
            "{\"kind\": \"List\",\n\"items\": [{\"kind\": \"Service\",\n\"spec\": {\"ports\": 80}}]}",
            "3:20: invalid type: integer `80`, expected a sequence",
        ),
        ("{\"kind\": \"List\",\n\"items\": [", "2:10: EOF while parsing a list"),
    ] {
        check(text, &[&format!("s.yaml:{expected}")]);
    }
}

#[test]
fn objects_are_told_by_kind_and_group_in_whichever_order_their_fields_stand() {
    let service = "spec: { clusterIP: 10.0.0.1, ports: [{ port: 80 }] }\nmetadata: { name: a, namespace: ns, managedFields: 7 }\nkind: Service\n";
    let of_knative = "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: { name: b }\nspec: { ports: 7 }\n";
    let slice = "addressType: IPv4\nendpoints: [{ addresses: [10.0.0.9] }]\nports: [{ name: '', port: 80 }]\n\
                 metadata: { name: x, namespace: ns, labels: { kubernetes.io/service-name: a } }\nkind: EndpointSlice\n";
    let desired = parsed(format!("{service}---\n{of_knative}---\n{slice}")).unwrap().desired;
    let service = desired.services().values().next().unwrap();
    assert_eq!((desired.services().len(), service.endpoints.len()), (1, 1));
}

/// A service of one TCP port 80 and a backend, with these lines, must be refused with exactly these lines.
#[track_caller]
fn check_with(fields: &str, expected: &[&str]) {
    check_service(&format!("{fields}\nports: [{{ port: 80 }}]\nbackends: [10.0.0.9]"), expected);
}

/// A service with these lines must be accepted, with exactly these warnings; gives what it became in IPv4.
#[track_caller]
fn accepted(fields: &str, warnings: &[&str]) -> Service {
    let loaded = parsed(format!("services:\n  - name: a\n    {}\n", fields.replace('\n', "\n    ")));
    let loaded = loaded.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.warnings, warnings);
    let (_, service) = loaded.desired.services().iter().find(|(name, _)| name.family == IpFamily::V4).unwrap();
    Service::clone(service)
}

const REST: &str = "ports: [{ port: 80 }]\nbackends: [10.0.0.9]";

#[test]
fn what_a_type_has_and_has_not() {
    check_with(
        "type: ExternalName\naddresses: [10.0.0.1]",
        &[
            "s.yaml:3:11: services[0].type: an ExternalName is not balanced: its name server is asked; leave the service out",
        ],
    );
    check_with(
        "type: Headless\naddresses: [10.0.0.1]",
        &["s.yaml:3:11: services[0].type: Headless is not a type (ClusterIP, NodePort, LoadBalancer)"],
    );
    check_with(
        "type: NodePort\nloadBalancerIPs: [10.0.0.1]",
        &[
            "s.yaml:4:23: services[0].loadBalancerIPs: only a service of `type: LoadBalancer` has them",
            "s.yaml:5:13: services[0].ports[0].nodePort: missing; a service of `type: NodePort` has one for each port, \
             as nobody here allocates them",
        ],
    );
    check_service(
        "addresses: [10.0.0.1]\nports: [{ port: 80, nodePort: 30080 }]\nbackends: []",
        &[
            "s.yaml:4:35: services[0].ports[0].nodePort: only a service of `type: NodePort` or `type: LoadBalancer` has one",
        ],
    );
    check_service(
        "type: NodePort\nports: [{ port: 80, nodePort: 0 }, { port: 81, nodePort: 30081 }, { port: 82, nodePort: 30081 }]\nbackends: []",
        &[
            "s.yaml:4:35: services[0].ports[0].nodePort: 0 is not a port (1 to 65535)",
            "s.yaml:4:71: services[0].ports[2]: TCP node port 30081 is listed twice",
        ],
    );
    let balancer = accepted(&format!("type: LoadBalancer\nloadBalancerIPs: [10.0.0.1]\n{REST}"), &[]);
    assert_eq!(balancer.node_port, None, "Kubernetes need not allocate one either");
}

#[test]
fn an_address_has_one_kind() {
    check_with(
        "type: LoadBalancer\naddresses: [10.0.0.1]\nexternalIPs: [10.0.0.1, 10.0.0.2, 10.0.0.2]\nloadBalancerIPs: [10.0.0.2, 127.0.0.1]",
        &[
            "s.yaml:5:19: services[0].externalIPs[0]: 10.0.0.1 is one of the addresses, too; say which it is",
            "s.yaml:5:39: services[0].externalIPs[2]: 10.0.0.2 is listed twice",
            "s.yaml:6:23: services[0].loadBalancerIPs[0]: 10.0.0.2 is one of the externalIPs, too; say which it is",
            "s.yaml:6:33: services[0].loadBalancerIPs[1]: 127.0.0.1 is a loopback address: it can't be reached over a wire",
        ],
    );
}

#[test]
fn where_a_node_port_is_served() {
    let families = |fields: &str, warnings: &[&str]| {
        let loaded = parsed(format!("services:\n- {{ name: a, type: NodePort, {fields} }}")).unwrap();
        assert_eq!(loaded.warnings, warnings);
        loaded.desired.services().keys().map(|name| name.family).collect::<Vec<_>>()
    };
    let ports = "ports: [{ port: 80, nodePort: 30080 }]";
    assert_eq!(families(&format!("{ports}, backends: [10.0.0.9]"), &[]), [IpFamily::V4]);
    assert_eq!(families(&format!("{ports}, backends: [10.0.0.9, 'fd00::9']"), &[]), [IpFamily::V4, IpFamily::V6]);
    assert_eq!(
        families(
            &format!("{ports}, backends: [], addresses: ['fd00::1']"),
            &["s.yaml:2:3: services[0]: no IPv6 backends: what is sent to fd00::1 is refused"]
        ),
        [IpFamily::V6]
    );
    assert_eq!(
        families(
            &format!("{ports}, backends: []"),
            &[
                "s.yaml:2:3: services[0]: no IPv4 backends: what is sent to its node ports is refused",
                "s.yaml:2:3: services[0]: no IPv6 backends: what is sent to its node ports is refused",
            ]
        ),
        [IpFamily::V4, IpFamily::V6]
    );
}

#[test]
fn a_node_port_and_an_address_belong_to_one_service() {
    let service = |name: &str, fields: &str| {
        format!("- {{ name: {name}, type: NodePort, {fields}, backends: [10.1.0.1, 'fd00::1'] }}\n")
    };
    let ports = "ports: [{ port: 80, nodePort: 30080 }]";
    check(
        format!("services:\n{}{}", service("a", ports), service("b", ports)),
        &[
            "s.yaml:3:60: services[1].ports[0].nodePort: TCP node port 30080 of b is already the node port of a in line 2",
        ],
    );
    let external = "externalIPs: [10.0.0.1], ports: [{ port: 80, nodePort: 3008";
    check(
        format!(
            "services:\n{}{}",
            service("a", &format!("{external}0 }}]")),
            service("b", &format!("{external}1 }}]"))
        ),
        &["s.yaml:3:44: services[1].externalIPs[0]: TCP 10.0.0.1:80 of b is already a frontend of a in line 2"],
    );
    // One number may be a node port of each protocol.
    let both = "ports: [{ port: 80, nodePort: 30080 }, { port: 80, nodePort: 30080, protocol: UDP }]";
    assert_eq!(parsed(format!("services:\n{}", service("a", both))).unwrap().desired.services().len(), 4);
}

#[test]
fn policies() {
    check_with(
        "addresses: [10.0.0.1]\nexternalTrafficPolicy: local\ninternalTrafficPolicy: Node",
        &[
            "s.yaml:4:28: services[0].externalTrafficPolicy: local is not a policy (Cluster, Local)",
            "s.yaml:5:28: services[0].internalTrafficPolicy: Node is not a policy (Cluster, Local)",
        ],
    );
    let both = "externalTrafficPolicy: Local\ninternalTrafficPolicy: Local";
    let service = accepted(
        &format!("addresses: [10.0.0.1]\n{both}\n{REST}"),
        &["s.yaml:4:28: services[0].externalTrafficPolicy: concerns externalIPs, loadBalancerIPs and nodePorts, \
           and the service has none"],
    );
    assert_eq!((service.external_policy, service.internal_policy), (TrafficPolicy::Local, TrafficPolicy::Local));
    accepted(
        &format!("externalIPs: [10.0.0.1]\n{both}\n{REST}"),
        &["s.yaml:5:28: services[0].internalTrafficPolicy: concerns addresses, and the service has none"],
    );
}

#[test]
fn source_ranges() {
    check_with(
        "type: LoadBalancer\nloadBalancerIPs: [10.0.0.1]\n\
         loadBalancerSourceRanges: [10.0.0.0/8, 10.0.0.1/8, 10.0.0.1, 'fd00::1', 10.0.0.0/33, 10.0.0.0/8]",
        &[
            "s.yaml:5:44: services[0].loadBalancerSourceRanges[1]: 10.0.0.1/8 has bits beyond its prefix length; write 10.0.0.0/8",
            "s.yaml:5:56: services[0].loadBalancerSourceRanges[2]: 10.0.0.1 has no prefix length; \
             for this address alone write 10.0.0.1/32",
            "s.yaml:5:66: services[0].loadBalancerSourceRanges[3]: fd00::1 has no prefix length; \
             for this address alone write fd00::1/128",
            "s.yaml:5:77: services[0].loadBalancerSourceRanges[4]: 10.0.0.0/33 is not a range of IP addresses (such as 192.0.2.0/24)",
            "s.yaml:5:90: services[0].loadBalancerSourceRanges[5]: 10.0.0.0/8 is listed twice",
        ],
    );
    accepted(
        &format!("addresses: [10.0.0.1]\nloadBalancerSourceRanges: [10.0.0.0/8]\n{REST}"),
        &["s.yaml:4:32: services[0].loadBalancerSourceRanges: concerns loadBalancerIPs, and the service has none"],
    );
    let balancer = "type: LoadBalancer\nloadBalancerIPs: [10.0.0.1]";
    let service = accepted(
        &format!("{balancer}\nloadBalancerSourceRanges: ['fd00::/8']\n{REST}"),
        &["s.yaml:2:5: services[0].loadBalancerSourceRanges: no IPv4 range: 10.0.0.1 serves nobody from outside"],
    );
    assert!(!service.source_ranges.is_empty(), "it is restricted all the same");
}

#[test]
fn session_affinity() {
    let config = |seconds: &str| format!("sessionAffinityConfig: {{ clientIP: {{ timeoutSeconds: {seconds} }} }}");
    let seconds = |fields: &str| accepted(&format!("addresses: [10.0.0.1]\n{fields}\n{REST}"), &[]).affinity;
    for (fields, expected) in [
        ("sessionAffinity: None", 0),
        ("sessionAffinity: ClientIP", 10_800),
        ("sessionAffinity: ClientIP\nsessionAffinityConfig: {}", 10_800),
        (&format!("sessionAffinity: ClientIP\n{}", config("86400")), 86_400),
        ("affinity: 3h", 10_800),
        ("affinity: 1h 30m", 5_400),
        ("affinity: 1s", 1),
    ] {
        assert_eq!(seconds(fields), expected, "{fields}");
    }
    let refused = |fields: &str, expected: &[&str]| check_with(&format!("addresses: [10.0.0.1]\n{fields}"), expected);
    refused(
        "sessionAffinity: Cookie",
        &["s.yaml:4:22: services[0].sessionAffinity: Cookie is not a kind of session affinity (None, ClientIP)"],
    );
    for wrong in ["0", "86401", "3h"] {
        refused(
            &format!("sessionAffinity: ClientIP\n{}", config(wrong)),
            &[&format!(
                "s.yaml:5:58: services[0].sessionAffinityConfig.clientIP.timeoutSeconds: {wrong} is not a number of seconds (1 to 86400)"
            )],
        );
    }
    for wrong in ["10800", "0s", "25h", "1500ms", "soon"] {
        refused(
            &format!("affinity: {wrong}"),
            &[&format!(
                "s.yaml:4:15: services[0].affinity: {wrong} is not a duration of whole seconds, 1s to 24h (such as 3h or 1h 30m)"
            )],
        );
    }
    refused(
        "affinity: 3h\nsessionAffinity: ClientIP",
        &["s.yaml:4:15: services[0].affinity: sessionAffinity says the same at greater length; leave one of them out"],
    );
    refused(
        &format!("sessionAffinity: None\n{}", config("60")),
        &[
            "s.yaml:5:28: services[0].sessionAffinityConfig: without `sessionAffinity: ClientIP` there is nothing to configure",
        ],
    );
}

#[test]
fn sctp_keeps_its_ports() {
    let why = "the checksum of SCTP is over the whole packet (RFC 9260, section 6.8), so Wharf changes no ports of it";
    check_service(
        "type: NodePort\nports: [{ port: 80, protocol: SCTP, targetPort: 8080, nodePort: 30080 }]\nbackends: [10.0.0.9]",
        &[
            &format!(
                "s.yaml:4:53: services[0].ports[0].targetPort: 8080 is not 80: {why}; leave targetPort out, or make it 80"
            ),
            &format!(
                "s.yaml:4:69: services[0].ports[0].nodePort: 30080 is not 80: {why}; leave nodePort out, or make it 80"
            ),
        ],
    );
    let port = "ports: [{ port: 30080, protocol: SCTP, targetPort: 30080, nodePort: 30080 }]";
    let service = accepted(&format!("type: NodePort\n{port}\nbackends: [10.0.0.9]"), &[]);
    assert_eq!(service.node_port, Some(30080));
}

#[test]
fn what_is_known_of_an_endpoint() {
    let conditions = |text: &str, warnings: &[&str]| {
        let backend = format!("{{ address: 10.0.0.9, nodeName: n, conditions: {text} }}");
        let service =
            accepted(&format!("addresses: [10.0.0.1]\nports: [{{ port: 80 }}]\nbackends: [{backend}]"), warnings);
        let (_, endpoint) = service.endpoints.into_iter().next().unwrap();
        assert_eq!(endpoint.node.as_deref(), Some("n"));
        let Conditions { ready, serving, terminating } = endpoint.conditions;
        [ready, serving, terminating]
    };
    assert_eq!(conditions("{}", &[]), [true, true, false]);
    assert_eq!(conditions("{ ready: false }", &[]), [false, false, false]);
    assert_eq!(conditions("{ ready: false, serving: true, terminating: true }", &[]), [false, true, true]);
    assert_eq!(conditions("{ ready: true, terminating: true }", &[]), [true, true, true], "publishNotReadyAddresses");
    assert_eq!(
        conditions(
            "{ terminating: true }",
            &[
                "s.yaml:5:16: services[0].backends[0]: terminating, and yet it takes new flows: without `ready: false` it is ready"
            ]
        ),
        [true, true, true]
    );
    check_service(
        "addresses: [10.0.0.1]\nports: [{ port: 80 }]\nbackends: [{ address: 10.0.0.9, nodeName: '', conditions: { ready: 1 } }]",
        &[
            "s.yaml:5:47: services[0].backends[0].nodeName: empty; a name has at least one character",
            "s.yaml:5:72: services[0].backends[0].conditions.ready: 1 is neither true nor false",
        ],
    );
}

#[test]
fn things_of_the_wrong_shape() {
    check("5", &["s.yaml:1:1: a map of fields is expected here"]);
    check("services: 5", &["s.yaml:1:11: services: a list is expected here"]);
    check("services: [5]", &["s.yaml:1:12: services[0]: a map of fields is expected here"]);
    check_service("name: b", &["s.yaml:3:5: services[0]: duplicate mapping key `name` is not allowed here"]);
    check_service("ports: 80", &["s.yaml:3:12: services[0].ports: a list is expected here"]);
    check_service("ports: [80]", &["s.yaml:3:13: services[0].ports[0]: a map of fields is expected here"]);
    check_service(
        "ports: [{ port: [80] }]",
        &["s.yaml:3:21: services[0].ports[0].port: a single value is expected here"],
    );
    check_service("addresses: [~]", &["s.yaml:3:17: services[0].addresses[0]: null is not allowed here"]);
    check_service(
        "backends: [5]",
        &[
            "s.yaml:3:16: services[0].backends[0]: invalid type: integer `5`, expected an IP address, or a map with address, weight and more",
        ],
    );
    check_service("backends: [*x]", &["s.yaml:3:16: services[0].backends: reference to unknown value"]);
    check("services: []\n---\nservices: []\n", &["s.yaml:3:1: a second document begins here; a file holds one"]);
    check("services: [", &["s.yaml:1:11: services: unclosed bracket '['"]);
}

#[test]
fn bytes_that_are_no_text() {
    check(b"services:\n  - name: \xff", &["s.yaml:2:11: not UTF-8 text"]);
    check(b"\xff\xfes\0e\0", &["s.yaml:1:1: not UTF-8 text"]);
    check(b"services: [\0]", &["s.yaml:1:12: services: unexpected character: `\\u{0}'"]);
    assert!(parsed(format!("\u{feff}{}", GOOD.replace('\n', "\r\n"))).is_ok());
}

#[test]
fn a_list_of_backends_may_be_shared() {
    let mut content = "services:\n".to_owned();
    for index in 0..200 {
        let backends = if index == 0 { "&pool [10.1.0.1, 10.1.0.2]" } else { "*pool" };
        writeln!(
            content,
            "- {{ name: s{index}, addresses: [10.0.0.{index}], ports: [{{ port: 80 }}], backends: {backends} }}"
        )
        .unwrap();
    }
    let loaded = parsed(content).unwrap();
    assert!(loaded.desired.services().values().all(|service| service.endpoints.len() == 2));
}

#[test]
fn what_would_fill_the_memory_is_refused() {
    check("[".repeat(100_000), &["s.yaml:1:256: recursion limit exceeded"]);
    let list = |from: &str, count| (0..count).map(|i| from.replace('#', &i.to_string())).collect::<Vec<_>>().join(", ");
    let (addresses, ports) = (list("'fd00::#'", 1100), list("{ port: 1# }", 1000));
    check_service(
        &format!("addresses: [{addresses}]\nports: [{ports}]\nbackends: []"),
        &["s.yaml:2:5: services[0]: too many for one file: more than 1000000 frontends (addresses times ports), \
           4000000 backends or 1000000 source ranges (times ports) with this service"],
    );
}

#[test]
#[cfg_attr(debug_assertions, ignore = "a million nodes take half a minute without optimization: run with --release")]
fn an_alias_bomb_is_refused() {
    let backends = vec!["10.0.0.1"; 2_000].join(", ");
    check(
        format!("services:\n- backends: &a [{backends}]\n{}", "- backends: *a\n".repeat(600)),
        &["s.yaml:502:13: services[500].backends: YAML document too large or too complex: \
           total_replayed_events=1000001 > 1000000"],
    );
}

/// The whole way from a changed file to the kernel may take 3 s; on an idle machine these take 1.1 s and 2.3 s.
#[test]
#[cfg_attr(debug_assertions, ignore = "about speed: run with --release --nocapture")]
fn large_files_are_parsed_in_time() {
    for (services, backends, seconds) in [(5_000, 50, 6), (100_000, 2, 12)] {
        let mut content = "services:\n".to_owned();
        for service in 0..services {
            let [_, high, middle, low] = u32::to_be_bytes(service);
            let ports = "[{ name: http, port: 80, targetPort: 8080 }]";
            write!(content, "- name: s{service}\n  addresses: [10.{high}.{middle}.{low}]\n  ports: {ports}\n").unwrap();
            content.push_str("  backends:\n");
            for backend in 1..=backends {
                writeln!(content, "  - {{ address: 11.{backend}.{middle}.{low}, weight: 2 }}").unwrap();
            }
        }
        let start = Instant::now();
        let loaded = parsed(&content).unwrap();
        let took = start.elapsed();
        println!("{services} services of {backends} backends, {} bytes: {took:?}", content.len());
        assert_eq!(loaded.desired.services().len(), services as usize);
        assert!(took < Duration::from_secs(seconds), "{took:?}");
    }
}

#[test]
fn files_that_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("none.yaml");
    let error = load(&missing, None).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: No such file or directory (os error 2)", missing.display()));
    let error = load(directory.path(), None).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: not a regular file", directory.path().display()));
}
