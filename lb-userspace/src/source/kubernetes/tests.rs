//! From objects to the model: cases of kube-proxy's own tests (Kubernetes, `pkg/proxy/*_test.go`), and some more.

use std::{net::SocketAddr, time::SystemTime};

use serde_json::{Value, json};

use super::*;
use crate::model::{Desired, FrontendKind, IpFamily, Protocol, ServiceName, TrafficPolicy};

fn object(value: Value) -> Object {
    serde_json::from_value(value).unwrap()
}

/// Service `ns/web` with two cluster IPs and the port `http`, changed by what is given of its spec, labels and status.
fn service(spec: &Value, labels: &Value, status: &Value) -> Object {
    let mut fields = json!({
        "type": "ClusterIP", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00:96::1"],
        "ipFamilies": ["IPv4", "IPv6"], "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": "any" }],
    });
    for (field, value) in spec.as_object().unwrap() {
        fields[field] = value.clone();
    }
    let metadata = json!({ "namespace": "ns", "name": "web", "labels": labels });
    object(json!({ "kind": "Service", "apiVersion": "v1", "metadata": metadata, "spec": fields, "status": status }))
}

fn plain() -> Object {
    service(&json!({}), &json!({}), &json!({}))
}

/// A slice of `ns/web`.
fn slice(name: &str, family: &str, ports: &Value, endpoints: &Value) -> Object {
    let labels = json!({ "kubernetes.io/service-name": "web" });
    object(json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": family,
        "metadata": { "namespace": "ns", "name": name, "labels": labels }, "ports": ports, "endpoints": endpoints,
    }))
}

fn http(number: u16) -> Value {
    json!([{ "name": "http", "port": number, "protocol": "TCP" }])
}

fn wanted(objects: Vec<Object>) -> Loaded {
    read(objects, Some("here"))
}

fn name(port: &str, family: IpFamily) -> ServiceName {
    ServiceName { name: "ns/web".into(), port: port.into(), protocol: Protocol::Tcp, family }
}

fn addresses<'a>(of: impl IntoIterator<Item = &'a SocketAddr>) -> Vec<String> {
    of.into_iter().map(ToString::to_string).collect()
}

/// The endpoints of port `http` over IPv4.
fn endpoints(desired: &Desired) -> Vec<String> {
    addresses(desired.services()[&name("http", IpFamily::V4)].endpoints.keys())
}

#[test]
fn a_service_is_there_in_each_family_that_it_has_a_cluster_ip_of() {
    let desired = wanted(vec![plain()]).desired;
    for (family, address) in [(IpFamily::V4, "10.96.0.1:80"), (IpFamily::V6, "[fd00:96::1]:80")] {
        let service = &desired.services()[&name("http", family)];
        assert_eq!(addresses(service.frontends.keys()), [address]);
        assert_eq!((service.internal_policy, service.affinity), (TrafficPolicy::Cluster, 0));
    }
    let single = service(
        &json!({ "clusterIPs": ["10.96.0.1"], "externalIPs": ["198.51.100.1", "2001:db8::1", " ", "nonsense"] }),
        &json!({}),
        &json!({}),
    );
    let Loaded { desired, warnings, .. } = wanted(vec![single]);
    assert_eq!(desired.services().len(), 1, "addresses of the other family are not served");
    let service = &desired.services()[&name("http", IpFamily::V4)];
    assert_eq!(addresses(service.frontends.keys()), ["10.96.0.1:80", "198.51.100.1:80"]);
    assert_eq!(warnings, ["Service ns/web: nonsense is no IP address"]);
}

#[test]
fn addresses_that_no_packet_has_are_left_out_and_told() {
    let spec = json!({
        "clusterIP": "::ffff:10.96.0.1", "clusterIPs": ["::ffff:10.96.0.1"],
        "externalIPs": ["127.0.0.1", "224.0.0.1", "a\tb", "::ffff:198.51.100.1"], "loadBalancerSourceRanges": ["a\nb"],
    });
    let endpoints_given = json!([{ "addresses": ["0.0.0.0"] }, { "addresses": ["::ffff:10.244.0.1"] }]);
    let slice = slice("web-1", "IPv4", &http(8080), &endpoints_given);
    let Loaded { desired, warnings, .. } = wanted(vec![service(&spec, &json!({}), &json!({})), slice]);
    let web = &desired.services()[&name("http", IpFamily::V4)];
    assert_eq!(addresses(web.frontends.keys()), ["10.96.0.1:80", "198.51.100.1:80"]);
    assert_eq!(endpoints(&desired), ["10.244.0.1:8080"]);
    assert_eq!(
        warnings,
        [
            "Service ns/web: 127.0.0.1 is a loopback address: it can't be reached over a wire",
            "Service ns/web: 224.0.0.1 is a multicast address: a connection has one other end",
            "Service ns/web: a\\tb is no IP address",
            "Service ns/web: a\\nb is no range of IP addresses",
        ]
    );
}

#[test]
fn what_is_not_ours_is_left_alone() {
    for (spec, labels) in [
        (json!({ "clusterIP": "None", "clusterIPs": ["None"] }), json!({})),
        (json!({ "clusterIP": "", "clusterIPs": [] }), json!({})),
        (json!({ "type": "ExternalName", "externalName": "example.com" }), json!({})),
        (json!({}), json!({ "service.kubernetes.io/service-proxy-name": "other" })),
        (json!({}), json!({ "service.kubernetes.io/headless": "" })),
    ] {
        let desired = wanted(vec![service(&spec, &labels, &json!({}))]).desired;
        assert!(desired.services().is_empty(), "{spec} {labels}");
    }
}

#[test]
fn a_load_balancers_addresses_are_served_where_it_is_no_proxy() {
    let spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_099,
        "loadBalancerSourceRanges": [" 203.0.113.000/025", "", "::ffff:198.51.100.0/120"],
        "ports": [{ "name": "http", "port": 80, "nodePort": 30_080 }],
        "sessionAffinity": "ClientIP", "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 7 } },
    });
    let ingress = json!([
        { "ip": "192.0.2.1" }, { "ip": "192.0.2.2", "ipMode": "VIP" }, { "ip": "192.0.2.3", "ipMode": "Proxy" },
        { "hostname": "lb.example.com" }, { "ip": "2001:db8::1" },
    ]);
    let desired = wanted(vec![service(&spec, &json!({}), &json!({ "loadBalancer": { "ingress": ingress } }))]).desired;
    let web = &desired.services()[&name("http", IpFamily::V4)];
    let balanced = web.frontends.iter().filter(|(_, kind)| **kind == FrontendKind::LoadBalancer).map(|(it, _)| it);
    assert_eq!(addresses(balanced), ["192.0.2.1:80", "192.0.2.2:80"]);
    assert_eq!((web.node_port, web.external_policy, web.affinity), (Some(30_080), TrafficPolicy::Local, 7));
    assert_eq!(web.source_ranges, ["198.51.100.0/24", "203.0.113.0/25"].map(|it| it.parse().unwrap()).into());
    assert_eq!(
        desired.health_checks().iter().map(|(port, of)| (*port, &**of)).collect::<Vec<_>>(),
        [(30_099, "ns/web")]
    );
    // Only a load balancer's is asked for.
    let node_port = json!({ "type": "NodePort", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_099 });
    assert!(wanted(vec![service(&node_port, &json!({}), &json!({}))]).desired.health_checks().is_empty());
}

#[test]
fn ports_of_slices_are_found_by_name_and_protocol() {
    let spec = json!({ "ports": [
        { "name": "http", "port": 80, "protocol": "TCP" }, { "name": "dns", "port": 53, "protocol": "UDP" },
    ] });
    let ports = json!([
        { "name": "http", "port": 8080 }, { "name": "dns", "port": 5353, "protocol": "UDP" },
        { "name": "dns", "port": 9999, "protocol": "TCP" }, { "port": 1 }, { "name": "http" }, { "name": "http", "port": 0 },
    ]);
    let endpoints =
        json!([{ "addresses": ["10.0.0.1", "10.0.0.2"] }, { "addresses": [] }, { "addresses": ["10.00.0.03"] }]);
    let slices = slice("a", "IPv4", &ports, &endpoints);
    let desired = wanted(vec![service(&spec, &json!({}), &json!({})), slices]).desired;
    assert_eq!(super::tests::endpoints(&desired), ["10.0.0.1:8080", "10.0.0.3:8080"]);
    let dns = ServiceName { protocol: Protocol::Udp, ..name("dns", IpFamily::V4) };
    assert_eq!(addresses(desired.services()[&dns].endpoints.keys()), ["10.0.0.1:5353", "10.0.0.3:5353"]);
    // Without names.
    let spec = json!({ "ports": [{ "port": 443 }] });
    let nameless = slice("a", "IPv4", &json!([{ "name": "", "port": 6443 }]), &json!([{ "addresses": ["192.0.2.9"] }]));
    let desired = wanted(vec![service(&spec, &json!({}), &json!({})), nameless]).desired;
    assert_eq!(addresses(desired.services()[&name("443", IpFamily::V4)].endpoints.keys()), ["192.0.2.9:6443"]);
}

#[test]
fn what_conditions_do_not_say_is_good() {
    let conditions = |conditions: Value| {
        let endpoints = json!([{ "addresses": ["10.0.0.1"], "conditions": conditions }]);
        let desired = wanted(vec![plain(), slice("a", "IPv4", &http(80), &endpoints)]).desired;
        let conditions = desired.services()[&name("http", IpFamily::V4)].endpoints.values().next().unwrap().conditions;
        (conditions.ready, conditions.serving, conditions.terminating)
    };
    assert_eq!(conditions(json!({})), (true, true, false));
    assert_eq!(conditions(json!({ "ready": false })), (false, true, false));
    assert_eq!(conditions(json!({ "ready": false, "serving": true, "terminating": true })), (false, true, true));
    assert_eq!(conditions(json!(null)), (true, true, false));
}

#[test]
fn slices_are_put_together_and_of_duplicates_the_better_one_counts() {
    let ready = |ip: &str| json!({ "addresses": [ip], "nodeName": "ready" });
    let ending = |ip: &str| {
        let conditions = json!({ "ready": false, "serving": true, "terminating": true });
        json!({ "addresses": [ip], "conditions": conditions, "nodeName": "ending" })
    };
    for (first, second) in [("a", "b"), ("b", "a")] {
        let slices = vec![
            slice(first, "IPv4", &http(80), &json!([ready("10.0.0.1"), ending("10.0.0.2")])),
            slice(second, "IPv4", &http(80), &json!([ending("10.0.0.1"), ready("10.0.0.3")])),
            slice("other-port", "IPv4", &http(8080), &json!([ready("10.0.0.1")])),
            slice("v6", "IPv6", &http(80), &json!([ready("fd00::1"), ready("10.9.9.9")])),
            slice("fqdn", "FQDN", &http(80), &json!([ready("example.com")])),
        ];
        let desired = wanted(slices.into_iter().chain([plain()]).collect()).desired;
        assert_eq!(endpoints(&desired), ["10.0.0.1:80", "10.0.0.1:8080", "10.0.0.2:80", "10.0.0.3:80"]);
        let web = &desired.services()[&name("http", IpFamily::V4)];
        let endpoint = &web.endpoints[&"10.0.0.1:80".parse().unwrap()];
        assert_eq!((endpoint.node.as_deref(), endpoint.is_local_by_name), (Some("ready"), true));
        assert_eq!(desired.services()[&name("http", IpFamily::V6)].endpoints.len(), 1);
    }
}

#[test]
fn ports_of_sctp_stay_what_they_are() {
    let ports = json!([{ "name": "sctp", "port": 90, "protocol": "SCTP", "nodePort": 30_090 }]);
    let of_slice = json!([{ "name": "sctp", "port": 9090, "protocol": "SCTP" }]);
    let same = json!([{ "name": "sctp", "port": 90, "protocol": "SCTP" }]);
    let spec = json!({ "ports": ports, "clusterIPs": ["10.96.0.1"] });
    let Loaded { desired, warnings, .. } = wanted(vec![
        service(&spec, &json!({}), &json!({})),
        slice("a", "IPv4", &of_slice, &json!([{ "addresses": ["10.0.0.1"] }])),
        slice("b", "IPv4", &same, &json!([{ "addresses": ["10.0.0.2"] }])),
    ]);
    let sctp = &desired.services()[&ServiceName { protocol: Protocol::Sctp, ..name("sctp", IpFamily::V4) }];
    assert_eq!((sctp.node_port, addresses(sctp.endpoints.keys())), (None, vec!["10.0.0.2:90".to_owned()]));
    assert_eq!(warnings.len(), 2, "{warnings:?}");
}

#[test]
fn a_slice_that_moves_to_another_service_leaves_nothing_behind() {
    let mut cluster = Cluster::new(None);
    let moved = |to: &str| {
        let object = slice("a", "IPv4", &http(80), &json!([{ "addresses": ["10.0.0.1"] }]));
        let Object::EndpointSlice(mut slice) = object else { panic!("it is a slice") };
        slice.metadata.labels = Some([("kubernetes.io/service-name".to_owned(), to.to_owned())].into());
        slice
    };
    add(&mut cluster, plain());
    cluster.set_slice(&moved("web"));
    assert_eq!(endpoints(&cluster.loaded().desired), ["10.0.0.1:80"]);
    cluster.set_slice(&moved("other"));
    assert_eq!(endpoints(&cluster.loaded().desired), [""; 0]);
    cluster.set_slice(&moved("web"));
    assert_eq!(endpoints(&cluster.loaded().desired), ["10.0.0.1:80"]);
    cluster.remove_slice(&moved("web"));
    assert_eq!(endpoints(&cluster.loaded().desired), [""; 0]);
    let Object::Service(web) = plain() else { panic!("it is a Service") };
    cluster.remove_service(&web);
    assert_eq!(*cluster.loaded().desired, Desired::default());
}

/// Of Kubernetes' `TestLastChangeTriggerTime`, in `pkg/proxy/endpointschangetracker_test.go`.
#[test]
fn changes_are_counted_and_it_is_told_when_they_have_begun() {
    let mut cluster = Cluster::new(None);
    let begun = |name: &str, time: &str, endpoint: &str| {
        let object = slice(name, "IPv4", &http(80), &json!([{ "addresses": [endpoint] }]));
        let Object::EndpointSlice(mut slice) = object else { panic!("it is a slice") };
        let annotation = ("endpoints.kubernetes.io/last-change-trigger-time".to_owned(), time.to_owned());
        slice.metadata.annotations = Some([annotation].into());
        slice
    };
    let told = |cluster: &mut Cluster| {
        let Changes { services, slices, begun } = cluster.loaded().changes;
        let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!(begun.iter().all(|(family, _)| *family == IpFamily::V4));
        (services, slices, begun.into_iter().map(|(_, time)| seconds(time)).collect::<Vec<_>>())
    };
    for _ in 0..2 {
        // What is the same as before is no change, whatever else is written to it.
        add(&mut cluster, plain());
        cluster.set_slice(&begun("a", "1970-01-01T00:00:01.5Z", "10.0.0.1"));
        cluster.set_slice(&begun("a", "1970-01-01T00:00:02Z", "10.0.0.1"));
    }
    assert_eq!(told(&mut cluster), (1, 1, vec![1.5]));
    assert_eq!(told(&mut cluster), (0, 0, vec![]));
    cluster.set_slice(&begun("a", "1970-01-01T01:00:03+01:00", "10.0.0.2"));
    cluster.set_slice(&begun("b", "1970-01-01T00:00:04Z", "10.0.0.3"));
    cluster.set_slice(&begun("c", "soon", "10.0.0.4"));
    assert_eq!(told(&mut cluster), (0, 3, vec![3.0, 4.0]));
    let last = begun("b", "1970-01-01T00:00:05Z", "10.0.0.5");
    cluster.set_slice(&last);
    cluster.remove_slice(&last);
    cluster.remove_slice(&last);
    assert_eq!(told(&mut cluster), (0, 2, vec![]));
    let Object::Service(web) = plain() else { panic!("it is a Service") };
    cluster.remove_service(&web);
    cluster.remove_service(&web);
    assert_eq!(told(&mut cluster), (1, 0, vec![]));
    assert_eq!(wanted(vec![plain()]).changes, Changes::default(), "a file does not tell");
}

#[test]
fn hints_and_what_the_node_says_of_itself() {
    let endpoints = json!([
        { "addresses": ["10.0.0.1"], "hints": { "forZones": [{ "name": "a" }], "forNodes": [{ "name": "here" }] } },
        { "addresses": ["10.0.0.2"], "hints": { "forZones": [] } },
    ]);
    let node = |name: &str, spec: Value| {
        let labels = json!({ "topology.kubernetes.io/zone": "a" });
        object(
            json!({ "kind": "Node", "apiVersion": "v1", "metadata": { "name": name, "labels": labels }, "spec": spec }),
        )
    };
    let leaving = json!({ "taints": [{ "key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule" }] });
    let slices = slice("a", "IPv4", &http(80), &endpoints);
    let objects = vec![plain(), slices, node("there", leaving.clone()), node("here", json!({}))];
    let loaded = wanted(objects);
    assert_eq!((loaded.node.zone.as_deref(), loaded.node.is_eligible), (Some("a"), true));
    let hints: Vec<_> =
        loaded.desired.services()[&name("http", IpFamily::V4)].endpoints.values().map(|it| it.hints.clone()).collect();
    assert!(hints[0].as_ref().is_some_and(|it| it.zones.contains("a") && it.nodes.contains("here")), "{hints:?}");
    assert_eq!(hints[1], None);
    assert!(!wanted(vec![node("here", leaving)]).node.is_eligible);
}

#[test]
fn lists_are_read_as_kubectl_prints_them() {
    let config_map =
        json!({ "kind": "ConfigMap", "apiVersion": "v1", "metadata": { "name": "x" }, "data": { "a": "b" } });
    let service = json!({
        "kind": "Service", "apiVersion": "v1", "metadata": { "namespace": "ns", "name": "web" },
        "spec": { "clusterIP": "10.96.0.1", "ports": [{ "port": 80 }] },
    });
    let list = object(json!({ "kind": "List", "apiVersion": "v1", "items": [config_map, service] }));
    assert_eq!(wanted(vec![list]).desired.services().len(), 1);
}
