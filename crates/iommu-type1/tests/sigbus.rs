// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files that get shorter while they are accessed.

#[path = "common/deadline.rs"]
mod deadline;

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;

use deadline::{must_end, within, Over};
use iommu_type1::{page_size, Backing, Error, Interest, IoAddressSpace};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};
use Permissions::{Read, ReadWrite};

fn memfd(len: u64, flags: u32) -> File {
    // SAFETY: the name ends with a NUL.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags) };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    file
}

fn backing(file: &File, len: u64) -> Backing {
    let file = FileOffset::new(file.try_clone().unwrap(), 0);
    Backing::file(file, len as usize, ReadWrite).unwrap()
}

/// `pages` pages of a file at 0, guarded.
fn space_of(pages: u64) -> (IoAddressSpace, File) {
    let len = pages * page_size();
    let file = memfd(len, 0);
    let space = IoAddressSpace::new();
    let memory = backing(&file, len).guarded().unwrap();
    space.map(0, memory, ReadWrite).unwrap();
    (space, file)
}

fn assert_fault(error: Error, iova: u64, completed: usize) {
    assert_eq!(error.errno(), libc::EFAULT, "{error}");
    assert_eq!(error.completed(), completed, "{error}");
    assert!(
        matches!(error, Error::Fault { iova: at, .. } if at == iova),
        "{error}"
    );
}

#[test]
fn a_read_says_how_many_bytes_were_there() {
    let page = page_size() as usize;
    let (space, file) = space_of(8);
    space.write(0, &vec![7; 8 * page]).unwrap();
    file.set_len(3 * page_size()).unwrap();
    let mut buf = vec![1; 6 * page];
    let error = space.read(page as u64, &mut buf).unwrap_err();
    assert_fault(error, 3 * page_size(), 2 * page);
    assert_eq!(buf[..2 * page], vec![7; 2 * page]);
    // What is there still works, what is not is not touched again.
    space.read(0, &mut buf[..3 * page]).unwrap();
    let before = buf.clone();
    let error = space.read(4 * page_size(), &mut buf).unwrap_err();
    assert_fault(error, 4 * page_size(), 0);
    assert_eq!(buf, before);
}

#[test]
fn a_write_says_how_many_bytes_arrived() {
    let page = page_size() as usize;
    let (space, file) = space_of(4);
    file.set_len(2 * page_size()).unwrap();
    let error = space.write(10, &vec![9; 3 * page]).unwrap_err();
    assert_fault(error, 2 * page_size(), 2 * page - 10);
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 2 * page_size() - 1).unwrap();
    assert_eq!(byte, [9]);
}

#[test]
fn an_access_over_mappings_ends_in_the_one_that_is_gone() {
    let page = page_size() as usize;
    let (space, file) = space_of(2);
    let behind = Backing::anonymous(page).unwrap();
    space.map(2 * page_size(), behind, ReadWrite).unwrap();
    file.set_len(0).unwrap();
    let handle = space.handle();
    assert_fault(handle.read(0, &mut vec![0; 3 * page]).unwrap_err(), 0, 0);
    // Another mapping is what it was.
    handle.write(2 * page_size(), &[5; 64]).unwrap();
    let mut buf = [0; 64];
    handle.read(2 * page_size(), &mut buf).unwrap();
    assert_eq!(buf, [5; 64]);
}

#[test]
fn the_bytes_of_one_page_and_atomics() {
    let (space, file) = space_of(1);
    let handle = space.handle();
    handle.write(0, &[1; 64]).unwrap();
    file.set_len(0).unwrap();
    assert_fault(handle.read(8, &mut [0; 64]).unwrap_err(), 8, 0);

    let (space, file) = space_of(1);
    let handle = space.handle();
    file.set_len(0).unwrap();
    let load = handle.load::<u32>(GuestAddress(16), Ordering::Relaxed);
    assert_fault(load.unwrap_err(), 16, 0);
    let store = handle.store(1_u64, GuestAddress(16), Ordering::Relaxed);
    assert_fault(store.unwrap_err(), 16, 0);
    let exchange = handle.compare_exchange(8, 0_u32, 1, Ordering::AcqRel, Ordering::Acquire);
    assert_fault(exchange.unwrap_err(), 8, 0);
}

#[test]
fn slices_and_pins_are_refused_once_it_is_known() {
    let page = page_size() as usize;
    let (space, file) = space_of(4);
    let pinner = space.pinner("disk", Interest::Holder, Arc::new(|_, _| ()));
    let guard = space.memory();
    let slices = guard.get_slices(GuestAddress(0), 4 * page, Read).unwrap();
    let slice = slices.map(Result::unwrap).next().unwrap();
    let pinned = pinner.pin_pages(3 * page_size(), 1, ReadWrite).unwrap();
    file.set_len(page_size()).unwrap();

    // What was lent before reads as zeros.
    let mut buf = vec![3; 2 * page];
    slice.read_slice(&mut buf, page).unwrap();
    assert_eq!(buf, vec![0; 2 * page]);
    pinned.page(0).unwrap().write_obj(1_u32, 0).unwrap();
    let error = space.check_memory(0, 4 * page).unwrap_err();
    assert_fault(error, page_size(), page);
    space.check_memory(0, page).unwrap();

    let mut slices = guard.get_slices(GuestAddress(0), 2 * page, Read).unwrap();
    assert_eq!(slices.next().unwrap().unwrap().len(), page);
    assert!(slices.next().unwrap().is_err());
    assert!(slices.next().is_none());
    assert!(!guard.check_range(GuestAddress(page_size()), 1, Read));
    let refused = pinner.pin_pages(page_size(), 1, Read).unwrap_err();
    assert_eq!(refused.errno(), libc::EFAULT);
    drop(pinned);
    drop(pinner.pin_pages(0, 1, Read).unwrap());
}

#[test]
fn streams_end_where_memory_does() {
    let page = page_size() as usize;
    let (space, file) = space_of(2);
    let handle = space.handle();
    file.set_len(page_size()).unwrap();
    let mut into = vec![0; 2 * page];
    let mut sink = &mut into[..];
    let error = handle.write_all_volatile_to(GuestAddress(0), &mut sink, 2 * page);
    assert_fault(error.unwrap_err(), page_size(), page);
    let n = handle.write_volatile_to(GuestAddress(0), &mut Vec::new(), 2 * page);
    assert_eq!(n.unwrap(), page);
}

#[test]
fn mapped_anew_it_is_there_again() {
    let (space, file) = space_of(2);
    file.set_len(0).unwrap();
    space.read(0, &mut [0; 8]).unwrap_err();
    file.set_len(2 * page_size()).unwrap();
    assert_fault(space.read(0, &mut [0; 8]).unwrap_err(), 0, 0);
    space.unmap(0, 2 * page_size()).unwrap();
    let memory = backing(&file, 2 * page_size()).guarded().unwrap();
    space.map(0, memory, ReadWrite).unwrap();
    space.write(0, &[1; 8]).unwrap();
}

#[test]
fn a_region_that_has_lost_memory_is_not_good_when_it_is_guarded_again() {
    let page = page_size() as usize;
    let file = memfd(4 * page_size(), 0);
    let memory = backing(&file, 4 * page_size());
    let space = IoAddressSpace::new();
    let first = memory.clone().guarded().unwrap();
    space.map(0, first, ReadWrite).unwrap();
    file.set_len(page_size()).unwrap();
    space.write(0, &vec![1; 4 * page]).unwrap_err();
    file.set_len(4 * page_size()).unwrap();
    // Beside the first, and when nobody watches it any more.
    let second = memory.slice(0, 2 * page).unwrap().guarded().unwrap();
    assert_eq!(second.fault_offset(), Some(page));
    space.unmap_all().unwrap();
    drop(second);
    let third = memory.guarded().unwrap();
    assert_eq!(third.fault_offset(), Some(page));
    space.map(0, third, ReadWrite).unwrap();
    assert_fault(
        space.read(page_size(), &mut [0]).unwrap_err(),
        page_size(),
        0,
    );
}

#[test]
fn parts_of_a_region_know_what_of_them_is_gone() {
    let page = page_size() as usize;
    let file = memfd(8 * page_size(), 0);
    let whole = backing(&file, 8 * page_size()).guarded().unwrap();
    let (low, high) = (
        whole.slice(0, 4 * page).unwrap(),
        whole.slice(4 * page, 4 * page).unwrap(),
    );
    let space = IoAddressSpace::new();
    space.map(0, low.clone(), ReadWrite).unwrap();
    space.map(0x10_0000, high.clone(), ReadWrite).unwrap();
    file.set_len(6 * page_size()).unwrap();
    space.read(0x10_0000, &mut vec![0; 4 * page]).unwrap_err();
    assert_eq!(
        (low.fault_offset(), high.fault_offset()),
        (None, Some(2 * page))
    );
    space.read(0, &mut vec![0; 4 * page]).unwrap();
    space.read(0x10_0000, &mut vec![0; 2 * page]).unwrap();
}

#[test]
fn sealed_files_and_memory_without_one_need_nothing() {
    let file = memfd(page_size(), libc::MFD_ALLOW_SEALING);
    // SAFETY: takes no pointers.
    let sealed = unsafe {
        use std::os::fd::AsRawFd;
        libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK)
    };
    assert_eq!(sealed, 0);
    let memory = backing(&file, page_size());
    let at = memory.host_address();
    assert_eq!(memory.guarded().unwrap().host_address(), at);
    assert!(file.set_len(0).is_err());
    Backing::anonymous(0x1000).unwrap().guarded().unwrap();
}

/// One shortens files in the middle of reads of them by another, while a third makes and drops guarded memory.
#[test]
fn files_that_get_shorter_at_any_moment() {
    must_end("who reads files that get shorter", || {
        let page = page_size() as usize;
        let done = AtomicBool::new(false);
        let (faults, whole) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|threads| {
            let _done = Over(&done);
            threads.spawn(|| {
                let mut n = 0;
                while !done.load(Ordering::Relaxed) || n == 0 {
                    space_of(1 + n % 5);
                    n += 1;
                }
            });
            for round in 0..200_usize {
                let (space, file) = space_of(64);
                space.write(0, &vec![0x5a; 64 * page]).unwrap();
                let left = round % 64;
                // The first is so at once, the others at any moment.
                if round == 0 {
                    file.set_len(0).unwrap();
                }
                let result = thread::scope(|threads| {
                    let reader = threads.spawn(|| {
                        let mut buf = vec![0; 64 * page];
                        let result = space.handle().read(0, &mut buf);
                        (result, buf)
                    });
                    file.set_len((left * page) as u64).unwrap();
                    reader.join().unwrap()
                });
                let good = match result {
                    (Ok(()), _) => {
                        whole.fetch_add(1, Ordering::Relaxed);
                        64 * page
                    }
                    (Err(error), _) => {
                        faults.fetch_add(1, Ordering::Relaxed);
                        assert!(matches!(error, Error::Fault { .. }), "{error}");
                        error.completed()
                    }
                };
                assert!(good >= left * page);
                assert!(result.1[..good].iter().all(|byte| *byte == 0x5a));
            }
        });
        println!("{faults:?} faults, {whole:?} reads that were faster");
        assert_ne!(faults.into_inner(), 0);
    });
}

/// What a child process ends with that runs `run`.
fn child(run: impl FnOnce()) -> i32 {
    // SAFETY: the child makes system calls and leaves.
    match unsafe { libc::fork() } {
        0 => {
            run();
            // SAFETY: leaves.
            unsafe { libc::_exit(0) }
        }
        pid => {
            let mut status = 0;
            within("a child ends", || {
                // SAFETY: the status can be written.
                match unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) } {
                    0 => false,
                    waited => {
                        assert_eq!(waited, pid);
                        true
                    }
                }
            });
            status
        }
    }
}

/// Touches memory of a file, without the space, after the file has lost it.
fn touch_foreign_memory() {
    let file = memfd(page_size(), 0);
    let memory = backing(&file, page_size());
    file.set_len(0).unwrap();
    // SAFETY: it is mapped; what happens is what is tested.
    unsafe { memory.host_address().read_volatile() };
}

#[test]
fn a_fault_of_others_ends_the_process_as_before() {
    space_of(1);
    let status = child(touch_foreign_memory);
    let by_signal = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS;
    // A sanitizer has a handler of its own, which leaves with a status.
    let by_handler = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) != 0;
    assert!(by_signal || by_handler, "{status:#x}");
}
