//! Control groups that live as long as a value does.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
};

use lb_userspace::cgroup::Root;

use crate::{PATIENCE, netns::NetNs, poll};

/// The number of the hook for connect(2) over IPv4 (`BPF_CGROUP_INET4_CONNECT` in include/uapi/linux/bpf.h).
pub const CONNECT4: u32 = 10;

/// Those of the hooks for recvfrom(2) over IPv4 and over IPv6 (`BPF_CGROUP_UDP4_RECVMSG`, `BPF_CGROUP_UDP6_RECVMSG`).
pub const RECVMSG: [u32; 2] = [19, 20];

/// A control group below the root of version 2, removed when this is dropped.
#[derive(Debug)]
#[must_use = "it goes when this is dropped"]
pub struct ControlGroup {
    name: PathBuf,
    directory: PathBuf,
    _root: Option<Root>,
}

impl ControlGroup {
    /// A new one, called `wharf-<pid>-<n>-<label>`.
    pub fn new(label: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let root = Root::find().expect("control groups are needed");
        // Where the root is mounted at no place, its directory is one of this process alone.
        let own = PathBuf::from(format!("/proc/{}", process::id()));
        let base =
            root.directory().strip_prefix("/proc/self").map_or_else(|_| root.directory().to_owned(), |it| own.join(it));
        let name = format!("wharf-{}-{}-{label}", process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        Self::make(Path::new("/").join(&name), base.join(name), Some(root))
    }

    /// One more, inside this one, that has to go before it.
    pub fn child(&self, label: &str) -> Self {
        Self::make(self.name.join(label), self.directory.join(label), None)
    }

    fn make(name: PathBuf, directory: PathBuf, root: Option<Root>) -> Self {
        fs::create_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        Self { name, directory, _root: root }
    }

    /// The name, as in `/proc/PID/cgroup`.
    pub fn name(&self) -> &str {
        self.name.to_str().expect("a test called it")
    }

    /// The directory.
    pub fn directory(&self) -> &str {
        self.directory.to_str().expect("a test called it")
    }

    /// A command that will run inside, and in a network namespace; see [`NetNs::command`].
    pub fn command(&self, namespace: &NetNs, program: impl AsRef<OsStr>) -> Command {
        let members = OpenOptions::new().write(true).open(self.directory.join("cgroup.procs")).expect("it is ours");
        let mut command = namespace.command(program);
        // SAFETY: Between fork and exec only system calls are allowed; this is one, and does not allocate. Zero is whoever writes it.
        unsafe {
            command.pre_exec(move || (&members).write_all(b"0"));
        }
        command
    }

    /// How many programs are attached to it, at all hooks for calls on sockets.
    pub fn programs(&self) -> usize {
        let group = File::open(&self.directory).expect("it is ours");
        let count = |attach_type| {
            let mut attr = QueryAttr { target_fd: group.as_raw_fd() as u32, attach_type, ..QueryAttr::default() };
            // SAFETY: The attributes are the command's; there is room for no ids, and so none is written.
            let result = unsafe { bpf(BPF_PROG_QUERY, &mut attr) };
            // Where there are some, the kernel says that there is no room for their ids.
            assert!(result.is_ok() || attr.prog_cnt > 0, "{result:?}");
            attr.prog_cnt as usize
        };
        ATTACH_TYPES.into_iter().map(count).sum()
    }

    /// Attaches a program of somebody else's to it, that lets all connections of IPv4 be as they are; it stays until the control
    /// group goes, and others may attach beside it.
    pub fn attach_stranger(&self) {
        self.attach(CONNECT4, BPF_F_ALLOW_MULTI);
    }

    /// The same to the hook of this number, but that nobody else may attach there.
    pub fn attach_exclusive_stranger(&self, attach_type: u32) {
        self.attach(attach_type, 0);
    }

    fn attach(&self, attach_type: u32, attach_flags: u32) {
        // r0 = 1; exit
        let instructions: [u64; 2] = [0x0000_0001_0000_00b7, 0x0000_0000_0000_0095];
        let mut load = LoadAttr {
            prog_type: BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
            insn_cnt: 2,
            insns: instructions.as_ptr().expose_provenance() as u64,
            license: c"GPL".as_ptr().expose_provenance() as u64,
            expected_attach_type: attach_type,
            ..LoadAttr::default()
        };
        // SAFETY: The attributes are the command's, and what they point to is there.
        let program = unsafe { bpf(BPF_PROG_LOAD, &mut load) }.expect("it is a program");
        let group = File::open(&self.directory).expect("it is ours");
        let mut attach = AttachAttr {
            target_fd: group.as_raw_fd() as u32,
            attach_bpf_fd: program as u32,
            attach_type,
            attach_flags,
        };
        // SAFETY: The attributes are the command's.
        unsafe { bpf(BPF_PROG_ATTACH, &mut attach) }.expect("the control group is new");
        // SAFETY: The kernel has made the descriptor for us.
        drop(unsafe { OwnedFd::from_raw_fd(program) });
    }
}

// Of include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// `BPF_CGROUP_INET4_BIND` to `BPF_CGROUP_UDP6_SENDMSG` but for those after bind(2), `BPF_CGROUP_UDP4_RECVMSG` and the like,
/// `BPF_CGROUP_INET4_GETPEERNAME` and the like, `BPF_CGROUP_INET_SOCK_RELEASE`.
const ATTACH_TYPES: [u32; 11] = [8, 9, 10, 11, 14, 15, 19, 20, 29, 30, 34];

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    _pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// bpf(2).
///
/// # Safety
///
/// `attr` is the beginning of what the command takes, and its pointers are valid.
pub(crate) unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: By contract; the kernel takes what is missing for zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // What was killed may take a moment to be gone. About more than that there is nothing that a test could do.
        let _ = poll(PATIENCE, || fs::remove_dir(&self.directory).ok());
    }
}
