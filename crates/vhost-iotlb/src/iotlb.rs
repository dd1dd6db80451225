// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The IOTLB: messages in, accesses through, misses out.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checked_sync::{lock, now, Mutex, LONGEST};
use iommu_type1::{Backing, Change, Error as SpaceError, IoAddressSpace, Profile, UnmapPolicy};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vm_memory::Permissions;

use crate::batch::Batch;
use crate::miss::Misses;
use crate::{memory, message, Error, MemTable, Miss, MissSink, Result, MISS_DEADLINE, MISS_LIMIT};

/// Pages that are looked at in one access, which an unmap has to wait for.
const PAGES_AT_ONCE: u64 = 512;

/// The device IOTLB of a back end. Clones are the same one.
///
/// See the [crate](crate) for what it does and an example.
#[derive(Clone)]
pub struct VhostIotlb {
    space: IoAddressSpace,
    /// Bytes of its smallest pages.
    page: u64,
    sink: Arc<dyn MissSink>,
    misses: Arc<Misses>,
    deadline: Duration,
    /// Held while a message is applied: they take effect one after the other.
    messages: Arc<Mutex<Messages>>,
}

#[derive(Default)]
struct Messages {
    table: MemTable,
    batch: Option<Batch>,
}

impl VhostIotlb {
    /// An IOTLB in a space of its own with the default limits, and who is told of its misses.
    pub fn new(sink: impl MissSink + 'static) -> Self {
        let space = IoAddressSpace::builder().profile(Profile::Iotlb).build();
        VhostIotlb::of(space, Arc::new(sink))
    }

    /// As [`new`](VhostIotlb::new) in a space that the caller has made, with limits, deadlines and a name of his choice.
    ///
    /// # Errors
    ///
    /// [`Error::Profile`] (EINVAL) of one that is not made with [`Profile::Iotlb`]; [`Error::Policy`] (EINVAL) of one in which what
    /// is still used at the deadline comes back ([`UnmapPolicy::Restore`]): what was invalidated would be accessible again.
    pub fn with_space(space: IoAddressSpace, sink: Arc<dyn MissSink>) -> Result<Self> {
        match (space.profile(), space.unmap_policy()) {
            (Profile::Iotlb, UnmapPolicy::Revoked) => Ok(VhostIotlb::of(space, sink)),
            (Profile::Iotlb, other) => Err(Error::Policy(other)),
            (other, _) => Err(Error::Profile(other)),
        }
    }

    fn of(space: IoAddressSpace, sink: Arc<dyn MissSink>) -> Self {
        let sizes = space.info().page_sizes;
        VhostIotlb {
            page: sizes & sizes.wrapping_neg(),
            space,
            sink,
            misses: Arc::new(Misses::new(MISS_LIMIT)),
            deadline: MISS_DEADLINE,
            messages: Arc::default(),
        }
    }

    /// With at most so many misses that are not answered, instead of [`MISS_LIMIT`]; for one that nobody waits for yet.
    #[must_use]
    pub fn miss_limit(mut self, limit: usize) -> Self {
        self.misses = Arc::new(Misses::new(limit));
        self
    }

    /// Waiting for misses so long at most in [`resolve`](VhostIotlb::resolve) and what is built on it, instead of
    /// [`MISS_DEADLINE`].
    #[must_use]
    pub fn miss_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline.min(LONGEST);
        self
    }

    /// The space that the messages change: what a device accesses. An access of what is missing fails at once with
    /// EAGAIN.
    pub fn space(&self) -> &IoAddressSpace {
        &self.space
    }

    /// Misses that are not answered at the moment.
    pub fn open_misses(&self) -> usize {
        self.misses.open()
    }

    /// The front end's memory is another from now on (`SET_MEM_TABLE`). What is in the IOTLB was of the old one and goes:
    /// it will be missed again.
    ///
    /// # Errors
    ///
    /// [`Error::BatchOpen`] (EBUSY): nothing is changed. [`Error::Space`] with
    /// [`Deadline`](iommu_type1::Error::Deadline) (EDEADLK): the table is the new one and the IOTLB empty, but somebody
    /// still uses memory of the old one. With any other error of the space nothing is changed.
    pub fn set_mem_table(&self, table: MemTable) -> Result<()> {
        let mut messages = lock(&self.messages);
        if messages.batch.is_some() {
            return Err(Error::BatchOpen);
        }
        let emptied = self.space.change([Change::UnmapAll]);
        // Otherwise what is there stays, and is of the old one.
        if matches!(emptied, Ok(()) | Err(SpaceError::Deadline { .. })) {
            messages.table = table;
        }
        Ok(emptied?)
    }

    /// Takes a message of the front end.
    ///
    /// | type | does |
    /// |---|---|
    /// | update | maps, over whatever is there; wakes who waits for a part of it |
    /// | invalidate | unmaps, also parts; address and size 0 mean everything, as in the kernel |
    /// | access failed | fails who waits for a part of it |
    /// | batch begin, batch end | all updates and invalidations between take effect at the end, at once |
    ///
    /// An update of memory that crosses regions of the table is several mappings, which come at once. An invalidation
    /// that begins or ends inside a page takes the page.
    ///
    /// # Errors
    ///
    /// Nothing is done by a message that is wrong: [`Error::Unexpected`] (EINVAL); [`Error::NotInTable`],
    /// [`Error::UserspaceRange`] (EFAULT); [`Error::BatchOpen`] (EBUSY), [`Error::NoBatch`] (EINVAL),
    /// [`Error::BatchLimit`] (E2BIG); [`Error::Space`] with what
    /// [`IoAddressSpace::change`] says: EINVAL, EOVERFLOW, ENOMEM. Where one inside of a batch is refused, the end of the batch
    /// is [`Error::BatchSpoiled`] (EINVAL), and nothing of it was done.
    ///
    /// [`Error::Space`] with EDEADLK: it is done, but somebody still uses what was there when the deadline of the space
    /// has passed. The same invalidation waits for them again.
    pub fn apply(&self, message: &VhostIotlbMsg) -> Result<()> {
        let mut messages = lock(&self.messages);
        let messages = &mut *messages;
        let changes = match message.msg_type {
            VhostIotlbType::Update => self.update(&messages.table, message),
            VhostIotlbType::Invalidate => self.invalidation(message).map(|change| vec![change]),
            VhostIotlbType::AccessFail => {
                let last = last(message.iova, message.size);
                last.map(|last| {
                    self.misses.refuse(message.iova, last);
                    Vec::new()
                })
            }
            VhostIotlbType::BatchBegin if messages.batch.is_none() => {
                messages.batch = Some(Batch::default());
                return Ok(());
            }
            VhostIotlbType::BatchBegin => Err(Error::BatchOpen),
            VhostIotlbType::BatchEnd => {
                let batch = messages.batch.take().ok_or(Error::NoBatch)?;
                return self.publish(batch.end()?);
            }
            VhostIotlbType::Empty | VhostIotlbType::Miss => {
                Err(Error::Unexpected(message.msg_type as u8))
            }
        };
        match &mut messages.batch {
            Some(batch) => batch.add(changes),
            None => self.publish(changes?),
        }
    }

    /// Takes a message as it comes from a socket: what [`message::decode`] says of it, and then [`apply`](VhostIotlb::apply).
    ///
    /// Bytes that are no message spoil an open batch as a message does that is wrong: one of its changes is not known,
    /// and what the others come to without it is nobody's wish.
    ///
    /// # Errors
    ///
    /// Those of both.
    pub fn apply_bytes(&self, bytes: &[u8]) -> Result<()> {
        match message::decode(bytes) {
            Ok(message) => self.apply(&message),
            Err(error) => {
                if let Some(batch) = &mut lock(&self.messages).batch {
                    batch.spoil();
                }
                Err(error)
            }
        }
    }

    /// The front end is gone: who waits for an answer fails with [`Error::Disconnected`], an open batch is forgotten,
    /// and the IOTLB and the memory table are empty. Another front end may come.
    ///
    /// # Errors
    ///
    /// [`Error::Space`] with EDEADLK: somebody still uses memory of it; with ENOMEM: the IOTLB is not empty until this
    /// is called again.
    pub fn disconnect(&self) -> Result<()> {
        let mut messages = lock(&self.messages);
        *messages = Messages::default();
        self.misses.disconnect();
        Ok(self.space.change([Change::UnmapAll])?)
    }

    /// Has all of `len` bytes from `iova` translated for an access: what is missing is reported and waited for.
    ///
    /// The caller holds no guard, list or pin of the space meanwhile (see the [gotchas](crate#gotchas)). Each part was
    /// there at some time when this returns. It may have been invalidated since: then the access fails, and this is
    /// called again.
    ///
    /// # Errors
    ///
    /// [`Error::MissLimit`] (ENOBUFS), [`Error::MissDeadline`] (ETIMEDOUT), [`Error::AccessFail`] (EACCES),
    /// [`Error::Report`] (EIO), [`Error::Disconnected`] (ENOTCONN); [`Error::Space`] with EOVERFLOW of a range that ends beyond
    /// 64 bits, and with ENOMEM.
    pub fn resolve(&self, iova: u64, len: usize, access: Permissions) -> Result<()> {
        self.resolve_until(iova, len, access, now() + self.deadline)
    }

    /// As [`resolve`](VhostIotlb::resolve), not later than `deadline`.
    ///
    /// # Errors
    ///
    /// As [`resolve`](VhostIotlb::resolve).
    pub fn resolve_until(
        &self,
        iova: u64,
        len: usize,
        access: Permissions,
        deadline: Instant,
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let last = last(iova, len as u64)?;
        let mut patience = Patience::until(deadline);
        let mut next = iova;
        // So many pages may be more than all addresses.
        let size = self.page.checked_mul(PAGES_AT_ONCE);
        let inside = size.map_or(u64::MAX, |size| size - 1);
        loop {
            let window = (next | inside).min(last);
            match self.missing(next, (window - next) as usize + 1, access)? {
                Some(missing) => {
                    self.miss(missing, access, &mut patience)?;
                    next = next.max(missing);
                }
                None if window == last => return Ok(()),
                None => next = window + 1,
            }
        }
    }

    /// Tries an access of the space until nothing it needs is missing, or the deadline passes. It must give back
    /// what it holds of the space before it returns an error.
    ///
    /// ```no_run
    /// # fn example(iotlb: &vhost_iotlb::VhostIotlb) -> vhost_iotlb::Result<()> {
    /// use vm_memory::Permissions;
    ///
    /// let handle = iotlb.space().handle();
    /// let counter = iotlb.retry(Permissions::Read, || {
    ///     let mut bytes = [0; 8];
    ///     handle.read(0x8000, &mut bytes).map(|()| u64::from_le_bytes(bytes))
    /// })?;
    /// # let _ = counter;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`resolve`](VhostIotlb::resolve), and any other error of the access.
    pub fn retry<T>(
        &self,
        access: Permissions,
        mut attempt: impl FnMut() -> iommu_type1::Result<T>,
    ) -> Result<T> {
        let mut patience = Patience::until(now() + self.deadline);
        loop {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(error) => {
                    let missing = missing_of(&error).ok_or(error)?;
                    self.miss(missing, access, &mut patience)?;
                }
            }
        }
    }

    /// Reads by [`retry`](VhostIotlb::retry).
    ///
    /// # Errors
    ///
    /// As [`retry`](VhostIotlb::retry).
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<()> {
        self.retry(Permissions::Read, || self.space.read(iova, buf))
    }

    /// Writes by [`retry`](VhostIotlb::retry).
    ///
    /// # Errors
    ///
    /// As [`retry`](VhostIotlb::retry).
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<()> {
        self.retry(Permissions::Write, || self.space.write(iova, buf))
    }

    /// What an update maps: a part for each region of memory.
    fn update(&self, table: &MemTable, message: &VhostIotlbMsg) -> Result<Vec<Change>> {
        let mut iova = message.iova;
        last(iova, message.size)?;
        let parts = table.resolve(message.userspace_addr, message.size)?;
        let prot = permissions(message.perm);
        let of = |backing: Backing| {
            let change = Change::Map {
                iova,
                prot,
                backing: backing.clone(),
            };
            // Behind the last part nobody looks.
            iova = iova.wrapping_add(backing.len() as u64);
            change
        };
        let changes = memory::collect(parts.into_iter().map(of))?;
        let mut each = changes.iter();
        each.try_for_each(|change| self.check(change))?;
        Ok(changes)
    }

    /// What an update in a batch would be refused for at its end, and alone at once.
    fn check(&self, change: &Change) -> Result<()> {
        let Change::Map {
            iova,
            backing,
            prot,
        } = change
        else {
            return Ok(());
        };
        if *prot == Permissions::No {
            return Err(SpaceError::NoPermissions { iova: *iova }.into());
        }
        let values = [
            ("address", *iova),
            ("size", backing.len() as u64),
            ("host address", backing.host_address().addr() as u64),
        ];
        for (what, value) in values {
            let unit = self.page;
            if value % unit != 0 {
                return Err(SpaceError::Misaligned { what, value, unit }.into());
            }
        }
        Ok(())
    }

    /// What an invalidation unmaps: whole pages.
    fn invalidation(&self, message: &VhostIotlbMsg) -> Result<Change> {
        let (iova, size) = (message.iova, message.size);
        // All of 64 bits is a size that cannot be said: the kernel's computation of the last address wraps.
        if (iova, size) == (0, 0) {
            return Ok(Change::UnmapAll);
        }
        let first = iova & !(self.page - 1);
        let last = last(iova, size)? | (self.page - 1);
        Ok(match (last - first).checked_add(1) {
            Some(size) => Change::Unmap { iova: first, size },
            None => Change::UnmapAll,
        })
    }

    /// Has changes take effect, and tells who waits for what they map.
    fn publish(&self, changes: Vec<Change>) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let range = |change: &Change| match change {
            Change::Map { iova, backing, .. } => {
                Some((*iova, iova.saturating_add(backing.len() as u64 - 1)))
            }
            _ => None,
        };
        let mut outcome = self.space.change(changes.iter().cloned());
        let is_full = matches!(
            outcome,
            Err(SpaceError::EntryLimit { .. }
                | SpaceError::TableLimit { .. }
                | SpaceError::DirtyLimit { .. })
        );
        if is_full {
            outcome = self
                .make_room()
                .and_then(|()| self.space.change(changes.iter().cloned()));
        }
        let is_done = matches!(outcome, Ok(()) | Err(SpaceError::Deadline { .. }));
        if is_done {
            for (first, last) in changes.iter().filter_map(range) {
                self.misses.answer(first, last);
            }
        }
        Ok(outcome?)
    }

    /// Empties the IOTLB.
    fn make_room(&self) -> iommu_type1::Result<()> {
        log::debug!("an IOTLB of {} entries is full", self.space.mappings());
        match self.space.change([Change::UnmapAll]) {
            // Who invalidates what is still used waits for it.
            Err(SpaceError::Deadline { .. }) => Ok(()),
            other => other,
        }
    }

    /// The first address of a range that an access cannot have.
    fn missing(&self, iova: u64, len: usize, access: Permissions) -> Result<Option<u64>> {
        match self.space.scatter(iova, len, access) {
            Ok(_) => Ok(None),
            Err(error) => missing_of(&error)
                .ok_or(error)
                .map(Some)
                .map_err(Error::from),
        }
    }

    /// Waits for the page at an address.
    fn miss(&self, iova: u64, access: Permissions, patience: &mut Patience) -> Result<()> {
        let miss = Miss::new(iova & !(self.page - 1), self.page, access);
        patience.check(&miss)?;
        let deadline = patience.deadline;
        let is_there = || matches!(self.missing(iova, 1, access), Ok(None));
        let report = |miss: &Miss| self.sink.miss(&miss.message());
        self.misses.wait(miss, deadline, is_there, report)
    }
}

/// How long one call waits, however many misses that takes: a front end may answer each at once, and by what does not
/// help or does not stay.
struct Patience {
    begun: Instant,
    deadline: Instant,
    has_missed: bool,
}

impl Patience {
    fn until(deadline: Instant) -> Self {
        Patience {
            begun: now(),
            deadline,
            has_missed: false,
        }
    }

    /// Lets the first miss pass, which is reported however little time there is, and others up to the deadline.
    fn check(&mut self, miss: &Miss) -> Result<()> {
        let now = now();
        if self.has_missed && now >= self.deadline {
            return Err(Error::MissDeadline {
                iova: miss.iova,
                size: miss.size,
                access: miss.access(),
                waited: now.saturating_duration_since(self.begun),
            });
        }
        self.has_missed = true;
        Ok(())
    }
}

impl fmt::Debug for VhostIotlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostIotlb")
            .field("space", &self.space)
            .field("open_misses", &self.open_misses())
            .finish_non_exhaustive()
    }
}

/// Where an access has met something that the front end can do something about.
fn missing_of(error: &SpaceError) -> Option<u64> {
    match error {
        SpaceError::NotMapped { iova, .. } | SpaceError::Permission { iova, .. } => Some(*iova),
        _ => None,
    }
}

fn permissions(access: VhostAccess) -> Permissions {
    match access {
        VhostAccess::No => Permissions::No,
        VhostAccess::ReadOnly => Permissions::Read,
        VhostAccess::WriteOnly => Permissions::Write,
        VhostAccess::ReadWrite => Permissions::ReadWrite,
    }
}

/// The last address of a range.
fn last(iova: u64, size: u64) -> Result<u64> {
    let behind = size.checked_sub(1).ok_or(SpaceError::Empty { iova })?;
    let last = iova.checked_add(behind);
    Ok(last.ok_or(SpaceError::Overflow { iova, size })?)
}
