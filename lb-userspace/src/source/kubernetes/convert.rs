//! What the rules need of one object (Kubernetes, `pkg/proxy/serviceport.go` and `pkg/proxy/endpointslicecache.go`).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use ipnet::IpNet;
use k8s_openapi::{
    api::{
        core::v1::{Node, Service, ServicePort, ServiceSpec},
        discovery::v1::{self, EndpointConditions, EndpointHints, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::Timestamp,
};

use crate::{
    model::{self, Conditions, Endpoint, FrontendKind, Hints, IpFamily, Protocol, ServiceName, TrafficPolicy},
    source::{
        NodeObject,
        text::{shown, unreachable},
    },
};

/// A Service or slice with this label is another proxy's.
pub(super) const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// A Service or slice with this label is to be left alone.
pub(super) const HEADLESS: &str = "service.kubernetes.io/headless";
/// The label of a slice that names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// The label of a node that names its zone.
const ZONE: &str = "topology.kubernetes.io/zone";
/// The taint of a node that is about to be removed by the cluster autoscaler.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// The annotation of a slice that says when its last change has begun.
const BEGUN: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// An object's namespace and name, as `namespace/name`.
pub(super) type ObjectName = Arc<str>;

/// One port of a Service in one family, without endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Draft {
    pub(super) name: ServiceName,
    /// By which the ports of slices are called.
    pub(super) port_name: Arc<str>,
    pub(super) port: u16,
    pub(super) service: model::Service,
}

/// A slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slice {
    /// Whose endpoints it has.
    pub(super) service: ObjectName,
    pub(super) family: IpFamily,
    ports: Vec<(Arc<str>, Protocol, u16)>,
    endpoints: Vec<(IpAddr, Endpoint)>,
}

/// What an object is called.
pub(super) fn object_name(metadata: &ObjectMeta) -> ObjectName {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    join(&text(&metadata.namespace), &text(&metadata.name))
}

/// A namespace and a name as [`ObjectName`]; nothing is the namespace of what is in none. Names in a file may be anything; an API
/// server has none that `shown` changes.
pub(super) fn join(namespace: &str, name: &str) -> ObjectName {
    format!("{}/{}", shown(namespace), shown(name)).into()
}

fn has_label(metadata: &ObjectMeta, label: &str) -> bool {
    metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(label))
}

/// The ports of a Service, of each family that it has a cluster IP of; none if it is not to be served here. What can't be
/// served is told.
pub(super) fn drafts(service: &Service, warnings: &mut Vec<String>) -> Vec<Draft> {
    let metadata = &service.metadata;
    let Some(spec) = &service.spec else { return Vec::new() };
    let is_ours = !has_label(metadata, PROXY_NAME) && !has_label(metadata, HEADLESS);
    let has_address = spec.cluster_ip.as_deref().is_some_and(|ip| !ip.is_empty() && ip != "None");
    if !is_ours || !has_address || spec.type_.as_deref() == Some("ExternalName") {
        return Vec::new();
    }
    let whole = Whole::of(service, spec, warnings);
    let cluster_ips = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip).map(String::as_str);
    let cluster_ips: Vec<_> = of_service(&whole.name, cluster_ips, warnings).collect();
    let mut drafts = Vec::new();
    for family in [IpFamily::V4, IpFamily::V6] {
        // Without a cluster IP of a family the Service is not there in it, whatever else it has.
        let Some(&cluster_ip) = cluster_ips.iter().find(|&&ip| IpFamily::of(ip) == family) else { continue };
        for port in spec.ports.iter().flatten() {
            drafts.extend(whole.draft(port, cluster_ip, warnings));
        }
    }
    drafts
}

/// What is the same for all ports of a Service.
struct Whole {
    name: ObjectName,
    /// Addresses beside the cluster IPs.
    addresses: BTreeMap<IpAddr, FrontendKind>,
    common: model::Service,
}

impl Whole {
    fn of(service: &Service, spec: &ServiceSpec, warnings: &mut Vec<String>) -> Self {
        let name = object_name(&service.metadata);
        let ingress = service.status.iter().filter_map(|status| status.load_balancer.as_ref()?.ingress.as_ref());
        // In another mode the load balancer is a proxy, which does what it does even for clients in the cluster.
        let is_vip = |mode: &Option<String>| mode.as_deref().is_none_or(|mode| mode == "VIP");
        let balanced = ingress.flatten().filter(|it| is_vip(&it.ip_mode)).filter_map(|it| it.ip.as_deref());
        let external = spec.external_ips.iter().flatten().map(String::as_str);
        let mut addresses = BTreeMap::new();
        addresses.extend(of_service(&name, external, warnings).map(|ip| (ip, FrontendKind::ExternalIp)));
        addresses.extend(of_service(&name, balanced, warnings).map(|ip| (ip, FrontendKind::LoadBalancer)));
        let mut source_ranges = BTreeSet::new();
        for text in spec.load_balancer_source_ranges.iter().flatten().filter(|text| !text.trim().is_empty()) {
            match range(text) {
                Some(range) => drop(source_ranges.insert(range)),
                None => warnings.push(format!("Service {name}: {} is no range of IP addresses", shown(text))),
            }
        }
        let policy = |text: &Option<String>| match text.as_deref() {
            Some("Local") => TrafficPolicy::Local,
            _ => TrafficPolicy::Cluster,
        };
        let external_policy = policy(&spec.external_traffic_policy);
        let has_check = spec.type_.as_deref() == Some("LoadBalancer") && external_policy == TrafficPolicy::Local;
        let common = model::Service {
            external_policy,
            internal_policy: policy(&spec.internal_traffic_policy),
            affinity: affinity(spec),
            source_ranges,
            health_check: spec.health_check_node_port.filter(|_| has_check).and_then(port_number),
            created: service.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second().cast_unsigned()),
            ..model::Service::default()
        };
        Self { name, addresses, common }
    }

    fn draft(&self, port: &ServicePort, cluster_ip: IpAddr, warnings: &mut Vec<String>) -> Option<Draft> {
        let number = port_number(port.port)?;
        let protocol = protocol(port.protocol.as_deref())?;
        let port_name: Arc<str> = port.name.as_deref().map(shown).unwrap_or_default().into();
        let family = IpFamily::of(cluster_ip);
        let called = if port_name.is_empty() { number.to_string().into() } else { Arc::clone(&port_name) };
        let name = ServiceName { name: Arc::clone(&self.name), port: called, protocol, family };
        let mut node_port = port.node_port.and_then(port_number);
        if protocol == Protocol::Sctp && node_port.take_if(|node_port| *node_port != number).is_some() {
            warnings.push(format!(
                "{name}: no node port, as that differs from the port, and ports of SCTP can't be changed"
            ));
        }
        let addresses = self.addresses.iter().filter(|(ip, _)| IpFamily::of(**ip) == family);
        let mut frontends: BTreeMap<_, _> = addresses.map(|(&ip, &kind)| (SocketAddr::new(ip, number), kind)).collect();
        frontends.insert(SocketAddr::new(cluster_ip, number), FrontendKind::ClusterIp);
        let service = model::Service { frontends, node_port, ..self.common.clone() };
        Some(Draft { name, port_name, port: number, service })
    }
}

/// Addresses of a Service, and what is wrong with the others.
fn of_service<'a>(
    name: &ObjectName,
    texts: impl Iterator<Item = &'a str>,
    warnings: &mut Vec<String>,
) -> impl Iterator<Item = IpAddr> {
    texts.filter(|text| !text.trim().is_empty()).filter_map(move |text| {
        let mistake = |mistake| warnings.push(format!("Service {name}: {mistake}"));
        address(text).map_err(mistake).ok()
    })
}

fn affinity(spec: &ServiceSpec) -> u32 {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return 0;
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = config.and_then(|config| u32::try_from(config.timeout_seconds?).ok());
    seconds.unwrap_or(model::DEFAULT_AFFINITY)
}

/// What a slice says; `None` if it is nobody's, or of no IP family.
pub(super) fn slice(slice: &EndpointSlice) -> Option<Slice> {
    let metadata = &slice.metadata;
    let of = metadata.labels.as_ref()?.get(SERVICE_NAME).filter(|name| !name.is_empty())?;
    if has_label(metadata, HEADLESS) || has_label(metadata, PROXY_NAME) {
        return None;
    }
    let family = match slice.address_type.as_str() {
        "IPv4" => IpFamily::V4,
        "IPv6" => IpFamily::V6,
        _ => return None,
    };
    // A port without a name is called by nothing, as that of a Service without one; one without a number stands for all.
    let ports = slice.ports.iter().flatten().filter_map(|port| {
        Some((
            shown(port.name.as_deref().unwrap_or_default()).into(),
            protocol(port.protocol.as_deref())?,
            port_number(port.port?)?,
        ))
    });
    let endpoints = slice.endpoints.iter().flatten().filter_map(|it| {
        // More addresses of one endpoint were never given a meaning.
        let address = address(it.addresses.first()?).ok().filter(|&ip| IpFamily::of(ip) == family)?;
        Some((address, endpoint(it)))
    });
    Some(Slice {
        service: join(metadata.namespace.as_deref().unwrap_or_default(), of),
        family,
        ports: ports.collect(),
        endpoints: endpoints.collect(),
    })
}

/// When the last change of a slice has begun, if it says so.
pub(super) fn begun(slice: &EndpointSlice) -> Option<SystemTime> {
    let time: Timestamp = slice.metadata.annotations.as_ref()?.get(BEGUN)?.parse().ok()?;
    Some(time.into())
}

/// What is not said of an endpoint's conditions is good news.
fn endpoint(endpoint: &v1::Endpoint) -> Endpoint {
    let EndpointConditions { ready, serving, terminating } = endpoint.conditions.clone().unwrap_or_default();
    let conditions = Conditions {
        ready: ready.unwrap_or(true),
        serving: serving.unwrap_or(true),
        terminating: terminating.unwrap_or(false),
    };
    let node = endpoint.node_name.as_deref().map(Into::into);
    let hints = endpoint.hints.as_ref().and_then(hints);
    Endpoint { node, conditions, hints, is_local_by_name: true, ..Endpoint::READY }
}

fn hints(hints: &EndpointHints) -> Option<Arc<Hints>> {
    let zones: BTreeSet<_> = hints.for_zones.iter().flatten().map(|zone| zone.name.as_str().into()).collect();
    let nodes: BTreeSet<_> = hints.for_nodes.iter().flatten().map(|node| node.name.as_str().into()).collect();
    (!zones.is_empty() || !nodes.is_empty()).then(|| Arc::new(Hints { zones, nodes }))
}

/// The endpoints that slices have for one port of their Service. Of those that are in several slices, as they are for a moment
/// when the controller moves them, one that ends counts less than one that does not, and one that is ready more.
pub(super) fn endpoints<'a>(
    draft: &Draft,
    slices: impl Iterator<Item = &'a Slice>,
    warnings: &mut Vec<String>,
) -> BTreeMap<SocketAddr, Endpoint> {
    let rank = |endpoint: &Endpoint| (!endpoint.conditions.terminating, endpoint.conditions.ready);
    let mut endpoints: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    for slice in slices.filter(|slice| slice.family == draft.name.family) {
        for (name, protocol, number) in &slice.ports {
            if *name != draft.port_name || *protocol != draft.name.protocol {
                continue;
            }
            if *protocol == Protocol::Sctp && *number != draft.port {
                let remark =
                    format!("{}: no endpoints at port {number}, as ports of SCTP can't be changed", draft.name);
                warnings.push(remark);
                continue;
            }
            for (ip, endpoint) in &slice.endpoints {
                let known = endpoints.entry(SocketAddr::new(*ip, *number)).or_insert_with(|| endpoint.clone());
                if rank(endpoint) > rank(known) {
                    *known = endpoint.clone();
                }
            }
        }
    }
    endpoints
}

/// What a node's object says of it.
pub(super) fn node(node: &Node) -> NodeObject {
    let metadata = &node.metadata;
    let taints = node.spec.iter().filter_map(|spec| spec.taints.as_ref()).flatten();
    NodeObject {
        zone: metadata.labels.as_ref().and_then(|labels| labels.get(ZONE)).map(|zone| zone.as_str().into()),
        is_eligible: metadata.deletion_timestamp.is_none() && taints.into_iter().all(|it| it.key != TO_BE_DELETED),
    }
}

fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text.unwrap_or("TCP") {
        "TCP" => Some(Protocol::Tcp),
        "UDP" => Some(Protocol::Udp),
        "SCTP" => Some(Protocol::Sctp),
        _ => None,
    }
}

fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|&number| number > 0)
}

/// An address that packets can have, or what is wrong with it.
fn address(text: &str) -> Result<IpAddr, String> {
    // Kubernetes takes IPv4 addresses in IPv6 notation for what they are.
    let ip = parse(text).ok_or_else(|| format!("{} is no IP address", shown(text)))?.to_canonical();
    unreachable(ip).map_or(Ok(ip), |reason| Err(format!("{ip} {reason}")))
}

/// Any address. Old objects may have leading zeros in it, which are decimal there, too (`netutils.ParseIPSloppy`).
fn parse(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let strip = |part: &str| match part.trim_start_matches('0') {
        "" => "0".to_owned(),
        part => part.to_owned(),
    };
    text.parse().ok().or_else(|| text.split('.').map(strip).collect::<Vec<_>>().join(".").parse().ok())
}

/// A range of addresses. One of IPv4 in IPv6 notation is taken for what it is, as addresses are.
fn range(text: &str) -> Option<IpNet> {
    const MAPPED: u8 = 96;
    let (ip, length) = text.trim().split_once('/')?;
    let (ip, length) = (parse(ip)?, length.parse().ok()?);
    let net = match ip.to_canonical() {
        canonical if canonical != ip && length >= MAPPED => IpNet::new(canonical, length - MAPPED),
        _ => IpNet::new(ip, length),
    };
    Some(net.ok()?.trunc())
}
