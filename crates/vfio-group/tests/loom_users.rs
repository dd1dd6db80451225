// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model check of the container user protocol, on the production code.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p vfio-group --release --test loom_users`

#![cfg(loom)]

#[allow(dead_code)]
#[path = "../src/sync.rs"]
mod sync;
#[allow(dead_code)]
#[path = "../src/users.rs"]
mod users;

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use loom::thread;
use std::sync::Arc;

use users::Attachment;

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

    fn enter(&self) {
        assert!(!self.attached.swap(true, SeqCst), "attached twice");
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
    assert!(attachment.attach(&target, Target::enter));
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
                    second.enter();
                })
            })
        };
        attachment.put(Target::leave);
        visitor.join().unwrap();
        let attached = attacher.join().unwrap();
        assert_eq!(first.left.load(SeqCst), 1);
        assert_eq!(attachment.users(), usize::from(attached));
        assert_eq!(second.attached.load(SeqCst), attached);
    });
}
