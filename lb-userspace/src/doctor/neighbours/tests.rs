use Verdict::{Note, Ok as Fine, Problem, Warning};

use super::*;
use crate::doctor::tests::check_says;

fn neighbour(address: &str, state: Option<NeighbourState>) -> Neighbour {
    Neighbour { interface: "eth0".to_owned(), address: address.parse().unwrap(), state }
}

fn backend(address: &str, route: Route) -> Backend {
    Backend { address: address.parse().unwrap(), route }
}

fn by(address: &str, state: Option<NeighbourState>, is_watched: bool) -> Route {
    Route::By { neighbour: neighbour(address, state), is_watched }
}

#[track_caller]
fn says(facts: &Facts, name: &str, verdict: Verdict, words: &str) {
    check_says(&checks(facts), name, verdict, words);
}

fn through(gateways: Vec<Neighbour>) -> Facts {
    Facts { gateways, services: Services::NotGiven }
}

fn serving(backends: Vec<Backend>) -> Facts {
    let total = backends.len();
    Facts { gateways: Vec::new(), services: Services::Read { backends, total } }
}

#[test]
fn a_silent_gateway_is_a_problem() {
    says(&through(vec![]), "gateway", Note, "no default gateway");
    says(&through(vec![neighbour("192.0.2.1", None)]), "gateway", Fine, "192.0.2.1 on eth0");
    for state in [NeighbourState::Failed, NeighbourState::Incomplete] {
        let two = vec![neighbour("192.0.2.1", Some(NeighbourState::Stale)), neighbour("fd00::1", Some(state))];
        says(&through(two), "gateway", Warning, "gateway fd00::1 on eth0 is asked");
        says(&through(vec![neighbour("192.0.2.1", Some(state))]), "gateway", Problem, "192.0.2.1");
    }
}

#[test]
fn the_services_file_is_told_of() {
    let wrong = Facts { gateways: vec![], services: Services::Wrong("s.yaml:1:1: no".to_owned()) };
    says(&wrong, "services-file", Problem, "s.yaml:1:1");
    let backends = || vec![backend("10.0.0.2", Route::Here)];
    says(&serving(backends()), "services-file", Fine, "in it: 1");
    let many = Facts { gateways: vec![], services: Services::Read { backends: backends(), total: 9000 } };
    says(&many, "services-file", Note, "of 9000 backends in it, the first 1 were");
    assert!(checks(&serving(vec![])).iter().all(|check| !check.name.starts_with("backend")));
}

#[test]
fn backends_without_a_way_are_named() {
    let near = || backend("10.0.0.2", by("10.0.0.2", Some(NeighbourState::Reachable), true));
    let lost = backend("10.9.0.2", Route::Nowhere("Network is unreachable".to_owned()));
    says(&serving(vec![near()]), "backend-routes", Fine, "every backend");
    says(&serving(vec![near(), lost]), "backend-routes", Problem, "leads to 10.9.0.2 (Network is unreachable)");
    let aside = backend("10.8.0.2", by("192.0.2.1", None, false));
    says(&serving(vec![near(), aside]), "backend-interfaces", Warning, "leads to 10.8.0.2 by eth0,");
    assert!(!checks(&serving(vec![near()])).iter().any(|check| check.name == "backend-interfaces"));
}

#[test]
fn next_hops_are_known_or_unasked_or_silent() {
    let near = |state| backend("10.0.0.2", by("10.0.0.2", state, true));
    let far = |state| backend("10.7.0.2", by("192.0.2.1", state, true));
    let (known, failed) = (Some(NeighbourState::Stale), Some(NeighbourState::Failed));
    says(&serving(vec![near(known), far(known)]), "backend-neighbours", Fine, "to 2 of 2 backends are known");
    says(&serving(vec![near(known), far(None)]), "backend-neighbours", Fine, "to 1 of 2 backends are known, and");
    says(&serving(vec![near(None)]), "backend-neighbours", Fine, "to 0 of 1 backends");
    says(&serving(vec![near(failed), far(known)]), "backend-neighbours", Warning, "of 10.0.0.2 on eth0");
    says(&serving(vec![near(known), far(failed)]), "backend-neighbours", Warning, "10.7.0.2 by 192.0.2.1 on eth0");
}
