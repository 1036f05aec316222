use std::{
    fmt::Write as _,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::*;
use crate::model::{Algorithm, IpFamily, Protocol, ServiceName, Weight};

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

fn parsed(content: impl AsRef<[u8]>) -> Result<Loaded, FileError> {
    parse(Path::new("s.yaml"), content.as_ref())
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
    assert_eq!(web.frontends, [socket("10.96.0.10:80")].into());
    let two = Weight::new(2).unwrap();
    assert_eq!(web.backends, [(socket("10.244.1.5:8080"), Weight::ONE), (socket("10.244.2.7:8080"), two)].into());
    let web6 = &services[&name("web", "http", Protocol::Tcp, IpFamily::V6)];
    assert_eq!(web6.frontends, [socket("[fd00:96::10]:80")].into());
    assert_eq!(web6.backends, [(socket("[fd00:244::5]:8080"), Weight::ONE)].into());
    let dns = &services[&name("dns", "53", Protocol::Udp, IpFamily::V4)];
    assert_eq!(dns.algorithm, Algorithm::Random);
    assert_eq!(dns.backends, [(socket("10.244.1.9:53"), Weight::ONE)].into());
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
         - ports: [{ port: 0, targetPort: 70000 }, { protocol: SCTP, port: 5 }, {}]\n  \
           algorithm: least-connections\n  \
           addresses: [127.0.0.1, '::', 10.0.0.256]\n  \
           backends: [{ weight: 257 }, 10.0.0.1:80, { address: 224.0.0.1 }]\n",
        &[
            "s.yaml:2:3: services[0].name: missing",
            "s.yaml:2:19: services[0].ports[0].port: 0 is not a port (1 to 65535)",
            "s.yaml:2:34: services[0].ports[0].targetPort: 70000 is not a port (1 to 65535)",
            "s.yaml:2:55: services[0].ports[1].protocol: SCTP is not a protocol that Wharf balances (TCP, UDP)",
            "s.yaml:2:72: services[0].ports[2].port: missing",
            "s.yaml:3:14: services[0].algorithm: this version of Wharf has no least-connections yet \
             (random, round-robin, maglev, source-hash)",
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
            "s.yaml:2:5: services[0].addresses: missing; a service has at least one address",
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
        &["s.yaml:2:5: services[0]: no IPv6 backends: what is sent to fd00:96::10 is dropped"],
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
            "s.yaml:2:5: services[0]: no IPv4 backends: what is sent to 10.96.0.10 is dropped",
            "s.yaml:2:5: services[0]: no IPv6 backends: what is sent to fd00:96::10 is dropped",
        ],
    );
}

#[test]
fn fields_that_are_not_there() {
    check_service(
        "\"\\e\": 5",
        &[
            "s.yaml:3:5: services[0].\\u{1b}: `\\u{1b}` is no field; the fields here are name, addresses, ports, algorithm, backends",
        ],
    );
    check_service(
        "backends: [{ value: 5 }]",
        &["s.yaml:3:18: services[0].backends[0]: `value` is no field; the fields here are address, weight"],
    );
    check_service(
        "adresses: []",
        &[
            "s.yaml:3:5: services[0].adresses: `adresses` is no field; the fields here are name, addresses, ports, algorithm, backends",
        ],
    );
    check_service(
        "ports: [{ nodePort: 1 }]",
        &[
            "s.yaml:3:15: services[0].ports[0].nodePort: `nodePort` is no field; the fields here are name, port, targetPort, protocol",
        ],
    );
    check_service(
        "backends: [{ port: 1 }]",
        &["s.yaml:3:18: services[0].backends[0].port: `port` is no field; the fields here are address, weight"],
    );
    check_service(
        "affinity: 3h",
        &["s.yaml:3:5: services[0].affinity: this version of Wharf has no session affinity yet; remove it"],
    );
    check(
        "apiVersion: v1\nkind: Service\n",
        &[
            "s.yaml:1:1: apiVersion: this version of Wharf reads no Kubernetes objects yet; write `services:` and a list of services",
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
            "s.yaml:3:16: services[0].backends[0]: invalid type: integer `5`, expected an IP address, or a map with address and weight",
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
    assert!(loaded.desired.services().values().all(|service| service.backends.len() == 2));
}

#[test]
fn what_would_fill_the_memory_is_refused() {
    check("[".repeat(100_000), &["s.yaml:1:256: recursion limit exceeded"]);
    let list = |from: &str, count| (0..count).map(|i| from.replace('#', &i.to_string())).collect::<Vec<_>>().join(", ");
    let (addresses, ports) = (list("'fd00::#'", 1100), list("{ port: 1# }", 1000));
    check_service(
        &format!("addresses: [{addresses}]\nports: [{ports}]\nbackends: []"),
        &["s.yaml:2:5: services[0]: too many for one file: more than 1000000 frontends (addresses times ports) \
           or 4000000 backends with this service"],
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
    let error = load(&missing).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: No such file or directory (os error 2)", missing.display()));
    let error = load(directory.path()).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: not a regular file", directory.path().display()));
}

/// Either state or an error with its place; anything else would be a panic.
fn survives(content: &[u8]) -> Result<(), TestCaseError> {
    if let Err(error) = parsed(content) {
        prop_assert!(error.to_string().lines().all(|line| line.starts_with("s.yaml:")), "{error}");
        prop_assert!(error.to_string().lines().all(|line| !line.chars().any(char::is_control)), "{error:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn any_bytes_survive(content in prop::collection::vec(any::<u8>(), 0..200)) {
        survives(&content)?;
    }

    #[test]
    fn any_yaml_like_text_survives(content in r#"([-:,\[\]{}&*!|>'"%@`#?~ \n\t]|<<|[a-z0-9.]|services: |- name: |address){0,80}"#) {
        survives(content.as_bytes())?;
    }

    #[test]
    fn a_damaged_file_survives(damage in prop::collection::vec((0..GOOD.len(), 0..8usize, prop::collection::vec(any::<u8>(), 0..8)), 1..4)) {
        let mut content = GOOD.as_bytes().to_vec();
        for (at, length, bytes) in damage {
            let at = at.min(content.len());
            content.splice(at..(at + length).min(content.len()), bytes);
        }
        survives(&content)?;
    }
}
