//! Mistakes and warnings, each at its place in the file.

use std::{fmt, path::Path};

/// How many remarks are told; a person who has mended that many runs the check again.
const TOLD: usize = 20;

/// Remarks of one kind about one file.
#[derive(Debug, Default)]
pub(super) struct Remarks {
    told: Vec<(Position, String)>,
    more: usize,
}

/// Line and column, from 1; columns count characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) line: u64,
    pub(super) column: u64,
}

/// A value's place: where it stands, and the fields that lead to it, spelled out only where there is something to say.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) at: Position,
    pub(super) path: fmt::Arguments<'a>,
}

impl Remarks {
    pub(super) fn one(at: Position, text: String) -> Self {
        Self { told: vec![(at, text)], more: 0 }
    }

    /// Adds a remark; what was said already, of another port or family, is not said again.
    pub(super) fn add(&mut self, Place { at, path }: Place<'_>, remark: impl fmt::Display) {
        let remark = (at, format!("{path}: {remark}"));
        if self.told.contains(&remark) {
            return;
        }
        if self.told.len() < TOLD {
            self.told.push(remark);
        } else {
            self.more += 1;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    /// One line for each, in the order of the file.
    pub(super) fn lines(mut self, name: &Path) -> Vec<String> {
        let name = name.display();
        self.told.sort_by_key(|(at, _)| *at);
        let told = self.told.iter().map(|(at, text)| format!("{name}:{at}: {text}"));
        told.chain((self.more > 0).then(|| format!("{name}: and {} more", self.more))).collect()
    }
}

impl Position {
    pub(super) const START: Self = Self { line: 1, column: 1 };
}

impl From<serde_saphyr::Location> for Position {
    fn from(location: serde_saphyr::Location) -> Self {
        Self { line: location.line(), column: location.column() }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}
