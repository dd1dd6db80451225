// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Examples as programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

/// The program of an example, as its sources are now.
///
/// It lies beside the tests: `deps/` of the tests and `examples/` are neighbours. `cargo test` has built it with them, and
/// `cargo test --test` has not: then it may be missing or be of older sources, and is built here.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join(name);
    if !is_current(&program) {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--example", name, "--target-dir"]);
        build.arg(profile.parent().unwrap());
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success());
    }
    program
}

/// Whether none of the files that it was made of is newer: cargo leaves a list of them beside it.
fn is_current(program: &Path) -> bool {
    let changed = |path: &Path| -> Option<SystemTime> { fs::metadata(path).ok()?.modified().ok() };
    let Ok(list) = fs::read_to_string(program.with_extension("d")) else {
        return false;
    };
    let Some((_, sources)) = list.split_once(": ") else {
        return false;
    };
    // Spaces in a name are escaped.
    let sources = sources.trim_end().replace("\\ ", "\0");
    let built = changed(program);
    built.is_some()
        && sources.split(' ').all(|source| {
            let source = source.replace('\0', " ");
            let changed = changed(Path::new(&source));
            changed.is_some() && changed <= built
        })
}
