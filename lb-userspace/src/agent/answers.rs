//! What the agent says of itself when it is asked: over its socket, and over HTTP.

use std::{collections::HashSet, net::SocketAddr};

use super::{Agent, describe, services::STUCK};
use crate::{
    admin::report::{
        BackendReport, CollectorReport, CounterReport, DriftReport, FrontendReport, HealthReport, Probe, Request,
        Response, ServiceHealthReport, ServiceReport, StatusReport, TableReport, VerifyReport,
    },
    dataplane::{DataplaneError, tables::Drift},
    model::{Endpoint, IpFamily, TrafficPolicy},
    plan::plan,
    policy,
};

impl Agent {
    pub(super) fn answer(&mut self, request: Request) -> Response {
        self.respond(request).unwrap_or_else(|error| Response::Error(describe(&error)))
    }

    fn respond(&mut self, request: Request) -> Result<Response, DataplaneError> {
        Ok(match request {
            Request::Status => Response::Status(Box::new(self.status()?)),
            Request::Services => Response::Services(self.service_reports()),
            Request::Backends => Response::Backends(self.backend_reports()),
            Request::Metrics => {
                let decision = self.in_force.clone().unwrap_or_default();
                Response::Metrics(self.metrics.text(&self.status()?, &decision))
            }
            Request::Health { probe } => Response::Health(self.health(probe)),
            Request::ServiceHealth { port, family } => self.service_health(port, family).map_or_else(
                || Response::Error(format!("no service has its health told on port {port}")),
                Response::ServiceHealth,
            ),
            Request::Verify { repair } => Response::Verify(self.verify(repair)?),
        })
    }

    /// Compares what is desired, what the maps were made to say, and what they say.
    fn verify(&mut self, repair: bool) -> Result<VerifyReport, DataplaneError> {
        // From nothing, so that a mistake in following changes would be found, too.
        let wanted = self.in_force.as_ref().map(|it| policy::decide(it.desired(), it.node()));
        let unapplied = wanted.map_or(0, |wanted| plan(&wanted, self.tables.applied()).len());
        let mut drift = self.audit_links(repair);
        drift.extend(self.audit_maps(repair)?);
        let text = |text: &str| text.to_owned();
        let report = |it: &Drift| DriftReport {
            map: text(it.map),
            entry: text(&it.entry),
            expected: text(&it.expected),
            found: text(&it.found),
        };
        Ok(VerifyReport {
            is_compared: self.tables.knows_services(),
            is_behind: self.error().is_some(),
            entries: self.tables.audited() + self.tables.dataplane().audited(),
            unapplied,
            drift: drift.iter().map(report).collect(),
            repaired: repair && !drift.is_empty(),
        })
    }

    fn status(&self) -> Result<StatusReport, DataplaneError> {
        let kernel = self.tables.dataplane();
        Ok(StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            kube_proxies: self.kube_proxies.clone(),
            unpinned: kernel.unpinned().map(|error| describe(error)),
            interfaces: self.interfaces(),
            pod_interfaces: self.pod_interfaces(),
            sockets: self.sockets_report(),
            source: self.options.source.to_string(),
            revision: self.revision,
            services: self.services().count() as u64,
            applied_seconds_ago: self.applied.elapsed().unwrap_or_default().as_secs(),
            services_error: self.error(),
            tables: self
                .tables
                .usage()
                .into_iter()
                .map(|usage| TableReport { name: usage.table.to_owned(), used: usage.used, size: usage.size })
                .chain(self.flow_tables())
                .collect(),
            audit: self.audit,
            collector: self.collector.last().map(|pass| CollectorReport {
                passes: self.collector.passes(),
                removed: self.collector.removed(),
                entries: pass.entries4 + pass.entries6,
                milliseconds: pass.busy.as_millis() as u64,
            }),
            counters: kernel
                .counters()?
                .into_iter()
                .map(|count| CounterReport {
                    action: count.counter.action.to_owned(),
                    name: count.counter.name.to_owned(),
                    packets: count.packets,
                    bytes: count.bytes,
                })
                .collect(),
        })
    }

    /// How full the flow tables were when they were last gone through.
    fn flow_tables(&self) -> impl Iterator<Item = TableReport> {
        let size = u64::from(self.sizes.flows);
        let table =
            move |name: &str, entries: u64| TableReport { name: name.to_owned(), used: entries.div_ceil(2), size };
        self.collector
            .last()
            .into_iter()
            .flat_map(move |pass| [table("flows (IPv4)", pass.entries4), table("flows (IPv6)", pass.entries6)])
    }

    /// Whether the services are in force. That there is no room for some is no reason to take all traffic from this node, and
    /// neither is a mistake in the source.
    fn is_healthy(&self) -> bool {
        self.in_force.is_some() && self.stuck.is_none_or(|since| since.elapsed() < STUCK)
    }

    fn health(&self, probe: Probe) -> HealthReport {
        let is_node_eligible = (probe == Probe::Healthz).then_some(self.node_object.is_eligible);
        let is_good = self.is_healthy() && is_node_eligible != Some(false);
        self.metrics.note_probe(probe, is_good);
        HealthReport {
            is_good,
            is_node_eligible,
            last_updated: humantime::format_rfc3339_millis(self.applied).to_string(),
        }
    }

    /// What a load balancer that asks on a port is told, if it is to ask there (Kubernetes, `LocalReadyEndpoints` in
    /// `pkg/proxy/endpointschangetracker.go`).
    fn service_health(&self, port: u16, family: IpFamily) -> Option<ServiceHealthReport> {
        let desired = self.desired()?;
        let name = desired.health_checks().get(&port)?;
        // A service of one family has its proxy asked, whichever way one comes.
        let has_family = desired.ports_of(name).any(|(port, _)| port.family == family);
        let ports = desired.ports_of(name).filter(|(port, _)| port.family == family || !has_family);
        let endpoints = ports.flat_map(|(_, service)| &service.endpoints);
        let is_here = |&(address, endpoint): &(&SocketAddr, &Endpoint)| {
            let is_on_node = self.node.has_endpoint(address.ip(), endpoint.node.as_deref());
            endpoint.conditions.ready && is_on_node && self.node.claims(endpoint)
        };
        let local: HashSet<_> = endpoints.filter(is_here).map(|(address, _)| address.ip()).collect();
        Some(ServiceHealthReport {
            service: name.to_string(),
            local_endpoints: local.len(),
            is_healthy: self.is_healthy(),
        })
    }

    fn service_reports(&self) -> Vec<ServiceReport> {
        self.services()
            .map(|(name, service)| ServiceReport {
                name: name.name.to_string(),
                port: name.port.to_string(),
                protocol: name.protocol,
                family: name.family,
                frontends: service.frontends.iter().map(|(&address, &kind)| FrontendReport { address, kind }).collect(),
                node_port: service.node_port,
                internal_traffic_policy: service.internal_policy,
                external_traffic_policy: service.external_policy,
                source_ranges: service.source_ranges.iter().copied().collect(),
                affinity_seconds: service.affinity,
                algorithm: service.algorithm.name().to_owned(),
                backends: service.endpoints.len(),
                flows: self.tables.members(name).map(|(_, _, entry)| entry.flows).sum(),
            })
            .collect()
    }

    fn backend_reports(&self) -> Vec<BackendReport> {
        self.services()
            .flat_map(|(name, service)| {
                self.tables.members(name).filter_map(move |(address, member, entry)| {
                    let endpoint = service.endpoints.get(&address)?;
                    let backend = member.backend;
                    let policies =
                        [(TrafficPolicy::Cluster, backend.in_cluster), (TrafficPolicy::Local, backend.in_local)];
                    Some(BackendReport {
                        service: name.name.to_string(),
                        port: name.port.to_string(),
                        protocol: name.protocol,
                        address,
                        weight: backend.weight.get(),
                        node_name: endpoint.node.as_ref().map(ToString::to_string),
                        on_node: backend.is_on_node,
                        conditions: endpoint.conditions,
                        takes_new: policies.into_iter().filter(|(_, takes)| *takes).map(|(policy, _)| policy).collect(),
                        active: entry.active,
                        flows: entry.flows,
                    })
                })
            })
            .collect()
    }
}
