//! What the agent may do, as an ordinary user and as root: enough, and no more.
#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use nix::sys::signal::Signal;
use tests::{
    agent::Agent,
    eventually,
    home::{Home, give_away},
    services::{Service, file, vips},
    topology::{Lab, Topology},
    variants::PAIR,
};

/// What `wharf run` needs, as setpriv(1) calls it.
const NEEDED: [&str; 3] = ["bpf", "net_admin", "perfmon"];

// Their numbers (include/uapi/linux/capability.h).
const DAC_OVERRIDE: u64 = 1 << 1;
const DAC_READ_SEARCH: u64 = 1 << 2;
const NET_ADMIN: u64 = 1 << 12;

/// What every thread of an agent has, by the names of `/proc/PID/status`.
fn privileges(agent: &Agent) -> BTreeMap<String, BTreeSet<u64>> {
    let mut found: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for thread in fs::read_dir(Path::new("/proc").join(agent.pid().to_string()).join("task")).unwrap() {
        // It may be over by now.
        let Ok(text) = fs::read_to_string(thread.unwrap().path().join("status")) else { continue };
        for (name, value) in text.lines().filter_map(|line| line.split_once(":\t")) {
            if name.starts_with("Cap") || name == "NoNewPrivs" {
                found.entry(name.to_owned()).or_default().insert(u64::from_str_radix(value, 16).unwrap());
            }
        }
    }
    found
}

/// No thread has anything but this, or can get it.
#[track_caller]
fn expect_no_more_than(agent: &Agent, expected: u64) {
    let found = privileges(agent);
    for set in ["CapPrm", "CapEff"] {
        // The agent's own, those that read files, and the one that ends sockets.
        let allowed = [expected, expected & DAC_READ_SEARCH, NET_ADMIN];
        assert!(found[set].contains(&expected), "{set} of {found:x?}");
        assert!(found[set].iter().all(|it| allowed.contains(it)), "{set} of {found:x?}");
    }
    for (set, expected) in [("CapInh", 0), ("CapAmb", 0), ("NoNewPrivs", 1)] {
        assert_eq!(found[set], BTreeSet::from([expected]), "{set}");
    }
}

#[test]
fn an_ordinary_user_with_three_capabilities_balances_reloads_attaches_and_starts_again() {
    for variant in PAIR {
        let mut cluster = variant.layout.clone().up();
        let pods: Vec<_> = cluster.node(1).pods().iter().chain(cluster.node(2).pods()).collect();
        let servers: Vec<_> = pods.iter().map(|pod| pod.serve(8080)).collect();
        let services = file([Service::new(1).endpoints(pods.iter().copied())]);
        let count = pods.len();
        let home = Home::of_nobody(&services, &NEEDED);
        let mut agent = Agent::start_at(home, cluster.node(1), &["--xdp", variant.xdp]);
        expect_no_more_than(&agent, NET_ADMIN);
        for vip in vips(1) {
            assert_eq!(cluster.client().get_many(vip, 4 * count, 1).answers.len(), count);
        }
        // A device that comes later, and the pod behind it.
        cluster.add_pod(1);
        let pod = cluster.node(1).pods().last().unwrap();
        let server = pod.serve(8080);
        eventually("the new pod's device is attached to", || agent.status()["podInterfaces"]["attached"] == 3);
        agent.apply(&file([Service::new(1).endpoints([pod])]));
        for vip in vips(1) {
            assert_eq!(cluster.client().get_many(vip, 4, 1).answers, BTreeMap::from([(pod.name().to_owned(), 4)]));
        }
        let conversations = vips(1).map(|vip| cluster.client().converse(vip, 5));
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            agent.signal(signal);
            agent.wait();
            agent = agent.restart_on(cluster.node(1), &["--xdp", variant.xdp]);
            expect_no_more_than(&agent, NET_ADMIN);
        }
        for conversations in conversations {
            assert_eq!(conversations.stuck(tests::SOON), Vec::<&str>::new());
        }
        drop((server, servers));
    }
}

#[test]
fn an_ordinary_user_leaves_nothing() {
    let lab = Topology::new().backends(1).up();
    let forwarding = || sysctl(&lab, "ipv4/conf/eth-b1/forwarding");
    let home = Home::of_nobody("services: []", &NEEDED);
    let pins = home.path().join("bpf");
    let mut agent = Agent::launch_at(home, &lab, &["--keep=false"]).ready();
    assert!(forwarding() == "1" && has_directories(&pins));
    agent.signal(Signal::SIGTERM);
    assert!(agent.wait().success());
    assert!(forwarding() == "0" && !has_directories(&pins));
    lab.lb().assert_no_programs();
}

#[test]
fn root_keeps_no_more_than_an_ordinary_user() {
    let lab = Topology::new().backends(1).up();
    let agent = Agent::start(&lab, "services: []", &[]);
    expect_no_more_than(&agent, NET_ADMIN);
    assert_eq!(privileges(&agent)["CapBnd"], BTreeSet::from([0]));
    assert!(agent.log().contains("from now on CAP_NET_ADMIN; dropped for good: CAP_BPF, CAP_PERFMON and"));
    agent.apply("services: [] # changed");
    expect_no_more_than(&agent, NET_ADMIN);
}

#[test]
fn root_goes_on_reading_a_services_file_that_is_somebody_elses() {
    let lab = Topology::new().backends(1).up();
    let home = Home::new("services: []");
    let path = home.services();
    give_away(&path);
    let agent = Agent::launch_at(home, &lab, &[]).ready();
    expect_no_more_than(&agent, NET_ADMIN | DAC_READ_SEARCH);
    assert!(agent.log().contains("CAP_DAC_READ_SEARCH stays because"), "{}", agent.log());
    agent.wait_until_applied(|| {
        fs::write(path.with_extension("new"), file([Service::new(1)])).unwrap();
        give_away(&path.with_extension("new"));
        fs::set_permissions(path.with_extension("new"), Permissions::from_mode(0o600)).unwrap();
        fs::rename(path.with_extension("new"), &path).unwrap();
    });
}

#[test]
fn root_goes_on_writing_to_a_directory_that_is_somebody_elses() {
    let lab = Topology::new().backends(1).up();
    let home = Home::new("services: []");
    give_away(home.path());
    let socket = home.admin();
    let mut agent = Agent::launch_at(home, &lab, &["--keep=false"]).ready();
    expect_no_more_than(&agent, NET_ADMIN | DAC_OVERRIDE | DAC_READ_SEARCH);
    agent.signal(Signal::SIGTERM);
    assert!(agent.wait().success() && !socket.exists());
}

#[test]
fn what_was_run_by_ip_netns_exec_removes_its_pins_without_the_privilege_to_look_for_them() {
    if let Err(error) = fs::metadata("/proc/1/root/sys") {
        // As in a container: wharf can't look there either, and mounts a BPF file system that goes with the agent.
        println!("skipped: nobody here may see the file systems of process 1: {error}");
        return;
    }
    let lab = Topology::new().backends(1).up();
    let mut agent = Agent::launch_at(Home::of_netns_exec("services: []", lab.lb()), &lab, &["--keep=false"]).ready();
    expect_no_more_than(&agent, NET_ADMIN);
    let directory = lab.lb().namespace().directory();
    let pins = || {
        Path::new("/sys/fs/bpf/wharf")
            .read_dir()
            .into_iter()
            .flatten()
            .flatten()
            .any(|layout| layout.path().join(&directory).exists())
    };
    assert!(pins());
    agent.signal(Signal::SIGTERM);
    assert!(agent.wait().success());
    assert!(!pins());
    lab.lb().assert_no_programs();
}

#[test]
fn each_capability_that_is_missing_is_named_before_anything_is_changed() {
    let lab = Topology::new().backends(1).up();
    for (missing, name, why) in [
        ("bpf", "CAP_BPF", "loads no programs"),
        ("net_admin", "CAP_NET_ADMIN", "attaches to nothing"),
        ("perfmon", "CAP_PERFMON", "the verifier refuses"),
    ] {
        let others: Vec<_> = NEEDED.into_iter().filter(|it| *it != missing).collect();
        let home = Home::of_nobody("services: []", &others);
        let (pins, directory) = (home.path().join("bpf"), home.path().to_owned());
        let mut agent = Agent::launch_at(home, &lab, &[]);
        assert_eq!(agent.wait().code(), Some(1));
        let log = agent.log();
        assert!(log.contains(&format!("error: {name} is missing, without which ")) && log.contains(why), "{log}");
        assert!(
            !NEEDED.iter().any(|it| *it != missing && log.contains(&format!("CAP_{} is missing", it.to_uppercase())))
        );
        assert!(!has_directories(&pins));
        // No record of changes to the host, and no socket.
        let extension = |path: &Path| path.extension().map(|it| it.display().to_string());
        let files: Vec<_> = fs::read_dir(&directory).unwrap().filter_map(|it| extension(&it.unwrap().path())).collect();
        assert!(!files.iter().any(|it| it == "json" || it == "sock"), "{files:?}");
        assert_eq!((lab.lb().programs(), sysctl(&lab, "ipv4/conf/eth-b1/forwarding").as_str()), (Vec::new(), "0"));
    }
}

#[test]
fn a_place_for_pins_that_is_somebody_elses_is_refused_with_the_remedy() {
    let lab = Topology::new().up();
    let home = Home::of_nobody("services: []", &NEEDED);
    nix::unistd::chown(&home.path().join("bpf"), Some(0.into()), None).unwrap();
    let mut agent = Agent::launch_at(home, &lab, &[]);
    assert_eq!(agent.wait().code(), Some(1));
    assert!(agent.log().contains("it belongs to another user: `chown -R`"), "{}", agent.log());
}

/// Whether anything is pinned; the kernel has files of its own there.
fn has_directories(bpffs: &Path) -> bool {
    fs::read_dir(bpffs).unwrap().any(|entry| entry.unwrap().path().is_dir())
}

fn sysctl(lab: &Lab, key: &str) -> String {
    let path = Path::new("/proc/sys/net").join(key);
    lab.lb().namespace().run(|| fs::read_to_string(path)).unwrap().trim().to_owned()
}
