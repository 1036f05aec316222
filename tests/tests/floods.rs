//! Forged SYNs in masses, and what they do not do to those who mean it.

use std::time::Duration;

use tests::{
    SOON, eventually,
    flood::Flood,
    poll, raise_descriptor_limit,
    services::{PORT, Service, TARGET_PORT, cluster_ips, file},
    traffic::Conversations,
    variants::PAIR,
};

/// How many connections the agent is to remember.
const MAX_FLOWS: u32 = 4_096;

/// And how many that have not been answered.
const MAX_PENDING_FLOWS: u32 = 2_048;

/// How many SYNs a second come to each address.
const RATE: u32 = 10_000;

#[test]
fn a_flood_of_ten_times_the_tables_breaks_none_of_a_thousand_connections() {
    raise_descriptor_limit();
    for variant in PAIR {
        let cluster = variant.layout.clone().up();
        let endpoints = [cluster.pod(1, 1), cluster.pod(2, 1)];
        let _servers = endpoints.map(|pod| pod.serve(TARGET_PORT));
        let sizes = ["--max-flows", &MAX_FLOWS.to_string(), "--max-pending-flows", &MAX_PENDING_FLOWS.to_string()];
        let services = file([Service::new(1).endpoints(endpoints)]);
        let agent = variant.start(cluster.node(1), &services, &sizes);
        let places = cluster_ips(1).map(|ip| (ip, PORT));

        let conversations = places.map(|to| cluster.client().converse(to, 500));
        let stuck = |limit| conversations.iter().flat_map(|all: &Conversations| all.stuck(limit)).count();
        assert_eq!(stuck(Duration::from_secs(5)), 0, "all talk before the flood");

        let floods = places.map(|to| cluster.client().flood(to, RATE));
        let enough = 10 * MAX_FLOWS;
        let limit = Duration::from_secs(60);
        let is_sent = || floods.iter().all(|flood| flood.sent() >= enough).then_some(());
        let mut looks = 0;
        while poll(Duration::from_secs(1), is_sent).is_none() {
            looks += 1;
            assert!(limit > looks * Duration::from_secs(1), "the machine is too slow for this flood");
            assert_eq!(stuck(SOON), 0, "all talk during the flood");
        }
        assert!(floods.map(Flood::finish).into_iter().all(|sent| sent >= enough));

        assert_eq!(stuck(SOON), 0, "all talk after the flood");
        for outcome in conversations.into_iter().flat_map(Conversations::finish) {
            assert!(outcome.end.is_ok(), "{outcome:?}");
        }
        for to in places {
            eventually("new connections are served", || cluster.client().tcp(to).is_ok());
        }
        agent.stop();
    }
}
