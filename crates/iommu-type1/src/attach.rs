// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which space a pinner belongs to, and how it changes that: iommufd's attach, replace and detach.

use std::sync::Arc;
use std::time::Duration;

use checked_sync::{lock, now, Mutex};
use page_pin::{Access, Interest, UnmapNotice};

use crate::deadline::Deadline;
use crate::space::View;
use crate::{Error, IoAddressSpace, Pinner, Result};

/// An owner of pins, and where it is.
pub(crate) struct Owner {
    pub(crate) name: String,
    pub(crate) interest: Interest,
    pub(crate) notice: Arc<dyn UnmapNotice>,
    state: Mutex<State>,
}

struct State {
    /// While it moves, the space that it leaves: unpins go there.
    at: Option<Arc<Attachment>>,
    moving: bool,
}

/// An owner in one space.
pub(crate) struct Attachment {
    // Dropped first: the owner that the view keeps may wait until kept pins are gone.
    pub(crate) access: Access,
    pub(crate) view: Arc<View>,
}

impl Owner {
    pub(crate) fn new(
        view: &Arc<View>,
        name: &str,
        interest: Interest,
        notice: Arc<dyn UnmapNotice>,
    ) -> Self {
        let owner = Owner {
            name: name.into(),
            interest,
            notice,
            state: Mutex::new(State {
                at: None,
                moving: false,
            }),
        };
        lock(&owner.state).at = Some(owner.register(view));
        owner
    }

    fn register(&self, view: &Arc<View>) -> Arc<Attachment> {
        let pins = &view.space.pins;
        Arc::new(Attachment {
            access: pins.register(self.name.clone(), self.interest, self.notice.clone()),
            view: view.clone(),
        })
    }

    /// The space in which it may pin.
    pub(crate) fn attached(&self) -> Result<Arc<Attachment>> {
        let state = lock(&self.state);
        let at = state.at.as_ref().filter(|_| !state.moving);
        at.cloned().ok_or_else(|| self.not_attached())
    }

    /// The space in which its pins are.
    pub(crate) fn attached_or_moving(&self) -> Result<Arc<Attachment>> {
        let at = lock(&self.state).at.clone();
        at.ok_or_else(|| self.not_attached())
    }

    pub(crate) fn not_attached(&self) -> Error {
        let name = self.name.clone();
        Error::NotAttached { name }
    }
}

impl Pinner {
    /// Attaches it to a space, after [`detach`](Pinner::detach).
    ///
    /// # Errors
    ///
    /// [`Error::Attached`] (EINVAL): it is attached to a space.
    pub fn attach(&self, space: &IoAddressSpace) -> Result<()> {
        let owner = &self.owner;
        let mut state = lock(&owner.state);
        if state.at.is_some() {
            let name = owner.name.clone();
            return Err(Error::Attached { name });
        }
        state.at = Some(owner.register(&space.view));
        Ok(())
    }

    /// Moves it to another space. Clones move too; to the space it is in nothing moves.
    ///
    /// New pins and accesses are refused meanwhile ([`Error::NotAttached`], ENOENT), unpins go on. Its
    /// notice is called with address 0 and size `u64::MAX` and should drop all its pins.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// use std::time::Duration;
    /// use iommu_type1::{Backing, Interest, IoAddressSpace, PinnedPages};
    /// use vm_memory::Permissions::ReadWrite;
    ///
    /// let [old, new] = [(); 2].map(|()| IoAddressSpace::new());
    /// old.map(0, Backing::anonymous(0x1_0000)?, ReadWrite)?;
    /// new.map(0, Backing::anonymous(0x1_0000)?, ReadWrite)?;
    /// let cache: Arc<Mutex<Vec<PinnedPages>>> = Arc::default();
    /// let told = cache.clone();
    /// let notice = move |_iova, _size| told.lock().unwrap().clear();
    /// let pinner = old.pinner("nic", Interest::Holder, Arc::new(notice));
    /// cache.lock().unwrap().push(pinner.pin_pages(0, 1, ReadWrite)?);
    ///
    /// pinner.replace(&new, Duration::from_secs(1))?;
    /// assert!(cache.lock().unwrap().is_empty());
    /// let _pinned = pinner.pin_pages(0, 1, ReadWrite)?; // of `new`
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NotAttached`] (ENOENT), [`Error::Moving`] (EBUSY): another call moves it. At the
    /// deadline [`Error::Pin`] (EDEADLK) with what it still holds, or [`Error::AccessRuns`] (EBUSY);
    /// it stays where it was then, as it does when its notice panics.
    pub fn replace(&self, space: &IoAddressSpace, deadline: Duration) -> Result<()> {
        let owner = &self.owner;
        let Some(moving) = Move::begin(owner, Some(space))? else {
            return Ok(());
        };
        let new = owner.register(&space.view);
        moving.leave(&Deadline::after(deadline))?;
        let old = moving.finish(Some(new));
        // It has nothing there to be told of; a notice that has begun may end when it likes.
        let _still_running = old.access.end(now());
        Ok(())
    }

    /// Detaches it from its space: as [`replace`](Pinner::replace), to none. Pins are refused from then
    /// on, and when this returns without error no notice of it runs or ever will.
    ///
    /// Whoever calls this must not hold a lock that the notice takes.
    ///
    /// # Errors
    ///
    /// As [`replace`](Pinner::replace). Also [`Error::Pin`] (EBUSY) if an earlier notice still runs at
    /// the deadline; it is detached then.
    pub fn detach(&self, deadline: Duration) -> Result<()> {
        let deadline = Deadline::after(deadline);
        let Some(moving) = Move::begin(&self.owner, None)? else {
            return Ok(());
        };
        moving.leave(&deadline)?;
        let old = moving.finish(None);
        Ok(old.access.end(deadline.instant())?)
    }
}

/// A pinner that leaves its space. Dropped without [`finish`](Move::finish), it stays.
struct Move<'a> {
    owner: &'a Owner,
    old: Arc<Attachment>,
    finished: bool,
}

impl<'a> Move<'a> {
    /// `None` if it is in the space `to` already.
    fn begin(owner: &'a Owner, to: Option<&IoAddressSpace>) -> Result<Option<Self>> {
        let mut state = lock(&owner.state);
        let Some(old) = state.at.clone() else {
            return Err(owner.not_attached());
        };
        if state.moving {
            let name = owner.name.clone();
            return Err(Error::Moving { name });
        }
        if to.is_some_and(|to| Arc::ptr_eq(&to.view.space, &old.view.space)) {
            return Ok(None);
        }
        state.moving = true;
        Ok(Some(Move {
            owner,
            old,
            finished: false,
        }))
    }

    /// Makes it let go of everything in its space.
    fn leave(&self, deadline: &Deadline) -> Result<()> {
        let Attachment { access, view } = &*self.old;
        access.close();
        // An access that runs now may have begun before that.
        if !view.space.grace.synchronize(deadline) {
            return Err(Error::AccessRuns {
                waited: deadline.age(),
            });
        }
        Ok(access.detach(deadline.instant())?)
    }

    /// Where it was.
    fn finish(mut self, at: Option<Arc<Attachment>>) -> Arc<Attachment> {
        self.finished = true;
        let mut state = lock(&self.owner.state);
        state.at = at;
        state.moving = false;
        self.old.clone()
    }
}

impl Drop for Move<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.old.access.reopen();
            lock(&self.owner.state).moving = false;
        }
    }
}
