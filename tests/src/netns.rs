//! Network namespaces that live as long as a value does.
//!
//! They have names (`ip netns list` shows them), so that a person can look into a test that is stopped
//! in a debugger: `ip netns exec wharf-4242-1-lb ip neigh`.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::process::CommandExt as _,
    panic,
    path::Path,
    process::{self, Command, Stdio},
    sync::{
        Arc, Once,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
};

use lb_userspace::dataplane::kernel;
use nix::{
    libc,
    sched::{CloneFlags, setns},
    sys::{prctl, signal::Signal},
};
use tokio_util::sync::CancellationToken;

/// Where iproute2 keeps the names of namespaces.
const DIRECTORY: &str = "/run/netns";

/// A network namespace, removed when this is dropped.
#[derive(Debug)]
#[must_use = "the namespace goes when this is dropped"]
pub struct NetNs {
    name: String,
    handle: Arc<File>,
}

/// A thread inside a namespace, stopped and waited for when this is dropped.
#[derive(Debug)]
#[must_use = "the thread is stopped when this is dropped"]
pub struct Background<T> {
    stop: CancellationToken,
    thread: Option<JoinHandle<T>>,
}

impl NetNs {
    /// A new namespace with the loopback device up, called `wharf-<pid>-<n>-<label>`.
    pub fn new(label: &str) -> Self {
        let namespace = Self::named(label, "add", &[]);
        namespace.ip("link set lo up");
        namespace
    }

    /// The namespace that this process is in, called in the same way; the name goes when this is dropped.
    pub fn own(label: &str) -> Self {
        Self::named(label, "attach", &[&process::id().to_string()])
    }

    /// The namespace that `ip netns <verb> <name> <more>` gives a name to.
    fn named(label: &str, verb: &str, more: &[&str]) -> Self {
        static SWEEP: Once = Once::new();
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        SWEEP.call_once(remove_leftovers);
        let name = format!("wharf-{}-{}-{label}", process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut ip = Command::new("ip");
        let status = ip.arg("netns").arg(verb).arg(&name).args(more).status().expect("ip (iproute2) is needed");
        assert!(status.success(), "cannot create network namespace {name}: are you root?");
        let handle = File::open(Path::new(DIRECTORY).join(&name)).expect("ip made it");
        Self { name, handle: Arc::new(handle) }
    }

    /// The name, as `ip netns list` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of the directory in which is pinned what an agent has here.
    pub fn directory(&self) -> String {
        self.run(|| kernel::namespace().expect("there are descriptors left"))
    }

    /// Does `work` inside, on a thread of its own. A socket that is made there stays there,
    /// so it can be handed out and used from anywhere.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let work = || {
            enter(&self.handle).expect("a namespace that is open can be entered");
            work()
        };
        thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|cause| panic::resume_unwind(cause))
    }

    /// Starts `work` on a thread inside; it should end soon after its token is cancelled.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce(CancellationToken) -> T + Send + 'static,
    ) -> Background<T> {
        let stop = CancellationToken::new();
        let (handle, token) = (Arc::clone(&self.handle), stop.clone());
        let thread = thread::spawn(move || {
            enter(&handle).expect("a namespace that is open can be entered");
            drop(handle);
            work(token)
        });
        Background { stop, thread: Some(thread) }
    }

    /// A command that will run inside. It is killed when the thread that started it ends,
    /// so a test run that is killed leaves no process behind; and a Ctrl-C is not for it, but for whoever started it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let handle = Arc::clone(&self.handle);
        let mut command = Command::new(program);
        command.process_group(0);
        // SAFETY: Between fork and exec only system calls are allowed; these are two, and neither allocates.
        unsafe {
            command.pre_exec(move || {
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                enter(&handle)
            });
        }
        command
    }

    /// Runs a batch of iproute2 commands inside, one a line, without the `ip`.
    #[track_caller]
    pub fn ip(&self, batch: &str) {
        let mut ip = self.command("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("ip is needed");
        ip.stdin.take().expect("it is piped").write_all(batch.as_bytes()).expect("ip reads its commands");
        assert!(ip.wait().is_ok_and(|status| status.success()), "in {}: {batch}", self.name);
    }

    /// Sets a value below `/proc/sys/net`.
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = Path::new("/proc/sys/net").join(key);
        self.run(|| fs::write(&path, value)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

impl<T> Background<T> {
    /// Stops the thread; what its work returned. Panics where it did.
    pub fn finish(mut self) -> T {
        self.stop.cancel();
        let thread = self.thread.take().expect("only this and drop take it");
        thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    }
}

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        self.stop.cancel();
        // If the thread panicked it has said so; a second panic here could only hide the first.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn enter(namespace: &File) -> io::Result<()> {
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

fn remove(name: &str) {
    // There is nothing that a test could do about an error; whoever runs it sees what `ip` says.
    let _ = Command::new("ip").args(["netns", "del", name]).status();
}

/// Removes the namespaces of test runs that were killed before they could do it themselves.
/// The first [`NetNs::new`] of a process does this.
pub fn remove_leftovers() {
    let Ok(names) = fs::read_dir(DIRECTORY) else { return };
    for name in names.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let pid = name.strip_prefix("wharf-").and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| pid.parse::<libc::pid_t>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            remove(&name);
        }
    }
}
