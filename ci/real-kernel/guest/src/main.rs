// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first process of a guest: does the same operations on the kernel's own VFIO type1 and on our crate,
//! and says on the serial line where they differ.

mod compare;
mod edu;
mod explained;
mod generate;
mod iommufd;
mod lifetime;
mod live;
mod memlock;
mod memory;
mod mirrored;
mod op;
mod ours;
mod rates;
mod rules;
mod sequences;
mod setup;
mod vfio;

use std::process::ExitCode;

fn main() -> ExitCode {
    let first = std::process::id() == 1;
    let done = run();
    match &done {
        Ok(()) => println!("finished: well"),
        Err(error) => println!("finished: {error}"),
    }
    if first {
        guest_init::end();
    }
    if done.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run() -> Result<(), String> {
    let said = |error: std::io::Error| error.to_string();
    guest_init::prepare().map_err(said)?;
    let given = guest_init::give_to_vfio(edu::IDS).map_err(said)?;
    memory::make().map_err(said)?;
    let operations = guest_init::parameter("operations")
        .map_err(said)?
        .unwrap_or(20_000);
    let seed = guest_init::parameter("seed").map_err(said)?.unwrap_or(1);
    println!(
        "device {} of group {}, seed {seed}",
        given.name, given.group
    );
    let setup = sequences::setup(given.group)?;
    println!("{setup:x?}");
    // All of them, whatever the others find.
    let parts = [
        mirrored::run(&given, &setup, seed),
        lifetime::run(&given, seed),
        memlock::run(&given),
        sequences::run(&given, &setup, operations, seed),
        iommufd::run(&given, operations, seed),
    ];
    let failed: Vec<_> = parts.into_iter().filter_map(Result::err).collect();
    if failed.is_empty() {
        Ok(())
    } else {
        Err(failed.join("; "))
    }
}
