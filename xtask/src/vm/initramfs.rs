//! What a guest boots into: a shell, the few modules that are needed before the host's files are there, and what mounts those.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use xtask::command::{clean, find, output};

use super::kernel::Unpacked;

/// The first process.
const INIT: &str = include_str!("init");

/// What mounts the host's files. Some kernels have parts of it built in.
const MODULES: [&str; 3] = ["virtio_pci", "virtiofs", "overlay"];

/// Makes the file `initramfs` in this folder.
pub(super) fn write(kernel: &Unpacked, folder: &Path) -> Result<()> {
    let tree = folder.join("tree");
    for name in ["bin", "modules", "proc", "sys", "dev"] {
        fs::create_dir_all(tree.join(name))?;
    }
    let busybox = find("busybox", |_| true).context("busybox is gone")?;
    fs::copy(&busybox, tree.join("bin/busybox"))?;
    fs::write(tree.join("init"), INIT)?;
    fs::set_permissions(tree.join("init"), Permissions::from_mode(0o755))?;
    let mut list = String::new();
    for module in files(kernel)? {
        let name = format!("{}.ko", list.lines().count());
        // The shell's insmod takes no compressed modules.
        let is_compressed = module.extension() == Some(OsStr::new("xz"));
        let tool = if is_compressed { "xzcat" } else { "cat" };
        let file = File::create(tree.join("modules").join(&name))?;
        let status = Command::new(&busybox).arg(tool).arg(&module).stdout(file).status()?;
        ensure!(status.success(), "busybox {tool} {}: {status}", module.display());
        let _ = writeln!(list, "{name}");
    }
    fs::write(tree.join("modules.list"), list)?;
    archive(&busybox, &tree, &folder.join("initramfs"))
}

/// The files of the modules and of those that they need, in the order of loading.
fn files(kernel: &Unpacked) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for module in MODULES {
        let mut modprobe = clean("modprobe");
        modprobe.arg("--dirname").arg(kernel.base()?).arg("--set-version").arg(kernel.release());
        let steps = output(modprobe.args(["--show-depends", module]));
        let steps = steps.with_context(|| format!("{} has no module {module}", kernel.modules.display()))?;
        for file in steps.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let file = PathBuf::from(file.trim_end());
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Ok(files)
}

/// Packs a folder as the kernel wants it.
fn archive(busybox: &Path, tree: &Path, to: &Path) -> Result<()> {
    let mut list = Command::new(busybox).arg("find").current_dir(tree).stdout(Stdio::piped()).spawn()?;
    let names = list.stdout.take().context("it is piped")?;
    let mut cpio = Command::new(busybox);
    cpio.args(["cpio", "-o", "-H", "newc"])
        .current_dir(tree)
        .stdin(names)
        .stdout(File::create(to)?)
        .stderr(Stdio::null());
    ensure!(cpio.status()?.success() & list.wait()?.success(), "busybox cannot pack {}", tree.display());
    Ok(())
}
