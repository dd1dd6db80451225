// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the client maps, with files and without.

#[path = "../common/mod.rs"]
mod common;
mod maps;
mod messages;

use vfio_user_dma::{AccessError, Error};

fn cause<T: std::fmt::Debug>(result: Result<T, Error>) -> (usize, AccessError) {
    match result.unwrap_err() {
        Error::Access {
            completed, cause, ..
        } => (completed, cause),
        error => panic!("{error}"),
    }
}
