// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How well the generator does. A run that does not reach enough shows little, and fails.

use std::collections::BTreeMap;

use super::op::{Op, Outcome, FIXED};

/// Errnos that have to be reached.
const ERRNOS: [(i32, &str); 11] = [
    (libc::EPERM, "EPERM"),
    (libc::ENOENT, "ENOENT"),
    (libc::EBADF, "EBADF"),
    (libc::EFAULT, "EFAULT"),
    (libc::EBUSY, "EBUSY"),
    (libc::EEXIST, "EEXIST"),
    (libc::EINVAL, "EINVAL"),
    (libc::ENOSPC, "ENOSPC"),
    (libc::EOVERFLOW, "EOVERFLOW"),
    (libc::EMSGSIZE, "EMSGSIZE"),
    (libc::EADDRINUSE, "EADDRINUSE"),
];

/// Areas there have to be on average.
const AREAS: u64 = 16;

/// Operations below which shares say nothing.
const FEW: u64 = 1000;

/// Kinds of operations, and what share of each has to succeed, in percent.
const KINDS: [(&str, u64); 6] = [
    ("maps at an address", 40),
    ("maps anywhere", 40),
    ("copies", 40),
    ("unmaps", 25),
    ("range calls", 25),
    ("allocs and destroys", 25),
];

/// What was reached so far.
#[derive(Debug, Default)]
pub struct Rates {
    operations: u64,
    areas: u64,
    kinds: [(u64, u64); KINDS.len()],
    errnos: BTreeMap<i32, u64>,
}

impl Rates {
    /// Counts an operation that was done while so much was mapped.
    pub fn count(&mut self, op: &Op, outcome: &Outcome, areas: usize) {
        self.operations += 1;
        self.areas += areas as u64;
        let kind = match op {
            Op::Map(map) if map.flags & FIXED != 0 => 0,
            Op::Map(_) => 1,
            Op::Copy(_) => 2,
            Op::Unmap(_) => 3,
            Op::Ranges(..) | Op::Allow(_) => 4,
            Op::Alloc(_) | Op::Destroy(_) => 5,
        };
        self.kinds[kind].0 += 1;
        match outcome.result {
            Ok(()) => self.kinds[kind].1 += 1,
            Err(errno) => *self.errnos.entry(errno).or_default() += 1,
        }
    }

    /// Operations counted.
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// Prints all of it, and returns what is not enough.
    pub fn check(&self) -> Vec<String> {
        let mut missing = Vec::new();
        let mut miss = |missed: bool, what: String| {
            if missed && self.operations >= FEW {
                missing.push(what);
            }
        };
        for ((name, least), (done, succeeded)) in KINDS.iter().zip(self.kinds) {
            let percent = succeeded * 100 / done.max(1);
            println!("iommufd: rates: {percent}% of {done} {name} succeed");
            miss(
                percent < *least,
                format!("fewer than {least}% of the {name} succeed"),
            );
        }
        let areas = self.areas / self.operations.max(1);
        println!("iommufd: rates: {areas} areas on average");
        miss(
            areas < AREAS,
            format!("fewer than {AREAS} areas on average"),
        );
        for (errno, name) in ERRNOS {
            let reached = self.errnos.get(&errno).copied().unwrap_or(0);
            println!("iommufd: rates: {name} {reached} times");
            miss(reached == 0, format!("{name} was never reached"));
        }
        missing
    }
}
