// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the device has done, counted by all of its threads.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use gvt_scheduler::{Access, Observer};

#[derive(Debug, Default)]
pub struct Counters {
    /// Complete writes of a submission port that were accepted.
    pub submissions: Counter,
    /// Workloads that have run to their end.
    pub completions: Counter,
    /// Submissions that were refused and workloads that failed.
    pub errors: Counter,
    pub maps: Counter,
    /// Of these, those of files: all other memory is read and written by messages.
    pub maps_of_files: Counter,
    pub unmaps: Counter,
    /// Unmaps at whose end an engine was in the middle of a workload.
    pub unmaps_in_flight: Counter,
    pub bytes_read: Counter,
    pub bytes_written: Counter,
    pub interrupts: Counter,
    pub resets: Counter,
}

#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// For what somebody else counts.
    pub fn set(&self, count: u64) {
        self.0.store(count, Ordering::Relaxed);
    }
}

impl fmt::Display for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.load(Ordering::Relaxed).fmt(f)
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} submissions, {} completions, {} errors, {} maps, {} unmaps ({} with DMA in flight), \
             {} bytes read and {} written by DMA, {} interrupts, {} resets, {} maps of files",
            self.submissions,
            self.completions,
            self.errors,
            self.maps,
            self.unmaps,
            self.unmaps_in_flight,
            self.bytes_read,
            self.bytes_written,
            self.interrupts,
            self.resets,
            self.maps_of_files,
        )
    }
}

/// Counts the bytes of a vGPU's accesses.
#[derive(Debug)]
pub struct DmaBytes(pub std::sync::Arc<Counters>);

impl Observer for DmaBytes {
    fn access(&mut self, access: &Access) {
        let counter = match access.write {
            true => &self.0.bytes_written,
            false => &self.0.bytes_read,
        };
        counter.add(access.len as u64);
    }
}
