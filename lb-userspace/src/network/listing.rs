//! What the kernel lists: interfaces, addresses and routes, reduced to what matters here.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};

use super::NetworkError;

/// All that was listed at one time.
#[derive(Clone, Debug, Default)]
pub(super) struct Listing {
    pub(super) links: Vec<Link>,
    /// In the kernel's order: the oldest IPv4 address first, the oldest IPv6 address last.
    pub(super) addresses: Vec<Address>,
    pub(super) routes: Vec<Route>,
}

impl Listing {
    /// The interfaces of these names.
    pub(super) fn uplinks(&self, names: &[String]) -> impl Iterator<Item = &Link> {
        self.links.iter().filter(|link| names.contains(&link.name))
    }
}

/// An interface.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// What frames look like there.
    pub(crate) layer: LinkLayerType,
    /// What it was made as; hardware has none.
    pub(crate) kind: Option<InfoKind>,
    pub(crate) is_up: bool,
    pub(crate) has_carrier: bool,
    pub(crate) mtu: u32,
    /// The device that it sits on, of this network namespace.
    pub(crate) below: Option<u32>,
    /// The bridge, bond or the like that it is a port of.
    pub(crate) port_of: Option<u32>,
    /// The other end of a veth or netkit pair, where that is in this namespace, too.
    pub(crate) peer: Option<u32>,
    /// The XDP program that is attached.
    pub(crate) xdp_program: Option<u32>,
    /// Whether it has an address of a subnet, of which others may be behind it.
    pub(crate) has_subnet: bool,
}

/// An address of an interface.
#[derive(Clone, Debug)]
pub(super) struct Address {
    pub(super) interface: u32,
    pub(super) ip: IpAddr,
    pub(super) prefix: u8,
    pub(super) scope: AddressScope,
    pub(super) flags: AddressFlags,
}

/// A route of the main table that leads to its destinations without a gateway.
#[derive(Clone, Debug)]
pub(super) struct Route {
    pub(super) destination: IpNet,
    pub(super) interface: u32,
}

/// Notes which interfaces have an address of a subnet: link-local ones say nothing.
pub(super) fn note_subnets(links: &mut [Link], addresses: &[Address]) {
    let is_in_subnet = |it: &&Address| !it.stands_alone() && it.scope != AddressScope::Link;
    let with_subnets: BTreeSet<_> = addresses.iter().filter(is_in_subnet).map(|it| it.interface).collect();
    for link in links {
        link.has_subnet = with_subnets.contains(&link.index);
    }
}

pub(super) async fn links(handle: &Handle) -> Result<Vec<Link>, NetworkError> {
    let links = handle.link().get().execute().map_ok(|message| Link::read(&message));
    links.try_collect().await.map_err(listed("interfaces"))
}

pub(super) async fn addresses(handle: &Handle) -> Result<Vec<Address>, NetworkError> {
    let addresses = handle.address().get().execute().try_filter_map(async |message| Ok(Address::read(&message)));
    addresses.try_collect().await.map_err(listed("addresses"))
}

/// What `read` makes of the routes of both families.
pub(super) async fn routes<T>(
    handle: &Handle,
    read: impl Fn(&RouteMessage) -> Option<T>,
) -> Result<Vec<T>, NetworkError> {
    let families = [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
    let mut routes = Vec::new();
    for family in families {
        let mut messages = std::pin::pin!(handle.route().get(family).execute());
        while let Some(message) = messages.try_next().await.map_err(listed("routes"))? {
            routes.extend(read(&message));
        }
    }
    Ok(routes)
}

/// The address of a neighbour.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::from(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::from(*address)),
        _ => None,
    })
}

pub(super) fn listed(what: &'static str) -> impl Fn(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::List { what, source }
}

impl Link {
    pub(crate) fn is_ethernet(&self) -> bool {
        self.layer == LinkLayerType::Ether
    }

    pub(crate) fn is_loopback(&self) -> bool {
        self.layer == LinkLayerType::Loopback
    }

    pub(crate) fn is_veth(&self) -> bool {
        self.kind == Some(InfoKind::Veth)
    }

    /// Whether it is one end of a pair whose other end is in another network namespace, as a pod's is, and that alone is behind it.
    pub(super) fn leads_to_pod(&self) -> bool {
        matches!(self.kind, Some(InfoKind::Veth | InfoKind::Netkit)) && self.peer.is_none() && !self.has_subnet
    }

    /// Whether it is one device made of several.
    pub(super) fn is_bond(&self) -> bool {
        self.kind == Some(InfoKind::Bond)
    }

    fn read(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            layer: message.header.link_layer_type,
            kind: None,
            is_up: message.header.flags.contains(LinkFlags::Up),
            has_carrier: message.header.flags.contains(LinkFlags::LowerUp),
            mtu: 0,
            below: None,
            port_of: None,
            peer: None,
            xdp_program: None,
            has_subnet: false,
        };
        let (mut other, mut is_of_another_namespace) = (None, false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Link(index) => other = Some(*index),
                LinkAttribute::LinkNetNsId(_) => is_of_another_namespace = true,
                LinkAttribute::Controller(above) => link.port_of = Some(*above),
                LinkAttribute::Xdp(attributes) => link.xdp_program = attributes.iter().find_map(program),
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.clone()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        match link.kind {
            _ if is_of_another_namespace => {}
            // With these the number is that of the other end.
            Some(InfoKind::Veth | InfoKind::Netkit) => link.peer = other,
            _ => link.below = other,
        }
        link
    }
}

/// The number of an attached program, whichever way it is attached.
fn program(attribute: &LinkXdp) -> Option<u32> {
    use LinkXdp::{DrvProgId, HwProgId, ProgId, SkbProgId};
    match attribute {
        ProgId(id) | DrvProgId(id) | SkbProgId(id) | HwProgId(id) => Some(*id).filter(|id| *id != 0),
        _ => None,
    }
}

/// Interfaces for tests, which are up and have nothing special.
#[cfg(test)]
impl Link {
    pub(crate) fn of(index: u32, name: &str, kind: Option<InfoKind>) -> Self {
        Self {
            index,
            name: name.to_owned(),
            layer: LinkLayerType::Ether,
            kind,
            is_up: true,
            has_carrier: true,
            mtu: 1500,
            below: None,
            port_of: None,
            peer: None,
            xdp_program: None,
            has_subnet: false,
        }
    }
}

impl Address {
    fn read(message: &AddressMessage) -> Option<Self> {
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
        Some(Self {
            interface: message.header.index,
            // On a point-to-point link `Address` is the other end.
            ip: local.or(address)?,
            prefix: message.header.prefix_len,
            scope: message.header.scope,
            flags,
        })
    }

    /// Whether it is this machine's for sure: not while another may turn out to have it (RFC 4862, section 5.4).
    pub(super) fn is_valid(&self) -> bool {
        !self.flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed)
    }

    /// Whether packets may leave with it: valid, global, not on its way out, and the first of its subnet.
    pub(super) fn is_source(&self) -> bool {
        let is_secondary = self.ip.is_ipv4() && self.flags.contains(AddressFlags::Secondary);
        let is_global = matches!(self.scope, AddressScope::Universe | AddressScope::Site);
        self.is_valid() && is_global && !is_secondary && !self.flags.contains(AddressFlags::Deprecated)
    }

    /// Whether it is of no subnet.
    pub(super) fn stands_alone(&self) -> bool {
        self.prefix == if self.ip.is_ipv4() { 32 } else { 128 }
    }
}

impl Route {
    pub(super) fn read(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        let mut table = u32::from(header.table);
        let mut destination = None;
        let mut interface = None;
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = Some(IpAddr::from(*address)),
                RouteAttribute::Destination(RouteAddress::Inet6(address)) => destination = Some(IpAddr::from(*address)),
                RouteAttribute::Oif(index) => interface = Some(*index),
                RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::NhId(_) => return None,
                _ => {}
            }
        }
        // The scope says nothing: routes to pods have that of a link, of the host, or the whole universe, as who makes them likes.
        let is_ours = table == u32::from(RouteHeader::RT_TABLE_MAIN) && header.kind == RouteType::Unicast;
        let destination = IpNet::new(destination?, header.destination_prefix_length).ok()?;
        Some(Self { destination, interface: interface.filter(|_| is_ours)? })
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::{AddressFamily, route::RouteScope};

    use super::*;

    #[test]
    fn a_route_to_a_pod_has_whatever_scope_its_maker_gave_it_and_no_gateway() {
        let read = |scope, more: &[RouteAttribute]| {
            let mut message = RouteMessage::default();
            message.header.address_family = AddressFamily::Inet;
            message.header.destination_prefix_length = 32;
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            message.header.kind = RouteType::Unicast;
            message.header.scope = scope;
            let pod = RouteAddress::Inet(Ipv4Addr::new(10, 244, 0, 2));
            message.attributes = [&[RouteAttribute::Destination(pod), RouteAttribute::Oif(7)], more].concat();
            Route::read(&message).map(|route| route.destination.to_string())
        };
        for scope in [RouteScope::Link, RouteScope::Host, RouteScope::Universe] {
            assert_eq!(read(scope, &[]).as_deref(), Some("10.244.0.2/32"), "{scope:?}");
            let gateway = RouteAttribute::Gateway(RouteAddress::Inet(Ipv4Addr::new(10, 0, 0, 1)));
            assert_eq!(read(scope, &[gateway]), None, "{scope:?}");
        }
    }
}
