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

use crate::admin::report::StatusReport;

/// What is measured as it happens. All else is in the status, as it is at the moment that somebody asks.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// How long changes of services took to be in force.
    sync_duration: Histogram,
    /// When one was last, in seconds since 1970.
    last_sync: Gauge<f64, AtomicU64>,
}

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
        Self { sync_duration: Histogram::new(buckets), last_sync: Gauge::default() }
    }
}

impl Metrics {
    /// A change of services is in force, and it took this long.
    pub fn note_sync(&self, took: Duration) {
        self.sync_duration.observe(took.as_secs_f64());
        self.last_sync.set(seconds_since_1970(SystemTime::now()));
    }

    /// Everything that there is to tell.
    pub fn text(&self, status: &StatusReport) -> String {
        let mut registry = Registry::default();
        let kube_proxy = registry.sub_registry_with_prefix("kubeproxy");
        let (name, help) = ("sync_proxy_rules_duration_seconds", "How long changes of services took to be in force");
        kube_proxy.register(name, help, self.sync_duration.clone());
        let (name, help) = ("sync_proxy_rules_last_timestamp_seconds", "When a change of services was last in force");
        kube_proxy.register(name, help, self.last_sync.clone());
        register(registry.sub_registry_with_prefix("wharf"), status);
        let mut text = String::new();
        // Writing to a text can't fail.
        let _written = encode(&mut text, &registry);
        text
    }
}

/// What the status says.
fn register(wharf: &mut Registry, status: &StatusReport) {
    let StatusReport { interfaces, tables, pod_interfaces, counters, audit, collector, .. } = status;
    family(wharf, "build_info", "The version", [([("version", &*status.version)], 1)], Level::set);
    gauge(wharf, "services", "Services in force: ports of one protocol in one IP family", status.services);
    let is_refused = status.services_error.is_some();
    gauge(wharf, "services_refused", "1 while what the source says is not in force; see status", is_refused);
    gauge(wharf, "unpinned", "1 while traffic would end with the agent", status.unpinned.is_some());
    let used = tables.iter().map(|it| ([("table", &*it.name)], it.used));
    family(wharf, "table_entries", "Entries in use; of flows, when they were last gone through", used, Level::set);
    let sizes = tables.iter().map(|it| ([("table", &*it.name)], it.size));
    family(wharf, "table_size", "Entries that the table can hold", sizes, Level::set);
    let modes = interfaces.iter().map(|it| ([("interface", &*it.name), ("xdp", &*it.xdp), ("tc", &*it.tc)], 1));
    family(wharf, "interface_info", "How programs are attached to an interface", modes, Level::set);
    gauge(wharf, "pod_interfaces", "Pod-facing devices with programs", pod_interfaces.attached as u64);
    gauge(wharf, "pod_interfaces_refused", "Pod-facing devices that could not get them", pod_interfaces.refused as u64);

    let counts = || counters.iter().map(|it| ([("action", &*it.action), ("reason", &*it.name)], it));
    let packets = counts().map(|(labels, it)| (labels, it.packets));
    family(wharf, "packets", "Packets by what became of them, and why", packets, Count::inc_by);
    let bytes = counts().map(|(labels, it)| (labels, it.bytes));
    family(wharf, "bytes", "Their bytes", bytes, Count::inc_by);
    counter(wharf, "changes", "Changes of services that came into force", status.revision);
    counter(wharf, "audits", "Looks at all maps", audit.audits);
    counter(wharf, "audit_repairs", "Entries of maps that somebody else had changed", audit.repaired);
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
    use crate::admin::report::{AuditReport, CounterReport, PodInterfacesReport, TableReport};

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
            ..StatusReport::default()
        };
        let metrics = Metrics::default();
        metrics.note_sync(Duration::from_millis(3));
        let text = metrics.text(&status);
        for line in [
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.002\"} 0",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\"} 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_count 1",
            "wharf_build_info{version=\"1.2.3\"} 1",
            "wharf_services 7",
            "wharf_services_refused 1",
            "wharf_unpinned 0",
            "wharf_table_entries{table=\"slots\"} 3",
            "wharf_table_size{table=\"slots\"} 9",
            "wharf_packets_total{action=\"drop\",reason=\"no-flow\"} 5",
            "wharf_bytes_total{action=\"drop\",reason=\"no-flow\"} 300",
            "wharf_changes_total 2",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
        }
        assert!(text.contains("# TYPE wharf_packets counter\n"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
