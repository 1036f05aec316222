//! The packet table: packets through the loaded programs, one by one, and what has to become of each.
//!
//! A row says which packet comes from where, after which others, and what is expected: the reason that is counted, and the
//! packet afterwards to the last byte. Rows with a family are run for IPv4 and for IPv6; what comes in by an uplink goes through
//! XDP and, from a new beginning, through tc.
#![expect(clippy::indexing_slicing, reason = "this is test code: it fails by panicking")]

mod forward;
mod fragments;
mod headers;
mod icmp;
mod node;
mod own;
mod refusals;

use std::{
    fmt::Write as _,
    panic::{self, AssertUnwindSafe},
};

use lb_userspace::dataplane::{Sizes, kernel::Hook};
use tests::{
    datapath::{DOWN, DOWN_MAC, Datapath, Link, POD, ROUTER_MAC, UP, UP_MAC, backend_mac, with_datapath},
    packet::{Packet, assert_packets_equal, describe, verify_checksums},
};

const SIZES: Sizes = Sizes {
    services: 64,
    backends: 64,
    slots: 4096,
    flows: 4096,
    pending_flows: 4096,
    affinity_clients: 64,
    source_ranges: 64,
};

/// The only port that packets leave from, where they are not to keep theirs.
const SNAT_PORT: u16 = 6000;

/// One backend each, so that it is known where a packet goes.
const SERVICES: &str = r#"
services:
  - name: web
    addresses: [10.96.0.10, "fd00:96::10"]
    ports:
      - { name: http, port: 80, targetPort: 8080 }
      - { name: dns, port: 53, targetPort: 5353, protocol: UDP }
    backends: [10.0.1.10, "fd00:1::a"]
  - name: behind-the-router
    addresses: [10.96.0.20, "fd00:96::20"]
    ports: [{ name: tcp, port: 80 }, { name: udp, port: 80, protocol: UDP }]
    backends: [10.2.0.5, "fd00:b::5"]
  - name: empty
    addresses: [10.96.0.30, "fd00:96::30"]
    ports: [{ name: tcp, port: 80 }, { name: udp, port: 53, protocol: UDP }, { name: sctp, port: 90, protocol: SCTP }]
    backends: []
  - name: drained
    addresses: [10.96.0.31, "fd00:96::31"]
    ports: [{ port: 80 }]
    backends: [{ address: 10.0.1.10, weight: 0 }, { address: "fd00:1::a", weight: 0 }]
  - name: unreachable
    addresses: [10.96.0.40, "fd00:96::40"]
    ports: [{ port: 80 }]
    backends: [203.0.113.9, "2001:db8:dead::9"]
  - name: unresolved
    addresses: [10.96.0.50, "fd00:96::50"]
    ports: [{ name: tcp, port: 80 }, { name: udp, port: 80, protocol: UDP }]
    backends: [10.0.1.99, "fd00:1::99"]
  - name: by-the-stack
    addresses: [10.96.0.51, "fd00:96::51"]
    ports: [{ port: 53, targetPort: 5353, protocol: UDP }]
    backends: [10.0.3.10, "fd00:3::a"]
  - name: here
    addresses: [10.96.0.60, "fd00:96::60"]
    ports: [{ port: 80 }]
    backends: [10.0.1.1, "fd00:1::1"]
  - name: pod
    addresses: [10.96.0.70, "fd00:96::70"]
    externalIPs: [10.98.0.70, "fd00:98::70"]
    ports: [{ name: tcp, port: 80, targetPort: 8080 }, { name: udp, port: 53, targetPort: 5353, protocol: UDP }]
    backends: [10.0.2.10, "fd00:2::a"]
  - name: sctp
    addresses: [10.96.0.80, "fd00:96::80"]
    ports: [{ port: 90, protocol: SCTP }]
    backends: [10.0.1.10, "fd00:1::a"]
  - name: local
    type: LoadBalancer
    addresses: [10.96.0.90, "fd00:96::90"]
    loadBalancerIPs: [10.97.0.90, "fd00:97::90"]
    externalTrafficPolicy: Local
    ports: [{ port: 80, targetPort: 8080, nodePort: 30090 }]
    backends: [10.0.1.10, "fd00:1::a", 10.0.2.10, "fd00:2::a"]
    algorithm: source-hash
  - name: elsewhere
    type: LoadBalancer
    addresses: [10.96.0.91, "fd00:96::91"]
    loadBalancerIPs: [10.97.0.91, "fd00:97::91"]
    externalTrafficPolicy: Local
    ports: [{ port: 80, targetPort: 8080, nodePort: 30091 }]
    backends: [10.0.1.10, "fd00:1::a"]
  - name: elsewhere-inside
    addresses: [10.96.0.92, "fd00:96::92"]
    internalTrafficPolicy: Local
    ports: [{ port: 80, targetPort: 8080 }]
    backends: [10.0.1.10, "fd00:1::a"]
  - name: ranges
    type: LoadBalancer
    addresses: [10.96.0.93, "fd00:96::93"]
    loadBalancerIPs: [10.97.0.93, "fd00:97::93"]
    loadBalancerSourceRanges: [192.0.2.0/28, "2001:db8::/124"]
    ports: [{ port: 80, targetPort: 8080, nodePort: 30093 }]
    backends: [10.0.1.10, "fd00:1::a"]
  - name: none-ready
    addresses: [10.96.0.94, "fd00:96::94"]
    ports: [{ port: 80, targetPort: 8080 }]
    backends:
      - { address: 10.0.1.10, conditions: { ready: false, serving: true, terminating: true } }
      - { address: 10.0.1.11, conditions: { ready: false } }
      - { address: "fd00:1::a", conditions: { ready: false, serving: true, terminating: true } }
      - { address: "fd00:1::b", conditions: { ready: false } }
  - name: symmetric
    type: NodePort
    addresses: [10.96.0.95, "fd00:96::95"]
    ports:
      - { name: udp, port: 30095, targetPort: 30095, nodePort: 30095, protocol: UDP }
      - { name: sctp, port: 30095, targetPort: 30095, nodePort: 30095, protocol: SCTP }
    backends: [10.0.1.10, "fd00:1::a"]
"#;

/// The addresses of one family.
#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    /// The length of a network header without options, in bytes.
    header: usize,
    client: &'static str,
    vip: &'static str,
    backend: &'static str,
    routed_vip: &'static str,
    routed_backend: &'static str,
    empty: &'static str,
    drained: &'static str,
    unreachable: &'static str,
    unresolved_vip: &'static str,
    unresolved_backend: &'static str,
    here: &'static str,
    /// A client that no source range lets in.
    stranger: &'static str,
    pod: &'static str,
    /// Another pod, which asks.
    asking: &'static str,
    packet: fn(&str, &str) -> Packet,
}

const V4: Family = Family {
    name: "IPv4",
    header: 20,
    client: "192.0.2.7",
    vip: "10.96.0.10",
    backend: "10.0.1.10",
    routed_vip: "10.96.0.20",
    routed_backend: "10.2.0.5",
    empty: "10.96.0.30",
    drained: "10.96.0.31",
    unreachable: "10.96.0.40",
    unresolved_vip: "10.96.0.50",
    unresolved_backend: "10.0.1.99",
    here: "10.96.0.60",
    stranger: "192.0.2.77",
    pod: "10.0.2.10",
    asking: "10.0.2.20",
    packet: Packet::v4,
};

const V6: Family = Family {
    name: "IPv6",
    header: 40,
    client: "2001:db8::7",
    vip: "fd00:96::10",
    backend: "fd00:1::a",
    routed_vip: "fd00:96::20",
    routed_backend: "fd00:b::5",
    empty: "fd00:96::30",
    drained: "fd00:96::31",
    unreachable: "fd00:96::40",
    unresolved_vip: "fd00:96::50",
    unresolved_backend: "fd00:1::99",
    here: "fd00:96::60",
    stranger: "2001:db8::77",
    pod: "fd00:2::a",
    asking: "fd00:2::20",
    packet: Packet::v6,
};

impl Family {
    /// From the client to a service.
    fn ask(&self, to: &str) -> Packet {
        (self.packet)(self.client, to)
    }

    /// An address of ours: of a service's own ones `96`, of an external one `98`, of a load balancer `97`.
    fn service(&self, kind: u8, number: u8) -> String {
        if self.name == "IPv4" { format!("10.{kind}.0.{number}") } else { format!("fd00:{kind}::{number}") }
    }

    /// From us to the backend on our link, as the frame looks there.
    fn forwarded(&self) -> Packet {
        (self.packet)(&self.down(), self.backend).ethernet(DOWN_MAC, backend_mac(10)).ttl(63)
    }

    /// From the backend on our link to us.
    fn reply(&self) -> Packet {
        (self.packet)(self.backend, &self.down())
    }

    /// From a service to the client, as the frame looks towards the router.
    fn returned(&self, from: &str) -> Packet {
        (self.packet)(from, self.client).ethernet(UP_MAC, ROUTER_MAC).ttl(63)
    }

    fn down(&self) -> String {
        if self.name == "IPv4" { DOWN.0.to_string() } else { DOWN.1.to_string() }
    }

    fn pod_side(&self) -> String {
        if self.name == "IPv4" { POD.0.to_string() } else { POD.1.to_string() }
    }

    fn up(&self) -> String {
        if self.name == "IPv4" { UP.0.to_string() } else { UP.1.to_string() }
    }
}

/// Where a packet is seen.
#[derive(Clone, Copy, PartialEq, Debug)]
enum From {
    Clients,
    Backends,
    Pods,
    /// It leaves towards the clients.
    Leaving,
    /// It leaves towards the pods.
    LeavingToPod,
    /// A process of the node has sent it, and it leaves towards the clients: as one that stands for several, of so many bytes of
    /// payload each, or for itself (0).
    Node(u16),
}

/// What of the programs is run where there is a choice.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Way {
    Xdp,
    Tc,
}

/// What has to become of a packet.
enum Expect {
    /// Counted so, and otherwise this.
    Sent(&'static str, Vec<u8>),
    /// Counted so, and given to the stack translated like this.
    Handed(&'static str, Vec<u8>),
    /// Counted so, and given to the stack as it was.
    Passed(&'static str),
    /// Counted so, and gone.
    Dropped(&'static str),
}

struct Row {
    /// The kernel's test runner has no socket buffer for such a packet.
    is_for_xdp_alone: bool,
    name: String,
    before: Vec<(From, Vec<u8>)>,
    from: From,
    given: Vec<u8>,
    expect: Expect,
}

fn row(name: impl Into<String>, given: impl Into<Given>, expect: Expect) -> Row {
    let given = given.into();
    Row { is_for_xdp_alone: false, name: name.into(), before: Vec::new(), from: given.0, given: given.1, expect }
}

/// A packet with the side that it comes from: clients, unless said otherwise.
struct Given(From, Vec<u8>);

impl std::convert::From<Packet> for Given {
    fn from(packet: Packet) -> Self {
        Self(From::Clients, packet.bytes())
    }
}

impl std::convert::From<Vec<u8>> for Given {
    fn from(bytes: Vec<u8>) -> Self {
        Self(From::Clients, bytes)
    }
}

fn by_backend(packet: &Packet) -> Given {
    Given(From::Backends, packet.bytes())
}

fn by_pod(packet: &Packet) -> Given {
    Given(From::Pods, packet.bytes())
}

fn leaving(packet: &Packet) -> Given {
    Given(From::Leaving, packet.bytes())
}

fn own(packet: &Packet) -> Given {
    own_at_once(packet, 0)
}

/// `gso_size`: as the kernel has it of a packet that stands for several.
fn own_at_once(packet: &Packet, gso_size: u16) -> Given {
    Given(From::Node(gso_size), packet.bytes())
}

fn leaving_to_pod(packet: &Packet) -> Given {
    Given(From::LeavingToPod, packet.bytes())
}

impl Row {
    /// How it is seen: at an uplink there are XDP and tc, elsewhere is tc alone.
    fn ways(&self) -> &'static [Way] {
        match self.from {
            From::Clients | From::Backends if self.is_for_xdp_alone => &[Way::Xdp],
            From::Clients | From::Backends => &[Way::Xdp, Way::Tc],
            From::Pods | From::Leaving | From::LeavingToPod | From::Node(_) => &[Way::Tc],
        }
    }

    fn by_xdp_alone(mut self) -> Self {
        self.is_for_xdp_alone = true;
        self
    }

    fn after(mut self, packets: impl IntoIterator<Item = Given>) -> Self {
        self.before.extend(packets.into_iter().map(|Given(from, bytes)| (from, bytes)));
        self
    }
}

fn tx(packet: &Packet) -> Expect {
    Expect::Sent("tx", packet.bytes())
}

fn redirect(packet: &Packet) -> Expect {
    Expect::Sent("redirect", packet.bytes())
}

#[test]
fn every_row_holds() {
    let of_family = |f| {
        [forward::rows(f), node::rows(f), refusals::rows(f), icmp::rows(f), fragments::rows(f)].into_iter().flatten()
    };
    let rows: Vec<_> = of_families(of_family).chain(headers::rows()).collect();
    println!("{} rows", rows.len());
    assert!(rows.len() >= 280, "the table has shrunk to {} rows", rows.len());
    let of_one_port: Vec<_> = of_families(|f| own::rows(f).into_iter().chain(node::symmetric(f))).collect();
    let failures = with_datapath(SIZES, |datapath| {
        datapath.apply(SERVICES);
        // What may not keep its port leaves from a random one: here there is but one.
        let ports = SNAT_PORT..=SNAT_PORT;
        failures(datapath, &rows)
            + &datapath.with_snat_ports(ports, SERVICES, |datapath| failures(datapath, &of_one_port))
    });
    assert!(failures.is_empty(), "\n{failures}");
}

/// The rows of both families, which say in their names of which they are.
fn of_families<Rows: Iterator<Item = Row>>(rows: impl Fn(Family) -> Rows) -> impl Iterator<Item = Row> {
    [V4, V6].into_iter().flat_map(move |family| {
        let named = move |row: Row| Row { name: format!("{}: {}", family.name, row.name), ..row };
        rows(family).map(named)
    })
}

/// What is told of the rows that do not hold.
fn failures(datapath: &mut Datapath, rows: &[Row]) -> String {
    let mut failures = String::new();
    for row in rows {
        for &way in row.ways() {
            datapath.forget();
            if let Err(cause) = panic::catch_unwind(AssertUnwindSafe(|| check(datapath, row, way))) {
                let text = cause.downcast_ref::<String>().cloned().unwrap_or_default();
                let _ = writeln!(failures, "── {} ({way:?})\n{text}\n", row.name);
            }
        }
    }
    failures
}

#[track_caller]
fn check(datapath: &mut Datapath, row: &Row, way: Way) {
    for (from, packet) in &row.before {
        run(datapath, *from, way, packet);
    }
    let (reason, fate, expected) = match &row.expect {
        Expect::Sent(reason, packet) => (*reason, "sent", packet),
        Expect::Handed(reason, packet) => (*reason, "passed", packet),
        Expect::Passed(reason) => (*reason, "passed", &row.given),
        Expect::Dropped(reason) => (*reason, "dropped", &row.given),
    };
    let before = datapath.counts();
    let (got_fate, got) = run(datapath, row.from, way, &row.given);
    let after = datapath.counts();
    let counted: Vec<_> =
        after.iter().filter(|(name, count)| before[*name] != **count).map(|(name, _)| *name).collect();
    assert_eq!(counted, [reason], "counted for {}", describe_any(&row.given));
    assert_eq!(got_fate, fate, "what is done");
    assert_packets_equal(expected, &got);
    if matches!(row.expect, Expect::Sent(..) | Expect::Handed(..)) {
        verify_checksums(&got);
    }
}

/// What is done with a packet, and what it is afterwards.
fn run(datapath: &mut Datapath, from: From, way: Way, packet: &[u8]) -> (&'static str, Vec<u8>) {
    let uplink = if way == Way::Xdp { Hook::Xdp } else { Hook::TcIngress };
    let (hook, link) = match from {
        From::Clients => (uplink, Link::Up),
        From::Backends => (uplink, Link::Down),
        From::Pods => (Hook::TcPod, Link::Pod),
        From::Leaving | From::Node(_) => (Hook::TcEgress, Link::Up),
        From::LeavingToPod => (Hook::TcEgress, Link::Pod),
    };
    let result = match from {
        From::Node(gso_size) => datapath.run_own(link, packet, gso_size),
        _ => datapath.run(hook, link, packet),
    };
    // XDP_DROP, XDP_PASS, XDP_TX and XDP_REDIRECT; TC_ACT_SHOT, TC_ACT_UNSPEC, TC_ACT_REDIRECT.
    let fate = match (hook == Hook::Xdp, result.action) {
        (true, 1) | (false, 2) => "dropped",
        (true, 2) | (false, u32::MAX) => "passed",
        (true, 3 | 4) | (false, 7) => "sent",
        _ => "something that has no name",
    };
    (fate, result.packet)
}

/// Also of what can't be told in a line.
fn describe_any(bytes: &[u8]) -> String {
    panic::catch_unwind(|| describe(bytes)).unwrap_or_else(|_| format!("{} bytes", bytes.len()))
}
