//! What has to change: pure, and empty once it has been done.

use std::{net::IpAddr, sync::Arc};

use imbl::{ordmap::DiffItem, ordset};
use ipnet::IpNet;

use crate::{
    model::{Frontend, ServiceName},
    policy::{Decided, Route, Serving},
};

/// One change. Applied in the order of a plan, no packet ever sees half of it: a service has its backends and its
/// sources before a frontend leads to it or asks for them, and loses its frontends before its sources and itself. An
/// address refuses other ports only while its own are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op<'a> {
    /// Gives a service, new or not, its backends and how they are chosen.
    SetService {
        /// Which.
        name: &'a ServiceName,
        /// As it is to be.
        serving: &'a Arc<Serving>,
    },
    /// Lets clients of this range in, where a frontend of the service asks for that.
    AddSource {
        /// The service.
        name: &'a ServiceName,
        /// The clients.
        range: IpNet,
    },
    /// Makes a frontend, new or not, lead to a service.
    SetFrontend {
        /// Which.
        frontend: Frontend,
        /// Where to.
        route: &'a Route,
    },
    /// Makes an address a service's alone.
    SetVip {
        /// Which.
        address: IpAddr,
        /// The value of `VIPS4` and `VIPS6`.
        flags: u32,
    },
    /// Makes an address nobody's.
    RemoveVip {
        /// Which.
        address: IpAddr,
    },
    /// Makes a frontend lead nowhere.
    RemoveFrontend {
        /// Which.
        frontend: Frontend,
    },
    /// Lets clients of this range in no more.
    RemoveSource {
        /// The service.
        name: &'a ServiceName,
        /// The clients.
        range: IpNet,
    },
    /// Forgets a service that no frontend leads to any more.
    RemoveService {
        /// Which.
        name: &'a ServiceName,
    },
}

/// The changes that make `wanted` of `applied`. What the two share is not looked at.
pub fn plan<'a>(wanted: &'a Decided, applied: &'a Decided) -> Vec<Op<'a>> {
    let (mut early, mut late, mut gone_services) = (Vec::new(), Vec::new(), Vec::new());
    for change in applied.services.diff(&wanted.services) {
        match change {
            // Where nobody takes flows by policy Local any more, frontends may still ask for that policy: they change first.
            DiffItem::Update { old: (_, old), new: (name, serving) } if old.has_local() && !serving.has_local() => {
                late.push(Op::SetService { name, serving });
            }
            DiffItem::Add(name, serving) | DiffItem::Update { new: (name, serving), .. } => {
                early.push(Op::SetService { name, serving });
            }
            DiffItem::Remove(name, _) => gone_services.push(Op::RemoveService { name }),
        }
    }
    let (mut sources, mut gone_sources) = (Vec::new(), Vec::new());
    for change in applied.sources.diff(&wanted.sources) {
        match change {
            ordset::DiffItem::Add((name, range)) => sources.push(Op::AddSource { name, range: *range }),
            ordset::DiffItem::Remove((name, range)) => gone_sources.push(Op::RemoveSource { name, range: *range }),
        }
    }
    let (mut frontends, mut gone_frontends) = (Vec::new(), Vec::new());
    for change in applied.frontends.diff(&wanted.frontends) {
        match change {
            DiffItem::Add(&frontend, route) | DiffItem::Update { new: (&frontend, route), .. } => {
                frontends.push(Op::SetFrontend { frontend, route });
            }
            DiffItem::Remove(&frontend, _) => gone_frontends.push(Op::RemoveFrontend { frontend }),
        }
    }
    let (mut vips, mut gone_vips) = (Vec::new(), Vec::new());
    for change in applied.vips.diff(&wanted.vips) {
        match change {
            DiffItem::Add(&address, &flags) | DiffItem::Update { new: (&address, &flags), .. } => {
                vips.push(Op::SetVip { address, flags });
            }
            DiffItem::Remove(&address, _) => gone_vips.push(Op::RemoveVip { address }),
        }
    }
    [early, sources, frontends, vips, late, gone_vips, gone_frontends, gone_sources, gone_services].concat()
}

impl Decided {
    /// The state after one change of a plan.
    pub fn advance(&mut self, op: &Op<'_>) {
        match *op {
            Op::SetService { name, serving } => {
                self.services.insert(name.clone(), Arc::clone(serving));
            }
            Op::AddSource { name, range } => {
                self.sources.insert((name.clone(), range));
            }
            Op::SetFrontend { frontend, route } => {
                self.frontends.insert(frontend, route.clone());
            }
            Op::SetVip { address, flags } => {
                self.vips.insert(address, flags);
            }
            Op::RemoveVip { address } => {
                self.vips.remove(&address);
            }
            Op::RemoveFrontend { frontend } => {
                self.frontends.remove(&frontend);
            }
            Op::RemoveSource { name, range } => {
                self.sources.remove(&(name.clone(), range));
            }
            Op::RemoveService { name } => {
                self.services.remove(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Desired, Endpoint, FrontendKind, IpFamily, Protocol, Service, TrafficPolicy},
        policy::{Node, decide},
    };

    fn name(name: &str) -> ServiceName {
        ServiceName { name: name.into(), port: "http".into(), protocol: Protocol::Tcp, family: IpFamily::V4 }
    }

    /// What is decided of services with cluster IPs and endpoints.
    fn decided(services: &[(&str, &[&str], &[&str])]) -> Decided {
        let mut desired = Desired::default();
        for (service, frontends, endpoints) in services {
            let frontends = frontends.iter().map(|address| (address.parse().unwrap(), FrontendKind::ClusterIp));
            let endpoints = endpoints.iter().map(|address| (address.parse().unwrap(), Endpoint::READY));
            let (frontends, endpoints) = (frontends.collect(), endpoints.collect());
            desired.add(name(service), Service { frontends, endpoints, ..Service::default() }).unwrap();
        }
        decide(&desired, &Node::default())
    }

    /// What is decided of a load balancer address that serves these clients alone.
    fn restricted(ranges: &[&str]) -> Decided {
        let mut desired = Desired::default();
        let service = Service {
            frontends: [("10.0.0.1:80".parse().unwrap(), FrontendKind::LoadBalancer)].into(),
            source_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            ..Service::default()
        };
        desired.add(name("web"), service).unwrap();
        decide(&desired, &Node::default())
    }

    #[track_caller]
    fn check(before: &Decided, after: &Decided, expect: &[&str]) {
        let ops: Vec<_> = plan(after, before)
            .iter()
            .map(|op| match op {
                Op::SetService { name, serving } => format!("set {} with {}", name.name, serving.backends.len()),
                Op::AddSource { name, range } => format!("let {range} in to {}", name.name),
                Op::SetFrontend { frontend, route } => format!("{frontend} to {}, {}", route.service.name, route.flags),
                Op::SetVip { address, flags } => format!("claim {address}, {flags}"),
                Op::RemoveVip { address } => format!("leave {address}"),
                Op::RemoveFrontend { frontend } => format!("remove {frontend}"),
                Op::RemoveSource { name, range } => format!("keep {range} out of {}", name.name),
                Op::RemoveService { name } => format!("forget {}", name.name),
            })
            .collect();
        assert_eq!(ops, expect);
        let mut state = before.clone();
        for op in plan(after, before) {
            state.advance(&op);
        }
        assert_eq!(&state, after, "the plan does not lead to what is wanted");
        assert_eq!(plan(after, &state), [], "a plan after its plan is not empty");
    }

    #[test]
    fn what_is_as_wanted_needs_nothing() {
        let state = decided(&[("web", &["10.0.0.1:80"], &["10.1.0.1:80"])]);
        check(&state, &state, &[]);
        check(&Decided::default(), &Decided::default(), &[]);
    }

    #[test]
    fn services_come_before_their_frontends_and_go_after_them() {
        let state = decided(&[("web", &["10.0.0.1:80"], &["10.1.0.1:80"])]);
        check(&Decided::default(), &state, &["set web with 1", "TCP 10.0.0.1:80 to web, 0", "claim 10.0.0.1, 1"]);
        check(&state, &Decided::default(), &["leave 10.0.0.1", "remove TCP 10.0.0.1:80", "forget web"]);
    }

    #[test]
    fn only_what_differs_is_touched() {
        let before = decided(&[("a", &["10.0.0.1:80"], &["10.1.0.1:80"]), ("b", &["10.0.0.2:80"], &[])]);
        let after = decided(&[("a", &["10.0.0.1:80"], &["10.1.0.1:80", "10.1.0.2:80"]), ("b", &["10.0.0.2:80"], &[])]);
        check(&before, &after, &["set a with 2"]);
    }

    #[test]
    fn a_frontend_moves_from_one_service_to_another_in_one_step() {
        let before = decided(&[("a", &["10.0.0.1:80"], &[])]);
        let after = decided(&[("b", &["10.0.0.1:80"], &[])]);
        check(&before, &after, &["set b with 0", "TCP 10.0.0.1:80 to b, 0", "forget a"]);
    }

    #[test]
    fn sources_are_in_force_while_a_frontend_asks_for_them() {
        let (open, first, second) = (restricted(&[]), restricted(&["10.0.0.0/8"]), restricted(&["10.0.0.0/9"]));
        check(&open, &first, &["let 10.0.0.0/8 in to web", "TCP 10.0.0.1:80 to web, 6"]);
        check(&first, &second, &["let 10.0.0.0/9 in to web", "keep 10.0.0.0/8 out of web"]);
        check(&second, &open, &["TCP 10.0.0.1:80 to web, 2", "keep 10.0.0.0/9 out of web"]);
        check(
            &first,
            &Decided::default(),
            &["leave 10.0.0.1", "remove TCP 10.0.0.1:80", "keep 10.0.0.0/8 out of web", "forget web"],
        );
    }

    /// What is decided of a cluster IP with this policy, and an endpoint on this node.
    fn with_policy(internal_policy: TrafficPolicy) -> Decided {
        let mut desired = Desired::default();
        let service = Service {
            frontends: [("10.0.0.1:80".parse().unwrap(), FrontendKind::ClusterIp)].into(),
            endpoints: [("10.1.0.1:80".parse().unwrap(), Endpoint::READY)].into(),
            internal_policy,
            ..Service::default()
        };
        desired.add(name("web"), service).unwrap();
        let addresses = ["10.1.0.1".parse().unwrap()].into();
        decide(&desired, &Node { addresses, ..Node::default() })
    }

    #[test]
    fn a_frontend_asks_for_local_backends_only_while_there_are_some() {
        let (cluster, local) = (with_policy(TrafficPolicy::Cluster), with_policy(TrafficPolicy::Local));
        check(&cluster, &local, &["set web with 1", "TCP 10.0.0.1:80 to web, 1"]);
        check(&local, &cluster, &["TCP 10.0.0.1:80 to web, 0", "set web with 1"]);
    }
}
