//! What a guest has to do, and how that went.

use std::{fmt::Write as _, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};

/// The part of the script that is always the same.
const SCRIPT: &str = include_str!("job");

/// The first process is who does the job.
const AS_FIRST: &str = ". /out/links\n. /out/job\n";

/// The first process becomes systemd, which has the job done.
const BY_SYSTEMD: &str = include_str!("systemd");

/// What the guest's kernel logs begins so, or contains this, if something is wrong with it.
const COMPLAINTS: [&str; 5] = ["WARNING:", "BUG:", "Oops", "KASAN", "general protection fault"];

/// Commands for a guest.
#[derive(Debug)]
pub(super) struct Job {
    is_by_systemd: bool,
    links: String,
    parts: String,
}

/// How one part ended.
#[derive(Debug)]
pub(super) struct Part {
    /// What it is called.
    pub(super) name: String,
    /// Whether its exit status is that of success.
    pub(super) is_good: bool,
    /// How long it took.
    pub(super) seconds: u32,
}

/// What became of a job.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The parts that ended, in their order.
    pub(super) parts: Vec<Part>,
    /// What the guest's kernel says is wrong with it, and what we do.
    pub(super) complaints: Vec<String>,
    /// Whether the guest has come to the end of the job.
    pub(super) is_whole: bool,
}

impl Job {
    /// For the first process.
    pub(super) const fn as_first() -> Self {
        Self { is_by_systemd: false, links: String::new(), parts: String::new() }
    }

    /// For a service of systemd, which is the first process.
    pub(super) const fn by_systemd() -> Self {
        Self { is_by_systemd: true, links: String::new(), parts: String::new() }
    }

    /// What the folder is called of a guest that does it.
    pub(super) const fn folder(&self) -> &'static str {
        if self.is_by_systemd { "guest-systemd" } else { "guest" }
    }

    /// Makes a file or folder be found in another place, too.
    pub(super) fn link(&mut self, place: &str, to: &Path) {
        let to = quoted(&to.to_string_lossy());
        let _ = writeln!(self.links, "mkdir -p $(dirname {place}) && ln -sfn {to} {place}");
    }

    /// Sets a variable for the parts that follow.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        let _ = writeln!(self.parts, "export {name}={}", quoted(value));
    }

    /// Has the parts that follow run in this folder.
    pub(super) fn enter(&mut self, folder: &Path) {
        let _ = writeln!(self.parts, "cd {}", quoted(&folder.to_string_lossy()));
    }

    /// Runs a command, for so long at most.
    pub(super) fn part(&mut self, name: &str, limit: Duration, command: &[&str]) {
        let words: Vec<_> = command.iter().map(|word| quoted(word)).collect();
        let _ = writeln!(
            self.parts,
            "part {} timeout --kill-after=5 {} {}",
            quoted(name),
            limit.as_secs(),
            words.join(" ")
        );
    }

    /// What of it is left when these parts have ended.
    pub(super) fn rest(&self, done: &[Part]) -> Self {
        let is_done = |line: &str| done.iter().any(|part| line.starts_with(&format!("part {} ", quoted(&part.name))));
        let parts =
            self.parts.lines().filter(|line| !is_done(line)).fold(String::new(), |parts, line| parts + line + "\n");
        Self { is_by_systemd: self.is_by_systemd, links: self.links.clone(), parts }
    }

    /// Lays it into the folder that the guest shares with the host.
    pub(super) fn write(&self, shared: &Path) -> Result<()> {
        fs::write(shared.join("first"), if self.is_by_systemd { BY_SYSTEMD } else { AS_FIRST })?;
        fs::write(shared.join("job"), SCRIPT)?;
        fs::write(shared.join("links"), &self.links)?;
        fs::write(shared.join("parts"), &self.parts)?;
        Ok(())
    }
}

impl Outcome {
    /// What the guest has left in the folder.
    pub(super) fn read(shared: &Path) -> Result<Self> {
        // What is not there was never begun.
        let text = |name| {
            fs::read(shared.join(name)).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
        };
        let parts = text("results").lines().map(part).collect::<Option<_>>().context("the results are mutilated")?;
        let log = text("dmesg");
        let complaints = log.lines().filter(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)));
        Ok(Self { parts, complaints: complaints.map(str::to_owned).collect(), is_whole: shared.join("end").exists() })
    }
}

/// A line of the results.
fn part(line: &str) -> Option<Part> {
    let mut words = line.rsplitn(3, ' ');
    let (seconds, status, name) = (words.next()?, words.next()?, words.next()?);
    Some(Part { name: name.to_owned(), is_good: status == "0", seconds: seconds.parse().ok()? })
}

/// A word as a shell takes it for one.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_shell_takes_quoted_words_for_what_they_were() {
        for word in ["", "it's", "$HOME `id` \"\\\n", "''"] {
            let said = Command::new("sh").args(["-c", &format!("printf %s {}", quoted(word))]).output().unwrap().stdout;
            assert_eq!(String::from_utf8(said).unwrap(), word);
        }
    }

    #[test]
    fn the_rest_of_a_job_is_what_has_not_ended_in_the_same_place() {
        let mut job = Job::as_first();
        job.set("A", "1");
        for name in ["one", "two"] {
            job.part(name, Duration::from_secs(9), &["true"]);
        }
        let ended = |name: &str| Part { name: name.to_owned(), is_good: false, seconds: 1 };
        assert_eq!(job.rest(&[]).parts, job.parts);
        assert_eq!(job.rest(&[ended("one")]).parts, "export A='1'\npart 'two' timeout --kill-after=5 9 'true'\n");
        assert_eq!(job.rest(&["one", "two"].map(ended)).parts, "export A='1'\n");
    }

    #[test]
    fn a_line_of_results_has_a_name_a_status_and_seconds() {
        let Part { name, is_good, seconds } = part("packets 0 17").unwrap();
        assert_eq!((name.as_str(), is_good, seconds), ("packets", true, 17));
        assert!(!part("two words 101 1").unwrap().is_good);
        assert!(part("packets").is_none());
    }
}
