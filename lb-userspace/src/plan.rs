//! What has to change: pure, and empty once it has been done.

use crate::model::{Desired, Frontend, Service, ServiceName};

/// One change. Applied in the order of a plan, no packet ever sees half of it:
/// a service has its backends before a frontend leads to it, and loses its frontends before itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op<'a> {
    /// Gives a service, new or not, its backends and its algorithm.
    SetService {
        /// Which.
        name: &'a ServiceName,
        /// As it is to be.
        service: &'a Service,
    },
    /// Makes a frontend, new or not, lead to a service.
    SetFrontend {
        /// Which.
        frontend: Frontend,
        /// Where to.
        name: &'a ServiceName,
    },
    /// Makes a frontend lead nowhere.
    RemoveFrontend {
        /// Which.
        frontend: Frontend,
    },
    /// Forgets a service that no frontend leads to any more.
    RemoveService {
        /// Which.
        name: &'a ServiceName,
    },
}

/// The changes that make `desired` of `applied`.
pub fn plan<'a>(desired: &'a Desired, applied: &'a Desired) -> Vec<Op<'a>> {
    let changed_services = desired
        .services()
        .iter()
        .filter(|&(name, service)| {
            applied
                .services()
                .get(name)
                .is_none_or(|present| present.backends != service.backends || present.algorithm != service.algorithm)
        })
        .map(|(name, service)| Op::SetService { name, service });
    let changed_frontends = desired
        .frontends()
        .iter()
        .filter(|&(frontend, name)| applied.frontends().get(frontend) != Some(name))
        .map(|(&frontend, name)| Op::SetFrontend { frontend, name });
    let gone_frontends = applied
        .frontends()
        .keys()
        .filter(|frontend| !desired.frontends().contains_key(frontend))
        .map(|&frontend| Op::RemoveFrontend { frontend });
    let gone_services = applied
        .services()
        .keys()
        .filter(|name| !desired.services().contains_key(name))
        .map(|name| Op::RemoveService { name });
    changed_services.chain(changed_frontends).chain(gone_frontends).chain(gone_services).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Algorithm, IpFamily, Protocol, Weight};

    fn desired(services: &[(&str, &[&str], &[&str])]) -> Desired {
        let mut desired = Desired::default();
        for (name, frontends, backends) in services {
            let name = ServiceName {
                name: (*name).into(),
                port: "http".into(),
                protocol: Protocol::Tcp,
                family: IpFamily::V4,
            };
            let service = Service {
                frontends: frontends.iter().map(|address| address.parse().unwrap()).collect(),
                algorithm: Algorithm::Random,
                backends: backends.iter().map(|address| (address.parse().unwrap(), Weight::ONE)).collect(),
            };
            desired.add(name, service).unwrap();
        }
        desired
    }

    #[track_caller]
    fn check(before: &Desired, after: &Desired, expect: &[&str]) {
        let ops: Vec<_> = plan(after, before)
            .iter()
            .map(|op| match op {
                Op::SetService { name, service } => format!("set {} with {}", name.name, service.backends.len()),
                Op::SetFrontend { frontend, name } => format!("{frontend} to {}", name.name),
                Op::RemoveFrontend { frontend } => format!("remove {frontend}"),
                Op::RemoveService { name } => format!("forget {}", name.name),
            })
            .collect();
        assert_eq!(ops, expect);
        let mut state = before.clone();
        for op in plan(after, before) {
            state.advance(&op);
        }
        assert_eq!(&state, after, "the plan does not lead to what is desired");
        assert_eq!(plan(after, &state), [], "a plan after its plan is not empty");
    }

    #[test]
    fn what_is_as_desired_needs_nothing() {
        let state = desired(&[("web", &["10.0.0.1:80"], &["10.1.0.1:80"])]);
        check(&state, &state, &[]);
        check(&Desired::default(), &Desired::default(), &[]);
    }

    #[test]
    fn services_come_before_their_frontends_and_go_after_them() {
        let state = desired(&[("web", &["10.0.0.1:80"], &["10.1.0.1:80"])]);
        check(&Desired::default(), &state, &["set web with 1", "TCP 10.0.0.1:80 to web"]);
        check(&state, &Desired::default(), &["remove TCP 10.0.0.1:80", "forget web"]);
    }

    #[test]
    fn only_what_differs_is_touched() {
        let before = desired(&[("a", &["10.0.0.1:80"], &["10.1.0.1:80"]), ("b", &["10.0.0.2:80"], &[])]);
        let after = desired(&[("a", &["10.0.0.1:80"], &["10.1.0.1:80", "10.1.0.2:80"]), ("b", &["10.0.0.2:80"], &[])]);
        check(&before, &after, &["set a with 2"]);
    }

    #[test]
    fn a_frontend_moves_from_one_service_to_another_in_one_step() {
        let before = desired(&[("a", &["10.0.0.1:80"], &[])]);
        let after = desired(&[("b", &["10.0.0.1:80"], &[])]);
        check(&before, &after, &["set b with 0", "TCP 10.0.0.1:80 to b", "forget a"]);
    }
}
