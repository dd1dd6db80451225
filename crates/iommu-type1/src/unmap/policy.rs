// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What becomes of mappings that are still held: they stay revoked, or come back.

use std::slice;
use std::sync::Arc;
use std::time::Duration;

use checked_sync::lock;

use super::{Replaced, Revocation, UnmapPolicy};
use crate::deadline::Deadline;
use crate::mapping::Mapping;
use crate::memory;
use crate::replace;
use crate::space::Space;
use crate::turn::Turn;
use crate::writer::State;

impl Drop for Revocation<'_> {
    fn drop(&mut self) {
        if self.mappings.is_empty() && self.replaced.is_empty() {
            return;
        }
        let mut writer = self.space.another_turn();
        writer.late.append(std::mem::take(&mut self.unlinked));
        let mut restored = std::mem::take(&mut self.mappings);
        restored.retain(|mapping| {
            match self.policy {
                _ if mapping.is_hollow() => writer.set_state(mapping, State::Invalid),
                UnmapPolicy::Revoked => writer.keep_revoked(mapping),
                UnmapPolicy::Restore => return true,
            }
            false
        });
        let writer = put_back(writer, self.space, restored);
        let mut replaced = std::mem::take(&mut self.replaced);
        let Some(undo) = self.undo.take() else {
            // During this turn: who else waits for them may be the last then.
            replaced.clear();
            return;
        };
        let by = replace::undo(writer, &self.space.table, undo);
        release_unused(self.space, replaced, by.unwrap_or_default());
    }
}

/// Releases what was there for a moment, and what is there again in parts, if nobody uses it: it would stay until the next
/// unmap there, as what an access that is running may use does.
fn release_unused(space: &Space, mut replaced: Vec<Replaced>, by: Vec<Arc<Mapping>>) {
    // Without memory for the list they do stay.
    let _all = memory::extend(&mut replaced, by.into_iter().map(Replaced::of));
    let at_once = Deadline::after(Duration::ZERO);
    let graced = space.grace.synchronize(&at_once);
    let waited = replaced.iter().map(|replaced| &replaced.mapping);
    let leased = space.leases.wait_released(waited, &at_once);
    for replaced in &mut replaced {
        replaced.over = graced && !leased.has(&replaced.mapping);
    }
    let harvest = lock(&space.harvest);
    let mut writer = lock(&space.writer);
    writer.release(&space.table, &space.pins, &mut replaced);
    // With the lock: who else waits for the others may be the last then.
    replaced.retain(|replaced| replaced.over);
    drop(writer);
    drop(harvest);
}

/// Has mappings that were revoked be in the table again; those that a listener refuses, or for which there is no
/// memory, stay revoked.
pub(crate) fn put_back<'a>(
    mut turn: Turn<'a>,
    space: &Space,
    mut revoked: Vec<Arc<Mapping>>,
) -> Turn<'a> {
    // In front of those that stay.
    let mut restored = 0;
    for at in 0..revoked.len() {
        let mapping = slice::from_ref(&revoked[at]);
        let (next, agreed) = turn.ask(&[], mapping, |_| Ok(()));
        turn = next;
        let published = match agreed {
            Ok(()) => turn.publish(&space.table, revoked[at].clone()),
            error => error,
        };
        match published {
            Ok(()) => {
                revoked.swap(restored, at);
                restored += 1;
            }
            Err(error) => {
                log::warn!("a mapping stays revoked: {error}");
                // Whom it was given to has to give it back.
                turn = turn.report(slice::from_ref(&revoked[at]), &[]);
                turn.keep_revoked(&revoked[at]);
            }
        }
    }
    turn.forget(&revoked[..restored]);
    turn
}
