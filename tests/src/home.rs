//! Where an agent lives: its files, the user that it runs as, and where its pins are.

use std::{
    ffi::OsString,
    fs::{self, Permissions},
    io,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        net::UnixDatagram,
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::Command,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use crate::{agent::binary, apiserver::ApiServer, topology::Host};

/// The user that [`Home::of_nobody`] is for.
pub const NOBODY: u32 = 65534;

/// A directory with a services file, an admin socket and all else that an agent leaves; removed when this is dropped.
#[derive(Debug)]
pub struct Home {
    directory: TempDir,
    /// The agent's binary.
    binary: PathBuf,
    /// The command that runs another one in a certain way, if there is one.
    way: Vec<OsString>,
    /// A BPF file system of its own, where there is one.
    bpffs: Option<PathBuf>,
    /// Where a service manager listens, if there is one.
    manager: Option<PathBuf>,
    /// How to reach the API server, where that is where services come from.
    kubeconfig: Option<PathBuf>,
    /// Whether nothing is told of sockets there, nor are they ended.
    is_without_sock_diag: bool,
}

impl Home {
    /// Of an agent that runs as root, with this services file.
    pub fn new(services: &str) -> Self {
        let directory = tempfile::tempdir().expect("there is room for temporary files");
        fs::write(directory.path().join("services.yaml"), services).expect("the directory is ours");
        Self {
            directory,
            binary: binary(),
            way: Vec::new(),
            bpffs: None,
            manager: None,
            kubeconfig: None,
            is_without_sock_diag: false,
        }
    }

    /// Of an agent that can't end sockets, as on a kernel without `CONFIG_INET_DIAG_DESTROY`.
    pub fn without_sock_diag(services: &str) -> Self {
        let mut home = Self::new(services);
        home.is_without_sock_diag = true;
        home
    }

    /// Of an agent that runs as an ordinary user who has these capabilities and can get no others, as a service manager runs
    /// one: it can write here, and in a BPF file system of its own.
    pub fn of_nobody(services: &str, capabilities: &[&str]) -> Self {
        let mut home = Self::new(services);
        // Where the binary was built may be closed to others.
        let program = home.path().join("wharf");
        fs::hard_link(binary(), &program)
            .or_else(|_another_file_system| fs::copy(binary(), &program).map(drop))
            .expect("there is room for a binary");
        let bpffs = home.path().join("bpf");
        fs::create_dir(&bpffs).expect("the directory is ours");
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), Some("mode=0700")).expect("root may mount");
        for path in [home.path(), &home.services(), &bpffs] {
            give_away(path);
        }
        home.bpffs = Some(bpffs);
        let set = capabilities.iter().fold("-all".to_owned(), |set, name| format!("{set},+{name}"));
        home.way = vec!["setpriv".into(), "--clear-groups".into()];
        home.way.extend(["--reuid", "--regid"].map(|option| format!("{option}={NOBODY}").into()));
        home.way.extend(["--bounding-set", "--inh-caps", "--ambient-caps"].map(|it| format!("{it}={set}").into()));
        // A change of user takes away what `NetNs::command` has set.
        home.way.push("--pdeathsig=KILL".into());
        home.binary = program;
        home
    }

    /// Of an agent that follows an API server.
    pub fn of_cluster(server: &ApiServer) -> Self {
        let mut home = Self::new("services: []");
        home.kubeconfig = Some(server.kubeconfig(home.path()));
        home
    }

    /// The same with a variable of the environment set.
    pub fn with(mut self, variable: &str, value: &str) -> Self {
        assert!(self.way.is_empty(), "it is run in another way");
        self.way = vec!["env".into(), format!("{variable}={value}").into()];
        self
    }

    /// Of an agent that is run by `ip netns exec`, as one does by hand: with a /sys of its own.
    pub fn of_netns_exec(services: &str, host: &Host) -> Self {
        let mut home = Self::new(services);
        home.way = ["ip", "netns", "exec", host.namespace().name()].map(OsString::from).into();
        home
    }

    /// What the agent tells the service manager that it believes to have been started by.
    pub fn listen(&mut self) -> UnixDatagram {
        let path = self.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("the directory is ours");
        // As systemd's is: whoever it starts may write to it.
        fs::set_permissions(&path, Permissions::from_mode(0o777)).expect("it is ours");
        self.manager = Some(path);
        socket
    }

    /// The services file.
    pub fn services(&self) -> PathBuf {
        self.path().join("services.yaml")
    }

    /// What the agent is told of where services come from.
    pub fn source(&self) -> Vec<OsString> {
        match &self.kubeconfig {
            Some(path) => vec!["--kubernetes".into(), "--kubeconfig".into(), path.into()],
            None => vec!["--services".into(), self.services().into()],
        }
    }

    /// The admin socket.
    pub fn admin(&self) -> PathBuf {
        self.path().join("admin.sock")
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The agent's binary, as its user finds it.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// A verb of a `wharf` that is to be run on a host, and is told where all is.
    pub fn command(&self, binary: &Path, host: &Host, verb: &str) -> Command {
        let mut line = self.way.iter().map(OsString::as_os_str).chain([binary.as_os_str()]);
        let mut command = host.namespace().command(line.next().expect("the binary is there at least"));
        command.args(line).arg(verb).arg("--admin").arg(self.admin());
        if let Some(bpffs) = &self.bpffs {
            command.arg("--bpffs").arg(bpffs);
        }
        command.envs(self.manager.iter().map(|path| ("NOTIFY_SOCKET", path)));
        if self.is_without_sock_diag {
            // SAFETY: Between fork and exec only system calls are allowed; this is one, and does not allocate.
            unsafe {
                command.pre_exec(forgo_sock_diag);
            }
        }
        command
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Some(bpffs) = &self.bpffs {
            // With it goes all that is pinned there.
            umount2(bpffs, MntFlags::MNT_DETACH).expect("it is mounted");
        }
    }
}

/// From now on there are no sockets of `NETLINK_SOCK_DIAG` (seccomp(2)).
fn forgo_sock_diag() -> io::Result<()> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const UNLESS: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const GIVE: u32 = libc::BPF_RET | libc::BPF_K;
    let step = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    // Of `struct seccomp_data`: the call at 0, its first argument at 16, its third at 32.
    let mut steps = [
        step(LOAD, 0, 0),
        step(UNLESS, 5, libc::SYS_socket as u32),
        step(LOAD, 0, 16),
        step(UNLESS, 3, libc::AF_NETLINK as u32),
        step(LOAD, 0, 32),
        step(UNLESS, 1, libc::NETLINK_SOCK_DIAG as u32),
        step(GIVE, 0, libc::SECCOMP_RET_ERRNO | libc::EPROTONOSUPPORT as u32),
        step(GIVE, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: The kernel copies the program, and what it points to.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, u64::from(libc::SECCOMP_MODE_FILTER), &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives a file to an ordinary user.
pub fn give_away(path: &Path) {
    chown(path, Some(NOBODY), Some(NOBODY)).expect("root may");
}
