// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What becomes of mappings that are still held: they stay revoked, or come back.

use std::slice;
use std::sync::Arc;

use super::{Revocation, UnmapPolicy};
use crate::mapping::Mapping;
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
        if let Some(undo) = self.undo.take() {
            replace::undo(writer, &self.space.table, undo);
        }
        // During this turn: who else waits for them may be the last then.
        self.replaced.clear();
    }
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
