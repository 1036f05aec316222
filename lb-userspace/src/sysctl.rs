//! The kernel settings without which a balancer can't forward: changed while the agent runs, and put back after.

pub(crate) mod ports;

use std::{
    fs,
    io::{self, Read as _},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use tracing::{info, warn};

use self::ports::Ports;

/// Settings that were changed, with what they were.
#[derive(Debug, Default)]
pub struct Sysctls {
    changed: Vec<(PathBuf, String)>,
    /// The ports that are reserved and were not before.
    reserved: Ports,
}

/// Ports that the kernel gives to no connection by itself; the rest are numbers and ranges as [`Ports`] reads them.
const RESERVED_PORTS: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// The first and the last port that the kernel gives to connections by itself.
const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

impl Sysctls {
    /// Makes the interfaces forward, and take back from us what is sent from our own address.
    ///
    /// - `forwarding`: the FIB lookup of the programs refuses to answer without (`bpf_ipv4_fib_lookup` in `net/core/filter.c`).
    /// - `accept_local`, and `rp_filter` not strict: a translated packet that is handed to the stack to have its next hop
    ///   resolved has our own source address (`__fib_validate_source` in `net/ipv4/fib_frontend.c`).
    /// - IPv6 forwards only if `all` does. An interface that takes router advertisements goes on taking them,
    ///   which with forwarding on needs 2 instead of 1.
    pub fn prepare(&mut self, interfaces: &[String]) {
        let root = Path::new("/proc/sys/net");
        let all_rp_filter = read(&root.join("ipv4/conf/all/rp_filter")).unwrap_or_default();
        for interface in interfaces {
            let ipv4 = root.join("ipv4/conf").join(interface);
            self.set(ipv4.join("forwarding"), "1");
            self.set(ipv4.join("accept_local"), "1");
            let own_rp_filter = read(&ipv4.join("rp_filter")).unwrap_or_default();
            if all_rp_filter.as_str().max(own_rp_filter.as_str()) == "1" {
                self.set(ipv4.join("rp_filter"), "2");
            }
        }
        self.prepare_ipv6(&root.join("ipv6/conf"), interfaces);
    }

    /// Keeps the source ports of flows free of the host's own connections, which otherwise could take one and lose what
    /// comes back by it (`ip_local_reserved_ports` in Documentation/networking/ip-sysctl.rst). Both families heed it.
    pub fn reserve(&mut self, snat_ports: &RangeInclusive<u16>) {
        let path = Path::new(RESERVED_PORTS);
        let before = match reserved() {
            Ok(ports) => ports,
            Err(error) => return warn!(%error, "cannot read {RESERVED_PORTS}, so it stays as it is"),
        };
        let wanted = Ports::from(snat_ports.clone());
        if shared_with_host(&wanted).is_some_and(|(shared, all)| shared == all) {
            return warn!(
                "all of the ports that the host's own connections take (net.ipv4.ip_local_port_range) are in --snat-ports: \
                 they are not reserved, as that would leave the host none; give the two different ranges"
            );
        }
        let added = wanted.without(&before);
        if added.is_empty() {
            return;
        }
        match fs::write(path, before.with(&wanted).to_string()) {
            Ok(()) => {
                info!("added {added} to {RESERVED_PORTS} until wharf stops");
                self.reserved = added;
            }
            Err(error) => {
                warn!(%error, "cannot add {added} to {RESERVED_PORTS}: the host's own connections may take ports of flows; add them yourself");
            }
        }
    }

    fn prepare_ipv6(&mut self, ipv6: &Path, named: &[String]) {
        let Ok(interfaces) = fs::read_dir(ipv6) else {
            info!("this kernel has no IPv6");
            return;
        };
        let interfaces: Vec<_> = interfaces.filter_map(|entry| Some(entry.ok()?.path())).collect();
        for interface in &interfaces {
            if read(&interface.join("accept_ra")).is_ok_and(|value| value == "1") {
                self.set(interface.join("accept_ra"), "2");
            }
        }
        let all = ipv6.join("all/forwarding");
        if read(&all).is_ok_and(|value| value != "1") {
            // Writing to `all` writes to every interface: what each was is written back after it, even where it was the same.
            for path in interfaces.iter().filter(|it| !it.ends_with("all")).map(|it| it.join("forwarding")) {
                if let Ok(before) = read(&path) {
                    self.changed.push((path, before));
                }
            }
            self.set(all, "1");
        }
        for interface in named {
            self.set(ipv6.join(interface).join("forwarding"), "1");
        }
    }

    /// Takes back what was reserved, and nothing that others have reserved meanwhile.
    fn release(&mut self) {
        let ours = std::mem::take(&mut self.reserved);
        if ours.is_empty() {
            return;
        }
        let path = Path::new(RESERVED_PORTS);
        let left = reserved().map(|ports| ports.without(&ours));
        // Nothing at all would not be written.
        if let Err(error) = left.and_then(|left| fs::write(path, format!("{left}\n"))) {
            warn!(%error, "cannot take {ours} out of {RESERVED_PORTS} again");
        }
    }

    fn set(&mut self, path: PathBuf, wanted: &str) {
        match read(&path) {
            Ok(before) if before == wanted => {}
            Ok(before) => match fs::write(&path, wanted) {
                Ok(()) => {
                    info!("set {} to {wanted} (was {before}) until wharf stops", path.display());
                    self.changed.push((path, before));
                }
                Err(error) => {
                    warn!(%error, "cannot set {} to {wanted}, without which packets may not be forwarded; set it yourself", path.display());
                }
            },
            // The interface is gone again, or the kernel lacks the setting.
            Err(error) => warn!(%error, "cannot read {}", path.display()),
        }
    }
}

/// Says so if the host's own connections are to share ports with flows.
pub fn warn_of_shared_ports(snat_ports: &RangeInclusive<u16>) {
    if let Some((shared, all)) = shared_with_host(&Ports::from(snat_ports.clone())).filter(|(shared, _)| *shared > 0) {
        warn!(
            "{shared} of the {all} ports that the host's own connections take (net.ipv4.ip_local_port_range) are in \
             --snat-ports as well; give the two different ranges"
        );
    }
}

/// The ports that are reserved now.
pub(crate) fn reserved() -> io::Result<Ports> {
    // The kernel tells them to the first read alone, so that has to have room for all (`proc_do_large_bitmap` in kernel/sysctl.c).
    let mut text = vec![0; 1 << 18];
    let length = fs::File::open(RESERVED_PORTS)?.read(&mut text)?;
    text.truncate(length);
    String::from_utf8_lossy(&text).parse().map_err(io::Error::other)
}

/// The ports that the host's own connections take by themselves.
pub(crate) fn taken_by_host() -> Option<Ports> {
    let text = read(Path::new(PORT_RANGE)).ok()?;
    let (first, last) = text.split_once(char::is_whitespace)?;
    Some(Ports::from(first.parse().ok()?..=last.trim().parse().ok()?))
}

/// How many of these ports the host's own connections take by themselves, and how many those take in all.
fn shared_with_host(ports: &Ports) -> Option<(usize, usize)> {
    let host = taken_by_host()?;
    Some((ports.common(&host).len(), host.len()))
}

impl Drop for Sysctls {
    fn drop(&mut self) {
        self.release();
        for (path, before) in self.changed.drain(..).rev() {
            // An interface that is gone took its settings along.
            if let Err(error) = fs::write(&path, &before)
                && error.kind() != io::ErrorKind::NotFound
            {
                warn!(%error, "cannot set {} back to {before}", path.display());
            }
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}
