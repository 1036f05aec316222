//! What the kernel can do, and whether this process may have it done.

use std::{
    fs,
    io::{self, ErrorKind},
};

use caps::CapsHashSet;
use nix::{sys::utsname::uname, unistd::geteuid};

use super::{Check, Verdict};
use crate::{
    dataplane::kernel::probe::{Feature, Map},
    privileges::{self, Need},
    sockets,
};

/// What is so.
pub(super) struct Facts {
    release: String,
    is_root: bool,
    /// What this process may do.
    capabilities: Option<CapsHashSet>,
    xdp: io::Result<bool>,
    tc: io::Result<bool>,
    sock_addr: io::Result<bool>,
    /// Whether UDP sockets can be ended.
    sock_destroy: io::Result<()>,
    tcx: io::Result<bool>,
    maps: Vec<(Map, io::Result<bool>)>,
    /// `net.core.bpf_jit_enable`.
    jit: io::Result<String>,
    has_btf: bool,
    /// What `/sys/kernel/security/lockdown` says.
    lockdown: io::Result<String>,
}

impl Facts {
    pub(super) fn gather() -> Self {
        let release = uname().map_or_else(|_| "of unknown release".to_owned(), |it| it.release().display().to_string());
        Self {
            release,
            is_root: geteuid().is_root(),
            capabilities: privileges::effective().ok(),
            xdp: Feature::Xdp.is_there(),
            tc: Feature::Tc.is_there(),
            sock_addr: Feature::SockAddr.is_there(),
            sock_destroy: sockets::check(),
            tcx: Feature::Tcx.is_there(),
            maps: Map::ALL.into_iter().map(|map| (map, Feature::Map(map).is_there())).collect(),
            jit: fs::read_to_string("/proc/sys/net/core/bpf_jit_enable"),
            has_btf: fs::exists("/sys/kernel/btf/vmlinux").unwrap_or(false),
            lockdown: fs::read_to_string("/sys/kernel/security/lockdown"),
        }
    }
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![Check::ok("kernel", format!("Linux {}", facts.release)), privileges(facts), bpf(facts)];
    // Where nothing may be tried, one line that says so is enough.
    if !is_forbidden(&facts.xdp) {
        checks.extend([programs(facts), socket_programs(facts), maps(facts), tcx(facts)]);
    }
    checks.extend([sock_destroy(facts), jit(facts), btf(facts), lockdown(facts)]);
    checks
}

const AS_ROOT: &str = "run wharf doctor as root";

fn privileges(facts: &Facts) -> Check {
    const NAME: &str = "capabilities";
    let Some(held) = &facts.capabilities else {
        return Check::unknown(NAME, "the capabilities of this process can't be read", AS_ROOT);
    };
    let lacking: Vec<_> = privileges::missing(held).iter().map(Need::name).collect();
    if lacking.is_empty() {
        return Check::ok(NAME, "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are there");
    }
    let found = format!("this process lacks {}, which wharf run needs", lacking.join(", "));
    if facts.is_root {
        Check::problem(NAME, found, "give the container or service these capabilities")
    } else {
        Check::warning(NAME, found, "run wharf doctor and wharf run as root, or with these capabilities")
    }
}

fn bpf(facts: &Facts) -> Check {
    const NAME: &str = "bpf";
    match &facts.xdp {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            Check::problem(NAME, "the kernel has no bpf(2)", "take a kernel with CONFIG_BPF_SYSCALL")
        }
        result if !is_forbidden(result) => Check::ok(NAME, "bpf(2) is permitted"),
        _ if facts.is_root => Check::problem(
            NAME,
            "bpf(2) is not permitted, not even to root",
            "run wharf outside of the container, or with CAP_BPF and a seccomp profile that lets bpf(2) through",
        ),
        _ => Check::unknown(
            NAME,
            "bpf(2) is not permitted to this user, so what the kernel can do was not tried",
            AS_ROOT,
        ),
    }
}

fn is_forbidden<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

fn programs(facts: &Facts) -> Check {
    let tried = [("XDP", &facts.xdp), ("tc", &facts.tc)];
    let lacking = Check::problem(
        "bpf-programs",
        "",
        "take a kernel with CONFIG_BPF_SYSCALL, CONFIG_NET_CLS_ACT and CONFIG_NET_SCH_INGRESS, Linux 6.1 or later",
    );
    all_there("programs", &tried, lacking)
}

fn socket_programs(facts: &Facts) -> Check {
    let lacking = Check::note(
        "bpf-socket-programs",
        "",
        "nothing, if that is meant: processes of this machine are balanced packet by packet, which is slower, and do not reach NodePorts at \
         localhost; CONFIG_CGROUP_BPF gives the kernel what it lacks",
    );
    all_there("programs", &[("cgroup sock_addr", &facts.sock_addr)], lacking)
}

fn sock_destroy(facts: &Facts) -> Check {
    const NAME: &str = "sock-destroy";
    match &facts.sock_destroy {
        Ok(()) => Check::ok(NAME, "the kernel ends UDP sockets that lose their backend"),
        Err(error) if error.kind() == ErrorKind::Unsupported => Check::note(
            NAME,
            error.to_string(),
            "nothing, if that is meant: connected UDP sockets are balanced packet by packet, which is slower, and do not reach NodePorts \
             at localhost; take a kernel with CONFIG_INET_UDP_DIAG and CONFIG_INET_DIAG_DESTROY, or --socket-lb-end none if they may stay",
        ),
        Err(error) => Check::unknown(NAME, format!("the kernel's list of sockets gave: {error}"), AS_ROOT),
    }
}

fn maps(facts: &Facts) -> Check {
    let tried: Vec<_> = facts.maps.iter().map(|(map, result)| (map.name(), result)).collect();
    all_there("maps", &tried, Check::problem("bpf-maps", "", "take a kernel of Linux 6.1 or later"))
}

/// One check for things of one sort; `lacking` says what it is if one is not there.
fn all_there(sort: &str, tried: &[(&str, &io::Result<bool>)], lacking: Check) -> Check {
    let named = |wanted: &dyn Fn(&io::Result<bool>) -> bool| {
        let names: Vec<_> = tried.iter().filter(|(_, result)| wanted(result)).map(|(name, _)| *name).collect();
        names.join(", ")
    };
    let missing = named(&|result| matches!(result, Ok(false)));
    if !missing.is_empty() {
        return Check { found: format!("the kernel has no {sort} of the kinds {missing}"), ..lacking };
    }
    match tried.iter().find_map(|(name, result)| Some((name, result.as_ref().err()?))) {
        Some((name, error)) => {
            Check::unknown(lacking.name, format!("{sort} of the kind {name} gave: {error}"), AS_ROOT)
        }
        None => Check::ok(lacking.name, format!("{sort} of the kinds {} are there", named(&|_| true))),
    }
}

fn tcx(facts: &Facts) -> Check {
    const NAME: &str = "tcx";
    match &facts.tcx {
        Ok(true) => Check::ok(NAME, "tc programs are attached by links"),
        Ok(false) => Check::note(
            NAME,
            "the kernel has no tcx (Linux 6.6 and later do), so filters of the clsact qdisc are used",
            "nothing: they do the same",
        ),
        Err(error) => Check::unknown(NAME, format!("a tcx link to no interface gave: {error}"), AS_ROOT),
    }
}

fn jit(facts: &Facts) -> Check {
    const NAME: &str = "bpf-jit";
    match facts.jit.as_ref().map(|value| value.trim()) {
        Ok("0") => Check::warning(
            NAME,
            "net.core.bpf_jit_enable is 0: programs are interpreted, which is several times slower",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Ok(value) => Check::ok(NAME, format!("programs are compiled (net.core.bpf_jit_enable is {value})")),
        Err(error) if error.kind() == ErrorKind::NotFound => Check::unknown(
            NAME,
            "net.core.bpf_jit_enable is shown in the machine's first network namespace only, or the kernel has no JIT",
            "sysctl net.core.bpf_jit_enable, outside of this namespace, should say 1",
        ),
        Err(error) => Check::unknown(NAME, format!("net.core.bpf_jit_enable can't be read: {error}"), AS_ROOT),
    }
}

fn btf(facts: &Facts) -> Check {
    if facts.has_btf {
        Check::ok("btf", "the kernel describes its types (/sys/kernel/btf/vmlinux)")
    } else {
        Check::note(
            "btf",
            "the kernel does not describe its types (/sys/kernel/btf/vmlinux is not there)",
            "nothing: wharf does without; tools such as bpftool show more with CONFIG_DEBUG_INFO_BTF",
        )
    }
}

fn lockdown(facts: &Facts) -> Check {
    const NAME: &str = "lockdown";
    match &facts.lockdown {
        Err(error) if error.kind() == ErrorKind::NotFound => Check::ok(NAME, "the kernel speaks of no lockdown"),
        Err(error) => Check::unknown(NAME, format!("/sys/kernel/security/lockdown can't be read: {error}"), AS_ROOT),
        Ok(text) if text.contains("[confidentiality]") => Check::not_ok(
            Verdict::Note,
            NAME,
            "the kernel is locked down for confidentiality: BPF programs can't read its memory",
            "nothing: wharf's programs do not; if they are refused all the same, boot with lockdown=integrity",
        ),
        Ok(text) => Check::ok(NAME, format!("the kernel's lockdown lets BPF be ({})", text.trim())),
    }
}

#[cfg(test)]
mod tests {
    use Verdict::{Note, Ok as Fine, Problem, Unknown, Warning};

    use super::{super::tests::check_says, *};

    fn refused<T>(errno: i32) -> io::Result<T> {
        Err(io::Error::from_raw_os_error(errno))
    }

    fn good() -> Facts {
        Facts {
            release: "6.18.1".to_owned(),
            is_root: true,
            capabilities: Some(caps::all()),
            xdp: Ok(true),
            tc: Ok(true),
            sock_addr: Ok(true),
            sock_destroy: Ok(()),
            tcx: Ok(true),
            maps: Map::ALL.into_iter().map(|map| (map, Ok(true))).collect(),
            jit: Ok("1\n".to_owned()),
            has_btf: true,
            lockdown: refused(libc::ENOENT),
        }
    }

    #[track_caller]
    fn says(facts: &Facts, name: &str, verdict: Verdict, words: &str) {
        check_says(&checks(facts), name, verdict, words);
    }

    #[test]
    fn a_good_kernel_is_as_it_should_be() {
        assert!(checks(&good()).iter().all(|check| check.verdict == Fine && check.remedy.is_none()));
        says(&good(), "kernel", Fine, "6.18.1");
    }

    #[test]
    fn the_capabilities_that_are_lacking_are_named() {
        use caps::Capability::{CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN};
        let with =
            |held: &[_], is_root| Facts { is_root, capabilities: Some(held.iter().copied().collect()), ..good() };
        says(&with(&[CAP_BPF, CAP_NET_ADMIN], false), "capabilities", Warning, "lacks CAP_PERFMON,");
        says(&with(&[CAP_SYS_ADMIN], true), "capabilities", Problem, "lacks CAP_NET_ADMIN,");
        says(&with(&[CAP_SYS_ADMIN, CAP_NET_ADMIN], false), "capabilities", Fine, "CAP_BPF");
        says(&Facts { capabilities: None, ..good() }, "capabilities", Unknown, "can't be read");
    }

    #[test]
    fn where_nothing_may_be_tried_one_line_says_so() {
        let forbidden = |is_root| Facts { xdp: refused(libc::EPERM), is_root, ..good() };
        says(&forbidden(false), "bpf", Unknown, "not permitted to this user");
        says(&forbidden(true), "bpf", Problem, "not even to root");
        assert!(!checks(&forbidden(true)).iter().any(|check| check.name == "bpf-maps"));
        says(&Facts { xdp: refused(libc::ENOSYS), ..good() }, "bpf", Problem, "no bpf(2)");
    }

    #[test]
    fn what_the_kernel_lacks_is_named() {
        says(&Facts { tc: Ok(false), ..good() }, "bpf-programs", Problem, "kinds tc");
        says(&Facts { tc: refused(libc::EIO), ..good() }, "bpf-programs", Unknown, "kind tc gave");
        says(&Facts { sock_addr: Ok(false), ..good() }, "bpf-socket-programs", Note, "cgroup sock_addr");
        let unended = Err(io::Error::new(ErrorKind::Unsupported, "this kernel ends no sockets"));
        says(&Facts { sock_destroy: unended, ..good() }, "sock-destroy", Note, "packet by packet");
        says(&Facts { sock_destroy: refused(libc::EACCES), ..good() }, "sock-destroy", Unknown, "gave");
        let maps = vec![(Map::Hash, Ok(true)), (Map::LpmTrie, Ok(false)), (Map::LruHash, Ok(false))];
        says(&Facts { maps, ..good() }, "bpf-maps", Problem, "kinds LPM trie, LRU hash");
        says(&Facts { tcx: Ok(false), ..good() }, "tcx", Note, "clsact");
        says(&Facts { tcx: refused(libc::EIO), ..good() }, "tcx", Unknown, "gave");
        says(&Facts { has_btf: false, ..good() }, "btf", Note, "not there");
    }

    #[test]
    fn an_interpreter_is_slow_and_confidentiality_is_noted() {
        says(&Facts { jit: Ok("0\n".to_owned()), ..good() }, "bpf-jit", Warning, "interpreted");
        says(&Facts { jit: refused(libc::ENOENT), ..good() }, "bpf-jit", Unknown, "first network namespace");
        says(&Facts { jit: refused(libc::EACCES), ..good() }, "bpf-jit", Unknown, "can't be read");
        let with = |text: &str| Facts { lockdown: Ok(text.to_owned()), ..good() };
        says(&with("none [integrity] confidentiality\n"), "lockdown", Fine, "[integrity]");
        says(&with("none integrity [confidentiality]\n"), "lockdown", Note, "confidentiality");
        says(&Facts { lockdown: refused(libc::EACCES), ..good() }, "lockdown", Unknown, "can't be read");
    }
}
