// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What this process has.

use std::fmt;
use std::fs;

/// Memory that may come and go with who is in the middle of what.
const SLACK_KIB: u64 = 16 << 10;
/// File descriptors and mappings that threads may have in their hands at a time, each a few.
const SLACK: usize = 32;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Process {
    resident_kib: u64,
    mappings: usize,
    files: usize,
}

impl Process {
    pub(crate) fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        Process {
            resident_kib: resident.trim().trim_end_matches(" kB").parse().unwrap(),
            mappings: fs::read_to_string("/proc/self/maps")
                .unwrap()
                .lines()
                .count(),
            files: fs::read_dir("/proc/self/fd").unwrap().count(),
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Process {
            resident_kib,
            mappings,
            files,
        } = self;
        write!(
            f,
            "{resident_kib} KiB resident, {mappings} mappings, {files} file descriptors"
        )
    }
}

/// The second half has no more than the first, but for what threads have in their hands.
pub(crate) fn assert_flat(samples: &[Process]) {
    let (early, late) = samples.split_at(samples.len() / 2);
    let most =
        |samples: &[Process], what: fn(&Process) -> u64| samples.iter().map(what).max().unwrap();
    let grown = |what: fn(&Process) -> u64| most(late, what).saturating_sub(most(early, what));
    assert!(
        grown(|process| process.resident_kib) <= SLACK_KIB,
        "{samples:?}"
    );
    assert!(
        grown(|process| process.mappings as u64) <= SLACK as u64,
        "{samples:?}"
    );
    assert!(
        grown(|process| process.files as u64) <= SLACK as u64,
        "{samples:?}"
    );
}
