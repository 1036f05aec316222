//! The network as it is at one moment, with all that may be wrong about it: for `wharf doctor`.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt as _;
use nix::errno::Errno;
pub(crate) use rtnetlink::packet_route::{link::InfoKind, neighbour::NeighbourState};
use rtnetlink::{
    Handle, RouteMessageBuilder, new_connection,
    packet_route::{
        link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage, LinkXdp},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
    },
};

use super::{
    NetworkError, Roles,
    listing::{self, Link},
};

/// What there is in this network namespace.
pub(crate) struct Survey {
    handle: Handle,
    pub(crate) devices: Vec<Device>,
    links: Vec<Link>,
    /// The addresses that packets may leave with, by the number of their interface.
    pub(crate) addresses: Vec<(u32, IpAddr)>,
    neighbours: HashMap<(u32, IpAddr), NeighbourState>,
}

/// An interface.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// What it was made as; hardware has none.
    pub(crate) kind: Option<InfoKind>,
    /// What frames look like there.
    pub(crate) layer: LinkLayerType,
    pub(crate) is_up: bool,
    pub(crate) has_carrier: bool,
    pub(crate) mtu: u32,
    /// The device that it sits on.
    pub(crate) below: Option<u32>,
    /// The bridge, bond or the like that it is a port of.
    pub(crate) port_of: Option<u32>,
    /// The other end of a veth pair, where that is in this namespace, too.
    pub(crate) peer: Option<u32>,
    /// The XDP program that is attached.
    pub(crate) xdp_program: Option<u32>,
}

/// How packets get to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// It is this machine's.
    Here,
    /// By an interface, to this neighbour.
    By { interface: u32, neighbour: IpAddr },
    /// Not at all, and what the kernel says about it.
    Nowhere(String),
}

impl Survey {
    /// Looks at everything. Has to be called inside a tokio runtime.
    pub(crate) async fn take() -> Result<Self, NetworkError> {
        let (connection, handle, _) = new_connection().map_err(NetworkError::Socket)?;
        tokio::spawn(connection);
        let messages = handle.link().get().execute().try_collect::<Vec<_>>().await;
        let messages = messages.map_err(listing::listed("interfaces"))?;
        let addresses = listing::addresses(&handle).await?;
        Ok(Self {
            devices: messages.iter().map(Device::read).collect(),
            links: messages.iter().map(Link::read).collect(),
            addresses: addresses.iter().filter(|it| it.is_source()).map(|it| (it.interface, it.ip)).collect(),
            neighbours: neighbours(&handle).await?,
            handle,
        })
    }

    /// The devices behind which there is nothing but this node.
    pub(crate) fn pod_facing(&self, roles: &Roles) -> BTreeSet<u32> {
        roles.pod_facing(&self.links)
    }

    pub(crate) fn device(&self, index: u32) -> Option<&Device> {
        self.devices.iter().find(|device| device.index == index)
    }

    /// What the kernel knows of a neighbour; nothing if nobody has sent to it.
    pub(crate) fn neighbour(&self, interface: u32, address: IpAddr) -> Option<NeighbourState> {
        self.neighbours.get(&(interface, address)).copied()
    }

    /// The routers that packets to nowhere in particular go to: interface and address.
    pub(crate) async fn gateways(&self) -> Result<BTreeSet<(u32, IpAddr)>, NetworkError> {
        let families = [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
        let mut gateways = BTreeSet::new();
        for family in families {
            let mut routes = std::pin::pin!(self.handle.route().get(family).execute());
            while let Some(route) = routes.try_next().await.map_err(listing::listed("routes"))? {
                if route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast {
                    gateways.extend(hop(&route).and_then(|(interface, gateway)| Some((interface, gateway?))));
                }
            }
        }
        Ok(gateways)
    }

    /// How the kernel would send a packet of its own to an address.
    pub(crate) async fn way_to(&self, address: IpAddr) -> Way {
        let question = match address {
            IpAddr::V4(it) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(it, 32).build(),
            IpAddr::V6(it) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(it, 128).build(),
        };
        let mut answers = std::pin::pin!(self.handle.route().get(question).execute());
        match answers.try_next().await {
            Ok(Some(route)) => way(&route, address),
            Ok(None) => Way::Nowhere("the kernel gives no answer".to_owned()),
            Err(rtnetlink::Error::NetlinkError(error)) => {
                Way::Nowhere(Errno::from_raw(-error.raw_code()).desc().to_owned())
            }
            Err(error) => Way::Nowhere(error.to_string()),
        }
    }
}

async fn neighbours(handle: &Handle) -> Result<HashMap<(u32, IpAddr), NeighbourState>, NetworkError> {
    let all = handle.neighbours().get().execute().try_filter_map(async |message| Ok(neighbour(&message)));
    all.try_collect().await.map_err(listing::listed("neighbours"))
}

fn neighbour(message: &NeighbourMessage) -> Option<((u32, IpAddr), NeighbourState)> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::from(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::from(*address)),
        _ => None,
    })?;
    Some(((message.header.ifindex, address), message.header.state))
}

fn way(route: &RouteMessage, address: IpAddr) -> Way {
    match (route.header.kind, hop(route)) {
        (RouteType::Local, _) => Way::Here,
        (RouteType::Unicast, Some((interface, gateway))) => {
            Way::By { interface, neighbour: gateway.unwrap_or(address) }
        }
        (kind, _) => Way::Nowhere(format!("its route says {kind:?}").to_lowercase()),
    }
}

/// The interface that a route leads by, and the router there.
fn hop(route: &RouteMessage) -> Option<(u32, Option<IpAddr>)> {
    let interface = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    let gateway = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(IpAddr::from(*address)),
        RouteAttribute::Gateway(RouteAddress::Inet6(address)) => Some(IpAddr::from(*address)),
        _ => None,
    });
    Some((interface?, gateway))
}

impl Device {
    fn read(message: &LinkMessage) -> Self {
        let link = Link::read(message);
        let mut device = Self {
            index: link.index,
            name: link.name,
            kind: link.kind,
            layer: link.layer,
            is_up: message.header.flags.contains(LinkFlags::Up),
            has_carrier: message.header.flags.contains(LinkFlags::LowerUp),
            mtu: 0,
            below: link.below,
            port_of: link.port_of,
            peer: None,
            xdp_program: None,
        };
        let mut is_of_another_namespace = false;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Mtu(mtu) => device.mtu = *mtu,
                LinkAttribute::Link(peer) if device.is_veth() => device.peer = Some(*peer),
                LinkAttribute::LinkNetNsId(_) => is_of_another_namespace = true,
                LinkAttribute::Xdp(attributes) => device.xdp_program = attributes.iter().find_map(program),
                _ => {}
            }
        }
        device.peer = device.peer.filter(|_| !is_of_another_namespace);
        device
    }

    pub(crate) fn is_veth(&self) -> bool {
        self.kind == Some(InfoKind::Veth)
    }

    pub(crate) fn is_loopback(&self) -> bool {
        self.layer == LinkLayerType::Loopback
    }

    pub(crate) fn is_ethernet(&self) -> bool {
        self.layer == LinkLayerType::Ether
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
