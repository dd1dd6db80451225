// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Misses: who waits for which, and who is told what came of it.
//!
//! # Why no answer is missed
//!
//! Who waits is noted down first and then looks whether what is missing has come meanwhile; who answers has it come
//! first and then looks who is noted down. Both look under a lock: either the one sees the mapping or the other the note.
//! An answer ends the note. Whoever waits looks again then, and if something is still missing that is a new miss.
//!
//! Several who miss the same are one note, which the first reports. If it goes without having reported, the others
//! are woken and report themselves.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::time::{Duration, Instant};

use checked_sync::{lock, now, wait_until, Condvar, Mutex};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vm_memory::Permissions;

use crate::memory::no_memory;
use crate::{Error, Result};

/// Most misses that are not answered at a time.
pub const MISS_LIMIT: usize = 1024;

/// How long misses are waited for, unless told otherwise.
pub const MISS_DEADLINE: Duration = Duration::from_secs(1);

/// Who is told of misses: the socket to a vhost-user front end, or the VMM's own IOMMU.
pub trait MissSink: Send + Sync {
    /// Something is missing: a message of type [`Miss`](VhostIotlbType::Miss) with address, size and access, for the front
    /// end to answer by an update.
    ///
    /// It is called by the thread that waits, with no lock or guard held, once for each miss that several threads
    /// may wait for. The answer may also come before it returns.
    ///
    /// # Errors
    ///
    /// Then all who wait for it fail with [`Error::Report`].
    fn miss(&self, miss: &VhostIotlbMsg) -> io::Result<()>;
}

/// What is missing. Two that are equal are reported once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Miss {
    /// First address.
    pub iova: u64,
    /// Bytes, one at least, none of them beyond 64 bits.
    pub size: u64,
    /// Whether it is to be read.
    pub read: bool,
    /// Whether it is to be written.
    pub write: bool,
}

impl Miss {
    pub(crate) fn new(iova: u64, size: u64, access: Permissions) -> Self {
        Miss {
            iova,
            size,
            read: access.allow(Permissions::Read),
            write: access.allow(Permissions::Write),
        }
    }

    /// For which accesses.
    pub fn access(&self) -> Permissions {
        match (self.read, self.write) {
            (false, false) => Permissions::No,
            (true, false) => Permissions::Read,
            (false, true) => Permissions::Write,
            (true, true) => Permissions::ReadWrite,
        }
    }

    /// As it is reported.
    pub fn message(&self) -> VhostIotlbMsg {
        VhostIotlbMsg {
            iova: self.iova,
            size: self.size,
            userspace_addr: 0,
            perm: match (self.read, self.write) {
                (false, false) => VhostAccess::No,
                (true, false) => VhostAccess::ReadOnly,
                (false, true) => VhostAccess::WriteOnly,
                (true, true) => VhostAccess::ReadWrite,
            },
            msg_type: VhostIotlbType::Miss,
        }
    }

    /// Whether it shares an address with `first..=last`.
    fn meets(&self, first: u64, last: u64) -> bool {
        self.iova <= last && first <= self.iova + (self.size - 1)
    }
}

/// What came of a miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Answered,
    Refused,
    NotReported(io::ErrorKind),
    Disconnected,
}

/// One note: who waits for a miss.
struct Note {
    waiters: usize,
    outcome: Option<Outcome>,
}

/// # Invariants
///
/// The notes without an outcome are those of `open`.
#[derive(Default)]
struct State {
    open: BTreeMap<Miss, u64>,
    notes: HashMap<u64, Note>,
    next: u64,
}

/// All misses that are waited for.
pub(crate) struct Misses {
    limit: usize,
    state: Mutex<State>,
    ended: Condvar,
}

/// A share in a note.
struct Ticket<'a> {
    misses: &'a Misses,
    miss: Miss,
    note: u64,
    /// Whether it is for the owner to report it.
    must_report: bool,
}

impl Misses {
    pub(crate) fn new(limit: usize) -> Self {
        Misses {
            limit,
            state: Mutex::new(State::default()),
            ended: Condvar::new(),
        }
    }

    /// Misses that are not answered.
    pub(crate) fn open(&self) -> usize {
        lock(&self.state).open.len()
    }

    /// Waits for what came of a miss, unless it `is_there` by now. It may be missing again when this returns.
    pub(crate) fn wait(
        &self,
        miss: Miss,
        deadline: Instant,
        is_there: impl FnOnce() -> bool,
        report: impl FnOnce(&Miss) -> io::Result<()>,
    ) -> Result<()> {
        let begun = now();
        let mut ticket = self.note(miss)?;
        if is_there() {
            return Ok(());
        }
        if ticket.must_report {
            if let Err(error) = report(&miss) {
                // It may have been answered meanwhile, and be missed again.
                let own = ticket.note;
                self.end(Outcome::NotReported(error.kind()), |_, note| note == own);
            }
            ticket.must_report = false;
        }
        let mut state = lock(&self.state);
        loop {
            let outcome = state.notes.get(&ticket.note);
            let outcome = outcome.and_then(|note| note.outcome);
            if let Some(outcome) = outcome {
                // The ticket is given back under the lock.
                drop(state);
                return outcome.of(&miss);
            }
            state = match wait_until(&self.ended, &self.state, state, deadline) {
                Some(state) => state,
                None => {
                    return Err(Error::MissDeadline {
                        iova: miss.iova,
                        size: miss.size,
                        access: miss.access(),
                        waited: now().saturating_duration_since(begun),
                    })
                }
            };
        }
    }

    /// Something has come to `first..=last`.
    pub(crate) fn answer(&self, first: u64, last: u64) {
        self.end(Outcome::Answered, |miss, _| miss.meets(first, last));
    }

    /// The front end refuses whatever is missing in `first..=last`.
    pub(crate) fn refuse(&self, first: u64, last: u64) {
        self.end(Outcome::Refused, |miss, _| miss.meets(first, last));
    }

    /// Nobody answers any more.
    pub(crate) fn disconnect(&self) {
        self.end(Outcome::Disconnected, |_, _| true);
    }

    fn note(&self, miss: Miss) -> Result<Ticket<'_>> {
        let mut state = lock(&self.state);
        let state = &mut *state;
        let known = state.open.get(&miss).copied();
        let note = match known {
            Some(note) => note,
            None if state.open.len() >= self.limit => {
                return Err(Error::MissLimit { limit: self.limit })
            }
            None => {
                // Up to the limit. The open ones, in a tree, need little memory at a time.
                let room = state.notes.try_reserve(1);
                room.map_err(|_| no_memory::<(u64, Note)>(state.notes.len() + 1))?;
                state.next += 1;
                state.open.insert(miss, state.next);
                state.next
            }
        };
        let entry = state.notes.entry(note).or_insert(Note {
            waiters: 0,
            outcome: None,
        });
        entry.waiters += 1;
        Ok(Ticket {
            misses: self,
            miss,
            note,
            must_report: known.is_none(),
        })
    }

    fn end(&self, outcome: Outcome, is_meant: impl Fn(&Miss, u64) -> bool) {
        let mut state = lock(&self.state);
        if state.end(outcome, is_meant) {
            self.ended.notify_all();
        }
    }
}

impl State {
    /// Ends the notes that are meant; whether there are any.
    fn end(&mut self, outcome: Outcome, is_meant: impl Fn(&Miss, u64) -> bool) -> bool {
        let (open, notes) = (&mut self.open, &mut self.notes);
        let before = open.len();
        open.retain(|miss, note| {
            if !is_meant(miss, *note) {
                return true;
            }
            if let Some(note) = notes.get_mut(note) {
                note.outcome = Some(outcome);
            }
            false
        });
        open.len() < before
    }
}

impl Outcome {
    fn of(self, miss: &Miss) -> Result<()> {
        let (iova, size) = (miss.iova, miss.size);
        match self {
            Outcome::Answered => Ok(()),
            Outcome::Refused => Err(Error::AccessFail {
                iova,
                size,
                access: miss.access(),
            }),
            Outcome::NotReported(kind) => Err(Error::Report { iova, size, kind }),
            Outcome::Disconnected => Err(Error::Disconnected),
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.misses.state);
        let state = &mut *state;
        let Some(note) = state.notes.get_mut(&self.note) else {
            return;
        };
        note.waiters -= 1;
        let (is_last, is_open) = (note.waiters == 0, note.outcome.is_none());
        if is_last {
            state.notes.remove(&self.note);
        }
        if is_last && is_open {
            state.open.remove(&self.miss);
        } else if is_open && self.must_report {
            // Nobody else would report it.
            state.end(Outcome::Answered, |_, note| note == self.note);
            self.misses.ended.notify_all();
        }
    }
}
