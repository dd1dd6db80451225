// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Accesses that leave their barriers to the kernel, and what happens where it refuses them.

mod common;

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::deadline::{output, skipped, within, Over};
use common::patient;
use iommu_type1::{
    page_size, Backing, Error, HolderKind, IoAddressSpace, ReaderBarrier, UnmapOptions, UnmapPolicy,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap, Permissions};

use Permissions::ReadWrite;

/// Accesses after which one who has met no unmap goes without barriers.
const ENOUGH: usize = 1 << 16;

/// Says to a run of this test that it is the child of one.
const CHILD: &str = "MEMBARRIER_CHILD";
/// What a child says at its end.
const DONE: &str = "the child saw what it should";

/// A space that leaves barriers to the kernel, if it has them; the others do without these tests.
fn space() -> Option<IoAddressSpace> {
    let space = IoAddressSpace::builder()
        .reader_barrier(ReaderBarrier::Membarrier)
        .build();
    if is_known() {
        assert_eq!(space.reader_barrier(), ReaderBarrier::Membarrier);
        return Some(space);
    }
    assert_eq!(space.reader_barrier(), ReaderBarrier::Fence);
    skipped("this kernel has no membarrier");
    None
}

/// Whether the kernel has the command that is used.
fn is_known() -> bool {
    // SAFETY: the call takes three integers and touches no memory of ours.
    let commands = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_QUERY, 0, 0) };
    let wanted = i64::from(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
    commands > 0 && commands & wanted == wanted
}

fn map(space: &IoAddressSpace, page: u64) {
    let backing = Backing::anonymous(page_size() as usize).unwrap();
    space.map(page * page_size(), backing, ReadWrite).unwrap();
}

/// Maps a page far away and unmaps it; how often the kernel was asked for that.
fn asked_by_an_unmap(space: &IoAddressSpace) -> u64 {
    let before = space.stats().membarriers;
    map(space, 1 << 30);
    assert_eq!(
        space.unmap(page_size() << 30, page_size()).unwrap(),
        page_size()
    );
    space.stats().membarriers - before
}

#[test]
fn the_kernel_is_asked_only_after_many_accesses_without_an_unmap() {
    let Some(space) = space() else { return };
    map(&space, 0);
    let handle = space.handle();
    assert_eq!(asked_by_an_unmap(&space), 0);
    for _ in 0..3 {
        for turn in 0..ENOUGH as u64 {
            handle.write(turn % 256 * 8, &turn.to_ne_bytes()).unwrap();
            assert_eq!(
                handle
                    .read_obj::<u64>(GuestAddress(turn % 256 * 8))
                    .unwrap(),
                turn
            );
        }
        assert_eq!(asked_by_an_unmap(&space), 1);
        for _ in 0..100 {
            handle.read(0, &mut [0]).unwrap();
            assert_eq!(asked_by_an_unmap(&space), 0);
        }
    }
    // One who is gone needs no barrier.
    (0..ENOUGH).for_each(|_| handle.read(0, &mut [0]).unwrap());
    drop(handle);
    assert_eq!(asked_by_an_unmap(&space), 0);
}

#[test]
fn guards_and_dirty_pages_need_the_kernel_too() {
    let Some(space) = space() else { return };
    map(&space, 0);
    map(&space, 1);
    for turn in 0..=ENOUGH as u64 {
        // The first of a guard has a barrier of its own.
        let guard = space.memory();
        guard.write_obj(turn, GuestAddress(8)).unwrap();
        guard.write_obj(turn, GuestAddress(page_size())).unwrap();
    }
    assert_eq!(asked_by_an_unmap(&space), 1);
    assert_eq!(asked_by_an_unmap(&space), 0);

    let handle = space.handle();
    let go_unfenced = || (0..ENOUGH).for_each(|_| handle.write(0, &[1]).unwrap());
    let asked = |what: &dyn Fn()| {
        let before = space.stats().membarriers;
        what();
        space.stats().membarriers - before
    };
    go_unfenced();
    assert_eq!(asked(&|| space.start_dirty_tracking().unwrap()), 1);
    go_unfenced();
    let take = || space.take_dirty(0, page_size()).unwrap().len();
    assert_eq!(asked(&|| assert_eq!(take(), 1)), 1);
    handle.write(0, &[1]).unwrap();
    assert_eq!(asked(&|| assert_eq!(take(), 1)), 0);
    // Nobody can have relied on a mark where there was none.
    go_unfenced();
    take();
    go_unfenced();
    space.stop_dirty_tracking();
    assert_eq!(
        asked(&|| drop(space.take_dirty(0, page_size()).unwrap_err())),
        0
    );
}

/// What stands in memory only while it is not mapped.
const POISON: u64 = u64::MAX;

#[test]
fn unmaps_beside_a_busy_handle_see_it_with_and_without_barriers() {
    const ROUNDS: u64 = 60;
    let p = page_size();
    let Some(space) = space() else { return };
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), p as usize)]).unwrap();
    let map_it = || {
        let backing = Backing::from_guest_memory(&memory, GuestAddress(0), p as usize).unwrap();
        space.map(p, backing, ReadWrite).unwrap();
    };
    map_it();
    let (turns, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let _over = Over(&stop);
        let busy = scope.spawn(|| {
            let handle = space.handle();
            let mut wrong = 0;
            let mut refused = 0;
            while !stop.load(Ordering::Relaxed) {
                match handle.load::<u64>(GuestAddress(p + 8), Ordering::Relaxed) {
                    Ok(found) => wrong += u64::from(found == POISON),
                    Err(Error::Revoked { .. } | Error::NotMapped { .. }) => refused += 1,
                    Err(other) => panic!("{other}"),
                }
                turns.fetch_add(1, Ordering::Relaxed);
            }
            assert_eq!(wrong, 0, "accesses came after an unmap");
            println!(
                "{} accesses, {refused} of them refused",
                turns.load(Ordering::Relaxed)
            );
        });
        let past = |accesses| {
            let begun = turns.load(Ordering::Relaxed);
            within("there are more accesses", || {
                assert!(!busy.is_finished());
                turns.load(Ordering::Relaxed) >= begun + accesses
            });
        };
        for round in 0..ROUNDS {
            let before = space.stats().membarriers;
            past(ENOUGH as u64 + 2);
            // Without its barriers, and with them.
            for asked in [1, 0] {
                assert_eq!(space.unmap_with(p, p, patient()).unwrap(), p);
                memory.write_obj(POISON, GuestAddress(8)).unwrap();
                past(round % 8);
                memory.write_obj(round, GuestAddress(8)).unwrap();
                map_it();
                if asked == 1 {
                    assert!(space.stats().membarriers > before);
                }
            }
        }
    });
    assert!(space.stats().membarriers >= ROUNDS);
}

/// Refuses the calling thread `membarrier` from here on.
fn refuse_membarrier() {
    const LOAD_NUMBER: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        step(LOAD_NUMBER, 0, 0, 0),
        step(IF_EQUAL, libc::SYS_membarrier as u32, 0, 1),
        step(RETURN, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0, 0),
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: no new privileges is a flag; the program and its steps live until the calls have ended.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0
    };
    assert!(!refused, "{}", std::io::Error::last_os_error());
    assert!(!is_known());
}

/// Runs one of these tests again as a child, which does `work`: what it refuses itself stays refused.
fn in_a_child(test: &str, work: impl FnOnce()) {
    if std::env::var_os(CHILD).is_some() {
        work();
        println!("{DONE}");
        return;
    }
    if space().is_none() {
        return;
    }
    let mut program = Command::new(std::env::current_exe().unwrap());
    program
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, "1");
    let output = output(program);
    let said = String::from_utf8_lossy(&output.stdout);
    let cried = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains(DONE),
        "{}\n{said}\n{cried}",
        output.status
    );
}

#[test]
fn where_membarrier_is_refused_accesses_pass_barriers_of_their_own() {
    in_a_child(
        "where_membarrier_is_refused_accesses_pass_barriers_of_their_own",
        || {
            refuse_membarrier();
            let space = IoAddressSpace::builder()
                .reader_barrier(ReaderBarrier::Membarrier)
                .build();
            assert_eq!(space.reader_barrier(), ReaderBarrier::Fence);
            map(&space, 0);
            let handle = space.handle();
            (0..=ENOUGH).for_each(|_| handle.write(0, &[1]).unwrap());
            assert_eq!(space.unmap(0, page_size()).unwrap(), page_size());
            assert_eq!(space.stats().membarriers, 0);
        },
    );
}

#[test]
fn where_membarrier_is_refused_later_unmaps_fail_and_lose_nothing() {
    in_a_child(
        "where_membarrier_is_refused_later_unmaps_fail_and_lose_nothing",
        || {
            let p = page_size();
            let space = IoAddressSpace::builder()
                .reader_barrier(ReaderBarrier::Membarrier)
                .build();
            assert_eq!(space.reader_barrier(), ReaderBarrier::Membarrier);
            (0..3).for_each(|page| map(&space, page));
            space.start_dirty_tracking().unwrap();
            let handle = space.handle();
            let go_unfenced = || (0..ENOUGH).for_each(|_| handle.write(0, &[1]).unwrap());
            let assert_refused = |policy| {
                let before = space.stats();
                let options = UnmapOptions::new().policy(policy);
                let error = space.unmap_with(0, 3 * p, options).unwrap_err();
                assert_eq!(error.errno(), libc::EDEADLK);
                assert!(
                    error.to_string().contains("a running access uses"),
                    "{error}"
                );
                let Error::Deadline {
                    unmapped,
                    left,
                    holders,
                } = error
                else {
                    panic!("{error}");
                };
                assert_eq!((unmapped, left), (0, 3 * p));
                let names = holders
                    .iter()
                    .map(|holder| (holder.kind, holder.name.as_str()));
                assert!(names.eq([(HolderKind::Access, "a running access"); 3]));
                let after = space.stats();
                assert_eq!(after.membarriers, before.membarriers + 1);
                assert_eq!(after.stragglers, before.stragglers + 3);
                assert_eq!(
                    (after.mappings, after.unmaps),
                    (before.mappings, before.unmaps)
                );
            };

            refuse_membarrier();
            // The handle passes barriers of its own as yet: no other is needed.
            assert_eq!(asked_by_an_unmap(&space), 0);

            go_unfenced();
            let error = space.take_dirty(0, 3 * p).unwrap_err();
            assert!(matches!(error, Error::AccessRuns { .. }), "{error}");
            assert_refused(UnmapPolicy::Restore);
            handle.write(p, &[1]).unwrap();
            for _ in 0..2 {
                assert_refused(UnmapPolicy::Revoked);
                let error = handle.write(p, &[1]).unwrap_err();
                assert!(matches!(error, Error::Revoked { .. }), "{error}");
            }

            // With the handle goes what needs the kernel; nothing is lost.
            drop(handle);
            let dirty = space.take_dirty(0, 3 * p).unwrap();
            assert!(dirty.iter().eq([0, p]));
            assert_eq!(space.unmap(0, 3 * p).unwrap(), 3 * p);
            let stats = space.stats();
            assert_eq!(
                (stats.mappings, stats.leaving, stats.table_bytes),
                (0, 0, 0)
            );
        },
    );
}
