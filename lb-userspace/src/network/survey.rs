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
        neighbour::NeighbourMessage,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
    },
};

pub(crate) use super::listing::Link;
use super::{NetworkError, Roles, listing};

/// What there is in this network namespace.
pub(crate) struct Survey {
    handle: Handle,
    pub(crate) devices: Vec<Link>,
    /// The addresses that packets may leave with, by the number of their interface.
    pub(crate) addresses: Vec<(u32, IpAddr)>,
    neighbours: HashMap<(u32, IpAddr), NeighbourState>,
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
        let (addresses, mut devices) = (listing::addresses(&handle).await?, listing::links(&handle).await?);
        listing::note_subnets(&mut devices, &addresses);
        Ok(Self {
            devices,
            addresses: addresses.iter().filter(|it| it.is_source()).map(|it| (it.interface, it.ip)).collect(),
            neighbours: neighbours(&handle).await?,
            handle,
        })
    }

    /// The devices behind which there is nothing but this node.
    pub(crate) fn pod_facing(&self, roles: &Roles) -> BTreeSet<u32> {
        roles.pod_facing(&self.devices)
    }

    /// The devices on which packets of pods would be met.
    pub(crate) fn pod_devices(&self, roles: &Roles) -> impl Iterator<Item = &Link> {
        let met = roles.pod_devices(&self.devices, &self.pod_facing(roles));
        met.into_iter().filter_map(|it| self.device(it.index))
    }

    pub(crate) fn device(&self, index: u32) -> Option<&Link> {
        self.devices.iter().find(|device| device.index == index)
    }

    /// What the kernel knows of a neighbour; nothing if nobody has sent to it.
    pub(crate) fn neighbour(&self, interface: u32, address: IpAddr) -> Option<NeighbourState> {
        self.neighbours.get(&(interface, address)).copied()
    }

    /// The routers that packets to nowhere in particular go to: interface and address.
    pub(crate) async fn gateways(&self) -> Result<BTreeSet<(u32, IpAddr)>, NetworkError> {
        let gateway = |route: &RouteMessage| {
            let leads_anywhere = route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast;
            let (interface, gateway) = hop(route).filter(|_| leads_anywhere)?;
            Some((interface, gateway?))
        };
        Ok(listing::routes(&self.handle, gateway).await?.into_iter().collect())
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

/// The names of those devices on which packets of pods would be met.
pub(crate) fn pod_devices(devices: &[Link], roles: &Roles) -> Vec<String> {
    let found = roles.pod_devices(devices, &roles.pod_facing(devices));
    found.into_iter().map(|device| device.name).collect()
}

async fn neighbours(handle: &Handle) -> Result<HashMap<(u32, IpAddr), NeighbourState>, NetworkError> {
    let all = handle.neighbours().get().execute().try_filter_map(async |message| Ok(neighbour(&message)));
    all.try_collect().await.map_err(listing::listed("neighbours"))
}

fn neighbour(message: &NeighbourMessage) -> Option<((u32, IpAddr), NeighbourState)> {
    Some(((message.header.ifindex, listing::neighbour(message)?), message.header.state))
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
