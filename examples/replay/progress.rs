// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How far the replay has come.

use gvt_replay::report::one_line;
use indicatif::{ProgressBar, ProgressStyle};

const TEMPLATE: &str = "{msg} [{wide_bar}] {pos}/{len} submissions, {eta} left";

/// A progress bar on stderr, if that is a terminal, that leaves nothing behind.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn new(submissions: u64, hidden: bool) -> Self {
        let bar = match hidden {
            true => ProgressBar::hidden(),
            false => ProgressBar::new(submissions),
        };
        Progress(match ProgressStyle::with_template(TEMPLATE) {
            Ok(style) => bar.with_style(style.progress_chars("=> ")),
            Err(_) => bar,
        })
    }

    /// What follows is `name`, the one after `index` others of `count`.
    pub(crate) fn begin(&self, what: &str, name: &str, index: usize, count: usize) {
        let name = one_line(name);
        self.0
            .set_message(format!("{what} {name} ({} of {count})", index + 1));
    }

    pub(crate) fn step(&self) {
        self.0.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
