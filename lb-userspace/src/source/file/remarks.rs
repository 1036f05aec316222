//! Mistakes and warnings, each at its place in the file.

use std::{fmt, path::Path};

use serde_saphyr::Location;

/// How many remarks are told; a person who has mended that many runs the check again.
const TOLD: usize = 20;

/// Remarks of one kind about one file.
#[derive(Debug, Default)]
pub(super) struct Remarks {
    told: Vec<Remark>,
    more: usize,
}

#[derive(Debug)]
struct Remark {
    line: u64,
    column: u64,
    text: String,
}

/// A value's place: where it stands, and the fields that lead to it, spelled out only where there is something to say.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) at: Location,
    pub(super) path: fmt::Arguments<'a>,
}

impl Remarks {
    /// A single remark. Lines and columns count from 1.
    pub(super) fn one((line, column): (u64, u64), text: String) -> Self {
        Self { told: vec![Remark { line, column, text }], more: 0 }
    }

    pub(super) fn add(&mut self, place: Place<'_>, remark: impl fmt::Display) {
        if self.told.len() < TOLD {
            let (line, column) = (place.at.line(), place.at.column());
            self.told.push(Remark { line, column, text: format!("{}: {remark}", place.path) });
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
        self.told.sort_by_key(|remark| (remark.line, remark.column));
        let told = self.told.iter().map(|Remark { line, column, text }| format!("{name}:{line}:{column}: {text}"));
        told.chain((self.more > 0).then(|| format!("{name}: and {} more", self.more))).collect()
    }
}
