//! `cargo xtask lint`: format, clippy for both worlds, and what the source must not say.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use xtask::{
    build_ebpf,
    command::{cargo, run},
};

use crate::{place::workspace, setup::setup};

/// An invariant of absence: what is said in one place and nowhere else.
struct Rule {
    says: &'static str,
    /// The folder, or path that begins so, under which it holds.
    under: &'static str,
    /// What no line of code there may contain; where it begins with a letter it is the beginning of a word.
    forbids: &'static [&'static str],
    /// Where it may all the same; a path that begins so.
    except: &'static [&'static str],
}

/// A program of the benchmark's, which makes packets: it is no part of the datapath.
const GENERATOR: &str = "lb-ebpf/src/bin/generator.rs";

const RULES: [Rule; 6] = [
    Rule {
        says: "only dataplane names aya",
        under: "lb-userspace/src/",
        forbids: &["aya::", "use aya"],
        except: &["lb-userspace/src/dataplane"],
    },
    Rule {
        says: "only layout.rs promises that a struct's bytes are a value",
        under: "",
        forbids: &["unsafe impl aya::Pod", "unsafe impl Pod"],
        except: &["lb-common/src/layout.rs"],
    },
    Rule {
        says: "lb-common does no I/O and knows no map",
        under: "lb-common/src/",
        forbids: &["std::fs", "std::io", "std::net::Tcp", "std::net::Udp", "aya_ebpf"],
        except: &[],
    },
    Rule {
        says: "only rewrite.rs writes packet bytes",
        under: "lb-ebpf/src/",
        forbids: &[
            ".header::",
            ".header(",
            ".copy_in(",
            ".resize(",
            ".change_checksum(",
            "bpf_xdp_store_bytes",
            "bpf_skb_store_bytes",
        ],
        // `packet/` is what it writes by.
        except: &["lb-ebpf/src/rewrite.rs", "lb-ebpf/src/packet", GENERATOR],
    },
    Rule {
        says: "only count.rs turns a verdict into an action",
        under: "lb-ebpf/src/",
        forbids: &["xdp_action", "XDP_PASS", "XDP_DROP", "XDP_TX", "TC_ACT_"],
        except: &["lb-ebpf/src/count.rs", GENERATOR],
    },
    Rule {
        says: "nothing is left undone, and a lint is disabled by #[expect] with its reason",
        under: "",
        forbids: &["todo!(", "unimplemented!(", "#[allow(", "#![allow("],
        except: &[],
    },
];

pub(crate) fn verb() -> Result<()> {
    setup()?;
    let workspace = workspace();
    let wrong = broken_invariants(&workspace)?;
    ensure!(wrong.is_empty(), "invariants are broken:\n{}", wrong.join("\n"));
    run(cargo().current_dir(&workspace).args(["fmt", "--all", "--check"]))?;
    build_ebpf::clippy(&workspace)?;
    build_ebpf::build(&workspace)?;
    let mut clippy = cargo();
    clippy.current_dir(&workspace).args(["clippy", "--locked", "--workspace", "--exclude", "lb-ebpf", "--all-targets"]);
    run(clippy.args(["--", "-D", "warnings"]))
}

/// Where the source breaks a rule, or a member does not take the workspace's lints.
fn broken_invariants(workspace: &Path) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for entry in fs::read_dir(workspace)? {
        let member = entry?.path();
        let Ok(manifest) = fs::read_to_string(member.join("Cargo.toml")) else { continue };
        if !manifest.contains("[lints]\nworkspace = true") {
            wrong.push(format!("{}: does not take the workspace's lints", member.display()));
        }
        for file in sources(&member)? {
            let name = file.strip_prefix(workspace)?.to_string_lossy().into_owned();
            let text = fs::read_to_string(&file)?;
            wrong.extend(RULES.iter().flat_map(|rule| rule.broken_by(&name, &text)));
        }
    }
    Ok(wrong)
}

/// The Rust files of a folder and those in it.
fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(sources(&path)?);
        } else if path.extension() == Some(OsStr::new("rs")) {
            files.push(path);
        }
    }
    Ok(files)
}

impl Rule {
    /// The lines of a file that break the rule. Comments may speak of anything, and this file has to name it.
    fn broken_by<'a>(&'a self, file: &'a str, text: &'a str) -> impl Iterator<Item = String> + 'a {
        let holds = file.starts_with(self.under)
            && file != "xtask/src/lint.rs"
            && !self.except.iter().any(|except| file.starts_with(except));
        let code = text.lines().enumerate().filter(move |(_, line)| holds && !line.trim_start().starts_with("//"));
        let broken = code.filter(|(_, line)| self.forbids.iter().any(|words| contains(line, words)));
        broken.map(move |(number, line)| format!("{file}:{}: {}: {}", number + 1, self.says, line.trim()))
    }
}

/// Whether a line contains these words, and not only as the end of a longer one.
fn contains(line: &str, words: &str) -> bool {
    let is_part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    let starts_word = words.starts_with(is_part_of_word);
    line.match_indices(words)
        .any(|(at, _)| !(starts_word && line.get(..at).is_some_and(|before| before.ends_with(is_part_of_word))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_sees_code_where_it_holds_and_nothing_else() {
        let broken = |file: &str, text: &str| RULES[0].broken_by(file, text).count();
        assert_eq!(broken("lb-userspace/src/plan.rs", "fn f() {}\nlet map: aya::maps::Array;\nuse aya;"), 2);
        assert_eq!(broken("lb-userspace/src/plan.rs", "// aya::maps\nlet x = papaya::y();"), 0);
        assert_eq!(broken("lb-userspace/src/dataplane/kernel.rs", "use aya;"), 0);
    }
}
