//! The `wharf` command as its users meet it: what it prints, where, and with which exit code.
#![expect(clippy::unwrap_used, reason = "a test fails that way")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::SocketAddr,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use lb_userspace::{
    admin::{
        client::{self, ClientError},
        report::{
            AuditReport, BackendReport, CollectorReport, CounterReport, DriftReport, FrontendReport, InterfaceReport,
            PodInterfacesReport, Request, Response, ServiceReport, SocketsReport, StatusReport, TableReport,
            VerifyReport,
        },
        server::{BindError, Query, Server},
    },
    model::{Conditions, FrontendKind, IpFamily, Protocol, TrafficPolicy},
};
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::mpsc};

const SERVICES: &str = "\
services:
  - name: web
    addresses: [10.96.0.10, 'fd00:96::10']
    ports: [{ port: 80 }, { port: 443 }]
    backends: [10.244.1.5, { address: 10.244.2.7, weight: 2 }]
";

/// Runs `wharf`, which must exit with this code; gives what it printed on standard output and standard error.
#[track_caller]
fn wharf<'a>(arguments: impl IntoIterator<Item = &'a str>, code: i32) -> (String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_wharf")).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert_eq!(output.status.code(), Some(code), "{stdout}{stderr}");
    (stdout, stderr)
}

#[track_caller]
fn check(content: &str, code: i32) -> (String, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("s.yaml");
    fs::write(&file, content).unwrap();
    let (stdout, stderr) = wharf(["check", file.to_str().unwrap()], code);
    let here = format!("{}/", directory.path().display());
    (stdout.replace(&here, ""), stderr.replace(&here, ""))
}

#[test]
fn check_says_what_a_good_file_has() {
    let (stdout, stderr) = check(SERVICES, 0);
    assert_eq!(stdout, "s.yaml: ok: 1 service (2 ports), 2 backends\n");
    assert_eq!(stderr, "warning: s.yaml:2:5: services[0]: no IPv6 backends: what is sent to fd00:96::10 is refused\n");
}

#[test]
fn check_says_which_objects_of_a_cluster_go_without() {
    let object = |version: &str, kind: &str, name: &str, rest: &str| {
        format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{ namespace: default, name: {name} }}\n{rest}\n")
    };
    let service = |name: &str, ip: &str| {
        let spec = format!("spec: {{ clusterIP: {ip}, externalIPs: [192.0.2.7], ports: [{{ port: 80 }}] }}");
        object("v1", "Service", name, &spec)
    };
    // As a server would have it, what is not said is: the name of the port is empty, its protocol TCP.
    let slice = "addressType: IPv4\nports: [{ port: 8080 }]\nendpoints: [{ addresses: [10.0.0.1] }]";
    let slice = object("discovery.k8s.io/v1", "EndpointSlice", "a-1", slice)
        .replace("name: a-1", "name: a-1, labels: { kubernetes.io/service-name: a }");
    let (stdout, stderr) = check(&[service("a", "10.96.0.1"), service("b", "10.96.0.2"), slice].join("---\n"), 0);
    assert_eq!(stdout, "s.yaml: ok: 2 services (2 ports), 1 backend\n");
    let taken = "TCP 192.0.2.7:80 is already taken by service default/a:80 (TCP, IPv4), which comes first";
    assert_eq!(stderr, format!("warning: service default/b:80 (TCP, IPv4) goes without: {taken}\n"));
}

#[test]
fn check_says_where_a_bad_file_is_wrong() {
    let (stdout, stderr) = check(&SERVICES.replace("443", "70000").replace("weight: 2", "weight: -1"), 1);
    assert_eq!(stdout, "");
    assert_eq!(
        stderr,
        "s.yaml:4:35: services[0].ports[1].port: 70000 is not a port (1 to 65535)\n\
         s.yaml:5:59: services[0].backends[1].weight: -1 is not a weight (0 to 256; 0: no new connections)\n"
    );
}

#[test]
fn a_command_line_that_makes_no_sense_is_64() {
    for arguments in [["check", "--no-such-flag"], ["status", "--output=xml"], ["no-such-command", ""]] {
        assert!(wharf(arguments, 64).1.contains("--help"));
    }
    wharf([], 64);
    assert!(wharf(["--help"], 0).0.contains("Usage: wharf"));
    assert_eq!(wharf(["--version"], 0).0, format!("wharf {}\n", env!("CARGO_PKG_VERSION")));
}

/// The checks in what `wharf doctor -o json` prints, by name: verdict, what was found, and what to do.
#[track_caller]
fn doctor(arguments: &[&str], code: i32) -> Vec<(String, String, String)> {
    let (stdout, _) = wharf([&["doctor", "-o", "json"], arguments].concat(), code);
    let checks: Vec<serde_json::Value> = serde_json::from_str(&stdout).unwrap();
    let text = |check: &serde_json::Value, key| check[key].as_str().unwrap_or_default().to_owned();
    let entry = |check| {
        (text(check, "name"), text(check, "verdict"), format!("{} {}", text(check, "found"), text(check, "remedy")))
    };
    checks.iter().map(entry).collect()
}

#[test]
fn doctor_names_what_is_wrong_and_exits_with_1() {
    let (directory, missing) = (tempfile::tempdir().unwrap(), "no-such-if");
    let file = directory.path().join("s.yaml");
    fs::write(&file, SERVICES.replace("443", "70000")).unwrap();
    let checks = doctor(&["--interface", missing, "--services", file.to_str().unwrap()], 1);
    let find = |name: &str| checks.iter().find(|(it, ..)| it == name).unwrap();
    let (_, verdict, text) = find("interface");
    assert!(verdict == "problem" && text.contains(missing) && text.contains("ip link"), "{text}");
    let (_, verdict, text) = find("services-file");
    assert!(verdict == "problem" && text.contains("s.yaml:4:35") && text.contains("wharf check"), "{text}");
    for (name, verdict, text) in &checks {
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'), "{name}");
        assert_eq!(verdict == "ok", text.ends_with(' '), "{name}: only what is as it should be has no remedy: {text}");
    }
    assert_eq!(find("kube-proxy").1, "ok");
}

#[test]
fn doctor_prints_a_table_for_people() {
    let (stdout, stderr) = wharf(["doctor", "--interface", "no-such-if"], 1);
    assert!(stdout.starts_with("VERDICT   CHECK"), "{stdout}");
    assert!(stdout.contains("there is no interface no-such-if\n") && stdout.contains("-> `ip link` lists"), "{stdout}");
    assert!(stdout.trim_end().ends_with(" ok") && stderr.is_empty(), "{stdout}{stderr}");
    for wrong in [["doctor", "--snat-ports", "9-8"], ["doctor", "--xdp", "fast"]] {
        assert!(wharf(wrong, 64).1.contains("--help"));
    }
}

#[test]
fn verify_exits_with_2_while_something_is_wrong() {
    let agent = Agent::start();
    let (stdout, _) = agent.wharf(["verify"], 2);
    assert!(stdout.starts_with("MAP     ENTRY   SHOULD SAY   SAID\nTABLE   7       1            9\n"), "{stdout}");
    assert!(stdout.ends_with("\n1 of 100 entries don't say what they should; --repair puts them right\n"), "{stdout}");
    let (stdout, _) = agent.wharf(["verify", "--repair"], 0);
    assert!(stdout.ends_with("\n1 of 100 entries were put right\n"), "{stdout}");
    assert!(agent.wharf(["verify", "-o", "json"], 2).0.contains("\"repaired\": false"));
}

/// An agent's admin socket that gives the same answers all the time.
struct Agent {
    directory: TempDir,
    runtime: Runtime,
}

impl Agent {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let agent = Self { directory, runtime: Runtime::new().unwrap() };
        let server = agent.runtime.block_on(Server::bind(&agent.socket())).unwrap();
        let (sender, mut queries) = mpsc::channel::<Query>(1);
        agent.runtime.spawn(server.serve(sender));
        agent.runtime.spawn(async move {
            while let Some(Query { request, reply }) = queries.recv().await {
                reply.send(answer(request)).unwrap();
            }
        });
        agent
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("run/admin.sock")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    fn ask(&self, request: Request) -> Result<Response, ClientError> {
        self.runtime.block_on(client::ask(&self.socket(), request))
    }

    /// Runs `wharf` as a client of this agent.
    #[track_caller]
    fn wharf<const N: usize>(&self, arguments: [&str; N], code: i32) -> (String, String) {
        wharf(arguments.into_iter().chain(["--admin", self.socket().to_str().unwrap()]), code)
    }
}

fn answer(request: Request) -> Response {
    let socket = |text: &str| text.parse::<SocketAddr>().unwrap();
    let service = |name: &str, frontends: &[&str]| ServiceReport {
        name: name.to_owned(),
        port: "http".to_owned(),
        protocol: Protocol::Tcp,
        family: IpFamily::V4,
        frontends: frontends
            .iter()
            .map(|text| FrontendReport { address: socket(text), kind: FrontendKind::ClusterIp })
            .collect(),
        node_port: (name == "web").then_some(30080),
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Local,
        source_ranges: vec!["198.51.100.0/24".parse().unwrap()],
        affinity_seconds: 10_800,
        algorithm: "maglev".to_owned(),
        backends: 2,
        flows: 1234,
    };
    let backend = |service: &str, address: &str| BackendReport {
        service: service.to_owned(),
        port: "http".to_owned(),
        protocol: Protocol::Tcp,
        address: socket(address),
        weight: 1,
        node_name: Some("node-1".to_owned()),
        on_node: true,
        conditions: Conditions::READY,
        takes_new: vec![TrafficPolicy::Cluster],
        active: 3,
        flows: 7,
    };
    let counter = |action: &str, name: &str, packets| CounterReport {
        action: action.to_owned(),
        name: name.to_owned(),
        packets,
        bytes: packets * 60,
    };
    let interface = |name: &str, xdp: &str, why: Option<&str>| InterfaceReport {
        name: name.to_owned(),
        xdp: xdp.to_owned(),
        tc: "tcx".to_owned(),
        why: why.map(str::to_owned),
        source_ipv4: Some([192, 0, 2, 1].into()),
        source_ipv6: None,
    };
    match request {
        Request::Status => Response::Status(Box::new(StatusReport {
            version: "1.2.3".to_owned(),
            pid: 42,
            uptime_seconds: 7_500,
            kube_proxies: vec![7, 8],
            unpinned: None,
            interfaces: vec![interface("eth0", "native", None), interface("eth1", "off", Some("the driver has none"))],
            pod_interfaces: PodInterfacesReport {
                patterns: vec!["veth*".to_owned(), "lxc*".to_owned()],
                attached: 12,
                refused: 1,
            },
            sockets: SocketsReport {
                mode: "on".to_owned(),
                cgroup: Some("/sys/fs/cgroup".to_owned()),
                attached: 10,
                missing: vec!["bind6: a port".to_owned()],
                loopback: Some("tcx".to_owned()),
                ended: 4,
            },
            source: "/etc/wharf/services.yaml".into(),
            services: 2,
            revision: 3,
            applied_seconds_ago: 75,
            services_error: Some("s.yaml:1:1: x\ns.yaml:2:1: y".to_owned()),
            tables: vec![TableReport { name: "services".to_owned(), used: 1, size: 1000 }],
            audit: AuditReport::default(),
            collector: Some(CollectorReport { passes: 3, removed: 70, entries: 2_000, milliseconds: 4 }),
            counters: vec![counter("forward", "nat", 5), counter("drop", "no-backend", 0)],
        })),
        Request::Services => {
            Response::Services(vec![service("web", &["10.0.0.1:80", "10.0.0.2:80"]), service("dns", &["10.0.0.3:53"])])
        }
        Request::Verify { repair } => Response::Verify(VerifyReport {
            is_compared: true,
            entries: 100,
            is_behind: false,
            unapplied: 0,
            drift: vec![DriftReport {
                map: "TABLE".to_owned(),
                entry: "7".to_owned(),
                expected: "1".to_owned(),
                found: "9".to_owned(),
            }],
            repaired: repair,
        }),
        Request::Metrics | Request::Health { .. } | Request::ServiceHealth { .. } => {
            unreachable!("no command asks for that")
        }
        Request::Backends => Response::Backends(vec![backend("web", "10.1.0.1:8080"), backend("dns", "10.1.0.2:53")]),
    }
}

#[test]
fn status_fits_on_a_screen() {
    let agent = Agent::start();
    let (stdout, _) = agent.wharf(["status"], 0);
    assert_eq!(
        stdout,
        "\
wharf 1.2.3, process 42, running for 2h 5m
services: /etc/wharf/services.yaml, applied 1m 15s ago
services error: not all that the source says is in force
  s.yaml:1:1: x
  s.yaml:2:1: y
kube-proxy runs (process 7, 8): where wharf serves the same services, both translate; take its DaemonSet or unit away, then kube-proxy --cleanup on this machine

INTERFACE   XDP      TC    SOURCE ADDRESSES
eth0        native   tcx   192.0.2.1
eth1        off      tcx   192.0.2.1
eth1: the driver has none
pods (veth*, lxc*): 12 attached, 1 could not be (see the log)
sockets: on, 10 hooks at /sys/fs/cgroup, 4 ended that had lost their backends
sockets: missing: bind6: a port
sockets: others are balanced by what they send (lo: tcx)

TABLE      USED   SIZE   FULL
services   1      1000   1%
garbage collection: 70 flows removed in 3 passes; the last took 4 ms for 2000 entries

ACTION    REASON   PACKETS   BYTES
forward   nat      5         300
"
    );
    let (stdout, _) = agent.wharf(["status", "-o", "json"], 0);
    let report: Box<StatusReport> = serde_json::from_str(&stdout).unwrap();
    assert_eq!(Response::Status(report), answer(Request::Status));
}

#[test]
fn services_and_backends_are_tables() {
    let agent = Agent::start();
    let (stdout, _) = agent.wharf(["services"], 0);
    assert_eq!(
        stdout,
        "\
NAME   PORT   PROTOCOL   FRONTENDS                         ALGORITHM   BACKENDS   FLOWS
web    http   TCP        10.0.0.1:80,10.0.0.2:80,*:30080   maglev      2          1234
dns    http   TCP        10.0.0.3:53                       maglev      2          1234
"
    );
    let (stdout, _) = agent.wharf(["backends", "dns"], 0);
    assert_eq!(
        stdout,
        "\
SERVICE   PORT   PROTOCOL   ADDRESS       WEIGHT   FLOWS
dns       http   TCP        10.1.0.2:53   1        7
"
    );
    let (stdout, _) = agent.wharf(["services", "dns", "--output", "json"], 0);
    let services: Vec<ServiceReport> = serde_json::from_str(&stdout).unwrap();
    assert_eq!(services.len(), 1);
    for text in ["\"kind\": \"ClusterIP\"", "\"externalTrafficPolicy\": \"Local\"", "\"198.51.100.0/24\""] {
        assert!(stdout.contains(text), "{stdout}");
    }
    let (stdout, _) = agent.wharf(["backends", "dns", "--output", "json"], 0);
    for text in ["\"onNode\": true", "\"terminating\": false", "\"takesNew\": [\n      \"Cluster\"", "\"active\": 3"] {
        assert!(stdout.contains(text), "{stdout}");
    }
    for command in ["services", "backends"] {
        let (stdout, stderr) = agent.wharf([command, "none"], 2);
        assert!(stdout.is_empty() && stderr.contains("called none"), "{stderr}");
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let agent = Agent::start();
    let mut child = Command::new(env!("CARGO_BIN_EXE_wharf"))
        .args(["services", "--admin"])
        .arg(agent.socket())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn without_an_agent_the_error_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    let socket = socket.to_str().unwrap();
    let expected =
        format!("error: no agent answers on {socket}: is `wharf run` running? --admin names another socket\n");
    assert_eq!(wharf(["status", "--admin", socket], 1).1, expected);
    // The same when one was there and was killed.
    drop(UnixListener::bind(socket).unwrap());
    assert_eq!(wharf(["status", "--admin", socket], 1).1, expected);
}

#[test]
fn the_socket_is_its_owners_only() {
    let agent = Agent::start();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&agent.socket()), 0o600);
    assert_eq!(mode(agent.socket().parent().unwrap()), 0o700);
    let socket = agent.socket();
    let Agent { directory, runtime } = agent;
    drop(runtime);
    assert!(!socket.exists(), "a stopped agent leaves no socket");
    drop(directory);
}

#[tokio::test]
async fn the_place_of_the_socket_is_taken_with_care() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = directory.path().join("admin.sock");

    drop(UnixListener::bind(&path).unwrap());
    let server = Server::bind(&path).await.expect("a stale socket is replaced");
    assert_eq!(fs::metadata(directory.path()).unwrap().permissions().mode() & 0o777, 0o755);

    let error = Server::bind(&path).await.expect_err("another agent has it");
    assert!(matches!(&error, BindError::InUse(_)), "{error}");
    assert!(fs::metadata(&path).unwrap().file_type().is_socket());
    drop(server);

    fs::write(&path, "precious").unwrap();
    let error = Server::bind(&path).await.expect_err("a file is there");
    assert!(matches!(&error, BindError::NotASocket(_)), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn hostile_clients_hurt_nobody() {
    let agent = Agent::start();
    let reply = |stream: UnixStream| {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).map(|_| line)
    };
    for (request, expected) in [
        (&b"what?\n"[..], "not a request: expected value"),
        (b"\"uptime\"\n", "unknown variant `uptime`, expected one of `status`, `services`, `backends`"),
        (b"\xff\xfe\n", "not a request"),
        (b"\n", "not a request"),
        (&[b'['; 1025], "not a request: max line length exceeded"),
    ] {
        let mut stream = agent.connect();
        stream.write_all(request).unwrap();
        let line = reply(stream).unwrap();
        assert!(line.starts_with("{\"error\":") && line.contains(expected), "{line}");
    }

    // A mebibyte without a line break is not kept: the connection closes while it is being sent.
    let mut stream = agent.connect();
    let sent = (0..1024).try_for_each(|_| stream.write_all(&[b'x'; 1024]));
    assert!(sent.is_err());

    // Half a line, and gone.
    agent.connect().write_all(b"\"sta").unwrap();

    // As many as are let in, saying nothing; then one that goes away makes room for one that asks.
    let mut silent: Vec<_> = (0..16).map(|_| agent.connect()).collect();
    thread::sleep(Duration::from_millis(100));
    silent.pop();
    assert_eq!(agent.ask(Request::Services).unwrap(), answer(Request::Services));

    // Two questions on one connection have two answers.
    drop(silent);
    let mut stream = agent.connect();
    stream.write_all(b"\"status\"\n\"backends\"\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).unwrap();
    let answers: Vec<Response> = answers.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers, [answer(Request::Status), answer(Request::Backends)]);
}

#[test]
fn large_answers_arrive_whole() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    let runtime = Runtime::new().unwrap();
    let Response::Services(one) = answer(Request::Services) else { unreachable!() };
    let many = Response::Services(one.iter().cycle().take(100_000).cloned().collect());
    let server = runtime.block_on(Server::bind(&socket)).unwrap();
    let (sender, mut queries) = mpsc::channel::<Query>(1);
    runtime.spawn(server.serve(sender));
    let reply = many.clone();
    runtime.spawn(async move { queries.recv().await.unwrap().reply.send(reply).unwrap() });
    assert_eq!(runtime.block_on(client::ask(&socket, Request::Services)).unwrap(), many);
    // The agent's loop has ended.
    let error = runtime.block_on(client::ask(&socket, Request::Services)).unwrap_err();
    assert_eq!(error.to_string(), "the agent says: the agent is stopping");
}
