// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The container users of a group, and the attachment they keep.
//!
//! The count is the kernel's `container_users`: 0 while detached; the group file is the first user,
//! every device file and external user one more. Whoever takes it from 1 to 0 detaches, and nobody
//! else can: from then on no user can be added, and no container attached until the detaching is
//! done. So whoever is counted may rely on the attachment without a lock.

use std::sync::Arc;

use checked_sync::{lock, AtomicUsize, Mutex, Ordering};

/// # Invariants
///
/// - `users > 0` implies that `target` is `Some`, and that it is not replaced.
/// - `target` changes from `None` in [`Attachment::attach`] only, before the count becomes 1, and
///   to `None` only by the one caller that took the count from 1 to 0.
#[derive(Debug)]
pub(crate) struct Attachment<C> {
    users: AtomicUsize,
    target: Mutex<Option<Arc<C>>>,
}

impl<C> Attachment<C> {
    pub(crate) fn new() -> Self {
        Attachment {
            users: AtomicUsize::new(0),
            target: Mutex::new(None),
        }
    }

    /// Attaches with one user, if `enter` agrees; `false` while attached or still being detached.
    pub(crate) fn attach<E>(
        &self,
        target: &Arc<C>,
        enter: impl FnOnce(&C) -> Result<(), E>,
    ) -> Result<bool, E> {
        let mut slot = lock(&self.target);
        if slot.is_some() {
            return Ok(false);
        }
        enter(target)?;
        *slot = Some(target.clone());
        self.users.store(1, Ordering::Release);
        Ok(true)
    }

    /// One more user, unless there is none (inc-if-not-zero).
    pub(crate) fn get(&self) -> Option<Arc<C>> {
        self.users
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |users| match users {
                0 => None,
                users => users.checked_add(1),
            })
            .ok()?;
        self.target()
    }

    /// One more user on behalf of a caller that is one already, so it cannot fail.
    pub(crate) fn get_held(&self) {
        self.users.fetch_add(1, Ordering::Relaxed);
    }

    /// One user less, if there is any (dec-if-positive); the last one detaches.
    pub(crate) fn put(&self, detach: impl FnOnce(&C)) {
        let last = self
            .users
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |users| {
                users.checked_sub(1)
            });
        if last == Ok(1) {
            self.dissolve(detach);
        }
    }

    /// Detaches if there is exactly one user; otherwise says how many there are.
    pub(crate) fn unset(&self, detach: impl FnOnce(&C)) -> Result<(), usize> {
        self.users
            .compare_exchange(1, 0, Ordering::AcqRel, Ordering::Relaxed)?;
        self.dissolve(detach);
        Ok(())
    }

    pub(crate) fn users(&self) -> usize {
        self.users.load(Ordering::Relaxed)
    }

    /// What it is attached to, or still being detached from.
    pub(crate) fn target(&self) -> Option<Arc<C>> {
        lock(&self.target).clone()
    }

    /// `detach` runs without the lock: it may wait and call out. `target` stays until it is done,
    /// so that nobody attaches to something else before everything of the old one is gone.
    fn dissolve(&self, detach: impl FnOnce(&C)) {
        if let Some(target) = self.target() {
            detach(&target);
        }
        // Not dropped under the lock: it may be the last reference.
        let _left = lock(&self.target).take();
    }
}
