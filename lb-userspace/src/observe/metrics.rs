//! Metrics in the text format of `OpenMetrics` 1.0. What kube-proxy measures, too, has its name
//! (Kubernetes, `pkg/proxy/metrics/metrics.go`).

use std::{
    iter,
    sync::atomic::AtomicU64,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::text::encode,
    metrics::{TypedMetric, counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry},
};

use crate::{
    admin::report::{Probe, StatusReport},
    model::IpFamily,
    policy::{Clients, Decision},
    source::Changes,
};

/// What is measured as it happens. All else is in the status, as it is at the moment that somebody asks.
#[derive(Debug)]
pub struct Metrics {
    /// How long changes of services took to be in force.
    sync_duration: Histogram,
    /// When one was last, in seconds since 1970.
    last_sync: Gauge<f64, AtomicU64>,
    /// How long changes of endpoints took to be in force, from what led to them.
    programming: Family<Labels, Histogram, fn() -> Histogram>,
    service_changes: Changing,
    slice_changes: Changing,
    /// What probes were told, by the status of HTTP.
    healthz: Family<Labels, Count>,
    livez: Family<Labels, Count>,
    /// When the changes of endpoints have begun that are not in force yet.
    begun: Vec<(IpFamily, SystemTime)>,
    started: SystemTime,
}

/// What changes, and comes into force.
#[derive(Debug, Default)]
struct Changing {
    total: Count,
    pending: Level,
}

/// Of so many changes of endpoints that can't be in force it is remembered when they have begun.
const MAX_BEGUN: usize = 10_000;

/// What goes up and down.
type Level = Gauge<u64, AtomicU64>;
/// What goes up.
type Count = Counter<u64, AtomicU64>;

/// The labels of one series.
type Labels = Vec<(&'static str, String)>;

impl Default for Metrics {
    fn default() -> Self {
        // kube-proxy's buckets: 15 from 1 ms, each twice the one before.
        let buckets = iter::successors(Some(0.001), |bound| Some(bound * 2.0)).take(15);
        let programming: Family<_, _, fn() -> Histogram> = Family::new_with_constructor(programming_duration);
        for family in FAMILIES {
            let _at_zero = programming.get_or_create(&vec![("ip_family", family.to_string())]);
        }
        Self {
            sync_duration: Histogram::new(buckets),
            last_sync: Gauge::default(),
            programming,
            service_changes: Changing::default(),
            slice_changes: Changing::default(),
            healthz: Family::default(),
            livez: Family::default(),
            begun: Vec::new(),
            started: SystemTime::now(),
        }
    }
}

const FAMILIES: [IpFamily; 2] = [IpFamily::V4, IpFamily::V6];

/// With kube-proxy's buckets.
fn programming_duration() -> Histogram {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    Histogram::new([0.25, 0.5].into_iter().chain(seconds.map(f64::from)))
}

impl Metrics {
    /// The source has told of changes.
    pub fn note_changes(&mut self, changes: &Changes) {
        self.service_changes.add(changes.services);
        self.slice_changes.add(changes.slices);
        // What has begun before the agent was there says nothing about how fast it is.
        let begun = changes.begun.iter().filter(|(_, time)| *time > self.started);
        self.begun.extend(begun.take(MAX_BEGUN.saturating_sub(self.begun.len())));
    }

    /// What is wanted is in force, and it took this long.
    pub fn note_sync(&mut self, took: Duration) {
        let now = SystemTime::now();
        self.sync_duration.observe(took.as_secs_f64());
        self.last_sync.set(seconds_since_1970(now));
        self.service_changes.pending.set(0);
        self.slice_changes.pending.set(0);
        for (family, time) in self.begun.drain(..) {
            // The clock that says so is another machine's.
            let took = now.duration_since(time).unwrap_or_default();
            self.programming.get_or_create(&vec![("ip_family", family.to_string())]).observe(took.as_secs_f64());
        }
    }

    /// A probe is told whether all is well.
    pub fn note_probe(&self, probe: Probe, is_good: bool) {
        let answers = match probe {
            Probe::Healthz => &self.healthz,
            Probe::Livez => &self.livez,
        };
        let code = if is_good { "200" } else { "503" };
        answers.get_or_create(&vec![("code", code.to_owned())]).inc();
    }

    /// Everything that there is to tell of the agent with this status, and of what it has decided.
    pub fn text(&self, status: &StatusReport, decision: &Decision) -> String {
        let mut registry = Registry::default();
        self.register(registry.sub_registry_with_prefix("kubeproxy"), decision);
        register(registry.sub_registry_with_prefix("wharf"), status);
        let mut text = String::new();
        // Writing to a text can't fail.
        let _written = encode(&mut text, &registry);
        text
    }

    /// What kube-proxy tells, too.
    fn register(&self, kube_proxy: &mut Registry, decision: &Decision) {
        let Self { sync_duration, last_sync, programming, service_changes, slice_changes, .. } = self;
        kube_proxy.register("proxy_healthz", "Answers at /healthz", self.healthz.clone());
        kube_proxy.register("proxy_livez", "Answers at /livez", self.livez.clone());
        let (name, help) = ("sync_proxy_rules_duration_seconds", "How long changes of services took to be in force");
        kube_proxy.register(name, help, sync_duration.clone());
        let (name, help) = ("sync_proxy_rules_last_timestamp_seconds", "When a change of services was last in force");
        kube_proxy.register(name, help, last_sync.clone());
        let help = "How long changes of endpoints took to be in force, from what led to them";
        kube_proxy.register("network_programming_duration_seconds", help, programming.clone());
        for (name, of, changes) in
            [("service", "Services", service_changes), ("endpoint", "EndpointSlices", slice_changes)]
        {
            let Changing { total, pending } = changes;
            let name = |what| format!("sync_proxy_rules_{name}_changes{what}");
            kube_proxy.register(name(""), format!("Changes of {of}"), total.clone());
            kube_proxy.register(
                name("_pending"),
                format!("Changes of {of} that are not in force yet"),
                pending.clone(),
            );
        }
        let families = FAMILIES.map(|family| (family, family.to_string()));
        let series = families.iter().flat_map(|(family, text)| {
            [(Clients::Inside, "internal"), (Clients::Outside, "external")].map(|(clients, policy)| {
                let count = decision.without_local(*family, clients);
                ([("ip_family", text.as_str()), ("traffic_policy", policy)], count as u64)
            })
        });
        let help = "Ports of services that have endpoints, but none on this node, as their traffic policy wants it";
        family(kube_proxy, "sync_proxy_rules_no_local_endpoints_total", help, series, Level::set);
    }
}

impl Changing {
    fn add(&self, changes: u64) {
        self.total.inc_by(changes);
        self.pending.inc_by(changes);
    }
}

/// What the status says.
fn register(wharf: &mut Registry, status: &StatusReport) {
    let StatusReport { interfaces, tables, pod_interfaces, sockets, counters, audit, collector, .. } = status;
    family(wharf, "build_info", "The version", [([("version", &*status.version)], 1)], Level::set);
    gauge(wharf, "services", "Services in force: ports of one protocol in one IP family", status.services);
    let is_refused = status.services_error.is_some();
    gauge(wharf, "services_refused", "1 while what the source says is not in force; see status", is_refused);
    let rivals = status.kube_proxies.len() as u64;
    gauge(wharf, "kube_proxies", "Processes of kube-proxy beside the agent, where both would serve a cluster", rivals);
    gauge(wharf, "unpinned", "1 while traffic would end with the agent", status.unpinned.is_some());
    let used = tables.iter().map(|it| ([("table", &*it.name)], it.used));
    family(wharf, "table_entries", "Entries in use; of flows, when they were last gone through", used, Level::set);
    let sizes = tables.iter().map(|it| ([("table", &*it.name)], it.size));
    family(wharf, "table_size", "Entries that the table can hold", sizes, Level::set);
    let modes = interfaces.iter().map(|it| ([("interface", &*it.name), ("xdp", &*it.xdp), ("tc", &*it.tc)], 1));
    family(wharf, "interface_info", "How programs are attached to an interface", modes, Level::set);
    gauge(wharf, "pod_interfaces", "Pod-facing devices with programs", pod_interfaces.attached as u64);
    gauge(wharf, "pod_interfaces_refused", "Pod-facing devices that could not get them", pod_interfaces.refused as u64);
    let modes = [([("mode", &*sockets.mode)], 1)];
    family(wharf, "sockets_info", "Of which network namespaces sockets are balanced", modes, Level::set);
    gauge(wharf, "socket_hooks", "Hooks of sockets with programs", sockets.attached as u64);
    gauge(wharf, "socket_hooks_missing", "Hooks of sockets that could not get them", sockets.missing.len() as u64);
    counter(wharf, "sockets_ended", "Sockets ended that were connected to backends that went", sockets.ended);

    let counts = || counters.iter().map(|it| ([("action", &*it.action), ("reason", &*it.name)], it));
    let packets = counts().map(|(labels, it)| (labels, it.packets));
    family(wharf, "packets", "Packets by what became of them, and why", packets, Count::inc_by);
    let bytes = counts().map(|(labels, it)| (labels, it.bytes));
    family(wharf, "bytes", "Their bytes", bytes, Count::inc_by);
    counter(wharf, "changes", "Changes of services that came into force", status.revision);
    counter(wharf, "audits", "Looks at all maps", audit.audits);
    counter(
        wharf,
        "audit_repairs",
        "Entries of maps that somebody else had changed, and programs that somebody else had detached",
        audit.repaired,
    );
    let collected = collector.as_ref().map_or(0, |it| it.removed);
    counter(wharf, "flows_collected", "Flows removed that were over", collected);
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: impl Into<u64>) {
    let gauge = Level::default();
    gauge.set(value.into());
    registry.register(name, help, gauge);
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter = Count::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

/// The series of one name; `set` gives each its value.
fn family<'a, M, const N: usize>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    series: impl IntoIterator<Item = ([(&'static str, &'a str); N], u64)>,
    set: fn(&M, u64) -> u64,
) where
    M: Default + Metric + TypedMetric,
{
    let family = Family::<Labels, M>::default();
    for (labels, value) in series {
        let labels = labels.map(|(label, value)| (label, value.to_owned()));
        set(&family.get_or_create(&labels.into()), value);
    }
    registry.register(name, help, family);
}

fn seconds_since_1970(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::report::{AuditReport, CounterReport, PodInterfacesReport, SocketsReport, TableReport};

    #[test]
    fn the_text_has_what_happened_and_how_it_is() {
        let status = StatusReport {
            version: "1.2.3".into(),
            services: 7,
            services_error: Some("the table is full".into()),
            tables: vec![TableReport { name: "slots".into(), used: 3, size: 9 }],
            counters: vec![CounterReport { action: "drop".into(), name: "no-flow".into(), packets: 5, bytes: 300 }],
            revision: 2,
            audit: AuditReport { audits: 1, repaired: 0 },
            pod_interfaces: PodInterfacesReport::default(),
            sockets: SocketsReport { mode: "host".into(), attached: 11, ended: 4, ..SocketsReport::default() },
            ..StatusReport::default()
        };
        let mut metrics = Metrics::default();
        metrics.note_sync(Duration::from_millis(3));
        let text = metrics.text(&status, &Decision::default());
        for line in [
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.002\"} 0",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\"} 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_count 1",
            "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"} 0",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"} 0",
            "wharf_build_info{version=\"1.2.3\"} 1",
            "wharf_services 7",
            "wharf_services_refused 1",
            "wharf_unpinned 0",
            "wharf_table_entries{table=\"slots\"} 3",
            "wharf_table_size{table=\"slots\"} 9",
            "wharf_packets_total{action=\"drop\",reason=\"no-flow\"} 5",
            "wharf_bytes_total{action=\"drop\",reason=\"no-flow\"} 300",
            "wharf_changes_total 2",
            "wharf_sockets_info{mode=\"host\"} 1",
            "wharf_socket_hooks 11",
            "wharf_socket_hooks_missing 0",
            "wharf_sockets_ended_total 4",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
        }
        assert!(text.contains("# TYPE wharf_packets counter\n"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn changes_are_pending_until_they_are_in_force_and_the_time_counts_since_they_have_begun() {
        let mut metrics = Metrics::default();
        let earlier = metrics.started - Duration::from_secs(3_600);
        // The last one is by a clock that is ahead.
        let times = [earlier, metrics.started + Duration::from_millis(1), SystemTime::now() + Duration::from_secs(60)];
        let begun = times.map(|time| (IpFamily::V4, time)).to_vec();
        metrics.note_changes(&Changes { services: 2, slices: 3, begun });
        metrics.note_changes(&Changes { services: 1, ..Changes::default() });
        let told = |metrics: &Metrics, lines: [&str; 4]| {
            let text = metrics.text(&StatusReport::default(), &Decision::default());
            for line in lines {
                assert!(text.contains(&format!("\nkubeproxy_{line}\n")), "{line} is not in\n{text}");
            }
        };
        let total = "sync_proxy_rules_service_changes_total 3";
        let pending = ["sync_proxy_rules_service_changes_pending 3", "sync_proxy_rules_endpoint_changes_pending 3"];
        let count = "network_programming_duration_seconds_count{ip_family=\"IPv4\"}";
        told(&metrics, [total, pending[0], pending[1], &format!("{count} 0")]);
        std::thread::sleep(Duration::from_millis(2));
        metrics.note_sync(Duration::from_millis(1));
        let pending = pending.map(|line| line.replace(" 3", " 0"));
        told(&metrics, [total, &pending[0], &pending[1], &format!("{count} 2")]);
        let bucket = "network_programming_duration_seconds_bucket{le=\"60.0\",ip_family=\"IPv4\"} 2";
        told(&metrics, [bucket, total, &pending[0], &format!("{count} 2")]);
        let of_many = vec![(IpFamily::V6, SystemTime::now()); 2 * MAX_BEGUN];
        metrics.note_changes(&Changes { begun: of_many, ..Changes::default() });
        assert_eq!(metrics.begun.len(), MAX_BEGUN);
    }
}
