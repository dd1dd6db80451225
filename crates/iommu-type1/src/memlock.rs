// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pinned pages under the limit of locked memory.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use page_pin::{Account, PinnedPage, Refusal};

use crate::range::page_size;

/// Charges pinned pages to `RLIMIT_MEMLOCK`: they are locked in memory (`mlock(2)`) while they are
/// pinned, and the kernel counts them.
///
/// A host page is locked and counted once, however many spaces have it pinned at however many
/// addresses; the kernel's own type1 charges it once for each address, as a
/// [`Quota`](page_pin::Quota) does. The last unpin unlocks it, also if the process has locked it by
/// other means: those who do (`mlockall`) do not need this.
///
/// A page beyond the limit is refused with ENOMEM, any page with EPERM where the limit is 0; a process
/// with `CAP_IPC_LOCK` has no limit.
///
/// ```
/// use std::sync::Arc;
/// use iommu_type1::{Backing, Interest, IoAddressSpace, MemlockLimit, PinOptions};
/// use vm_memory::Permissions;
///
/// let space = IoAddressSpace::builder()
///     .pin_options(PinOptions::new().account(Arc::new(MemlockLimit)))
///     .build();
/// space.map(0, Backing::anonymous(0x1_0000)?, Permissions::ReadWrite)?;
/// let pinner = space.pinner("nic", Interest::Holder, Arc::new(|_, _| ()));
/// let pinned = pinner.pin_pages(0, 1, Permissions::ReadWrite)?;
/// # Ok::<(), iommu_type1::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct MemlockLimit;

/// Who has which host page locked: of the process, as the locks themselves are.
static LOCKED: Mutex<BTreeMap<usize, u64>> = Mutex::new(BTreeMap::new());

fn locked() -> MutexGuard<'static, BTreeMap<usize, u64>> {
    LOCKED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Account for MemlockLimit {
    fn charge(&self, pages: &[PinnedPage]) -> std::result::Result<(), Refusal> {
        let mut locked = locked();
        for (index, page) in pages.iter().enumerate() {
            let result = page.host.ok_or(libc::EFAULT).and_then(|host| {
                let users = locked.get(&host).copied().unwrap_or(0);
                if users == 0 {
                    mlock(host)?;
                }
                locked.insert(host, users + 1);
                Ok(())
            });
            if let Err(errno) = result {
                give_back(&mut locked, &pages[..index]);
                return Err(Refusal { index, errno });
            }
        }
        Ok(())
    }

    fn uncharge(&self, pages: &[PinnedPage]) {
        give_back(&mut locked(), pages);
    }
}

fn give_back(locked: &mut BTreeMap<usize, u64>, pages: &[PinnedPage]) {
    for host in pages.iter().filter_map(|page| page.host) {
        match locked.get_mut(&host) {
            Some(users) if *users > 1 => *users -= 1,
            Some(_) => {
                locked.remove(&host);
                munlock(host);
            }
            None => (),
        }
    }
}

fn errno() -> i32 {
    let error = std::io::Error::last_os_error();
    error.raw_os_error().unwrap_or(libc::ENOMEM)
}

fn mlock(host: usize) -> std::result::Result<(), i32> {
    let page = host as *const libc::c_void;
    // SAFETY: locking changes no memory, and the kernel refuses an address that is not mapped.
    let refused = unsafe { libc::mlock(page, page_size() as usize) } != 0;
    if refused {
        Err(errno())
    } else {
        Ok(())
    }
}

fn munlock(host: usize) {
    let page = host as *const libc::c_void;
    // SAFETY: as in `mlock`.
    if unsafe { libc::munlock(page, page_size() as usize) } != 0 {
        log::warn!("munlock of the page at {host:#x}: errno {}", errno());
    }
}
