// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Packs `/init` and kernel modules into an archive that a kernel unpacks at boot.
//!
//! `guest-initramfs OUT INIT [MODULE.ko[.xz]]...`: the modules get names by which they sort in the
//! order given, and are unpacked here, so that the guest needs no decompressor.

mod newc;

use std::path::Path;
use std::process::ExitCode;
use std::{env, fs, io};

use lzma_rust2::XzReader;

use newc::Archive;

fn main() -> ExitCode {
    let mut args = env::args().skip(1);
    let (Some(out), Some(init)) = (args.next(), args.next()) else {
        eprintln!("usage: guest-initramfs OUT INIT [MODULE]...");
        return ExitCode::FAILURE;
    };
    match pack(&init, args).and_then(|archive| fs::write(&out, archive)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{out}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn pack(init: &str, modules: impl Iterator<Item = String>) -> io::Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.folder("modules");
    archive.program("init", &read(init)?);
    for (at, module) in modules.enumerate() {
        let name = Path::new(&module).file_name().unwrap_or_default();
        let name = name.to_string_lossy();
        let name = name.strip_suffix(".xz").unwrap_or(&name);
        archive.program(&format!("modules/{at:02}-{name}"), &read(&module)?);
    }
    Ok(archive.end())
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    let stored =
        fs::read(path).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
    if !path.ends_with(".xz") {
        return Ok(stored);
    }
    let mut plain = Vec::new();
    io::Read::read_to_end(&mut XzReader::new(&*stored, true), &mut plain)?;
    Ok(plain)
}
