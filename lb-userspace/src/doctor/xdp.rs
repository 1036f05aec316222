//! XDP on each uplink, as well as it can be told without attaching anything.

use std::{fs, io, path::Path};

use super::{Check, Verdict};
use crate::{
    dataplane::kernel::{XdpMode, probe},
    network::{
        generic::{Generic, XdpFeatures},
        survey::{Link, Survey},
    },
};

/// What is so of an uplink.
pub(super) struct Facts {
    device: Link,
    /// What the driver is called; virtual devices by their kind.
    driver: Option<String>,
    features: io::Result<XdpFeatures>,
    /// The names of the offloads that are on.
    offloads: io::Result<Vec<String>>,
    /// The name of the program that is attached, where that may be asked for.
    program: Option<String>,
    /// The MTU of a veth's other end, where that is in this namespace.
    peer_mtu: Option<u32>,
}

impl Facts {
    pub(super) fn gather(survey: &Survey, uplinks: &[String]) -> Vec<Self> {
        let devices = survey.devices.iter().filter(|it| uplinks.contains(&it.name) && it.is_ethernet());
        devices.map(|device| Self::of(survey, device)).collect()
    }

    fn of(survey: &Survey, device: &Link) -> Self {
        let index = device.index;
        Self {
            driver: driver(device),
            features: Generic::open().and_then(|kernel| kernel.xdp_features(index)),
            offloads: Generic::open().and_then(|kernel| kernel.offloads(index)),
            program: device.xdp_program.and_then(probe::program_name),
            peer_mtu: device.peer.and_then(|peer| survey.device(peer)).map(|peer| peer.mtu),
            device: device.clone(),
        }
    }
}

/// The driver's name. `/sys` shows the network namespace that it was mounted in, which may be another one than ours.
fn driver(device: &Link) -> Option<String> {
    if let Some(kind) = &device.kind {
        return Some(kind.to_string());
    }
    let folder = Path::new("/sys/class/net").join(&device.name);
    let index = fs::read_to_string(folder.join("ifindex")).ok()?;
    let driver = fs::read_link(folder.join("device/driver")).ok()?;
    (index.trim() == device.index.to_string()).then(|| driver.file_name().map(|name| name.display().to_string()))?
}

pub(super) fn checks(uplinks: &[Facts], mode: XdpMode, keep_sysctls: bool) -> Vec<Check> {
    let on = |facts: &Facts| {
        let checks = [
            Some(facts.driver(mode)),
            facts.mtu(mode),
            facts.program(mode),
            facts.lro(mode),
            facts.gro(mode, keep_sysctls),
            facts.veth(mode),
        ];
        checks.into_iter().flatten().map(|check| check.on(&facts.device.name)).collect::<Vec<_>>()
    };
    uplinks.iter().flat_map(on).collect()
}

/// The largest packet, by its IP length, that a driver can hand to an XDP program in one page of 4 KiB, next to the headroom
/// and what the kernel keeps there. For veth this is exact (`veth_xdp_set` in `drivers/net/veth.c`); others differ.
const LARGEST: u32 = 3506;

/// How grave it is that XDP is not to be had.
fn gravity(mode: XdpMode) -> Verdict {
    match mode {
        XdpMode::Native => Verdict::Problem,
        XdpMode::Auto => Verdict::Warning,
        XdpMode::Generic | XdpMode::Off => Verdict::Note,
    }
}

const TAKES_TC: &str = "nothing if tc is fast enough, which takes the place of XDP (--xdp off says that this is meant)";

impl Facts {
    /// Whether XDP is to be had from the driver.
    fn asks_driver(&self, mode: XdpMode) -> bool {
        match mode {
            XdpMode::Native => true,
            XdpMode::Auto => !self.device.is_veth(),
            XdpMode::Generic | XdpMode::Off => false,
        }
    }

    fn driver(&self, mode: XdpMode) -> Check {
        const NAME: &str = "xdp-driver";
        let driver = self.driver.as_deref().unwrap_or("unknown");
        if !self.asks_driver(mode) {
            return Check::ok(NAME, format!("--xdp {} asks nothing of the driver ({driver})", mode.name()));
        }
        match &self.features {
            Ok(features) if features.runs_programs() => Check::ok(NAME, format!("the driver ({driver}) does XDP")),
            Ok(_) if self.device.is_veth() => Check::not_ok(
                gravity(mode),
                NAME,
                "this veth does no XDP, as its other end has more transmit queues than it has receive queues",
                "ethtool -L the other end tx N, so that it has no more",
            ),
            Ok(_) => Check::not_ok(
                gravity(mode),
                NAME,
                format!("the driver ({driver}) does no XDP, or not as the interface is set up"),
                format!("{TAKES_TC}; else a card of which the driver does XDP"),
            ),
            Err(error) => Check::unknown(
                NAME,
                format!(
                    "whether the driver ({driver}) does XDP is unknown: the kernel does not tell (before Linux 6.3 none does): {error}"
                ),
                "start wharf run: `wharf status` says which place it took, and why",
            ),
        }
    }

    fn mtu(&self, mode: XdpMode) -> Option<Check> {
        const NAME: &str = "xdp-mtu";
        let (mtu, peer) = (self.device.mtu, self.peer_mtu.unwrap_or(self.device.mtu));
        if !self.asks_driver(mode) {
            return None;
        }
        if mtu.max(peer) <= LARGEST {
            return Some(Check::ok(
                NAME,
                format!("an MTU of {mtu} leaves room for XDP, which takes up to some {LARGEST}"),
            ));
        }
        let remedy = format!("lower the MTU to {LARGEST} or less at both ends, or {TAKES_TC}");
        Some(match (self.device.is_veth(), self.peer_mtu) {
            (true, Some(peer)) if peer > LARGEST => {
                let found = format!("the other end has an MTU of {peer}, and a veth does XDP up to {LARGEST}");
                Check::not_ok(gravity(mode), NAME, found, remedy)
            }
            (true, None) => {
                let found = format!(
                    "the MTU is {mtu}, most likely at the other end, too, and a veth does XDP up to {LARGEST} there"
                );
                Check::not_ok(gravity(mode), NAME, found, remedy)
            }
            _ => {
                let found = format!(
                    "the MTU is {mtu}, and most drivers do XDP up to some {LARGEST} only: a rule of thumb, as each has its own limit"
                );
                Check::warning(NAME, found, remedy)
            }
        })
    }

    fn program(&self, mode: XdpMode) -> Option<Check> {
        const NAME: &str = "xdp-program";
        let id = self.device.xdp_program?;
        let name = &self.device.name;
        let program = self.program.as_deref();
        if program.is_some_and(|program| program.starts_with("wharf")) {
            return Some(Check::ok(
                NAME,
                "wharf's own XDP program is attached, by an agent that runs, or one that has left it there",
            ));
        }
        let known = program.map_or(String::new(), |program| format!(", {program}"));
        Some(Check::not_ok(
            gravity(mode),
            NAME,
            format!(
                "another XDP program is attached (id {id}{known}), and meets packets before wharf, or in its place"
            ),
            format!("stop what it belongs to, or ip link set dev {name} xdp off"),
        ))
    }

    fn lro(&self, mode: XdpMode) -> Option<Check> {
        const NAME: &str = "offloads";
        let name = &self.device.name;
        if !self.asks_driver(mode) {
            return None;
        }
        Some(match &self.offloads {
            Ok(on) if on.iter().any(|it| it == "rx-lro") => Check::warning(
                NAME,
                "large receive offload (LRO) is on, with which drivers refuse XDP",
                format!("ethtool -K {name} lro off"),
            ),
            Ok(_) => Check::ok(NAME, "large receive offload (LRO) is off"),
            Err(error) => Check::unknown(
                NAME,
                format!("which offloads are on is unknown: {error}"),
                format!("ethtool -k {name}: large-receive-offload has to be off"),
            ),
        })
    }

    /// Cards have it on, unless somebody has switched it off.
    fn gro(&self, mode: XdpMode, keep_sysctls: bool) -> Option<Check> {
        let is_off = self.offloads.as_ref().is_ok_and(|on| !on.iter().any(|it| it == "rx-gro"));
        let remedy = if self.device.is_veth() && !keep_sysctls {
            "nothing: wharf run switches it on, and wharf cleanup off again".to_owned()
        } else {
            format!("ethtool -K {} gro on", self.device.name)
        };
        (self.asks_driver(mode) && is_off).then(|| {
            Check::note(
                "gro",
                "behind XDP segments are not put together (GRO is off), so that pods here receive less in a second than they could",
                remedy,
            )
        })
    }

    /// What a network card can do without saying so, and a veth can't.
    fn veth(&self, mode: XdpMode) -> Option<Check> {
        const NAME: &str = "veth";
        // In tc the kernel's own helpers see to checksums, and the stack to what is sent.
        if !self.device.is_veth() || mode == XdpMode::Off {
            return None;
        }
        if mode == XdpMode::Auto {
            return Some(Check::note(
                NAME,
                "--xdp auto takes tc here: a veth may bring packets without whole checksums, which XDP breaks, and its other end may drop what \
                 XDP sends",
                "nothing if tc is fast enough; else --xdp native, and at the other end: ethtool -K IF gro on tx off",
            ));
        }
        Some(match &self.features {
            Ok(features) if mode == XdpMode::Native && features.runs_programs() && !features.is_target() => {
                Check::warning(
                    NAME,
                    "the other end of this veth drops what XDP sends to it, as it does not poll",
                    "at the other end: ethtool -K IF gro on tx off",
                )
            }
            _ => Check::note(
                NAME,
                "a veth may bring packets without whole checksums, which XDP breaks; this end can't see that",
                "at the other end: ethtool -K IF tx off",
            ),
        })
    }
}

#[cfg(test)]
mod tests;
