//! The kernel settings without which a balancer can't forward: changed while the agent runs, and put back after.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tracing::{info, warn};

/// Settings that were changed, with what they were.
#[derive(Debug, Default)]
pub struct Sysctls {
    changed: Vec<(PathBuf, String)>,
}

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

impl Drop for Sysctls {
    fn drop(&mut self) {
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
