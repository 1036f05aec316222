//! What the kernel lists: interfaces, addresses and routes, reduced to what matters here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
        link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType},
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

/// An interface.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// What frames look like there.
    pub(super) layer: LinkLayerType,
    /// What it was made as; hardware has none.
    pub(super) kind: Option<InfoKind>,
    /// The device that it sits on, of this network namespace.
    pub(super) below: Option<u32>,
    /// The bridge, bond or the like that it is a port of.
    pub(super) port_of: Option<u32>,
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

pub(super) async fn links(handle: &Handle) -> Result<Vec<Link>, NetworkError> {
    let links = handle.link().get().execute().map_ok(|message| Link::read(&message));
    links.try_collect().await.map_err(listed("interfaces"))
}

pub(super) async fn addresses(handle: &Handle) -> Result<Vec<Address>, NetworkError> {
    let addresses = handle.address().get().execute().try_filter_map(async |message| Ok(Address::read(&message)));
    addresses.try_collect().await.map_err(listed("addresses"))
}

pub(super) async fn routes(handle: &Handle) -> Result<Vec<Route>, NetworkError> {
    let families = [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
    let mut routes = Vec::new();
    for family in families {
        let mut messages = std::pin::pin!(handle.route().get(family).execute());
        while let Some(message) = messages.try_next().await.map_err(listed("routes"))? {
            routes.extend(Route::read(&message));
        }
    }
    Ok(routes)
}

pub(super) fn listed(what: &'static str) -> impl Fn(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::List { what, source }
}

impl Link {
    pub(super) fn is_ethernet(&self) -> bool {
        self.layer == LinkLayerType::Ether
    }

    pub(super) fn read(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            layer: message.header.link_layer_type,
            kind: None,
            below: None,
            port_of: None,
        };
        let mut is_of_another_namespace = false;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Link(below) => link.below = Some(*below),
                LinkAttribute::LinkNetNsId(_) => is_of_another_namespace = true,
                LinkAttribute::Controller(above) => link.port_of = Some(*above),
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.clone()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        // With these the number is that of the other end.
        if is_of_another_namespace || matches!(link.kind, Some(InfoKind::Veth | InfoKind::Netkit)) {
            link.below = None;
        }
        link
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
        // IPv6 routes have no scope: all are "universe".
        let is_direct = header.scope == RouteScope::Link || header.address_family == AddressFamily::Inet6;
        let is_ours = table == u32::from(RouteHeader::RT_TABLE_MAIN) && header.kind == RouteType::Unicast && is_direct;
        let destination = IpNet::new(destination?, header.destination_prefix_length).ok()?;
        Some(Self { destination, interface: interface.filter(|_| is_ours)? })
    }
}
