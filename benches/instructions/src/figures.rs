// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The figures that are kept: a line of text each, so that a change of one is one line of a diff.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

const MADE_WITH: &str = "made with ";

/// Instructions of one operation each, and what they were counted with.
///
/// ```
/// use instructions::figures::Figures;
///
/// let figures: Figures = "made with rustc 1.95, x86_64\nguard 50\n".parse()?;
/// assert_eq!(figures.counts["guard"], 50);
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    /// What decides over the counts beside the code: compiler, architecture, C library, valgrind.
    pub made_with: String,
    /// Instructions by the name of the operation.
    pub counts: BTreeMap<String, u64>,
}

impl FromStr for Figures {
    type Err = String;

    /// Reads what [`Display`](fmt::Display) writes; lines that begin with `#` say nothing.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut made_with = None;
        let mut counts = BTreeMap::new();
        for (line, number) in text.lines().zip(1..) {
            if line.starts_with('#') {
                continue;
            }
            if let Some(with) = line.strip_prefix(MADE_WITH) {
                made_with = Some(with.to_owned());
                continue;
            }
            let mut words = line.split_whitespace();
            let (Some(name), Some(count), None) = (words.next(), words.next(), words.next()) else {
                return Err(format!("line {number}: not a name and a count"));
            };
            let count = count
                .parse()
                .map_err(|error| format!("line {number}: {count:?}: {error}"))?;
            if counts.insert(name.to_owned(), count).is_some() {
                return Err(format!("line {number}: {name} once more"));
            }
        }
        let made_with = made_with.ok_or_else(|| format!("no line {MADE_WITH:?}"))?;
        Ok(Figures { made_with, counts })
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "# Instructions of one operation. Written by `ci/instructions --update`."
        )?;
        writeln!(f, "{MADE_WITH}{}", self.made_with)?;
        for (name, count) in &self.counts {
            writeln!(f, "{name:<27} {count:>8}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let long = "an_operation_with_a_name_longer_than_its_column";
        let figures = Figures {
            made_with: String::from("rustc 1.95, x86_64"),
            counts: [("guard", 50), (long, 123_456_789_012)]
                .map(|(name, count)| (name.to_owned(), count))
                .into(),
        };
        assert_eq!(figures.to_string().parse(), Ok(figures));
    }

    #[test]
    fn what_was_edited_wrongly_is_refused() {
        let head = "# about\nmade with a compiler\nguard 50\n";
        assert!(head.parse::<Figures>().is_ok());
        for bad in [
            "guard 51",
            "handle",
            "handle 5 6",
            "handle -5",
            "",
            "<<<<<<< a",
        ] {
            let error = format!("{head}{bad}\n").parse::<Figures>().expect_err(bad);
            assert!(error.starts_with("line 4: "), "{error}");
        }
        assert!("guard 50\n".parse::<Figures>().is_err());
    }
}
