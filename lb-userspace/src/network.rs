//! The machine's interfaces, addresses, routes and neighbours, as rtnetlink tells of them.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::IpAddr,
};

use futures::{StreamExt as _, TryStreamExt as _, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
        link::{InfoKind, LinkAttribute, LinkInfo},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    },
    sys::SocketAddr,
};

use tracing::{debug, error};

use crate::{dataplane::kernel::Addresses, model::Desired};

/// Follows the network of this namespace.
pub struct Network {
    handle: Handle,
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    /// Interface and address → those that are resolved.
    neighbours: HashMap<(u32, IpAddr), Neighbour>,
}

/// A neighbour whose Ethernet address is known.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Neighbour {
    mac: Vec<u8>,
    /// Not confirmed for a while.
    is_stale: bool,
}

/// What the datapath has to know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// A route, a rule, or a neighbour's Ethernet address: next hops have to be asked for again.
    Hops,
    /// An interface or an address, and so perhaps the next hops, too.
    Addresses,
    /// Nobody knows: the kernel had more to tell than could be taken in.
    Everything,
}

/// Why the network could not be read.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no socket to the kernel.
    #[error("no rtnetlink socket could be opened")]
    Socket(#[source] io::Error),
    /// The kernel refused to tell.
    #[error("the kernel refused to list {what}")]
    List {
        /// What.
        what: &'static str,
        /// What it said.
        source: rtnetlink::Error,
    },
}

impl Network {
    /// Begins to follow. Has to be called inside a tokio runtime.
    pub async fn follow() -> Result<Self, NetworkError> {
        let (connection, handle, messages) = new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Neigh,
        ])
        .map_err(NetworkError::Socket)?;
        tokio::spawn(connection);
        let mut network = Self { handle, messages, neighbours: HashMap::new() };
        network.list_neighbours().await?;
        Ok(network)
    }

    /// The next change; several that have come already count as the greatest of them.
    pub async fn change(&mut self) -> Change {
        loop {
            let Some((message, _)) = self.messages.next().await else {
                error!(
                    "rtnetlink has ended: changes of routes and neighbours are not followed any more; restart wharf"
                );
                return std::future::pending().await;
            };
            let mut change = self.read(message.payload);
            while let Ok((message, _)) = self.messages.try_recv() {
                change = change.max(self.read(message.payload));
            }
            if let Some(change) = change {
                return change;
            }
        }
    }

    /// The addresses of these interfaces, and of the VLAN devices on them, by interface number.
    ///
    /// Of several addresses the one that was chosen before stays; clients of a new one would lose nothing, but flows of the
    /// old one would. Else an address of a subnet comes before one that stands alone, which often moves to
    /// another machine, and any of them before one that is a frontend.
    pub async fn addresses(
        &self,
        interfaces: &[String],
        before: &BTreeMap<u32, Addresses>,
        desired: &Desired,
    ) -> Result<BTreeMap<u32, Addresses>, NetworkError> {
        let listed = |what| move |source| NetworkError::List { what, source };
        let mut ours = BTreeMap::new();
        let mut children = Vec::new();
        let mut links = std::pin::pin!(self.handle.link().get().execute());
        while let Some(link) = links.try_next().await.map_err(listed("interfaces"))? {
            let index = link.header.index;
            let mut parent = None;
            let mut is_vlan = false;
            for attribute in &link.attributes {
                match attribute {
                    LinkAttribute::IfName(name) if interfaces.contains(name) => {
                        ours.insert(index, Addresses { is_attached: true, ..Addresses::default() });
                    }
                    LinkAttribute::Link(below) => parent = Some(*below),
                    LinkAttribute::LinkInfo(infos) => is_vlan = infos.contains(&LinkInfo::Kind(InfoKind::Vlan)),
                    _ => {}
                }
            }
            // Other kinds have such a number, too; a veth's is of another namespace.
            children.extend(parent.filter(|_| is_vlan).map(|parent| (index, parent)));
        }
        for (child, parent) in children {
            if ours.contains_key(&parent) {
                ours.entry(child).or_default();
            }
        }
        let mut candidates = Vec::new();
        let mut addresses = std::pin::pin!(self.handle.address().get().execute());
        while let Some(message) = addresses.try_next().await.map_err(listed("addresses"))? {
            if let Some(address) = usable(&message) {
                candidates.push(Candidate {
                    interface: message.header.index,
                    is_frontend: desired.is_frontend(address),
                    stands_alone: message.header.prefix_len == if address.is_ipv4() { 32 } else { 128 },
                    address,
                });
            }
        }
        for (&interface, known) in &mut ours {
            let present = before.get(&interface).copied().unwrap_or_default();
            let here = || candidates.iter().filter(move |candidate| candidate.interface == interface);
            // The kernel lists the oldest IPv4 address first, and the oldest IPv6 address last.
            let v4 = choose(here().filter(|it| it.address.is_ipv4()), present.v4.map(IpAddr::V4));
            let v6 = choose(here().filter(|it| it.address.is_ipv6()).rev(), present.v6.map(IpAddr::V6));
            if let Some(IpAddr::V4(address)) = v4 {
                known.v4 = Some(address);
            }
            if let Some(IpAddr::V6(address)) = v6 {
                known.v6 = Some(address);
            }
        }
        Ok(ours)
    }

    /// Makes the kernel ask neighbours on these interfaces that it has not heard of for a while. It does that by itself only
    /// for those that it sends to, and XDP sends past it: one that has changed its Ethernet address would never be noticed.
    pub async fn confirm_neighbours(&self, is_ours: impl Fn(u32) -> bool) {
        for (&(interface, address), neighbour) in &self.neighbours {
            if neighbour.is_stale && is_ours(interface) {
                let request = self.handle.neighbours().add(interface, address).replace();
                let request = request.state(NeighbourState::Stale).flags(NeighbourFlags::Use);
                if let Err(error) = request.execute().await {
                    // It may have gone meanwhile.
                    debug!(%error, "cannot have {address} confirmed");
                }
            }
        }
    }

    /// Learns all neighbours anew.
    pub async fn list_neighbours(&mut self) -> Result<(), NetworkError> {
        self.neighbours.clear();
        let handle = self.handle.clone();
        let mut neighbours = std::pin::pin!(handle.neighbours().get().execute());
        while let Some(message) =
            neighbours.try_next().await.map_err(|source| NetworkError::List { what: "neighbours", source })?
        {
            self.note_neighbour(&message, true);
        }
        Ok(())
    }

    fn read(&mut self, payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<Change> {
        match payload {
            NetlinkPayload::InnerMessage(message) => match message {
                RouteNetlinkMessage::NewNeighbour(message) => self.note_neighbour(&message, true),
                RouteNetlinkMessage::DelNeighbour(message) => self.note_neighbour(&message, false),
                RouteNetlinkMessage::NewRoute(_)
                | RouteNetlinkMessage::DelRoute(_)
                | RouteNetlinkMessage::NewRule(_)
                | RouteNetlinkMessage::DelRule(_) => Some(Change::Hops),
                RouteNetlinkMessage::NewLink(_)
                | RouteNetlinkMessage::DelLink(_)
                | RouteNetlinkMessage::NewAddress(_)
                | RouteNetlinkMessage::DelAddress(_) => Some(Change::Addresses),
                _ => None,
            },
            NetlinkPayload::Overrun(_) => Some(Change::Everything),
            _ => None,
        }
    }

    /// A neighbour that is merely confirmed or grows stale changes nothing. Nor does a new one that was unknown until
    /// now: no flow remembers a next hop without an address. Most of what the kernel tells is of these kinds.
    fn note_neighbour(&mut self, message: &NeighbourMessage, is_there: bool) -> Option<Change> {
        let (mut destination, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                    destination = Some(IpAddr::from(*address));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                    destination = Some(IpAddr::from(*address));
                }
                NeighbourAttribute::LinkLayerAddress(address) => mac = Some(address.clone()),
                _ => {}
            }
        }
        let key = (message.header.ifindex, destination?);
        let resolved = matches!(
            message.header.state,
            NeighbourState::Reachable
                | NeighbourState::Stale
                | NeighbourState::Delay
                | NeighbourState::Probe
                | NeighbourState::Permanent
                | NeighbourState::Noarp
        );
        let before = match mac.filter(|_| is_there && resolved) {
            Some(mac) => {
                let is_stale = message.header.state == NeighbourState::Stale;
                match self.neighbours.insert(key, Neighbour { mac: mac.clone(), is_stale }) {
                    Some(before) if before.mac == mac => return None,
                    before => before,
                }
            }
            None => self.neighbours.remove(&key),
        };
        before.map(|_| Change::Hops)
    }
}

/// An address that packets could leave an interface with.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    interface: u32,
    is_frontend: bool,
    /// Of no subnet.
    stands_alone: bool,
    address: IpAddr,
}

/// The best of an interface's addresses, the oldest coming first. See [`Network::addresses`].
fn choose<'a>(candidates: impl Iterator<Item = &'a Candidate> + Clone, present: Option<IpAddr>) -> Option<IpAddr> {
    let stays = candidates.clone().find(|it| !it.is_frontend && Some(it.address) == present);
    stays.or_else(|| candidates.min_by_key(|it| (it.is_frontend, it.stands_alone))).map(|it| it.address)
}

/// An address that packets may leave with: global, no duplicate, not on its way out, and the first of its subnet.
fn usable(message: &AddressMessage) -> Option<IpAddr> {
    let mut address = None;
    let mut local = None;
    let mut flags = AddressFlags::empty();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(found) => address = Some(*found),
            AddressAttribute::Local(found) => local = Some(*found),
            AddressAttribute::Flags(found) => flags = *found,
            _ => {}
        }
    }
    let unusable = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
    let is_secondary = message.header.family == AddressFamily::Inet && flags.contains(AddressFlags::Secondary);
    let is_global = matches!(message.header.scope, AddressScope::Universe | AddressScope::Site);
    // On a point-to-point link `Address` is the other end.
    (is_global && !flags.intersects(unusable) && !is_secondary).then_some(local.or(address)?)
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network").field("neighbours", &self.neighbours.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Addresses with a slash stand alone, with a star are frontends.
    #[track_caller]
    fn check(candidates: &[&str], present: Option<&str>, expect: Option<&str>) {
        let candidates: Vec<_> = candidates
            .iter()
            .map(|text| Candidate {
                interface: 1,
                is_frontend: text.contains('*'),
                stands_alone: text.contains('/'),
                address: text.trim_matches(['*', '/']).parse().unwrap(),
            })
            .collect();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(choose(candidates.iter(), present.map(address)), expect.map(address));
    }

    #[test]
    fn the_oldest_address_of_a_subnet_is_chosen_and_stays() {
        check(&[], None, None);
        check(&["10.0.0.1", "10.0.0.2"], None, Some("10.0.0.1"));
        check(&["10.0.0.9", "10.0.0.1", "10.0.0.2"], Some("10.0.0.1"), Some("10.0.0.1"));
        check(&["10.0.0.2"], Some("10.0.0.1"), Some("10.0.0.2"));
    }

    #[test]
    fn an_address_that_may_move_away_comes_last() {
        check(&["10.0.0.7/", "10.0.0.1"], None, Some("10.0.0.1"));
        check(&["10.0.0.6*", "10.0.0.7/", "10.0.0.8/*"], None, Some("10.0.0.7"));
        check(&["10.0.0.6*", "10.0.0.1"], Some("10.0.0.6"), Some("10.0.0.1"));
        check(&["10.0.0.6*"], None, Some("10.0.0.6"));
    }
}
