//! The unit for systemd, as systemd runs it: installed, used and removed by the very commands of its README.
#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::{
    collections::BTreeMap,
    env, fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;
use tests::{
    SOON,
    agent::binary,
    poll,
    services::{Service, file, vips},
    topology::{Host, Lab, Topology},
    traffic::Conversations,
};

/// Where the unit is in the source tree.
const UNIT: &str = "deploy/systemd";

/// Where its README has the services file installed.
const SERVICES: &str = "/etc/wharf/services.yaml";

/// How it has the services file installed.
const READABLE: &str = "-m 0640 -g wharf";

/// What the tests' services file with a mistake has wrong.
const MISTAKE: &str = "services[0].addresses: missing";

#[test]
fn the_unit_does_what_its_readme_says() {
    if env::var_os("WHARF_OWN_MACHINE").is_none() {
        println!("skipped: this changes the machine. On one that is there for it: cargo xtask vm -- unit");
        return;
    }
    // Its interface is called as in the README.
    let lab = Topology::new().one_armed().backends(3).on_this_machine().up();
    let _servers = lab.serve(8080);
    let before = settings();
    let tree = Tree::new(&services(&lab, 1));
    tree.follow("Install");
    expect_balancing(1);
    expect_confined();
    let load = Load::begin(lab.client());
    load.expect_going_on(lab.client());
    file_is_taken_or_refused(&tree, &lab);
    stage("upgrade");
    tree.follow("Upgrade, or change options");
    expect_balancing(2);
    load.expect_going_on(lab.client());
    stage("kill");
    let killed = property("MainPID");
    systemctl(&["kill", "--signal=KILL", "wharf"]);
    eventually("it runs again", || property("SubState") == "running" && property("MainPID") != killed);
    assert_eq!(property("NRestarts"), "1", "{}", journal());
    expect_balancing(2);
    load.expect_going_on(lab.client());
    stage("stop");
    systemctl(&["stop", "wharf"]);
    load.expect_going_on(lab.client());
    stage("by hand, as root, and again by the unit");
    run_by_hand_and_kill();
    systemctl(&["start", "wharf"]);
    expect_balancing(2);
    load.expect_going_on(lab.client());
    load.expect_unharmed();
    stage("remove");
    tree.follow("Remove");
    expect_nothing_left(&before);
    for vip in vips(1) {
        assert!(lab.client().tcp(vip).is_err());
    }
}

/// The services file is changed, broken, hidden and put right.
fn file_is_taken_or_refused(tree: &Tree, lab: &Lab) {
    stage("reload");
    tree.replace(&services(lab, 2), READABLE);
    systemctl(&["reload", "wharf"]);
    expect_balancing(2);
    tree.replace("services: [{ name: web }]", READABLE);
    expect_refused(MISTAKE);
    tree.replace(&services(lab, 2), "-m 0600");
    expect_refused("Permission denied");
    tree.replace(&services(lab, 2), READABLE);
    systemctl(&["reload", "wharf"]);
    expect_balancing(2);
}

/// A reload fails, and everybody says why; what is in force stays.
#[track_caller]
fn expect_refused(why: &str) {
    let reload = Command::new("systemctl").args(["reload", "wharf"]).output().unwrap();
    assert!(!reload.status.success(), "{}", said(&reload));
    let status = || property("StatusText");
    eventually("systemd is told", || status().starts_with("balancing; services: 8, as they were before: "));
    assert!(status().contains(why), "{}", status());
    assert_eq!(property("SubState"), "running");
    assert!(ask("status")["servicesError"].as_str().unwrap().contains(why));
    let journal = journal();
    assert!(journal.contains(why) && journal.contains("Reload failed for wharf.service"), "{journal}");
}

/// Expects that something becomes so by itself; else says what the unit did instead.
#[track_caller]
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    assert!(poll(SOON, || is_so().then_some(())).is_some(), "not within {SOON:?}: {what}\n{}", journal());
}

/// So many services of the file are in force, and the unit and the agent know it.
#[track_caller]
fn expect_balancing(services: u8) {
    // For each family and protocol.
    let status = format!("balancing; services: {}", 4 * services);
    eventually("the services are in force", || property("StatusText") == status);
    assert_eq!([property("ActiveState"), property("SubState")], ["active", "running"], "{}", journal());
    let answer = ask("status");
    assert_eq!((&answer["servicesError"], &answer["unpinned"]), (&Value::Null, &Value::Null));
    assert_eq!(property("MainPID"), answer["pid"].to_string());
}

/// The agent is an ordinary user's with one capability, sees of pins what is its own, and has nothing to complain about.
#[track_caller]
fn expect_confined() {
    let process = Path::new("/proc").join(property("MainPID"));
    let status = fs::read_to_string(process.join("status")).unwrap();
    // CAP_NET_ADMIN, and filters of system calls.
    for line in ["CapPrm:\t0000000000001000", "CapEff:\t0000000000001000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    let user = fs::metadata(&process).unwrap().uid();
    assert_ne!(user, 0);
    for path in ["/run/wharf", "/sys/fs/bpf/wharf"] {
        let metadata = fs::metadata(path).unwrap();
        assert_eq!((metadata.uid(), metadata.mode() & 0o7777), (user, 0o700), "{path}");
    }
    let seen = fs::read_dir(process.join("root/sys/fs/bpf")).unwrap();
    assert_eq!(seen.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>(), ["wharf"]);
    let journal = journal();
    // The lab's uplink is a veth, which is told: XDP is not for it.
    let is_complaint =
        |line: &&str| (line.contains(" WARN ") || line.contains(" ERROR ")) && !line.contains("eth0 is a veth");
    assert_eq!(journal.lines().filter(is_complaint).collect::<Vec<_>>(), Vec::<&str>::new());
}

/// An agent takes over from the unit that runs as root, and leaves files of its own.
#[track_caller]
fn run_by_hand_and_kill() {
    let mut wharf = Command::new("wharf");
    let mut agent = wharf.args(["run", "--interface", "eth0", "--services", SERVICES]).spawn().unwrap();
    eventually("it answers", || Command::new("wharf").arg("status").output().unwrap().status.success());
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert_eq!(fs::metadata("/run/wharf/admin.sock").unwrap().uid(), 0);
}

/// The machine is as it was.
#[track_caller]
fn expect_nothing_left(settings_before: &BTreeMap<PathBuf, String>) {
    assert_eq!(settings(), *settings_before);
    for path in ["/sys/fs/bpf/wharf", "/run/wharf", "/etc/wharf", "/usr/local/bin/wharf"] {
        assert!(!Path::new(path).exists(), "{path}");
    }
    assert_eq!([property("LoadState"), property("ActiveState")], ["not-found", "inactive"]);
}

/// A services file with so many, of all backends.
fn services(lab: &Lab, count: u8) -> String {
    file((1..=count).map(|k| Service::new(k).endpoints(lab.backends())))
}

/// What a source tree has that the README's commands need.
struct Tree(TempDir);

impl Tree {
    fn new(services: &str) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for folder in ["target/release", "deploy"] {
            fs::create_dir_all(tree.0.path().join(folder)).unwrap();
        }
        symlink(binary(), tree.0.path().join("target/release/wharf")).unwrap();
        symlink(source.join(UNIT), tree.0.path().join(UNIT)).unwrap();
        tree.write(services);
        tree
    }

    /// The services file that is to be installed.
    fn write(&self, services: &str) {
        fs::write(self.0.path().join("services.yaml"), services).unwrap();
    }

    /// Does what the README says first below a heading.
    #[track_caller]
    fn follow(&self, heading: &str) {
        let text = fs::read_to_string(self.0.path().join(UNIT).join("README.md")).unwrap();
        let (_, section) = text.split_once(&format!("\n## {heading}\n")).unwrap();
        let (_, commands) = section.split_once("```sh\n").unwrap();
        self.shell(commands.split_once("```").unwrap().0);
    }

    /// Puts another services file in the place of the installed one.
    #[track_caller]
    fn replace(&self, services: &str, how: &str) {
        self.write(services);
        self.shell(&format!("install {how} services.yaml {SERVICES}.new && mv {SERVICES}.new {SERVICES}"));
    }

    #[track_caller]
    fn shell(&self, commands: &str) {
        expect_success(Command::new("sh").args(["-euxc", commands]).current_dir(self.0.path()));
    }
}

/// What a command prints, which has to succeed.
#[track_caller]
fn expect_success(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}\n{}\n{}", output.status, said(&output), journal());
    String::from_utf8(output.stdout).unwrap()
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text)).concat()
}

#[track_caller]
fn systemctl(arguments: &[&str]) -> String {
    expect_success(Command::new("systemctl").args(arguments))
}

/// What systemd says of the unit.
#[track_caller]
fn property(name: &str) -> String {
    systemctl(&["show", "--value", "--property", name, "wharf"]).trim().to_owned()
}

/// What is logged of the unit.
fn journal() -> String {
    said(&Command::new("journalctl").args(["--no-pager", "--output=short-monotonic", "--unit=wharf"]).output().unwrap())
}

/// What the installed command line tool says of the agent.
#[track_caller]
fn ask(view: &str) -> Value {
    serde_json::from_str(&expect_success(Command::new("wharf").args([view, "-o", "json"]))).unwrap()
}

/// Says what follows, and when that is: it may take long.
fn stage(what: &str) {
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    println!("{} s: {what}", uptime.split('.').next().unwrap());
}

/// One connection of each family that stays open: traffic is what a slow machine has the least time for.
struct Load(Vec<Conversations>);

impl Load {
    fn begin(client: &Host) -> Self {
        Self(vips(1).iter().map(|vip| client.converse(vip, 1)).collect())
    }

    /// The connections get answers, and so do new ones.
    #[track_caller]
    fn expect_going_on(&self, client: &Host) {
        for (conversations, vip) in self.0.iter().zip(vips(1)) {
            assert_eq!(conversations.stuck(SOON), Vec::<&str>::new(), "{}", journal());
            assert_eq!(client.get_many(vip, 6, 1).answers.into_values().collect::<Vec<_>>(), [2, 2, 2]);
        }
    }

    /// Ends it: nothing has ever failed.
    #[track_caller]
    fn expect_unharmed(self) {
        self.0.into_iter().for_each(Conversations::expect_unharmed);
    }
}

/// The kernel's settings of interfaces, and of ports.
fn settings() -> BTreeMap<PathBuf, String> {
    let below = |path: &Path| fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let families = ["/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv6/conf"].map(Path::new);
    let files = families.into_iter().flat_map(below).flat_map(|interface| below(&interface));
    let ports = PathBuf::from("/proc/sys/net/ipv4/ip_local_reserved_ports");
    // Some can only be written.
    files.chain([ports]).filter_map(|file| Some((file.clone(), fs::read_to_string(file).ok()?))).collect()
}
