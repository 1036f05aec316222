//! The ways to routers and backends.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use super::{Check, Verdict, list};
use crate::{
    network::{
        NetworkError, Roles,
        survey::{InfoKind, Link, NeighbourState, Survey, Way},
    },
    source::{Loaded, file},
};

/// What is so.
pub(super) struct Facts {
    gateways: Vec<Neighbour>,
    services: Services,
}

/// What was read of the services file.
enum Services {
    NotGiven,
    /// What is wrong with it, a line a mistake.
    Wrong(String),
    Read {
        /// The backends, or the first of very many.
        backends: Vec<Backend>,
        total: usize,
    },
}

/// Where packets are sent to on the link.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Neighbour {
    interface: String,
    address: IpAddr,
    /// What the kernel knows of it; nothing if nobody has sent to it.
    state: Option<NeighbourState>,
}

struct Backend {
    address: IpAddr,
    route: Route,
}

enum Route {
    Here,
    Nowhere(String),
    By {
        neighbour: Neighbour,
        /// Whether what comes back is met there, or need not be.
        is_watched: bool,
    },
}

/// How many backends are looked at: one takes the kernel some 20 µs, and a mistake in routing is seldom in one alone.
const LOOKED_AT: usize = 2000;

impl Facts {
    pub(super) async fn gather(survey: &Survey, roles: &Roles, services: Option<&Path>) -> Result<Self, NetworkError> {
        let gateways = survey.gateways().await?;
        let services = match services.map(|path| file::load(path, roles.node_name.as_deref())) {
            None => Services::NotGiven,
            Some(Err(error)) => Services::Wrong(error.to_string()),
            Some(Ok(Loaded { desired, .. })) => {
                let all = desired.services().values().flat_map(|service| service.endpoints.keys());
                let all: BTreeSet<_> = all.map(SocketAddr::ip).collect();
                let watched = watched(survey, roles);
                let mut backends = Vec::new();
                for &address in all.iter().take(LOOKED_AT) {
                    backends.push(Backend { address, route: route(survey, &watched, address).await });
                }
                Services::Read { backends, total: all.len() }
            }
        };
        Ok(Self { gateways: gateways.iter().map(|&(at, address)| neighbour(survey, at, address)).collect(), services })
    }
}

/// The devices by which backends may be reached: the uplinks, what leads to pods, and VLAN devices on uplinks, as what
/// leaves by those is met on the uplink.
fn watched(survey: &Survey, roles: &Roles) -> BTreeSet<u32> {
    let is_uplink = |device: &&Link| roles.uplinks.contains(&device.name);
    let mut watched: BTreeSet<_> = survey.devices.iter().filter(is_uplink).map(|it| it.index).collect();
    let is_on_uplink = |it: &&Link| it.kind == Some(InfoKind::Vlan) && it.below.is_some_and(|on| watched.contains(&on));
    let vlans: Vec<_> = survey.devices.iter().filter(is_on_uplink).map(|it| it.index).collect();
    watched.extend(vlans);
    watched.extend(survey.pod_facing(roles));
    watched
}

async fn route(survey: &Survey, watched: &BTreeSet<u32>, address: IpAddr) -> Route {
    match survey.way_to(address).await {
        Way::Here => Route::Here,
        Way::Nowhere(why) => Route::Nowhere(why),
        Way::By { interface, neighbour: next } => {
            Route::By { neighbour: neighbour(survey, interface, next), is_watched: watched.contains(&interface) }
        }
    }
}

fn neighbour(survey: &Survey, interface: u32, address: IpAddr) -> Neighbour {
    let name = survey.device(interface).map_or_else(|| format!("interface {interface}"), |device| device.name.clone());
    Neighbour { interface: name, address, state: survey.neighbour(interface, address) }
}

impl Neighbour {
    /// Asked for its Ethernet address, and silent.
    fn is_silent(&self) -> bool {
        matches!(self.state, Some(NeighbourState::Failed | NeighbourState::Incomplete))
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.address, self.interface)
    }
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![gateways(&facts.gateways)];
    match &facts.services {
        Services::NotGiven => {}
        Services::Wrong(error) => {
            let remedy = "wharf check FILE says the same, and is quick to ask again";
            checks.push(Check::problem("services-file", error, remedy));
        }
        Services::Read { backends, total } => {
            checks.push(services_file(backends.len(), *total));
            checks.extend([routes(backends), unwatched(backends), silent(backends)].into_iter().flatten());
        }
    }
    checks
}

fn gateways(gateways: &[Neighbour]) -> Check {
    const NAME: &str = "gateway";
    let silent: Vec<_> = gateways.iter().filter(|gateway| gateway.is_silent()).collect();
    if gateways.is_empty() {
        let remedy = "nothing if clients and backends are on this machine's links or have routes of their own; \
                      else ip route add default via ROUTER";
        Check::note(NAME, "there is no default gateway", remedy)
    } else if silent.is_empty() {
        Check::ok(NAME, format!("the default gateway is {}", list(gateways)))
    } else {
        // Where another one answers, it may be one of a family, or of a network, that nobody uses.
        let gravity = if silent.len() == gateways.len() { Verdict::Problem } else { Verdict::Warning };
        let found = format!("no answer when the default gateway {} is asked for its Ethernet address", list(&silent));
        Check::not_ok(gravity, NAME, found, "look at the cable, the VLAN, and the address in `ip route show default`")
    }
}

fn services_file(looked_at: usize, total: usize) -> Check {
    const NAME: &str = "services-file";
    if looked_at < total {
        let found = format!("the file is good; of {total} backends in it, the first {looked_at} were looked at");
        Check::note(NAME, found, "nothing")
    } else {
        Check::ok(NAME, format!("the file is good; backends in it: {total}"))
    }
}

fn routes(backends: &[Backend]) -> Option<Check> {
    const NAME: &str = "backend-routes";
    let lost = backends.iter().filter_map(|backend| match &backend.route {
        Route::Nowhere(why) => Some(format!("{} ({why})", backend.address)),
        _ => None,
    });
    let lost: Vec<_> = lost.collect();
    if lost.is_empty() {
        return (!backends.is_empty()).then(|| Check::ok(NAME, "there is a way to every backend"));
    }
    let remedy = "ip route add BACKEND via ROUTER, or take the backend out of the services file";
    Some(Check::problem(NAME, format!("no route leads to {}", list(&lost)), remedy))
}

fn unwatched(backends: &[Backend]) -> Option<Check> {
    let aside: Vec<_> = backends
        .iter()
        .filter_map(|backend| match &backend.route {
            Route::By { neighbour, is_watched: false } => {
                Some(format!("{} by {}", backend.address, neighbour.interface))
            }
            _ => None,
        })
        .collect();
    (!aside.is_empty()).then(|| {
        let found = format!("no --interface leads to {}, so replies from there are not translated", list(&aside));
        Check::warning("backend-interfaces", found, "name that interface, too")
    })
}

fn silent(backends: &[Backend]) -> Option<Check> {
    const NAME: &str = "backend-neighbours";
    let hops = backends.iter().filter_map(|backend| match &backend.route {
        Route::By { neighbour, .. } => Some((backend, neighbour)),
        _ => None,
    });
    let name = |(backend, neighbour): (&Backend, &Neighbour)| {
        if backend.address == neighbour.address {
            neighbour.to_string()
        } else {
            format!("{} by {neighbour}", backend.address)
        }
    };
    let silent: Vec<_> = hops.clone().filter(|(_, neighbour)| neighbour.is_silent()).map(name).collect();
    if !silent.is_empty() {
        let found = format!("nobody answers when asked for the Ethernet address of {}", list(&silent));
        let remedy = "look whether the machine is up and its network the same; or give it weight 0";
        return Some(Check::warning(NAME, found, remedy));
    }
    let total = hops.clone().count();
    let known = hops.filter(|(_, neighbour)| neighbour.state.is_some()).count();
    let others = if known < total { ", and the kernel asks for the others with their first packet" } else { "" };
    (total > 0).then(|| Check::ok(NAME, format!("the next hops to {known} of {total} backends are known{others}")))
}

#[cfg(test)]
mod tests;
