//! What a host's interfaces are, have counted, and carry, and what is pinned for it.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use aya::{
    maps::MapData,
    programs::tc::{SchedClassifier, TcAttachType},
};
use serde_json::Value;

use crate::{SOON, control_group::bpf, poll, topology::Host};

impl Host {
    /// How many packets came in by an interface.
    #[track_caller]
    pub fn received(&self, interface: &str) -> u64 {
        self.link(interface)["stats64"]["rx"]["packets"].as_u64().expect("every link counts")
    }

    /// The Ethernet address of an interface.
    #[track_caller]
    pub fn mac(&self, interface: &str) -> String {
        self.link(interface)["address"].as_str().expect("every link has one").to_owned()
    }

    /// What `ip` says of an interface.
    #[track_caller]
    fn link(&self, interface: &str) -> Value {
        self.json("ip", &["-json", "-stats", "link", "show", interface])[0].take()
    }

    /// The number of an interface.
    #[track_caller]
    pub fn number(&self, interface: &str) -> u64 {
        self.link(interface)["ifindex"].as_u64().expect("every link has one")
    }

    /// Everything that programs are attached by: `<interface> xdp`, `<interface> tcx <direction> <program>`,
    /// and `<interface> <qdisc>` for the kinds of queueing discipline that exist to have programs. Sorted.
    #[track_caller]
    pub fn programs(&self) -> Vec<String> {
        let links = self.json("ip", &["-json", "link"]);
        let links = links.as_array().expect("a list of links");
        let name = |link: &Value, field| link[field].as_str().expect("every link has a name").to_owned();
        let xdp =
            links.iter().filter(|link| !link["xdp"].is_null()).map(|link| format!("{} xdp", name(link, "ifname")));
        let qdiscs = self.json("tc", &["-json", "qdisc", "show"]);
        let with_programs = |qdisc: &&Value| ["clsact", "ingress"].map(Value::from).contains(&qdisc["kind"]);
        let qdiscs = qdiscs.as_array().into_iter().flatten().filter(with_programs);
        let qdiscs = qdiscs.map(|qdisc| format!("{} {}", name(qdisc, "dev"), name(qdisc, "kind")));
        let tcx = links.iter().flat_map(|link| self.tcx(&name(link, "ifname")));
        let mut all: Vec<_> = xdp.chain(qdiscs).chain(tcx).collect();
        all.sort();
        all
    }

    /// Asserts that there is no such thing, in a moment: who removes a link's last pin does not wait until the kernel has detached it
    /// (`bpf_link_put` in `kernel/bpf/syscall.c`).
    #[track_caller]
    pub fn assert_no_programs(&self) {
        let mut programs = Vec::new();
        let is_gone = || {
            programs = self.programs();
            programs.is_empty().then_some(())
        };
        assert!(poll(SOON, is_gone).is_some(), "{programs:?}");
    }

    /// What agents have pinned for this host's namespace, in the usual place.
    pub fn pins(&self) -> Vec<PathBuf> {
        let below = |path: &Path| {
            fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let directory = self.namespace().directory();
        let layouts = below(Path::new("/sys/fs/bpf/wharf")).into_iter();
        let directories = layouts.map(|layout| layout.join(&directory)).filter(|it| it.exists());
        directories.flat_map(|directory| below(&directory)).collect()
    }

    /// A map of the agent that runs here.
    #[track_caller]
    pub fn pinned_map(&self, name: &str) -> MapData {
        let maps = self.pins().into_iter().find(|path| path.ends_with("maps")).expect("an agent pins its maps");
        MapData::from_pin(maps.join(name)).expect("it is a map's pin")
    }

    /// Detaches the programs of the agent that runs here from where links hold them of which the pins' names have this in
    /// them, as `bpftool link detach` does.
    #[track_caller]
    pub fn detach_programs(&self, which: &str) {
        let links = self.pins().into_iter().find(|path| path.ends_with("links")).expect("an agent pins its links");
        let links = fs::read_dir(links).expect("it can be read").map(|entry| entry.expect("it can be read"));
        for link in links.filter(|link| link.file_name().to_string_lossy().contains(which)) {
            match detach(&link.path()) {
                // The agent may be attaching again.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                detached => detached.expect("it is a link's pin"),
            }
        }
    }

    fn tcx(&self, interface: &str) -> Vec<String> {
        let attached = |(direction, attach_type)| {
            // A kernel before 6.6 has no tcx, and so none attached.
            let (_, programs) = SchedClassifier::query_tcx(interface, attach_type).unwrap_or_default();
            let names = programs.into_iter().map(|program| program.name_as_str().unwrap_or("?").to_owned());
            names.map(|name| format!("{interface} tcx {direction} {name}")).collect::<Vec<_>>()
        };
        let directions = [("ingress", TcAttachType::Ingress), ("egress", TcAttachType::Egress)];
        self.namespace().run(|| directions.into_iter().flat_map(attached).collect())
    }

    #[track_caller]
    fn json(&self, program: &str, arguments: &[&str]) -> Value {
        let output = self.namespace().command(program).args(arguments).output().expect("iproute2 is needed");
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("it was asked for JSON")
    }
}

/// Detaches a pinned link, which stays and is on nothing then.
fn detach(pin: &Path) -> io::Result<()> {
    // Of include/uapi/linux/bpf.h.
    const BPF_OBJ_GET: libc::c_int = 7;
    const BPF_LINK_DETACH: libc::c_int = 34;
    let path = CString::new(pin.as_os_str().as_bytes())?;
    // SAFETY: The path is there for as long as the call takes.
    let link = unsafe { bpf(BPF_OBJ_GET, &mut path.as_ptr().expose_provenance())? };
    // SAFETY: The kernel has just made it for us.
    let link = unsafe { OwnedFd::from_raw_fd(link) };
    // SAFETY: The command takes the link's descriptor, and nothing else.
    unsafe { bpf(BPF_LINK_DETACH, &mut link.as_raw_fd())? };
    Ok(())
}
