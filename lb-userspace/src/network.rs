//! The machine's interfaces, addresses, routes and neighbours, as rtnetlink tells of them.

pub(crate) mod generic;
mod listing;
pub(crate) mod netlink;
mod node;
mod source;
pub(crate) mod survey;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::IpAddr,
    sync::Arc,
};

use futures::{StreamExt as _, TryStreamExt as _, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    Handle, MulticastGroup, new_connection, new_multicast_connection,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        tc::{TcHandle, TcMessage},
    },
    sys::SocketAddr,
};
use tracing::{debug, error};

use self::listing::{Link, Listing, Route};
pub use self::node::{NodePorts, PodInterfaces};
use crate::{dataplane::kernel::Addresses, policy::Node};

/// Which interfaces are what, and what else the operator says about this node.
#[derive(Clone, Debug, Default)]
pub struct Roles {
    /// The names of the interfaces that clients and backends are reached by.
    pub uplinks: Vec<String>,
    /// The devices towards pods that packets are to be met on.
    pub pod_interfaces: PodInterfaces,
    /// The node's name.
    pub node_name: Option<Arc<str>>,
    /// On which of the node's addresses a NodePort is served.
    pub node_ports: NodePorts,
    /// Whether sockets of the node are balanced: then they find its NodePorts at localhost, too.
    pub balances_sockets: bool,
}

/// A device that is to be attached to because pods are behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodDevice {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
}

/// Follows the network of this namespace.
pub struct Network {
    /// To ask.
    handle: Handle,
    /// As long as there is one, what changes is told.
    _listener: Handle,
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    roles: Roles,
    listing: Listing,
    /// The devices whose routes tell of pods.
    pod_facing: BTreeSet<u32>,
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
    /// An interface, an address, or a route to pods, and so perhaps the next hops, too: [`Network::look`] has news.
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
    /// A qdisc could not be removed.
    #[error("the kernel refused to remove a clsact qdisc")]
    Qdisc(#[source] rtnetlink::Error),
    /// Such an interface can't be balanced on.
    #[error(
        "interface {interface} is no Ethernet device ({kind}): packets there have no Ethernet header, which wharf reads \
         and writes; name the Ethernet devices that clients and backends are reached by"
    )]
    NotEthernet {
        /// Which.
        interface: String,
        /// What it is.
        kind: String,
    },
}

impl NetworkError {
    /// Whether this process may not do it.
    pub fn is_forbidden(&self) -> bool {
        match self {
            Self::Qdisc(rtnetlink::Error::NetlinkError(error)) => error.raw_code() == -libc::EPERM,
            _ => false,
        }
    }
}

impl Network {
    /// Begins to follow, and looks around. Has to be called inside a tokio runtime.
    pub async fn follow(roles: Roles) -> Result<Self, NetworkError> {
        let (listening, listener, messages) = new_multicast_connection(&[
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
        tokio::spawn(listening);
        // Where there is no room for all that the kernel tells, an answer would be lost among it, and waited for in vain.
        let (asking, handle, _) = new_connection().map_err(NetworkError::Socket)?;
        tokio::spawn(asking);
        let mut network = Self {
            handle,
            _listener: listener,
            messages,
            roles,
            listing: Listing::default(),
            pod_facing: BTreeSet::new(),
            neighbours: HashMap::new(),
        };
        network.list_neighbours().await?;
        network.look().await?;
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

    /// Reads all interfaces and addresses, and the routes if there are pods to look for; what the methods below say is of
    /// the last look.
    pub async fn look(&mut self) -> Result<(), NetworkError> {
        self.listing.links = listing::links(&self.handle).await?;
        self.listing.addresses = listing::addresses(&self.handle).await?;
        listing::note_subnets(&mut self.listing.links, &self.listing.addresses);
        self.pod_facing = self.roles.pod_facing(&self.listing.links);
        // A router may have a million routes, but no pods.
        self.listing.routes =
            if self.pod_facing.is_empty() { Vec::new() } else { listing::routes(&self.handle, Route::read).await? };
        Ok(())
    }

    /// An error if an uplink is one that can't be balanced on.
    pub fn check_uplinks(&self) -> Result<(), NetworkError> {
        match self.listing.uplinks(&self.roles.uplinks).find(|link| !link.is_ethernet()) {
            Some(link) => Err(NetworkError::NotEthernet { interface: link.name.clone(), kind: link.layer.to_string() }),
            None => Ok(()),
        }
    }

    /// Whether an interface is an end of a veth pair.
    pub fn is_veth(&self, interface: u32) -> bool {
        self.link(interface).is_some_and(Link::is_veth)
    }

    /// The bridge, or the like, that an interface is a port of.
    pub fn bridge_of(&self, interface: u32) -> Option<u32> {
        self.link(interface)?.port_of
    }

    /// The interfaces by which the stack takes in what is forwarded: uplinks, VLAN devices on them, and the ports of those uplinks that
    /// are bonds, as by these it comes with XDP in the driver.
    pub fn takes_in_by(&self) -> BTreeSet<u32> {
        let uplinks = &self.roles.uplinks;
        let bonds: BTreeSet<_> = self.listing.uplinks(uplinks).filter(|it| it.is_bond()).map(|it| it.index).collect();
        let is_port = |link: &&Link| link.port_of.is_some_and(|of| bonds.contains(&of));
        let ports = self.listing.links.iter().filter(is_port).map(|link| link.index);
        source::interfaces(&self.listing, uplinks).into_keys().chain(ports).collect()
    }

    fn link(&self, interface: u32) -> Option<&Link> {
        self.listing.links.iter().find(|link| link.index == interface)
    }

    /// The addresses of the uplinks, and of the VLAN devices on them, by interface number, and those to take where an
    /// interface has none, at [`crate::dataplane::kernel::ANYWHERE`].
    pub fn addresses(
        &self,
        before: &BTreeMap<u32, Addresses>,
        is_frontend: impl Fn(IpAddr) -> bool,
    ) -> BTreeMap<u32, Addresses> {
        source::addresses(&self.listing, &self.roles.uplinks, before, is_frontend)
    }

    /// The devices towards pods on which packets are to be met, and can be.
    pub fn pod_devices(&self) -> Vec<PodDevice> {
        self.roles.pod_devices(&self.listing.links, &self.pod_facing)
    }

    /// The node, whose primary addresses are these.
    pub fn node(&self, primary: Addresses) -> Node {
        self.roles.node(&self.listing, &self.pod_facing, primary)
    }

    /// Makes the kernel ask neighbours on these interfaces that it has not heard of for a while. It does that by itself only
    /// for those that it sends to, and our programs send past it: one that has changed its Ethernet address would never be noticed.
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
        while let Some(message) = neighbours.try_next().await.map_err(listing::listed("neighbours"))? {
            self.note_neighbour(&message, true);
        }
        Ok(())
    }

    fn read(&mut self, payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<Change> {
        match payload {
            NetlinkPayload::InnerMessage(message) => match message {
                RouteNetlinkMessage::NewNeighbour(message) => self.note_neighbour(&message, true),
                RouteNetlinkMessage::DelNeighbour(message) => self.note_neighbour(&message, false),
                RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message) => {
                    let is_to_pods = Route::read(&message).is_some_and(|it| self.pod_facing.contains(&it.interface));
                    Some(if is_to_pods { Change::Addresses } else { Change::Hops })
                }
                RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => Some(Change::Hops),
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
        let mac = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(address) => Some(address.clone()),
            _ => None,
        });
        let key = (message.header.ifindex, listing::neighbour(message)?);
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

/// The name of an interface.
pub(crate) fn name_of(index: u32) -> Option<String> {
    let name = nix::net::if_::if_indextoname(index).ok()?.into_string().ok()?;
    // Nothing is what there is of a number that no interface has.
    (!name.is_empty()).then_some(name)
}

/// The name by which the kernel tells of an interface, which may have been given by another one of its own.
pub(crate) fn canonical_name(interface: &str) -> Option<String> {
    nix::net::if_::if_nametoindex(interface).ok().and_then(name_of)
}

/// Removes the clsact qdisc of an interface, if nobody has a filter there.
pub async fn remove_empty_clsact(interface: u32) -> Result<(), NetworkError> {
    let (connection, handle, _) = new_connection().map_err(NetworkError::Socket)?;
    tokio::spawn(connection);
    let index = interface.cast_signed();
    let ingress = handle.traffic_filter(index).get().ingress().execute();
    let egress = handle.traffic_filter(index).get().egress().execute();
    let mut filters = std::pin::pin!(ingress.chain(egress));
    if filters.try_next().await.map_err(listing::listed("filters"))?.is_some() {
        return Ok(());
    }
    let mut request = handle.qdisc().del(index);
    let TcMessage { header, .. } = request.message_mut();
    header.parent = TcHandle::CLSACT;
    header.handle = TcHandle { major: 0xffff, minor: 0 };
    request.execute().await.map_err(NetworkError::Qdisc)
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network").field("neighbours", &self.neighbours.len()).finish_non_exhaustive()
    }
}
