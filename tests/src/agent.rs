//! The real agent, run on a lab's balancer.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output},
    sync::Arc,
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::NamedTempFile;

use crate::{
    cluster::Node,
    home::Home,
    poll,
    topology::{Host, Lab},
};

/// How long the agent may take to start, to take up an edit, or to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// An agent; killed when this is dropped, and with the last one of its home all goes that agents leave. To be held by the thread that started it (see [`crate::netns::NetNs::command`]).
#[derive(Debug)]
pub struct Agent {
    process: Child,
    /// Removes what outlives the agent.
    cleanup: Command,
    log: NamedTempFile,
    home: Arc<Home>,
}

impl Agent {
    /// Runs `wharf` on all interfaces of the balancer, and waits until the services are in force.
    #[track_caller]
    pub fn start(lab: &Lab, services: &str, arguments: &[&str]) -> Self {
        Self::launch(lab, services, arguments).ready()
    }

    /// Runs `wharf` on these interfaces of the balancer, and waits until the services are in force.
    #[track_caller]
    pub fn start_by(lab: &Lab, names: &[&str], services: &str, arguments: &[&str]) -> Self {
        let arguments = [interfaces(names.iter().copied()), arguments.to_vec()].concat();
        Self::launch_in(Home::new(services), lab.lb(), &arguments).ready()
    }

    /// Runs `wharf` on all interfaces of the balancer, and waits for nothing.
    #[track_caller]
    pub fn launch(lab: &Lab, services: &str, arguments: &[&str]) -> Self {
        Self::launch_at(Home::new(services), lab, arguments)
    }

    /// Runs `wharf` on all interfaces of the balancer, in the way of this home, and waits for nothing.
    #[track_caller]
    pub fn launch_at(home: Home, lab: &Lab, arguments: &[&str]) -> Self {
        Self::launch_in(home, lab.lb(), &[interfaces(lab.lb().interfaces()), arguments.to_vec()].concat())
    }

    /// Runs `wharf` once more, with the services file and the admin socket of this agent.
    #[track_caller]
    pub fn launch_another(&self, lab: &Lab, arguments: &[&str]) -> Self {
        self.relaunch(lab.lb(), &[interfaces(lab.lb().interfaces()), arguments.to_vec()].concat())
    }

    /// Runs `wharf` once more in place of this agent, which has ended, with its services file and its admin socket.
    #[track_caller]
    pub fn relaunch(&self, host: &Host, arguments: &[&str]) -> Self {
        Self::launch_in(Arc::clone(&self.home), host, arguments)
    }

    /// Runs `wharf`, or `$WHARF_OTHER_BIN` where that is set, on a node in place of this agent, and waits until the services are in
    /// force.
    #[track_caller]
    pub fn restart_on(&self, node: &Node, arguments: &[&str]) -> Self {
        let binary = env::var_os("WHARF_OTHER_BIN").map_or_else(|| self.home.binary().to_owned(), PathBuf::from);
        let arguments = [on(node), arguments.to_vec()].concat();
        Self::launch_binary(&binary, Arc::clone(&self.home), node.host(), &arguments).ready()
    }

    /// Runs `wharf` on a node, on its uplinks and facing its pods, and waits until the services are in force.
    #[track_caller]
    pub fn start_on(node: &Node, services: &str, arguments: &[&str]) -> Self {
        Self::start_at(Home::new(services), node, arguments)
    }

    /// Runs `wharf` on a node, in the way of this home, and waits until the services are in force.
    #[track_caller]
    pub fn start_at(home: Home, node: &Node, arguments: &[&str]) -> Self {
        Self::launch_in(home, node.host(), &[on(node), arguments.to_vec()].concat()).ready()
    }

    /// Runs `wharf` on a node, on its uplinks and told of nothing else, and waits until the services are in force.
    #[track_caller]
    pub fn start_by_default(home: Home, node: &Node) -> Self {
        let arguments = [&on_uplinks(node)[..], &["--node-name", node.host().name()]].concat();
        Self::launch_in(home, node.host(), &arguments).ready()
    }

    fn launch_in(home: impl Into<Arc<Home>>, host: &Host, arguments: &[&str]) -> Self {
        let home = home.into();
        let binary = home.binary().to_owned();
        Self::launch_binary(&binary, home, host, arguments)
    }

    fn launch_binary(binary: &Path, home: Arc<Home>, host: &Host, arguments: &[&str]) -> Self {
        let log = NamedTempFile::new_in(home.path()).expect("the directory is ours");
        let mut command = home.command(binary, host, "run");
        let output = log.reopen().and_then(|file| Ok((file.try_clone()?, file))).expect("there are descriptors left");
        command.args(home.source()).stdout(output.0).stderr(output.1);
        // What a machine with little memory would have: many agents run at one time.
        command.args(["--max-flows", "65536"]);
        // The labs' veth pairs are made to be cards, which `auto` can't know.
        if !arguments.contains(&"--xdp") {
            command.args(["--xdp", "native"]);
        }
        let process = command.args(arguments).spawn().expect("it can be run");
        Self { process, cleanup: home.command(binary, host, "cleanup"), log, home }
    }

    /// Waits until the services are in force.
    #[track_caller]
    pub fn ready(mut self) -> Self {
        let ready = poll(PATIENCE, || {
            let ended = self.process.try_wait().expect("it is our child").is_some();
            (ended || self.revision().is_some()).then_some(!ended)
        });
        assert!(ready == Some(true), "the agent does not start");
        self
    }

    /// Replaces the services file, as an editor or a configuration tool does it.
    pub fn edit(&self, services: &str) {
        let new = self.services_file().with_extension("new");
        fs::write(&new, services).expect("the directory is ours");
        fs::rename(&new, self.services_file()).expect("the directory is ours");
    }

    /// Writes over the services file, so that for a moment it is half written.
    pub fn edit_in_place(&self, services: &str) {
        fs::write(self.services_file(), services).expect("the directory is ours");
    }

    /// Removes the services file.
    pub fn remove_services(&self) {
        fs::remove_file(self.services_file()).expect("nobody else removes it");
    }

    /// Replaces the services file and waits until it is in force.
    #[track_caller]
    pub fn apply(&self, services: &str) {
        self.wait_until_applied(|| self.edit(services));
    }

    /// Does something that makes the agent apply the services file, and waits until it has.
    #[track_caller]
    pub fn wait_until_applied(&self, cause: impl FnOnce()) {
        let before = self.revision().expect("it answers");
        cause();
        let applied = poll(PATIENCE, || self.revision().filter(|revision| *revision > before));
        assert!(applied.is_some(), "the agent does not take up the services file");
    }

    /// What `wharf status -o json` says.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.ask("status")
    }

    /// What `wharf <view> -o json` says, `view` being `status`, `services` or `backends`.
    #[track_caller]
    pub fn ask(&self, view: &str) -> Value {
        let output = self.cli(&[view, "-o", "json"]);
        assert!(output.status.success(), "wharf {view}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("it says that this is JSON")
    }

    /// How many packets met this fate.
    #[track_caller]
    pub fn count(&self, reason: &str) -> u64 {
        let status = self.status();
        let counter = status["counters"].as_array().into_iter().flatten().find(|counter| counter["name"] == reason);
        counter.and_then(|counter| counter["packets"].as_u64()).unwrap_or_else(|| panic!("no counter {reason}"))
    }

    /// Runs the command line tool against this agent.
    pub fn cli(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(binary());
        command.args(arguments).arg("--admin").arg(self.admin_socket());
        command.output().expect("`binary` looked that it is there")
    }

    /// What the agent has written to its standard output and error.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log.path()).expect("it goes with `self`")
    }

    /// The services file that it follows.
    pub fn services_file(&self) -> PathBuf {
        self.home.services()
    }

    /// Where the command line tool reaches it.
    pub fn admin_socket(&self) -> PathBuf {
        self.home.admin()
    }

    /// The agent's process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends a signal to the agent.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process.id()).expect("a process id is a positive i32");
        signal::kill(Pid::from_raw(pid), signal).expect("it has not been waited for");
    }

    /// Runs `wharf cleanup` where the agent was.
    pub fn cleanup(&mut self) -> Output {
        self.cleanup.output().expect("`binary` looked that it is there")
    }

    /// Waits until the agent has ended.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        poll(PATIENCE, || self.process.try_wait().expect("it is our child")).expect("the agent does not end")
    }

    /// Asks the agent to end, and expects that it does so with success.
    #[track_caller]
    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert!(status.success(), "the agent ended with {status}");
    }

    /// How many times services were put in force; `None` if the agent does not answer.
    fn revision(&self) -> Option<u64> {
        let output = self.cli(&["status", "-o", "json"]);
        serde_json::from_slice::<Value>(&output.stdout).ok()?.get("revision")?.as_u64()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Both fail if it has ended, which is what they are for.
        let _ = self.process.kill();
        let _ = self.process.wait();
        // Another one may still run with what this one left.
        if Arc::strong_count(&self.home) == 1 {
            let _ = self.cleanup();
        }
        if thread::panicking() {
            eprintln!("the agent said:\n{}", self.log());
        }
    }
}

/// What an agent is told on a node.
fn on(node: &Node) -> Vec<&str> {
    let own = ["--pod-interface", node.pod_interfaces(), "--node-name", node.host().name()];
    [on_uplinks(node), own.to_vec()].concat()
}

fn on_uplinks(node: &Node) -> Vec<&str> {
    interfaces(node.uplinks().iter().copied())
}

fn interfaces<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    names.flat_map(|name| ["--interface", name]).collect()
}

/// The binary under test: `$WHARF_BIN`, or the one that cargo built beside the running one.
pub fn binary() -> PathBuf {
    if let Some(path) = env::var_os("WHARF_BIN") {
        return path.into();
    }
    let own = env::current_exe().expect("/proc is mounted");
    // Tests lie in `deps`, a directory below.
    let mut candidates = own.ancestors().skip(1).take(2).map(|directory| directory.join("wharf"));
    candidates.find(|path| path.exists()).unwrap_or_else(|| panic!("no agent: cargo build -p lb-userspace --bin wharf"))
}
