//! Plays the scenarios of `tests/scenarios`: what happens to the objects of a cluster and to its API server, and who answers then.
//!
//! A scenario is a list of steps. Each does what its fields say in this order, and what it expects has to be so within seconds:
//!
//! | field | |
//! |---|---|
//! | `what` | what happens |
//! | `server` | what happens to the API server: [`Trouble`] |
//! | `delete` | objects that are deleted, as `Kind namespace/name` |
//! | `apply` | objects that are created or replaced, seen at once by those who watch |
//! | `answers` | by address and port, the hosts that answer, all of them and no others |
//! | `refused` | addresses and ports where somebody says at once that there is nobody |
//! | `unanswered` | addresses and ports where nobody answers, whatever else happens |
//! | `services` | how many services are in force: ports of one protocol in one IP family |
//! | `logs` | what the agent's log says |
//! | `stays` | for how long all of that has to stay so, in milliseconds |
//!
//! The agent runs on the node `here`, in zone `a`; around it are the hosts of [`Topology`]: backends `b1` (`10.1.0.2`, `fd00:1::2`) to `b3`,
//! which serve port 8080, and a client that is no pod. When all is played, what is left is deleted, and every map has to be empty then.
#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "this is test code: it fails by panicking"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Trial};
use serde::Deserialize;
use serde_json::{Value, json};
use tests::{
    agent::Agent,
    apiserver::{ApiServer, objects::node},
    home::Home,
    poll,
    probe::Fate,
    services::TARGET_PORT,
    topology::{Lab, Topology},
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    what: String,
    #[serde(default)]
    server: Vec<Trouble>,
    #[serde(default)]
    delete: Vec<String>,
    #[serde(default)]
    apply: Vec<Value>,
    #[serde(default)]
    answers: BTreeMap<SocketAddr, BTreeSet<String>>,
    #[serde(default)]
    refused: Vec<SocketAddr>,
    #[serde(default)]
    unanswered: Vec<SocketAddr>,
    services: Option<u64>,
    #[serde(default)]
    logs: String,
    #[serde(default)]
    stays: u64,
}

/// What happens to the API server.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Trouble {
    /// Watches end as those do that have lasted long enough.
    CloseStreams,
    /// Watches end in the middle of a chunk.
    BreakStreams,
    /// What has changed until now is forgotten: a watch from an old version is told 410, inside of a 200.
    ForgetHistory,
    /// From now on it is told 410 at once.
    RefuseOldVersionsPlainly,
    /// The next three requests fail with 500.
    Fail,
    /// The next two are too many.
    TooManyRequests,
    /// Watches are as they should be, but say nothing any more.
    Stall,
    /// Each object takes its time.
    Slow,
    /// Stalled or slow no more.
    Resume,
    /// Nobody listens.
    Stop,
    /// Somebody does, who knows all objects, and no history.
    StartAgain,
    /// Endpoint slices may not be listed.
    ForbidSlices,
    /// All may be.
    PermitAll,
}

/// Longer than an agent waits between two attempts to reach its server.
const PATIENCE: Duration = Duration::from_secs(60);

struct Play {
    lab: Lab,
    server: ApiServer,
    agent: Agent,
    /// What was applied: kind, namespace and name.
    objects: BTreeSet<[String; 3]>,
}

fn main() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let trial = |path: &Path| {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(path).unwrap();
        Trial::test(name, move || {
            play(&text);
            Ok(())
        })
    };
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let trials: Vec<_> = files.map(|path| trial(&path)).collect();
    assert!(!trials.is_empty(), "there are no scenarios");
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn play(text: &str) {
    let steps: Vec<Step> = serde_saphyr::from_str(text).unwrap();
    let lab = Topology::new().backends(3).up();
    let _servers = lab.serve(TARGET_PORT);
    let server = lab.lb().namespace().run(ApiServer::start);
    server.apply(node("here").zone("a"));
    // All is made anew every now and then, too, and found to be the same.
    let arguments = ["--node-name", "here", "--config-sync-period", "1s"];
    let agent = Agent::launch_at(Home::of_cluster(&server), &lab, &arguments).ready();
    let mut play = Play { lab, server, agent, objects: BTreeSet::new() };
    for step in &steps {
        play.step(step);
    }
    play.end();
}

impl Play {
    fn step(&mut self, step: &Step) {
        step.server.iter().for_each(|&trouble| self.trouble(trouble));
        for object in &step.delete {
            let key = object.split([' ', '/']).map(str::to_owned).collect::<Vec<_>>();
            let key: [String; 3] = key.try_into().unwrap_or_else(|_| panic!("{object} is not `Kind namespace/name`"));
            self.objects.remove(&key);
            self.delete(&key);
        }
        self.objects.extend(step.apply.iter().map(key));
        self.server.apply_all(step.apply.clone());
        let mut difference = None;
        let is_so = || {
            difference = self.difference(step);
            difference.is_none().then_some(())
        };
        assert!(poll(PATIENCE, is_so).is_some(), "{}: {}\n{}", step.what, difference.unwrap(), self.agent.log());
        let until = Instant::now() + Duration::from_millis(step.stays);
        while Instant::now() < until {
            if let Some(difference) = self.difference(step) {
                panic!("{}, and then: {difference}\n{}", step.what, self.agent.log());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What is not as a step expects it.
    fn difference(&self, step: &Step) -> Option<String> {
        let client = self.lab.client();
        for (address, hosts) in &step.answers {
            let seen = client.meet_all(address);
            let answered: BTreeSet<_> = seen.answers.keys().cloned().collect();
            if !seen.errors.is_empty() || answered != *hosts {
                return Some(format!("at {address}: {seen:?}"));
            }
        }
        for address in &step.refused {
            let [fate, _] = client.fates(address);
            if fate != Fate::Refused {
                return Some(format!("at {address}: {fate:?}"));
            }
        }
        for address in &step.unanswered {
            let [fate, _] = client.fates(address);
            if let Fate::Answered(_) = fate {
                return Some(format!("at {address}: {fate:?}"));
            }
        }
        if !self.agent.log().contains(&step.logs) {
            return Some(format!("the log does not say {:?}", step.logs));
        }
        let services = || self.agent.status()["services"].as_u64();
        let is_other = |&expected: &u64| services() != Some(expected);
        step.services.filter(is_other).map(|_| format!("services: {:?}", services()))
    }

    fn trouble(&self, trouble: Trouble) {
        let server = &self.server;
        match trouble {
            Trouble::CloseStreams => server.close_streams(),
            Trouble::BreakStreams => server.break_streams(),
            Trouble::ForgetHistory => server.compact(),
            Trouble::RefuseOldVersionsPlainly => server.refuse_old_versions_plainly(),
            Trouble::Fail => server.fail(3, 500),
            Trouble::TooManyRequests => server.fail(2, 429),
            Trouble::Stall => server.stall(),
            Trouble::Slow => server.slow(Duration::from_millis(1)),
            Trouble::Resume => server.resume(),
            Trouble::Stop => server.stop(),
            Trouble::StartAgain => server.start_again(),
            Trouble::ForbidSlices => server.forbid("list", "endpointslices"),
            Trouble::PermitAll => server.permit_all(),
        }
    }

    fn delete(&self, [kind, namespace, name]: &[String; 3]) {
        self.server.delete(kind, namespace, name);
    }

    /// Deletes what is left; then there is nothing.
    fn end(self) {
        self.objects.iter().for_each(|key| self.delete(key));
        let used = || {
            let status = self.agent.status();
            let tables = status["tables"].as_array().unwrap().iter().filter(|it| it["used"] != 0).cloned();
            tables.filter(|it| !it["name"].as_str().unwrap().contains("flows")).collect::<Vec<_>>()
        };
        assert!(poll(PATIENCE, || used().is_empty().then_some(())).is_some(), "left: {:?}", used());
        assert_eq!(self.agent.ask("services"), json!([]));
        assert!(!self.agent.log().contains("bug"), "{}", self.agent.log());
        self.agent.stop();
    }
}

fn key(object: &Value) -> [String; 3] {
    let metadata = &object["metadata"];
    [&object["kind"], &metadata["namespace"], &metadata["name"]].map(|value| value.as_str().unwrap().to_owned())
}
