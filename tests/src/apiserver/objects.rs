//! Objects as a server gives them out: with the fields that controllers and defaults fill in.
//!
//! ```
//! # use tests::apiserver::objects::{node, service, slice};
//! let web = service("default", "web").cluster_ips(["10.96.0.7"]).port("http", 80).target(8080).node_port(30080);
//! let endpoints = slice("default", "web-abc").of("web").port("http", 8080);
//! let endpoints = endpoints.endpoint("10.244.1.5").on("node-a").zone("a").endpoint("10.244.2.6").not_ready();
//! let machine = node("node-a").address("192.0.2.1").zone("a");
//! # let objects: [serde_json::Value; 3] = [web.build(), endpoints.build(), machine.build()];
//! ```
//!
//! What has no word here is said by [`Draft::set`]. Words such as `target` and `on` are about the port or the endpoint
//! that was named last.

use std::marker::PhantomData;

use serde_json::{Value, json};

/// An object that is being written.
#[derive(Clone, Debug)]
#[must_use = "it is of use on a server alone"]
pub struct Draft<Kind> {
    object: Value,
    kind: PhantomData<Kind>,
}

/// The kind of services.
#[derive(Clone, Copy, Debug)]
pub enum Service {}

/// The kind of endpoint slices.
#[derive(Clone, Copy, Debug)]
pub enum Slice {}

/// The kind of nodes.
#[derive(Clone, Copy, Debug)]
pub enum Node {}

/// A service without a port, and headless until it is given cluster IPs.
pub fn service(namespace: &str, name: &str) -> Draft<Service> {
    let fields = ["f:internalTrafficPolicy", "f:ports", "f:selector", "f:sessionAffinity", "f:type"];
    Draft::new(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": name, "namespace": namespace, "labels": { "app": name },
            "managedFields": managed("kubectl-client-side-apply", "v1", "f:spec", &fields),
        },
        "spec": {
            "clusterIP": "None", "clusterIPs": ["None"], "internalTrafficPolicy": "Cluster", "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack", "ports": [], "selector": { "app": name }, "sessionAffinity": "None",
            "type": "ClusterIP",
        },
        "status": { "loadBalancer": {} },
    }))
}

/// An endpoint slice without an endpoint, of no service, as the controller in the control plane writes it.
pub fn slice(namespace: &str, name: &str) -> Draft<Slice> {
    let version = "discovery.k8s.io/v1";
    Draft::new(json!({
        "apiVersion": version, "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": namespace,
            "annotations": { "endpoints.kubernetes.io/last-change-trigger-time": "2026-05-04T03:02:01Z" },
            "labels": { "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io" },
            "managedFields": managed("kube-controller-manager", version, "f:metadata", &["f:labels"]),
        },
        "addressType": "IPv4", "endpoints": [], "ports": [],
    }))
}

/// A node that is ready, without an address.
pub fn node(name: &str) -> Draft<Node> {
    Draft::new(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": { "node.alpha.kubernetes.io/ttl": "0" },
            "labels": { "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux" },
            "managedFields": managed("kubelet", "v1", "f:status", &["f:addresses", "f:conditions"]),
        },
        "spec": {},
        "status": {
            "addresses": [{ "type": "Hostname", "address": name }],
            "allocatable": { "cpu": "8", "memory": "32Gi", "pods": "110" },
            "capacity": { "cpu": "8", "memory": "32Gi", "pods": "110" },
            "conditions": [{
                "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status",
                "lastHeartbeatTime": "2026-05-04T03:02:01Z", "lastTransitionTime": "2026-05-01T00:00:00Z",
            }],
            "daemonEndpoints": { "kubeletEndpoint": { "Port": 10250 } },
            "nodeInfo": {
                "architecture": "amd64", "bootID": "", "containerRuntimeVersion": "containerd://2.2.0",
                "kernelVersion": "6.18.0", "kubeProxyVersion": "", "kubeletVersion": "v1.36.0", "machineID": "",
                "operatingSystem": "linux", "osImage": "Debian GNU/Linux 13 (trixie)", "systemUUID": "",
            },
        },
    }))
}

/// What is remembered of who wrote which fields.
fn managed(manager: &str, version: &str, under: &str, fields: &[&str]) -> Value {
    let fields: serde_json::Map<_, _> = fields.iter().map(|field| ((*field).to_owned(), json!({}))).collect();
    json!([{
        "apiVersion": version, "fieldsType": "FieldsV1", "fieldsV1": { under: fields }, "manager": manager,
        "operation": "Update", "time": "2026-05-04T03:02:01Z",
    }])
}

impl<Kind> Draft<Kind> {
    fn new(object: Value) -> Self {
        Self { object, kind: PhantomData }
    }

    /// The object.
    pub fn build(self) -> Value {
        self.object
    }

    /// The same with this label.
    pub fn label(self, key: &str, value: &str) -> Self {
        self.entry("labels", key, value)
    }

    /// The same with this annotation.
    pub fn annotation(self, key: &str, value: &str) -> Self {
        self.entry("annotations", key, value)
    }

    /// The same with another value of a field, of which this is the path: `spec.externalTrafficPolicy`.
    pub fn set(mut self, path: &str, value: impl Into<Value>) -> Self {
        let field = path.split('.').fold(&mut self.object, |object, name| &mut object[name]);
        *field = value.into();
        self
    }

    fn entry(mut self, map: &str, key: &str, value: &str) -> Self {
        self.object["metadata"][map][key] = value.into();
        self
    }
}

impl<Kind> From<Draft<Kind>> for Value {
    fn from(draft: Draft<Kind>) -> Self {
        draft.build()
    }
}

impl Draft<Service> {
    /// The same with these addresses in the cluster, and with their families.
    pub fn cluster_ips<const N: usize>(mut self, ips: [impl ToString; N]) -> Self {
        let ips = ips.map(|ip| ip.to_string());
        let spec = &mut self.object["spec"];
        spec["clusterIP"] = ips.first().map_or("None", String::as_str).into();
        spec["clusterIPs"] = json!(ips.as_slice());
        spec["ipFamilies"] = ips.iter().map(|ip| family(ip)).collect();
        spec["ipFamilyPolicy"] = if N == 2 { "RequireDualStack" } else { "SingleStack" }.into();
        self
    }

    /// The same with one more port, over TCP, which leads to the same port of endpoints.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        push(
            &mut self.object["spec"],
            "ports",
            json!({ "name": name, "port": port, "protocol": "TCP", "targetPort": port }),
        );
        self
    }

    /// The port is one of another protocol.
    pub fn protocol(mut self, protocol: &str) -> Self {
        last(&mut self.object["spec"], "ports")["protocol"] = protocol.into();
        self
    }

    /// The port leads to another one, a number or a name.
    pub fn target(mut self, target: impl Into<Value>) -> Self {
        last(&mut self.object["spec"], "ports")["targetPort"] = target.into();
        self
    }

    /// The port is there on nodes, as this one; the service is at least of type `NodePort`.
    pub fn node_port(mut self, port: u16) -> Self {
        last(&mut self.object["spec"], "ports")["nodePort"] = port.into();
        self.reached_from_outside("NodePort")
    }

    /// The same with these addresses outside of the cluster.
    pub fn external_ips<const N: usize>(mut self, ips: [&str; N]) -> Self {
        self.object["spec"]["externalIPs"] = json!(ips.as_slice());
        self.reached_from_outside("ClusterIP")
    }

    /// The same, of type `LoadBalancer`, with these addresses of a load balancer.
    pub fn load_balancer<const N: usize>(mut self, ips: [impl ToString; N]) -> Self {
        let ips = ips.map(|ip| ip.to_string());
        let ingress = ips.iter().map(|ip| json!({ "ip": ip, "ipMode": "VIP" })).collect();
        self.object["status"]["loadBalancer"] =
            if ips.is_empty() { json!({}) } else { json!({ "ingress": Value::Array(ingress) }) };
        self.object["spec"]["allocateLoadBalancerNodePorts"] = true.into();
        self.reached_from_outside("LoadBalancer")
    }

    fn reached_from_outside(mut self, kind: &str) -> Self {
        let spec = &mut self.object["spec"];
        if spec["type"] == "ClusterIP" || kind == "LoadBalancer" {
            spec["type"] = kind.into();
        }
        if spec["externalTrafficPolicy"].is_null() {
            spec["externalTrafficPolicy"] = "Cluster".into();
        }
        self
    }
}

impl Draft<Slice> {
    /// The same, of this service.
    pub fn of(mut self, service: &str) -> Self {
        let metadata = &mut self.object["metadata"];
        metadata["generateName"] = format!("{service}-").into();
        metadata["ownerReferences"] = json!([{
            "apiVersion": "v1", "blockOwnerDeletion": true, "controller": true, "kind": "Service", "name": service,
            "uid": "00000000-7768-4172-8066-000000000000",
        }]);
        self.label("kubernetes.io/service-name", service)
    }

    /// The same with one more port, over TCP.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        push(&mut self.object, "ports", json!({ "name": name, "port": port, "protocol": "TCP" }));
        self
    }

    /// The port is one of another protocol.
    pub fn protocol(mut self, protocol: &str) -> Self {
        last(&mut self.object, "ports")["protocol"] = protocol.into();
        self
    }

    /// The same with one more endpoint, which is ready; the slice is one of its family.
    #[expect(clippy::needless_pass_by_value, reason = "an address is text here, and a value there")]
    pub fn endpoint(mut self, address: impl ToString) -> Self {
        let address = address.to_string();
        let ready = json!({ "ready": true, "serving": true, "terminating": false });
        let pod = format!("pod-{}", address.replace(['.', ':'], "-"));
        let namespace = self.object["metadata"]["namespace"].clone();
        let target = json!({ "kind": "Pod", "name": pod, "namespace": namespace });
        push(
            &mut self.object,
            "endpoints",
            json!({ "addresses": [address], "conditions": ready, "targetRef": target }),
        );
        self.set("addressType", family(&address))
    }

    /// The endpoint is on this node.
    pub fn on(self, node: &str) -> Self {
        self.endpoint_field("nodeName", node)
    }

    /// The endpoint is in this zone.
    pub fn zone(self, zone: &str) -> Self {
        self.endpoint_field("zone", zone)
    }

    /// The endpoint is not ready.
    pub fn not_ready(self) -> Self {
        self.endpoint_field("conditions", json!({ "ready": false, "serving": false, "terminating": false }))
    }

    /// The endpoint is about to go, and still serves or does not.
    pub fn terminating(self, serving: bool) -> Self {
        self.endpoint_field("conditions", json!({ "ready": false, "serving": serving, "terminating": true }))
    }

    /// The endpoint is for clients of these zones.
    pub fn for_zones<const N: usize>(self, zones: [&str; N]) -> Self {
        self.hint("forZones", zones)
    }

    /// The endpoint is for clients of these nodes.
    pub fn for_nodes<const N: usize>(self, nodes: [&str; N]) -> Self {
        self.hint("forNodes", nodes)
    }

    fn hint<const N: usize>(mut self, kind: &str, names: [&str; N]) -> Self {
        let names = names.iter().map(|name| json!({ "name": name })).collect();
        last(&mut self.object, "endpoints")["hints"][kind] = Value::Array(names);
        self
    }

    fn endpoint_field(mut self, field: &str, value: impl Into<Value>) -> Self {
        last(&mut self.object, "endpoints")[field] = value.into();
        self
    }
}

impl Draft<Node> {
    /// The same with one more internal address.
    pub fn address(mut self, address: &str) -> Self {
        push(&mut self.object["status"], "addresses", json!({ "type": "InternalIP", "address": address }));
        self
    }

    /// The same with these addresses of its pods.
    pub fn pod_cidrs<const N: usize>(mut self, cidrs: [&str; N]) -> Self {
        self.object["spec"]["podCIDR"] = cidrs.first().copied().into();
        self.object["spec"]["podCIDRs"] = json!(cidrs.as_slice());
        self
    }

    /// The same in this zone.
    pub fn zone(self, zone: &str) -> Self {
        self.label("topology.kubernetes.io/zone", zone)
    }

    /// The same with one more taint.
    pub fn taint(mut self, key: &str, effect: &str) -> Self {
        let taints = &mut self.object["spec"]["taints"];
        if taints.is_null() {
            *taints = json!([]);
        }
        push(&mut self.object["spec"], "taints", json!({ "key": key, "effect": effect }));
        self
    }

    /// The same, but not heard of for a while.
    pub fn not_ready(mut self) -> Self {
        let condition = last(&mut self.object["status"], "conditions");
        condition["status"] = "Unknown".into();
        condition["reason"] = "NodeStatusUnknown".into();
        self.taint("node.kubernetes.io/unreachable", "NoSchedule")
    }
}

fn family(address: &str) -> &'static str {
    if address.contains(':') { "IPv6" } else { "IPv4" }
}

fn push(object: &mut Value, list: &str, item: Value) {
    object[list].as_array_mut().expect("the draft began with one").push(item);
}

#[track_caller]
fn last<'a>(object: &'a mut Value, list: &str) -> &'a mut Value {
    let list_of = object[list].as_array_mut().expect("the draft began with one");
    list_of.last_mut().unwrap_or_else(|| panic!("this is about one of the {list}, and there is none yet"))
}
