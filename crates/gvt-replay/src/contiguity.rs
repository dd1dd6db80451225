// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Contiguity profiles: how the pages of context objects lie in guest memory.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::plan::RCS_COPIED_PAGES;

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

    /// Reads a profile from a file of comma-separated run lengths, one object a line.
    pub fn open(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|source| Error::File {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&path.display().to_string(), &text)
    }

    /// Parses comma-separated run lengths, one object a line.
    ///
    /// # Errors
    ///
    /// [`Error::Profile`] for a line that is not numbers of at least 1 with the sum 20, and if
    /// there is no line.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let mut objects = Vec::new();
        let mut offset = 0;
        for (index, line) in text.split_inclusive('\n').enumerate() {
            let runs = parse_line(line.trim_end()).map_err(|reason| Error::Profile {
                offset,
                line: index + 1,
                reason,
            })?;
            objects.push(runs);
            offset += line.len();
        }
        if objects.is_empty() {
            return Err(Error::Profile {
                offset: 0,
                line: 1,
                reason: "the profile is empty".into(),
            });
        }
        Ok(Contiguity {
            name: name.to_owned(),
            objects,
        })
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

fn parse_line(line: &str) -> std::result::Result<Vec<usize>, String> {
    let mut runs = Vec::new();
    let mut sum = 0;
    for field in line.split(',') {
        let run = match field.trim().parse::<usize>() {
            Ok(run) if (1..=RCS_COPIED_PAGES).contains(&run) => run,
            _ => {
                return Err(format!(
                    "{field:?} is not a run length of 1 to {RCS_COPIED_PAGES}"
                ))
            }
        };
        // A sum of one line's fields: at most 20 each, no line is that long.
        sum += run;
        runs.push(run);
    }
    if sum == RCS_COPIED_PAGES {
        Ok(runs)
    } else {
        Err(format!(
            "the run lengths add up to {sum}, not {RCS_COPIED_PAGES}"
        ))
    }
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
    fn a_bad_line_is_named() {
        for (text, line, offset) in [
            ("", 1, 0),
            ("20\n\n", 2, 3),
            ("20\n10,9\n", 2, 3),
            ("20\n20,0\n", 2, 3),
            ("20\n10,10\nx\n", 3, 9),
            ("18446744073709551615,21\n", 1, 0),
            ("-1,21", 1, 0),
        ] {
            match Contiguity::parse("bad", text) {
                Err(Error::Profile {
                    line: l, offset: o, ..
                }) => assert_eq!((l, o), (line, offset), "{text:?}"),
                other => panic!("{text:?}: {other:?}"),
            }
        }
    }
}
