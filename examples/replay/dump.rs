// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file of accesses.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use gvt_replay::replay::Workload;
use gvt_replay::{Error, Mode, Result};

pub(crate) struct Dump<'a> {
    path: &'a Path,
    file: BufWriter<File>,
}

impl<'a> Dump<'a> {
    pub(crate) fn create(path: &'a Path) -> Result<Self> {
        match File::create(path) {
            Ok(file) => Ok(Dump {
                path,
                file: BufWriter::new(file),
            }),
            Err(source) => Err(Error::File {
                path: path.to_owned(),
                source,
            }),
        }
    }

    pub(crate) fn write(&mut self, mode: Mode, workload: &Workload) -> Result<()> {
        for access in &workload.accesses {
            let direction = if access.write { 'W' } else { 'R' };
            let written = writeln!(
                self.file,
                "{} {} {} {} {direction} {:#x} {}",
                workload.vgpu,
                mode.name(),
                workload.submission,
                access.kind.name(),
                access.gpa.0,
                access.len
            );
            self.file_error(written)?;
        }
        Ok(())
    }

    pub(crate) fn finish(&mut self) -> Result<()> {
        let flushed = self.file.flush();
        self.file_error(flushed)
    }

    fn file_error(&self, result: io::Result<()>) -> Result<()> {
        result.map_err(|source| Error::File {
            path: self.path.to_owned(),
            source,
        })
    }
}
