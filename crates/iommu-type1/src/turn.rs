// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The turn of one who changes what is mapped.
//!
//! Where nobody listens that is the writer's lock. Where somebody does, it is the lock of those who listen
//! first: it stays taken while they are called, and the writer's lock does not. So between the check of a map
//! and its end nobody else maps or unmaps, and a listener may access the space. Who listens is added under
//! both locks: every change is either among what a new listener is given, or told to it.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use checked_sync::{lock, MutexGuard};

use crate::listen::{check_not_told, Listeners};
use crate::mapping::Mapping;
use crate::range::IovaRange;
use crate::space::Space;
use crate::writer::Writer;
use crate::Result;

pub(crate) struct Turn<'a> {
    space: &'a Space,
    // Given back before the other.
    writer: MutexGuard<'a, Writer>,
    listeners: Option<MutexGuard<'a, Listeners>>,
}

impl Space {
    /// Waits for a turn to change what is mapped in `range`.
    #[inline]
    pub(crate) fn turn(&self, range: IovaRange) -> Result<Turn<'_>> {
        let writer = lock(&self.writer);
        if writer.is_heard {
            drop(writer);
            check_not_told(self, range)?;
            return Ok(self.turn_heard());
        }
        Ok(Turn {
            space: self,
            writer,
            listeners: None,
        })
    }

    /// A turn to end what was begun in an earlier one: not inside of a call to a listener.
    pub(crate) fn another_turn(&self) -> Turn<'_> {
        let writer = lock(&self.writer);
        if writer.is_heard {
            drop(writer);
            return self.turn_heard();
        }
        Turn {
            space: self,
            writer,
            listeners: None,
        }
    }

    fn turn_heard(&self) -> Turn<'_> {
        let listeners = lock(&self.listeners);
        Turn {
            space: self,
            writer: lock(&self.writer),
            listeners: Some(listeners),
        }
    }
}

impl<'a> Turn<'a> {
    /// Asks those who listen whether `after` may come for `before`. As others may have changed something else
    /// meanwhile, `check` looks again.
    #[inline]
    pub(crate) fn ask(
        self,
        before: &[Arc<Mapping>],
        after: &[Arc<Mapping>],
        check: impl FnOnce(&Writer) -> Result<()>,
    ) -> (Self, Result<()>) {
        if self.listeners.is_none() {
            return (self, Ok(()));
        }
        self.ask_those_who_listen(before, after, check)
    }

    #[inline(never)]
    fn ask_those_who_listen(
        self,
        before: &[Arc<Mapping>],
        after: &[Arc<Mapping>],
        check: impl FnOnce(&Writer) -> Result<()>,
    ) -> (Self, Result<()>) {
        let (turn, told) =
            self.unlocked(|listeners, space| listeners.exchange(space, before, after));
        if told.is_err() {
            return (turn, told);
        }
        match check(&turn) {
            Ok(()) => (turn, Ok(())),
            error => (turn.report(after, before), error),
        }
    }

    /// Tells those who listen what has gone and what has come.
    pub(crate) fn report(self, before: &[Arc<Mapping>], after: &[Arc<Mapping>]) -> Self {
        let tell = |listeners: &mut Listeners, space: &Space| {
            listeners.report(space, before, after);
            Ok(())
        };
        self.unlocked(tell).0
    }

    fn unlocked(
        self,
        tell: impl FnOnce(&mut Listeners, &Space) -> Result<()>,
    ) -> (Self, Result<()>) {
        let space = self.space;
        let Some(mut listeners) = self.listeners else {
            return (self, Ok(()));
        };
        drop(self.writer);
        let told = tell(&mut listeners, space);
        let turn = Turn {
            space,
            writer: lock(&space.writer),
            listeners: Some(listeners),
        };
        (turn, told)
    }
}

impl Deref for Turn<'_> {
    type Target = Writer;

    fn deref(&self) -> &Writer {
        &self.writer
    }
}

impl DerefMut for Turn<'_> {
    fn deref_mut(&mut self) -> &mut Writer {
        &mut self.writer
    }
}
