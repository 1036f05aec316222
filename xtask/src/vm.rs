//! `cargo xtask vm`: the third ring of tests, on other kernels than this machine's.

mod apt;
mod binaries;
mod guest;
mod initramfs;
mod job;
mod kernel;
mod needs;
mod ring;

use std::{
    ffi::OsString,
    fs::{self, File},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use self::{
    binaries::Binaries,
    job::Outcome,
    kernel::{KERNELS, Kernel, OLDEST, Unpacked},
};
use crate::{place::target, setup::setup};

/// Which kernels, and what on them.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Every kernel, and not only the oldest
    #[arg(long)]
    all: bool,
    /// One kernel
    #[arg(long, value_name = "KERNEL", conflicts_with = "all", value_parser = KERNELS.map(|kernel| kernel.name))]
    kernel: Option<String>,
    /// One program of tests and its arguments, such as `flows round_robin`; otherwise the ring
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// The kernels to boot, and their files. Nobody else boots any from the same folder meanwhile.
#[derive(Debug)]
pub(crate) struct Kernels {
    chosen: Vec<(Kernel, Unpacked)>,
    /// Whether these are all that there are.
    are_all: bool,
    _lock: File,
}

/// How long a guest may take for all that it does.
const LIMIT: Duration = Duration::from_secs(30 * 60);

pub(crate) fn verb(options: &Options) -> Result<()> {
    setup()?;
    test(&prepare(options)?, &options.program)
}

/// Installs and fetches what is missing. It fails where there can be no guests, and that says nothing of Wharf.
pub(crate) fn prepare(options: &Options) -> Result<Kernels> {
    needs::provide_all()?;
    fs::create_dir_all(cache()?)?;
    let lock = File::create(cache()?.join("lock"))?;
    lock.try_lock().context("another run has the virtual machines of this target directory")?;
    let name = options.kernel.as_deref().unwrap_or(OLDEST.name);
    let chosen = KERNELS.into_iter().filter(|kernel| options.all || kernel.name == name);
    let chosen = chosen.map(|kernel| Ok((kernel, kernel.fetch(&cache()?)?))).collect::<Result<_>>()?;
    Ok(Kernels { chosen, are_all: options.all, _lock: lock })
}

/// Runs the ring on these kernels, or one program of tests.
pub(crate) fn test(kernels: &Kernels, program: &[OsString]) -> Result<()> {
    let binaries = Binaries::build()?;
    let mut failed = Vec::new();
    for (kernel, unpacked) in &kernels.chosen {
        println!("kernel {}", unpacked.release().display());
        let mut is_good = true;
        let mut jobs = vec![ring::job(unpacked, &binaries, program, kernels.are_all)?];
        // What systemd does is the same on all kernels, and takes as long as the ring.
        if kernels.are_all && kernel.name == OLDEST.name && program.is_empty() {
            jobs.push(ring::job(unpacked, &binaries, &[ring::UNIT.into()], true)?);
        }
        for job in jobs {
            let outcome = guest::run(unpacked, &cache()?.join(kernel.name).join(job.folder()), &job, LIMIT)?;
            is_good &= report(kernel, &outcome);
        }
        if !is_good {
            failed.push(kernel.name);
        }
    }
    ensure!(failed.is_empty(), "tests fail on kernel {}", failed.join(", "));
    Ok(())
}

/// Says how the parts of a job ended; whether all is good.
fn report(kernel: &Kernel, outcome: &Outcome) -> bool {
    for part in &outcome.parts {
        let how = if part.is_good { "ok" } else { "FAILED" };
        println!("kernel {}: {} {how}, in {} s", kernel.name, part.name, part.seconds);
    }
    for complaint in &outcome.complaints {
        println!("kernel {}: {complaint}", kernel.name);
    }
    outcome.complaints.is_empty() && outcome.parts.iter().all(|part| part.is_good)
}

/// Where kernels are kept, and what guests leave.
fn cache() -> Result<PathBuf> {
    Ok(target()?.join("vm"))
}
