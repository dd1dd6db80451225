// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What has to happen does by a deadline, or the test fails and says what did not: none waits for ever. What cannot
//! happen on a machine is said to be skipped there.
//! The tests of the other crates have this file by a link, so that each crate is packed with it.

#![allow(dead_code)] // Each test uses a part of it.

use std::io::Write;
use std::panic::resume_unwind;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Far longer than anything here takes, also on a machine that does much else. Under Miri all takes long.
pub const DEADLINE: Duration = Duration::from_secs(if cfg!(miri) { 3600 } else { 60 });

/// The most that counts of the time between two looks. Whoever does not get the processor for longer, or is stopped,
/// cannot tell whether others get it.
const LOOK: Duration = Duration::from_millis(100);

/// Waits until it is so. To look at that must not take long.
#[track_caller]
pub fn within(what: &str, is_so: impl FnMut() -> bool) {
    by(DEADLINE, what, is_so);
}

#[track_caller]
fn by(deadline: Duration, what: &str, mut is_so: impl FnMut() -> bool) {
    let (mut waited, mut looked) = (Duration::ZERO, None);
    while !is_so() {
        let now = Instant::now();
        waited += now
            .duration_since(looked.replace(now).unwrap_or(now))
            .min(LOOK);
        assert!(waited < deadline, "not in {deadline:?}: {what}");
        thread::yield_now();
    }
}

/// What a thread returns, which is left behind where it does not end.
#[track_caller]
pub fn ended<T>(what: &str, thread: JoinHandle<T>) -> T {
    ended_by(DEADLINE, what, thread)
}

#[track_caller]
fn ended_by<T>(deadline: Duration, what: &str, thread: JoinHandle<T>) -> T {
    by(deadline, what, || {
        let is_over = thread.is_finished();
        if !is_over {
            // What it does may want the processor.
            thread::sleep(Duration::from_millis(1));
        }
        is_over
    });
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// Runs what is named in a thread of its own, which is left behind where it does not end. It has the name of the test.
#[track_caller]
pub fn must_end<T: Send + 'static>(what: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let mut thread = thread::Builder::new();
    if let Some(test) = thread::current().name() {
        thread = thread.name(test.to_owned());
    }
    ended(&format!("{what} ends"), thread.spawn(run).unwrap())
}

/// What a program says, which is left behind where it does not end. It may have much to do, and others do as much.
#[track_caller]
pub fn output(mut program: Command) -> Output {
    let what = format!("{program:?} ends");
    let run = move || program.output().unwrap();
    ended_by(10 * DEADLINE, &what, thread::spawn(run))
}

/// Says that the test of this thread is, by a way on which tests that pass are not silenced.
#[allow(clippy::explicit_write, reason = "eprintln is what is silenced")]
pub fn skipped(why: &str) {
    let test = thread::current();
    let test = test.name().unwrap_or("a test");
    writeln!(std::io::stderr(), "{test} is skipped: {why}").unwrap();
}

/// Set when this is dropped, so also where something fails: whoever goes on until then ends.
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
