//! `wharf run`: the agent.

use std::{fs, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Error, ensure};
use glob::Pattern;
use lb_common::flow::{Tick, Timeouts};

use super::host::Host;
use crate::{
    admin,
    agent::{self, Options, SocketOptions},
    cgroup,
    dataplane::{
        SizeOptions,
        kernel::{Ended, Settings, SocketMode, SocketSettings},
    },
    network::{NodePorts, PodInterfaces, Roles},
    observe::http::{self, Listen},
    privileges,
    source::{Source, kubernetes::Connection},
};

#[derive(Debug, clap::Args)]
#[command(args_override_self = true)]
pub(super) struct Args {
    /// An interface that clients and backends are reached by; may be given several times
    #[arg(long = "interface", value_name = "IF", required = true)]
    interfaces: Vec<String>,
    /// The services file, of Wharf's own form or of Kubernetes objects; it is read again when it changes, and on SIGHUP
    #[arg(long, value_name = "FILE", required_unless_present = "kubernetes", conflicts_with = "kubernetes")]
    services: Option<PathBuf>,
    /// Follow the Services and EndpointSlices of a Kubernetes cluster
    #[arg(long)]
    kubernetes: bool,
    /// How to reach the API server; without it, as a pod finds it [requires: --kubernetes]
    #[arg(long, value_name = "FILE", conflicts_with = "services")]
    kubeconfig: Option<PathBuf>,
    /// The API server's URL, in place of the one found otherwise; not one that Wharf balances itself
    #[arg(long, value_name = "URL", conflicts_with = "services")]
    master: Option<String>,
    /// How often all services are made anew of what the API server has said [requires: --kubernetes]
    #[arg(long, value_name = "TIME", default_value = "15m", value_parser = timeout, conflicts_with = "services")]
    config_sync_period: Duration,
    /// Where other commands reach the agent
    #[arg(long, value_name = "PATH", default_value = admin::DEFAULT_SOCKET)]
    admin: PathBuf,
    /// The name of this node, as endpoints of services say on which node they are [default with --kubernetes: the host's name]
    #[arg(long, value_name = "NAME", alias = "hostname-override")]
    node_name: Option<String>,
    /// On which of the node's addresses a NodePort is served: ranges with commas between them, all of a family that has none of
    /// them, or `primary` for the one of each family that packets leave the first interface with [default: all]
    #[arg(long, value_name = "CIDR[,CIDR...]|primary")]
    nodeport_addresses: Option<NodePorts>,
    /// Whose sockets are balanced when they connect or send, so that their packets need no translation: of all network namespaces, of
    /// the node's own, or none
    #[arg(long, value_enum, default_value_t)]
    socket_lb: SocketMode,
    /// Which sockets are ended when they lose their backend, so that their processes connect anew
    #[arg(long, value_enum, value_name = "WHICH", default_value_t)]
    socket_lb_end: Ended,
    /// A control group whose processes' sockets are left alone, as /proc/PID/cgroup names it; may be given several times
    #[arg(long, value_name = "PATH", value_parser = exempt)]
    socket_lb_exempt: Vec<PathBuf>,
    /// The directory of the control group whose processes' sockets are balanced [default: the root of cgroup v2]
    #[arg(long, value_name = "DIRECTORY")]
    cgroup: Option<PathBuf>,
    /// How long a TCP connection that only SYNs were seen of is remembered
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = timeout)]
    timeout_tcp_opening: Duration,
    /// How long an established TCP connection is remembered without a packet
    #[arg(long, value_name = "TIME", default_value = "8000s", value_parser = timeout)]
    timeout_tcp_established: Duration,
    /// How long a TCP connection is remembered after a FIN or RST
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = timeout)]
    timeout_tcp_closing: Duration,
    /// How long a UDP flow is remembered without a packet
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = timeout)]
    timeout_udp: Duration,
    /// Answer pings to addresses that are a service's alone
    #[arg(long)]
    answer_ping: bool,
    #[command(flatten)]
    host: Host,
    /// Whether traffic goes on when the agent stops: connections, and new ones; if not, it takes everything away then
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true")]
    keep: bool,
    #[command(flatten)]
    sizes: SizeOptions,
    #[command(flatten)]
    http: Http,
}

/// What is told over HTTP.
#[derive(Debug, clap::Args)]
struct Http {
    /// Where `/metrics` is to be had over HTTP; empty: nowhere
    #[arg(long, value_name = "ADDRESS[:PORT]", default_value_t = http::DEFAULT_METRICS, value_parser = Listen::metrics)]
    metrics_bind_address: Listen,
    /// Where `/healthz` and `/livez` are to be had over HTTP; empty: nowhere [default: port 10256 with --kubernetes, else nowhere]
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = Listen::health)]
    healthz_bind_address: Option<Listen>,
    /// End if one of these places is taken, and do not try again
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    bind_address_hard_fail: bool,
}

impl Args {
    fn settings(&self) -> Settings {
        let ticks = |time: Duration| Tick::from_seconds(time.as_secs() as u32);
        Settings {
            snat_ports: self.host.snat_ports.clone(),
            timeouts: Timeouts {
                opening: ticks(self.timeout_tcp_opening),
                established: ticks(self.timeout_tcp_established),
                closing: ticks(self.timeout_tcp_closing),
                datagram: ticks(self.timeout_udp),
            },
            answer_ping: self.answer_ping,
            // Those follow from what this process may do.
            sockets: SocketSettings::default(),
        }
    }
}

/// How this node is called in a cluster, as kubelet calls it (Kubernetes, `GetHostname` in `pkg/util/node`).
fn name_in_cluster(given: Option<&str>) -> anyhow::Result<Arc<str>> {
    let host = || fs::read_to_string("/proc/sys/kernel/hostname");
    let name = given.map_or_else(host, |given| Ok(given.to_owned()));
    let name = name.context("the host's name is not known; give --node-name")?.trim().to_lowercase();
    ensure!(!name.is_empty(), "--node-name is empty");
    Ok(name.into())
}

/// The devices of pods, as the values of `--pod-interface` say; without one, pods of a cluster are served as kube-proxy serves
/// them, which is not told where they are.
fn pod_interfaces(is_of_cluster: bool, given: Vec<Pattern>) -> anyhow::Result<PodInterfaces> {
    let usual = if is_of_cluster { PodInterfaces::ByKind } else { PodInterfaces::None };
    Ok(PodInterfaces::read(given).map_err(Error::msg)?.unwrap_or(usual))
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let settings = args.settings();
    let given = args.node_name.as_deref();
    let node_name = if args.kubernetes { Some(name_in_cluster(given)?) } else { given.map(Into::into) };
    let pod_interfaces = pod_interfaces(args.kubernetes, args.host.pod_interfaces)?;
    let source = match args.services {
        Some(path) => Source::File(path),
        None => Source::Kubernetes(Connection {
            kubeconfig: args.kubeconfig,
            master: args.master,
            node_name: node_name.clone(),
            sync_period: args.config_sync_period,
        }),
    };
    let health = if args.kubernetes { http::any(http::HEALTH_PORT) } else { Listen(None) };
    let options = Options {
        settings,
        roles: Roles {
            uplinks: args.interfaces,
            pod_interfaces,
            node_name,
            node_ports: args.nodeport_addresses.unwrap_or_default(),
            balances_sockets: args.socket_lb != SocketMode::Off,
        },
        sockets: SocketOptions {
            mode: args.socket_lb,
            ended: args.socket_lb_end,
            cgroup: args.cgroup,
            exempt: args.socket_lb_exempt,
        },
        xdp: args.host.xdp,
        source,
        admin: args.admin,
        bpffs: args.host.bpffs,
        keep: args.keep,
        sizes: args.sizes,
        keep_sysctls: args.host.keep_sysctls,
        metrics: args.http.metrics_bind_address,
        health: args.http.healthz_bind_address.unwrap_or(health),
        must_listen: args.http.bind_address_hard_fail,
    };
    let files = options.source.files();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Of threads beside the agent's own, all that there are read files.
        .on_thread_start(move || privileges::settle_reader(&files))
        .build()
        .context("the event loop could not be set up")?;
    runtime.block_on(agent::run(options))?;
    Ok(ExitCode::SUCCESS)
}

/// How deep control groups may be whose sockets are left alone: there is a bit for each depth.
const DEEPEST: usize = 63;

/// The name of a control group, from the root on.
fn exempt(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match cgroup::level(&path) {
        _ if !path.is_absolute() => {
            Err("the name of a control group begins with a slash, as in /proc/PID/cgroup".to_owned())
        }
        0 => Err("these are all: --socket-lb off leaves them alone".to_owned()),
        1..=DEEPEST => Ok(path),
        _ => Err(format!("control groups can be named down to a depth of {DEEPEST}")),
    }
}

/// The longest timeout. A flow that is idle for longer is not worth its place.
const LONGEST: Duration = Duration::from_secs(30 * 86_400);

/// A time such as `60s` or `2h 30m`, in whole seconds.
fn timeout(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| format!("{error}; a time looks like 60s or 2h 30m"))?;
    if time.subsec_nanos() != 0 || time.is_zero() || time > LONGEST {
        return Err(format!("a timeout is whole seconds, from 1s to {}", humantime::format_duration(LONGEST)));
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::dataplane::kernel::XdpMode;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn parse(arguments: &str) -> Result<Args, clap::Error> {
        let given = format!("wharf --interface eth0 --services s.yaml {arguments}");
        Command::try_parse_from(given.split_whitespace()).map(|command| command.args)
    }

    #[test]
    fn what_is_not_given_is_what_the_library_takes_by_default() {
        assert_eq!(parse("").unwrap().settings(), Settings::default());
        assert_eq!(parse("").unwrap().host.xdp, XdpMode::Auto);
    }

    #[test]
    fn timeouts_are_whole_seconds_within_bounds() {
        assert_eq!(parse("--timeout-udp 2m").unwrap().settings().timeouts.datagram, Tick::from_seconds(120));
        assert_eq!(timeout("2h 30m"), Ok(Duration::from_secs(9_000)));
        for wrong in ["", "60", "0s", "1500ms", "31d", "-1s", "soon"] {
            assert!(timeout(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn patterns_and_ranges_are_checked() {
        assert!(parse("--pod-interface veth* --pod-interface lxc[0-9]*").is_ok());
        assert!(parse("--pod-interface veth[").is_err());
        for (given, of_cluster, of_file) in [
            ("", PodInterfaces::ByKind, PodInterfaces::None),
            ("--pod-interface auto", PodInterfaces::ByKind, PodInterfaces::ByKind),
            ("--pod-interface none", PodInterfaces::None, PodInterfaces::None),
        ] {
            let read = |is_of_cluster| pod_interfaces(is_of_cluster, parse(given).unwrap().host.pod_interfaces);
            assert_eq!((read(true).unwrap(), read(false).unwrap()), (of_cluster, of_file), "{given}");
        }
        assert_eq!(parse("--nodeport-addresses primary").unwrap().nodeport_addresses, Some(NodePorts::Primary));
        let ranges = parse("--nodeport-addresses 10.0.0.0/8,fd00::/8").unwrap().nodeport_addresses;
        assert!(matches!(ranges, Some(NodePorts::In(ranges)) if ranges.len() == 2));
        assert_eq!(parse("--nodeport-addresses=").unwrap().nodeport_addresses, Some(NodePorts::All));
        for wrong in ["10.0.0.1", "primary,10.0.0.0/8", "10.0.0.0/33", ","] {
            assert!(parse(&format!("--nodeport-addresses {wrong}")).is_err(), "{wrong}");
        }
    }

    /// As they are in the manifests of a cluster.
    #[test]
    fn what_kube_proxy_is_told_and_makes_sense_here_is_taken_and_else_refused() {
        let parse = |arguments: &str| {
            let given = format!("wharf --interface eth0 --kubernetes {arguments}");
            Command::try_parse_from(given.split_whitespace()).map(|command| command.args)
        };
        let args = parse(
            "--kubeconfig=/var/lib/kube-proxy/kubeconfig.conf --master=https://192.0.2.1:6443 --hostname-override=Node-1 \
             --nodeport-addresses=primary --healthz-bind-address=0.0.0.0:10256 --metrics-bind-address=127.0.0.1:10249 \
             --bind-address-hard-fail=true --config-sync-period=15m0s",
        )
        .unwrap();
        assert!(args.http.bind_address_hard_fail && args.config_sync_period == Duration::from_secs(900));
        assert_eq!(&*name_in_cluster(args.node_name.as_deref()).unwrap(), "node-1");
        assert!(name_in_cluster(Some(" ")).is_err());
        assert!(!parse("").unwrap().http.bind_address_hard_fail && parse("--bind-address-hard-fail").is_ok());
        for of_a_cluster in ["--kubeconfig=x", "--master=x", "--config-sync-period=1m"] {
            assert!(self::parse(of_a_cluster).is_err(), "{of_a_cluster} says nothing about a file");
        }
        for refused in [
            "--bind-address=0.0.0.0",
            "--cleanup",
            "--cluster-cidr=10.244.0.0/16",
            "--config=/var/lib/kube-proxy/config.conf",
            "--config-sync-period=0",
            "--conntrack-max-per-core=32768",
            "--detect-local-mode=ClusterCIDR",
            "--feature-gates=A=true",
            "--healthz-port=10256",
            "--iptables-sync-period=30s",
            "--ipvs-scheduler=rr",
            "--masquerade-all",
            "--oom-score-adj=-998",
            "--proxy-mode=iptables",
            "--v=2",
        ] {
            assert!(parse(refused).is_err(), "{refused}");
        }
    }
}
