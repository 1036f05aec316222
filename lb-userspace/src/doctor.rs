//! What on this machine is in the way of `wharf run`, and what to do about it. Nothing on the machine is changed.
//!
//! Each subject has a file: what is so is gathered into its `Facts`, and judged by pure functions.

mod conflicts;
mod interfaces;
mod kernel;
mod mounts;
mod neighbours;
mod ports;
mod routing;
mod xdp;

use std::{fmt, ops::RangeInclusive, path::PathBuf};

use serde::Serialize;

pub(crate) use self::conflicts::{kube_proxies, where_kube_proxy_runs};
use crate::{
    dataplane::kernel::XdpMode,
    network::{NetworkError, PodInterfaces, Roles, canonical_name, survey::Survey},
};

/// What `wharf run` would be told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The names of the uplinks; if there are none, every interface that is up is taken for one.
    pub interfaces: Vec<String>,
    /// The devices towards pods.
    pub pod_interfaces: PodInterfaces,
    /// The services file.
    pub services: Option<PathBuf>,
    /// Where packets that come in are to be met.
    pub xdp: XdpMode,
    /// The source ports that a flow may take.
    pub snat_ports: RangeInclusive<u16>,
    /// Where things are pinned.
    pub bpffs: PathBuf,
    /// Whether kernel settings are left as they are.
    pub keep_sysctls: bool,
}

/// How grave it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// It could not be found out.
    Unknown,
    /// Works, but worse than it could.
    Warning,
    /// Does not work.
    Problem,
}

impl Verdict {
    /// Every verdict, the gravest first.
    pub const ALL: [Self; 5] = [Self::Problem, Self::Warning, Self::Unknown, Self::Note, Self::Ok];
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Unknown => "unknown",
            Self::Warning => "warning",
            Self::Problem => "problem",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at, in kebab case.
    pub name: &'static str,
    /// The interface that it is about, if it is about one.
    pub interface: Option<String>,
    /// How grave it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do; nothing if it is as it should be.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, interface: None, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn not_ok(verdict: Verdict, name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, interface: None, verdict, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn note(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::not_ok(Verdict::Note, name, found, remedy)
    }

    fn unknown(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::not_ok(Verdict::Unknown, name, found, remedy)
    }

    fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::not_ok(Verdict::Warning, name, found, remedy)
    }

    fn problem(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::not_ok(Verdict::Problem, name, found, remedy)
    }

    fn on(self, interface: &str) -> Self {
        Self { interface: Some(interface.to_owned()), ..self }
    }
}

/// Looks at everything. Has to be called inside a tokio runtime.
pub async fn examine(options: &Options) -> Result<Vec<Check>, NetworkError> {
    let mut roles = Roles {
        uplinks: options.interfaces.iter().map(|it| canonical_name(it).unwrap_or_else(|| it.clone())).collect(),
        pod_interfaces: options.pod_interfaces.clone(),
        ..Roles::default()
    };
    let survey = Survey::take().await?;
    if roles.uplinks.is_empty() {
        roles.uplinks = interfaces::likely_uplinks(&survey.devices, &roles);
    }
    let mut checks = kernel::checks(&kernel::Facts::gather());
    checks.extend(mounts::checks(&mounts::Facts::gather(&options.bpffs)));
    checks.extend(interfaces::checks(&interfaces::Facts {
        devices: &survey.devices,
        addresses: &survey.addresses,
        roles: &roles,
        are_named: !options.interfaces.is_empty(),
    }));
    checks.extend(xdp::checks(&xdp::Facts::gather(&survey, &roles.uplinks), options.xdp, options.keep_sysctls));
    let settings = routing::Facts::gather(&survey, &roles);
    checks.extend(routing::checks(&settings, options.keep_sysctls));
    let ways = neighbours::Facts::gather(&survey, &roles, options.services.as_deref()).await?;
    checks.extend(neighbours::checks(&ways));
    checks.push(ports::check(&ports::Facts::gather(&options.snat_ports), options.keep_sysctls || !settings.can_be_set));
    checks.extend(conflicts::checks(&conflicts::Facts::gather()));
    Ok(checks)
}

/// Some of many, to be read by people.
fn list<T: fmt::Display>(all: &[T]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<_> = all.iter().take(SHOWN).map(T::to_string).collect();
    match all.len().checked_sub(SHOWN) {
        None | Some(0) => shown.join(", "),
        Some(more) => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check of this name has this verdict, and these words in what it found or in its remedy.
    #[track_caller]
    pub(super) fn check_says(checks: &[Check], name: &str, verdict: Verdict, words: &str) {
        let check = checks.iter().find(|check| check.name == name).unwrap();
        assert_eq!(check.verdict, verdict, "{check:?}");
        let text = format!("{} {}", check.found, check.remedy.as_deref().unwrap_or_default());
        assert!(text.contains(words), "{check:?}");
    }

    #[test]
    fn the_gravest_verdict_is_the_greatest() {
        assert_eq!(Verdict::ALL.iter().max(), Some(&Verdict::Problem));
        assert!(Verdict::ALL.is_sorted_by(|a, b| a > b));
    }

    #[test]
    fn long_lists_are_cut() {
        assert_eq!(list(&[1, 2, 3]), "1, 2, 3");
        assert_eq!(list(&[1, 2, 3, 4, 5]), "1, 2, 3, 4, 5");
        assert_eq!(list(&[1, 2, 3, 4, 5, 6, 7]), "1, 2, 3, 4, 5 and 2 more");
    }
}
