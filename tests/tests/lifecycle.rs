//! What becomes of traffic when the agent stops, dies, starts again, or goes for good.
#![expect(clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::{
    collections::BTreeMap,
    fs, iter,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, ProgramArray, lpm_trie::Key};
use lb_common::{
    abi::{Backend, Frontend, InterfaceAddresses, LAYOUT, SOURCES_IPV4, ServiceKey, Slot, SourceKey, VipKey},
    net::{IpProto, Ipv4Be, Ipv6Be, Port},
};
use nix::{
    mount::{MsFlags, mount, umount},
    net::if_::if_nametoindex,
    sys::signal::Signal,
};
use serde_json::Value;
use tempfile::TempDir;
use tests::{
    SOON,
    agent::Agent,
    cluster::{Layout, PodNetwork},
    eventually, poll,
    services::{Service, TARGET_PORT, cluster_ips, file, vips},
    topology::{Host, Lab, Topology},
    traffic::{Arrivals, Conversations},
    variants::PAIR,
};

/// Time for some traffic.
const MOMENT: Duration = Duration::from_millis(300);

/// A lab with three backends.
fn lab() -> Lab {
    Topology::new().backends(3).up()
}

/// A services file with the first service, of these backends.
fn web<'a>(backends: impl IntoIterator<Item = &'a Host>) -> String {
    file([Service::new(1).endpoints(backends)])
}

/// Connections that stay open, and others that come all the time, over both families.
struct Load {
    conversations: Vec<Conversations>,
    arrivals: Vec<Arrivals>,
}

impl Load {
    fn begin(client: &Host, vips: [SocketAddr; 2]) -> Self {
        let conversations = vips.iter().map(|vip| client.converse(vip, 20)).collect();
        Self { conversations, arrivals: vips.iter().map(|vip| client.keep_calling(vip)).collect() }
    }

    /// Ends it: no connection has failed, or was kept waiting. How many new ones there were.
    #[track_caller]
    fn expect_unharmed(self) -> usize {
        let mut connections = 0;
        for arrivals in self.arrivals {
            let tally = arrivals.finish();
            assert!(tally.errors.is_empty(), "{tally}");
            connections += tally.answers.values().sum::<usize>();
        }
        self.conversations.into_iter().for_each(Conversations::expect_unharmed);
        connections
    }
}

/// The flows opened to a service's backends, by their addresses.
fn opened(agent: &Agent) -> BTreeMap<String, u64> {
    let backends = agent.ask("backends");
    let backends = backends.as_array().unwrap().iter();
    backends
        .filter(|backend| backend["protocol"] == "TCP")
        .map(|backend| (backend["address"].as_str().unwrap().to_owned(), backend["flows"].as_u64().unwrap()))
        .collect()
}

#[test]
fn traffic_goes_on_without_the_agent() {
    for mode in ["native", "off"] {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            let lab = lab();
            let _servers = lab.serve(8080);
            let mut agent = Agent::start(&lab, &web(lab.backends()), &["--xdp", mode]);
            let before = lab.lb().programs();
            let load = Load::begin(lab.client(), vips(1));
            thread::sleep(MOMENT);
            agent.signal(signal);
            agent.wait();
            thread::sleep(MOMENT);
            assert_eq!(lab.lb().programs(), before);
            assert!(load.expect_unharmed() > 20, "--xdp {mode}, {signal}");
        }
    }
}

#[test]
fn an_agent_that_starts_again_takes_over_where_the_last_one_ended() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let mut agent = Agent::start(&lab, &web(lab.backends()), &[]);
    for vip in vips(1) {
        assert!(lab.client().get_many(vip, 30, 1).errors.is_empty());
    }
    let (before, forwarded) = (opened(&agent), agent.count("redirect"));
    assert!(before.values().all(|flows| *flows == 10), "{before:?}");
    agent.signal(Signal::SIGKILL);
    agent.wait();
    let another = agent.launch_another(&lab, &[]).ready();
    assert_eq!(opened(&another), before);
    assert!(another.count("redirect") >= forwarded);
    // The turns go on where they were.
    let tally = lab.client().get_many(vips(1)[0], 3, 1);
    assert_eq!(tally.answers.values().copied().collect::<Vec<_>>(), [1, 1, 1]);
}

#[test]
fn tables_of_which_one_is_lost_are_served_by_and_that_is_said() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let mut agent = Agent::start(&lab, &web([lab.backend(1)]), &[]);
    for broken_file in [false, true] {
        agent.signal(Signal::SIGKILL);
        agent.wait();
        let maps = lab.lb().pins().into_iter().find(|path| path.ends_with("maps")).unwrap();
        fs::remove_file(maps.join("ADDRESS_BITS")).unwrap();
        if broken_file {
            agent.edit("services: [{ name: web }]");
        }
        agent = agent.launch_another(&lab, &[]).ready();
        assert!(agent.log().contains("tables are there but for ADDRESS_BITS"), "{}", agent.log());
        for vip in vips(1) {
            assert_eq!(lab.client().get_many(vip, 3, 1).answers, BTreeMap::from([("b1".to_owned(), 3)]));
        }
    }
}

#[test]
fn kills_and_restarts_under_load_harm_no_connection() {
    for variant in PAIR {
        let cluster = variant.layout.clone().up();
        let (node, other) = (cluster.node(1), cluster.node(2));
        let pods: Vec<_> = node.pods().iter().chain(other.pods()).collect();
        let _servers: Vec<_> = pods.iter().map(|pod| pod.serve(8080)).collect();
        let services = file([Service::new(1).endpoints(pods.iter().copied())]);
        let mut agent = variant.start(node, &services, &[]);
        let load = Load::begin(cluster.client(), vips(1));
        let began = Instant::now();
        for round in 0..5 {
            thread::sleep(MOMENT);
            agent.signal(if round % 2 == 0 { Signal::SIGKILL } else { Signal::SIGTERM });
            agent.wait();
            thread::sleep(MOMENT);
            // Other code, as far as the kernel can tell: each agent loads programs of its own, and these have other constants.
            let timeout = format!("{}s", 60 + round);
            agent = agent.restart_on(node, &["--xdp", variant.xdp, "--timeout-udp", &timeout]);
        }
        thread::sleep(MOMENT);
        let connections = load.expect_unharmed();
        println!("{connections} new connections in {:?}, and none failed", began.elapsed());
        assert!(connections > 100);
    }
}

#[test]
fn backends_replaced_one_by_one_under_load_with_drain_harm_no_connection() {
    let lab = Topology::new().backends(6).up();
    let _servers = lab.serve(8080);
    let (old, new) = lab.backends().split_at(3);
    let agent = Agent::start(&lab, &web(old), &[]);
    let arrivals: Vec<_> = vips(1).iter().map(|vip| lab.client().keep_calling(vip)).collect();
    // All of the old ones have had connections by then.
    thread::sleep(MOMENT);
    for replaced in 1..=3 {
        let drained = Service::new(1).endpoints(&old[replaced..]).endpoints(&new[..replaced]);
        // The one that goes has no new flows first, and then none at all.
        let draining = drained.clone().endpoint_with(&old[replaced - 1], &serde_json::json!({ "weight": 0 }));
        agent.apply(&file([draining]));
        thread::sleep(MOMENT);
        agent.apply(&file([drained]));
        thread::sleep(MOMENT);
    }
    for arrivals in arrivals {
        let tally = arrivals.finish();
        assert!(tally.errors.is_empty(), "{tally}");
        assert!(tally.answers.len() == 6, "{tally}");
    }
}

#[test]
fn services_that_went_while_no_agent_ran_are_removed_by_the_next_one() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let two = file([1, 2].map(|k| Service::new(k).endpoints(lab.backends())));
    let mut agent = Agent::start(&lab, &two, &[]);
    let [v4, _] = vips(2);
    assert!(lab.client().tcp(v4).is_ok());
    agent.signal(Signal::SIGKILL);
    agent.wait();
    agent.edit(&web([lab.backend(1)]));
    let another = agent.launch_another(&lab, &[]).ready();
    assert!(lab.client().tcp(v4).is_err());
    for vip in vips(1) {
        assert_eq!(lab.client().get_many(vip, 10, 1).answers, BTreeMap::from([("b1".to_owned(), 10)]));
    }
    // All else is as if it had been that way from the start.
    another.apply("services: []");
    eventually("nothing is left in any table", || {
        let tables = another.status()["tables"].clone();
        let is_of_flows = |table: &Value| table["name"].as_str().unwrap().starts_with("flows");
        tables.as_array().unwrap().iter().all(|table| table["used"] == 0 || is_of_flows(table))
    });
}

#[test]
fn an_agent_that_starts_again_with_a_broken_file_leaves_all_as_it_is_until_the_file_makes_sense() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let mut agent = Agent::start(&lab, &web([lab.backend(1)]), &[]);
    agent.signal(Signal::SIGKILL);
    agent.wait();
    agent.edit("services: [{ name: web }]");
    let another = agent.launch_another(&lab, &[]).ready();
    let error = || another.status()["servicesError"].clone();
    assert!(error().as_str().is_some_and(|error| error.contains("services[0].addresses: missing")), "{}", error());
    for vip in vips(1) {
        assert_eq!(lab.client().get_many(vip, 3, 1).answers, BTreeMap::from([("b1".to_owned(), 3)]));
    }
    let verify = || {
        let output = another.cli(&["verify"]);
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, text) = verify();
    assert!(code == 2 && text.contains("not compared: "), "{code}: {text}");
    another.apply(&web([lab.backend(2)]));
    assert_eq!(error(), Value::Null);
    for vip in vips(1) {
        assert_eq!(lab.client().get_many(vip, 3, 1).answers, BTreeMap::from([("b2".to_owned(), 3)]));
    }
    assert_eq!(verify().0, 0, "{}", verify().1);
    another.edit("services: [{ name: web }]");
    eventually("what is not in force is told", || {
        let (code, text) = verify();
        code == 2 && text.contains("not all that the source says is in force") && !text.contains("not compared: ")
    });
}

#[test]
fn other_sizes_than_those_that_are_pinned_are_refused_with_both_and_traffic_goes_on() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let mut agent = Agent::start(&lab, &web(lab.backends()), &["--max-flows", "4096"]);
    let load = Load::begin(lab.client(), vips(1));
    agent.signal(Signal::SIGTERM);
    agent.wait();
    let mut other = agent.launch_another(&lab, &["--max-flows", "8192"]);
    assert_eq!(other.wait().code(), Some(1));
    let log = other.log();
    assert!(log.contains("map FLOWS4 is pinned as LruHash with 8192 entries"), "{log}");
    assert!(log.contains("is to be LruHash with 16384 entries") && log.contains("--max-flows as before"), "{log}");
    let another = agent.launch_another(&lab, &["--max-flows", "4096"]).ready();
    assert!(load.expect_unharmed() > 0);
    drop(another);
}

#[test]
fn a_second_agent_with_the_same_pins_is_refused() {
    let lab = lab();
    let agent = Agent::start(&lab, "services: []", &[]);
    // In a directory of its own.
    let mut second = Agent::launch(&lab, "services: []", &[]);
    assert_eq!(second.wait().code(), Some(1));
    assert!(second.log().contains("another wharf runs with the pins in"), "{}", second.log());
    agent.stop();
}

#[test]
fn interfaces_that_are_not_named_any_more_are_left() {
    let lab = lab();
    for mode in ["native", "off"] {
        let mut agent = Agent::start(&lab, "services: []", &["--xdp", mode]);
        agent.signal(Signal::SIGTERM);
        agent.wait();
        let another = agent.relaunch(lab.lb(), &["--interface", "eth-b1", "--xdp", mode]).ready();
        // Below Linux 6.6 a qdisc stays, without filters.
        let is_left = |it: &String| it.starts_with("eth-b1 ") || it.ends_with(" clsact");
        eventually("the others are left", || lab.lb().programs().iter().all(is_left));
        drop(another);
    }
}

#[test]
fn an_agent_takes_over_in_another_mode() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let mut agent = Agent::start(&lab, &web(lab.backends()), &["--xdp", "native"]);
    let conversations = vips(1).map(|vip| lab.client().converse(vip, 5));
    for mode in ["off", "generic", "native", "auto"] {
        agent.signal(Signal::SIGTERM);
        agent.wait();
        agent = agent.launch_another(&lab, &["--xdp", mode]).ready();
        assert_eq!(agent.status()["interfaces"][0]["xdp"], if mode == "auto" { "off" } else { mode });
    }
    for conversations in conversations {
        assert_eq!(conversations.stuck(SOON), Vec::<&str>::new());
    }
}

#[test]
fn while_an_agent_starts_nothing_is_sent_by_an_uplink_that_xdp_does_not_send_by() {
    let lab = lab();
    let host = lab.lb();
    // XDP programs are taken by the driver of a tap device, and not by a bridge.
    host.namespace()
        .ip("tuntap add dev card mode tap\nlink add bridge type bridge\nlink set card up\nlink set bridge up");
    let arguments = ["--interface", "card", "--interface", "bridge", "--xdp", "auto"];
    let mut agent = Agent::start(&lab, &web(lab.backends()), &arguments);
    let map = || Map::HashMap(host.pinned_map("ADDRESSES")).try_into().unwrap();
    let addresses: HashMap<_, u32, InterfaceAddresses> = map();
    let [card, bridge] = ["card", "bridge"].map(|name| host.namespace().run(|| if_nametoindex(name).unwrap()));
    let is_attached = |interface| addresses.get(&interface, 0).unwrap().is_attached;
    assert_eq!([is_attached(card), is_attached(bridge)], [1, 0]);
    agent.signal(Signal::SIGTERM);
    agent.wait();
    let another = agent.launch_another(&lab, &arguments);
    let is_ready = AtomicBool::new(false);
    let was_sent_by = thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let attached = iter::repeat_with(|| is_attached(bridge) != 0);
            attached.take_while(|_| !is_ready.load(Ordering::Relaxed)).any(|it| it)
        });
        let is_in_time = poll(SOON, || another.cli(&["status"]).status.success().then_some(()));
        is_ready.store(true, Ordering::Relaxed);
        assert!(is_in_time.is_some(), "it does not start");
        watch.join().unwrap()
    });
    assert!(!was_sent_by);
    assert_eq!([is_attached(card), is_attached(bridge)], [1, 0]);
}

#[test]
fn an_agent_that_is_refused_its_mode_leaves_traffic_as_it_was() {
    let lab = lab();
    let _servers = lab.serve(8080);
    // A veth takes no XDP program in the driver while its other end may send more than a page.
    lab.client().namespace().ip("link set eth0 mtu 9000");
    lab.lb().namespace().ip("route add default via 10.1.0.2\nroute add default via fd00:1::2");
    let mut agent = Agent::start(&lab, &web(lab.backends()), &["--xdp", "generic", "--socket-lb", "off"]);
    let load = Load::begin(lab.client(), vips(1));
    thread::sleep(MOMENT);
    agent.signal(Signal::SIGTERM);
    agent.wait();
    for _ in 0..2 {
        let mut refused = agent.launch_another(&lab, &["--xdp", "native", "--socket-lb", "off"]);
        assert_eq!(refused.wait().code(), Some(1));
        assert!(refused.log().contains("native XDP could not be attached"), "{}", refused.log());
        for vip in vips(1) {
            assert!(lab.lb().get_many(vip, 3, 1).errors.is_empty(), "processes of the node are balanced by packets");
        }
        thread::sleep(MOMENT);
    }
    let another = agent.launch_another(&lab, &["--xdp", "generic"]).ready();
    assert_eq!(another.status()["interfaces"][0]["xdp"], "generic");
    thread::sleep(MOMENT);
    assert!(load.expect_unharmed() > 20);
}

// Bad days.

/// A BPF file system of a test's own.
struct Bpffs(TempDir);

impl Bpffs {
    fn mount() -> Self {
        let directory = tempfile::tempdir().unwrap();
        mount(Some("bpf"), directory.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        Self(directory)
    }

    fn set_writable(&self, is_writable: bool) {
        let flags = if is_writable { MsFlags::empty() } else { MsFlags::MS_RDONLY };
        mount(None::<&str>, self.0.path(), None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>).unwrap();
    }

    fn argument(&self) -> String {
        format!("--bpffs={}", self.0.path().join("wharf").display())
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        umount(self.0.path()).unwrap();
    }
}

#[test]
fn a_read_only_file_system_is_waited_for() {
    let (lab, bpffs) = (lab(), Bpffs::mount());
    bpffs.set_writable(false);
    let agent = Agent::launch(&lab, &web(lab.backends()), &[&bpffs.argument()]);
    eventually("it says what it waits for", || agent.log().contains("`mount -o remount,rw` makes it writable"));
    bpffs.set_writable(true);
    agent.ready().stop();
}

#[test]
fn cleanup_names_the_place_where_the_agent_had_its_pins() {
    let (lab, bpffs) = (lab(), Bpffs::mount());
    let mut agent = Agent::start(&lab, &web(lab.backends()), &[&bpffs.argument()]);
    agent.signal(Signal::SIGTERM);
    agent.wait();
    let before = lab.lb().programs();
    let output = agent.cleanup();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(&bpffs.argument().replace('=', " ")), "{said}");
    assert_eq!(lab.lb().programs(), before);
    let output = lab.lb().namespace().run(|| agent.cli(&["cleanup", &bpffs.argument()]));
    assert!(output.status.success(), "{output:?}");
    lab.lb().assert_no_programs();
}

/// It would balance beside what the last one has left, which nobody keeps up to date.
#[test]
fn an_agent_that_is_to_have_its_pins_elsewhere_is_refused() {
    let (lab, bpffs) = (lab(), Bpffs::mount());
    let there = bpffs.argument();
    let (usual, there): ([&str; 0], _) = ([], [there.as_str()]);
    for (first, second) in [(&usual[..], &there[..]), (&there, &usual)] {
        let mut agent = Agent::start(&lab, &web(lab.backends()), first);
        agent.signal(Signal::SIGTERM);
        agent.wait();
        let before = (lab.lb().programs(), settings(lab.lb()));
        let mut another = agent.launch_another(&lab, second);
        assert_eq!(another.wait().code(), Some(1));
        assert!(another.log().contains("the last wharf has its pins in"), "{}", another.log());
        assert_eq!((lab.lb().programs(), settings(lab.lb())), before);
        let output = lab.lb().namespace().run(|| agent.cli(&[&["cleanup"][..], first].concat()));
        assert!(output.status.success(), "{output:?}");
    }
    // By another name it is the same place.
    let directory = tempfile::tempdir().unwrap();
    symlink(bpffs.0.path(), directory.path().join("link")).unwrap();
    let mut agent = Agent::start(&lab, &web(lab.backends()), &there);
    agent.signal(Signal::SIGTERM);
    agent.wait();
    let by_link = format!("--bpffs={}", directory.path().join("link/wharf").display());
    agent.launch_another(&lab, &[&by_link]).ready().stop();
}

#[test]
fn what_can_not_be_pinned_is_said_and_pinned_later() {
    let (lab, bpffs) = (lab(), Bpffs::mount());
    let _servers = lab.serve(8080);
    let mut agent = Agent::start(&lab, &web(lab.backends()), &[&bpffs.argument(), "--pod-interface", "pod*"]);
    bpffs.set_writable(false);
    let pods = || agent.status()["podInterfaces"]["attached"].as_u64();
    lab.lb().namespace().ip("link add pod0 type veth peer name eth9\nlink set pod0 up");
    eventually("the new device is attached to", || pods() == Some(1));
    let unpinned = || agent.status()["unpinned"].as_str().map(str::to_owned);
    assert!(unpinned().is_some_and(|why| why.contains("read-only")), "{:?}", unpinned());
    for vip in vips(1) {
        assert!(lab.client().get_many(vip, 3, 1).errors.is_empty());
    }
    bpffs.set_writable(true);
    let limit = Duration::from_secs(40);
    assert!(tests::poll(limit, || unpinned().is_none().then_some(())).is_some(), "{:?}", unpinned());
    let before = lab.lb().programs();
    agent.signal(Signal::SIGKILL);
    agent.wait();
    assert_eq!(lab.lb().programs(), before);
}

#[test]
fn tables_of_another_layout_are_left_alone_and_named() {
    let (lab, bpffs) = (lab(), Bpffs::mount());
    let other = bpffs.0.path().join(Path::new("wharf/v999").join(lab.lb().namespace().directory()));
    fs::create_dir_all(&other).unwrap();
    let mut agent = Agent::launch(&lab, "services: []", &[&bpffs.argument()]);
    assert_eq!(agent.wait().code(), Some(1));
    let log = agent.log();
    assert!(log.contains("another layout than v1") && log.contains(other.to_str().unwrap()), "{log}");
    assert!(other.exists());
}

/// An agent of another namespace that starts at the same time does that, and may find that they are.
#[test]
fn who_looks_for_a_moment_whether_pins_are_of_a_namespace_that_is_gone_is_waited_for() {
    for removed in [None, Some("maps"), Some("")] {
        let (lab, bpffs) = (lab(), Bpffs::mount());
        let directory = bpffs.0.path().join(format!("wharf/v{LAYOUT}")).join(lab.lb().namespace().directory());
        fs::create_dir_all(&directory).unwrap();
        let looking = fs::File::open(&directory).unwrap();
        looking.lock().unwrap();
        // It waits for seconds, of which a start takes one.
        let release = thread::spawn(move || {
            thread::sleep(4 * MOMENT);
            // What is not there yet can't be removed.
            let _removed = removed.map(|part| fs::remove_dir_all(directory.join(part)));
            drop(looking);
        });
        Agent::launch(&lab, "services: []", &[&bpffs.argument()]).ready().stop();
        release.join().unwrap();
    }
}

#[test]
fn a_place_that_is_no_bpf_file_system_is_named() {
    let (lab, directory) = (lab(), tempfile::tempdir().unwrap());
    let bpffs = format!("--bpffs={}", directory.path().display());
    let mut agent = Agent::launch(&lab, "services: []", &[&bpffs]);
    assert_eq!(agent.wait().code(), Some(1));
    let log = agent.log();
    assert!(log.contains(directory.path().to_str().unwrap()) && log.contains("mount -t bpf"), "{log}");
}

#[test]
fn an_interface_that_went_while_no_agent_ran_is_attached_to_when_it_is_back() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let mut agent = Agent::start(&lab, &web([lab.backend(1)]), &["--pod-interface", "pod*"]);
    let pods = |agent: &Agent| agent.status()["podInterfaces"]["attached"].as_u64();
    lab.lb().namespace().ip("link add pod0 type veth peer name eth9\nlink set pod0 up");
    eventually("it is attached to", || pods(&agent) == Some(1));
    agent.signal(Signal::SIGKILL);
    agent.wait();
    lab.lb().namespace().ip("link del pod0\nlink add pod0 type veth peer name eth9\nlink set pod0 up");
    let another = agent.launch_another(&lab, &["--pod-interface", "pod*"]).ready();
    eventually("the new one is attached to", || pods(&another) == Some(1));
    for vip in vips(1) {
        assert!(lab.client().get_many(vip, 3, 1).errors.is_empty());
    }
}

#[test]
fn an_uplink_that_is_missing_at_a_restart_is_attached_to_when_it_comes() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let mut agent = Agent::start(&lab, &web([lab.backend(1)]), &[]);
    agent.signal(Signal::SIGKILL);
    agent.wait();
    lab.lb().namespace().ip("link set eth-b3 down\nlink set eth-b3 name away");
    let another = agent.launch_another(&lab, &[]).ready();
    assert!(another.log().contains("interface eth-b3 is gone"), "{}", another.log());
    for vip in vips(1) {
        assert!(lab.client().get_many(vip, 3, 1).errors.is_empty());
    }
    lab.lb().namespace().ip("link set away name eth-b3\nlink set eth-b3 up");
    eventually("it is attached to", || {
        another.status()["interfaces"].as_array().unwrap().iter().all(|it| it["xdp"] == "native")
    });
}

#[test]
fn an_interface_that_comes_back_with_its_number_is_attached_to() {
    let lab = lab();
    let agent = Agent::start(&lab, &web([lab.backend(1)]), &[]);
    let number = lab.lb().number("eth-b3");
    lab.lb().namespace().ip("link del eth-b3");
    eventually("it is missed", || agent.log().contains("interface eth-b3 is gone"));
    lab.lb().namespace().ip(&format!("link add eth-b3 index {number} type veth peer name other\nlink set eth-b3 up"));
    eventually("it is attached to", || lab.lb().programs().contains(&"eth-b3 xdp".to_owned()));
}

#[test]
fn an_uplink_that_can_not_be_attached_to_again_says_why_and_is_tried_again() {
    let lab = lab();
    let agent = Agent::start(&lab, &web([lab.backend(1)]), &["--xdp", "native"]);
    lab.lb().namespace().ip("link del eth-b3");
    eventually("it is missed", || agent.log().contains("interface eth-b3 is gone"));
    // A veth takes no XDP program while its other end may send more than a page.
    let other = lab.backend(3).namespace();
    lab.lb().namespace().ip(&format!("link add eth-b3 type veth peer name other mtu 9000 netns {}", other.name()));
    let interface = || {
        let interfaces = agent.status()["interfaces"].clone();
        interfaces.as_array().unwrap().iter().find(|it| it["name"] == "eth-b3").unwrap().clone()
    };
    eventually("it is told", || interface()["why"].as_str().is_some_and(|why| why.contains("native XDP")));
    assert_eq!(interface()["xdp"], "gone");
    assert_eq!(agent.log().matches("cannot attach to eth-b3 again").count(), 1, "{}", agent.log());
    // Where the balancer is, nothing changes.
    other.ip("link set other mtu 1500");
    let limit = Duration::from_secs(40);
    assert!(poll(limit, || (interface()["xdp"] == "native").then_some(())).is_some(), "{}", agent.log());
    assert_eq!(interface()["why"], Value::Null);
}

#[test]
fn who_starts_with_more_than_there_is_room_for_goes_on_with_what_was_served() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let served_by = |i| file([Service::new(1).endpoints([lab.backend(i)])]);
    let arguments = ["--max-services", "4"];
    let mut agent = Agent::start(&lab, &served_by(1), &arguments);
    agent.signal(Signal::SIGKILL);
    agent.wait();
    agent.edit(&file((1..=20).map(|k| Service::new(k).endpoints([lab.backend(2)]))));
    let agent = agent.launch_another(&lab, &arguments);
    eventually("the lack of room is told", || agent.log().contains("--max-services"));
    let answers = || lab.client().get_many(vips(1)[0], 3, 1).answers;
    assert_eq!(answers(), BTreeMap::from([("b1".to_owned(), 3)]));
    agent.edit(&served_by(2));
    eventually("there is room", || answers() == BTreeMap::from([("b2".to_owned(), 3)]));
}

/// Makes a device, if the kernel has such.
fn can_make(host: &Host, link: &str) -> bool {
    let arguments = ["link", "add"].into_iter().chain(link.split(' '));
    host.namespace().run(|| Command::new("ip").args(arguments).status().unwrap()).success()
}

/// Whether a setting of an interface for IPv4 is on.
fn is_set(host: &Host, interface: &str, setting: &str) -> bool {
    let file = Path::new("/proc/sys/net/ipv4/conf").join(interface).join(setting);
    host.namespace().run(|| fs::read_to_string(file).is_ok_and(|value| value.trim() == "1"))
}

/// What comes in by such a device, and has our own address as its source once it is translated, is for the stack to send on.
#[test]
fn vlan_devices_that_come_later_are_made_to_forward_too() {
    let lab = lab();
    let _agent = Agent::start(&lab, &web([lab.backend(1)]), &[]);
    for _ in 0..2 {
        if !can_make(lab.lb(), "link eth-b3 name eth-b3.7 type vlan id 7") {
            println!("skipped: the kernel has no VLAN devices (CONFIG_VLAN_8021Q)");
            return;
        }
        lab.lb().namespace().ip("addr add 10.77.0.1/24 dev eth-b3.7\nlink set eth-b3.7 up");
        let is_set = |name| is_set(lab.lb(), "eth-b3.7", name);
        eventually("it is made to forward", || is_set("accept_local") && is_set("forwarding"));
        lab.lb().namespace().ip("link del eth-b3.7");
    }
}

/// In the driver packets come in by the port, and the kernel asks whether that one forwards.
#[test]
fn ports_of_bonds_are_made_to_forward() {
    let lab = lab();
    let namespace = lab.lb().namespace();
    if !can_make(lab.lb(), "bond7 type bond") {
        println!("skipped: the kernel has no bonds (CONFIG_BONDING)");
        return;
    }
    let join = |port: &str| {
        namespace.ip(&format!("link add {port} type veth peer name {port}-peer"));
        namespace.ip(&format!("link set {port} master bond7\nlink set {port}-peer up"));
    };
    let forwards = |port| is_set(lab.lb(), port, "forwarding");
    join("port0");
    namespace.ip("link set bond7 up");
    let _agent = Agent::start(&lab, &web([lab.backend(1)]), &["--interface", "bond7"]);
    assert!(forwards("port0"), "one that is there");
    join("port1");
    eventually("one that comes later forwards", || forwards("port1"));
}

#[test]
fn what_did_not_fit_is_applied_as_soon_as_there_is_room() {
    let lab = lab();
    let _servers = lab.serve(8080);
    // Sixteen frontends in each family: on the node's four addresses those of both protocols and the cluster IPs fit, on more
    // addresses they don't.
    let arguments = ["--max-services", "8", "--nodeport-addresses", "10.0.0.0/8,192.168.0.0/16"];
    let served_by = |i| file([Service::new(1).everywhere().endpoints([lab.backend(i)])]);
    let agent = Agent::start(&lab, &served_by(1), &arguments);
    let more = |verb| {
        let lines = (2..8).map(|i| format!("addr {verb} 10.1.0.10{i}/24 dev eth-b1"));
        lines.collect::<Vec<_>>().join("\n")
    };
    lab.lb().namespace().ip(&more("add"));
    let error = || agent.status()["servicesError"].as_str().map(str::to_owned);
    let is_full = |error: &str| error.contains("the table of frontends is full") && error.contains("--max-services");
    eventually("the lack of room is told", || error().is_some_and(|error| is_full(&error)));
    let answers = || lab.client().get_many(vips(1)[0], 3, 1).answers;
    assert_eq!(answers(), BTreeMap::from([("b1".to_owned(), 3)]));
    // A mistake in the file is told until it is mended. What it says then fits, on the node as it was.
    agent.edit("services: [{}]");
    eventually("the mistake is told", || error().is_some_and(|error| error.contains("services[0].name")));
    agent.edit(&served_by(2));
    eventually("services change all the same", || answers() == BTreeMap::from([("b2".to_owned(), 3)]));
    eventually("the lack of room is told again", || error().is_some_and(|error| is_full(&error)));
    let refused = || lab.lb().http("http://127.0.0.1:10249/metrics").unwrap().metric("wharf_services_refused");
    assert_eq!(refused(), Some(1.0));
    lab.lb().namespace().ip(&more("del"));
    let limit = Duration::from_secs(40);
    assert!(tests::poll(limit, || error().is_none().then_some(())).is_some(), "{:?}", error());
    assert_eq!(refused(), Some(0.0));
    assert_eq!(answers(), BTreeMap::from([("b2".to_owned(), 3)]));
}

// Others.

#[test]
fn what_somebody_else_writes_to_the_maps_is_found_and_put_right() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let agent = Agent::start(&lab, &web([lab.backend(1)]), &[]);
    let verify = |arguments: &[&str]| {
        let output = agent.cli(&[&["verify"], arguments].concat());
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert_eq!(verify(&[]).0, 0, "{}", verify(&[]).1);
    let mut slots: Array<_, Slot> = Map::Array(lab.lb().pinned_map("TABLE")).try_into().unwrap();
    let mut services: HashMap<_, ServiceKey<Ipv4Be>, Frontend> =
        Map::HashMap(lab.lb().pinned_map("SERVICES4")).try_into().unwrap();
    let mut bits: Array<_, u64> = Map::Array(lab.lb().pinned_map("ADDRESS_BITS")).try_into().unwrap();
    let mut sources: LpmTrie<_, SourceKey, u32> = Map::LpmTrie(lab.lb().pinned_map("SOURCES")).try_into().unwrap();
    let addresses = || -> HashMap<_, u32, InterfaceAddresses> {
        Map::HashMap(lab.lb().pinned_map("ADDRESSES")).try_into().unwrap()
    };
    let entries = || addresses().iter().map(Result::unwrap).collect::<Vec<_>>();
    let mut exempt: HashMap<_, u64, u32> = Map::HashMap(lab.lb().pinned_map("EXEMPT")).try_into().unwrap();
    let frontends = || -> HashMap<_, ServiceKey<Ipv4Be>, Frontend> {
        Map::HashMap(lab.lb().pinned_map("SERVICES4")).try_into().unwrap()
    };
    let mut backends: Array<_, Backend> = Map::Array(lab.lb().pinned_map("BACKENDS")).try_into().unwrap();
    let mut epoch: Array<_, u32> = Map::Array(lab.lb().pinned_map("EPOCH")).try_into().unwrap();
    let bogus = |proto| ServiceKey::new(Ipv4Be::from(Ipv4Addr::new(203, 0, 113, 9)), Port::from_host(80), proto);
    let insert = |key| frontends().insert(key, Frontend { service: 0, flags: 0 }, 0).unwrap();
    let spoil: [&mut dyn FnMut(); 13] = [
        // Frontends that nobody asked for, and such that no packet finds.
        &mut || insert(bogus(IpProto::TCP)),
        &mut || insert(bogus(IpProto::ICMP)),
        &mut || {
            let address = Ipv6Be::from(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9));
            let mut key = ServiceKey::new(address, Port::from_host(80), IpProto::TCP);
            key._pad = [7];
            let map = Map::HashMap(lab.lb().pinned_map("SERVICES6"));
            let mut frontends: HashMap<_, ServiceKey<Ipv6Be>, Frontend> = map.try_into().unwrap();
            frontends.insert(key, Frontend { service: 0, flags: 0 }, 0).unwrap();
        },
        // Flows that are open would be over.
        &mut || {
            let backend = backends.get(&0, 0).unwrap();
            backends.set(0, Backend { generation: backend.generation + 1, ..backend }, 0).unwrap();
        },
        // Next hops that were good once would be again.
        &mut || epoch.set(0, epoch.get(&0, 0).unwrap() - 1, 0).unwrap(),
        // Packets that open flows would be dropped.
        &mut || ["XDP_STAGES", "TC_STAGES"].iter().for_each(|name| clear_stages(lab.lb(), name)),
        // Nobody has this backend.
        &mut || slots.set(0, Slot::new(4711), 0).unwrap(),
        &mut || {
            for key in services.keys().map(Result::unwrap).collect::<Vec<_>>() {
                services.remove(&key).unwrap();
            }
        },
        // Neither services nor backends are looked for.
        &mut || (0..bits.len()).for_each(|word| bits.set(word, 0, 0).unwrap()),
        // All clients are let in everywhere.
        &mut || sources.insert(&Key::new(0, SourceKey::new(0, [0, 0])), SOURCES_IPV4, 0).unwrap(),
        // Nothing has an address to leave with, or another host's.
        &mut || entries().iter().for_each(|(interface, _)| addresses().remove(interface).unwrap()),
        &mut || {
            for (interface, known) in entries() {
                let v4 = Ipv4Be::from(Ipv4Addr::new(192, 0, 2, 9));
                addresses().insert(interface, InterfaceAddresses { v4, ..known }, 0).unwrap();
            }
        },
        &mut || exempt.insert(4711, 1, 0).unwrap(),
    ];
    for spoil in spoil {
        spoil();
        let (code, text) = verify(&[]);
        assert!(code == 2 && text.contains("--repair"), "{code}: {text}");
        assert_eq!(verify(&[]).0, 2, "looking changes nothing");
        let (code, text) = verify(&["--repair"]);
        assert!(code == 0 && text.contains("put right"), "{code}: {text}");
        assert_eq!(verify(&[]).0, 0);
        for vip in vips(1) {
            assert_eq!(lab.client().get_many(vip, 3, 1).answers, BTreeMap::from([("b1".to_owned(), 3)]));
        }
    }
}

#[test]
fn where_somebody_else_detaches_programs_they_are_attached_again() {
    let cluster = Layout::new(PodNetwork::Routed).up();
    let _servers = [cluster.pod(1, 1), cluster.pod(2, 1)].map(|pod| pod.serve(TARGET_PORT));
    let services = file([Service::new(1).everywhere().endpoints([cluster.pod(1, 1), cluster.pod(2, 1)])]);
    let node = cluster.node(1);
    // One that balances by sockets, and one that meets what its processes send.
    for more in [&["--xdp", "native"][..], &["--xdp", "off", "--socket-lb", "off"]] {
        let agent = Agent::start_on(node, &services, more);
        let places = || (node.host().programs(), agent.status()["sockets"]["attached"].clone());
        let before = places();
        let is_as_before = || (places() == before).then_some(());
        // All, and half of an interface's.
        for (ask, code, which) in [(&["verify"][..], 2, "-"), (&["verify", "--repair"], 0, "tc-egress-")] {
            let is_told = || {
                node.host().detach_programs(which);
                let output = agent.cli(ask);
                assert!(poll(Duration::from_secs(20), is_as_before).is_some(), "{}", agent.log());
                for host in [cluster.client(), cluster.pod(1, 2), node.host()] {
                    for vip in vips(1) {
                        host.tcp(vip).unwrap();
                    }
                }
                String::from_utf8_lossy(&output.stdout).contains("detached") && output.status.code() == Some(code)
            };
            // It may look by itself just before it is asked, but not each time.
            assert!(iter::repeat_with(is_told).take(3).any(|it| it), "{ask:?}: {}", agent.log());
        }
        assert!(agent.cli(&["verify"]).status.success());
        let repairs = node.host().http("http://127.0.0.1:10249/metrics").unwrap().metric("wharf_audit_repairs_total");
        assert!(repairs.unwrap() >= 5.0, "{repairs:?}");
    }
}

/// Makes programs find none to hand packets on to.
#[track_caller]
fn clear_stages(host: &Host, array: &str) {
    let programs = host.pins().into_iter().find(|path| path.ends_with("programs")).unwrap();
    for agent in fs::read_dir(programs).unwrap() {
        let map = MapData::from_pin(agent.unwrap().path().join(array)).unwrap();
        let mut stages: ProgramArray<_> = Map::ProgramArray(map).try_into().unwrap();
        for stage in stages.indices().map(Result::unwrap).collect::<Vec<_>>() {
            stages.clear_index(&stage).unwrap();
        }
    }
}

#[test]
fn what_somebody_else_has_removed_from_the_maps_may_leave_the_services_too() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let both = [1, 2].map(|k| Service::new(k).endpoints([lab.backend(1)]));
    let agent = Agent::start(&lab, &file(both), &[]);
    let mut frontends: HashMap<_, ServiceKey<Ipv4Be>, Frontend> =
        Map::HashMap(lab.lb().pinned_map("SERVICES4")).try_into().unwrap();
    let mut addresses: HashMap<_, VipKey<Ipv4Be>, u32> = Map::HashMap(lab.lb().pinned_map("VIPS4")).try_into().unwrap();
    let [second, _] = cluster_ips(2);
    for key in frontends.keys().map(Result::unwrap).filter(|it| IpAddr::from(it.address) == second).collect::<Vec<_>>()
    {
        frontends.remove(&key).unwrap();
    }
    for key in addresses.keys().map(Result::unwrap).filter(|it| IpAddr::from(it.address) == second).collect::<Vec<_>>()
    {
        addresses.remove(&key).unwrap();
    }
    agent.edit(&web([lab.backend(2)]));
    let answers = || lab.client().get_many(vips(1)[0], 3, 1).answers;
    eventually("services change all the same", || answers() == BTreeMap::from([("b2".to_owned(), 3)]));
    assert_eq!(agent.status()["servicesError"], Value::Null);
    assert!(agent.cli(&["verify"]).status.success());
}

// For good.

#[test]
fn with_keep_off_or_cleaned_up_nothing_is_left() {
    for lab in [Topology::new().backends(1).up(), Topology::new().backends(1).one_armed().up()] {
        // Strict, which the agent has to loosen.
        lab.lb().namespace().sysctl("ipv4/conf/all/rp_filter", "1");
        let before = settings(lab.lb());
        for keep in ["--keep=false", "--keep"] {
            // So it is attached to loopback, too.
            let mut agent = Agent::start(&lab, "services: []", &[keep, "--socket-lb=off"]);
            assert_eq!(lab.lb().programs().len(), 2 * lab.lb().interfaces().count() + 1);
            assert_ne!(settings(lab.lb()), before);
            agent.signal(Signal::SIGTERM);
            assert_eq!(agent.wait().code(), Some(0));
            assert!(!agent.admin_socket().exists());
            if keep == "--keep" {
                assert_ne!(settings(lab.lb()), before);
                let output = agent.cleanup();
                assert_eq!(String::from_utf8_lossy(&output.stdout), "nothing of wharf is left\n", "{output:?}");
            }
            lab.lb().assert_no_programs();
            assert_eq!(different(&before, &settings(lab.lb())), Vec::<&Path>::new());
            assert_eq!(lab.lb().pins(), Vec::<PathBuf>::new());
            let again = agent.cleanup();
            assert_eq!(String::from_utf8_lossy(&again.stdout), "there was nothing of wharf here\n", "{again:?}");
        }
    }
}

#[test]
fn cleanup_does_nothing_while_an_agent_runs() {
    let lab = lab();
    let mut agent = Agent::start(&lab, "services: []", &[]);
    let before = lab.lb().programs();
    let output = agent.cleanup();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("another wharf is running"), "{output:?}");
    assert_eq!(lab.lb().programs(), before);
}

#[test]
fn settings_are_put_back_to_what_they_were_before_the_first_agent() {
    let lab = Topology::new().backends(1).up();
    lab.lb().namespace().sysctl("ipv6/conf/eth-b1/forwarding", "1");
    let before = settings(lab.lb());
    let mut agent = Agent::start(&lab, "services: []", &[]);
    agent.signal(Signal::SIGKILL);
    agent.wait();
    let mut another = agent.launch_another(&lab, &["--keep=false"]).ready();
    another.signal(Signal::SIGTERM);
    another.wait();
    assert_eq!(different(&before, &settings(lab.lb())), Vec::<&Path>::new());
}

#[test]
fn segments_are_put_together_behind_native_xdp_and_nothing_is_changed_elsewhere() {
    let lab = Topology::new().backends(2).up();
    let lb = lab.lb();
    let with_gro = || lb.interfaces().filter(|it| lb.has_gro(it)).collect::<Vec<_>>();
    // Not by us.
    lb.set_gro("eth-b2", true);
    let mut agent = Agent::start(&lab, "services: []", &["--xdp", "off"]);
    let restart = |mut agent: Agent, arguments: &[&str]| {
        agent.signal(Signal::SIGKILL);
        agent.wait();
        agent.relaunch(lb, arguments).ready()
    };
    let of_lab = ["--interface", "eth-client", "--interface", "eth-b1", "--interface", "eth-b2"];
    let in_mode = |mode| [&of_lab[..], &["--xdp", mode]].concat();
    assert_eq!(with_gro(), ["eth-b2"], "in tc");
    agent = restart(agent, &in_mode("generic"));
    assert_eq!(with_gro(), ["eth-b2"], "in generic XDP");
    agent = restart(agent, &[in_mode("native"), vec!["--keep-sysctls"]].concat());
    assert!(!agent.log().contains("GRO"), "{}", agent.log());
    for _ in 0..2 {
        agent = restart(agent, &in_mode("native"));
        assert_eq!(with_gro(), ["eth-client", "eth-b1", "eth-b2"], "in native XDP");
    }
    agent = restart(agent, &["--interface", "eth-b1", "--xdp", "native"]);
    assert_eq!(with_gro(), ["eth-b1", "eth-b2"], "on one interface");
    agent = restart(agent, &in_mode("off"));
    assert_eq!(with_gro(), ["eth-b2"], "in tc again");
    agent = restart(agent, &in_mode("native"));
    assert_eq!(with_gro(), ["eth-client", "eth-b1", "eth-b2"], "in native XDP again");
    agent.signal(Signal::SIGTERM);
    agent.wait();
    assert_eq!(with_gro(), ["eth-client", "eth-b1", "eth-b2"], "without the agent");
    assert!(agent.cleanup().status.success());
    assert_eq!(with_gro(), ["eth-b2"], "without wharf");
}

#[test]
fn segments_are_put_together_by_an_uplink_that_is_back() {
    const MAKE: &str = "link add up0 type veth peer name peer0\nlink set up0 up\nlink set peer0 up";
    let lab = Topology::new().up();
    let (namespace, has_gro) = (lab.lb().namespace(), || lab.lb().has_gro("up0"));
    namespace.ip(MAKE);
    let mut agent = Agent::start(&lab, "services: []", &["--interface", "up0"]);
    assert!(has_gro());
    namespace.ip("link del up0");
    eventually("it is missed", || agent.log().contains("interface up0 is gone"));
    namespace.ip(MAKE);
    eventually("it has it, too", has_gro);
    agent.signal(Signal::SIGTERM);
    agent.wait();
    assert!(agent.cleanup().status.success());
    assert!(!has_gro());
}

#[test]
fn an_agent_that_can_not_start_leaves_nothing() {
    let lab = Topology::new().up();
    let before = settings(lab.lb());
    let mut agent = Agent::launch(&lab, "services: [{ name: web }]", &[]);
    assert_eq!(agent.wait().code(), Some(1));
    assert_eq!((lab.lb().programs(), lab.lb().pins()), (Vec::new(), Vec::new()));
    assert_eq!(different(&before, &settings(lab.lb())), Vec::<&Path>::new());
}

#[test]
fn what_is_left_of_namespaces_that_are_gone_goes_with_the_next_start() {
    let dead = {
        let lab = lab();
        let mut agent = Agent::start(&lab, "services: []", &[]);
        agent.signal(Signal::SIGKILL);
        agent.wait();
        let pins = lab.lb().pins();
        assert!(!pins.is_empty());
        // As if the machine of the test had ended before it could clean up.
        std::mem::forget(agent);
        pins
    };
    let lab = lab();
    let are_gone = || {
        let _agent = Agent::start(&lab, "services: []", &[]);
        dead.iter().all(|path| !path.exists()).then_some(())
    };
    assert!(poll(6 * SOON, are_gone).is_some(), "the kernel takes its time with namespaces, but not that much");
}

/// 5,000 services, and the first one with real backends.
fn many(lab: &Lab) -> String {
    let others = (0..4_999_u32).map(|number| {
        let address =
            |network: [u8; 4]| std::net::Ipv4Addr::from_bits(u32::from_be_bytes(network) + number).to_string();
        serde_json::json!({
            "name": format!("other-{number}"), "addresses": [address([10, 100, 0, 0])], "ports": [{ "port": 80 }],
            "backends": [address([10, 128, 0, 0]), address([10, 129, 0, 0])],
        })
    });
    let mut file: Value = serde_json::from_str(&web(lab.backends())).unwrap();
    file.get_mut("services").and_then(Value::as_array_mut).unwrap().extend(others);
    file.to_string()
}

/// How fast that goes is shown, and judged by people.
#[test]
fn a_restart_with_5_000_services_changes_nothing_for_live_flows() {
    let lab = lab();
    let _servers = lab.serve(8080);
    let mut agent = Agent::start(&lab, &many(&lab), &[]);
    let load = Load::begin(lab.client(), vips(1));
    let datagrams: Vec<_> = vips(1)
        .iter()
        .flat_map(|vip| (0..20).map(|_| lab.client().udp(vip).unwrap()).collect::<Vec<_>>())
        .map(|socket| (socket.ask("who?").unwrap(), socket))
        .collect();
    agent.signal(Signal::SIGKILL);
    agent.wait();
    let begin = Instant::now();
    let another = agent.launch_another(&lab, &[]).ready();
    println!("5,000 services: from exec to synced and attached {:?}", begin.elapsed());
    another.log().lines().filter(|line| line.contains("balancing")).for_each(|line| println!("  {line}"));
    assert!(another.log().contains("changes=0"), "{}", another.log());
    for (backend, socket) in datagrams {
        assert_eq!(socket.ask("who?").unwrap(), backend);
    }
    assert!(load.expect_unharmed() > 0);
}

/// The settings that are not as they were.
fn different<'a>(before: &'a BTreeMap<PathBuf, String>, after: &BTreeMap<PathBuf, String>) -> Vec<&'a Path> {
    before.iter().filter(|(path, value)| after.get(*path) != Some(value)).map(|(path, _)| path.as_path()).collect()
}

/// All settings of interfaces, and of ports.
fn settings(host: &Host) -> BTreeMap<PathBuf, String> {
    let below = |path: &Path| fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    host.namespace().run(|| {
        let families = ["/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv6/conf"].map(Path::new);
        let files = families.into_iter().flat_map(below).flat_map(|interface| below(&interface));
        let ports = PathBuf::from("/proc/sys/net/ipv4/ip_local_reserved_ports");
        // Some can only be written.
        files.chain([ports]).filter_map(|file| Some((file.clone(), fs::read_to_string(file).ok()?))).collect()
    })
}
