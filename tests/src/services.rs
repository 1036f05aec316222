//! Services files, written from what a test says.
//!
//! ```no_run
//! # use tests::{cluster::{Layout, PodNetwork}, services::{Service, file}};
//! # let cluster = Layout::new(PodNetwork::Bridged).up();
//! let web = Service::new(1).endpoints(cluster.node(1).pods()).set("externalTrafficPolicy", "Local");
//! println!("{}", file([web]));
//! ```
//!
//! Services are numbered, and their number is in all that they are reached by; port 80 leads to port 8080 of
//! the endpoints, over TCP and UDP:
//!
//! | of service `k` | IPv4 | IPv6, with the same digits |
//! |---|---|---|
//! | the cluster's addresses | 10.96.0.k | `fd00:96::k` |
//! | external addresses | 203.0.113.k | `2001:db8:e::k` |
//! | the load balancer's addresses | 203.0.113.(100+k) | the same with 100+k |
//! | the port of nodes | 30,000 + k | the same |

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde_json::{Value, json};

use crate::host::{Host, spelled_alike};

/// The port that services have.
pub const PORT: u16 = 80;

/// The port that endpoints of services listen on.
pub const TARGET_PORT: u16 = 8080;

/// A service of a services file.
#[derive(Clone, Debug)]
#[must_use = "it is of use in a file alone"]
pub struct Service {
    number: u8,
    fields: Value,
}

/// A services file with these services. It is JSON, and so it is YAML.
pub fn file(services: impl IntoIterator<Item = Service>) -> String {
    let services: Vec<_> = services.into_iter().map(|service| service.fields).collect();
    format!("{:#}", json!({ "services": services }))
}

/// The addresses of service `k` in the cluster.
pub fn cluster_ips(k: u8) -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 96, 0, k).into(), Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, spelled_alike(k)).into()]
}

/// The addresses of service `k` in the cluster, with the port that services have.
pub fn vips(k: u8) -> [SocketAddr; 2] {
    cluster_ips(k).map(|ip| SocketAddr::new(ip, PORT))
}

/// The external addresses of service `k`.
pub fn external_ips(k: u8) -> [IpAddr; 2] {
    [Ipv4Addr::new(203, 0, 113, k).into(), Ipv6Addr::new(0x2001, 0xdb8, 0xe, 0, 0, 0, 0, spelled_alike(k)).into()]
}

/// The load balancer's addresses for service `k`.
pub fn load_balancer_ips(k: u8) -> [IpAddr; 2] {
    external_ips(100 + k)
}

/// The port of service `k` on nodes.
pub fn node_port(k: u8) -> u16 {
    30_000 + u16::from(k)
}

impl Service {
    /// A service at [`cluster_ips`], without an endpoint, that has its endpoints in turn.
    pub fn new(k: u8) -> Self {
        let port = |protocol: &str| {
            json!({
                "name": protocol.to_lowercase(), "protocol": protocol, "port": PORT, "targetPort": TARGET_PORT,
            })
        };
        let fields = json!({
            "name": format!("s{k}"), "addresses": cluster_ips(k), "ports": [port("TCP"), port("UDP")],
            "algorithm": "round-robin", "backends": [],
        });
        Self { number: k, fields }
    }

    /// The same with another value of a field.
    pub fn set(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.fields[field] = value.into();
        self
    }

    /// The same, reached by all that a service can be reached by: of type `LoadBalancer`, and at external addresses.
    pub fn everywhere(mut self) -> Self {
        for port in self.fields["ports"].as_array_mut().into_iter().flatten() {
            port["nodePort"] = node_port(self.number).into();
        }
        let (external, balanced) = (json!(external_ips(self.number)), json!(load_balancer_ips(self.number)));
        self.set("type", "LoadBalancer").set("externalIPs", external).set("loadBalancerIPs", balanced)
    }

    /// The same with one more endpoint, that is ready: the host's addresses of both families.
    pub fn endpoint(self, host: &Host) -> Self {
        self.endpoint_with(host, &json!({}))
    }

    /// The same with one more endpoint, that has these fields besides its address and its node.
    pub fn endpoint_with(mut self, host: &Host, fields: &Value) -> Self {
        for address in [IpAddr::from(host.v4()), host.v6().into()] {
            let mut endpoint = fields.clone();
            endpoint["address"] = address.to_string().into();
            if let Some(node) = host.node() {
                endpoint["nodeName"] = node.into();
            }
            self.fields["backends"].as_array_mut().expect("`new` made one").push(endpoint);
        }
        self
    }

    /// The same with more endpoints, that are ready.
    pub fn endpoints<'a>(self, hosts: impl IntoIterator<Item = &'a Host>) -> Self {
        hosts.into_iter().fold(self, Self::endpoint)
    }

    /// The same, but it does not say on which nodes its endpoints are.
    pub fn without_node_names(mut self) -> Self {
        for endpoint in self.fields["backends"].as_array_mut().into_iter().flatten() {
            endpoint.as_object_mut().expect("`endpoint_with` made one").remove("nodeName");
        }
        self
    }
}
