//! `wharf doctor` in networks with one mistake each: it names the mistake, and finds no problem where there is none.
#![expect(clippy::expect_used, reason = "this is test code: it fails by panicking")]

use std::fs;

use serde_json::Value;
use tests::{
    agent::{Agent, binary},
    netns::NetNs,
    topology::{Lab, Topology, VIP4},
};

/// One check of a report.
#[derive(Debug)]
struct Check {
    name: String,
    interface: String,
    verdict: String,
    text: String,
}

/// What `wharf doctor` says in a namespace; its exit code agrees with its verdicts.
#[track_caller]
fn doctor(namespace: &NetNs, arguments: &[&str]) -> Vec<Check> {
    let output = namespace.command(binary()).args(["doctor", "-o", "json"]).args(arguments).output().expect("it runs");
    let checks: Vec<Value> = serde_json::from_slice(&output.stdout).expect("it says that this is JSON");
    let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_owned();
    let read = |check| Check {
        name: text(check, "name"),
        interface: text(check, "interface"),
        verdict: text(check, "verdict"),
        text: format!("{} {}", text(check, "found"), text(check, "remedy")),
    };
    let checks: Vec<_> = checks.iter().map(read).collect();
    let is_ill = checks.iter().any(|check| check.verdict == "problem");
    assert_eq!(output.status.code(), Some(i32::from(is_ill)), "{checks:?}");
    checks
}

/// On all interfaces of the balancer, with these services.
#[track_caller]
fn doctor_in(lab: &Lab, services: &str, arguments: &[&str]) -> Vec<Check> {
    let directory = tempfile::tempdir().expect("there is room for temporary files");
    let file = directory.path().join("services.yaml");
    fs::write(&file, services).expect("the directory is ours");
    let file = file.to_str().expect("text");
    let interfaces: Vec<_> = lab.lb().interfaces().flat_map(|name| ["--interface", name]).collect();
    doctor(lab.lb().namespace(), &[interfaces.as_slice(), &["--services", file], arguments].concat())
}

/// That there is a check with this verdict, of which the sentences have these words; `interface` is empty if it is about none.
#[track_caller]
fn says(checks: &[Check], [name, interface, verdict, words]: [&str; 4]) {
    let found = checks.iter().find(|it| it.name == name && it.interface == interface);
    let fits = found.is_some_and(|check| check.verdict == verdict && check.text.contains(words));
    assert!(fits, "{name} {interface} should be a {verdict} with {words:?}: {found:#?}");
}

#[track_caller]
fn has_no_problem(checks: &[Check]) {
    let problems: Vec<_> = checks.iter().filter(|check| check.verdict == "problem").collect();
    assert!(problems.is_empty(), "{problems:#?}");
}

fn services(backends: &str) -> String {
    format!(
        "services: [{{ name: web, addresses: [{VIP4}], ports: [{{ port: 80, targetPort: 8080 }}], backends: [{backends}] }}]"
    )
}

fn lab() -> Lab {
    let lab = Topology::new().backends(2).up();
    lab.resolve_neighbours();
    lab
}

#[test]
fn a_healthy_lab_has_no_problem() {
    let lab = lab();
    let file = services("10.1.0.2, 10.2.0.2");
    let checks = doctor_in(&lab, &file, &["--xdp", "native"]);
    has_no_problem(&checks);
    says(&checks, ["bpf-programs", "", "ok", "XDP"]);
    says(&checks, ["bpf-maps", "", "ok", "LPM trie"]);
    says(&checks, ["interface", "eth-b1", "ok", "carrier"]);
    says(&checks, ["xdp-mtu", "eth-b1", "ok", "1500"]);
    says(&checks, ["gro", "eth-b1", "note", "wharf run switches it on"]);
    says(&checks, ["source-address", "eth-b1", "ok", "10.1.0.1"]);
    says(&checks, ["backend-routes", "", "ok", "every backend"]);
    says(&checks, ["backend-neighbours", "", "ok", "to 2 of 2 backends are known"]);

    // And while the agent runs, whose programs and settings are no trouble.
    let agent = Agent::start(&lab, &file, &[]);
    let checks = doctor_in(&lab, &file, &["--xdp", "native", "--keep-sysctls"]);
    has_no_problem(&checks);
    says(&checks, ["xdp-program", "eth-b1", "ok", "by an agent that runs"]);
    assert!(checks.iter().all(|check| check.name != "gro"), "{checks:#?}");
    says(&checks, ["ipv4-forwarding", "eth-b1", "ok", "is 1"]);
    agent.stop();
}

#[test]
fn what_the_machine_does_not_forward_is_told_as_what_run_changes_or_as_a_problem() {
    let lab = lab();
    let lb = lab.lb().namespace();
    lb.sysctl("ipv4/conf/eth-b1/rp_filter", "1");
    lb.sysctl("ipv6/conf/eth-b1/accept_ra", "1");
    let file = services("10.1.0.2");
    let checks = doctor_in(&lab, &file, &[]);
    has_no_problem(&checks);
    for name in ["ipv4-forwarding", "rp-filter", "accept-local"] {
        says(&checks, [name, "eth-b1", "note", "wharf run changes it"]);
    }
    says(&checks, ["rp-filter", "eth-b2", "ok", "not strict"]);

    let checks = doctor_in(&lab, &file, &["--keep-sysctls"]);
    says(&checks, ["ipv4-forwarding", "eth-b1", "problem", "sysctl -w net.ipv4.conf.eth-b1.forwarding=1"]);
    says(&checks, ["rp-filter", "eth-b1", "problem", "sysctl -w net.ipv4.conf.eth-b1.rp_filter=2"]);
    says(&checks, ["accept-local", "eth-b1", "problem", "accept_local=1"]);
    says(&checks, ["accept-ra", "eth-b1", "warning", "accept_ra=2"]);
    says(&checks, ["ipv6-forwarding", "", "problem", "net.ipv6.conf.all.forwarding=1"]);
}

#[test]
fn interfaces_that_are_missing_down_or_ports_are_named() {
    let namespace = NetNs::new("doctor");
    namespace.ip("link add up0 type veth peer name peer0\nlink add down0 type veth peer name peer1\n\
         link set up0 up\nlink set peer0 up\nlink add br0 type bridge\nlink set peer0 master br0\nlink set br0 up");
    let interfaces = ["eth9", "up0", "down0", "peer0", "br0"].map(|name| ["--interface", name]).concat();
    let checks = doctor(&namespace, &interfaces);
    says(&checks, ["interface", "eth9", "problem", "there is no interface eth9"]);
    says(&checks, ["interface", "down0", "problem", "ip link set dev down0 up"]);
    says(&checks, ["interface", "up0", "ok", "carrier"]);
    says(&checks, ["device-stack", "peer0", "warning", "name br0 instead"]);
    says(&checks, ["device-stack", "br0", "note", "no XDP"]);
    says(&checks, ["xdp-driver", "br0", "warning", "(bridge) does no XDP"]);
    says(&checks, ["source-address", "up0", "problem", "neither up0 nor any other"]);

    // Without a name all are looked at that are up.
    let checks = doctor(&namespace, &["--pod-interface", "peer*"]);
    let looked_at = |name: &str| checks.iter().any(|it| it.name == "interface" && it.interface == name);
    assert_eq!(["up0", "br0", "peer0", "down0", "lo"].map(looked_at), [true, true, false, false, false]);
    says(&checks, ["pod-interfaces", "", "ok", "peer0"]);
}

#[test]
fn a_jumbo_mtu_and_xdp_programs_of_others_are_in_the_way() {
    let namespace = NetNs::new("doctor");
    namespace.ip("link add up0 type veth peer name peer0\nlink set up0 up\nlink set peer0 up mtu 9000");
    let on_up0 = |mode| doctor(&namespace, &["--interface", "up0", "--xdp", mode]);
    says(&on_up0("native"), ["xdp-mtu", "up0", "problem", "other end has an MTU of 9000"]);
    says(&on_up0("auto"), ["veth", "up0", "note", "--xdp auto takes tc"]);
    assert!(!on_up0("off").iter().any(|check| check.name == "xdp-mtu"));

    // An end in another namespace can't be seen.
    let other = NetNs::new("other");
    namespace.ip(&format!("link add far0 mtu 9000 type veth peer name peer1 netns {}\nlink set far0 up", other.name()));
    let checks = doctor(&namespace, &["--interface", "up0", "--interface", "far0", "--xdp", "native"]);
    says(&checks, ["xdp-mtu", "far0", "problem", "the MTU is 9000, most likely at the other end"]);
    says(&checks, ["mtu", "", "note", "that of far0 is 9000"]);

    let lab = lab();
    // The backend's end has a program that passes all, so that it polls.
    let backend = lab.backend(1).namespace();
    says(
        &doctor(backend, &["--interface", "eth0"]),
        ["xdp-program", "eth0", "warning", "ip link set dev eth0 xdp off"],
    );
}

#[test]
fn backends_that_can_not_be_reached_are_named() {
    let lab = lab();
    let lb = lab.lb().namespace();
    lb.ip("neigh replace 10.2.0.9 dev eth-b2 nud failed\nroute add unreachable 10.7.0.0/16\nroute add 10.8.0.0/16 dev eth-b2\n\
         route add default via 10.1.0.2\nneigh replace 10.1.0.2 dev eth-b1 lladdr 02:00:00:00:00:01 nud permanent");
    let checks = doctor_in(&lab, &services("10.1.0.2, 10.2.0.9, 10.7.0.2"), &[]);
    says(&checks, ["gateway", "", "ok", "10.1.0.2 on eth-b1"]);
    says(&checks, ["backend-routes", "", "problem", "10.7.0.2 ("]);
    says(&checks, ["backend-neighbours", "", "warning", "10.2.0.9 on eth-b2"]);
    lb.ip("route del default\nroute add default via 10.2.0.9");
    let checks = doctor_in(&lab, &services("10.9.0.2"), &[]);
    says(&checks, ["gateway", "", "problem", "10.2.0.9 on eth-b2"]);
    says(&checks, ["backend-neighbours", "", "warning", "10.9.0.2 by 10.2.0.9 on eth-b2"]);
    lb.ip("route del default");
    let checks = doctor_in(&lab, &services("10.9.0.2"), &[]);
    says(&checks, ["gateway", "", "note", "no default gateway"]);
    says(&checks, ["backend-routes", "", "problem", "10.9.0.2 ("]);
}

#[test]
fn source_ports_that_the_host_takes_as_well_are_counted() {
    let lab = lab();
    lab.lb().namespace().sysctl("ipv4/ip_local_port_range", "32000 60999");
    let file = services("10.1.0.2");
    says(&doctor_in(&lab, &file, &[]), ["snat-ports", "", "warning", "share 768 ports; wharf run reserves them"]);
    says(&doctor_in(&lab, &file, &["--keep-sysctls"]), ["snat-ports", "", "problem", "add 32000-32767 to"]);
    let all = doctor_in(&lab, &file, &["--snat-ports", "1024-65535"]);
    says(&all, ["snat-ports", "", "problem", "all that the host has"]);
    lab.lb().namespace().sysctl("ipv4/ip_local_reserved_ports", "32000-33000");
    says(&doctor_in(&lab, &file, &["--keep-sysctls"]), ["snat-ports", "", "ok", "reserved"]);
}

#[test]
fn a_kube_proxy_that_runs_is_found() {
    let directory = tempfile::tempdir().expect("there is room for temporary files");
    let path = directory.path().join("kube-proxy");
    std::os::unix::fs::symlink("/bin/sleep", &path).expect("the directory is ours");
    let namespace = NetNs::new("doctor");
    let mut kube_proxy = namespace.command(&path).arg("60").spawn().expect("sleep is there");
    let checks = doctor(&namespace, &[]);
    let elsewhere = doctor(&NetNs::new("another"), &[]);
    kube_proxy.kill().and_then(|()| kube_proxy.wait()).expect("it is our child");
    says(&checks, ["kube-proxy", "", "warning", &format!("process {}", kube_proxy.id())]);
    says(&elsewhere, ["kube-proxy", "", "ok", "no kube-proxy runs"]);
    says(&checks, ["ipvs", "", "ok", "no virtual services"]);
    says(&checks, ["interface", "", "problem", "no interface but loopback, and those of pods, is up"]);
}
