//! The programs that a guest runs: cargo builds them on the host.

use std::{collections::BTreeMap, ffi::OsStr, io::BufReader, path::PathBuf, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use cargo_metadata::Message;
use xtask::command::output;

use crate::test::tests;

/// The programs of tests, by name, and the agent.
#[derive(Debug)]
pub(super) struct Binaries {
    tests: BTreeMap<String, PathBuf>,
    /// The agent.
    pub(super) wharf: PathBuf,
}

impl Binaries {
    /// Builds all of them.
    pub(super) fn build() -> Result<Self> {
        let mut command = tests();
        command.args(["--no-run", "--message-format", "json-render-diagnostics"]);
        let mut cargo = command.stdout(Stdio::piped()).spawn().context("cannot run cargo")?;
        let (mut wharf, mut tests) = (None, BTreeMap::new());
        for message in Message::parse_stream(BufReader::new(cargo.stdout.take().context("it is piped")?)) {
            if let Message::CompilerArtifact(artifact) = message?
                && let Some(executable) = artifact.executable
            {
                if artifact.profile.test {
                    tests.insert(artifact.target.name, executable.into());
                } else if artifact.target.name == "wharf" {
                    wharf = Some(executable.into());
                }
            }
        }
        ensure!(cargo.wait()?.success(), "cargo cannot build the tests");
        Ok(Self { tests, wharf: wharf.context("cargo has built no wharf")? })
    }

    /// The program of tests that is called so.
    pub(super) fn test(&self, name: &OsStr) -> Result<&PathBuf> {
        let names = || self.tests.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let test = name.to_str().and_then(|name| self.tests.get(name));
        test.with_context(|| format!("no tests are called {}; there are {}", name.display(), names()))
    }

    /// Makes sure that a program has all of these tests.
    pub(super) fn expect(&self, name: &str, tests: &[&str]) -> Result<()> {
        let test = self.test(OsStr::new(name))?;
        let list = output(std::process::Command::new(test).args(["--list", "--format", "terse"]));
        let list = list.with_context(|| format!("{} does not list its tests", test.display()))?;
        for test in tests {
            ensure!(list.lines().any(|line| line.strip_suffix(": test") == Some(test)), "{name} has no test {test}");
        }
        Ok(())
    }
}
