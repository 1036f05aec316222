//! The kernel settings without which a balancer can't forward, or not as fast as it could: changed when an agent starts, and put back
//! when Wharf is to leave the host.

mod gro;
pub(crate) mod ports;
mod record;

use std::{
    fs,
    io::{self, Read as _, Write as _},
    ops::RangeInclusive,
    path::Path,
};

use tracing::{info, warn};

use self::{
    ports::Ports,
    record::{Record, Setting},
};

/// What was changed on the host, by this agent and those before it. It stays until somebody puts it back: traffic that goes on
/// without an agent needs it.
#[derive(Debug)]
pub struct Sysctls {
    record: Record,
}

/// What became of what was changed on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutBack {
    /// Whether there was anything.
    pub had_anything: bool,
    /// Whether some of it could not be put back.
    pub is_left: bool,
}

/// Ports that the kernel gives to no connection by itself; the rest are numbers and ranges as [`Ports`] reads them.
const RESERVED_PORTS: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// The first and the last port that the kernel gives to connections by itself.
const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

impl Sysctls {
    /// With what former agents changed, which is on record in a file.
    pub fn open(file: &Path) -> Self {
        Self { record: Record::read(file) }
    }

    /// Notes where the agent pins: `None` for the usual place.
    pub fn note_pins(&mut self, pins: Option<&Path>) {
        if self.record.note_pins(pins) {
            self.record.write();
        }
    }

    /// Where the last agent has pinned, if that is not the usual place.
    pub fn pins(&self) -> Option<&Path> {
        self.record.pins()
    }

    /// Notes that interfaces have a clsact qdisc of ours.
    pub fn note_qdiscs(&mut self, interfaces: Vec<u32>) {
        if !interfaces.is_empty() {
            self.record.note_qdiscs(interfaces);
            self.record.write();
        }
    }

    /// The interfaces that have a clsact qdisc of ours.
    pub fn qdiscs(&self) -> &[u32] {
        self.record.qdiscs()
    }

    /// Notes that these interfaces have no clsact qdisc of ours any more.
    pub fn forget_qdiscs(&mut self, gone: &[u32]) {
        self.record.forget_qdiscs(gone);
    }

    /// Puts everything back. Says whether there was anything, and whether some of it is left: that stays on record.
    pub fn put_back(&mut self) -> PutBack {
        let had_anything = !self.record.is_empty();
        self.release();
        self.switch_gro_off(|_| false);
        // What somebody else has set meanwhile is theirs. One that is put back may change others: so all are looked at first.
        let is_ours = |setting: &Setting| read(&setting.path).is_ok_and(|now| now == setting.ours);
        let settings: Vec<_> = self.record.take_settings().filter(is_ours).collect();
        let mut left = Vec::new();
        for setting in settings {
            let Setting { path, before, .. } = &setting;
            match write(path, before) {
                Ok(()) => info!("set {} back to {before}", path.display()),
                // An interface that is gone took its settings along. Some are noted that may change with others, and did not.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(_) if read(path).is_ok_and(|now| now == *before) => {}
                Err(error) => {
                    warn!(%error, "cannot set {} back to {before}", path.display());
                    left.push(setting);
                }
            }
        }
        left.into_iter().rev().for_each(|setting| self.record.note(setting));
        if self.record.is_empty() {
            self.record.clear();
        } else {
            self.record.write();
        }
        PutBack { had_anything, is_left: !self.record.is_empty() }
    }

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
            self.set(&ipv4.join("forwarding"), "1");
            self.set(&ipv4.join("accept_local"), "1");
            let own_rp_filter = read(&ipv4.join("rp_filter")).unwrap_or_default();
            if all_rp_filter.as_str().max(own_rp_filter.as_str()) == "1" {
                self.set(&ipv4.join("rp_filter"), "2");
            }
        }
        self.prepare_ipv6(&root.join("ipv6/conf"), interfaces);
    }

    /// Has segments put together that come in by these interfaces, which are veth devices with our program in their driver, and
    /// no more by others of which a former agent had that.
    pub fn put_segments_together(&mut self, interfaces: &[u32]) {
        if self.switch_gro_off(|interface| interfaces.contains(&interface)) {
            self.record.write();
        }
        for &interface in interfaces {
            gro::switch_on(interface, || {
                self.record.note_gro(interface);
                self.record.write();
            });
        }
    }

    /// Switches GRO off again where it is on by us, but where it is to stay. Says whether there was any such place.
    fn switch_gro_off(&mut self, stays: impl Fn(u32) -> bool) -> bool {
        let others = self.record.take_gro(stays);
        for interface in others.iter().copied().filter(|&interface| !gro::switch_off(interface)) {
            self.record.note_gro(interface);
        }
        !others.is_empty()
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
        // Of those that a former agent reserved some may be of no use now.
        let (ours, added) = (self.record.reserved(), wanted.without(&before));
        let (obsolete, stay) = (ours.without(&wanted), ours.common(&wanted));
        if added.is_empty() && obsolete.is_empty() {
            return;
        }
        self.record.note_reserved(stay.with(&added));
        self.record.write();
        match write(path, &format!("{}\n", before.without(&obsolete).with(&wanted))) {
            Ok(()) => info!("added {added} to {RESERVED_PORTS}"),
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
                self.set(&interface.join("accept_ra"), "2");
            }
        }
        let all = ipv6.join("all/forwarding");
        if read(&all).is_ok_and(|value| value != "1") {
            // Writing to `all` writes to every interface: what each was is written back after it, even where it was the same.
            for path in interfaces.iter().filter(|it| !it.ends_with("all")).map(|it| it.join("forwarding")) {
                if let Ok(before) = read(&path) {
                    self.record.note(Setting { path, before, ours: "1".to_owned() });
                }
            }
            self.set(&all, "1");
        }
        for interface in named {
            self.set(&ipv6.join(interface).join("forwarding"), "1");
        }
    }

    /// Takes back what was reserved, and nothing that others have reserved meanwhile.
    fn release(&mut self) {
        let ours = self.record.reserved();
        if ours.is_empty() {
            return;
        }
        let path = Path::new(RESERVED_PORTS);
        let released = reserved().and_then(|now| {
            // Somebody else may have done so, or they could not be reserved.
            if now.common(ours).is_empty() {
                return Ok(());
            }
            // Nothing at all would not be written.
            write(path, &format!("{}\n", now.without(ours)))
        });
        match released {
            Ok(()) => self.record.note_reserved(Ports::default()),
            Err(error) => warn!(%error, "cannot take {ours} out of {RESERVED_PORTS} again"),
        }
    }

    fn set(&mut self, path: &Path, wanted: &str) {
        match read(path) {
            Ok(before) if before == wanted => {}
            Ok(before) => {
                // On record first: whoever is killed here has changed nothing that is not.
                self.record.note(Setting { path: path.to_owned(), before: before.clone(), ours: wanted.to_owned() });
                self.record.write();
                match write(path, wanted) {
                    Ok(()) => info!("set {} to {wanted} (was {before})", path.display()),
                    Err(error) => {
                        warn!(%error, "cannot set {} to {wanted}, without which packets may not be forwarded; set it yourself", path.display());
                    }
                }
            }
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

/// Writes a setting. A container sees /proc/sys read-only as a rule, and may have the host's `/proc/sys/net` once more, writable, at
/// `/host/proc/sys/net`, as `deploy/kubernetes` does: what is written there is the same.
fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::write(path, value).or_else(|refused| {
        let again = Path::new("/host").join(path.strip_prefix("/").unwrap_or(path));
        let file = fs::File::options().write(true).open(again);
        file.and_then(|mut file| file.write_all(value.as_bytes())).map_err(|_| refused)
    })
}

/// What a setting is.
pub(crate) fn read(path: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_put_back_stays_on_record() {
        let directory = tempfile::tempdir().unwrap();
        let (file, ours) = (directory.path().join("netns-1.json"), directory.path().join("setting"));
        fs::write(&ours, "1").unwrap();
        // Nobody may write to this one, not even root.
        let closed = Path::new("/proc/sys/kernel/osrelease");
        let mut record = Record::read(&file);
        for path in [&ours, closed] {
            record.note(Setting { path: path.to_owned(), before: "0".to_owned(), ours: read(path).unwrap() });
        }
        record.write();
        for _ in 0..2 {
            assert_eq!(Sysctls::open(&file).put_back(), PutBack { had_anything: true, is_left: true });
            assert_eq!(read(&ours).unwrap(), "0");
        }
        let left: Vec<_> = Record::read(&file).take_settings().map(|setting| setting.path).collect();
        assert_eq!(left, [closed]);
    }
}
