// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Misses: reported once, waited for without holding anything, ended by whatever ends them.

mod common;

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use common::deadline::{ended, within, DEADLINE as LONG};
use common::{byte, msg, p, table, update, LOW};
use iommu_type1::{IoAddressSpace, Profile};
use vhost::VhostIotlbType::{AccessFail, Invalidate};
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vhost_iotlb::{Error, MissSink, VhostIotlb};
use vm_memory::Permissions::{self, Read, Write};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// What a device waits for whose miss was answered.
const ANSWERED: &str = "an access ends when its miss is answered";

struct Socket(Sender<VhostIotlbMsg>);

impl MissSink for Socket {
    fn miss(&self, miss: &VhostIotlbMsg) -> io::Result<()> {
        self.0
            .send(*miss)
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

fn iotlb() -> (VhostIotlb, Receiver<VhostIotlbMsg>) {
    let (sender, misses) = channel();
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .unmap_deadline(LONG)
        .build();
    let iotlb = VhostIotlb::with_space(space, Arc::new(Socket(sender))).unwrap();
    let iotlb = iotlb.miss_deadline(LONG);
    iotlb.set_mem_table(table()).unwrap();
    (iotlb, misses)
}

fn next(misses: &Receiver<VhostIotlbMsg>) -> VhostIotlbMsg {
    misses.recv_timeout(LONG).expect("a miss is reported")
}

/// As QEMU answers: the page in which the address is, for what it may be.
fn answer(iotlb: &VhostIotlb, miss: &VhostIotlbMsg) {
    assert_eq!(miss.msg_type as u8, VhostIotlbType::Miss as u8);
    let page = miss.iova / p(1);
    iotlb.apply(&update(page, 1, LOW + p(page % 8))).unwrap();
}

#[test]
fn a_miss_says_what_is_missing_and_an_update_answers_it() {
    let (iotlb, misses) = iotlb();
    iotlb.apply(&update(0, 1, LOW)).unwrap();
    let device = iotlb.clone();
    let device = thread::spawn(move || {
        let mut bytes = vec![0; p(1) as usize];
        device.read(p(1) - 2, &mut bytes).map(|()| bytes)
    });
    let miss = next(&misses);
    assert_eq!((miss.iova, miss.size), (p(1), p(1)));
    assert_eq!(miss.perm, VhostAccess::ReadOnly);
    assert_eq!(iotlb.open_misses(), 1);
    answer(&iotlb, &miss);
    let bytes = ended(ANSWERED, device).unwrap();
    assert_eq!((bytes[1], bytes[2]), (1, 2));
    assert_eq!(iotlb.open_misses(), 0);
}

#[test]
fn several_who_miss_the_same_are_reported_once() {
    let (iotlb, misses) = iotlb();
    let devices: Vec<_> = (0..8)
        .map(|_| {
            let device = iotlb.clone();
            thread::spawn(move || device.write(p(3) + 8, &[7]))
        })
        .collect();
    let miss = next(&misses);
    assert_eq!(miss.perm, VhostAccess::WriteOnly);
    answer(&iotlb, &miss);
    for device in devices {
        ended(ANSWERED, device).unwrap();
    }
    // Nobody has missed it again, however late it was.
    assert!(misses.try_recv().is_err());
}

#[test]
fn an_answer_may_come_before_the_report_returns() {
    struct AtOnce(Arc<OnceLock<VhostIotlb>>);
    impl MissSink for AtOnce {
        fn miss(&self, miss: &VhostIotlbMsg) -> io::Result<()> {
            let iotlb = self.0.get().unwrap();
            // Nothing is held here: an invalidation that has no time at all succeeds.
            iotlb.apply(&msg(Invalidate, 0, 0)).unwrap();
            answer(iotlb, miss);
            Ok(())
        }
    }
    let slot = Arc::new(OnceLock::new());
    let space = IoAddressSpace::builder()
        .profile(Profile::Iotlb)
        .unmap_deadline(Duration::ZERO)
        .build();
    let iotlb = VhostIotlb::with_space(space, Arc::new(AtOnce(slot.clone()))).unwrap();
    slot.set(iotlb.clone()).unwrap();
    iotlb.set_mem_table(table()).unwrap();
    iotlb.write(p(2), &[9]).unwrap();
    // Of several pages the second is there when the first was forgotten again, and so on.
    iotlb.resolve(0, p(5) as usize, Read).unwrap();
    assert_eq!(byte(&iotlb, 4), Some(5));
}

#[test]
fn a_range_is_translated_page_by_page() {
    let (iotlb, misses) = iotlb();
    iotlb.apply(&update(2, 2, LOW + p(2))).unwrap();
    let device = iotlb.clone();
    let device = thread::spawn(move || device.resolve(p(1) + 100, p(5) as usize, Write));
    for page in [1, 4, 5, 6] {
        let miss = next(&misses);
        assert_eq!((miss.iova, miss.size), (p(page), p(1)));
        answer(&iotlb, &miss);
    }
    ended(ANSWERED, device).unwrap();
    let guard = iotlb.space().memory();
    let ends: [u8; 2] = guard.read_obj(GuestAddress(p(5) - 1)).unwrap();
    assert_eq!(ends, [5, 6]);
}

#[test]
fn what_the_front_end_refuses_is_an_error_of_all_who_wait() {
    let (iotlb, misses) = iotlb();
    let device = iotlb.clone();
    let device = thread::spawn(move || device.read(p(3), &mut [0]));
    let miss = next(&misses);
    // Of something else.
    iotlb.apply(&msg(AccessFail, p(4), p(1))).unwrap();
    assert_eq!(iotlb.open_misses(), 1);
    iotlb.apply(&msg(AccessFail, miss.iova + 8, 1)).unwrap();
    let error = ended("a miss ends with an error", device).unwrap_err();
    assert_eq!(error.errno(), libc::EACCES);
    assert!(
        error.to_string().contains(&format!("{:#x}", p(3))),
        "{error}"
    );
}

#[test]
fn an_answer_that_is_too_little_is_missed_again() {
    let (iotlb, misses) = iotlb();
    let device = iotlb.clone();
    let device = thread::spawn(move || device.write(p(3), &[1]));
    next(&misses);
    let read_only = VhostIotlbMsg {
        perm: VhostAccess::ReadOnly,
        ..update(3, 1, LOW)
    };
    iotlb.apply(&read_only).unwrap();
    let miss = next(&misses);
    assert_eq!((miss.iova, miss.perm), (p(3), VhostAccess::WriteOnly));
    answer(&iotlb, &miss);
    ended(ANSWERED, device).unwrap();
}

#[test]
fn answers_at_once_that_never_help_end_at_the_deadline() {
    struct TooLittle(OnceLock<VhostIotlb>, AtomicUsize);
    impl MissSink for TooLittle {
        fn miss(&self, miss: &VhostIotlbMsg) -> io::Result<()> {
            // Rather than for ever.
            if self.1.fetch_add(1, Ordering::Relaxed) == 100 {
                return Err(io::ErrorKind::Other.into());
            }
            let read_only = VhostIotlbMsg {
                perm: VhostAccess::ReadOnly,
                ..update(miss.iova / p(1), 1, LOW)
            };
            self.0.get().unwrap().apply(&read_only)?;
            Ok(())
        }
    }
    let sink = Arc::new(TooLittle(OnceLock::new(), AtomicUsize::new(0)));
    let space = IoAddressSpace::builder().profile(Profile::Iotlb).build();
    let iotlb = VhostIotlb::with_space(space, sink.clone()).unwrap();
    let iotlb = iotlb.miss_deadline(Duration::ZERO);
    assert!(sink.0.set(iotlb.clone()).is_ok());
    iotlb.set_mem_table(table()).unwrap();
    let written = iotlb.write(p(3), &[1]).unwrap_err();
    assert_eq!(written.errno(), libc::ETIMEDOUT, "{written}");
    let resolved = iotlb.resolve(p(4), 1, Write).unwrap_err();
    assert_eq!(resolved.errno(), libc::ETIMEDOUT, "{resolved}");
    // Each was reported.
    assert_eq!(sink.1.load(Ordering::Relaxed), 2);
}

/// The report of a miss fails when that was answered long ago, and somebody else waits for the same page anew.
#[test]
fn a_late_failure_of_a_report_is_not_that_of_a_newer_miss() {
    type Waiting = thread::JoinHandle<vhost_iotlb::Result<()>>;
    struct FailsLate(OnceLock<VhostIotlb>, Sender<Waiting>, AtomicUsize);
    impl MissSink for FailsLate {
        fn miss(&self, miss: &VhostIotlbMsg) -> io::Result<()> {
            if self.2.fetch_add(1, Ordering::Relaxed) > 0 {
                return Ok(());
            }
            let iotlb = self.0.get().unwrap();
            answer(iotlb, miss);
            iotlb.apply(&msg(Invalidate, miss.iova, miss.size)).unwrap();
            let newer = iotlb.clone();
            let newer = thread::spawn(move || newer.resolve(p(3), 1, Read));
            self.1.send(newer).unwrap();
            within("the newer one misses", || iotlb.open_misses() > 0);
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }
    let (sender, newer) = channel();
    let sink = Arc::new(FailsLate(OnceLock::new(), sender, AtomicUsize::new(0)));
    let space = IoAddressSpace::builder().profile(Profile::Iotlb).build();
    let iotlb = VhostIotlb::with_space(space, sink.clone()).unwrap();
    let iotlb = iotlb.miss_deadline(LONG);
    assert!(sink.0.set(iotlb.clone()).is_ok());
    iotlb.set_mem_table(table()).unwrap();
    // Its own miss was answered, and there is no time for another.
    let first = iotlb.clone().miss_deadline(Duration::ZERO);
    let error = first.resolve(p(3), 1, Read).unwrap_err();
    assert!(matches!(error, Error::MissDeadline { .. }), "{error}");
    iotlb.apply(&update(3, 1, LOW)).unwrap();
    let newer = newer.recv_timeout(LONG).expect("the newer one has begun");
    ended(ANSWERED, newer).unwrap();
}

#[test]
fn there_are_only_so_many_and_the_deadline_ends_them() {
    let (iotlb, misses) = iotlb();
    let iotlb = iotlb.miss_limit(2);
    let waits = |page: u64, access: Permissions| {
        let device = iotlb.clone().miss_deadline(LONG);
        thread::spawn(move || device.resolve(p(page), 1, access))
    };
    let waiting = [waits(0, Read), waits(0, Write)];
    for _ in &waiting {
        next(&misses);
    }
    let error = iotlb.resolve(p(1), 1, Read).unwrap_err();
    assert!(matches!(error, Error::MissLimit { limit: 2 }), "{error}");
    assert_eq!(error.errno(), libc::ENOBUFS);
    // One that is waited for already is none more.
    let hasty = iotlb.clone().miss_deadline(Duration::ZERO);
    let error = hasty.resolve(8, 1, Read).unwrap_err();
    assert!(matches!(error, Error::MissDeadline { .. }), "{error}");
    assert_eq!(iotlb.open_misses(), 2);
    iotlb.apply(&update(0, 1, LOW)).unwrap();
    for waiting in waiting {
        ended(ANSWERED, waiting).unwrap();
    }
    let error = hasty.resolve(p(1), 1, Read).unwrap_err();
    assert_eq!((error.errno(), iotlb.open_misses()), (libc::ETIMEDOUT, 0));
    assert!(misses.try_recv().is_ok());
}

#[test]
fn a_front_end_that_goes_leaves_nobody_waiting() {
    let (iotlb, misses) = iotlb();
    iotlb.apply(&update(9, 1, LOW)).unwrap();
    iotlb.apply(&msg(VhostIotlbType::BatchBegin, 0, 0)).unwrap();
    let device = iotlb.clone();
    let device = thread::spawn(move || device.read(p(3), &mut [0]));
    next(&misses);
    iotlb.disconnect().unwrap();
    let error = ended("a miss ends with an error", device).unwrap_err();
    assert_eq!(error.errno(), libc::ENOTCONN);
    assert_eq!((iotlb.space().mappings(), iotlb.open_misses()), (0, 0));
    // The next one brings its own memory.
    assert!(iotlb.apply(&update(0, 1, LOW)).is_err());
    iotlb.set_mem_table(table()).unwrap();
    iotlb.apply(&update(0, 1, LOW)).unwrap();
    // Nobody reads the misses any more.
    drop(misses);
    let error = iotlb.read(p(3), &mut [0]).unwrap_err();
    assert_eq!((error.errno(), iotlb.open_misses()), (libc::EIO, 0));
}

#[test]
fn other_errors_are_not_waited_for() {
    let (iotlb, misses) = iotlb();
    let error = iotlb.retry(Read, || Err::<(), _>(iommu_type1::Error::NoRegion(7)));
    assert!(matches!(error, Err(Error::Space(_))));
    assert!(misses.try_recv().is_err());
}

/// Devices that miss, beside a front end that answers and forgets.
#[test]
fn many_devices_beside_invalidations() {
    let (iotlb, misses) = iotlb();
    let frontend = {
        let iotlb = iotlb.clone();
        thread::spawn(move || {
            for (count, miss) in misses.iter().enumerate() {
                if miss.iova == p(1000) {
                    break;
                }
                answer(&iotlb, &miss);
                if count % 3 == 0 {
                    iotlb
                        .apply(&msg(Invalidate, p(count as u64 % 8), p(1)))
                        .unwrap();
                }
            }
        })
    };
    let devices: Vec<_> = (0..4_u64)
        .map(|number| {
            let device = iotlb.clone();
            thread::spawn(move || {
                let mut bytes = vec![0; p(2) as usize];
                for round in 0..300 {
                    let page = (round * 3 + number) % 7;
                    device.read(p(page), &mut bytes).unwrap();
                    assert_eq!(u64::from(bytes[0]), page + 1);
                    assert_eq!(u64::from(bytes[bytes.len() - 1]), page + 2);
                }
            })
        })
        .collect();
    for device in devices {
        ended("all misses are answered", device);
    }
    let last = iotlb.clone().miss_deadline(Duration::ZERO);
    assert!(last.read(p(1000), &mut [0]).is_err());
    ended("the front end has seen the last miss", frontend);
    assert_eq!(iotlb.open_misses(), 0);
}

#[test]
fn a_deadline_may_be_never() {
    let (iotlb, misses) = iotlb();
    let iotlb = iotlb.miss_deadline(Duration::MAX);
    let device = iotlb.clone();
    let device = thread::spawn(move || {
        device.read(0, &mut [0])?;
        device.resolve(p(1), 1, Read)
    });
    for _ in 0..2 {
        answer(&iotlb, &next(&misses));
    }
    ended(ANSWERED, device).unwrap();
}
