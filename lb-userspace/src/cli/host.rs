//! What `run` does with this host, and what `doctor` looks at.

use std::{ops::RangeInclusive, path::PathBuf};

use glob::Pattern;

use crate::dataplane::kernel::{DEFAULT_PINS, XdpMode};

#[derive(Debug, clap::Args)]
pub(super) struct Host {
    /// What the names of the devices towards pods look like, as in 'veth*': requests of pods are met there, and replies to
    /// pods; may be given several times. `auto`: veth and netkit devices whose other end is in another network namespace;
    /// `none`: no device [default: none; of `run --kubernetes`: auto]
    #[arg(long = "pod-interface", value_name = "PATTERN|auto|none")]
    pub(super) pod_interfaces: Vec<Pattern>,
    /// Where packets that come in are met
    #[arg(long, value_enum, default_value_t = XdpMode::Auto)]
    pub(super) xdp: XdpMode,
    /// The source ports that a flow may take towards a backend where its own is taken; not those that the host's own
    /// connections take (`net.ipv4.ip_local_port_range`)
    #[arg(long, value_name = "FIRST-LAST", default_value = "1024-32767", value_parser = port_range)]
    pub(super) snat_ports: RangeInclusive<u16>,
    /// Leave kernel settings as they are, even where forwarding is off, and offloads of interfaces
    #[arg(long)]
    pub(super) keep_sysctls: bool,
    /// Where everything is pinned that outlives the agent: on a BPF file system
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_PINS)]
    pub(super) bpffs: PathBuf,
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let wrong = || format!("{text} is not a range of ports such as 1024-32767");
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let first: u16 = first.parse().map_err(|_| wrong())?;
    let last: u16 = last.parse().map_err(|_| wrong())?;
    if first == 0 || first > last {
        return Err(wrong());
    }
    Ok(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges_have_a_beginning_and_an_end() {
        assert_eq!(port_range("61000-65535"), Ok(61_000..=65_535));
        assert_eq!(port_range("80-80"), Ok(80..=80));
        for wrong in ["", "80", "0-1", "9-8", "1-65536", "a-b"] {
            assert!(port_range(wrong).is_err(), "{wrong}");
        }
    }
}
