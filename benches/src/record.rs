// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What was measured, kept as JSON lines in the target folder until it is made into a report.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::compare::NOISY;
use crate::stats::Measure;

/// One figure of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Heading of the table it stands in.
    pub section: String,
    /// Its line.
    pub case: String,
    /// Its column.
    pub candidate: String,
    /// The median.
    pub value: f64,
    /// Around it.
    pub spread: f64,
    /// What the value counts.
    pub unit: String,
    /// What the first candidate of the case takes as a part of this one, and the spread.
    pub ratio: Option<(f64, f64)>,
}

impl Row {
    /// A figure that is not compared.
    pub fn new(
        section: &str,
        case: &str,
        candidate: &str,
        measure: impl Into<Measure>,
        unit: &str,
    ) -> Self {
        let Measure { value, spread } = measure.into();
        Row {
            section: section.to_owned(),
            case: case.to_owned(),
            candidate: candidate.to_owned(),
            value,
            spread,
            unit: unit.to_owned(),
            ratio: None,
        }
    }

    /// How it compares; `None` where nothing can be concluded from it.
    pub fn verdict(&self) -> Option<String> {
        match self.ratio {
            Some((_, spread)) if spread > NOISY => None,
            None if self.spread > NOISY => None,
            Some((ratio, _)) => Some(format!(" ({ratio:.2}x)")),
            None => Some(String::new()),
        }
    }

    /// The same, compared.
    pub fn with_ratio(mut self, ratio: Measure) -> Self {
        self.ratio = Some((ratio.value, ratio.spread));
        self
    }
}

/// Keeps what a run of `name` measured, in place of its last run.
///
/// # Errors
///
/// What the file system says.
pub fn save<T: Serialize>(name: &str, rows: &[T]) -> io::Result<()> {
    let mut lines = String::new();
    for row in rows {
        lines.push_str(&serde_json::to_string(row)?);
        lines.push('\n');
    }
    let path = path(name);
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::write(path, lines)
}

/// What the last run of `name` measured; nothing where there was none.
///
/// # Errors
///
/// What the file system says, or that the file is of another version of this package.
pub fn load<T: DeserializeOwned>(name: &str) -> io::Result<Vec<T>> {
    let lines = match fs::read_to_string(path(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read?,
    };
    let rows = lines.lines().map(serde_json::from_str);
    Ok(rows.collect::<Result<_, _>>()?)
}

fn path(name: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR");
    workspace()
        .join(target.map_or_else(|| PathBuf::from("target"), PathBuf::from))
        .join("benchmarks")
        .join(name)
        .with_extension("jsonl")
}

/// The workspace's folder.
pub fn workspace() -> PathBuf {
    let package = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    package.parent().map_or(package.clone(), PathBuf::from)
}
