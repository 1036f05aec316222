//! All kinds of traffic of a node with pods: who is reached, and whom it sees.
//!
//! The agent runs on `n1`, with XDP on the uplinks and with tc alone.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use tests::{
    agent::Agent,
    cluster::{Cluster, Layout, PodNetwork, Uplinks},
    eventually,
    probe::{Fate, Seen},
    servers::Server,
    services::{PORT, Service, TARGET_PORT, cluster_ips, external_ips, file, load_balancer_ips, node_port},
    topology::Host,
    traffic::Conversations,
    variants::{PAIR, VARIANTS},
};

/// Services by what their only endpoint is, seen from `n1`.
const LOCAL: u8 = 1;
const REMOTE: u8 = 2;
const HOST: u8 = 3;
/// Another pod of the node.
const NEIGHBOUR: u8 = 4;

/// Whom a backend sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// The client, with its own port.
    Client,
    /// The node `n1`.
    Node,
}

/// The services above, reached by all that a service can be reached by.
fn services(cluster: &Cluster) -> String {
    file([LOCAL, REMOTE, HOST, NEIGHBOUR].map(|k| Service::new(k).everywhere().endpoint(endpoint(cluster, k))))
}

fn endpoint(cluster: &Cluster, service: u8) -> &Host {
    match service {
        LOCAL => cluster.pod(1, 1),
        REMOTE => cluster.pod(2, 1),
        HOST => cluster.node(1).host(),
        NEIGHBOUR => cluster.pod(1, 2),
        _ => unreachable!("there are four services"),
    }
}

fn serve(cluster: &Cluster) -> Vec<Server> {
    [LOCAL, REMOTE, HOST, NEIGHBOUR].map(|service| endpoint(cluster, service).serve(TARGET_PORT)).into()
}

/// All that a service is reached by.
fn frontends(cluster: &Cluster, service: u8) -> Vec<SocketAddr> {
    let with = |port: u16, addresses: Vec<IpAddr>| addresses.into_iter().map(move |ip| SocketAddr::new(ip, port));
    let own = [cluster_ips(service), external_ips(service), load_balancer_ips(service)].concat();
    let node = cluster.node(1).host().addresses().collect();
    with(PORT, own).chain(with(node_port(service), node)).collect()
}

/// What is wrong with how a client reaches a service; `None`: nothing.
fn mistake(cluster: &Cluster, client: &Host, to: SocketAddr, service: u8, source: Source) -> Option<String> {
    let place = format!("{} to {to}, service {service}", client.name());
    let seen = match client.exchange(to) {
        Ok(seen) => seen,
        Err(error) => return Some(format!("{place}: {error}")),
    };
    let is_right = |seen: &Seen| {
        let is_source = match source {
            Source::Client => {
                seen.client.port() == seen.own.port() && client.addresses().any(|own| own == seen.client.ip())
            }
            Source::Node => cluster.node(1).host().addresses().any(|own| own == seen.client.ip()),
        };
        seen.backend == endpoint(cluster, service).name() && is_source
    };
    let wrong = seen.iter().find(|seen| !is_right(seen))?;
    Some(format!("{place}: expected {source:?}, and {wrong:?}"))
}

#[track_caller]
fn assert_no_mistakes(mistakes: impl Iterator<Item = String>) {
    let mistakes: Vec<_> = mistakes.collect();
    assert!(mistakes.is_empty(), "{}", mistakes.join("\n"));
}

#[test]
fn a_client_outside_is_seen_by_backends_on_the_node_and_masqueraded_to_others() {
    for variant in VARIANTS {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let _agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        let rows = [(LOCAL, Source::Client), (REMOTE, Source::Node), (HOST, Source::Client)];
        assert_no_mistakes(rows.into_iter().flat_map(|(service, source)| {
            let to = frontends(&cluster, service);
            let cluster = &cluster;
            to.into_iter().filter_map(move |to| mistake(cluster, cluster.client(), to, service, source))
        }));
    }
}

#[test]
fn uplinks_that_are_veth_are_met_in_tc_unless_somebody_asks_for_xdp() {
    let cluster = Layout::new(PodNetwork::Bridged).uplinks(Uplinks::Veth).up();
    let _servers = serve(&cluster);
    let agent = Agent::start_on(cluster.node(1), &services(&cluster), &["--xdp", "auto"]);
    let uplink = &agent.status()["interfaces"][0];
    assert!(uplink["xdp"] == "off" && uplink["why"].as_str().unwrap().contains("is a veth"), "{uplink}");
    assert_no_mistakes([(LOCAL, Source::Client), (REMOTE, Source::Node)].into_iter().flat_map(|(service, source)| {
        let to = frontends(&cluster, service);
        let cluster = &cluster;
        to.into_iter().filter_map(move |to| mistake(cluster, cluster.client(), to, service, source))
    }));
}

#[test]
fn a_pod_is_seen_by_every_backend_but_itself() {
    for variant in VARIANTS {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let _agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        let in_cluster = |k| cluster_ips(k).map(|ip| SocketAddr::new(ip, PORT)).into();
        let rows: [(_, Vec<_>, _); 4] = [
            (NEIGHBOUR, in_cluster(NEIGHBOUR), Source::Client),
            (REMOTE, in_cluster(REMOTE), Source::Client),
            (HOST, in_cluster(HOST), Source::Client),
            // Itself: a hairpin. It would take no packet that says to come from it.
            (LOCAL, frontends(&cluster, LOCAL), Source::Node),
        ];
        assert_no_mistakes(rows.into_iter().flat_map(|(service, to, source)| {
            let cluster = &cluster;
            to.into_iter().filter_map(move |to| mistake(cluster, cluster.pod(1, 1), to, service, source))
        }));
    }
}

/// Where no hook of sockets sees to it, as the node's own sockets are not to be balanced or can't be.
#[test]
fn a_process_of_the_node_is_balanced_by_what_it_sends() {
    for variant in VARIANTS {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let agent = variant.start(cluster.node(1), &services(&cluster), &["--socket-lb", "off"]);
        let node = cluster.node(1).host();
        assert_no_mistakes([LOCAL, REMOTE, HOST].into_iter().flat_map(|service| {
            let cluster = &cluster;
            frontends(cluster, service)
                .into_iter()
                .filter_map(move |to| mistake(cluster, node, to, service, Source::Node))
        }));
        // A socket that is told nothing of its peer beforehand, and goes on from the same port.
        for ip in [LOCAL, REMOTE, HOST].into_iter().flat_map(cluster_ips) {
            let datagrams = node.udp((ip, PORT)).unwrap();
            assert_eq!(datagrams.ask("who?").unwrap(), datagrams.ask("who?").unwrap(), "{ip}");
        }
        // From one port, to a service and to its backend itself.
        let remote = endpoint(&cluster, REMOTE);
        for (vip, backend) in cluster_ips(REMOTE).into_iter().zip(remote.addresses()) {
            let by_service = node.tcp((vip, PORT)).unwrap();
            let straight = node.tcp((backend, TARGET_PORT)).unwrap();
            assert_eq!([by_service.backend(), straight.backend()], [remote.name(); 2]);
        }
        // A process that asks there has that address, to which the other node knows no way.
        let unknown = SocketAddr::from(([198, 51, 100, 77], node_port(REMOTE)));
        node.namespace().ip(&format!("addr add {}/32 dev lo", unknown.ip()));
        let answers = || node.tcp(unknown).is_ok_and(|connection| connection.backend() == remote.name());
        eventually("the new address has node ports", answers);
        for service in [LOCAL, REMOTE, HOST] {
            let tally = node.get_many((cluster_ips(service)[0], PORT), 300, 8);
            assert_eq!(
                (tally.of(endpoint(&cluster, service).name()), tally.errors),
                (300, vec![]),
                "service {service}"
            );
        }
        // As those of pods: refused at once.
        agent.apply(&file([Service::new(REMOTE).everywhere()]));
        for to in frontends(&cluster, REMOTE) {
            node.assert_fates(to, &Fate::REFUSED);
        }
        node.assert_fates((cluster_ips(REMOTE)[0], PORT + 1), &Fate::REFUSED);
        assert!(agent.count("own") > 0);
    }
}

/// To `n1` a pod of another node is as any client outside, as long as that node does not balance itself.
#[test]
fn a_pod_of_another_node_is_a_client_outside() {
    for variant in PAIR {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let _agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        let rows = [(cluster.pod(2, 1), LOCAL, Source::Client), (cluster.pod(2, 2), REMOTE, Source::Node)];
        assert_no_mistakes(rows.into_iter().flat_map(|(client, service, source)| {
            let cluster = &cluster;
            let to = cluster_ips(service).map(|ip| SocketAddr::new(ip, PORT));
            to.into_iter().filter_map(move |to| mistake(cluster, client, to, service, source))
        }));
    }
}

#[test]
fn pods_of_two_nodes_with_agents_see_each_other() {
    for variant in PAIR {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let services = services(&cluster);
        let _agents = [1, 2].map(|i| variant.start(cluster.node(i), &services, &[]));
        let rows = [
            (cluster.pod(2, 1), LOCAL, Source::Client),
            (cluster.pod(2, 2), REMOTE, Source::Client),
            (cluster.pod(1, 2), REMOTE, Source::Client),
            (cluster.client(), REMOTE, Source::Node),
        ];
        assert_no_mistakes(rows.into_iter().flat_map(|(client, service, source)| {
            let cluster = &cluster;
            let to = cluster_ips(service).map(|ip| SocketAddr::new(ip, PORT));
            to.into_iter().filter_map(move |to| mistake(cluster, client, to, service, source))
        }));
    }
}

#[test]
fn replies_may_leave_by_another_uplink_than_requests_came_by() {
    for variant in PAIR.map(|variant| variant.with(Layout::second_uplink)) {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        // Strict, which the agent has to loosen: by this interface no client is reached.
        cluster.node(1).host().namespace().sysctl("ipv4/conf/eth0/rp_filter", "1");
        let _agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        let before = cluster.router().received("n1-eth1");
        let rows = [(LOCAL, Source::Client), (REMOTE, Source::Node), (HOST, Source::Client)];
        assert_no_mistakes(rows.into_iter().flat_map(|(service, source)| {
            let to = frontends(&cluster, service);
            let cluster = &cluster;
            to.into_iter().filter_map(move |to| mistake(cluster, cluster.client(), to, service, source))
        }));
        assert!(cluster.router().received("n1-eth1") > before + 1_000, "replies leave by the second uplink");
    }
}

#[test]
fn where_a_backend_is_follows_from_its_address_where_nobody_says_it() {
    for variant in VARIANTS {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let service = |k| Service::new(k).endpoint(endpoint(&cluster, k)).without_node_names();
        let _agent = variant.start(cluster.node(1), &file([LOCAL, REMOTE, HOST].map(service)), &[]);
        let rows = [(LOCAL, Source::Client), (REMOTE, Source::Node), (HOST, Source::Client)];
        assert_no_mistakes(rows.into_iter().flat_map(|(service, source)| {
            let cluster = &cluster;
            let to = cluster_ips(service).map(|ip| SocketAddr::new(ip, PORT));
            to.into_iter().filter_map(move |to| mistake(cluster, cluster.client(), to, service, source))
        }));
    }
}

#[test]
fn a_pod_that_comes_later_is_client_and_backend_as_the_others() {
    for variant in PAIR {
        let mut cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        cluster.add_pod(1);
        let late = cluster.pod(1, 3);
        let _server = late.serve(TARGET_PORT);
        agent.apply(&file([Service::new(LOCAL).endpoint(cluster.pod(1, 1)), Service::new(9).endpoint(late)]));
        for (own, other) in cluster_ips(9).into_iter().zip(cluster_ips(LOCAL)) {
            eventually("its interface is found", || late.fates((other, PORT)) == Fate::answered(cluster.pod(1, 1)));
            for seen in late.exchange((other, PORT)).unwrap() {
                assert_eq!((seen.backend.as_str(), seen.client.ip()), ("n1-p1", late.address_like(other)));
            }
            for client in [cluster.client(), cluster.pod(1, 1)] {
                for seen in client.exchange((own, PORT)).unwrap() {
                    assert_eq!((seen.backend.as_str(), seen.client.ip()), ("n1-p3", client.address_like(own)));
                }
            }
        }
    }
}

// NodePorts.

#[test]
fn a_node_port_follows_the_addresses_of_the_node() {
    for variant in PAIR {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let _agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        let (node, client, pod) = (cluster.node(1).host(), cluster.client(), cluster.pod(1, 1));
        for (address, prefix, flag) in [("10.1.0.99", 24, ""), ("fd00:1::99", 64, "nodad")] {
            let to = (address, node_port(LOCAL));
            assert_ne!(client.fates(to), Fate::answered(pod), "the address is not there yet");
            node.namespace().ip(&format!("addr add {address}/{prefix} dev eth0 {flag}"));
            eventually("a new address is served", || client.fates(to) == Fate::answered(pod));
            client.assert_fates((address, node_port(REMOTE)), &Fate::answered(cluster.pod(2, 1)));
            // Packets have to go on coming when nobody answers for the address any more.
            let router = cluster.router().namespace();
            let mac = node.mac("eth0");
            router.ip(&format!("neigh replace {address} lladdr {mac} dev n1-eth0 nud permanent"));
            node.namespace().ip(&format!("addr del {address}/{prefix} dev eth0"));
            eventually("an address that is gone is not served", || client.fates(to) != Fate::answered(pod));
        }
    }
}

#[test]
fn node_ports_are_served_on_the_addresses_that_were_named_alone() {
    for variant in PAIR {
        let cluster = variant.with(Layout::second_uplink).layout.up();
        let _servers = serve(&cluster);
        let arguments = ["--nodeport-addresses", "10.101.0.0/24,fd00:101::/64"];
        let _agent = variant.start(cluster.node(1), &services(&cluster), &arguments);
        for address in cluster.node(1).host().addresses() {
            let is_named = ["10.101.0.2", "fd00:101::2"].contains(&address.to_string().as_str());
            let expected = if is_named { Fate::answered(cluster.pod(1, 1)) } else { Fate::REFUSED };
            cluster.client().assert_fates((address, node_port(LOCAL)), &expected);
        }
    }
}

#[test]
fn ports_of_the_node_that_no_service_has_stay_its_own() {
    for variant in PAIR {
        let cluster = variant.layout.clone().up();
        let node = cluster.node(1).host();
        let _servers = serve(&cluster);
        let _agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        for address in node.addresses() {
            for client in [cluster.client(), cluster.pod(1, 1)] {
                client.assert_fates((address, TARGET_PORT), &Fate::answered(node));
                client.assert_fates((address, 81), &Fate::REFUSED);
                client.ping(address).unwrap();
            }
        }
        // What is not for a service goes through as before.
        for to in cluster.pod(2, 1).addresses() {
            for seen in cluster.pod(1, 1).exchange((to, TARGET_PORT)).unwrap() {
                assert_eq!(seen.client.ip(), cluster.pod(1, 1).address_like(to));
            }
        }
    }
}

// Endpoints that go.

#[test]
fn udp_flows_leave_a_removed_backend_at_once_wherever_it_was() {
    for variant in PAIR {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let with = |k| file([Service::new(1).endpoint(endpoint(&cluster, k))]);
        let agent = variant.start(cluster.node(1), &with(LOCAL), &[]);
        let clients = [cluster.client(), cluster.pod(1, 2)];
        let flows: Vec<_> =
            clients.into_iter().flat_map(|client| cluster_ips(1).map(|ip| client.udp((ip, PORT)).unwrap())).collect();
        let ask = || flows.iter().map(|flow| flow.ask("who?").unwrap()).collect::<Vec<_>>();
        assert_eq!(ask(), ["n1-p1"; 4]);
        for (service, name) in [(REMOTE, "n2-p1"), (HOST, "n1"), (LOCAL, "n1-p1")] {
            agent.apply(&with(service));
            assert_eq!(ask(), [name; 4]);
            // The last one, too.
            agent.apply(&file([Service::new(1)]));
            for flow in &flows {
                assert_eq!(flow.ask("nobody").unwrap_err().kind(), ErrorKind::ConnectionRefused);
            }
        }
    }
}

#[test]
fn tcp_connections_stay_where_they_are_when_endpoints_change() {
    for variant in PAIR {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let with = |k| file([Service::new(1).endpoint(endpoint(&cluster, k))]);
        let agent = variant.start(cluster.node(1), &file([]), &[]);
        let clients = [cluster.client(), cluster.pod(1, 2)];
        let open = || clients.map(|client| cluster_ips(1).map(|ip| client.converse((ip, PORT), 2)));
        let conversations = [LOCAL, REMOTE, HOST].map(|service| {
            agent.apply(&with(service));
            open()
        });
        agent.apply(&with(NEIGHBOUR));
        thread::sleep(Duration::from_millis(500));
        conversations.into_iter().flatten().flatten().for_each(Conversations::expect_unharmed);
    }
}

#[test]
fn an_agent_that_stops_leaves_no_program_on_any_interface() {
    for variant in VARIANTS {
        let cluster = variant.with(Layout::second_uplink).layout.up();
        let node = cluster.node(1).host();
        let before = node.programs();
        let agent: Agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        let during = node.programs();
        for interface in cluster.node(1).uplinks() {
            assert!(during.iter().any(|program| program.starts_with(interface)), "{interface}: {during:?}");
        }
        agent.stop();
        eventually("what it attached is gone", || node.programs() == before);
        for ip in cluster_ips(LOCAL) {
            assert_ne!(cluster.client().fates((ip, PORT)), Fate::answered(cluster.pod(1, 1)));
        }
    }
}
