use Verdict::{Note, Ok as Fine, Problem, Unknown, Warning};

use super::*;
use crate::{doctor::tests::check_says, network::survey::InfoKind};

const ALL: XdpFeatures = XdpFeatures(0b111);

fn card() -> Facts {
    Facts {
        device: Link::of(2, "eth0", None),
        driver: Some("mlx5_core".to_owned()),
        features: Ok(ALL),
        offloads: Ok(vec!["rx-gro".to_owned()]),
        program: None,
        peer_mtu: None,
    }
}

fn veth() -> Facts {
    Facts { device: Link::of(2, "eth0", Some(InfoKind::Veth)), driver: Some("veth".to_owned()), ..card() }
}

fn missing<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::ENOENT))
}

fn checks(uplinks: &[Facts], mode: XdpMode) -> Vec<Check> {
    super::checks(uplinks, mode, false)
}

#[track_caller]
fn says(facts: Facts, mode: XdpMode, name: &str, verdict: Verdict, words: &str) {
    let checks = checks(&[facts], mode);
    assert!(checks.iter().all(|check| check.interface.as_deref() == Some("eth0")), "{checks:?}");
    check_says(&checks, name, verdict, words);
}

use XdpMode::{Auto, Generic, Native, Off};

#[test]
fn a_good_card_is_as_it_should_be() {
    assert!(checks(&[card()], Native).iter().all(|check| check.verdict == Fine));
    assert_eq!(checks(&[card()], Native).len(), 3);
    assert_eq!(checks(&[card()], Off).len(), 1);
}

#[test]
fn a_driver_without_xdp_is_as_grave_as_the_mode_makes_it() {
    let without = || Facts { features: Ok(XdpFeatures(0)), ..card() };
    says(card(), Auto, "xdp-driver", Fine, "mlx5_core");
    says(without(), Auto, "xdp-driver", Warning, "mlx5_core");
    says(without(), Native, "xdp-driver", Problem, "does no XDP");
    says(without(), Generic, "xdp-driver", Fine, "--xdp generic");
    says(Facts { features: missing(), driver: None, ..card() }, Native, "xdp-driver", Unknown, "(unknown)");
    says(Facts { features: Ok(XdpFeatures(0)), ..veth() }, Native, "xdp-driver", Problem, "queues");
    says(veth(), Auto, "xdp-driver", Fine, "asks nothing of the driver (veth)");
}

#[test]
fn a_jumbo_mtu_is_certain_for_veth_and_a_rule_of_thumb_for_others() {
    let with = |facts: Facts, mtu| Facts { device: Link { mtu, ..facts.device.clone() }, ..facts };
    says(with(card(), 3506), Native, "xdp-mtu", Fine, "3506");
    says(with(card(), 9000), Native, "xdp-mtu", Warning, "rule of thumb");
    says(with(veth(), 9000), Native, "xdp-mtu", Problem, "most likely");
    says(with(card(), 9000), Auto, "xdp-mtu", Warning, "lower the MTU");
    assert!(!checks(&[with(veth(), 9000)], Auto).iter().any(|check| check.name == "xdp-mtu"));
    says(Facts { peer_mtu: Some(9000), ..veth() }, Native, "xdp-mtu", Problem, "other end has an MTU of 9000");
    says(Facts { peer_mtu: Some(1500), ..with(veth(), 9000) }, Native, "xdp-mtu", Warning, "MTU is 9000");
    assert!(!checks(&[with(card(), 9000)], Off).iter().any(|check| check.name == "xdp-mtu"));
}

#[test]
fn programs_of_others_are_named_and_our_own_is_no_trouble() {
    let with = |program: Option<&str>| Facts {
        device: Link { xdp_program: Some(7), ..card().device },
        program: program.map(str::to_owned),
        ..card()
    };
    says(with(Some("wharf_xdp")), Native, "xdp-program", Fine, "by an agent that runs");
    says(with(Some("xdp_dispatcher")), Native, "xdp-program", Problem, "id 7, xdp_dispatcher");
    says(with(None), Auto, "xdp-program", Warning, "(id 7)");
    says(with(None), Off, "xdp-program", Note, "xdp off");
}

#[test]
fn offloads_that_xdp_does_not_bear_are_named_and_one_that_it_should_have() {
    let with = |names: &[&str]| Facts { offloads: Ok(names.iter().map(|&name| name.to_owned()).collect()), ..card() };
    says(with(&["rx-gro", "rx-lro"]), Auto, "offloads", Warning, "ethtool -K eth0 lro off");
    says(with(&[]), Auto, "offloads", Fine, "off");
    says(with(&[]), Auto, "gro", Note, "ethtool -K eth0 gro on");
    says(Facts { offloads: Ok(Vec::new()), ..veth() }, Native, "gro", Note, "wharf run switches it on");
    let keeping = super::checks(&[Facts { offloads: Ok(Vec::new()), ..veth() }], Native, true);
    assert!(keeping.iter().any(|it| it.remedy.as_deref() == Some("ethtool -K eth0 gro on")), "{keeping:?}");
    assert!(!checks(&[with(&[])], Off).iter().any(|check| check.name == "gro"));
    says(Facts { offloads: missing(), ..card() }, Auto, "offloads", Unknown, "unknown");
}

#[test]
fn veth_has_conditions_of_its_own() {
    says(veth(), Native, "veth", Note, "checksums");
    says(veth(), Auto, "veth", Note, "--xdp auto takes tc here");
    says(Facts { features: Ok(XdpFeatures(0b11)), ..veth() }, Native, "veth", Warning, "gro on");
    says(Facts { features: Ok(XdpFeatures(0b11)), ..veth() }, Generic, "veth", Note, "checksums");
    says(Facts { features: missing(), ..veth() }, Native, "veth", Note, "tx off");
    assert!(!checks(&[veth()], Off).iter().any(|check| check.name == "veth"));
}
