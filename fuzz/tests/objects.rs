//! Kubernetes objects of the right shape, most of whose values are likely and some are not: what no damage to bytes makes often.
//! `WHARF_INPUTS` says how many, as for the other targets.
#![expect(clippy::expect_used, clippy::panic, reason = "this is test code: it fails by panicking")]

use std::env;

use fuzz::Change;
use proptest::{collection::vec, prelude::*, sample::select, test_runner::TestRunner};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn run<S: Strategy>(cases: u32, inputs: &S, body: fn(S::Value)) {
    let cases = env::var("WHARF_INPUTS").map_or(cases, |text| text.parse().expect("WHARF_INPUTS is a number"));
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let result = TestRunner::new(config).run(inputs, |input| {
        body(input);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// One of these values.
fn one_of<T: Clone + Into<Value> + std::fmt::Debug + 'static>(values: &'static [T]) -> BoxedStrategy<Value> {
    select(values).prop_map(Into::into).boxed()
}

/// A value that is nearly always one of the first kind.
fn mostly(usual: BoxedStrategy<Value>, odd: BoxedStrategy<Value>) -> BoxedStrategy<Value> {
    prop_oneof![12 => usual, 1 => odd].boxed()
}

/// A map of fields, of which some are missing, or null, or of another kind altogether.
fn map(fields: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
    let nonsense = one_of(&["x", "", "0"]).prop_union(Just(json!([])).boxed()).or(Just(json!({ "a": [1.5] })).boxed());
    let fields = fields.into_iter().map(|(name, value)| {
        let value = prop_oneof![
            160 => value.prop_map(Some), 12 => Just(None), 6 => Just(Some(Value::Null)), 1 => nonsense.clone().prop_map(Some),
        ];
        value.prop_map(move |value| Some((name, value?)))
    });
    let whole = |fields: Vec<Option<(&str, Value)>>| {
        Value::Object(fields.into_iter().flatten().map(|(name, value)| (name.to_owned(), value)).collect())
    };
    fields.collect::<Vec<_>>().prop_map(whole).boxed()
}

fn list(of: BoxedStrategy<Value>, most: usize) -> BoxedStrategy<Value> {
    vec(of, 0..=most).prop_map(Value::Array).boxed()
}

fn text() -> BoxedStrategy<Value> {
    let long = || "x".repeat(300).into();
    let odd = one_of(&["", " ", "a b", "a/b", "\n", "\u{7}", "\u{1b}[31m", "None", "80", "ü"]);
    prop_oneof![6 => odd, 1 => ".{0,12}".prop_map(Value::from), 1 => Just(long())].boxed()
}

fn name(usual: &'static [&'static str]) -> BoxedStrategy<Value> {
    mostly(one_of(usual), text())
}

fn address() -> BoxedStrategy<Value> {
    let usual =
        one_of(&["10.96.0.1", "10.96.0.2", "10.244.1.5", "10.244.2.5", "fd00:96::1", "fd00:96::2", "fd00:244::5"]);
    let odd = one_of(&[
        "None",
        "010.096.000.001",
        "0.0.0.0",
        "::",
        "127.0.0.1",
        "::1",
        "::ffff:10.0.0.1",
        "224.0.0.1",
        "ff02::1",
        "fe80::1",
        "255.255.255.255",
        "10.0.0.256",
        "10.0.0",
        "10.0.0.1:80",
        "10.0.0.1/24",
        "[::1]",
        "fe80::1%eth0",
        "192.0.2.1",
        " 10.0.0.1",
    ]);
    mostly(usual, odd.prop_union(text()).boxed())
}

fn range() -> BoxedStrategy<Value> {
    let odd = one_of(&[
        "10.0.0.0/33",
        "10.0.0.0/-1",
        "/",
        "10.0.0.1",
        " 10.0.0.7/8",
        "010.0.0.0/08",
        "::/129",
        "::/0",
        "0.0.0.0/0",
    ]);
    mostly(one_of(&["203.0.113.0/24", "2001:db8::/32"]), odd.prop_union(text()).boxed())
}

fn number(usual: &'static [i64]) -> BoxedStrategy<Value> {
    let odd = one_of(&[0, -1, 1, 65_535, 65_536, 2_147_483_647, -2_147_483_648, i64::MAX]);
    mostly(one_of(usual), odd.prop_union(Just(json!(80.5)).boxed()).boxed())
}

fn flag() -> BoxedStrategy<Value> {
    any::<bool>().prop_map(Into::into).boxed()
}

fn protocol() -> BoxedStrategy<Value> {
    mostly(one_of(&["TCP", "UDP", "SCTP"]), one_of(&["tcp", "", "QUIC"]))
}

fn metadata(names: &'static [&'static str], labels: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
    let time =
        mostly(one_of(&["2026-05-04T03:02:01Z", "2026-05-05T03:02:01Z"]), one_of(&["1960-01-01T00:00:00Z", "now"]));
    map(vec![
        ("name", name(names)),
        ("namespace", name(&["ns", "ns", "other"])),
        ("creationTimestamp", time),
        ("labels", map(labels)),
    ])
}

fn service() -> BoxedStrategy<Value> {
    let port = map(vec![
        ("name", name(&["http", "dns"])),
        ("port", number(&[80, 443, 53])),
        ("protocol", protocol()),
        ("nodePort", number(&[30_080, 30_443])),
        ("targetPort", number(&[8080])),
    ]);
    let ingress = map(vec![("ip", address()), ("ipMode", one_of(&["VIP", "Proxy", ""])), ("hostname", text())]);
    let config = map(vec![("clientIP", map(vec![("timeoutSeconds", number(&[10_800, 1, 86_400]))]))]);
    let spec = map(vec![
        ("type", name(&["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"])),
        ("clusterIP", address()),
        ("clusterIPs", list(address(), 3)),
        ("ipFamilies", list(name(&["IPv4", "IPv6"]), 3)),
        ("ports", list(port, 4)),
        ("externalIPs", list(address(), 3)),
        ("externalTrafficPolicy", name(&["Cluster", "Local"])),
        ("internalTrafficPolicy", name(&["Cluster", "Local"])),
        ("sessionAffinity", name(&["None", "ClientIP"])),
        ("sessionAffinityConfig", config),
        ("loadBalancerSourceRanges", list(range(), 3)),
        ("healthCheckNodePort", number(&[31_000, 31_001])),
    ]);
    let rarely = |value: BoxedStrategy<Value>| prop_oneof![1 => value, 9 => Just(Value::Null)].boxed();
    map(vec![
        ("apiVersion", Just("v1".into()).boxed()),
        ("metadata", metadata(&["a", "b", "c"], vec![("service.kubernetes.io/headless", rarely(text()))])),
        ("spec", spec),
        ("status", map(vec![("loadBalancer", map(vec![("ingress", list(ingress, 3))]))])),
    ])
}

fn slice() -> BoxedStrategy<Value> {
    let port =
        map(vec![("name", name(&["http", "dns", ""])), ("port", number(&[80, 8080, 53])), ("protocol", protocol())]);
    let named = |names| list(map(vec![("name", name(names))]), 2);
    let endpoint = map(vec![
        ("addresses", list(address(), 2)),
        ("conditions", map(vec![("ready", flag()), ("serving", flag()), ("terminating", flag())])),
        ("nodeName", name(&["node-1", "node-2"])),
        ("zone", name(&["a", "b"])),
        ("hints", map(vec![("forZones", named(&["a", "b"])), ("forNodes", named(&["node-1", "node-2"]))])),
    ]);
    let labels = vec![("kubernetes.io/service-name", name(&["a", "b", "c"]))];
    map(vec![
        ("apiVersion", Just("discovery.k8s.io/v1".into()).boxed()),
        ("metadata", metadata(&["a-1", "a-2", "b-1"], labels)),
        ("addressType", name(&["IPv4", "IPv4", "IPv6", "FQDN"])),
        ("ports", list(port, 3)),
        ("endpoints", list(endpoint, 5)),
    ])
}

fn node() -> BoxedStrategy<Value> {
    let taint = map(vec![("key", name(&["ToBeDeletedByClusterAutoscaler", "other"])), ("effect", text())]);
    map(vec![
        ("apiVersion", Just("v1".into()).boxed()),
        ("metadata", metadata(&["node-1", "node-2"], vec![("topology.kubernetes.io/zone", name(&["a", "b"]))])),
        ("spec", map(vec![("taints", list(taint, 2))])),
    ])
}

fn with_kind(mut object: Value, kind: &str) -> Value {
    if let Some(fields) = object.as_object_mut() {
        fields.insert("kind".to_owned(), kind.into());
    }
    object
}

fn objects() -> impl Strategy<Value = Vec<Value>> {
    let object = prop_oneof![
        4 => service().prop_map(|it| with_kind(it, "Service")),
        4 => slice().prop_map(|it| with_kind(it, "EndpointSlice")),
        1 => node().prop_map(|it| with_kind(it, "Node")),
        1 => one_of(&["ConfigMap", "Pod", ""]).prop_map(|kind| json!({ "kind": kind })),
    ];
    vec(object, 0..6)
}

/// The object, if it is one.
fn typed<T: DeserializeOwned>(value: Value) -> Option<Box<T>> {
    serde_json::from_value(value).ok().map(Box::new)
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => service().prop_filter_map("no Service", |it| typed(it).map(Change::Service)),
        6 => slice().prop_filter_map("no EndpointSlice", |it| typed(it).map(Change::Slice)),
        1 => node().prop_filter_map("no Node", |it| typed(it).map(Change::Node)),
        2 => service().prop_filter_map("no Service", |it| typed(it).map(Change::NoService)),
        2 => slice().prop_filter_map("no EndpointSlice", |it| typed(it).map(Change::NoSlice)),
        3 => Just(Change::Load),
    ]
}

#[test]
fn files_of_likely_objects() {
    run(300, &objects(), |objects| {
        let list = json!({ "kind": "List", "apiVersion": "v1", "items": objects });
        fuzz::kubernetes_objects(list.to_string().as_bytes());
        let documents = objects.iter().map(|object| format!("---\nkind: List\nitems:\n- {object}\n"));
        fuzz::kubernetes_objects(documents.collect::<String>().as_bytes());
    });
}

#[test]
fn likely_objects_that_come_and_go() {
    run(300, &vec(change(), 0..20), |changes| fuzz::kubernetes_changes(&changes));
}
