// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Contiguity profiles: how the pages of context objects lie in guest memory.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::error::{Error, Result};
use crate::plan::RCS_COPIED_PAGES;

/// Largest profile taken in, in bytes. The bundled ones have 80 KB and less.
const MAX_PROFILE_BYTES: u64 = 8 << 20;
/// What an error shows at most of a field that is no number.
const SHOWN_CHARS: usize = 24;

/// For each of a list of context objects the lengths of its runs of exactly adjacent ascending
/// pages, 20 pages in all.
///
/// ```
/// use gvt_replay::Contiguity;
///
/// let profile = Contiguity::parse("mine", "20\n4,16\n")?;
/// assert_eq!(profile.runs(0), [20]);
/// assert_eq!(profile.runs(1), [4, 16]);
/// assert_eq!(profile.runs(2), [20], "the list begins again");
/// assert!(Contiguity::parse("mine", "19").is_err());
/// # Ok::<(), gvt_replay::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contiguity {
    name: String,
    objects: Vec<Vec<usize>>,
    descends: bool,
}

impl Contiguity {
    /// Names of the bundled profiles.
    pub const NAMES: [&'static str; 5] =
        ["consecutive", "fresh", "as-found", "churned", "recycled"];

    /// The bundled profile of that name, if there is one.
    pub fn bundled(name: &str) -> Option<Self> {
        let text = match name {
            "consecutive" => "20\n",
            "fresh" => include_str!("../data/fresh.csv"),
            "as-found" => include_str!("../data/as-found.csv"),
            "churned" => include_str!("../data/churned.csv"),
            "recycled" => include_str!("../data/recycled.csv"),
            _ => return None,
        };
        // The bundled files are parsed by a unit test.
        Self::parse(name, text).ok()
    }

    /// The bundled profile of that name, or else what the file of that name holds.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownProfile`] if there is neither, [`Error::File`] if the file cannot be read,
    /// and what [`parse`](Self::parse) finds in it.
    pub fn named(name: &Path) -> Result<Self> {
        if let Some(bundled) = name.to_str().and_then(Self::bundled) {
            return Ok(bundled);
        }
        let mut text = String::new();
        File::open(name)
            .and_then(|file| file.take(MAX_PROFILE_BYTES + 1).read_to_string(&mut text))
            .and_then(|len| match len as u64 > MAX_PROFILE_BYTES {
                true => Err(io::ErrorKind::FileTooLarge.into()),
                false => Ok(()),
            })
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => Error::UnknownProfile {
                    profile: name.to_owned(),
                },
                _ => Error::File {
                    path: name.to_owned(),
                    source,
                },
            })?;
        Self::parse(&name.display().to_string(), &text)
    }

    /// Parses comma-separated run lengths, one object a line. Blank lines are skipped.
    ///
    /// # Errors
    ///
    /// [`Error::Profile`] for a line that is not numbers of at least 1 with the sum 20, and if
    /// there is no line.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let bad = |line, (column, reason)| Error::Profile {
            profile: name.to_owned(),
            line,
            column,
            reason,
        };
        let objects = (1..)
            .zip(text.lines())
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(number, line)| parse_line(line).map_err(|error| bad(number, error)))
            .collect::<Result<Vec<_>>>()?;
        if objects.is_empty() {
            return Err(bad(1, (1, "the profile has no run lengths".into())));
        }
        Ok(Contiguity {
            name: name.to_owned(),
            objects,
            descends: false,
        })
    }

    /// The same runs with each page below the one before it: what an allocator gives out that takes
    /// pages back in the order in which they came. Nobody has measured such a guest.
    pub fn descending(mut self) -> Self {
        self.name.push_str(", descending");
        self.descends = true;
        self
    }

    /// Whether the pages of a run descend.
    pub fn descends(&self) -> bool {
        self.descends
    }

    /// The name of the profile, or its file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Run lengths of the context object that is the `index`th to be submitted. The list begins
    /// again when there are more objects than lines.
    pub fn runs(&self, index: usize) -> &[usize] {
        // There is at least one object.
        &self.objects[index % self.objects.len()]
    }

    /// Mean pages of a run, over all objects of the list.
    pub fn mean_run(&self) -> f64 {
        let runs: usize = self.objects.iter().map(Vec::len).sum();
        (self.objects.len() * RCS_COPIED_PAGES) as f64 / runs as f64
    }
}

/// The run lengths of a line, or the column and what is wrong there.
fn parse_line(line: &str) -> std::result::Result<Vec<usize>, (usize, String)> {
    let mut runs = Vec::new();
    let mut sum = 0;
    let mut column = 1;
    for field in line.split(',') {
        let run = match field.trim().parse() {
            Ok(run) if (1..=RCS_COPIED_PAGES).contains(&run) => run,
            _ => {
                let shown: String = field.trim().chars().take(SHOWN_CHARS).collect();
                let reason = format!("{shown:?} is not a run length of 1 to {RCS_COPIED_PAGES}");
                return Err((column, reason));
            }
        };
        sum += run;
        if sum > RCS_COPIED_PAGES {
            let reason = format!("the run lengths add up to more than {RCS_COPIED_PAGES}");
            return Err((column, reason));
        }
        runs.push(run);
        column += field.chars().count() + 1;
    }
    if sum < RCS_COPIED_PAGES {
        let reason = format!("the line ends at a sum of {sum}, not {RCS_COPIED_PAGES}");
        return Err((column - 1, reason));
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundled_profiles_parse_and_have_the_measured_means() {
        for (name, expected) in [
            ("consecutive", 20.0),
            ("fresh", 18.32),
            ("as-found", 4.60),
            ("churned", 1.33),
            ("recycled", 1.15),
        ] {
            assert!(Contiguity::NAMES.contains(&name));
            let mean = Contiguity::bundled(name).unwrap().mean_run();
            assert!((mean - expected).abs() < 0.006, "{name}: {mean}");
        }
        assert_eq!(Contiguity::bundled("nothing"), None);
    }

    #[test]
    fn blank_lines_are_skipped() {
        let profile = Contiguity::parse("mine", "\n20\r\n \n\n4, 16").unwrap();
        assert_eq!(
            (profile.runs(0), profile.runs(1)),
            (&[20][..], &[4, 16][..])
        );
        assert_eq!(profile.runs(2), [20]);
    }

    #[test]
    fn a_bad_line_is_named_with_the_column() {
        for (text, line, column) in [
            ("", 1, 1),
            (" \n\n", 1, 1),
            ("20\n\n10,9\n", 3, 5),
            ("20\n20,0\n", 2, 4),
            ("20\n10,10\nx\n", 3, 1),
            ("10,,10", 1, 4),
            ("10,5,9", 1, 6),
            ("18446744073709551615,21\n", 1, 1),
            ("-1,21", 1, 1),
        ] {
            match Contiguity::parse("bad", text) {
                Err(Error::Profile {
                    line: l, column: c, ..
                }) => assert_eq!((l, c), (line, column), "{text:?}"),
                other => panic!("{text:?}: {other:?}"),
            }
        }
        let long = Contiguity::parse("bad", &"x".repeat(1 << 20)).unwrap_err();
        assert!(long.to_string().len() < 120, "{long}");
    }

    #[test]
    fn a_name_that_is_neither_bundled_nor_a_file_lists_the_bundled_ones() {
        for name in ["", "freshh", "/nonexistent/profile.csv"] {
            let error = Contiguity::named(Path::new(name)).unwrap_err();
            let message = format!(
                "there is no profile {name:?}: give one of consecutive, fresh, as-found, churned, \
                 recycled, or a file"
            );
            assert_eq!(error.to_string(), message);
        }
    }
}
