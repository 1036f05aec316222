//! The source ports of flows, beside those that the host's own connections take.

use std::ops::RangeInclusive;

use super::Check;
use crate::sysctl::{self, ports::Ports};

/// What is so.
pub(super) struct Facts {
    /// The ports that a flow may take.
    snat: Ports,
    /// The ports that the host's own connections take (`net.ipv4.ip_local_port_range`).
    host: Option<Ports>,
    /// The ports that nobody is given (`net.ipv4.ip_local_reserved_ports`).
    reserved: Ports,
}

impl Facts {
    pub(super) fn gather(snat_ports: &RangeInclusive<u16>) -> Self {
        Self {
            snat: Ports::from(snat_ports.clone()),
            host: sysctl::taken_by_host(),
            reserved: sysctl::reserved().unwrap_or_default(),
        }
    }
}

pub(super) fn check(facts: &Facts, keep_sysctls: bool) -> Check {
    const NAME: &str = "snat-ports";
    const TWO_RANGES: &str = "give --snat-ports and net.ipv4.ip_local_port_range different ranges";
    let Facts { snat, host: Some(host), reserved } = facts else {
        let found = "net.ipv4.ip_local_port_range can't be read";
        return Check::unknown(NAME, found, format!("{TWO_RANGES}; the default is 32768 to 60999"));
    };
    let shared = snat.common(host);
    let open = shared.without(reserved);
    let found = format!("flows ({snat}) and the host's own connections ({host}) share {} ports", shared.len());
    if shared.is_empty() {
        Check::ok(NAME, format!("flows ({snat}) and the host's own connections ({host}) share no port"))
    } else if open.is_empty() {
        Check::ok(NAME, format!("{found}, which are reserved in net.ipv4.ip_local_reserved_ports"))
    } else if shared.len() == host.len() {
        let found = format!(
            "{found}: all that the host has, so wharf run reserves none, and either may take the other's replies"
        );
        Check::problem(NAME, found, TWO_RANGES)
    } else if keep_sysctls {
        let remedy = format!("{TWO_RANGES}, or add {open} to net.ipv4.ip_local_reserved_ports");
        Check::problem(NAME, format!("{found}, so either may take the other's replies"), remedy)
    } else {
        let found = format!("{found}; wharf run reserves them, but connections that are open by then keep theirs");
        Check::warning(NAME, found, TWO_RANGES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict::{self, Ok as Fine, Problem, Unknown, Warning};

    #[track_caller]
    fn says(snat: &str, host: Option<&str>, reserved: &str, keep_sysctls: bool, verdict: Verdict, words: &str) {
        let ports = |text: &str| text.parse().unwrap();
        let facts = Facts { snat: ports(snat), host: host.map(ports), reserved: ports(reserved) };
        let check = check(&facts, keep_sysctls);
        assert_eq!(check.verdict, verdict, "{check:?}");
        assert!(check.found.contains(words), "{check:?}");
    }

    #[test]
    fn ranges_that_meet_are_worse_the_less_is_reserved() {
        const HOST: Option<&str> = Some("32768-60999");
        says("1024-32767", HOST, "", true, Fine, "share no port");
        says("1024-32777", HOST, "32000-33000", true, Fine, "share 10 ports, which are reserved");
        says("1024-32777", HOST, "", false, Warning, "wharf run reserves them");
        says("1024-32777", HOST, "", true, Problem, "share 10 ports, so");
        says("1024-65535", HOST, "", false, Problem, "all that the host has");
        says("1024-65535", None, "", false, Unknown, "can't be read");
    }
}
