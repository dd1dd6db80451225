// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Maps, unmaps, accesses, leases and pins from a list of actions, against a model of mapped pages.

#![no_main]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use iommu_type1::{
    page_size, Backing, Error, Interest, IoAddressSpace, PinnedPages, ScatterList, UnmapOptions,
    UnmapPolicy,
};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, Permissions};

#[derive(Arbitrary, Debug)]
enum Action {
    Map { page: u8, pages: u8, prot: u8 },
    Unmap { page: u8, pages: u8, restore: bool },
    UnmapAnywhere { iova: u64, size: u64 },
    Read { page: u8, offset: u16, len: u16 },
    Write { page: u8, offset: u16, len: u16, value: u8 },
    ReadAnywhere { iova: u64, len: u16 },
    Lease { page: u8, len: u16 },
    Pin { page: u8, pages: u8 },
    Release { index: u8 },
}

struct Mapped {
    pages: u64,
    prot: Permissions,
    bytes: Vec<u8>,
    revoked: bool,
}

enum Held {
    Lease(#[allow(dead_code)] ScatterList, u64, u64),
    Pin(#[allow(dead_code)] PinnedPages, u64, u64),
}

impl Held {
    fn touches(&self, iova: u64, last: u64) -> bool {
        let (Held::Lease(_, from, to) | Held::Pin(_, from, to)) = self;
        *from <= last && iova <= *to
    }
}

/// The first 128 page numbers lie low, the others end at the top of the 64-bit space.
fn iova(page: u8) -> u64 {
    match page {
        0..=127 => u64::from(page) * page_size(),
        high => (u64::from(high) - 128).wrapping_sub(128).wrapping_mul(page_size()),
    }
}

fn prot(bits: u8) -> Permissions {
    [Permissions::No, Permissions::Read, Permissions::Write, Permissions::ReadWrite][usize::from(bits % 4)]
}

#[derive(Default)]
struct Model(BTreeMap<u64, Mapped>);

impl Model {
    fn find(&mut self, at: u64) -> Option<(u64, &mut Mapped)> {
        let (start, mapped) = self.0.range_mut(..=at).next_back()?;
        (at - start < mapped.pages * page_size()).then_some((*start, mapped))
    }

    /// How many bytes of an access succeed, and the errno it ends with if not all do.
    fn access(&mut self, iova: u64, len: usize, write: bool, mut each: impl FnMut(usize, &mut u8)) -> (usize, i32) {
        if len > 0 && iova.checked_add(len as u64 - 1).is_none() {
            return (0, libc::EOVERFLOW);
        }
        for i in 0..len {
            let at = iova + i as u64;
            let Some((start, mapped)) = self.find(at) else {
                return (i, libc::EINVAL);
            };
            if mapped.revoked {
                return (i, libc::EBUSY);
            }
            let needed = if write { Permissions::ReadWrite } else { Permissions::Read };
            if !mapped.prot.allow(needed) {
                return (i, libc::EPERM);
            }
            each(i, &mut mapped.bytes[(at - start) as usize]);
        }
        (len, 0)
    }
}

fn outcome(result: Result<(), Error>, len: usize) -> (usize, i32) {
    match result {
        Ok(()) => (len, 0),
        Err(error) => (error.completed(), error.errno()),
    }
}

fuzz_target!(|actions: Vec<Action>| {
    let p = page_size();
    let space = IoAddressSpace::builder().entry_limit(16).build();
    let pinner = space.pinner("fuzz", Interest::All, Arc::new(|_, _| ()));
    let mut model = Model::default();
    let mut held: Vec<Held> = Vec::new();
    for action in actions.into_iter().take(200) {
        match action {
            Action::Map { page, pages, prot: bits } => {
                let (at, pages, prot) = (iova(page), u64::from(pages % 8) + 1, prot(bits));
                let backing = Backing::anonymous((pages * p) as usize).unwrap();
                let errno = space.map(at, backing, prot).map_or_else(|e| e.errno(), |()| 0);
                let expected = if at.checked_add(pages * p - 1).is_none() {
                    libc::EOVERFLOW
                } else if prot == Permissions::No {
                    libc::EINVAL
                } else if let Some(revoked) = (0..pages).find_map(|i| model.find(at + i * p).map(|(_, m)| m.revoked)) {
                    if revoked { libc::EBUSY } else { libc::EEXIST }
                } else if model.0.len() == 16 {
                    libc::ENOSPC
                } else {
                    let bytes = vec![0; (pages * p) as usize];
                    model.0.insert(at, Mapped { pages, prot, bytes, revoked: false });
                    0
                };
                assert_eq!(errno, expected);
            }
            Action::Unmap { page, pages, restore } => {
                let (at, size) = (iova(page), (u64::from(pages) + 1) * p);
                let policy = if restore { UnmapPolicy::Restore } else { UnmapPolicy::Revoked };
                let options = UnmapOptions::new().deadline(Duration::ZERO).policy(policy);
                let result = space.unmap_with(at, size, options);
                let Some(last) = at.checked_add(size - 1) else {
                    assert_eq!(result.unwrap_err().errno(), libc::EOVERFLOW);
                    continue;
                };
                let cut = model.0.iter().any(|(start, m)| {
                    let end = start + (m.pages * p - 1);
                    let overlaps = *start <= last && at <= end;
                    overlaps && (*start < at || end > last)
                });
                if cut {
                    assert_eq!(result.unwrap_err().errno(), libc::EINVAL);
                    continue;
                }
                let (mut unmapped, mut left) = (0, 0);
                model.0.retain(|start, m| {
                    let (size, end) = (m.pages * p, start + (m.pages * p - 1));
                    if *start < at || *start > last {
                        return true;
                    }
                    let is_held = held.iter().any(|held| held.touches(*start, end));
                    m.revoked = is_held && !restore;
                    *(if is_held { &mut left } else { &mut unmapped }) += size;
                    is_held
                });
                match result {
                    Ok(bytes) => assert_eq!((bytes, 0), (unmapped, left)),
                    Err(Error::Deadline { unmapped: u, left: l, .. }) => assert_eq!((u, l), (unmapped, left)),
                    Err(other) => panic!("{other}"),
                }
            }
            Action::UnmapAnywhere { iova, size } if iova % p != 0 || size % p != 0 || size == 0 => {
                assert_eq!(space.unmap(iova, size).unwrap_err().errno(), libc::EINVAL);
            }
            Action::UnmapAnywhere { .. } => {}
            Action::Read { page, offset, len } => {
                let at = iova(page).wrapping_add(offset.into());
                read(&space, &mut model, at, len.into());
            }
            Action::ReadAnywhere { iova, len } => read(&space, &mut model, iova, len.into()),
            Action::Write { page, offset, len, value } => {
                let (at, len) = (iova(page).wrapping_add(offset.into()), usize::from(len));
                let data: Vec<u8> = (0..len).map(|i| value ^ i as u8).collect();
                let found = outcome(space.write(at, &data), len);
                assert_eq!(found, model.access(at, len, true, |i, byte| *byte = data[i]));
            }
            Action::Lease { page, len } => {
                let (at, len) = (iova(page), usize::from(len));
                let expected = model.access(at, len, false, |_, _| ());
                match space.scatter(at, len, Permissions::Read) {
                    Ok(list) => {
                        assert_eq!(expected, (len, 0));
                        let bytes: usize = list.iter().map(|slice| slice.len()).sum();
                        assert_eq!(bytes, len);
                        if len > 0 {
                            // Whole mappings are leased.
                            let last = at + (len as u64 - 1);
                            let first = model.find(at).unwrap().0;
                            let (end, mapped) = model.find(last).unwrap();
                            let last = end + (mapped.pages * p - 1);
                            held.push(Held::Lease(list, first, last));
                        }
                    }
                    Err(error) => assert_eq!(expected, (error.completed(), error.errno())),
                }
            }
            Action::Pin { page, pages } => {
                let (at, pages) = (iova(page), usize::from(pages));
                match pinner.pin_pages(at, pages, Permissions::Read) {
                    Ok(pinned) => {
                        let mut byte = [0];
                        pinned.page(pages - 1).unwrap().read_slice(&mut byte, 0).unwrap();
                        let last = at + (pages as u64 * p - 1);
                        assert_eq!(model.find(last).map(|(start, m)| m.bytes[(last + 1 - p - start) as usize]), Some(byte[0]));
                        held.push(Held::Pin(pinned, at, last));
                    }
                    Err(error) if pages == 0 => assert_eq!(error.errno(), libc::EINVAL),
                    Err(error) => {
                        let expected = model.access(at, pages * p as usize, false, |_, _| ());
                        assert_eq!(expected, (error.completed(), error.errno()));
                    }
                }
            }
            Action::Release { index } if !held.is_empty() => {
                held.swap_remove(usize::from(index) % held.len());
            }
            Action::Release { .. } => {}
        }
        assert_eq!(space.mappings(), model.0.len());
    }
});

fn read(space: &IoAddressSpace, model: &mut Model, at: u64, len: usize) {
    let (mut bytes, mut wanted) = (vec![0; len], vec![0; len]);
    let found = outcome(space.read(at, &mut bytes), len);
    assert_eq!(found, model.access(at, len, false, |i, byte| wanted[i] = *byte));
    assert_eq!(bytes, wanted);
}
