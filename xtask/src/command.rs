//! Running other programs.

use std::{
    env,
    fs::{self, File},
    io::{IsTerminal as _, Write as _, stderr},
    iter,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// The variables with which cargo and rustup describe a build to its parts, by how their names begin. Another build, with another
/// compiler, must not see them. What a user configures (`CARGO_HOME`, `CARGO_NET_…`) and the job server stay.
const OF_THE_OUTER_BUILD: [&str; 12] = [
    "CARGO_BUILD_",
    "CARGO_CFG_",
    "CARGO_ENCODED_",
    "CARGO_FEATURE_",
    "CARGO_MANIFEST_",
    "CARGO_PKG_",
    "CARGO_PROFILE_",
    "CARGO_TARGET_",
    "RUSTC",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// How many lines of a log are shown when its step fails.
const TAIL: usize = 30;

/// A command that does not notice that a cargo is its parent.
pub fn clean(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    command.env_remove("CARGO");
    for (name, _) in env::vars_os() {
        if OF_THE_OUTER_BUILD.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            command.env_remove(name);
        }
    }
    command
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The first file of this name in cargo's directory or on the path that `accept` takes.
pub fn find(name: &str, accept: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let home = env::var_os("HOME").map(|home| Path::new(&home).join(".cargo"));
    let cargo = env::var_os("CARGO_HOME").map(PathBuf::from).or(home).map(|cargo| cargo.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    // An ordinary user's path has no `sbin`, but may use what is in there.
    let directories = cargo.into_iter().chain(env::split_paths(&path)).chain(["/usr/sbin".into(), "/sbin".into()]);
    directories.map(|directory| directory.join(name)).find(|file| file.is_file() && accept(file))
}

/// What a command prints; `None` if it fails, or is not there.
pub fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command whose own output is the progress.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run `{}`", line(command)))?;
    if status.success() { Ok(()) } else { bail!("`{}` failed: {status}", line(command)) }
}

/// Runs a long command behind one line that counts the seconds. All of its output goes to `log`, and the end of that is shown if it fails.
pub fn step(what: &str, log: &Path, command: &mut Command) -> Result<()> {
    if let Some(directory) = log.parent() {
        fs::create_dir_all(directory)?;
    }
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot run `{}`", line(command)))?;
    let is_terminal = stderr().is_terminal();
    if !is_terminal {
        eprintln!("{what} …");
    }
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if is_terminal {
            eprint!("\r{what} … {} s", start.elapsed().as_secs());
            stderr().flush()?;
        }
        thread::sleep(Duration::from_millis(100));
    };
    let before = if is_terminal { "\r" } else { "" };
    if status.success() {
        eprintln!("{before}{what}: done in {} s", start.elapsed().as_secs());
        return Ok(());
    }
    eprintln!("{before}{what}: failed; the end of {}:\n{}", log.display(), tail(&fs::read_to_string(log)?));
    bail!("`{}` failed: {status}", line(command))
}

/// The last lines of a text.
pub fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines.get(lines.len().saturating_sub(TAIL)..).unwrap_or_default().join("\n")
}

/// A command as one would type it.
fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let words = iter::once(program.file_name().unwrap_or_default()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_end_of_the_text() {
        assert_eq!(tail("one\ntwo"), "one\ntwo");
        let text: Vec<_> = (0..100).map(|number| number.to_string()).collect();
        assert!(tail(&text.join("\n")).starts_with("70\n71"));
    }

    #[test]
    fn a_failed_command_is_named() {
        assert_eq!(run(&mut Command::new("false")).unwrap_err().to_string(), "`false` failed: exit status: 1");
        assert!(output(&mut Command::new("false")).is_none());
    }
}
