//! A guest: QEMU with a kernel, the host's files, and a job. What it writes is gone with it, and it has no network.

use std::{
    fs::{self, File},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, Read as _, Write as _, stdout},
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use xtask::command::{clean, tail};

use super::{
    initramfs,
    job::{Job, Outcome},
    kernel::{Unpacked, remove},
    needs,
};

/// In MiB. Half of it is for files that are written.
const MEMORY: u32 = 2_048;

/// All that a processor can be in an emulation, but for fast string instructions: their emulation goes byte by byte, and the kernel would
/// use them for every copy. Without them, and those below, its verifier takes half as long.
const PROCESSOR: &str = "max,-erms,-fsrm";

/// `quiet`: the serial line is slow. No watchdogs: that the host has something else to do for a while is no fault of the guest's.
/// `clearcpuid`: the string instructions that are not so fast are slow, too (`X86_FEATURE_REP_GOOD` is bit 16 of word 3). The rest makes
/// it start sooner.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 log_buf_len=4M nowatchdog rcupdate.rcu_cpu_stall_suppress=1 \
    clearcpuid=112 mitigations=off nokaslr no5lvl tsc=reliable no_timer_check random.trust_cpu=on";

/// How long the servers of files may take to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running guest and what serves it its files; all are ended when this is dropped.
struct Guest {
    folder: PathBuf,
    qemu: Option<Child>,
    servers: Vec<Child>,
}

/// What a kernel dies of that comes upon a breakpoint which it has removed: it writes one over each place of its code that it changes,
/// as where it calls XDP programs when one is attached (`text_poke_bp_batch` in arch/x86/kernel/alternative.c). Each processor of
/// QEMU's is a thread, and one that translates just then what another one writes may keep what was there before.
const STALE_BREAKPOINT: &str = "int3: 0000 [#1]";

/// How many guests of a job may die of that.
const FAULTS: usize = 5;

/// Boots a guest, prints what its job prints, and tells how that ended. All that belongs to the guest is in `folder`, and stays there
/// until the next one. Where it ends by a fault of the emulator's, another one does the rest.
pub(super) fn run(kernel: &Unpacked, folder: &Path, job: &Job, limit: Duration) -> Result<Outcome> {
    let mut done = Vec::new();
    let mut faults = 0;
    loop {
        let mut outcome = run_once(kernel, folder, &job.rest(&done), limit)?;
        done.append(&mut outcome.parts);
        let is_fault = !outcome.is_whole && serial(folder)?.contains(STALE_BREAKPOINT);
        if !is_fault || faults == FAULTS {
            return Ok(Outcome { parts: done, ..outcome });
        }
        faults += 1;
        println!(
            "the guest died of a breakpoint that its kernel had removed: a fault of QEMU's. Another one does the rest"
        );
    }
}

/// What the guest has written to its serial line.
fn serial(folder: &Path) -> Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(folder.join("serial.log"))?).into_owned())
}

fn run_once(kernel: &Unpacked, folder: &Path, job: &Job, limit: Duration) -> Result<Outcome> {
    remove(folder)?;
    let shared = folder.join("out");
    fs::create_dir_all(&shared)?;
    initramfs::write(kernel, folder)?;
    job.write(&shared)?;
    let mut guest = Guest { folder: folder.to_owned(), qemu: None, servers: Vec::new() };
    guest.serve("root", Path::new("/"), "always")?;
    guest.serve("out", &shared, "none")?;
    guest.boot(&kernel.image)?;
    let is_in_time = guest.follow(&shared.join("log"), Instant::now() + limit)?;
    let mut outcome = Outcome::read(&shared)?;
    if !outcome.is_whole {
        let how = if is_in_time { "ended before its job did" } else { "is too slow, or hangs" };
        outcome
            .complaints
            .push(format!("the guest {how}; its last words:\n{}", guest.last_words(&["qemu.log", "serial.log"])));
    }
    Ok(outcome)
}

impl Guest {
    /// Starts what serves a folder to the guest.
    fn serve(&mut self, tag: &str, source: &Path, cache: &str) -> Result<()> {
        // In a container it could not make a namespace of its own, which is the default.
        let mut server = self.command(&needs::virtiofsd()?, tag)?;
        server.arg(format!("--socket-path={}", self.socket(tag))).args(["-f", "-o", "sandbox=chroot", "-o"]);
        server.arg(format!("cache={cache}")).arg("-o").arg(format!("source={}", source.display()));
        self.servers.push(server.spawn().context("cannot run virtiofsd")?);
        let (socket, deadline) = (self.folder.join(self.socket(tag)), Instant::now() + PATIENCE);
        while !socket.exists() {
            ensure!(
                Instant::now() < deadline,
                "virtiofsd does not start:\n{}",
                self.last_words(&[&format!("{tag}.log")])
            );
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn boot(&mut self, image: &Path) -> Result<()> {
        let mut qemu = self.command(Path::new("qemu-system-x86_64"), "qemu")?;
        // Never KVM: where the machine is itself virtual, it may be there and not run this kernel.
        qemu.args(["-accel", "tcg,thread=multi,tb-size=512", "-cpu", PROCESSOR, "-machine", "q35", "-smp", "2"]);
        // Files are served by way of the guest's memory.
        qemu.args(["-m", &MEMORY.to_string(), "-numa", "node,memdev=memory", "-object"]);
        qemu.arg(format!("memory-backend-memfd,id=memory,size={MEMORY}M,share=on"));
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "file:serial.log"]);
        qemu.args(["-device", "virtio-rng-pci"]);
        for tag in ["root", "out"] {
            qemu.args(["-chardev", &format!("socket,id={tag},path={}", self.socket(tag))]);
            qemu.args(["-device", &format!("vhost-user-fs-pci,chardev={tag},tag={tag}")]);
        }
        qemu.arg("-kernel").arg(image).args(["-initrd", "initramfs", "-append", COMMAND_LINE]);
        self.qemu = Some(qemu.spawn().context("cannot run qemu-system-x86_64")?);
        Ok(())
    }

    /// Where a folder is served, in the guest's own: a full path could be too long for a socket. But of one name there can be only one
    /// server on the machine, which has a lock called so.
    fn socket(&self, tag: &str) -> String {
        let mut hasher = DefaultHasher::new();
        self.folder.hash(&mut hasher);
        format!("{tag}-{:x}.sock", hasher.finish())
    }

    /// A command in the guest's folder, its output in a log there; it ends with us.
    fn command(&self, program: &Path, log: &str) -> Result<Command> {
        let log = File::create(self.folder.join(log).with_extension("log"))?;
        let mut command = clean("setpriv");
        command.arg("--pdeathsig=KILL").arg(program).current_dir(&self.folder);
        command.stdin(std::process::Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(command)
    }

    /// Prints what the guest writes to a file, until it ends; whether that is before the deadline.
    fn follow(&mut self, log: &Path, deadline: Instant) -> Result<bool> {
        let mut file = None;
        loop {
            // First this: what it writes before it ends is to be seen.
            let has_ended = self.qemu.as_mut().map(Child::try_wait).transpose()?.flatten().is_some();
            if file.is_none() {
                file = File::open(log).ok();
            }
            if let Some(file) = &mut file {
                let mut text = Vec::new();
                file.read_to_end(&mut text)?;
                stdout().write_all(&text)?;
                stdout().flush()?;
            }
            if has_ended || Instant::now() > deadline {
                return Ok(has_ended);
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// The ends of logs.
    fn last_words(&self, logs: &[&str]) -> String {
        let texts = logs.iter().flat_map(|log| fs::read(self.folder.join(log)));
        let ends = texts.map(|text| tail(&String::from_utf8_lossy(&text)));
        ends.filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for process in self.qemu.iter_mut().chain(&mut self.servers) {
            // They fail if it has ended, which is what they are for.
            let _: io::Result<()> = process.kill();
            let _ = process.wait();
        }
    }
}
