//! Debian's package tools, for packages of any of its suites.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use xtask::command::{clean, output, step};

/// The package that depends on the newest kernel of its suite, in the flavour that has drivers for virtual machines alone.
const META: &str = "linux-image-cloud-amd64";

/// How the names of the packages begin that a kernel's files are in. Then comes its version.
const PARTS: [&str; 4] = ["linux-image-", "linux-binary-", "linux-modules-", "linux-base-"];

/// What Debian's archives are signed with.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Debian's package tools with lists of their own, of one suite: the machine's are left alone.
pub(super) struct Apt {
    folder: PathBuf,
    suite: &'static str,
}

impl Apt {
    /// Of a suite, with lists as they are now.
    pub(super) fn new(folder: PathBuf, suite: &'static str) -> Result<Self> {
        fs::create_dir_all(folder.join("lists/partial"))?;
        fs::create_dir_all(folder.join("cache/archives/partial"))?;
        if site("Debian").is_none() {
            // What an archive calls itself is only known once its lists are there. Other archives may be out of order.
            let _ = step("apt-get update", &folder.join("update.log"), clean("apt-get").arg("update"));
        }
        let mirror =
            site("Debian").context("apt knows no mirror of Debian's: please look at /etc/apt/sources.list.d")?;
        let mut sources = format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        // Those who have no mirror of the security updates do without them here as well.
        if let Some(security) = site("Debian-Security").filter(|_| !suite.ends_with("-backports")) {
            let _ = writeln!(sources, "deb [signed-by={KEYRING}] {security} {suite}-security main");
        }
        fs::write(folder.join("sources.list"), sources)?;
        fs::write(folder.join("apt.conf"), Self::settings(&folder))?;
        let apt = Self { folder, suite };
        step(&format!("apt-get update, for {suite}"), &apt.log("update"), apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    /// The packages of the suite's newest kernel.
    pub(super) fn packages(&self) -> Result<Vec<String>> {
        let mut depends = self.command("apt-cache");
        depends.args(["depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"]);
        depends.args(["--no-replaces", "--no-enhances", META]);
        let text = output(&mut depends).with_context(|| format!("{} has no package {META}", self.suite))?;
        let packages: Vec<_> = text.lines().filter(|line| is_part(line)).map(str::to_owned).collect();
        ensure!(!packages.is_empty(), "{META} of {} depends on no kernel", self.suite);
        Ok(packages)
    }

    /// One of the tools.
    pub(super) fn command(&self, tool: &str) -> Command {
        let mut command = clean(tool);
        command.env("APT_CONFIG", self.folder.join("apt.conf"));
        command
    }

    /// What the tools are told instead of what the machine's settings say.
    fn settings(folder: &Path) -> String {
        let folder = folder.display();
        // What can't be fetched would else be a warning only; and apt's user for downloads may not be allowed into our folder.
        format!(
            "Dir::State::Lists \"{folder}/lists\";\n\
             Dir::State::Status \"/dev/null\";\n\
             Dir::Cache \"{folder}/cache\";\n\
             Dir::Etc::SourceList \"{folder}/sources.list\";\n\
             Dir::Etc::SourceParts \"-\";\n\
             Acquire::Languages \"none\";\n\
             APT::Update::Error-Mode \"any\";\n\
             APT::Sandbox::User \"root\";\n"
        )
    }

    /// Where the output of a step is kept.
    pub(super) fn log(&self, step: &str) -> PathBuf {
        self.folder.join(step).with_extension("log")
    }
}

/// Whether a line of what a package depends on is one of a kernel's parts.
fn is_part(line: &str) -> bool {
    let version = PARTS.iter().find_map(|part| line.strip_prefix(part));
    version.is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit()) && !version.contains("unsigned"))
}

/// Where the machine's apt gets what has this label, as the archive calls itself.
fn site(label: &str) -> Option<String> {
    let filter = format!("Label: {label}");
    let sites =
        output(clean("apt-get").args(["indextargets", "--format", "$(SITE)", "Created-By: Packages", &filter]))?;
    sites.lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernels_parts_are_told_from_what_else_it_needs() {
        assert!(is_part("linux-image-6.1.0-56-cloud-amd64"));
        assert!(is_part("linux-modules-7.3.4+deb13-cloud-amd64"));
        assert!(!is_part("linux-image-6.1.0-56-cloud-amd64-unsigned"));
        assert!(!is_part("linux-image-cloud-amd64"));
        assert!(!is_part("linux-base"));
        assert!(!is_part("  Depends: linux-image-6.1.0-56-cloud-amd64"));
    }
}
