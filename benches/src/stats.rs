// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Medians and what lies around them.

/// A median, and how far the middle half of the samples is spread around it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measure {
    /// The median.
    pub value: f64,
    /// Interquartile range divided by the median (or what the maker relates it to).
    pub spread: f64,
}

impl Measure {
    /// Of samples, their spread relative to their own median.
    pub fn of(samples: &[f64]) -> Self {
        Measure::relative_to(samples, percentile(samples, 50.0))
    }

    /// Of samples, their spread relative to `scale`: for differences, which may be near 0.
    pub fn relative_to(samples: &[f64], scale: f64) -> Self {
        let range = percentile(samples, 75.0) - percentile(samples, 25.0);
        Measure {
            value: percentile(samples, 50.0),
            spread: if range == 0.0 {
                0.0
            } else {
                (range / scale).abs()
            },
        }
    }
}

/// A figure that does not depend on the machine's load.
impl From<f64> for Measure {
    fn from(value: f64) -> Self {
        Measure { value, spread: 0.0 }
    }
}

/// The sample below which `percent` of them lie (nearest rank); NaN of no samples.
pub fn percentile(samples: &[f64], percent: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_sample() {
        let samples = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!(percentile(&samples, 0.0), 1.0);
        assert_eq!(percentile(&samples, 50.0), 3.0);
        assert_eq!(percentile(&samples, 99.0), 5.0);
        assert!(percentile(&[], 50.0).is_nan());
    }

    #[test]
    fn the_spread_is_that_of_the_middle_half() {
        let samples = [1.0, 90.0, 95.0, 100.0, 105.0, 110.0, 1000.0];
        let measure = Measure::of(&samples);
        assert_eq!(measure.value, 100.0);
        assert!((measure.spread - 0.2).abs() < 1e-9, "{measure:?}");
        assert_eq!(Measure::of(&[0.0; 15]).spread, 0.0);
    }
}
