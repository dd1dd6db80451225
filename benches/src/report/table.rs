// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows as tables.

use std::fmt::Write as _;

use crate::record::Row;

/// The rows under one heading; cases are lines, candidates are columns, both in order of appearance.
#[derive(Debug)]
pub(super) struct Section<'a> {
    pub(super) title: &'a str,
    pub(super) rows: Vec<&'a Row>,
}

/// Rows by their sections.
pub(super) fn sections(rows: &[Row]) -> Vec<Section<'_>> {
    distinct(rows.iter().map(|row| row.section.as_str()))
        .into_iter()
        .map(|title| Section {
            title,
            rows: rows.iter().filter(|row| row.section == title).collect(),
        })
        .collect()
}

impl<'a> Section<'a> {
    pub(super) fn cases(&self) -> Vec<&'a str> {
        distinct(self.rows.iter().map(|row| row.case.as_str()))
    }

    pub(super) fn candidates(&self) -> Vec<&'a str> {
        distinct(self.rows.iter().map(|row| row.candidate.as_str()))
    }

    pub(super) fn unit(&self) -> &'a str {
        self.rows.first().map_or("", |row| row.unit.as_str())
    }

    pub(super) fn row(&self, case: &str, candidate: &str) -> Option<&'a Row> {
        let is_it = |row: &&&Row| row.case == case && row.candidate == candidate;
        self.rows.iter().find(is_it).copied()
    }

    pub(super) fn markdown(&self) -> String {
        let candidates = self.candidates();
        let mut table = format!(
            "| {} | {} |\n",
            self.units(),
            escaped(&candidates.join(" | "))
        );
        table.push_str(&format!("|---|{}\n", "---:|".repeat(candidates.len())));
        for case in self.cases() {
            let cells = candidates.iter().map(|candidate| {
                let row = self.row(case, candidate);
                row.map_or_else(String::new, |row| cell(row, self.has_one_unit()))
            });
            let cells = cells.collect::<Vec<_>>().join(" | ");
            // Writing into a string does not fail.
            let _ = writeln!(table, "| {case} | {cells} |");
        }
        table
    }

    pub(super) fn has_one_unit(&self) -> bool {
        self.rows.iter().all(|row| row.unit == self.unit())
    }

    fn units(&self) -> &str {
        if self.has_one_unit() {
            self.unit()
        } else {
            ""
        }
    }
}

fn cell(row: &Row, unit_is_known: bool) -> String {
    let mut cell = number(row.value);
    if !unit_is_known {
        let _ = write!(cell, " {}", row.unit);
    }
    cell.push_str(row.verdict().as_deref().unwrap_or(" (noisy)"));
    cell
}

/// For Markdown, to which `<` begins a tag.
pub(super) fn escaped(text: &str) -> String {
    text.replace('<', "\\<")
}

/// With as many digits as say something.
pub fn number(value: f64) -> String {
    match value.abs() {
        small if small < 10.0 => format!("{value:.2}"),
        middle if middle < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut distinct = Vec::new();
    for name in names {
        if !distinct.contains(&name) {
            distinct.push(name);
        }
    }
    distinct
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Measure;

    #[test]
    fn a_table_has_cases_as_lines_and_candidates_as_columns() {
        let ratio = |value, spread| Measure { value, spread };
        let rows = [
            Row::new("s", "8 B", "ours", 10.0, "cycles"),
            Row::new("s", "8 B", "peer<T>", 20.0, "cycles").with_ratio(ratio(0.5, 0.15)),
            Row::new("other", "8 B", "ours", 1.0, "ns"),
            Row::new("s", "64 B", "peer<T>", 300.0, "cycles").with_ratio(ratio(0.5, 0.16)),
        ];
        let sections = sections(&rows);
        assert_eq!(sections.len(), 2);
        assert_eq!(
            sections[0].markdown(),
            "| cycles | ours | peer\\<T> |\n\
             |---|---:|---:|\n\
             | 8 B | 10.0 | 20.0 (0.50x) |\n\
             | 64 B |  | 300 (noisy) |\n"
        );
    }
}
