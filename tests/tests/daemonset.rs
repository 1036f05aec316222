//! The manifests of `deploy/kubernetes`: they are what they say, the agent takes their command line, needs no more than they give it,
//! and uses all that they ask for.
#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Probe, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid as ProcessId,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tests::{
    agent::binary,
    apiserver::{
        ApiServer,
        objects::{node, service, slice},
    },
    container::{Container, Pod, manifest, of_kind},
    eventually,
    services::{PORT, TARGET_PORT, cluster_ips},
    topology::{Lab, Topology},
};

/// Of an authority that signs nothing: the server of the tests speaks plain HTTP.
const CA: &str = "-----BEGIN CERTIFICATE-----
MIIBeTCCAR+gAwIBAgIUN0Dn5b9NON3JRCE3s2CPEpAy7NwwCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGbm9ib2R5MCAXDTI2MTEyMjAyMTAyMFoYDzIxMjYxMDI5MDIx
MDIwWjARMQ8wDQYDVQQDDAZub2JvZHkwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AASsYBqryFlPPXqs4goz9pr+GvXqR+E44LpIGiUOH+kHED4KKrw/9WUSMgQYP8T/
8eAMYPNqqLa53Sx8eIqJjpkVo1MwUTAdBgNVHQ4EFgQU3Z2k784SRBmiXwxVV2Fg
kjeoKYAwHwYDVR0jBBgwFoAU3Z2k784SRBmiXwxVV2FgkjeoKYAwDwYDVR0TAQH/
BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiEAkhpKV66R+iVpOq3PrJM6R7ZO9fqP
l69jrtv7CA9NeZUCICzBCp8NjO9Qspf2ulm9LFwyilxc+COMAVn+Qbi3yftB
-----END CERTIFICATE-----
";

const NODE: &str = "node-1";

/// A node with two backends behind it, whose API server knows of one service.
struct World {
    lab: Lab,
    server: ApiServer,
    pod: Pod,
    _servers: Vec<tests::servers::Server>,
}

impl World {
    fn new() -> Self {
        let lab = Topology::new().one_armed().backends(2).up();
        let server = lab.lb().namespace().run(ApiServer::start);
        // What a node is asked for is asked for with the token that it was given.
        server.demand_token("secret");
        server.apply(node(NODE));
        server.apply(service("default", "web").cluster_ips(cluster_ips(1)).port("http", PORT).target(TARGET_PORT));
        let backends = [1, 2].map(|i| lab.backend(i));
        for family in [0, 1] {
            let slice = slice("default", ["web-v4", "web-v6"][family]).of("web").port("http", TARGET_PORT);
            let address = |i: usize| [IpAddr::from(backends[i].v4()), backends[i].v6().into()][family];
            server.apply([0, 1].into_iter().fold(slice, |slice, i| slice.endpoint(address(i))));
        }
        let servers = lab.serve(TARGET_PORT);
        Self { lab, server, pod: Pod::new(CA), _servers: servers }
    }

    fn run(&self, more: &[&str], without: &[&str]) -> Container {
        // The lab's veth pairs are made to be cards.
        let more = [&["--xdp=native"], more].concat();
        self.pod.run(self.lab.lb().namespace(), NODE, &self.server.url(), &more, without)
    }

    /// What the kubelet would see at the address of a probe.
    fn passes(&self, probe: Option<&Probe>) -> bool {
        let get = probe.unwrap().http_get.as_ref().unwrap();
        let port = serde_json::to_value(&get.port).unwrap();
        let url = format!("http://127.0.0.1:{port}{}", get.path.as_ref().unwrap());
        self.lab.lb().http(&url).is_ok_and(|page| page.status == 200)
    }

    #[track_caller]
    fn serves(&self) {
        for vip in cluster_ips(1).map(|ip| SocketAddr::new(ip, PORT)) {
            let seen = self.lab.client().meet_all(vip);
            assert!(seen.errors.is_empty() && seen.answers.len() == 2, "{vip}: {seen:?}");
        }
    }

    fn sysctl(&self, key: &str) -> String {
        let path = Path::new("/proc/sys/net").join(key);
        self.lab.lb().namespace().run(|| fs::read_to_string(path)).unwrap().trim().to_owned()
    }
}

#[track_caller]
fn stop(container: &mut Container) {
    kill(ProcessId::from_raw(container.pid().cast_signed()), Signal::SIGTERM).unwrap();
    let mut ended = None;
    eventually("it ends", || {
        ended = container.ended();
        ended.is_some()
    });
    assert_eq!(ended, Some(0));
}

/// Every field of an object is one of its kind, and has a value that it may have.
#[track_caller]
fn has_no_other_fields<T: DeserializeOwned + Serialize>(written: &Value) {
    let understood: T = serde_json::from_value(written.clone()).unwrap();
    let understood = serde_json::to_value(understood).unwrap();
    expect_within(written, &understood, "");
}

#[track_caller]
fn expect_within(part: &Value, whole: &Value, path: &str) {
    match part {
        Value::Object(fields) => {
            for (name, value) in fields {
                expect_within(value, &whole[name], &format!("{path}.{name}"));
            }
        }
        Value::Array(items) => {
            assert_eq!(items.len(), whole.as_array().map_or(0, Vec::len), "{path}");
            for (i, item) in items.iter().enumerate() {
                expect_within(item, &whole[i], &format!("{path}[{i}]"));
            }
        }
        value => assert_eq!(value, whole, "{path}"),
    }
}

#[test]
fn every_object_is_of_its_kind() {
    let objects = manifest();
    for object in &objects {
        match object["kind"].as_str().unwrap() {
            "ServiceAccount" => has_no_other_fields::<ServiceAccount>(object),
            "ClusterRole" => has_no_other_fields::<ClusterRole>(object),
            "ClusterRoleBinding" => has_no_other_fields::<ClusterRoleBinding>(object),
            "DaemonSet" => has_no_other_fields::<DaemonSet>(object),
            other => panic!("{other}"),
        }
    }
    assert_eq!(objects.len(), 4);
    let [account, role, binding, daemon_set] = [0, 1, 2, 3].map(|i| &objects[i]);
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
    for field in ["name", "namespace"] {
        assert_eq!(binding["subjects"][0][field], account["metadata"][field]);
    }
    assert_eq!(daemon_set["metadata"]["namespace"], account["metadata"]["namespace"]);
    let pod = &daemon_set["spec"]["template"];
    assert_eq!(pod["spec"]["serviceAccountName"], account["metadata"]["name"]);
    assert_eq!(pod["metadata"]["labels"], daemon_set["spec"]["selector"]["matchLabels"]);
}

#[test]
fn the_agent_balances_in_its_container_and_the_next_one_takes_over() {
    let world = World::new();
    let before = world.sysctl("ipv4/conf/eth0/forwarding");
    let mut container = world.run(&[], &[]);
    let probes = world.pod.container().clone();
    let is_up = || {
        world.passes(probes.startup_probe.as_ref())
            && world.passes(probes.liveness_probe.as_ref())
            && world.passes(probes.readiness_probe.as_ref())
    };
    eventually("the probes pass", is_up);
    world.serves();
    assert_eq!(world.sysctl("ipv4/conf/eth0/forwarding"), "1");
    let log = container.log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    assert!(log.contains("from now on CAP_NET_ADMIN; dropped for good: CAP_BPF, CAP_PERFMON\n"), "{log}");
    let bounding = fs::read_to_string(format!("/proc/{}/status", container.pid())).unwrap();
    // CAP_NET_ADMIN, CAP_PERFMON and CAP_BPF (include/uapi/linux/capability.h).
    assert!(bounding.contains("CapBnd:\t000000c000001000\n"), "{bounding}");
    let status = Command::new(binary()).args(["status", "--admin"]).arg(world.pod.admin_socket()).output().unwrap();
    assert!(status.status.success());

    // Replaced, it leaves no gap; asked for it, the next one leaves nothing.
    stop(&mut container);
    world.serves();
    let mut container = world.run(&["--keep=false"], &[]);
    eventually("the probes pass", is_up);
    world.serves();
    stop(&mut container);
    world.lab.lb().assert_no_programs();
    assert_eq!(world.sysctl("ipv4/conf/eth0/forwarding"), before);
    assert!(fs::read_dir(world.pod.path("bpf")).unwrap().all(|it| !it.unwrap().path().is_dir()));
}

#[test]
fn the_role_allows_what_is_asked_for_and_nothing_else() {
    let world = World::new();
    let _container = world.run(&[], &[]);
    eventually("it follows all", || world.server.watchers() == 3);
    let asked: BTreeSet<_> = world
        .server
        .requests()
        .iter()
        .map(|request| {
            assert_eq!(request.method, "GET");
            // `/api/v1/services` and `/apis/discovery.k8s.io/v1/endpointslices`.
            let parts: Vec<_> = request.path.split('/').skip(1).collect();
            let (group, rest) = if parts[0] == "api" { ("", &parts[2..]) } else { (parts[1], &parts[3..]) };
            // Of all namespaces, and of no single object.
            assert_eq!(rest.len(), 1, "{request:?}");
            let verb = if request.parameter("watch").is_some() { "watch" } else { "list" };
            (group.to_owned(), rest[0].to_owned(), verb.to_owned())
        })
        .collect();
    let role: ClusterRole = of_kind("ClusterRole");
    let mut allowed = BTreeSet::new();
    for rule in role.rules.unwrap() {
        for group in rule.api_groups.as_ref().unwrap() {
            for resource in rule.resources.as_ref().unwrap() {
                allowed.extend(rule.verbs.iter().map(|verb| (group.clone(), resource.clone(), verb.clone())));
            }
        }
    }
    assert_eq!(asked, allowed);
}

#[test]
fn what_a_container_lacks_is_named() {
    let world = World::new();
    let container = world.run(&[], &["sysctls"]);
    eventually("it balances", || world.passes(world.pod.container().startup_probe.as_ref()));
    let log = container.log();
    assert!(log.contains("cannot set /proc/sys/net/ipv4/conf/eth0/") && log.contains("Read-only file system"), "{log}");
    drop(container);
    assert!(world.pod.cleanup(world.lab.lb().namespace()));

    for (volume, remark) in [
        ("run", "cannot listen on /run/wharf/admin.sock: Read-only file system"),
        ("bpffs", "no BPF file system could be mounted at /sys/fs/bpf"),
    ] {
        let mut container = world.run(&[], &[volume]);
        let mut ended = None;
        eventually("it ends", || {
            ended = container.ended();
            ended.is_some()
        });
        let log = container.log();
        assert!(ended == Some(1) && log.contains(remark), "{log}");
    }
}
