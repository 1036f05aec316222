//! What services have to know of this node: pure functions over what the kernel listed.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use glob::Pattern;
use ipnet::IpNet;
use rtnetlink::packet_route::link::{InfoKind, LinkLayerType};

use super::{
    PodDevice, Roles,
    listing::{Link, Listing},
};
use crate::{dataplane::kernel::Addresses, policy::Node};

/// On which devices packets of pods are met.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PodInterfaces {
    /// None.
    #[default]
    None,
    /// Those whose names match one of these, but for uplinks.
    Named(Vec<Pattern>),
    /// Those that lead into another network namespace and to nothing else, as they do by which network plugins connect pods.
    ByKind,
}

impl PodInterfaces {
    /// What is said for no device, and for those that are found by their kind.
    const NONE: &str = "none";
    const BY_KIND: &str = "auto";

    /// What these values of `--pod-interface` say together; `None` if there are none.
    ///
    /// # Errors
    /// `auto` and `none` stand alone.
    pub fn read(values: Vec<Pattern>) -> Result<Option<Self>, String> {
        let is_word = |value: &&Pattern| [Self::NONE, Self::BY_KIND].contains(&value.as_str());
        Ok(match (values.iter().find(is_word), values.len()) {
            (_, 0) => None,
            (None, _) => Some(Self::Named(values)),
            (Some(word), 1) if word.as_str() == Self::NONE => Some(Self::None),
            (Some(_by_kind), 1) => Some(Self::ByKind),
            (Some(word), _) => return Err(format!("--pod-interface {word} stands alone, without another one")),
        })
    }

    /// The values that say the same.
    pub fn values(&self) -> Vec<String> {
        match self {
            Self::None => Vec::new(),
            Self::Named(patterns) => patterns.iter().map(|pattern| pattern.as_str().to_owned()).collect(),
            Self::ByKind => vec![Self::BY_KIND.to_owned()],
        }
    }
}

impl fmt::Display for PodInterfaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Named(_) => write!(f, "those called {}", self.values().join(", ")),
            Self::ByKind => f.write_str("veth and netkit devices whose other end is in another network namespace, without an address of a subnet"),
        }
    }
}

/// On which of the node's addresses a NodePort is served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePorts {
    /// All of them.
    #[default]
    All,
    /// The one of each family that packets to backends leave the first uplink with.
    Primary,
    /// Those in these ranges; in a family that has none of them, all.
    In(Vec<IpNet>),
}

impl FromStr for NodePorts {
    type Err = String;

    /// As kube-proxy's `--nodeport-addresses`: ranges with commas between them, `primary`, or nothing for all.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" => return Ok(Self::All),
            "primary" => return Ok(Self::Primary),
            _ => {}
        }
        let range = |text: &str| {
            text.trim().parse().map_err(|_| format!("{text:?} is not a range such as 192.0.2.0/24, nor primary alone"))
        };
        text.split(',').map(range).collect::<Result<_, _>>().map(Self::In)
    }
}

impl Roles {
    /// The devices on which packets of pods are met: of those that have Ethernet headers. Which devices are pod-facing is known
    /// already.
    pub(super) fn pod_devices(&self, links: &[Link], pod_facing: &BTreeSet<u32>) -> Vec<PodDevice> {
        let uplinks: BTreeSet<_> = links.iter().filter(|it| self.is_uplink(it)).map(|it| it.index).collect();
        // What comes by a port of an uplink is met on that.
        let is_beside_uplinks = |link: &Link| link.port_of.is_none_or(|of| !uplinks.contains(&of));
        let is_for_pods = |link: &Link| match &self.pod_interfaces {
            PodInterfaces::None => false,
            PodInterfaces::Named(_) => self.is_named_for_pods(link),
            PodInterfaces::ByKind => pod_facing.contains(&link.index) && link.leads_to_pod() && is_beside_uplinks(link),
        };
        links
            .iter()
            .filter(|link| link.is_ethernet() && is_for_pods(link))
            .map(|link| PodDevice { index: link.index, name: link.name.clone() })
            .collect()
    }

    fn is_uplink(&self, link: &Link) -> bool {
        self.uplinks.contains(&link.name)
    }

    fn is_named_for_pods(&self, link: &Link) -> bool {
        let PodInterfaces::Named(patterns) = &self.pod_interfaces else { return false };
        !self.is_uplink(link) && patterns.iter().any(|pattern| pattern.matches(&link.name))
    }

    /// Devices behind which there is nothing but this node: those that match a pattern, and those of the kinds that
    /// connect pods and virtual machines, where nothing below or inside them leads out of the node.
    pub(super) fn pod_facing(&self, links: &[Link]) -> BTreeSet<u32> {
        let mut outward: BTreeSet<_> =
            links.iter().filter(|link| self.is_uplink(link) || !stays_inside(link)).map(|it| it.index).collect();
        // What sits on such a device leads out as well, and so does what has one for a port.
        loop {
            let on_them = links.iter().filter(|it| it.below.is_some_and(|below| outward.contains(&below)));
            let with_them = links.iter().filter(|it| outward.contains(&it.index)).filter_map(|it| it.port_of);
            let more: Vec<_> = on_them.map(|it| it.index).chain(with_them).filter(|it| !outward.contains(it)).collect();
            if more.is_empty() {
                break;
            }
            outward.extend(more);
        }
        let is_inside = |link: &&Link| !outward.contains(&link.index) || self.is_named_for_pods(link);
        links.iter().filter(is_inside).map(|link| link.index).collect()
    }

    /// The node, whose primary addresses are these.
    pub(super) fn node(&self, listing: &Listing, pod_facing: &BTreeSet<u32>, primary: Addresses) -> Node {
        let of_services = listing.links.iter().find(|link| link.name == IPVS_DEVICE).map(|link| link.index);
        let valid = listing.addresses.iter().filter(|it| it.is_valid() && Some(it.interface) != of_services);
        let addresses: BTreeSet<_> = valid.map(|it| it.ip).filter(is_reachable).collect();
        let primary = [primary.v4.map(IpAddr::from), primary.v6.map(IpAddr::from)];
        let serves_node_ports = |address: &IpAddr| match &self.node_ports {
            NodePorts::All => true,
            NodePorts::Primary => primary.contains(&Some(*address)),
            // As kube-proxy has it (Kubernetes, `NewNodePortAddresses` in `pkg/proxy/util/nodeport_addresses.go`).
            NodePorts::In(ranges) => {
                let mut of_family =
                    ranges.iter().filter(|range| range.addr().is_ipv4() == address.is_ipv4()).peekable();
                of_family.peek().is_none() || of_family.any(|range| range.contains(address))
            }
        };
        // In the tables one entry stands for all addresses of loopback, which only sockets ever look for.
        let (here, elsewhere): (Vec<_>, Vec<_>) = LOCALHOST
            .into_iter()
            .filter(|_| self.balances_sockets)
            .partition(|(loopback, _)| serves_node_ports(loopback));
        let served: BTreeSet<_> = addresses.iter().copied().filter(serves_node_ports).collect();
        let is_served = |family: &IpAddr| served.iter().any(|address| address.is_ipv4() == family.is_ipv4());
        let unspecified = |(_, unspecified): (IpAddr, IpAddr)| unspecified;
        Node {
            name: self.node_name.clone(),
            // That is its source's to say.
            zone: None,
            bind_only: elsewhere.into_iter().map(unspecified).filter(is_served).collect(),
            node_port_addresses: served.into_iter().chain(here.into_iter().map(unspecified)).collect(),
            addresses,
            pod_subnets: listing
                .routes
                .iter()
                .filter(|route| pod_facing.contains(&route.interface))
                .map(|route| route.destination.trunc())
                // A default route says nothing about where pods are.
                .filter(|subnet| subnet.prefix_len() > 0 && is_reachable(&subnet.addr()))
                .collect(),
        }
    }
}

/// The device that kube-proxy in its mode `ipvs` gives the addresses of all services, and may have left behind
/// (Kubernetes, `defaultDummyDevice` in `pkg/proxy/ipvs`): they are not this node's.
const IPVS_DEVICE: &str = "kube-ipvs0";

/// The loopback address of each family, and the address that stands for it in the tables.
const LOCALHOST: [(IpAddr, IpAddr); 2] = [
    (IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
    (IpAddr::V6(Ipv6Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
];

/// Whether a device by itself leads to nothing but this node.
fn stays_inside(link: &Link) -> bool {
    use InfoKind::{Bridge, Dummy, Netkit, Tun, Veth};
    match link.kind {
        // Loopback leads nowhere, and nobody is behind it.
        Some(Bridge | Dummy | Netkit | Veth) => link.layer != LinkLayerType::Loopback,
        // With Ethernet headers it is a virtual machine's, without them a tunnel.
        Some(Tun) => link.is_ethernet(),
        _ => false,
    }
}

/// Whether others can have an address of this kind, and be reached by it from anywhere.
fn is_reachable(address: &IpAddr) -> bool {
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !address.is_loopback() && !is_link_local && !address.is_multicast() && !address.is_unspecified()
}

#[cfg(test)]
mod tests;
