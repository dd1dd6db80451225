// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows as bars: SVG that needs nothing but itself.

use std::fmt::Write as _;

use super::table::{number, Section};

const WIDTH: f64 = 820.0;
const LABELS: f64 = 230.0;
const VALUES: f64 = 90.0;
const BAR: f64 = 15.0;
const GAP: f64 = 12.0;
const TOP: f64 = 40.0;

/// Told apart by those who see few colours too (Okabe and Ito), used round and round.
const COLOURS: [&str; 8] = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999",
];

/// A bar a row, in groups by case. Values of several orders of magnitude are drawn logarithmically,
/// which the unit's line says.
pub(super) fn draw(section: &Section<'_>) -> String {
    let scale = Scale::of(section.rows.iter().map(|row| row.value));
    let candidates = section.candidates();
    let mut bars = String::new();
    let mut y = TOP;
    for case in section.cases() {
        text(&mut bars, 8.0, y + BAR, "start", "bold", case);
        y += BAR + 4.0;
        for (candidate, colour) in candidates.iter().zip(COLOURS.iter().cycle()) {
            let Some(row) = section.row(case, candidate) else {
                continue;
            };
            let (from, to) = scale.span(row.value);
            let (x, width) = (LABELS + from, (to - from).max(1.0));
            let middle = y + BAR - 4.0;
            text(&mut bars, LABELS - 6.0, middle, "end", "normal", candidate);
            // Writing into a string does not fail.
            let _ = writeln!(
                bars,
                r#"<rect x="{x:.1}" y="{:.1}" width="{width:.1}" height="{:.1}" fill="{colour}"/>"#,
                y + 1.0,
                BAR - 2.0,
            );
            let mut value = number(row.value);
            if !section.has_one_unit() {
                let _ = write!(value, " {}", row.unit);
            }
            text(
                &mut bars,
                LABELS + to + 4.0,
                middle,
                "start",
                "normal",
                &value,
            );
            y += BAR;
        }
        y += GAP;
    }
    let unit = if section.has_one_unit() {
        section.unit()
    } else {
        ""
    };
    let title = format!("{} [{unit}{}]", section.title, scale.name());
    let mut head = String::new();
    text(&mut head, 8.0, 20.0, "start", "bold", &title);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{head}{bars}</svg>\n"
    )
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, weight: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>"#
    );
}

/// From values to widths.
enum Scale {
    Linear { low: f64, high: f64 },
    Logarithmic { low: f64, high: f64 },
}

impl Scale {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        if low > 0.0 && high / low > 20.0 {
            Scale::Logarithmic {
                // So that the smallest has a bar too.
                low: low / 2.0,
                high,
            }
        } else {
            Scale::Linear {
                low: low.min(0.0),
                high: high.max(0.0),
            }
        }
    }

    /// Where the bar of a value begins and ends.
    fn span(&self, value: f64) -> (f64, f64) {
        let width = WIDTH - LABELS - VALUES;
        match *self {
            Scale::Logarithmic { low, high } => {
                (0.0, (value / low).ln() / (high / low).ln() * width)
            }
            Scale::Linear { low, high } => {
                let range = (high - low).max(f64::MIN_POSITIVE);
                let at = |value: f64| (value - low) / range * width;
                (at(value.min(0.0)), at(value.max(0.0)))
            }
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Scale::Linear { .. } => "",
            Scale::Logarithmic { .. } => ", logarithmic",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::sections;
    use super::*;
    use crate::record::Row;

    #[test]
    fn every_row_has_a_bar_inside_the_picture() {
        for values in [[1.0, 1e6], [-30.0, 50.0], [0.0, 0.0], [-2.0, -1.0]] {
            let scale = Scale::of(values.into_iter());
            for value in values {
                let (from, to) = scale.span(value);
                assert!(0.0 <= from && from <= to, "{value}: {from} to {to}");
                assert!(to <= WIDTH - LABELS - VALUES + 1e-9, "{value}: {to}");
            }
        }
    }

    #[test]
    fn names_are_escaped() {
        let rows = [Row::new("a < b", "c", "RwLock<BTreeMap>", 1.0, "ns")];
        let svg = draw(&sections(&rows)[0]);
        assert!(svg.contains("RwLock&lt;BTreeMap>") && svg.contains("a &lt; b"));
    }
}
