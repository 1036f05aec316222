//! An agent that follows an API server: from objects to packets.
#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::symlink,
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Value, json};
use tests::{
    agent::Agent,
    apiserver::{
        ApiServer,
        objects::{Draft, Service, Slice, node, service, slice},
    },
    cluster::{Layout, PodNetwork},
    eventually,
    home::Home,
    http::Page,
    number, poll,
    services::{PORT, TARGET_PORT, cluster_ips},
    topology::{Host, Lab, Topology},
};

/// A balancer with two backends, which serve, and the API server that it follows.
struct World {
    lab: Lab,
    server: ApiServer,
}

const NODE: [&str; 2] = ["--node-name", "here"];

impl World {
    fn new() -> Self {
        let lab = Topology::new().backends(2).up();
        let server = lab.lb().namespace().run(ApiServer::start);
        server.apply(node("here").zone("a"));
        Self { lab, server }
    }

    fn agent(&self) -> Agent {
        Agent::launch_at(Home::of_cluster(&self.server), &self.lab, &NODE).ready()
    }

    fn backend(&self, i: usize) -> [IpAddr; 2] {
        let host = self.lab.backend(i);
        [host.v4().into(), host.v6().into()]
    }

    /// Slices of service `web` for both families, with these backends.
    fn endpoints(&self, backends: &[usize]) -> [Draft<Slice>; 2] {
        [0, 1].map(|family| {
            let slice = slice("default", ["web-v4", "web-v6"][family]).of("web").port("http", TARGET_PORT);
            backends.iter().fold(slice, |slice, &i| slice.endpoint(self.backend(i)[family]))
        })
    }

    /// Who answers at an address.
    fn answers(&self, vip: (IpAddr, u16)) -> Vec<String> {
        let seen = self.lab.client().meet_all(vip);
        if seen.errors.is_empty() { seen.answers.into_keys().collect() } else { Vec::new() }
    }

    /// In a moment these answer at each address.
    #[track_caller]
    fn answer(&self, vips: &[(IpAddr, u16)], hosts: &[&str]) {
        for &vip in vips {
            eventually(&format!("{hosts:?} at {vip:?}"), || self.answers(vip) == hosts);
        }
    }

    fn http(&self, url: &str) -> Option<Page> {
        self.lab.lb().http(url).ok()
    }
}

fn web() -> Draft<Service> {
    service("default", "web").cluster_ips(cluster_ips(1)).port("http", PORT).target(TARGET_PORT)
}

fn vips() -> [(IpAddr, u16); 2] {
    cluster_ips(1).map(|ip| (ip, PORT))
}

/// What the agent counts as used of each table but those of flows.
fn used(agent: &Agent) -> BTreeMap<String, u64> {
    let status = agent.status();
    let tables = status["tables"].as_array().unwrap().iter();
    let tables = tables.map(|it| (it["name"].as_str().unwrap().to_owned(), it["used"].as_u64().unwrap()));
    tables.filter(|(name, _)| !name.contains("flows")).collect()
}

#[test]
fn nothing_goes_before_the_server_has_told_all() {
    let world = World::new();
    let _servers = world.lab.serve(TARGET_PORT);
    world.server.apply(web());
    world.server.apply_all(world.endpoints(&[1]));
    let mut agent = world.agent();
    world.answer(&vips(), &["b1"]);
    agent.signal(nix::sys::signal::Signal::SIGKILL);
    agent.wait();
    world.server.stop();
    let mut another = agent.launch_another(&world.lab, &NODE).ready();
    let healthz = || world.http("http://127.0.0.1:10256/healthz").map(|page| page.status);
    eventually("it is not well", || healthz() == Some(503));
    eventually("it says why", || another.status()["servicesError"].as_str().is_some_and(|it| it.contains("cluster")));
    assert_eq!(world.answers(vips()[0]), ["b1"], "traffic goes on as it was");
    // Services come, endpoints don't yet: an API server that may list the one and not the other.
    world.server.forbid("list", "endpointslices");
    world.server.start_again();
    eventually("it says what it may not", || {
        another.status()["servicesError"].as_str().is_some_and(|it| it.contains("EndpointSlices"))
    });
    assert_eq!((world.answers(vips()[0]), healthz()), (vec!["b1".to_owned()], Some(503)));
    world.server.permit_all();
    assert!(poll(Duration::from_secs(60), || (healthz() == Some(200)).then_some(())).is_some());
    assert_eq!(world.answers(vips()[0]), ["b1"]);
    another.signal(nix::sys::signal::Signal::SIGTERM);
    another.wait();
}

#[test]
fn a_service_that_finds_no_room_keeps_no_other_out() {
    let world = World::new();
    let _servers = world.lab.serve(TARGET_PORT);
    let big = |n: u8| {
        let slice = slice("default", "big").of("big").port("http", TARGET_PORT);
        (1..=n).fold(slice, |slice, i| slice.endpoint(Ipv4Addr::new(11, 0, 0, i)))
    };
    let big_service = service("default", "big").cluster_ips([Ipv4Addr::new(10, 96, 9, 9)]).port("http", PORT);
    world.server.apply(big_service.build());
    world.server.apply(big(20));
    world.server.apply(web());
    world.server.apply_all(world.endpoints(&[1]));
    let arguments = [&NODE[..], &["--max-backends", "8"]].concat();
    let mut agent = Agent::launch_at(Home::of_cluster(&world.server), &world.lab, &arguments).ready();
    let error = |agent: &Agent| agent.status()["servicesError"].as_str().map(str::to_owned);
    let is_told = |agent: &Agent| {
        let told = |error: &str| error.starts_with("default/big: ") && error.contains("--max-backends");
        eventually("it is told who has no room", || error(agent).is_some_and(|error| told(&error)));
    };
    is_told(&agent);
    world.answer(&vips(), &["b1"]);
    let healthz = || world.http("http://127.0.0.1:10256/healthz").map(|page| page.status);
    assert_eq!(healthz(), Some(200));
    // Changes of others are in force, and so it is for an agent that comes later.
    world.server.apply_all(world.endpoints(&[2]));
    world.answer(&vips(), &["b2"]);
    agent.signal(nix::sys::signal::Signal::SIGKILL);
    agent.wait();
    let mut agent = agent.launch_another(&world.lab, &arguments).ready();
    is_told(&agent);
    world.server.apply_all(world.endpoints(&[1]));
    world.answer(&vips(), &["b1"]);
    eventually("nothing of others is left", || used(&agent)["backends"] == 2);
    // One that is in force and grows too much stays as it was.
    world.server.apply(big(6));
    eventually("there is room for that", || error(&agent).is_none());
    assert_eq!(used(&agent)["backends"], 8);
    world.server.apply(big(7));
    is_told(&agent);
    assert_eq!(used(&agent)["backends"], 8);
    // So it does for the agent after this one, which others follow too, and what has become of them meanwhile.
    agent.signal(nix::sys::signal::Signal::SIGKILL);
    agent.wait();
    world.server.apply_all(world.endpoints(&[2]));
    let mut agent = agent.launch_another(&world.lab, &arguments).ready();
    is_told(&agent);
    world
        .server
        .apply(service("default", "other").cluster_ips([Ipv4Addr::new(10, 96, 9, 8)]).port("http", PORT).build());
    eventually("another is there", || agent.ask("services").to_string().contains("default/other"));
    world.answer(&vips(), &["b2"]);
    assert_eq!(used(&agent)["backends"], 8, "all that big had is there");
    assert_eq!(healthz(), Some(200));
    // As soon as others leave, there is room.
    world.server.delete("Service", "default", "web");
    assert!(poll(Duration::from_secs(40), || error(&agent).is_none().then_some(())).is_some(), "{:?}", error(&agent));
    assert_eq!(used(&agent)["backends"], 7);
    agent.signal(nix::sys::signal::Signal::SIGTERM);
    agent.wait();
}

#[test]
fn a_proxy_in_the_environment_is_not_for_the_api_server() {
    let world = World::new();
    let _servers = world.lab.serve(TARGET_PORT);
    world.server.apply(web());
    world.server.apply_all(world.endpoints(&[1]));
    for variable in ["HTTPS_PROXY", "https_proxy"] {
        let home = Home::of_cluster(&world.server).with(variable, "http://192.0.2.99:3128");
        let agent = Agent::launch_at(home, &world.lab, &NODE).ready();
        world.answer(&vips(), &["b1"]);
        agent.stop();
    }
}

/// What has no endpoints takes room as well, and leaves it.
#[test]
fn a_service_that_was_refused_is_tried_again_when_another_one_left_at_the_same_time() {
    let world = World::new();
    let service = |name: &str| service("default", name).cluster_ips(cluster_ips(1)).port("http", PORT).build();
    world.server.apply(service("z-old"));
    // Two services: one of each family.
    let arguments = [&NODE[..], &["--max-services", "2"]].concat();
    let agent = Agent::launch_at(Home::of_cluster(&world.server), &world.lab, &arguments).ready();
    let is_served = |name: &str| agent.ask("services").to_string().contains(name);
    eventually("the first is served", || is_served("default/z-old"));
    // Both changes come at once.
    agent.signal(nix::sys::signal::Signal::SIGSTOP);
    world.server.apply(service("a-new"));
    world.server.delete("Service", "default", "z-old");
    agent.signal(nix::sys::signal::Signal::SIGCONT);
    assert!(poll(Duration::from_secs(40), || is_served("default/a-new").then_some(())).is_some(), "{}", agent.log());
    agent.stop();
}

#[test]
fn pods_are_served_without_being_named() {
    for network in [PodNetwork::Bridged, PodNetwork::Routed] {
        let mut cluster = Layout::new(network).up();
        let (node, local) = (cluster.node(1), cluster.pod(1, 1));
        let server = node.host().namespace().run(ApiServer::start);
        server.apply(tests::apiserver::objects::node("n1"));
        server.apply(web());
        let of_web = |name| slice("default", name).of("web").port("http", TARGET_PORT);
        server.apply(of_web("web-v4").endpoint(local.v4()).on("n1"));
        server.apply(of_web("web-v6").endpoint(local.v6()).on("n1"));
        let _server = local.serve(TARGET_PORT);
        let agent = Agent::start_by_default(Home::of_cluster(&server), node);
        let pods = |attached| json!({ "patterns": ["auto"], "attached": attached, "refused": 0 });
        eventually("both pods' devices are attached to", || agent.status()["podInterfaces"] == pods(2));
        assert!(agent.log().contains("devices of pods to attach to: veth and netkit devices"), "{}", agent.log());
        for vip in vips() {
            eventually("it is in force", || cluster.client().tcp(vip).is_ok());
            assert_eq!(cluster.pod(1, 2).tcp(vip).unwrap().backend(), local.name());
        }
        cluster.add_pod(1);
        eventually("the new one, too", || agent.status()["podInterfaces"] == pods(3));
        for vip in vips() {
            assert_eq!(cluster.pod(1, 3).tcp(vip).unwrap().backend(), "n1-p1");
        }
        agent.stop();
    }
}

/// What a load balancer is told at the health check port of a service.
fn health(host: &Host, url: &str) -> Option<(u16, Value, Option<String>)> {
    let page = host.http(url).ok()?;
    let weight = page.headers.get("x-load-balancing-endpoint-weight").cloned();
    Some((page.status, serde_json::from_str(&page.body).ok()?, weight))
}

#[test]
fn load_balancers_are_told_whether_this_node_has_endpoints() {
    let world = World::new();
    let agent = world.agent();
    let balanced = || {
        let external = tests::services::load_balancer_ips(1);
        let service = web().node_port(30_080).load_balancer(external);
        service.set("spec.externalTrafficPolicy", json!("Local")).set("spec.healthCheckNodePort", json!(30_099))
    };
    world.server.apply(balanced());
    let lb = world.lab.lb();
    let url = format!("http://{}:30099/any/path", lb.v4());
    let expected = |status, n: u64| {
        let service = json!({ "namespace": "default", "name": "web" });
        let body = json!({ "service": service, "localEndpoints": n, "serviceProxyHealthy": true });
        Some((status, body, Some(n.to_string())))
    };
    eventually("none", || health(lb, &url) == expected(503, 0));
    let of_web = |name| slice("default", name).of("web").port("http", TARGET_PORT).port("https", 8443);
    let slice = || of_web("web-v4");
    // One that does not say where it is, is nobody's, whosever address it has.
    world.server.apply(slice().endpoint("10.9.0.1").on("here").endpoint("10.9.0.2").on("there").endpoint(lb.v4()));
    eventually("one", || health(lb, &url) == expected(200, 1));
    world.server.apply(slice().endpoint("10.9.0.1").on("here").endpoint("10.9.0.3").on("here"));
    eventually("two", || health(lb, &url) == expected(200, 2));
    let over_v6 = format!("http://[{}]:30099/", lb.v6());
    assert_eq!(health(lb, &over_v6), expected(503, 0), "each family has endpoints of its own");
    world.server.apply(of_web("web-v6").endpoint("fd00:9::1").on("here").endpoint("fd00:9::2").on("there"));
    eventually("one", || health(lb, &over_v6) == expected(200, 1));
    assert_eq!(health(lb, &url), expected(200, 2));
    world.server.apply(slice().endpoint("10.9.0.1").on("here").terminating(true));
    eventually("none that is ready", || health(lb, &url) == expected(503, 0));
    // Of a service of one family there is one proxy to ask, whichever way one comes.
    world.server.apply(balanced().set("spec.ipFamilies", json!(["IPv4"])).set("spec.clusterIPs", json!(["10.96.0.1"])));
    world.server.apply(slice().endpoint("10.9.0.1").on("here"));
    eventually("one", || health(lb, &over_v6) == expected(200, 1) && health(lb, &url) == expected(200, 1));
    world.server.apply(balanced().set("spec.externalTrafficPolicy", json!("Cluster")));
    eventually("nobody listens any more", || lb.http(&url).is_err());
    // The node itself.
    let status = |path: &str| world.http(&format!("http://127.0.0.1:10256/{path}")).map(|page| page.status);
    assert_eq!((status("healthz"), status("livez")), (Some(200), Some(200)));
    world.server.apply(node("here").zone("a").taint("ToBeDeletedByClusterAutoscaler", "NoSchedule"));
    eventually("it is about to go", || (status("healthz"), status("livez")) == (Some(503), Some(200)));
    world.server.apply(node("here").zone("a"));
    eventually("it stays", || status("healthz") == Some(200));
    world.server.delete("Node", "", "here");
    eventually("it is gone", || (status("healthz"), status("livez")) == (Some(503), Some(200)));
    world.server.compact();
    world.server.break_streams();
    eventually("it is told", || agent.log().contains("the cluster has no node of the name here"));
    agent.stop();
}

#[test]
fn metrics_tell_of_changes_and_of_what_has_no_endpoint_here() {
    let world = World::new();
    let agent = world.agent();
    let metric =
        |name: &str| world.http("http://127.0.0.1:10249/metrics").unwrap().metric(&format!("kubeproxy_{name}"));
    let expect = |name: &str, value| eventually(name, || metric(name) == Some(value));
    let programmed = "network_programming_duration_seconds_count{ip_family=\"IPv4\"}";
    let without =
        |policy| format!("sync_proxy_rules_no_local_endpoints_total{{ip_family=\"IPv4\",traffic_policy=\"{policy}\"}}");
    world.server.apply(web().set("spec.internalTrafficPolicy", json!("Local")));
    expect("sync_proxy_rules_service_changes_total", 1.0);
    let slice = |begun: SystemTime| {
        let begun = humantime::format_rfc3339_nanos(begun).to_string();
        let slice = slice("default", "web-v4").of("web").port("http", TARGET_PORT);
        slice.annotation("endpoints.kubernetes.io/last-change-trigger-time", &begun)
    };
    // What has begun before the agent was there does not count.
    world.server.apply(slice(SystemTime::UNIX_EPOCH).endpoint("10.9.0.1").on("here"));
    expect("sync_proxy_rules_endpoint_changes_total", 1.0);
    assert_eq!((metric(programmed), metric(&without("internal"))), (Some(0.0), Some(0.0)));
    world.server.apply(slice(SystemTime::now()).endpoint("10.9.0.1").on("there"));
    expect(programmed, 1.0);
    assert!(metric("network_programming_duration_seconds_sum{ip_family=\"IPv4\"}").is_some_and(|sum| sum < 10.0));
    assert_eq!((metric(&without("internal")), metric(&without("external"))), (Some(1.0), Some(0.0)));
    for of in ["service", "endpoint"] {
        assert_eq!(metric(&format!("sync_proxy_rules_{of}_changes_pending")), Some(0.0));
    }
    for probe in ["healthz", "livez"] {
        let answers = || metric(&format!("proxy_{probe}_total{{code=\"200\"}}")).unwrap_or_default();
        let before = answers();
        assert!(world.http(&format!("http://127.0.0.1:10256/{probe}")).is_some_and(|page| page.status == 200));
        expect(&format!("proxy_{probe}_total{{code=\"200\"}}"), before + 1.0);
    }
    agent.stop();
}

#[test]
fn a_kube_proxy_beside_the_agent_is_told_until_it_goes() {
    let world = World::new();
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("kube-proxy");
    symlink("/bin/sleep", &program).unwrap();
    let mut kube_proxy = world.lab.lb().namespace().command(&program).arg("300").spawn().unwrap();
    let agent = world.agent();
    // Others on this machine may have such tests as well.
    let is_told = || agent.status()["kubeProxies"].as_array().unwrap().contains(&kube_proxy.id().into());
    eventually("it is told", is_told);
    let log = agent.log();
    let line = log.lines().find(|line| line.contains("kube-proxy runs (process ")).unwrap();
    assert!(line.contains("WARN") && line.contains(&kube_proxy.id().to_string()), "{line}");
    let metrics = world.http("http://127.0.0.1:10249/metrics").unwrap();
    assert!(metrics.metric("wharf_kube_proxies").is_some_and(|processes| processes >= 1.0));
    kube_proxy.kill().and_then(|()| kube_proxy.wait()).unwrap();
    let is_over =
        || (!agent.status()["kubeProxies"].as_array().unwrap().contains(&kube_proxy.id().into())).then_some(());
    assert!(poll(Duration::from_secs(60), is_over).is_some(), "{}", agent.status());
    agent.stop();
}

#[test]
fn hints_for_this_node_s_zone_are_followed_as_the_node_moves() {
    let world = World::new();
    let _servers = world.lab.serve(TARGET_PORT);
    world.server.apply(web());
    let slice = slice("default", "web-v4").of("web").port("http", TARGET_PORT);
    let slice = slice.endpoint(world.backend(1)[0]).for_zones(["a"]).endpoint(world.backend(2)[0]).for_zones(["b"]);
    world.server.apply(slice);
    let _agent = world.agent();
    world.answer(&vips()[..1], &["b1"]);
    world.server.apply(node("here").zone("b"));
    world.answer(&vips()[..1], &["b2"]);
    world.server.apply(node("here").zone("c"));
    world.answer(&vips()[..1], &["b1", "b2"]);
}

#[test]
fn a_file_of_objects_is_served_like_a_cluster() {
    let world = World::new();
    let _servers = world.lab.serve(TARGET_PORT);
    let objects = |backends: &[usize]| -> Vec<Value> {
        world.endpoints(backends).map(Draft::build).into_iter().chain([web().build()]).collect()
    };
    let list = |backends: &[usize]| json!({ "apiVersion": "v1", "kind": "List", "items": objects(backends) });
    let agent = Agent::start(&world.lab, &list(&[1]).to_string(), &NODE);
    world.answer(&vips(), &["b1"]);
    let document = |object: &Value| {
        let fields = object.as_object().unwrap().iter().map(|(field, value)| format!("{field}: {value}\n"));
        format!("---\n{}", fields.collect::<String>())
    };
    agent.apply(&objects(&[2]).iter().map(document).collect::<String>());
    world.answer(&vips(), &["b2"]);
}

/// `WHARF_SERVICES` says how many, `WHARF_ENDPOINTS` with how many endpoints each; the times are told with `--nocapture`.
#[test]
fn one_change_among_many_services_is_soon_in_force() {
    let [services, endpoints] = [("WHARF_SERVICES", 2_000), ("WHARF_ENDPOINTS", 1)]
        .map(|(variable, usual)| number(variable).map_or(usual, |number| u32::try_from(number).unwrap()));
    let world = World::new();
    let _servers = world.lab.serve(TARGET_PORT);
    world.server.apply_all((0..services).flat_map(|i| {
        let name = format!("s{i}");
        let slice = slice("many", &format!("{name}-x")).of(&name).port("http", 80);
        let mut pods = (0..endpoints).map(|k| Ipv4Addr::from_bits(0x0B00_0000 + i * endpoints + k));
        let cluster_ip = Ipv4Addr::from_bits(0x0A60_0200 + i);
        let service = service("many", &name).cluster_ips([cluster_ip]).port("http", 80);
        [service.build(), pods.try_fold(slice, |slice, pod| Some(slice.endpoint(pod))).unwrap().build()]
    }));
    world.server.apply(web());
    world.server.apply_all(world.endpoints(&[1]));
    let agent = world.agent();
    let is_served = || (world.answers(vips()[0]) == ["b1"]).then_some(());
    assert!(poll(Duration::from_secs(120), is_served).is_some(), "{}", agent.status());
    let mut times: Vec<_> = (0..21)
        .map(|turn| {
            let backend = 2 - turn % 2;
            let (name, begin) = (format!("b{backend}"), Instant::now());
            world.server.apply_all(world.endpoints(&[backend]));
            // Without a pause, which would be longer than the change takes.
            while world.lab.client().tcp(vips()[0]).is_ok_and(|it| it.backend() != name) {
                assert!(begin.elapsed() < Duration::from_secs(60), "{}", agent.status());
            }
            begin.elapsed()
        })
        .collect();
    times.sort();
    let [median, longest] = [times[10], times[20]];
    println!("a change of one of {services} services was seen by a client after {median:.1?} ({longest:.1?} at most)");
    let memory = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let log = agent.log();
    let told = log.lines().filter(|line| line.contains("applied") || line.contains("balancing"));
    told.chain(memory.lines().filter(|line| line.starts_with("Rss"))).for_each(|line| println!("{line}"));
    assert_eq!(agent.status()["services"], u64::from(services) + 2);
}
