// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The space as vm-memory's traits see it: `Bytes` on the handle, `GuestMemory` on the guard.

use std::io;
use std::sync::atomic::Ordering;

use iommu_type1::{page_size, Backing, Error, IoAddressSpace};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, BitmapSlice};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryMmap, GuestMemoryRegion, Permissions, ReadVolatile, VolatileMemoryError,
    VolatileSlice, WriteVolatile,
};

use Permissions::{Read, ReadWrite, Write};

/// Pages 1 and 2 mapped one by one, page 3 read-only, nothing behind.
fn space() -> IoAddressSpace {
    let space = IoAddressSpace::new();
    for (page, prot) in [(1, ReadWrite), (2, ReadWrite), (3, Read)] {
        let backing = Backing::anonymous(page_size() as usize).unwrap();
        space.map(page * page_size(), backing, prot).unwrap();
    }
    space
}

/// The same answers through the handle and through a guard.
fn check_bytes<M: Bytes<GuestAddress>>(memory: &M)
where
    M::E: std::fmt::Debug,
{
    let p = page_size();
    let len = p as usize;
    let border = GuestAddress(2 * p - 3);
    memory.write_slice(b"border", border).unwrap();
    assert_eq!(memory.read_obj::<[u8; 6]>(border).unwrap(), *b"border");

    // What can be done is done, and counts.
    let data = vec![0x11; 4 * len];
    assert_eq!(memory.write(&data, GuestAddress(p)).unwrap(), 2 * len);
    assert_eq!(
        memory.read(&mut data.clone(), GuestAddress(p)).unwrap(),
        3 * len
    );
    memory.write_slice(&data, GuestAddress(p)).unwrap_err();
    memory.write(&data, GuestAddress(3 * p)).unwrap_err();
    memory
        .read(&mut [0; 8], GuestAddress(u64::MAX - 3))
        .unwrap_err();

    // No bytes always succeed.
    assert_eq!(memory.write(&[], GuestAddress(0)).unwrap(), 0);
    assert_eq!(memory.read(&mut [], GuestAddress(u64::MAX)).unwrap(), 0);
    memory.write_slice(&[], GuestAddress(0)).unwrap();
    assert_eq!(
        memory
            .read_volatile_from(GuestAddress(0), &mut &[1_u8][..], 0)
            .unwrap(),
        0
    );

    // Atomics lie in one mapping and are aligned.
    memory
        .store(0x1122_3344_u32, GuestAddress(p + 8), Ordering::Release)
        .unwrap();
    assert_eq!(
        memory
            .load::<u16>(GuestAddress(p + 10), Ordering::Acquire)
            .unwrap(),
        0x1122
    );
    memory
        .load::<u64>(GuestAddress(2 * p - 4), Ordering::Relaxed)
        .unwrap_err();
    memory
        .load::<u32>(GuestAddress(p + 2), Ordering::Relaxed)
        .unwrap_err();
    memory
        .store(1_u8, GuestAddress(3 * p), Ordering::Relaxed)
        .unwrap_err();

    // Streams cross mappings, and end where the reader ends or the memory does.
    let source = vec![0x77; len + 100];
    let at = GuestAddress(2 * p - 100);
    assert_eq!(
        memory
            .read_volatile_from(at, &mut &source[..], len + 50)
            .unwrap(),
        len + 50
    );
    let mut sink = Vec::new();
    assert_eq!(
        memory.write_volatile_to(at, &mut sink, len + 50).unwrap(),
        len + 50
    );
    assert_eq!(sink, source[..len + 50]);
    assert_eq!(
        memory
            .read_volatile_from(at, &mut &source[..10], 20)
            .unwrap(),
        10
    );
    memory
        .read_exact_volatile_from(at, &mut &source[..10], 20)
        .unwrap_err();
    memory
        .write_all_volatile_to(GuestAddress(3 * p), &mut sink, 2 * len)
        .unwrap_err();
}

#[test]
fn bytes_on_the_handle() {
    check_bytes(&space().handle());
}

#[test]
fn bytes_on_the_guard() {
    check_bytes(&*space().memory());
}

#[test]
fn the_errors_of_a_guard_are_ours_inside() {
    let error = space()
        .memory()
        .write_slice(&[1], GuestAddress(3 * page_size()))
        .unwrap_err();
    let GuestMemoryError::IOError(error) = error else {
        panic!("{error}");
    };
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    let ours = error.get_ref().unwrap().downcast_ref::<Error>().unwrap();
    assert_eq!(ours.errno(), libc::EPERM);
}

#[test]
fn slices_are_one_a_mapping_and_end_with_the_first_error() {
    let p = page_size() as usize;
    let guard = space().memory();
    let lens = |addr, count, access| -> Vec<Result<usize, usize>> {
        let slices = guard.get_slices(GuestAddress(addr), count, access).unwrap();
        slices
            .map(|slice| {
                slice
                    .map(|slice| slice.len())
                    .map_err(|error| completed(&error))
            })
            .collect()
    };
    assert_eq!(lens(p as u64 + 1, 2 * p, Read), [Ok(p - 1), Ok(p), Ok(1)]);
    assert_eq!(
        lens(p as u64 + 1, 4 * p, Read),
        [Ok(p - 1), Ok(p), Ok(p), Err(3 * p - 1)]
    );
    assert_eq!(lens(2 * p as u64, 2 * p, Write), [Ok(p), Err(p)]);
    assert_eq!(lens(0, 0, Read), []);
    let mut overflowing = guard.get_slices(GuestAddress(u64::MAX), 2, Read).unwrap();
    let error = overflowing.next().unwrap().unwrap_err().to_string();
    assert!(
        error.contains("0x2 bytes at 0xffffffffffffffff end beyond"),
        "{error}"
    );
    assert!(overflowing.next().is_none());
}

#[test]
fn a_chunk_is_the_rest_of_its_mapping_never_a_page() {
    let p = page_size() as usize;
    let space = IoAddressSpace::new();
    space
        .map(0, Backing::anonymous(64 * p).unwrap(), ReadWrite)
        .unwrap();
    let list = space.scatter(p as u64 / 2, 50 * p, Read).unwrap();
    assert_eq!(
        list.iter().map(|slice| slice.len()).collect::<Vec<_>>(),
        [50 * p]
    );
}

fn completed(error: &GuestMemoryError) -> usize {
    match error {
        GuestMemoryError::IOError(error) => error
            .get_ref()
            .unwrap()
            .downcast_ref::<Error>()
            .unwrap()
            .completed(),
        other => panic!("{other}"),
    }
}

#[test]
fn check_range_asks_without_leasing() {
    let p = page_size();
    let space = space();
    let guard = space.memory();
    assert!(guard.check_range(GuestAddress(p), 3 * p as usize, Read));
    assert!(!guard.check_range(GuestAddress(p), 3 * p as usize, Write));
    assert!(!guard.check_range(GuestAddress(0), 1, Read));
    assert!(guard.check_range(GuestAddress(0), 0, Read));
    assert!(!guard.check_range(GuestAddress(u64::MAX), 2, Read));
    assert!(guard.physical_memory().is_none());
    assert_eq!(space.unmap(p, 3 * p).unwrap(), 3 * p);
}

#[test]
fn dma_writes_reach_the_dirty_log_of_the_vmm() {
    let p = page_size();
    let memory =
        GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), 8 * p as usize)]).unwrap();
    let dirty = |page: u64| {
        let region = memory.iter().next().unwrap();
        GuestMemoryRegion::bitmap(region).dirty_at((page * p) as usize)
    };
    let space = IoAddressSpace::new();
    let backing = Backing::from_guest_memory(&memory, GuestAddress(2 * p), 4 * p as usize).unwrap();
    space.map(0x1000_0000, backing, ReadWrite).unwrap();

    // B2: a write of 2 bytes over a page border dirties both pages.
    space.write(0x1000_0000 + p - 1, &[1, 2]).unwrap();
    assert_eq!([1, 2, 3, 4].map(dirty), [false, true, true, false]);
    space
        .memory()
        .write_obj(1_u8, GuestAddress(0x1000_0000 + 3 * p))
        .unwrap();
    assert!(dirty(5));
    space.read(0x1000_0000 + 2 * p, &mut [0; 8]).unwrap();
    assert!(!dirty(4));
}

/// A reader that unmaps in the middle of the access that called it.
struct Unmaps(IoAddressSpace, Option<i32>);

impl ReadVolatile for Unmaps {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let error = self.0.unmap(page_size(), page_size()).unwrap_err();
        assert!(matches!(error, Error::InsideAccess { .. }));
        self.1 = Some(error.errno());
        Ok(buf.len())
    }
}

impl WriteVolatile for Unmaps {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        _: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        Err(VolatileMemoryError::IOError(io::Error::from_raw_os_error(
            libc::EPIPE,
        )))
    }
}

#[test]
fn an_unmap_from_inside_ones_own_access_fails_at_once() {
    let p = page_size();
    let space = space();
    let mut reader = Unmaps(space.clone(), None);
    space
        .handle()
        .read_volatile_from(GuestAddress(p), &mut reader, 8)
        .unwrap();
    assert_eq!(reader.1, Some(libc::EDEADLK));
    assert_eq!(space.unmap(p, p).unwrap(), p);
}

#[test]
fn a_stream_that_runs_out_of_memory_says_why_and_how_far_it_came() {
    let p = page_size();
    let handle = space().handle();
    let source = vec![1; 4 * p as usize];
    let error = handle
        .read_exact_volatile_from(GuestAddress(p), &mut &source[..], 3 * p as usize)
        .unwrap_err();
    assert_eq!(
        (error.errno(), error.completed()),
        (libc::EPERM, 2 * p as usize)
    );
    let error = handle
        .write_all_volatile_to(GuestAddress(2 * p), &mut Vec::new(), 3 * p as usize)
        .unwrap_err();
    assert_eq!(
        (error.errno(), error.completed()),
        (libc::EINVAL, 2 * p as usize)
    );
    let error = handle
        .read_exact_volatile_from(GuestAddress(p), &mut &source[..10], 20)
        .unwrap_err();
    assert_eq!((error.errno(), error.completed()), (libc::EIO, 10));
}

#[test]
fn a_stream_that_fails_says_where_and_why() {
    let p = page_size();
    let space = space();
    let mut writer = Unmaps(space.clone(), None);
    let error = space
        .handle()
        .write_volatile_to(GuestAddress(p), &mut writer, 8)
        .unwrap_err();
    assert_eq!((error.errno(), error.completed()), (libc::EPIPE, 0));
    assert_eq!(space.unmap(p, p).unwrap(), p);
}

#[test]
fn a_stream_that_may_end_early_fails_only_at_its_first_byte() {
    let p = page_size();
    let len = p as usize;
    let handle = space().handle();
    let source = vec![7; 4 * len];
    let fill = |at| handle.read_volatile_from(GuestAddress(at), &mut &source[..], 4 * len);
    assert_eq!(fill(p).unwrap(), 2 * len);
    for (at, errno) in [(3 * p, libc::EPERM), (4 * p, libc::EINVAL)] {
        let error = fill(at).unwrap_err();
        assert_eq!((error.errno(), error.completed()), (errno, 0));
    }
    let drain = |at| {
        let mut sink = Vec::new();
        let drained = handle.write_volatile_to(GuestAddress(at), &mut sink, 4 * len);
        drained.map(|count| (count, sink.len()))
    };
    assert_eq!(drain(p).unwrap(), (3 * len, 3 * len));
    assert_eq!(drain(4 * p).unwrap_err().errno(), libc::EINVAL);
}

/// Answers as it is told, and gives one byte a call when there is nothing more to answer.
struct Answers(Vec<VolatileMemoryError>);

impl ReadVolatile for Answers {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        match self.0.pop() {
            Some(error) => Err(error),
            None => Ok(buf.write(&[7], 0).unwrap()),
        }
    }
}

fn from_io(kind: io::ErrorKind) -> VolatileMemoryError {
    VolatileMemoryError::IOError(kind.into())
}

#[test]
fn a_stream_that_is_interrupted_goes_on() {
    let p = page_size();
    let handle = space().handle();
    let interrupted = || from_io(io::ErrorKind::Interrupted);
    let mut source = Answers(vec![interrupted(), interrupted()]);
    let at = GuestAddress(p);
    assert_eq!(handle.read_volatile_from(at, &mut source, 1).unwrap(), 1);
    assert!(source.0.is_empty());
    assert_eq!(handle.read_obj::<u8>(at).unwrap(), 7);
}

/// What is no error of the system is EIO, and says what it was.
#[test]
fn a_stream_whose_source_is_broken_says_so() {
    let p = page_size();
    let mut source = Answers(vec![VolatileMemoryError::OutOfBounds { addr: 77 }]);
    let error = space()
        .handle()
        .read_exact_volatile_from(GuestAddress(p), &mut source, 1)
        .unwrap_err();
    assert_eq!((error.errno(), error.completed()), (libc::EIO, 0));
    let Error::Stream { iova, source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(iova, p);
    let inner = source.get_ref().unwrap().downcast_ref();
    assert!(matches!(
        inner,
        Some(VolatileMemoryError::OutOfBounds { addr: 77 })
    ));
}
