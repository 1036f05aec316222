//! What a packet costs: at each hook, for each kind of flow, and how far the others get that are none of ours.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use lb_common::generator::{LENGTH, Traffic};
use lb_userspace::dataplane::{Sizes, kernel::Hook};
use serde::Serialize;
use tests::{
    datapath::{Datapath, with_datapath},
    packet::Packet,
};

use crate::generator::{Cost, Generator, ROUNDS, packets_a_round};

/// Backends of each service: enough for a million flows to find a source port each.
const BACKENDS: u32 = 250;

/// What is measured.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    hook: Hook,
    road: Road,
    family: Family,
    protocol: Protocol,
    services: u32,
    flows: u32,
}

/// Where packets go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Road {
    /// To a backend elsewhere.
    Forwarded,
    /// To a backend on this node.
    RequestOnNode,
    /// From a backend on this node.
    ReplyOnNode,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Family {
    #[serde(rename = "IPv4")]
    V4,
    #[serde(rename = "IPv6")]
    V6,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

/// One line of the table.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) hook: &'static str,
    /// What the packets are counted as.
    pub(crate) reason: &'static str,
    pub(crate) family: Family,
    pub(crate) protocol: Protocol,
    pub(crate) services: u32,
    pub(crate) flows: u32,
    /// A packet of an established flow, net ns, as all here.
    pub(crate) established_ns: f64,
    /// A packet of a flow that its backend has not answered yet; none for UDP, whose flows are established by lasting.
    pub(crate) pending_ns: Option<f64>,
    /// A packet that opens a flow; none for one flow, which can't be opened twice, and for replies, which open none.
    pub(crate) open_ns: Option<f64>,
    /// A packet that establishes a flow; likewise.
    pub(crate) establish_ns: Option<f64>,
    /// What the generator costs by itself.
    pub(crate) generator_ns: f64,
}

/// A packet that is not of a flow of ours, and goes to the stack.
#[derive(Serialize)]
pub(crate) struct Stranger {
    /// What it is counted as.
    pub(crate) reason: &'static str,
    pub(crate) family: Family,
    /// How many flows of others there are.
    pub(crate) flows: u32,
    /// Net ns.
    pub(crate) xdp_ns: f64,
    /// Net ns.
    pub(crate) tc_ingress_ns: f64,
    /// Net ns.
    pub(crate) tc_egress_ns: f64,
}

impl Case {
    /// All, or those that are done quickly.
    pub(crate) fn all(is_quick: bool) -> Vec<Self> {
        let mut cases = Vec::new();
        for family in [Family::V4, Family::V6] {
            let case = |hook, road, protocol, services, flows| Self { hook, road, family, protocol, services, flows };
            for hook in [Hook::Xdp, Hook::TcIngress] {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    let flows = [1, 1 << 10, 1 << 16, 1 << 20];
                    cases.extend(flows.map(|flows| case(hook, Road::Forwarded, protocol, 1, flows)));
                }
            }
            let services = [1, 1_000, 100_000];
            cases.extend(services.map(|n| case(Hook::Xdp, Road::Forwarded, Protocol::Tcp, n, 1 << 17)));
            for (hook, road) in [
                (Hook::Xdp, Road::RequestOnNode),
                (Hook::TcIngress, Road::RequestOnNode),
                (Hook::TcEgress, Road::ReplyOnNode),
            ] {
                cases.extend([1, 1 << 16].map(|flows| case(hook, road, Protocol::Tcp, 1, flows)));
            }
        }
        cases.retain(|case| !is_quick || (case.services < 100_000 && case.flows < 1 << 20));
        cases
    }

    /// Measures it.
    pub(crate) fn measure(self) -> Result<Row> {
        let flows = (self.flows + self.flows / 4).max(1 << 12);
        let sizes = Sizes { services: 2 * self.services.max(8), flows, pending_flows: flows, ..Sizes::DEFAULT };
        with_datapath(sizes, |datapath| self.measure_on(datapath))
    }

    fn measure_on(self, datapath: &mut Datapath) -> Result<Row> {
        datapath.apply(&services_file(self.family, self.services, self.road != Road::Forwarded));
        let mut generator = Generator::load(datapath)?;
        // The flows of replies are made by requests.
        let asking = match self.road {
            Road::ReplyOnNode => Self { hook: Hook::TcIngress, road: Road::RequestOnNode, ..self },
            _ => self,
        };
        let (opening, request) = (asking.traffic(true), asking.traffic(false));

        let open = asking
            .expect(datapath, self.flows, |datapath| generator.once(datapath, asking.hook, &opening, asking.flows))?;
        let packets = ROUNDS as u32 * packets_a_round(self.flows);
        let pending = match self.protocol {
            Protocol::Tcp => {
                Some(asking.expect(datapath, packets, |datapath| generator.measure(datapath, asking.hook, &request))?)
            }
            Protocol::Udp => None,
        };
        datapath.answer();
        let establish = asking
            .expect(datapath, self.flows, |datapath| generator.once(datapath, asking.hook, &request, asking.flows))?;
        // From here on the flow is found by the first program, which hands on nothing of what it finds.
        let (established, _) = datapath.entries();
        ensure!(established == 2 * self.flows as usize, "{established} entries for {} established flows", self.flows);

        let steady = self.traffic(false);
        let established = self.expect(datapath, packets, |datapath| generator.measure(datapath, self.hook, &steady))?;
        let is_asking = self.road != Road::ReplyOnNode;
        let is_many = is_asking && self.flows > 1;
        Ok(Row {
            hook: hook_name(self.hook),
            reason: self.road.reason(),
            family: self.family,
            protocol: self.protocol,
            services: self.services,
            flows: self.flows,
            established_ns: established.ns,
            pending_ns: pending.filter(|_| is_asking).map(|cost| cost.ns),
            open_ns: is_many.then_some(open.ns),
            establish_ns: is_many.then_some(establish.ns),
            generator_ns: established.generator_ns,
        })
    }

    /// Expects that so many packets meet the case's fate meanwhile.
    fn expect(
        self,
        datapath: &mut Datapath,
        packets: u32,
        work: impl FnOnce(&Datapath) -> Result<Cost>,
    ) -> Result<Cost> {
        let reason = self.road.reason();
        let before = datapath.count(reason);
        let cost = work(datapath)?;
        let count = datapath.count(reason) - before;
        ensure!(count == u64::from(packets), "{count} of {packets} packets were {reason}: {:?}", datapath.counts());
        Ok(cost)
    }

    /// Packets that open flows, or those that come later.
    fn traffic(self, opens: bool) -> Traffic {
        let is_reply = self.road == Road::ReplyOnNode;
        let (client, service, backend) = match self.family {
            Family::V4 => ("172.16.0.0", "10.128.0.0", "10.0.2.10"),
            Family::V6 => ("fd00:c::", "fd00:5::", "fd00:2::a"),
        };
        let (source, destination) = if is_reply { (backend, client) } else { (client, service) };
        let packet = match self.family {
            Family::V4 => Packet::v4(source, destination),
            Family::V6 => Packet::v6(source, destination),
        };
        let ports = if is_reply { (80, 1024) } else { (1024, 80) };
        let (packet, transport) = match self.protocol {
            Protocol::Tcp if opens => (packet.tcp(ports.0, ports.1).syn(), 20),
            Protocol::Tcp => (packet.tcp(ports.0, ports.1).ack(), 20),
            Protocol::Udp => (packet.udp(ports.0, ports.1), 8),
        };
        // Where the addresses end in a packet.
        let (source_end, destination_end) = match self.family {
            Family::V4 => (30, 34),
            Family::V6 => (38, 54),
        };
        let bytes = packet.payload(&vec![0x55; LENGTH - destination_end - transport]).bytes();
        let tail = |address: usize| bytes.get(address - 4..address).and_then(|tail| tail.try_into().ok());
        let number = |address| tail(address).map_or(0, u32::from_be_bytes);
        let (client_end, service_end, port_offset) = if is_reply {
            (destination_end, source_end, destination_end + 2)
        } else {
            (source_end, destination_end, destination_end)
        };
        Traffic {
            packet: words(&bytes),
            next: 0,
            flow_mask: self.flows - 1,
            client_offset: (client_end - 4) as u16,
            port_offset: port_offset as u16,
            service_offset: (service_end - 4) as u16,
            _pad: 0,
            client: number(client_end),
            service: number(service_end),
            services: self.services,
        }
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (hook, reason) = (hook_name(self.hook), self.road.reason());
        write!(f, "{hook}, {reason}: {} {}, ", self.family.name(), self.protocol.name())?;
        write!(f, "{} flows, {} services", self.flows, self.services)
    }
}

impl Road {
    /// What its packets are counted as.
    const fn reason(self) -> &'static str {
        match self {
            Self::Forwarded => "tx",
            Self::RequestOnNode => "request-on-node",
            Self::ReplyOnNode => "reply-on-node",
        }
    }
}

impl Family {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

impl Protocol {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }
}

const fn hook_name(hook: Hook) -> &'static str {
    match hook {
        Hook::Xdp => "XDP",
        Hook::TcIngress => "tc ingress",
        Hook::TcPod => "tc pod",
        Hook::TcEgress => "tc egress",
    }
}

/// Measures what other traffic than ours pays, with one service there and tables of the default sizes.
pub(crate) fn strangers() -> Result<Vec<Stranger>> {
    let mut strangers = Vec::new();
    for family in [Family::V4, Family::V6] {
        strangers.extend(with_datapath(Sizes::DEFAULT, |datapath| strangers_of(datapath, family))?);
    }
    Ok(strangers)
}

fn strangers_of(datapath: &mut Datapath, family: Family) -> Result<Vec<Stranger>> {
    datapath.apply(&services_file(family, 1, false));
    let mut generator = Generator::load(datapath)?;
    let traffic = |flows| {
        let protocol = Protocol::Tcp;
        let ours = Case { hook: Hook::Xdp, road: Road::Forwarded, family, protocol, services: 1, flows }.traffic(false);
        Traffic { service: ours.service + 0x0010_0000, ..ours }
    };
    let mut not_ip = traffic(1);
    let mut bytes: Vec<u8> = not_ip.packet.iter().flat_map(|word| word.to_ne_bytes()).collect();
    // ARP, by its Ethernet protocol.
    bytes.splice(12..14, [0x08, 0x06]);
    not_ip.packet = words(&bytes);
    let kinds = [("not-ip", 1, not_ip), ("not-service", 1, traffic(1)), ("not-service", 1 << 16, traffic(1 << 16))];
    // What is not IP has no family.
    let kinds = kinds.into_iter().filter(|(reason, ..)| family == Family::V4 || *reason != "not-ip");
    kinds
        .map(|(reason, flows, traffic)| {
            let mut at = |hook| -> Result<f64> {
                let before = datapath.count(reason);
                let ns = generator.measure(datapath, hook, &traffic)?.ns;
                ensure!(datapath.count(reason) > before, "no packet was counted as {reason}");
                Ok(ns)
            };
            let (xdp_ns, tc_ingress_ns, tc_egress_ns) = (at(Hook::Xdp)?, at(Hook::TcIngress)?, at(Hook::TcEgress)?);
            Ok(Stranger { reason, family, flows, xdp_ns, tc_ingress_ns, tc_egress_ns })
        })
        .collect()
}

/// How many instructions the verifier went through for each program, where the kernel says.
pub(crate) fn verified_instructions() -> Result<Vec<(String, Option<u32>)>> {
    let sizes = Sizes { flows: 1 << 12, pending_flows: 1 << 12, ..Sizes::DEFAULT };
    let counts = with_datapath(sizes, |datapath| datapath.tables.dataplane().verified_instructions());
    counts.context("the kernel says nothing of the programs")
}

fn words(bytes: &[u8]) -> [u64; LENGTH / 8] {
    let mut words = [0; LENGTH / 8];
    for (word, chunk) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_ne_bytes(*chunk);
    }
    words
}

/// Services that stand one after another from 10.128.0.0 or `fd00:5::`, with backends behind the router, or one on this node.
fn services_file(family: Family, services: u32, is_on_node: bool) -> String {
    let backend = |number: u32| match (family, is_on_node) {
        (Family::V4, false) => format!("10.2.0.{number}"),
        (Family::V6, false) => format!("\"fd00:b::{number:x}\""),
        (Family::V4, true) => "10.0.2.10".to_owned(),
        (Family::V6, true) => "\"fd00:2::a\"".to_owned(),
    };
    let mut text = String::from("services:\n");
    for service in 0..services {
        let [a, b, c, d] = (0x0A80_0000 + service).to_be_bytes();
        let address = match family {
            Family::V4 => format!("{a}.{b}.{c}.{d}"),
            Family::V6 => format!("fd00:5::{:x}:{:x}", service >> 16, service & 0xFFFF),
        };
        // Many services share few backends each, or the file would be larger than it is worth.
        let list = if services > 1 || is_on_node {
            backend(service % BACKENDS)
        } else {
            (0..BACKENDS).map(backend).collect::<Vec<_>>().join(", ")
        };
        let _ = writeln!(
            text,
            "  - name: s{service}\n    addresses: [\"{address}\"]\n    ports: [{{ port: 80, protocol: TCP }}, {{ port: 80, protocol: UDP }}]\n    backends: [{list}]"
        );
    }
    text
}
