//! What happens to packets on their way: narrow links, datagrams in fragments, hops that are one too many.
#![expect(clippy::panic, clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::{io::ErrorKind, net::IpAddr, thread};

use tests::{
    cluster::{Cluster, Layout, NARROW_MTU},
    probe::{Datagrams, Fate},
    servers::Server,
    services::{PORT, Service, TARGET_PORT, cluster_ips, file},
    topology::Host,
    variants::{PAIR, VARIANTS, Variant},
};

/// Services by where their only endpoint is.
const LOCAL: u8 = 1;
const REMOTE: u8 = 2;

fn services(cluster: &Cluster) -> String {
    file([(LOCAL, cluster.pod(1, 1)), (REMOTE, cluster.pod(2, 1))].map(|(k, pod)| Service::new(k).endpoint(pod)))
}

fn serve(cluster: &Cluster) -> [Server; 2] {
    [cluster.pod(1, 1), cluster.pod(2, 1)].map(|pod| pod.serve(TARGET_PORT))
}

/// What processes of the node send is to go by packets, too.
const WITHOUT_SOCKETS: [&str; 2] = ["--socket-lb", "off"];

/// A client outside, a pod and the node itself, each with the services that it reaches from another host.
fn clients(cluster: &Cluster) -> impl Iterator<Item = (&Host, u8)> {
    let clients = [cluster.client(), cluster.pod(1, 2), cluster.node(1).host()];
    clients.into_iter().flat_map(|client| [(client, LOCAL), (client, REMOTE)])
}

/// Both places of the programs, with a narrow link on the client's side and with one on the backend's.
fn narrow() -> impl Iterator<Item = Variant> {
    PAIR.into_iter()
        .flat_map(|variant| [variant.with(Layout::narrow_clients), variant.with(|layout| layout.narrow_node(2))])
}

/// No link of either end is narrow: both send segments of 1,500 bytes until somebody on the way tells them, through the balancer.
#[test]
fn tcp_finds_out_about_a_narrow_link_from_both_ends() {
    for variant in narrow() {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let _agent = variant.start(cluster.node(1), &services(&cluster), &WITHOUT_SOCKETS);
        for (client, service) in clients(&cluster) {
            for ip in cluster_ips(service) {
                for seen in
                    client.exchange((ip, PORT)).unwrap_or_else(|error| panic!("{} to {ip}: {error}", client.name()))
                {
                    assert_eq!(seen.own.is_ipv4(), ip.is_ipv4());
                }
            }
        }
    }
}

#[test]
fn a_datagram_that_is_too_big_for_a_narrow_link_is_refused_to_its_sender() {
    for variant in narrow() {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let _agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        for ip in cluster_ips(REMOTE) {
            let datagrams = cluster.client().udp((ip, PORT)).unwrap();
            datagrams.never_fragment().unwrap();
            let ask = |size: u16| datagrams.ask(&"x".repeat(size.into()));
            // Headers of either family and the name of the backend are less than a hundred bytes.
            ask(NARROW_MTU - 100).unwrap();
            let error = ask(NARROW_MTU).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{ip}: {error}");
            ask(NARROW_MTU - 100).unwrap();
        }
    }
}

/// Whether a datagram is answered, at one of a few attempts: a sender that is moved to another CPU in the middle has fragments overtake
/// their first, which is the end of them. One that comes back is whole, and its own.
fn is_answered(datagrams: &Datagrams, question: &str) -> bool {
    (0..3).any(|_| match datagrams.ask(question) {
        Err(error) if error.kind() == ErrorKind::TimedOut => {
            println!("a datagram of {} bytes is lost", question.len());
            false
        }
        answer => answer.map(|_backend| true).unwrap(),
    })
}

#[test]
fn datagrams_in_fragments_reach_backends_and_so_do_their_answers() {
    for variant in VARIANTS {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let _agent = variant.start(cluster.node(1), &services(&cluster), &WITHOUT_SOCKETS);
        for (client, service) in clients(&cluster) {
            for ip in cluster_ips(service) {
                let datagrams = client.udp((ip, PORT)).unwrap();
                // The first datagram of this flow, too, comes in fragments.
                for size in [4_000, 8_000, 100, 8_000, 60_000] {
                    assert!(is_answered(&datagrams, &"x".repeat(size)), "{} to {ip}, {size} bytes", client.name());
                }
            }
        }
    }
}

#[test]
fn many_senders_of_fragments_do_not_mix() {
    for variant in PAIR {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        for ip in [LOCAL, REMOTE].into_iter().flat_map(cluster_ips) {
            thread::scope(|scope| {
                for number in 0..8 {
                    let datagrams = cluster.client().udp((ip, PORT)).unwrap();
                    // Every byte that comes back is compared with what was sent.
                    let question = number.to_string().repeat(8_000);
                    scope.spawn(move || {
                        (0..20).for_each(|_| assert!(is_answered(&datagrams, &question), "{ip}: {number}"));
                    });
                }
            });
        }
        let overtaken = agent.count("fragment-lost");
        println!("{overtaken} fragments without their first");
    }
}

#[test]
fn hops_behind_the_balancer_say_that_a_datagram_has_expired() {
    for variant in PAIR.map(|variant| variant.with(|layout| layout.narrow_node(2))) {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let _agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        let (node, router, other) = (cluster.node(1).host(), cluster.router(), cluster.node(2).host());
        let (client, pod) = (cluster.client(), cluster.pod(1, 2));
        for (from, service, way) in [
            (client, REMOTE, vec![router, node, router, cluster.hop(), other]),
            (client, LOCAL, vec![router, node]),
            (pod, REMOTE, vec![node, router, cluster.hop(), other]),
            (pod, LOCAL, vec![node]),
        ] {
            for ip in cluster_ips(service) {
                for (ttl, host) in (1..).zip(&way) {
                    assert_expires(from, ip, ttl, host);
                }
                let enough = 1 + u8::try_from(way.len()).unwrap();
                let arrives = from.udp((ip, PORT)).unwrap().expire(enough).unwrap_err();
                assert!(arrives.to_string().starts_with("it arrived"), "{} to {ip}: {arrives}", from.name());
            }
        }
    }
}

#[track_caller]
fn assert_expires(from: &Host, ip: IpAddr, ttl: u8, host: &Host) {
    let place = format!("{} to {ip} with TTL {ttl}", from.name());
    let by = from.udp((ip, PORT)).unwrap().expire(ttl).unwrap_or_else(|error| panic!("{place}: {error}"));
    // A NAT may say that the address which the client asked for says so: from there on, all is behind it (RFC 5508, section 4.2).
    assert!(by == ip || host.addresses().any(|own| own == by), "{place}: {by} is not {}", host.name());
}

/// A backend's host that says that nobody listens there.
#[test]
fn a_backend_that_refuses_is_heard() {
    for variant in PAIR {
        let cluster = variant.layout.clone().up();
        let _agent = variant.start(cluster.node(1), &services(&cluster), &WITHOUT_SOCKETS);
        for (client, service) in clients(&cluster) {
            for ip in cluster_ips(service) {
                client.assert_fates((ip, PORT), &Fate::REFUSED);
            }
        }
    }
}

#[test]
fn connections_survive_a_link_that_becomes_narrow() {
    for variant in PAIR.map(|variant| variant.with(Layout::narrow_clients)) {
        let cluster = variant.layout.clone().up();
        let _servers = serve(&cluster);
        let _agent = variant.start(cluster.node(1), &services(&cluster), &[]);
        let set_mtu = |mtu| {
            cluster.router().namespace().ip(&format!("link set client1-eth0 mtu {mtu}"));
            cluster.hop().namespace().ip(&format!("link set eth0 mtu {mtu}"));
        };
        set_mtu(1_500);
        let connect = |ip| cluster.client().tcp((ip, PORT)).unwrap();
        let mut connections: Vec<_> = [LOCAL, REMOTE].into_iter().flat_map(cluster_ips).map(connect).collect();
        let mut talk = || connections.iter_mut().try_for_each(|connection| connection.echo(&"x".repeat(1 << 20)));
        talk().unwrap();
        set_mtu(NARROW_MTU);
        talk().unwrap();
    }
}
