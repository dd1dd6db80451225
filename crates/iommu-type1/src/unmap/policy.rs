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
        let mut restored = Vec::new();
        for mapping in self.mappings.drain(..) {
            match self.policy {
                _ if mapping.is_hollow() => writer.set_state(&mapping, State::Invalid),
                UnmapPolicy::Revoked => writer.keep_revoked(&mapping),
                UnmapPolicy::Restore => restored.push(mapping),
            }
        }
        let writer = put_back(writer, self.space, restored);
        if let Some(undo) = self.undo.take() {
            replace::undo(writer, &self.space.table, undo);
        }
        // During this turn: who else waits for them may be the last then.
        self.replaced.clear();
    }
}

/// Has mappings that were revoked be in the table again; those that a listener refuses stay revoked.
pub(crate) fn put_back<'a>(
    mut turn: Turn<'a>,
    space: &Space,
    revoked: Vec<Arc<Mapping>>,
) -> Turn<'a> {
    let mut restored = Vec::with_capacity(revoked.len());
    for mapping in revoked {
        let (next, agreed) = turn.ask(&[], slice::from_ref(&mapping), |_| Ok(()));
        turn = next;
        match agreed {
            Ok(()) => {
                turn.publish(&space.table, mapping.clone());
                restored.push(mapping);
            }
            Err(error) => {
                log::warn!("a mapping stays revoked: {error}");
                turn.keep_revoked(&mapping);
            }
        }
    }
    turn.forget(&restored);
    turn
}
