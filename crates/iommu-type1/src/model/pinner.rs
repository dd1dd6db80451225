// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Accesses and pins of a pinner against its move to another space.

use std::sync::Arc;

use checked_sync::clock;
use loom::thread::spawn;
use vm_memory::{Bytes, Permissions};

use super::{exhaustively, join, space};
use crate::{Error, Interest, IoAddressSpace, Pinner, Transfer};

/// Moves a pinner to a space of nothing beside somebody who uses it; the memory of the old space is not
/// touched by it from then on.
fn against_a_move(using: fn(&Pinner) -> Result<(), Error>) {
    exhaustively(move || {
        let (old, owner) = space();
        let new = IoAddressSpace::builder().build();
        let pinner = old.pinner("moving", Interest::Holder, Arc::new(|_, _| ()));
        let user = {
            let pinner = pinner.clone();
            spawn(move || match using(&pinner) {
                Ok(()) | Err(Error::NotAttached { .. } | Error::NotMapped { .. }) => {}
                // It was attached when it asked, and closed when it pinned.
                Err(Error::Pin(page_pin::Error::Detached { .. })) => {}
                Err(error) => panic!("{error}"),
            })
        };
        pinner.replace(&new, 2 * clock::NEVER).unwrap();
        owner.gone();
        join([user]);
    });
}

#[test]
fn an_access_against_a_move() {
    against_a_move(|pinner| pinner.dma_rw(8, Transfer::Write(&[1])));
}

#[test]
fn a_pin_against_a_move() {
    against_a_move(|pinner| {
        let pinned = pinner.pin_pages(0, 1, Permissions::ReadWrite)?;
        if let Some(page) = pinned.page(0) {
            page.write_slice(&[1], 0).unwrap();
        }
        Ok(())
    });
}
