//! What the agent tells a service manager, as systemd runs it.
#![expect(clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::os::unix::net::UnixDatagram;

use nix::sys::signal::Signal;
use tests::{
    SOON,
    agent::Agent,
    apiserver::{ApiServer, objects::node},
    home::Home,
    topology::Topology,
};

/// The lines of the next message.
#[track_caller]
fn next(manager: &UnixDatagram) -> Vec<String> {
    let mut bytes = [0; 4096];
    let length = manager.recv(&mut bytes).unwrap();
    String::from_utf8_lossy(bytes.get(..length).unwrap()).lines().map(str::to_owned).collect()
}

/// Changes of a cluster come by themselves: there is nothing to read again.
#[test]
fn a_reload_of_an_agent_that_follows_a_cluster_is_over_at_once() {
    let lab = Topology::new().up();
    let server = lab.lb().namespace().run(ApiServer::start);
    let mut home = Home::of_cluster(&server);
    let manager = home.listen();
    manager.set_read_timeout(Some(SOON)).unwrap();
    server.apply(node("here"));
    let agent = Agent::launch_at(home, &lab, &["--node-name", "here"]);
    assert!(next(&manager).iter().any(|line| line.contains("not told all services yet")));
    assert_eq!(next(&manager), ["READY=1", "STATUS=balancing; services: 0"]);
    for _ in 0..2 {
        agent.signal(Signal::SIGHUP);
        assert!(next(&manager).iter().any(|line| line == "RELOADING=1"));
        assert_eq!(next(&manager), ["READY=1", "STATUS=balancing; services: 0"]);
    }
    agent.stop();
}

#[test]
fn a_service_manager_is_told_of_start_reload_and_end() {
    let lab = Topology::new().up();
    let mut home = Home::of_nobody("services: []", &["bpf", "net_admin", "perfmon"]);
    let manager = home.listen();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let mut agent = Agent::launch_at(home, &lab, &[]);
    assert_eq!(next(&manager), ["READY=1", "STATUS=balancing; services: 0"]);
    // Only now: what it says first is that it answers.
    agent = agent.ready();
    for (services, status) in [
        ("services: [{ name: web }]", "STATUS=balancing; services: 0, as they were before: "),
        ("services: []", "STATUS=balancing; services: 0"),
    ] {
        agent.edit(services);
        // Seen by itself, and by the reload.
        assert!(next(&manager).iter().any(|line| line.starts_with(status)));
        agent.signal(Signal::SIGHUP);
        let reloading = next(&manager);
        assert!(reloading.first().is_some_and(|it| it == "RELOADING=1"), "{reloading:?}");
        assert!(reloading.iter().any(|it| it.starts_with("MONOTONIC_USEC=")), "{reloading:?}");
        let ready = next(&manager);
        assert!(ready.first().is_some_and(|it| it == "READY=1"), "{ready:?}");
        assert!(ready.iter().any(|it| it.starts_with(status)) && ready.len() == 2, "{ready:?}");
    }
    agent.signal(Signal::SIGTERM);
    assert_eq!(next(&manager), ["STOPPING=1"]);
    assert!(agent.wait().success());
}
