//! Others on this machine that balance, too.

use std::{fs, io, path::Path};

use super::{Check, list};

/// What is so.
pub(super) struct Facts {
    /// The processes that are kube-proxy.
    kube_proxies: io::Result<Vec<u32>>,
    /// The virtual services of IPVS; none where the kernel has no IPVS.
    ipvs: io::Result<Vec<String>>,
}

impl Facts {
    pub(super) fn gather() -> Self {
        let ipvs = match fs::read_to_string("/proc/net/ip_vs") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            result => result,
        };
        Self { kube_proxies: kube_proxies(), ipvs: ipvs.map(|text| virtual_services(&text)) }
    }
}

/// The processes that are kube-proxy. One whose network namespace is known to be another serves another node.
pub(crate) fn kube_proxies() -> io::Result<Vec<u32>> {
    processes("kube-proxy")
}

/// What it means that these processes are kube-proxy, and what to do about it.
pub(crate) fn where_kube_proxy_runs(ids: &[u32]) -> (String, &'static str) {
    (
        format!("kube-proxy runs (process {}): where wharf serves the same services, both translate", list(ids)),
        "take its DaemonSet or unit away, then kube-proxy --cleanup on this machine",
    )
}

/// The processes that run a program of this name, but for those that are known to do so in another network namespace; those
/// that end meanwhile are left out.
fn processes(program: &str) -> io::Result<Vec<u32>> {
    let namespace = |folder: &Path| fs::read_link(folder.join("ns/net")).ok();
    let here = namespace(Path::new("/proc/self"));
    let runs = |folder: &Path| {
        let name = fs::read_to_string(folder.join("comm")).unwrap_or_default();
        let command = fs::read(folder.join("cmdline")).unwrap_or_default();
        let is_it = name.trim_end() == program || is_command(&command, program);
        // Of the processes of others that is told to the privileged alone.
        is_it && namespace(folder).is_none_or(|there| here.as_ref().is_none_or(|here| there == *here))
    };
    let folders = fs::read_dir("/proc")?.filter_map(|entry| Some(entry.ok()?.path()));
    let ids = folders.filter_map(|folder| Some((folder.file_name()?.to_str()?.parse().ok()?, folder)));
    Ok(ids.filter(|(_, folder)| runs(folder)).map(|(id, _)| id).collect())
}

/// Whether a command line, in which each word ends with a zero, begins with this program.
fn is_command(command: &[u8], program: &str) -> bool {
    let first = command.split(|byte| *byte == 0).next().unwrap_or_default();
    first.rsplit(|byte| *byte == b'/').next() == Some(program.as_bytes())
}

/// The virtual services in `/proc/net/ip_vs`, as it spells them, in hexadecimal digits. Lines that begin with an arrow are
/// their backends (`ip_vs_info_seq_show` in `net/netfilter/ipvs/ip_vs_ctl.c`).
fn virtual_services(text: &str) -> Vec<String> {
    let service = |line: &str| {
        let mut words = line.split_whitespace();
        let protocol = words.next().filter(|word| ["TCP", "UDP", "SCTP", "FWM"].contains(word))?;
        let address = words.next()?;
        Some(format!("{protocol} {}", decimal(address).unwrap_or_else(|| address.to_owned())))
    };
    text.lines().filter_map(service).collect()
}

/// `0A600001:0050` as `10.96.0.1:80`.
fn decimal(hexadecimal: &str) -> Option<String> {
    let (address, port) = hexadecimal.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    if address.starts_with('[') {
        return Some(format!("{address}:{port}"));
    }
    let address = u32::from_str_radix(address, 16).ok()?;
    Some(format!("{}:{port}", std::net::Ipv4Addr::from(address)))
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    vec![kube_proxy(facts), ipvs(facts)]
}

fn kube_proxy(facts: &Facts) -> Check {
    const NAME: &str = "kube-proxy";
    match &facts.kube_proxies {
        Ok(ids) if ids.is_empty() => Check::ok(NAME, "no kube-proxy runs"),
        Ok(ids) => {
            let (found, remedy) = where_kube_proxy_runs(ids);
            Check::warning(NAME, found, remedy)
        }
        Err(error) => Check::unknown(NAME, format!("processes can't be listed: {error}"), "mount /proc"),
    }
}

fn ipvs(facts: &Facts) -> Check {
    const NAME: &str = "ipvs";
    match &facts.ipvs {
        Ok(services) if services.is_empty() => Check::ok(NAME, "IPVS has no virtual services"),
        Ok(services) => Check::warning(
            NAME,
            format!(
                "IPVS has virtual services: {}; of those that wharf serves, too, it sees no packets any more",
                list(services)
            ),
            "stop keepalived or what else set them, then ipvsadm --clear",
        ),
        Err(error) => {
            Check::unknown(NAME, format!("/proc/net/ip_vs can't be read: {error}"), "run wharf doctor as root")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    const IP_VS: &str = "\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:0050 rr
  -> 0A010002:1F90      Masq    1      0          0
UDP  [fd00:0096:0000:0000:0000:0000:0000:0001]:0035 wrr
FWM  00000007 rr
";

    #[test]
    fn virtual_services_are_named_as_people_write_them() {
        let services = ["TCP 10.96.0.1:80", "UDP [fd00:0096:0000:0000:0000:0000:0000:0001]:53", "FWM 00000007"];
        assert_eq!(virtual_services(IP_VS), services);
        assert!(virtual_services(&IP_VS[..IP_VS.find("TCP").unwrap()]).is_empty());
    }

    #[test]
    fn a_command_is_known_by_the_name_of_its_program() {
        assert!(is_command(b"/usr/local/bin/kube-proxy\0--config=/x\0", "kube-proxy"));
        assert!(is_command(b"kube-proxy", "kube-proxy"));
        assert!(!is_command(b"vi\0/etc/kube-proxy\0", "kube-proxy"));
        assert!(!is_command(b"", "kube-proxy"));
    }

    #[test]
    fn a_process_is_found_by_its_name() {
        let own = fs::read_to_string("/proc/self/comm").unwrap();
        assert!(processes(own.trim_end()).unwrap().contains(&std::process::id()));
        assert!(processes("no-such-program").unwrap().is_empty());
    }

    #[test]
    fn those_that_balance_too_are_named() {
        let refused = || io::Error::from_raw_os_error(libc::EACCES);
        for (kube_proxies, ipvs, verdict, words) in [
            (Ok(vec![]), Ok(vec![]), Verdict::Ok, ["no kube-proxy", "no virtual services"]),
            (Ok(vec![42]), Ok(virtual_services(IP_VS)), Verdict::Warning, ["process 42", "TCP 10.96.0.1:80, "]),
            (Err(refused()), Err(refused()), Verdict::Unknown, ["can't be listed", "can't be read"]),
        ] {
            for (check, words) in checks(&Facts { kube_proxies, ipvs }).iter().zip(words) {
                assert!(check.verdict == verdict && check.found.contains(words), "{check:?}");
            }
        }
    }
}
