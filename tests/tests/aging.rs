//! What only time shows: each of these waits for tens of seconds, all at once.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use tests::{
    agent::Agent,
    topology::{Lab, Topology, VIP4, VIP6},
};

const SERVICES: &str = r#"
services:
  - name: web
    addresses: [10.96.0.10, "fd00:96::10"]
    ports: [{ port: 80, targetPort: 8080 }]
    backends: [10.1.0.2, "fd00:1::2"]
"#;

fn lab() -> (Lab, Agent) {
    let lab = Topology::new().client("client").backends(1).up();
    let agent = Agent::start(&lab, SERVICES, &[]);
    (lab, agent)
}

/// A client that has said all that it has to say waits for the answer for longer than an ended connection is remembered.
#[test]
fn a_half_closed_connection_is_still_answered() {
    let (lab, _agent) = lab();
    let listener = lab.backend(1).namespace().run(|| TcpListener::bind("[::]:8080").unwrap());
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut question = String::new();
        stream.read_to_string(&mut question).unwrap();
        thread::sleep(Duration::from_secs(14));
        stream.write_all(question.to_uppercase().as_bytes()).unwrap();
    });
    let mut client = lab.client().namespace().run(|| TcpStream::connect(SocketAddr::new(VIP4.into(), 80)).unwrap());
    client.set_read_timeout(Some(Duration::from_secs(25))).unwrap();
    client.write_all(b"a long calculation").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "A LONG CALCULATION");
    server.join().unwrap();
}

/// A backend that is made anew under its old address has a new Ethernet address, and may well say nothing before it is spoken to.
/// XDP sends past the kernel's neighbour table, so the kernel would never ask.
#[test]
fn a_backend_whose_ethernet_address_changed_in_silence_is_found() {
    let (lab, _agent) = lab();
    let _server = lab.backend(1).serve(8080);
    // Neighbours grow stale after seconds, not after a minute.
    for family in ["ipv4", "ipv6"] {
        lab.lb().namespace().sysctl(&format!("{family}/neigh/eth-b1/base_reachable_time_ms"), "1000");
        lab.lb().namespace().sysctl(&format!("{family}/neigh/eth-b1/delay_first_probe_time"), "1");
    }
    for vip in [SocketAddr::new(VIP4.into(), 80), SocketAddr::new(VIP6.into(), 80)] {
        lab.client().tcp(vip).unwrap();
    }
    lab.backend(1).namespace().ip("link set eth0 address 02:00:00:00:ab:cd");
    let begin = Instant::now();
    for vip in [SocketAddr::new(VIP4.into(), 80), SocketAddr::new(VIP6.into(), 80)] {
        while lab.client().tcp(vip).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(90), "{vip} is not reached any more");
        }
        println!("{vip} is reached again after {:?}", begin.elapsed());
    }
}
