// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who wants to survive, and the word that everybody looks at.

use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{compiler_fence, fence, AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use checked_sync::{lock, Mutex};
use vm_memory::{FileOffset, Permissions};

use super::handler;
use super::watches::{Watch, Watches};
use crate::backing::{to_prot, Region};
use crate::range::page_size;
use crate::{Backing, Result};

/// Every region that is watched, in all spaces: signals are of the process.
pub(super) static WATCHES: OnceLock<Watches> = OnceLock::new();

/// Regions of which something is gone, though nobody watches them any more: their memory stays what has replaced it.
static GONE: OnceLock<Mutex<Vec<Gone>>> = OnceLock::new();

struct Gone {
    region: Weak<dyn Region>,
    offset: usize,
}

/// Whether any memory has gone bad since the process began.
pub(super) static SEEN: AtomicBool = AtomicBool::new(false);

/// Whether an access has to look which memory is gone.
#[inline(always)]
pub(crate) fn seen() -> bool {
    // The handler may have run in the middle of the copy before this, on this thread or, as another's
    // page was the same, on that one: neither compiler nor processor may look first.
    compiler_fence(Ordering::SeqCst);
    fence(Ordering::Acquire);
    SEEN.load(Ordering::Acquire)
}

impl Backing {
    /// The same memory; but if its file gets shorter below it, accesses end with
    /// [`Error::Fault`](crate::Error::Fault) instead of the process with SIGBUS.
    ///
    /// Memory without a file is returned as it is, and so are files that cannot get shorter
    /// (`F_SEAL_SHRINK`), which need nothing.
    ///
    /// The first call installs a handler of SIGBUS, for good. Faults elsewhere, and SIGBUS for any other
    /// reason, go to whoever had the signal before; who installs another handler later has to do the same. The
    /// handler makes one system call, `mmap`.
    ///
    /// From the first byte that was missed when somebody looked, the memory of the whole region counts
    /// as bad, for good, however often it is guarded: map the file anew when it has its size again. What is lent (slices of a
    /// [`DmaGuard`](crate::DmaGuard), pinned pages) reads as zeros from there and what is written is lost;
    /// [`IoAddressSpace::check_memory`](crate::IoAddressSpace::check_memory) tells. So does what others do with
    /// the same region, through a backing that is not guarded or without any, and nobody tells them.
    ///
    /// ```
    /// use std::fs::File;
    /// use std::os::fd::FromRawFd;
    /// use iommu_type1::{Backing, IoAddressSpace};
    /// use vm_memory::{FileOffset, Permissions::ReadWrite};
    ///
    /// // SAFETY: the name ends with a NUL; the descriptor is new.
    /// let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) };
    /// file.set_len(0x4000)?;
    /// let memory = Backing::file(FileOffset::new(file.try_clone()?, 0), 0x4000, ReadWrite)?;
    /// let space = IoAddressSpace::new();
    /// space.map(0, memory.guarded()?, ReadWrite)?;
    ///
    /// file.set_len(0x2000)?;
    /// let error = space.write(0x1000, &[1; 0x2000]).unwrap_err();
    /// assert_eq!((error.errno(), error.completed()), (libc::EFAULT, 0x1000));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Mmap`](crate::Error::Mmap) with what the kernel says where it refuses the handler.
    pub fn guarded(self) -> Result<Self> {
        let Some(file) = self.file_offset() else {
            return Ok(self);
        };
        if cannot_shrink(&file) || self.is_guarded() {
            return Ok(self);
        }
        let watches = WATCHES.get_or_init(Watches::new);
        handler::install(self.len())?;
        Ok(self.in_region(|inner| {
            let first = inner.host_address().expose_provenance();
            let prot = to_prot(inner.access());
            let watch = watches.watch(first, inner.size(), unit(&file), prot);
            // By now: whoever has watched it and does not any more has written it down before.
            if let Some(offset) = gone_before(&inner) {
                watch.note(offset);
            }
            Guarded { watch, inner }
        }))
    }

    /// Where the memory has gone bad: the offset of the first byte of this part that is known to be gone.
    pub fn fault_offset(&self) -> Option<usize> {
        let (gone, start) = (self.region_fault()?, self.start());
        (gone < start + self.len()).then(|| gone.saturating_sub(start))
    }
}

/// A region whose faults are caught.
struct Guarded {
    // Dropped before the memory: nobody may look for faults of what comes there next.
    watch: Watch,
    inner: Arc<dyn Region>,
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let Some(offset) = self.watch.fault_offset() else {
            return;
        };
        let mut gone = lock(GONE.get_or_init(Mutex::default));
        gone.retain(|gone| gone.region.strong_count() > 0 && !gone.is_of(&self.inner));
        if Arc::strong_count(&self.inner) > 1 {
            let region = Arc::downgrade(&self.inner);
            gone.push(Gone { region, offset });
        }
    }
}

impl Gone {
    fn is_of(&self, region: &Arc<dyn Region>) -> bool {
        ptr::addr_eq(self.region.as_ptr(), Arc::as_ptr(region))
    }
}

/// What of a region is known to be gone since it was watched the last time.
fn gone_before(region: &Arc<dyn Region>) -> Option<usize> {
    let gone = lock(GONE.get()?);
    let of_it = gone.iter().find(|gone| gone.is_of(region))?;
    Some(of_it.offset)
}

// SAFETY: it is the inner region, whose memory stays mapped: the handler only ever replaces it by other memory that
// allows as much.
unsafe impl Region for Guarded {
    fn host_address(&self) -> *mut u8 {
        self.inner.host_address()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn access(&self) -> Permissions {
        self.inner.access()
    }

    fn tracks(&self) -> bool {
        self.inner.tracks()
    }

    fn mark_dirty(&self, offset: usize, len: usize) {
        self.inner.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.inner.dirty_at(offset)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.inner.file_offset()
    }

    fn fault_offset(&self) -> Option<usize> {
        self.watch.fault_offset()
    }

    fn is_guarded(&self) -> bool {
        true
    }
}

fn cannot_shrink(file: &FileOffset) -> bool {
    // SAFETY: takes no pointers.
    let seals = unsafe { libc::fcntl(file.file().as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// What memory of the file can be replaced by: pages, on hugetlbfs large ones.
fn unit(file: &FileOffset) -> usize {
    let page = page_size() as usize;
    // SAFETY: all zeros are a value of it.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the structure can be written.
    let known = unsafe { libc::fstatfs(file.file().as_raw_fd(), &mut fs) } == 0;
    if known && fs.f_type == libc::HUGETLBFS_MAGIC {
        usize::try_from(fs.f_bsize).unwrap_or(page).max(page)
    } else {
        page
    }
}
