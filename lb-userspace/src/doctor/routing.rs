//! The kernel settings without which packets are not forwarded. Most of them `wharf run` sets itself, unless it is told not to.

use std::{collections::BTreeSet, io, net::IpAddr, path::Path};

use nix::sys::statvfs::{FsFlags, statvfs};

use super::{Check, Verdict, list};
use crate::{
    network::{
        Roles,
        survey::{Link, Survey},
    },
    sysctl,
};

/// What is so.
pub(super) struct Facts {
    /// Whether settings can be changed by root: not in most containers.
    pub(super) can_be_set: bool,
    uplinks: Vec<Uplink>,
    /// By which interfaces the stack takes in what pods send, each with whether it forwards IPv4.
    pods: Vec<(String, io::Result<String>)>,
    ipv6_forwarding: io::Result<String>,
    /// Whether packets may leave with an IPv6 address.
    has_ipv6: bool,
}

/// The settings that hold for an interface.
struct Uplink {
    name: String,
    forwarding: io::Result<String>,
    /// The larger one of that of all interfaces and its own counts.
    rp_filter: [io::Result<String>; 2],
    /// One of that of all interfaces and its own is enough.
    accept_local: [io::Result<String>; 2],
    accept_ra: io::Result<String>,
}

const SETTINGS: &str = "/proc/sys/net";

impl Facts {
    pub(super) fn gather(survey: &Survey, roles: &Roles) -> Self {
        let named = survey.devices.iter().filter(|device| roles.uplinks.contains(&device.name));
        // What comes in by a port of a bridge comes in by the bridge.
        let taken_in_by = |pod: &Link| pod.port_of.and_then(|it| survey.device(it)).unwrap_or(pod).name.clone();
        let of_pods: BTreeSet<_> = survey.pod_devices(roles).map(taken_in_by).collect();
        Self {
            can_be_set: statvfs(SETTINGS).is_ok_and(|it| !it.flags().contains(FsFlags::ST_RDONLY)),
            uplinks: named.clone().map(Uplink::gather).collect(),
            pods: of_pods.into_iter().map(|name| (name.clone(), read("ipv4", &name, "forwarding"))).collect(),
            ipv6_forwarding: read("ipv6", "all", "forwarding"),
            has_ipv6: survey
                .addresses
                .iter()
                .any(|(_, address)| matches!(address, IpAddr::V6(it) if !it.is_loopback())),
        }
    }
}

impl Uplink {
    fn gather(device: &Link) -> Self {
        let both = |key| ["all", &device.name].map(|interface| read("ipv4", interface, key));
        Self {
            name: device.name.clone(),
            forwarding: read("ipv4", &device.name, "forwarding"),
            rp_filter: both("rp_filter"),
            accept_local: both("accept_local"),
            accept_ra: read("ipv6", &device.name, "accept_ra"),
        }
    }
}

fn read(family: &str, interface: &str, key: &str) -> io::Result<String> {
    sysctl::read(&Path::new(SETTINGS).join(family).join("conf").join(interface).join(key))
}

pub(super) fn checks(facts: &Facts, keep_sysctls: bool) -> Vec<Check> {
    let judge = Judge { keep_sysctls, can_be_set: facts.can_be_set };
    let of_uplink = |uplink: &Uplink| {
        let checks = [
            judge.forwarding(uplink),
            judge.rp_filter(uplink),
            judge.accept_local(uplink),
            judge.accept_ra(uplink, &facts.ipv6_forwarding),
        ];
        checks.map(|check| check.on(&uplink.name))
    };
    let mut checks: Vec<_> = facts.uplinks.iter().flat_map(of_uplink).collect();
    checks.push(judge.ipv6_forwarding(&facts.ipv6_forwarding, facts.has_ipv6));
    checks.extend(pod_forwarding(&facts.pods));
    checks
}

/// What `sysctl` calls a setting of an interface: the dots in its name, as in those of VLAN devices, are slashes there.
fn key(family: &str, uplink: &Uplink, setting: &str) -> String {
    format!("net.{family}.conf.{}.{setting}", uplink.name.replace('.', "/"))
}

/// Who can set what is set wrong.
#[derive(Clone, Copy)]
struct Judge {
    keep_sysctls: bool,
    can_be_set: bool,
}

impl Judge {
    /// A setting that is not as it has to be.
    fn wrong(self, gravity: Verdict, name: &'static str, found: String, key: &str, value: u8) -> Check {
        if self.keep_sysctls {
            return Check::not_ok(
                gravity,
                name,
                found,
                format!("sysctl -w {key}={value}, as --keep-sysctls leaves it alone"),
            );
        }
        if self.can_be_set {
            return Check::note(name, found, "nothing: wharf run changes it, and wharf cleanup puts it back");
        }
        let remedy =
            format!("sysctl -w {key}={value} on the host: {SETTINGS} is read-only here, so wharf run can't set it");
        Check::not_ok(gravity, name, found, remedy)
    }

    fn forwarding(self, uplink: &Uplink) -> Check {
        const NAME: &str = "ipv4-forwarding";
        let key = key("ipv4", uplink, "forwarding");
        match &uplink.forwarding {
            Ok(value) if value == "1" => Check::ok(NAME, format!("{key} is 1")),
            Ok(value) => {
                self.wrong(Verdict::Problem, NAME, format!("{key} is {value}: packets are not forwarded"), &key, 1)
            }
            Err(error) => unreadable(NAME, &key, error),
        }
    }

    fn rp_filter(self, uplink: &Uplink) -> Check {
        const NAME: &str = "rp-filter";
        let key = key("ipv4", uplink, "rp_filter");
        match &uplink.rp_filter {
            [Ok(all), Ok(own)] => match all.max(own).as_str() {
                "1" => {
                    let found = format!(
                        "{key} is {own} and that of all interfaces {all}, of which the larger counts: \
                         what comes by another way than it would go back by is dropped"
                    );
                    self.wrong(Verdict::Problem, NAME, found, &key, 2)
                }
                value => Check::ok(NAME, format!("{key} counts as {value}, which is not strict")),
            },
            [Err(error), _] | [_, Err(error)] => unreadable(NAME, &key, error),
        }
    }

    fn accept_local(self, uplink: &Uplink) -> Check {
        const NAME: &str = "accept-local";
        let key = key("ipv4", uplink, "accept_local");
        match &uplink.accept_local {
            [Err(error), _] | [_, Err(error)] => unreadable(NAME, &key, error),
            values if values.iter().any(|value| value.as_ref().is_ok_and(|it| it == "1")) => {
                Check::ok(NAME, format!("{key} counts as 1"))
            }
            _ => {
                let found = format!(
                    "{key} is 0: packets that leave with this machine's address can't be handed to the stack, \
                     which has to find the first next hop"
                );
                self.wrong(Verdict::Problem, NAME, found, &key, 1)
            }
        }
    }

    fn accept_ra(self, uplink: &Uplink, forwarding: &io::Result<String>) -> Check {
        const NAME: &str = "accept-ra";
        let key = key("ipv6", uplink, "accept_ra");
        match &uplink.accept_ra {
            Ok(value) if value == "1" => {
                let forwards = forwarding.as_ref().is_ok_and(|value| value == "1");
                let when = if forwards { "as this machine forwards" } else { "once this machine forwards" };
                let found = format!("{key} is 1, by which router advertisements are ignored {when}");
                self.wrong(Verdict::Warning, NAME, found, &key, 2)
            }
            Ok(value) => Check::ok(NAME, format!("{key} is {value}, which forwarding does not change")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Check::ok(NAME, "this kernel has no IPv6"),
            Err(error) => unreadable(NAME, &key, error),
        }
    }

    fn ipv6_forwarding(self, value: &io::Result<String>, has_ipv6: bool) -> Check {
        const NAME: &str = "ipv6-forwarding";
        let key = "net.ipv6.conf.all.forwarding";
        match value {
            Ok(value) if value == "1" => Check::ok(NAME, format!("{key} is 1")),
            Ok(value) => {
                let gravity = if has_ipv6 { Verdict::Problem } else { Verdict::Note };
                self.wrong(gravity, NAME, format!("{key} is {value}: packets are not forwarded"), key, 1)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Check::note(NAME, "this kernel has no IPv6", "nothing if all services are IPv4")
            }
            Err(error) => unreadable(NAME, key, error),
        }
    }
}

/// What pods answer: their devices come and go, and `wharf run` leaves them alone.
fn pod_forwarding(pods: &[(String, io::Result<String>)]) -> Option<Check> {
    const NAME: &str = "pod-forwarding";
    if let Some((name, Err(error))) = pods.iter().find(|(_, value)| value.is_err()) {
        return Some(unreadable(NAME, &format!("net.ipv4.conf.{}.forwarding", name.replace('.', "/")), error));
    }
    let forwards = |value: &io::Result<String>| value.as_ref().is_ok_and(|it| it == "1");
    let wrong: Vec<_> = pods.iter().filter(|(_, value)| !forwards(value)).map(|(name, _)| name).collect();
    if wrong.is_empty() {
        let names: Vec<_> = pods.iter().map(|(name, _)| name).collect();
        let found = format!("IPv4 packets that come in by {} are forwarded", list(&names));
        return (!pods.is_empty()).then(|| Check::ok(NAME, found));
    }
    let found = format!("IPv4 packets that come in by {} are not forwarded, nor so what pods answer", list(&wrong));
    let remedy =
        "sysctl -w net.ipv4.ip_forward=1, which holds for devices to come as well; wharf run sets it for uplinks alone";
    Some(Check::not_ok(Verdict::Problem, NAME, found, remedy))
}

fn unreadable(name: &'static str, key: &str, error: &io::Error) -> Check {
    Check::unknown(name, format!("{key} can't be read: {error}"), "run wharf doctor as root")
}

#[cfg(test)]
mod tests {
    use Verdict::{Note, Ok as Fine, Problem, Unknown, Warning};

    use super::{super::tests::check_says, *};

    #[expect(clippy::unnecessary_wraps, reason = "beside `missing`, this is the other way that reading ends")]
    fn is(value: &str) -> io::Result<String> {
        Ok(value.to_owned())
    }

    fn missing() -> io::Result<String> {
        Err(io::Error::from_raw_os_error(libc::ENOENT))
    }

    fn good() -> Uplink {
        Uplink {
            name: "eth0".to_owned(),
            forwarding: is("1"),
            rp_filter: [is("0"), is("2")],
            accept_local: [is("0"), is("1")],
            accept_ra: is("2"),
        }
    }

    fn facts(uplink: Uplink) -> Facts {
        let pods = vec![("cni0".to_owned(), is("1"))];
        Facts { can_be_set: true, uplinks: vec![uplink], pods, ipv6_forwarding: is("1"), has_ipv6: true }
    }

    #[track_caller]
    fn says(facts: &Facts, keep_sysctls: bool, name: &str, verdict: Verdict, words: &str) {
        check_says(&checks(facts, keep_sysctls), name, verdict, words);
    }

    #[test]
    fn what_is_set_right_is_as_it_should_be() {
        assert!(checks(&facts(good()), true).iter().all(|check| check.verdict == Fine));
    }

    #[test]
    fn what_wharf_run_sets_is_a_note_and_else_what_it_breaks() {
        let wrong = || Uplink {
            forwarding: is("0"),
            rp_filter: [is("1"), is("0")],
            accept_local: [is("0"), is("0")],
            accept_ra: is("1"),
            ..good()
        };
        let of_uplink = ["ipv4-forwarding", "rp-filter", "accept-local"];
        for name in of_uplink {
            says(&facts(wrong()), false, name, Note, "wharf run changes it");
            says(&facts(wrong()), true, name, Problem, "sysctl -w net.ipv4.conf.eth0.");
            says(&Facts { can_be_set: false, ..facts(wrong()) }, false, name, Problem, "read-only");
        }
        says(&facts(wrong()), false, "accept-ra", Note, "as this machine forwards");
        says(&facts(wrong()), true, "accept-ra", Warning, "accept_ra=2");
        let off = |has_ipv6| Facts { ipv6_forwarding: is("0"), has_ipv6, ..facts(wrong()) };
        says(&off(true), false, "accept-ra", Note, "once this machine forwards");
        says(&off(true), false, "ipv6-forwarding", Note, "is 0");
        says(&off(true), true, "ipv6-forwarding", Problem, "all.forwarding=1");
        says(&off(false), true, "ipv6-forwarding", Note, "all.forwarding=1");
    }

    #[test]
    fn the_larger_rp_filter_counts() {
        let with = |all, own| facts(Uplink { rp_filter: [is(all), is(own)], ..good() });
        says(&with("1", "2"), true, "rp-filter", Fine, "counts as 2");
        says(&with("0", "1"), true, "rp-filter", Problem, "rp_filter=2");
        says(&with("0", "0"), true, "rp-filter", Fine, "counts as 0");
    }

    #[test]
    fn what_pods_answer_has_to_be_forwarded_too() {
        let pods = |value| vec![("cni0".to_owned(), is("1")), ("veth7".to_owned(), value)];
        let with = |value| Facts { pods: pods(value), ..facts(good()) };
        says(&with(is("1")), false, "pod-forwarding", Fine, "cni0, veth7 are forwarded");
        says(&with(is("0")), false, "pod-forwarding", Problem, "by veth7 are not forwarded");
        says(&with(missing()), false, "pod-forwarding", Unknown, "veth7.forwarding can't be read");
        let none = Facts { pods: Vec::new(), ..facts(good()) };
        assert!(checks(&none, false).iter().all(|check| check.name != "pod-forwarding"));
    }

    #[test]
    fn what_can_not_be_read_is_unknown() {
        let hidden = || facts(Uplink { forwarding: missing(), rp_filter: [is("0"), missing()], ..good() });
        says(&hidden(), true, "ipv4-forwarding", Unknown, "can't be read");
        says(&hidden(), true, "rp-filter", Unknown, "can't be read");
        let hidden = Uplink { accept_local: [missing(), is("1")], accept_ra: missing(), ..good() };
        let without_ipv6 = Facts { ipv6_forwarding: missing(), ..facts(hidden) };
        says(&without_ipv6, true, "accept-local", Unknown, "can't be read");
        says(&without_ipv6, true, "accept-ra", Fine, "no IPv6");
        says(&without_ipv6, true, "ipv6-forwarding", Note, "no IPv6");
    }
}
