// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What gungraun says about its runs: a JSON object a line, version 6 of its schema.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::OPERATIONS;

#[derive(Deserialize)]
struct Summary {
    id: String,
    profiles: Vec<Profile>,
}

#[derive(Deserialize)]
struct Profile {
    summaries: Summaries,
}

#[derive(Deserialize)]
struct Summaries {
    total: Total,
}

#[derive(Deserialize)]
struct Total {
    summary: Tool,
}

#[derive(Deserialize)]
struct Tool {
    #[serde(rename = "Callgrind")]
    callgrind: Callgrind,
}

#[derive(Deserialize)]
struct Callgrind {
    #[serde(rename = "Ir")]
    instructions: Instructions,
}

#[derive(Deserialize)]
struct Instructions {
    metrics: Runs,
}

/// gungraun itself compares with the run before, where there is one.
#[derive(Deserialize)]
enum Runs {
    Left(Metric),
    /// This one and the one before.
    Both([Metric; 2]),
}

#[derive(Deserialize)]
enum Metric {
    Int(u64),
}

/// Instructions of one operation, by name, from what gungraun says.
///
/// # Errors
///
/// What is wrong in which line.
///
/// ```
/// let line = r#"{"id": "guard", "profiles": [{"summaries": {"total": {"summary":
///     {"Callgrind": {"Ir": {"metrics": {"Left": {"Int": 50035}}}}}}}}]}"#.replace('\n', "");
/// assert_eq!(instructions::summary::counts(&line)?["guard"], 50);
/// # Ok::<(), String>(())
/// ```
pub fn counts(lines: &str) -> Result<BTreeMap<String, u64>, String> {
    let mut counts = BTreeMap::new();
    for (line, number) in lines.lines().zip(1..) {
        let summary: Summary =
            serde_json::from_str(line).map_err(|error| format!("line {number}: {error}"))?;
        let [profile] = summary.profiles.as_slice() else {
            return Err(format!("line {number}: not one profile"));
        };
        let (Runs::Left(Metric::Int(total)) | Runs::Both([Metric::Int(total), _])) = profile
            .summaries
            .total
            .summary
            .callgrind
            .instructions
            .metrics;
        // The remainder is what runs once, around them all.
        counts.insert(summary.id, total / OPERATIONS);
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(id: &str, metrics: &str) -> String {
        format!(
            r#"{{"id":"{id}","kind":"LibraryBenchmark","profiles":[{{"tool":"Callgrind","summaries":
            {{"total":{{"summary":{{"Callgrind":{{"Ir":{{"diffs":null,"metrics":{metrics}}}}}}}}}}}}}]}}"#
        )
        .replace('\n', "")
    }

    #[test]
    fn a_first_run_and_later_ones_are_counted_alike() {
        let first = line("a", r#"{"Left":{"Int":50035}}"#);
        let later = line("b", r#"{"Both":[{"Int":60999},{"Int":1}]}"#);
        let counts = counts(&format!("{first}\n{later}\n")).expect("two lines");
        assert!(counts
            .into_iter()
            .eq([("a".to_owned(), 50), ("b".to_owned(), 60)]));
    }

    #[test]
    fn what_is_no_summary_is_an_error_that_says_where() {
        let good = line("a", r#"{"Left":{"Int":50035}}"#);
        let no_profile = r#"{"id":"a","profiles":[]}"#;
        let only_old = line("a", r#"{"Right":{"Int":1}}"#);
        for bad in ["", "{", no_profile, &only_old] {
            let error = counts(&format!("{good}\n{bad}\n")).expect_err(bad);
            assert!(error.starts_with("line 2: "), "{error}");
        }
    }
}
