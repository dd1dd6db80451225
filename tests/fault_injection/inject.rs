// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Stands in front of the kernel and of the allocator, counts what is asked of them, and has one call of this thread fail.
//!
//! The C library's functions are defined here once more: what the crates call is these, and behind them is the
//! kernel. The allocator's own system calls are not among them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::arch::asm;
use std::cell::Cell;
use std::ffi::{c_int, c_long, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI64, Ordering};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of a page and more: what a guest decides the size or the number of comes to that, and has to be an error.
    Allocation,
    Mmap,
    Ioctl,
    Mlock,
    Membarrier,
}

pub const KINDS: [Kind; 5] = [
    Kind::Allocation,
    Kind::Mmap,
    Kind::Ioctl,
    Kind::Mlock,
    Kind::Membarrier,
];

/// Whether it fails in its turn. Not a space itself, which is as large as it is, and aligned as nothing else is.
fn is_large(size: usize, layout: Layout) -> bool {
    size >= 4096 && layout.align() < 128
}

thread_local! {
    static FAILS: Cell<Option<(Kind, u64)>> = const { Cell::new(None) };
}

static LARGE_BLOCKS: AtomicI64 = AtomicI64::new(0);
static MAPPINGS: AtomicI64 = AtomicI64::new(0);
static DEVICE_MAPS: AtomicI64 = AtomicI64::new(0);

/// From now on the `n`-th call of a kind fails.
pub fn arm(kind: Kind, n: u64) {
    FAILS.set(Some((kind, n)));
}

/// No call fails from now on; whether one has.
pub fn disarm() -> bool {
    FAILS.take().is_some_and(|(_, left)| left == 0)
}

/// Does something of which nothing fails: what the test needs itself.
pub fn aside<T>(make: impl FnOnce() -> T) -> T {
    let armed = FAILS.take();
    let made = make();
    FAILS.set(armed);
    made
}

/// Large blocks, memory mappings and mappings of hardware that were made and not given back, by any thread.
pub fn held() -> [i64; 3] {
    [&LARGE_BLOCKS, &MAPPINGS, &DEVICE_MAPS].map(|held| held.load(Ordering::SeqCst))
}

fn fails(kind: Kind) -> bool {
    match FAILS.get() {
        Some((armed, left)) if armed == kind && left > 0 => {
            FAILS.set(Some((kind, left - 1)));
            left == 1
        }
        _ => false,
    }
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn note(size: usize, layout: Layout, blocks: i64) {
    if is_large(size, layout) {
        LARGE_BLOCKS.fetch_add(blocks, Ordering::SeqCst);
    }
}

// SAFETY: what it gives is the system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout.size(), layout) && fails(Kind::Allocation) {
            return ptr::null_mut();
        }
        note(layout.size(), layout, 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        note(layout.size(), layout, -1);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if is_large(size, layout) && fails(Kind::Allocation) {
            return ptr::null_mut();
        }
        note(layout.size(), layout, -1);
        note(size, layout, 1);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// The kernel's answer: a value, or an errno below 0.
fn kernel(number: c_long, args: [c_long; 6]) -> c_long {
    let answer;
    // SAFETY: the caller's call, as it is; the kernel changes no other registers.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => answer,
            in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
            in("r10") args[3], in("r8") args[4], in("r9") args[5],
            lateout("rcx") _, lateout("r11") _,
        );
    }
    answer
}

fn as_libc(answer: c_long) -> c_long {
    if (-4095..0).contains(&answer) {
        // SAFETY: errno is this thread's.
        unsafe { *libc::__errno_location() = -answer as c_int };
        return -1;
    }
    answer
}

fn refused(errno: c_int) -> c_long {
    as_libc(-c_long::from(errno))
}

#[no_mangle]
extern "C" fn mmap(
    at: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    if fails(Kind::Mmap) {
        return refused(libc::ENOMEM) as *mut c_void;
    }
    let args = [
        at as c_long,
        len as c_long,
        prot.into(),
        flags.into(),
        fd.into(),
        offset,
    ];
    let mapped = as_libc(kernel(libc::SYS_mmap, args));
    MAPPINGS.fetch_add(i64::from(mapped != -1), Ordering::SeqCst);
    mapped as *mut c_void
}

/// As the standard library calls it, for each thread.
#[no_mangle]
extern "C" fn mmap64(
    at: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    mmap(at, len, prot, flags, fd, offset)
}

#[no_mangle]
extern "C" fn munmap(at: *mut c_void, len: usize) -> c_int {
    MAPPINGS.fetch_sub(1, Ordering::SeqCst);
    as_libc(kernel(
        libc::SYS_munmap,
        [at as c_long, len as c_long, 0, 0, 0, 0],
    )) as c_int
}

#[no_mangle]
extern "C" fn mlock(at: *const c_void, len: usize) -> c_int {
    if fails(Kind::Mlock) {
        return refused(libc::ENOMEM) as c_int;
    }
    as_libc(kernel(
        libc::SYS_mlock,
        [at as c_long, len as c_long, 0, 0, 0, 0],
    )) as c_int
}

/// Its callers pass what varies in the same registers.
#[no_mangle]
extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    if number == libc::SYS_membarrier && fails(Kind::Membarrier) {
        return refused(libc::ENOMEM);
    }
    as_libc(kernel(number, [a, b, c, d, e, f]))
}

pub const MAP_DMA: u32 = 0x3b71;
pub const UNMAP_DMA: u32 = 0x3b72;
pub const SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;

/// Hardware and KVM that take everything: no machine need have them.
#[no_mangle]
extern "C" fn ioctl(fd: c_int, request: libc::Ioctl, argument: *mut c_void) -> c_int {
    let more = match request as u32 {
        MAP_DMA => 1,
        UNMAP_DMA => -1,
        SET_USER_MEMORY_REGION => {
            // SAFETY: a `kvm_userspace_memory_region`, whose third word is the size.
            match unsafe { argument.byte_add(16).cast::<u64>().read_unaligned() } {
                0 => -1,
                _ => 1,
            }
        }
        _ => {
            let args = [fd.into(), request as c_long, argument as c_long, 0, 0, 0];
            return as_libc(kernel(libc::SYS_ioctl, args)) as c_int;
        }
    };
    if fails(Kind::Ioctl) {
        return refused(libc::ENOMEM) as c_int;
    }
    DEVICE_MAPS.fetch_add(more, Ordering::SeqCst);
    0
}
