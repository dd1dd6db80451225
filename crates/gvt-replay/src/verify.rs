// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Compares guest memory with the model, byte by byte, from the memory's file and not through the
//! path under test.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use serde::{Serialize, Serializer};

use crate::error::{Error, Result};
use crate::layout::{Slot, PAGE_SIZE};
use crate::model::Model;
use crate::plan::ContextObject;

/// Differences that are kept; the others are counted only.
const KEPT_DIFFERENCES: usize = 8;

/// The first byte of a page that is not what it must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Guest physical address.
    #[serde(serialize_with = "hex")]
    pub gpa: u64,
    /// GGTT page number of the context object whose copied page it is, if it is one.
    #[serde(serialize_with = "hex_if_any")]
    pub context: Option<u32>,
    /// Index of the page in the context object.
    pub page: Option<usize>,
    /// Number of the submission after which it was found; none if it was found at the end.
    pub submission: Option<u64>,
    /// What the model holds.
    pub expected: u8,
    /// What guest memory holds.
    pub found: u8,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "gpa {:#x}: expected {:#04x}, found {:#04x}",
            self.gpa, self.expected, self.found
        )?;
        if let (Some(lrca), Some(page)) = (self.context, self.page) {
            write!(f, " (page {page} of context {lrca:#x})")?;
        }
        match self.submission {
            Some(submission) => write!(f, " after submission {submission}"),
            None => Ok(()),
        }
    }
}

fn hex<S: Serializer>(value: &u64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:#x}"))
}

fn hex_if_any<S: Serializer>(
    lrca: &Option<u32>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    match lrca {
        Some(lrca) => hex(&u64::from(*lrca), serializer),
        None => serializer.serialize_none(),
    }
}

/// What the comparison of a guest's memory with the model gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Pages that were compared.
    pub pages: u64,
    /// Pages that differ.
    pub different: u64,
    /// The first of them, by address.
    pub first: Vec<Difference>,
}

impl Verdict {
    /// Counts a page, and what is wrong with it.
    fn add(&mut self, difference: Option<Difference>) {
        self.pages += 1;
        if let Some(difference) = difference {
            self.different += 1;
            if self.first.len() < KEPT_DIFFERENCES {
                self.first.push(difference);
            }
        }
    }

    /// Adds what was found later.
    pub(crate) fn append(&mut self, later: Verdict) {
        self.pages += later.pages;
        self.different += later.different;
        self.first.extend(later.first);
        self.first.truncate(KEPT_DIFFERENCES);
    }

    /// Whether nothing differs.
    pub fn verified(&self) -> bool {
        self.different == 0
    }
}

/// Compares every page that the guest or the model ever touched. What neither touched is a hole
/// in the memory's file and zero in the model.
pub(crate) fn verify(
    slots: &[(Slot, File)],
    model: &Model,
    contexts: &[ContextObject],
) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    for (slot, file) in slots {
        let mut touched = allocated_pages(file, slot.len)
            .map_err(Error::machine("find the touched pages of guest memory"))?;
        touched.extend(
            model
                .pages()
                .filter_map(|gpa| gpa.checked_sub(slot.gpa))
                .filter(|offset| *offset < slot.len),
        );
        for offset in touched {
            let found = read_page(file, offset)?;
            verdict.add(compare(slot.gpa + offset, &found, model, contexts));
        }
    }
    Ok(verdict)
}

/// Compares the copied pages of the context that was just written back. At the end this could not
/// be seen any more: a copy that is lost in between is mended by the next.
pub(crate) fn verify_context(
    slots: &[(Slot, File)],
    model: &Model,
    contexts: &[ContextObject],
    pages: &[u64],
    submission: u64,
) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    for gpa in pages {
        let in_slot = |(slot, _): &&(Slot, File)| (slot.gpa..slot.gpa + slot.len).contains(gpa);
        let Some((slot, file)) = slots.iter().find(in_slot) else {
            continue;
        };
        let found = read_page(file, gpa - slot.gpa)?;
        verdict.add(
            compare(*gpa, &found, model, contexts).map(|difference| Difference {
                submission: Some(submission),
                ..difference
            }),
        );
    }
    Ok(verdict)
}

fn read_page(file: &File, offset: u64) -> Result<[u8; PAGE_SIZE as usize]> {
    let mut page = [0; PAGE_SIZE as usize];
    file.read_exact_at(&mut page, offset)
        .map_err(Error::machine("read guest memory"))?;
    Ok(page)
}

fn compare(
    gpa: u64,
    found: &[u8; PAGE_SIZE as usize],
    model: &Model,
    contexts: &[ContextObject],
) -> Option<Difference> {
    let expected = model.page(gpa).unwrap_or(&[0; PAGE_SIZE as usize]);
    if found == expected {
        return None;
    }
    let at = found.iter().zip(expected).position(|(f, e)| f != e)?;
    let context_page = contexts.iter().find_map(|context| {
        let index = context.pages.iter().position(|page| *page == gpa)?;
        Some((context.lrca, index + 2))
    });
    Some(Difference {
        gpa: gpa + at as u64,
        context: context_page.map(|(lrca, _)| lrca),
        page: context_page.map(|(_, page)| page),
        submission: None,
        expected: expected[at],
        found: found[at],
    })
}

/// Offsets of the pages a file has memory for.
#[allow(unsafe_code)]
fn allocated_pages(file: &File, len: u64) -> io::Result<BTreeSet<u64>> {
    let seek = |from: u64, whence| {
        // SAFETY: lseek takes no pointers, and the descriptor is open as long as `file` is.
        let found = unsafe { libc::lseek(file.as_raw_fd(), from as libc::off_t, whence) };
        match u64::try_from(found) {
            Ok(found) => Ok(Some(found)),
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                error => Err(error),
            },
        }
    };
    let mut pages = BTreeSet::new();
    let mut next = 0;
    while let Some(data) = seek(next, libc::SEEK_DATA)? {
        let hole = seek(data, libc::SEEK_HOLE)?.unwrap_or(len);
        let first = data / PAGE_SIZE * PAGE_SIZE;
        pages.extend((first..hole.min(len)).step_by(PAGE_SIZE as usize));
        next = hole;
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memfd;

    const SLOT: Slot = Slot {
        gpa: 0x10_0000,
        len: 0x10_0000,
    };

    fn verdict_after(writes: &[(u64, u8)]) -> Verdict {
        let file = memfd(c"verify", SLOT.len).unwrap();
        for (gpa, byte) in writes {
            file.write_all_at(&[*byte], gpa - SLOT.gpa).unwrap();
        }
        let context = ContextObject {
            engine: &crate::plan::ENGINES[0],
            lrca: 7,
            pages: vec![0x12_0000, 0x13_0000],
        };
        verify(&[(SLOT, file)], &Model::default(), &[context]).unwrap()
    }

    #[test]
    fn untouched_memory_is_not_looked_at() {
        assert_eq!(verdict_after(&[]), Verdict::default());
    }

    #[test]
    fn a_touched_page_of_zeros_is_as_it_must_be() {
        let verdict = verdict_after(&[(0x11_0000, 0), (0x1f_ffff, 0)]);
        assert_eq!((verdict.pages, verdict.verified()), (2, true));
    }

    #[test]
    fn a_stray_byte_is_found_wherever_it_lands() {
        for gpa in [0x10_0000, 0x11_2345, 0x1f_ffff] {
            let verdict = verdict_after(&[(gpa, 9)]);
            let difference = Difference {
                gpa,
                context: None,
                page: None,
                submission: None,
                expected: 0,
                found: 9,
            };
            assert_eq!(verdict.first, [difference], "{gpa:#x}");
        }
        let in_context = verdict_after(&[(0x13_0010, 9)]);
        assert_eq!(
            serde_json::to_value(&in_context.first[0]).unwrap(),
            serde_json::json!({
                "gpa": "0x130010", "context": "0x7", "page": 3, "submission": null, "expected": 0,
                "found": 9
            })
        );
        assert_eq!(
            in_context.first[0].to_string(),
            "gpa 0x130010: expected 0x00, found 0x09 (page 3 of context 0x7)"
        );
    }

    #[test]
    fn more_differences_than_are_kept_are_counted() {
        let writes: Vec<_> = (0..20)
            .map(|page| (SLOT.gpa + page * PAGE_SIZE, 1))
            .collect();
        let verdict = verdict_after(&writes);
        assert_eq!(
            (verdict.different, verdict.first.len()),
            (20, KEPT_DIFFERENCES)
        );
    }
}
