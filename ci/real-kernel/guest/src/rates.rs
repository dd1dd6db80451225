// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How well the generator does: what share succeeds, how much is mapped, which errnos are reached. A run
//! that does not reach enough of it shows little, and fails.

use std::collections::BTreeMap;

use crate::op::{Op, Outcome};

/// Errnos that maps, unmaps and calls about dirty pages answer by the contract.
const ERRNOS: [(i32, &str); 7] = [
    (libc::EINVAL, "EINVAL"),
    (libc::EOVERFLOW, "EOVERFLOW"),
    (libc::EEXIST, "EEXIST"),
    (libc::ENOENT, "ENOENT"),
    (libc::ENOSPC, "ENOSPC"),
    (libc::EFAULT, "EFAULT"),
    (libc::EACCES, "EACCES"),
];

/// Shares of the maps and unmaps that have to succeed, in percent.
const MAPS: u64 = 40;
const UNMAPS: u64 = 25;

/// Mappings there have to be, on average over all operations on containers of the usual limit.
const LIVE: u64 = 16;

/// Operations below which shares say nothing.
const FEW: u64 = 1000;

#[derive(Debug, Default)]
struct Share {
    done: u64,
    succeeded: u64,
}

impl Share {
    fn percent(&self) -> u64 {
        self.succeeded * 100 / self.done.max(1)
    }
}

/// What was reached so far.
#[derive(Debug, Default)]
pub struct Rates {
    operations: u64,
    live: u64,
    maps: Share,
    unmaps: Share,
    errnos: BTreeMap<i32, u64>,
}

impl Rates {
    /// Counts an operation that was done while so much was mapped.
    pub fn count(&mut self, op: &Op, outcome: &Outcome, live: usize) {
        self.operations += 1;
        self.live += live as u64;
        let share = match op {
            Op::Map(_) => Some(&mut self.maps),
            Op::Unmap(_) => Some(&mut self.unmaps),
            Op::Dirty(_) | Op::Info(_) | Op::Extension(_) => None,
        };
        if let Some(share) = share {
            share.done += 1;
            share.succeeded += u64::from(outcome.result.is_ok());
        }
        if let Err(errno) = outcome.result {
            *self.errnos.entry(errno).or_default() += 1;
        }
    }

    /// Operations counted.
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// Prints all of it, and returns what is not enough.
    pub fn check(&self) -> Vec<String> {
        let live = self.live / self.operations.max(1);
        println!(
            "rates: {}% of {} maps and {}% of {} unmaps succeed, {live} mappings on average",
            self.maps.percent(),
            self.maps.done,
            self.unmaps.percent(),
            self.unmaps.done,
        );
        let name = |errno| {
            ERRNOS
                .iter()
                .find(|known| known.0 == errno)
                .map(|known| known.1)
        };
        let reached: Vec<_> = self
            .errnos
            .iter()
            .map(|(errno, times)| format!("{} {times}", name(*errno).unwrap_or("unexpected")))
            .collect();
        println!("rates: {}", reached.join(", "));
        let mut missing = Vec::new();
        if self.operations < FEW {
            return missing;
        }
        if self.maps.percent() < MAPS || self.unmaps.percent() < UNMAPS || live < LIVE {
            missing.push(format!("fewer than {MAPS}%, {UNMAPS}% or {LIVE} mappings"));
        }
        for (errno, name) in ERRNOS {
            if !self.errnos.contains_key(&errno) {
                missing.push(format!("{name} was never reached"));
            }
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::Map;

    const MAP: Op = Op::Map(Map {
        argsz: 32,
        flags: 3,
        vaddr: 0,
        iova: 0,
        size: 0,
    });

    /// Maps of which so many in a hundred succeed while so much is mapped, and every errno once.
    fn rates(percent: u64, live: usize) -> Rates {
        let mut rates = Rates::default();
        for number in 0..2 * FEW {
            let fails = number % 100 >= percent;
            let result = if fails { Err(libc::EINVAL) } else { Ok(0) };
            rates.count(&MAP, &Outcome::plain(result), live);
        }
        rates.unmaps = Share {
            done: 100,
            succeeded: 25,
        };
        rates.errnos = ERRNOS.iter().map(|(errno, _)| (*errno, 1)).collect();
        rates
    }

    #[test]
    fn a_run_that_reaches_too_little_fails() {
        assert_eq!(rates(40, 16).check(), [""; 0]);
        assert_eq!(rates(39, 16).check().len(), 1);
        assert_eq!(rates(40, 15).check().len(), 1);
        let mut few_unmaps = rates(40, 16);
        few_unmaps.unmaps.succeeded = 24;
        assert_eq!(few_unmaps.check().len(), 1);
        for (errno, _) in ERRNOS {
            let mut without = rates(40, 16);
            without.errnos.remove(&errno);
            assert_eq!(without.check().len(), 1, "errno {errno}");
        }
    }
}
