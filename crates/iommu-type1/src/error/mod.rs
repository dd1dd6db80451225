// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong: the values of each case, and how it travels.

mod errno;

use std::io;
use std::time::Duration;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{GuestMemoryError, Permissions};

use crate::holder::{Holder, Listed};

pub use errno::errno_of;

/// Errors of an IO address space.
///
/// [`errno`](Error::errno) is what Linux 6.18 and later answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A mapping, unmapping or kernel-shaped access of no bytes.
    #[error("a range of no bytes at {iova:#x}")]
    Empty {
        /// Start of the range.
        iova: u64,
    },
    /// An address or size that is not a multiple of its unit.
    #[error("{what} {value:#x} is not a multiple of {unit:#x}")]
    Misaligned {
        /// What was misaligned.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it has to be a multiple of, in bytes.
        unit: u64,
    },
    /// A range that does not fit the 64-bit address space.
    #[error("{size:#x} bytes at {iova:#x} end beyond the 64-bit address space")]
    Overflow {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// Memory that does not fit the address space of this process.
    #[error("{size:#x} bytes at host address {host:#x} end beyond the 64-bit address space")]
    HostOverflow {
        /// Start of the memory.
        host: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The memory behind a mapping is gone: its file has become shorter. Only of memory that is
    /// [guarded](crate::Backing).
    #[error("the memory behind {iova:#x} is gone, {completed} bytes were done before")]
    Fault {
        /// The first address without memory.
        iova: u64,
        /// Bytes of the access that were done before.
        completed: usize,
    },
    /// A mapping that nobody could use.
    #[error("the mapping at {iova:#x} would allow neither reads nor writes")]
    NoPermissions {
        /// Start of the mapping.
        iova: u64,
    },
    /// The memory behind a mapping does not allow in this process what the mapping should allow.
    #[error(
        "the mapping at {iova:#x} would allow {asked:?}, the memory behind it only {allowed:?}"
    )]
    BackingProtection {
        /// Start of the mapping.
        iova: u64,
        /// Permissions of the mapping.
        asked: Permissions,
        /// Permissions of the memory.
        allowed: Permissions,
    },
    /// By the rules of iommufd: a mapping of a file that was not opened for what it should allow.
    #[error("the mapping at {iova:#x} would allow {asked:?}, the file behind it only {allowed:?}")]
    FileProtection {
        /// Start of the mapping.
        iova: u64,
        /// Permissions of the mapping.
        asked: Permissions,
        /// Permissions of the file.
        allowed: Permissions,
    },
    /// A part of a memory region or a file that is not there.
    #[error(
        "{len:#x} bytes at offset {offset:#x} are not inside a region or file of {size:#x} bytes"
    )]
    BackingRange {
        /// Offset in the region or file.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Size of the region or file.
        size: u64,
    },
    /// No guest memory region holds this guest physical address.
    #[error("no memory region at guest physical address {0:#x}")]
    NoRegion(u64),
    /// Memory could not be mapped into this process.
    #[error("{len:#x} bytes of memory: {source}")]
    Mmap {
        /// Bytes asked for.
        len: usize,
        /// What vm-memory says.
        source: MmapRegionError,
    },
    /// The range overlaps a mapping.
    #[error(
        "{size:#x} bytes at {iova:#x} overlap the mapping of {mapped_size:#x} bytes at {mapped:#x}"
    )]
    Overlap {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
        /// Start of the mapping in the way.
        mapped: u64,
        /// Its size in bytes.
        mapped_size: u64,
    },
    /// As many mappings as the space may have.
    #[error("the limit of {limit} mappings is reached")]
    EntryLimit {
        /// The limit.
        limit: usize,
    },
    /// The table of mappings takes as much memory as it may.
    #[error("the table of mappings takes {bytes:#x} bytes, the limit is {limit:#x}")]
    TableLimit {
        /// Bytes of the table's nodes.
        bytes: usize,
        /// Most bytes they may take.
        limit: usize,
    },
    /// As many listeners as a space may have.
    #[error("the limit of {limit} listeners is reached")]
    ListenerLimit {
        /// The limit.
        limit: usize,
    },
    /// There is no memory for what the request needs: nodes of the table, marks of pages, or lists as long as the
    /// request says or as there are mappings.
    #[error("no memory: an allocation of {bytes:#x} bytes failed")]
    NoMemory {
        /// Bytes that were asked for.
        bytes: usize,
    },
    /// The marks of dirty pages would take more memory than they may.
    #[error("the marks of dirty pages would take {bytes:#x} bytes, the limit is {limit:#x}")]
    DirtyLimit {
        /// Bytes they would take.
        bytes: usize,
        /// Most bytes they may take.
        limit: usize,
    },
    /// An unmap that would leave a part of a mapping, or dirty pages of a part of one.
    #[error("{size:#x} bytes at {iova:#x} would cut the mapping of {mapped_size:#x} bytes at {mapped:#x}")]
    Bisect {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
        /// Start of the mapping that would be cut.
        mapped: u64,
        /// Its size in bytes.
        mapped_size: u64,
        /// What the profile answers.
        errno: i32,
    },
    /// An unmap, replacement or copy of what is not mapped.
    #[error("nothing is mapped in {size:#x} bytes at {iova:#x}")]
    NothingMapped {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// An access to, or a second invalidation of, a mapping whose memory was taken away
    /// ([`IoAddressSpace::invalidate_vaddr`](crate::IoAddressSpace::invalidate_vaddr)).
    #[error("the mapping at {iova:#x} has no memory at the moment ({completed} bytes were done)")]
    VaddrInvalid {
        /// The address.
        iova: u64,
        /// Bytes done before.
        completed: usize,
        /// EBUSY of an access, EINVAL of an invalidation.
        errno: i32,
    },
    /// Memory was given to a range that is not exactly a mapping without memory.
    #[error(
        "{size:#x} bytes at {iova:#x} are not exactly a mapping without memory, but touch that of {mapped_size:#x} bytes at {mapped:#x}"
    )]
    VaddrValid {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
        /// Start of the mapping that was found.
        mapped: u64,
        /// Its size in bytes.
        mapped_size: u64,
    },
    /// Memory cannot be taken away from a mapping of which pages are pinned.
    #[error("pages of {size:#x} bytes at {iova:#x} are pinned")]
    Pinned {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The profile of the space does not know the operation.
    #[error("{0} is not known to the profile of the space")]
    NotInProfile(&'static str),
    /// A map or unmap of a range whose addresses another unmap has not given back yet: it is running,
    /// or has ended at its deadline ([`Error::Deadline`]) and waits to be tried again.
    #[error(
        "{size:#x} bytes at {iova:#x} overlap the mapping of {mapped_size:#x} bytes at {mapped:#x}, whose unmap has not finished"
    )]
    Unmapping {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
        /// Start of the mapping in the way.
        mapped: u64,
        /// Its size in bytes.
        mapped_size: u64,
    },
    /// An access to a mapping that is being unmapped, or whose unmap has ended at its deadline and
    /// waits to be tried again.
    #[error("{iova:#x} is revoked, its unmap has not finished ({completed} bytes were done)")]
    Revoked {
        /// The address.
        iova: u64,
        /// Bytes done before.
        completed: usize,
    },
    /// Nothing is mapped at an address.
    #[error("{iova:#x} is not mapped ({completed} bytes were done)")]
    NotMapped {
        /// The address.
        iova: u64,
        /// Bytes done before.
        completed: usize,
        /// What the profile answers.
        errno: i32,
    },
    /// The mapping does not permit the access.
    #[error("{iova:#x} is mapped for {allowed:?}, the access needs {needed:?} ({completed} bytes were done)")]
    Permission {
        /// The address.
        iova: u64,
        /// What the access needs: a write needs [`Permissions::ReadWrite`], unless permissions are
        /// [`Strict`](crate::PermissionPolicy::Strict).
        needed: Permissions,
        /// What the mapping permits.
        allowed: Permissions,
        /// Bytes done before.
        completed: usize,
    },
    /// An unmap whose holders did not let go in time.
    #[error("{unmapped:#x} bytes were unmapped, {left:#x} bytes are still held: {}", Listed(.holders))]
    Deadline {
        /// Bytes that are unmapped now.
        unmapped: u64,
        /// Bytes of the range that are still held.
        left: u64,
        /// Who holds them.
        holders: Vec<Holder>,
    },
    /// An unmap from inside an access of the same space on the same thread: it would wait for itself.
    #[error(
        "{size:#x} bytes at {iova:#x} cannot be unmapped from inside an access of the same space"
    )]
    InsideAccess {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// A map or unmap from inside a call to a [`Listener`](crate::Listener) of the same space: it would wait
    /// for itself.
    #[error(
        "{size:#x} bytes at {iova:#x} cannot be mapped or unmapped from inside a listener of the same space"
    )]
    InsideListener {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// A [`MappingSet`](crate::MappingSet) has nothing to do with a mapping of the range.
    #[error(
        "{size:#x} bytes at {iova:#x} touch the mapping of {mapped_size:#x} bytes at {mapped:#x}, which belongs to others"
    )]
    NotOwned {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
        /// Start of the mapping.
        mapped: u64,
        /// Its size in bytes.
        mapped_size: u64,
    },
    /// A [`Listener`](crate::Listener) did not want the mapping.
    #[error("the mapping of {size:#x} bytes at {iova:#x} was refused: {source}")]
    Refused {
        /// Start of the mapping.
        iova: u64,
        /// Its size in bytes.
        size: u64,
        /// What the listener said.
        source: io::Error,
    },
    /// Dirty pages were asked for while nobody keeps them.
    #[error("{size:#x} bytes at {iova:#x}: which pages are written is not tracked")]
    NotTracking {
        /// Start of the range.
        iova: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// An access outlasted what waited for it, as its copy is very long or its thread does not get the
    /// processor.
    #[error("an access has been running for {waited:.1?}")]
    AccessRuns {
        /// For how long it was waited for.
        waited: Duration,
    },
    /// The reader or writer of a stream failed.
    #[error("streaming at {iova:#x} ({completed} bytes were done): {source}")]
    Stream {
        /// Where the stream was.
        iova: u64,
        /// Bytes done before.
        completed: usize,
        /// What the reader or writer said.
        source: io::Error,
    },
    /// A range of addresses that ends before it begins, or where it begins.
    #[error("{first:#x} to {last:#x} is no range of addresses that may be mapped")]
    EmptyRange {
        /// Its first address.
        first: u64,
        /// Its last address.
        last: u64,
    },
    /// Two ranges of one list overlap.
    #[error("the ranges {first:#x} to {last:#x} and from {other:#x} overlap")]
    RangesOverlap {
        /// First address of the one.
        first: u64,
        /// Last address of the one.
        last: u64,
        /// First address of the other.
        other: u64,
    },
    /// A range of addresses that may not be as something else has, or is mapped at, a part of it.
    #[error("{first:#x} to {last:#x} is in the way of {other:#x} to {other_last:#x}")]
    RangeInUse {
        /// First address of the range.
        first: u64,
        /// Last address of the range.
        last: u64,
        /// First address of what is in its way.
        other: u64,
        /// Last address of what is in its way.
        other_last: u64,
    },
    /// A mapping that may be anywhere, and no gap is large enough.
    #[error("no room for {size:#x} bytes at a multiple of {alignment:#x}")]
    NoRoom {
        /// Its size in bytes.
        size: u64,
        /// What its address has to be a multiple of.
        alignment: u64,
    },
    /// A mapping of addresses that may not be mapped.
    #[error("{size:#x} bytes at {iova:#x} are outside of the ranges that may be mapped")]
    OutsideRanges {
        /// Start of the mapping.
        iova: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// A bitmap of dirty pages whose bits stand for something else than pages of the smallest size.
    #[error("a bitmap of pages of {page_size:#x} bytes, not {unit:#x}")]
    BitmapPageSize {
        /// Bytes that a bit stands for.
        page_size: u64,
        /// Bytes that it has to stand for.
        unit: u64,
    },
    /// A bitmap of dirty pages that is empty, too small or too large.
    #[error("a bitmap of {bytes:#x} bytes for {pages:#x} pages")]
    BitmapSize {
        /// Pages that it is of.
        pages: u64,
        /// Bytes that it has.
        bytes: u64,
    },
    /// A mapping of more pages than can be kept whether they are dirty.
    #[error("{pages:#x} pages of the mapping at {iova:#x} cannot be tracked, at most {limit:#x}")]
    DirtyMapping {
        /// Start of the mapping.
        iova: u64,
        /// Its pages.
        pages: u64,
        /// Most pages of one.
        limit: u64,
    },
    /// Flags of an ioctl that are not known, or not together.
    #[error("the flags {flags:#x} of {what}")]
    Flags {
        /// Of which ioctl.
        what: &'static str,
        /// The flags.
        flags: u32,
    },
    /// An unmap of everything that also says what to unmap.
    #[error("{size:#x} bytes at {iova:#x} are given where everything is meant")]
    UnmapAllRange {
        /// The address that was given.
        iova: u64,
        /// The size that was given.
        size: u64,
    },
    /// Dirty pages of a type1 v1 IOMMU, which keeps none.
    #[error("a type1 v1 IOMMU does not keep dirty pages")]
    NoDirtyPages,
    /// The argument of an ioctl is shorter than its struct.
    #[error("an argument of {argsz} bytes, of at least {min}")]
    ArgumentSize {
        /// Bytes it says that it has.
        argsz: u32,
        /// Bytes it has to have.
        min: u32,
    },
    /// The argument of an ioctl is not all there.
    #[error("an argument of {len:#x} bytes where {needed:#x} are looked for")]
    ArgumentMemory {
        /// Bytes that are looked for.
        needed: u64,
        /// Bytes that are there.
        len: u64,
    },
    /// The answer to `VFIO_IOMMU_GET_INFO` is not what it should be.
    #[error("the capabilities of an IOMMU are wrong at offset {offset:#x}")]
    InfoChain {
        /// Where.
        offset: usize,
    },
    /// A pinner that is attached to no space, or on its way to another.
    #[error("{name} is not attached to a space")]
    NotAttached {
        /// Name of the pinner.
        name: String,
    },
    /// A pinner that is attached to a space already.
    #[error("{name} is attached to a space already")]
    Attached {
        /// Name of the pinner.
        name: String,
    },
    /// A pinner that another call is moving.
    #[error("{name} is on its way to another space")]
    Moving {
        /// Name of the pinner.
        name: String,
    },
    /// The profile of the space lets nobody pin pages ([`Profile::pins`](crate::Profile::pins)).
    #[error("pages are not pinned by the rules of VFIO_TYPE1_IOMMU")]
    NoPins,
    /// A space cannot be made of a snapshot.
    #[error(transparent)]
    Snapshot(#[from] crate::SnapshotError),
    /// Pinning or unpinning was refused.
    #[error(transparent)]
    Pin(#[from] page_pin::Error),
}

/// Result of an IO address space.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Bytes that an access had done before it failed. Pins and scatter lists come whole or not at all: of these it
    /// is how many bytes could be had.
    pub fn completed(&self) -> usize {
        match self {
            Error::Revoked { completed, .. }
            | Error::NotMapped { completed, .. }
            | Error::VaddrInvalid { completed, .. }
            | Error::Permission { completed, .. }
            | Error::Fault { completed, .. }
            | Error::Stream { completed, .. } => *completed,
            _ => 0,
        }
    }

    /// The same error of an access that had done `before` bytes when this part of it began.
    pub(crate) fn after(mut self, before: usize) -> Self {
        if let Error::Revoked { completed, .. }
        | Error::NotMapped { completed, .. }
        | Error::VaddrInvalid { completed, .. }
        | Error::Permission { completed, .. }
        | Error::Fault { completed, .. }
        | Error::Stream { completed, .. } = &mut self
        {
            *completed += before;
        }
        self
    }
}

/// vm-memory has no room for our errors: they travel in its I/O error, and
/// [`io::Error::get_ref`] finds them again.
impl From<Error> for GuestMemoryError {
    fn from(error: Error) -> Self {
        let kind = io::Error::from_raw_os_error(error.errno()).kind();
        GuestMemoryError::IOError(io::Error::new(kind, error))
    }
}

/// Its errno, for those who answer with one. The values are in the error alone: log them before.
///
/// ```
/// use std::io;
/// use iommu_type1::IoAddressSpace;
///
/// fn unmap(space: &IoAddressSpace) -> io::Result<u64> {
///     Ok(space.unmap(1, 0x1000)?)
/// }
/// let error = unmap(&IoAddressSpace::new()).unwrap_err();
/// assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
/// ```
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::from_raw_os_error(error.errno())
    }
}
