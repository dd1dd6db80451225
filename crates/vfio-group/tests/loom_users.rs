// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model check of the container user protocol, of who is told of a value, and of devices that go, on the production code.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p vfio-group --release --test loom_users`

#![cfg(loom)]

#[allow(dead_code)]
#[path = "../src/broadcast.rs"]
mod broadcast;
#[allow(dead_code)]
#[path = "../src/users.rs"]
mod users;

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use loom::thread;
use std::convert::Infallible;
use std::sync::Arc;

use broadcast::Broadcast;
use checked_sync::clock::NEVER;
use users::Attachment;
use vfio_group::{Container, Device, Group, GroupFile, IommuType};

/// What a group attaches to: records when it was left, and how often.
struct Target {
    left: AtomicUsize,
    attached: AtomicBool,
}

impl Target {
    fn new() -> Arc<Self> {
        Arc::new(Target {
            left: AtomicUsize::new(0),
            attached: AtomicBool::new(false),
        })
    }

    fn enter(&self) -> Result<(), Infallible> {
        assert!(!self.attached.swap(true, SeqCst), "attached twice");
        Ok(())
    }

    fn leave(&self) {
        assert!(self.attached.swap(false, SeqCst), "detached twice");
        self.left.fetch_add(1, SeqCst);
    }

    fn assert_attached(&self) {
        assert!(self.attached.load(SeqCst), "detached under a user");
    }
}

fn attached() -> (Arc<Attachment<Target>>, Arc<Target>) {
    let target = Target::new();
    let attachment = Arc::new(Attachment::new());
    assert_eq!(attachment.attach(&target, Target::enter), Ok(true));
    (attachment, target)
}

/// A user that comes, uses the attachment and goes.
fn visit(attachment: &Attachment<Target>) -> bool {
    let Some(target) = attachment.get() else {
        return false;
    };
    target.assert_attached();
    attachment.put(Target::leave);
    true
}

fn assert_detached_once(attachment: &Attachment<Target>, target: &Target) {
    assert_eq!(attachment.users(), 0);
    assert!(attachment.target().is_none());
    assert_eq!(target.left.load(SeqCst), 1);
}

#[test]
fn get_against_unset_container() {
    loom::model(|| {
        let (attachment, target) = attached();
        let visitor = {
            let attachment = attachment.clone();
            thread::spawn(move || visit(&attachment))
        };
        let unset = attachment.unset(Target::leave);
        let visited = visitor.join().unwrap();
        match unset {
            Ok(()) => {}
            Err(users) => {
                assert!(visited);
                assert_eq!(users, 2);
                assert_eq!(attachment.users(), 1);
                target.assert_attached();
                // The group file closes.
                attachment.put(Target::leave);
            }
        }
        assert_detached_once(&attachment, &target);
    });
}

#[test]
fn the_last_put_dissolves_once() {
    loom::model(|| {
        let (attachment, target) = attached();
        attachment.get_held();
        let user = {
            let attachment = attachment.clone();
            let target = target.clone();
            thread::spawn(move || {
                // A clone, then both are dropped.
                attachment.get_held();
                attachment.put(Target::leave);
                target.assert_attached();
                attachment.put(Target::leave);
            })
        };
        attachment.put(Target::leave);
        user.join().unwrap();
        assert_detached_once(&attachment, &target);
    });
}

#[test]
fn get_against_the_last_put() {
    loom::model(|| {
        let (attachment, target) = attached();
        let visitor = {
            let attachment = attachment.clone();
            thread::spawn(move || visit(&attachment))
        };
        attachment.put(Target::leave);
        visitor.join().unwrap();
        assert_detached_once(&attachment, &target);
    });
}

#[test]
fn unset_against_put() {
    loom::model(|| {
        let (attachment, target) = attached();
        assert!(attachment.get().is_some());
        let user = {
            let attachment = attachment.clone();
            thread::spawn(move || attachment.put(Target::leave))
        };
        if attachment.unset(Target::leave).is_err() {
            attachment.put(Target::leave);
        }
        user.join().unwrap();
        assert_detached_once(&attachment, &target);
    });
}

#[test]
fn attach_elsewhere_only_after_the_first_was_left() {
    loom::model(|| {
        let (attachment, first) = attached();
        let second = Target::new();
        let visitor = {
            let attachment = attachment.clone();
            thread::spawn(move || visit(&attachment))
        };
        let attacher = {
            let attachment = attachment.clone();
            let first = first.clone();
            let second = second.clone();
            thread::spawn(move || {
                attachment.attach(&second, |second| {
                    assert!(!first.attached.load(SeqCst));
                    second.enter()
                })
            })
        };
        attachment.put(Target::leave);
        visitor.join().unwrap();
        let Ok(attached) = attacher.join().unwrap();
        assert_eq!(first.left.load(SeqCst), 1);
        assert_eq!(attachment.users(), usize::from(attached));
        assert_eq!(second.attached.load(SeqCst), attached);
    });
}

/// A listener that notes what it was told last, and how often.
struct Heard {
    last: AtomicUsize,
    times: AtomicUsize,
    running: AtomicBool,
}

impl Heard {
    fn new() -> Arc<Self> {
        Arc::new(Heard {
            last: AtomicUsize::new(0),
            times: AtomicUsize::new(0),
            running: AtomicBool::new(false),
        })
    }

    fn hear(&self, value: Option<&usize>) {
        assert!(!self.running.swap(true, SeqCst), "told twice at a time");
        self.last.store(value.copied().unwrap_or(0), SeqCst);
        self.times.fetch_add(1, SeqCst);
        assert!(self.running.swap(false, SeqCst));
    }

    fn add_to(self: &Arc<Self>, broadcast: &Broadcast<usize>) -> u64 {
        let heard = self.clone();
        broadcast.add(Arc::new(move |value| heard.hear(value)))
    }
}

#[test]
fn two_values_at_a_time_end_with_the_newest_everywhere() {
    loom::model(|| {
        let broadcast = Arc::new(Broadcast::new());
        let heard = Heard::new();
        heard.add_to(&broadcast);
        let setter = {
            let broadcast = broadcast.clone();
            thread::spawn(move || broadcast.set(Some(1)))
        };
        broadcast.set(Some(2));
        setter.join().unwrap();
        let current = broadcast.current().unwrap();
        assert_eq!(heard.last.load(SeqCst), current);
    });
}

#[test]
fn a_late_listener_is_told_each_value_once() {
    loom::model(|| {
        let broadcast = Arc::new(Broadcast::new());
        broadcast.set(Some(1));
        let heard = Heard::new();
        let setter = {
            let broadcast = broadcast.clone();
            thread::spawn(move || broadcast.set(Some(2)))
        };
        heard.add_to(&broadcast);
        setter.join().unwrap();
        assert_eq!(heard.last.load(SeqCst), 2);
        let times = heard.times.load(SeqCst);
        assert!(times == 1 || times == 2, "{times}");
    });
}

#[test]
fn no_call_begins_once_it_was_unregistered() {
    loom::model(|| {
        let broadcast = Arc::new(Broadcast::new());
        let heard = Heard::new();
        let id = heard.add_to(&broadcast);
        let setter = {
            let broadcast = broadcast.clone();
            thread::spawn(move || {
                broadcast.set(Some(1));
                broadcast.set(None);
            })
        };
        broadcast.remove(id);
        setter.join().unwrap();
        let times = heard.times.load(SeqCst);
        broadcast.set(Some(3));
        assert_eq!(heard.times.load(SeqCst), times);
        assert_eq!(Arc::strong_count(&heard), 1, "the listener is dropped");
    });
}

#[test]
fn a_listener_that_leaves_a_group_against_a_value() {
    loom::model(|| {
        let (attachment, target) = attached();
        let broadcast = Arc::new(Broadcast::new());
        // The listener is a user that goes when the value does, the kernel's release of a device.
        assert!(attachment.get().is_some());
        let released = Arc::new(AtomicBool::new(false));
        let release = {
            let (attachment, released) = (attachment.clone(), released.clone());
            move || {
                if !released.swap(true, SeqCst) {
                    attachment.put(Target::leave);
                }
            }
        };
        let listener = release.clone();
        broadcast.add(Arc::new(move |value: Option<&usize>| {
            if value.is_none() {
                listener();
            }
        }));
        let setter = {
            let broadcast = broadcast.clone();
            thread::spawn(move || broadcast.set(None))
        };
        release();
        attachment.put(Target::leave);
        setter.join().unwrap();
        assert_detached_once(&attachment, &target);
    });
}

/// A device in a group that is ready, and the group's file.
fn device() -> (Device, GroupFile) {
    let group = Group::new(1);
    let device = group.add_device("vgpu0").unwrap();
    let (container, file) = (Container::open(), group.open().unwrap());
    file.set_container(&container).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    (device, file)
}

/// The kernel's bug B14: what was looked up was opened when it was gone.
#[test]
fn a_device_is_opened_or_removed() {
    loom::model(|| {
        let (device, file) = device();
        let remover = {
            let device = device.clone();
            thread::spawn(move || device.remove())
        };
        let opened = file.device("vgpu0");
        let removed = remover.join().unwrap();
        match (&opened, &removed) {
            (Ok(_), Err(error)) => {
                assert_eq!(error.errno(), libc::EBUSY);
                assert!(device.remove().is_err(), "still open");
            }
            (Err(error), Ok(())) => assert_eq!(error.errno(), libc::ENODEV),
            other => panic!("both won, or none: {other:?}"),
        }
    });
}

/// Nobody else wakes whoever waits: a model in which none runs any more fails.
#[test]
fn who_waits_for_a_device_is_told_when_it_is_closed() {
    loom::model(|| {
        let (device, file) = device();
        let opened = file.device("vgpu0").unwrap();
        let waiter = thread::spawn(move || device.request_release(1, NEVER));
        drop(opened);
        waiter.join().unwrap().unwrap();
    });
}
