//! What the agent tells over HTTP.

use std::net::TcpListener;

use serde_json::Value;
use tests::{
    agent::Agent,
    eventually,
    services::{PORT, Service, TARGET_PORT, cluster_ips, file},
    topology::{Lab, Topology},
};

const METRICS: &str = "http://127.0.0.1:10249/metrics";

fn lab() -> Lab {
    Topology::new().backends(1).up()
}

#[test]
fn metrics_say_how_the_agent_is_and_what_became_of_packets() {
    let lab = lab();
    let _servers = lab.serve(TARGET_PORT);
    let agent = Agent::start(&lab, &file([Service::new(1).endpoints([lab.backend(1)])]), &[]);
    let page = lab.lb().http(METRICS).unwrap();
    assert_eq!((page.status, page.metric("kubeproxy_sync_proxy_rules_duration_seconds_count")), (200, Some(1.0)));
    assert!(page.headers["content-type"].starts_with("application/openmetrics-text"), "{page:?}");
    let status = agent.status();
    for table in status["tables"].as_array().unwrap() {
        let name = table["name"].as_str().unwrap();
        for (series, value) in [("entries", &table["used"]), ("size", &table["size"])] {
            assert_eq!(page.metric(&format!("wharf_table_{series}{{table=\"{name}\"}}")), value.as_f64(), "{name}");
        }
    }
    assert_eq!(page.metric("wharf_services_refused"), Some(0.0));
    assert!(page.metric("wharf_services").is_some_and(|services| services > 0.0));
    let forwarded = "wharf_packets_total{action=\"forward\",reason=\"redirect\"}";
    let before = page.metric(forwarded).unwrap();
    assert!(lab.client().get_many((cluster_ips(1)[0], PORT), 10, 1).errors.is_empty());
    assert!(lab.lb().http(METRICS).unwrap().metric(forwarded).unwrap() >= before + 20.0);
    agent.edit("services: [{ name: web }]");
    eventually("the mistake is told", || lab.lb().http(METRICS).unwrap().metric("wharf_services_refused") == Some(1.0));
    let page = lab.lb().http("http://127.0.0.1:10249/proxyMode").unwrap();
    assert_eq!((page.status, &*page.body), (200, "wharf"));
    assert_eq!(lab.lb().http("http://127.0.0.1:10249/other").unwrap().status, 404);
}

#[test]
fn health_is_told_where_it_is_asked_for() {
    let lab = lab();
    let _agent = Agent::start(&lab, "services: []", &["--healthz-bind-address=0.0.0.0", "--metrics-bind-address="]);
    for (path, node_eligible) in [("healthz", Value::Bool(true)), ("livez", Value::Null)] {
        let page = lab.lb().http(&format!("http://127.0.0.1:10256/{path}")).unwrap();
        assert_eq!(page.status, 200, "{page:?}");
        assert_eq!(page.headers["content-type"], "application/json");
        let body: Value = serde_json::from_str(&page.body).unwrap();
        assert_eq!(body["nodeEligible"], node_eligible);
        assert_eq!(body["lastUpdated"], body["currentTime"]);
    }
    assert!(lab.lb().http(METRICS).is_err());
}

#[test]
fn a_port_that_is_taken_harms_nothing_and_is_had_once_it_is_free() {
    let lab = lab();
    let taken = lab.lb().namespace().run(|| TcpListener::bind("127.0.0.1:10249").unwrap());
    let agent = Agent::start(&lab, "services: []", &[]);
    eventually("it is told", || agent.log().contains("no metrics over HTTP for now: 127.0.0.1:10249"));
    // One that may not wait ends before it does anything.
    let other = lab.lb().namespace().run(|| TcpListener::bind("127.0.0.1:10256").unwrap());
    let arguments = ["--bind-address-hard-fail", "--metrics-bind-address=", "--healthz-bind-address=127.0.0.1"];
    let mut strict = Agent::launch(&lab, "services: []", &arguments);
    assert_eq!(strict.wait().code(), Some(1));
    let log = strict.log();
    assert!(
        log.contains("127.0.0.1:10256 can't be listened on; --healthz-bind-address") && log.contains("in use"),
        "{log}"
    );
    drop((other, strict));
    drop(taken);
    eventually("metrics are there", || lab.lb().http(METRICS).is_ok_and(|page| page.status == 200));
}
