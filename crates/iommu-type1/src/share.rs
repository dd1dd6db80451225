// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mapping what one space has mapped into another, as `IOMMU_IOAS_COPY` does.

use std::ops::ControlFlow;

use checked_sync::lock;
use vm_memory::Permissions;

use crate::check::Request;
use crate::map::{check_backing, check_room, unmapping};
use crate::mapping::Need;
use crate::memory;
use crate::range::IovaRange;
use crate::{Backing, Error, IoAddressSpace, Result};

/// Parts of a range, and the memory of each.
type Parts = Vec<(IovaRange, Backing)>;

impl IoAddressSpace {
    /// Maps the memory of `size` bytes from `iova` at `to_iova` of another space, or of this one, for accesses
    /// that `prot` permits. Both then have the same memory; unmapping one changes nothing in the other.
    ///
    /// ```
    /// use iommu_type1::{Backing, IoAddressSpace, Profile};
    /// use vm_memory::Permissions::{Read, ReadWrite};
    ///
    /// let one = IoAddressSpace::builder().profile(Profile::Iommufd).build();
    /// let other = IoAddressSpace::builder().profile(Profile::Iommufd).build();
    /// one.map(0x4000, Backing::anonymous(0x2000)?, ReadWrite)?;
    /// one.copy_to(0x5000, 0x1000, &other, 0x8000, Read)?;
    /// one.write(0x5000, b"shared")?;
    /// let mut bytes = [0; 6];
    /// other.read(0x8000, &mut bytes)?;
    /// assert_eq!(&bytes, b"shared");
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// First of what is copied: what [`map`](IoAddressSpace::map) says of a request that is wrong in itself;
    /// [`Error::Unmapping`] or [`Error::VaddrInvalid`] (EBUSY); [`Error::NothingMapped`] (ENOENT) of the
    /// first part that is not mapped. Then what `map` says of where it is to be; [`Error::Permission`] (EPERM)
    /// where more is asked for than it was mapped for; those of [`map_batch`](IoAddressSpace::map_batch).
    ///
    /// With [`Profile::Iommufd`](crate::Profile::Iommufd) only the target need be whole pages: what is copied is
    /// looked at for that last.
    pub fn copy_to(
        &self,
        iova: u64,
        size: u64,
        to: &IoAddressSpace,
        to_iova: u64,
        prot: Permissions,
    ) -> Result<()> {
        let space = &*self.view.space;
        let request = Request {
            prot,
            ..Request::to_unmap(iova, size)
        };
        let to_request = Request {
            iova: to_iova,
            ..request
        };
        request.look(space, space.rules.copy_both)?;
        to_request.look(space, space.rules.copy_both)?;
        let range = request.check(space, space.rules.copy_from)?;
        let (parts, refused) = self.parts(range, prot)?;
        let target = &*to.view.space;
        let to_range = to_request.check(target, target.rules.map)?;
        // Of all of it before anything of a part.
        check_room(&lock(&target.writer), target, to_range)?;
        if let Some((at, refused)) = refused {
            for (part, backing) in &parts[..at] {
                check_backing(target, *part, backing, prot)?;
            }
            return Err(refused);
        }
        to.map_batch(parts.into_iter().map(|(part, backing)| {
            let offset = part.first - range.first;
            (to_range.first + offset, backing, prot)
        }))
    }

    /// The memory of a range, all of which is mapped, and the number of the first part that is not for `prot` with
    /// the error of that.
    fn parts(
        &self,
        range: IovaRange,
        prot: Permissions,
    ) -> Result<(Parts, Option<(usize, Error)>)> {
        let space = &*self.view.space;
        let writer = lock(&space.writer);
        if let Some(leaving) = writer.leaving_in(range) {
            return Err(match leaving.state.is_vaddr() {
                true => Error::VaddrInvalid {
                    iova: leaving.mapping.range.first,
                    completed: 0,
                    errno: libc::EBUSY,
                },
                false => unmapping(range, leaving),
            });
        }
        let mut parts = Vec::new();
        // The first address that is not found yet; none behind the last one there is.
        let mut next = Some(range.first);
        let hole = |next: u64| Error::NothingMapped {
            iova: next,
            size: range.last - next + 1,
        };
        let mut refused = None;
        let stopped = space.table.visit(range, |mapping| {
            let part = mapping.range.clamp(range);
            if next != Some(part.first) {
                return ControlFlow::Break(next.map(hole));
            }
            if refused.is_none() && !mapping.allows(Need::exactly(prot)) {
                let error = Error::Permission {
                    iova: part.first,
                    needed: prot,
                    allowed: mapping.permissions(),
                    completed: 0,
                };
                refused = Some((parts.len(), error));
            }
            if let Err(error) = memory::push(&mut parts, (part, mapping.backing(part))) {
                return ControlFlow::Break(Some(error));
            }
            next = part.last.checked_add(1);
            ControlFlow::Continue(())
        });
        if let Some(error) = stopped.flatten() {
            return Err(error);
        }
        match next {
            Some(next) if next <= range.last => Err(hole(next)),
            _ => Ok((parts, refused)),
        }
    }
}
