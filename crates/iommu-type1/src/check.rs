// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be wrong with a request whatever is mapped. In which order it is looked at is a rule of the
//! profile.

use vm_memory::Permissions;

use crate::range::{check_aligned, IovaRange};
use crate::space::Space;
use crate::{Backing, Error, Result};

/// One thing that is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    NotEmpty,
    Fits,
    HostFits,
    /// The memory ends before the last address there is.
    HostEnds,
    /// Neither the address nor the size is the largest number.
    BelowMax,
    Permits,
    AddressAligned,
    SizeAligned,
    HostAligned,
}

/// What somebody wants, as the kernel is told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) iova: u64,
    pub(crate) size: u64,
    pub(crate) host: u64,
    pub(crate) prot: Permissions,
}

impl Request {
    pub(crate) fn to_map(iova: u64, backing: &Backing, prot: Permissions) -> Self {
        Request {
            iova,
            size: backing.len() as u64,
            host: backing.host_address().addr() as u64,
            prot,
        }
    }

    /// Of addresses alone.
    pub(crate) fn to_unmap(iova: u64, size: u64) -> Self {
        Request {
            iova,
            size,
            host: 0,
            prot: Permissions::ReadWrite,
        }
    }

    /// The range, if nothing is wrong with it.
    pub(crate) fn check(&self, space: &Space, checks: &[Check]) -> Result<IovaRange> {
        self.look(space, checks)?;
        IovaRange::new(self.iova, self.size)
    }

    /// Looks at some things only.
    pub(crate) fn look(&self, space: &Space, checks: &[Check]) -> Result<()> {
        let unit = space.unit();
        // In which order to look matters only where there is something to find.
        if checks.is_empty() || self.is_sound(unit) {
            return Ok(());
        }
        self.look_at_all(checks, unit)
    }

    #[cold]
    fn look_at_all(&self, checks: &[Check], unit: u64) -> Result<()> {
        checks
            .iter()
            .try_for_each(|check| self.look_at(*check, unit))
    }

    /// Whether nothing is wrong with it that could be.
    #[inline]
    fn is_sound(&self, unit: u64) -> bool {
        let aligned = (self.iova | self.size | self.host) & (unit - 1) == 0;
        // The largest number is not aligned.
        let fits = |start: u64| start.checked_add(self.size.wrapping_sub(1)).is_some();
        let host_ends = self.host.checked_add(self.size).is_some();
        aligned && self.size != 0 && fits(self.iova) && host_ends && self.prot != Permissions::No
    }

    fn look_at(&self, check: Check, unit: u64) -> Result<()> {
        let (iova, size) = (self.iova, self.size);
        // Of nothing, and so never beyond the end.
        let length = size.saturating_sub(1);
        match check {
            Check::NotEmpty if size == 0 => Err(Error::Empty { iova }),
            Check::Fits if iova.checked_add(length).is_none() => {
                Err(Error::Overflow { iova, size })
            }
            Check::HostFits if self.host.checked_add(length).is_none() => {
                let host = self.host;
                Err(Error::HostOverflow { host, size })
            }
            Check::HostEnds if self.host.checked_add(size).is_none() => {
                let host = self.host;
                Err(Error::HostOverflow { host, size })
            }
            Check::BelowMax if iova == u64::MAX || size == u64::MAX => {
                Err(Error::Overflow { iova, size })
            }
            Check::Permits if self.prot == Permissions::No => Err(Error::NoPermissions { iova }),
            Check::AddressAligned => check_aligned("address", iova, unit),
            Check::SizeAligned => check_aligned("size", size, unit),
            Check::HostAligned => check_aligned("host address", self.host, unit),
            _ => Ok(()),
        }
    }
}

/// A range as the kernel takes it.
pub(crate) fn whole_pages(space: &Space, iova: u64, size: u64) -> Result<IovaRange> {
    check_aligned("address", iova, space.unit())?;
    check_aligned("size", size, space.unit())?;
    IovaRange::new(iova, size)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::range::page_size;

    const ALL: [Check; 9] = [
        Check::NotEmpty,
        Check::Fits,
        Check::HostFits,
        Check::HostEnds,
        Check::BelowMax,
        Check::Permits,
        Check::AddressAligned,
        Check::SizeAligned,
        Check::HostAligned,
    ];

    /// Numbers near both ends, mostly aligned.
    fn number() -> impl Strategy<Value = u64> {
        let pages = prop_oneof![0..4_u64, (0..4_u64).prop_map(|n| n.wrapping_neg())];
        (pages, prop_oneof![4 => Just(0), 1 => any::<u64>()])
            .prop_map(|(pages, more)| pages.wrapping_mul(page_size()).wrapping_add(more))
    }

    proptest! {
        #[test]
        fn what_is_sound_passes_every_check_and_nothing_else_does(
            iova in number(),
            size in number(),
            host in number(),
            permits: bool,
        ) {
            let prot = if permits { Permissions::Write } else { Permissions::No };
            let request = Request { iova, size, host, prot };
            let passes = ALL
                .iter()
                .all(|check| request.look_at(*check, page_size()).is_ok());
            prop_assert_eq!(request.is_sound(page_size()), passes);
        }
    }
}
