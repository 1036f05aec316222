//! Which kernels the guests have, and where they are from: Debian's packages, unpacked below `target/vm` and not installed.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use xtask::command::{clean, step};

use super::apt::Apt;

/// A kernel that Debian has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    /// How we call it.
    pub(crate) name: &'static str,
    /// The suite that it is the kernel of.
    suite: &'static str,
}

/// The one that is enough for every day: what it accepts, later ones do.
pub(crate) const OLDEST: Kernel = Kernel { name: "6.1", suite: "bookworm" };

/// From the oldest that Wharf runs on to the newest that there is.
pub(crate) const KERNELS: [Kernel; 3] =
    [OLDEST, Kernel { name: "6.12", suite: "trixie" }, Kernel { name: "newest", suite: "trixie-backports" }];

/// A kernel's files.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// The folder of its modules, which is called as `uname -r` says.
    pub(crate) modules: PathBuf,
    /// What boots.
    pub(crate) image: PathBuf,
}

impl Kernel {
    /// The kernel's files, which are fetched once.
    pub(crate) fn fetch(&self, cache: &Path) -> Result<Unpacked> {
        let tree = cache.join(self.name).join("tree");
        if !tree.exists() {
            self.unpack(cache, &tree).with_context(|| format!("cannot fetch kernel {}", self.name))?;
        }
        let broken = || format!("{} is not a kernel as Debian packs it; remove it to fetch it again", tree.display());
        Unpacked::find(&tree).with_context(broken)
    }

    /// Fetches the packages, and puts their files into `tree`.
    fn unpack(&self, cache: &Path, tree: &Path) -> Result<()> {
        let apt = Apt::new(cache.join("apt").join(self.suite), self.suite)?;
        let packages = apt.packages()?;
        // What was begun and not finished is begun anew.
        let part = cache.join(self.name).join("part");
        remove(&part)?;
        let debs = part.join("debs");
        fs::create_dir_all(&debs)?;
        let mut download = apt.command("apt-get");
        download.current_dir(&debs).arg("download").args(&packages);
        step(&format!("apt-get download {}", packages.join(" ")), &apt.log("download"), &mut download)?;
        for deb in fs::read_dir(&debs)? {
            let mut unpack = clean("dpkg-deb");
            unpack.arg("--extract").arg(deb?.path()).arg(part.join("tree"));
            step("dpkg-deb --extract", &apt.log("extract"), &mut unpack)?;
        }
        let kernel = Unpacked::find(&part.join("tree"))?;
        let mut depmod = clean("depmod");
        depmod.arg("--basedir").arg(kernel.base()?).arg(kernel.release());
        step("depmod", &apt.log("depmod"), &mut depmod)?;
        fs::rename(part.join("tree"), tree)?;
        remove(&part)
    }
}

impl Unpacked {
    /// What `uname -r` says of it.
    pub(super) fn release(&self) -> &OsStr {
        self.modules.file_name().unwrap_or_default()
    }

    /// What its modules are in `lib/modules` of.
    pub(super) fn base(&self) -> Result<&Path> {
        self.modules.ancestors().nth(3).context("modules are in lib/modules")
    }

    /// The kernel in a tree of unpacked packages: of late all is below `/usr`, and the image is beside the modules.
    fn find(tree: &Path) -> Result<Self> {
        let folder =
            ["usr/lib/modules", "lib/modules"].map(|folder| tree.join(folder)).into_iter().find(|it| it.exists());
        let mut entries = fs::read_dir(folder.context("there are no modules")?)?;
        let modules = entries.next().context("there are no modules")??.path();
        let release = modules.file_name().unwrap_or_default().to_string_lossy();
        let images = [modules.join("vmlinuz"), tree.join(format!("boot/vmlinuz-{release}"))];
        let image = images.into_iter().find(|image| image.exists()).context("there is no image")?;
        Ok(Self { modules, image })
    }
}

/// Removes a folder, if it is there.
pub(super) fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => bail!("cannot remove {}: {error}", folder.display()),
        _ => Ok(()),
    }
}
