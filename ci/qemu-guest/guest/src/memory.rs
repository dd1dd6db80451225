// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory that the device reaches, beside a model of it.
//!
//! What this program writes goes to both, what the device is to write goes to the model only. Then all of it
//! has to be the same, byte for byte: what was to be written is there, and nothing else has changed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{fence, Ordering};

use rand::rngs::SmallRng;
use rand::Rng;

pub const PAGE: usize = 4096;

/// Pages of the memory: two mebibytes, so that a page table entry can map all of it.
pub const PAGES: usize = 512;

/// Among how many free pages scattered ones are chosen.
const SCATTER: usize = 96;

/// Differences that are described; the rest are counted.
const DESCRIBED: u64 = 20;

type Bytes = [u8; PAGE];

/// A page of the memory, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Page(usize);

/// What was compared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verified {
    pub bytes: u64,
    pub wrong: u64,
}

impl Verified {
    /// Counts a value that is as long as a register.
    pub fn value(&mut self, what: &str, got: u32, expected: u32) {
        self.bytes += 4;
        if got != expected {
            self.wrong(4, || format!("{what} is {got:#x}, not {expected:#x}"));
        }
    }

    pub fn wrong(&mut self, bytes: u64, what: impl FnOnce() -> String) {
        if self.wrong < DESCRIBED {
            println!("wrong: {}", what());
        }
        self.wrong += bytes;
    }
}

/// The memory. It lies at one address of this process and at one of the device's.
#[derive(Debug)]
pub struct Memory {
    at: *mut Bytes,
    address: u64,
    model: Vec<Bytes>,
    free: Vec<Page>,
    pub verified: Verified,
}

impl Memory {
    /// Over what `allocate` made, which the device finds at `address`.
    pub fn new(at: *mut u8, address: u64, rng: &mut SmallRng) -> Self {
        let mut memory = Memory {
            at: at.cast(),
            address,
            model: vec![[0; PAGE]; PAGES],
            free: (0..PAGES).rev().map(Page).collect(),
            verified: Verified::default(),
        };
        // Zeroes are what a device that does nothing would leave.
        for page in (0..PAGES).map(Page) {
            memory.fill(page, rng);
        }
        memory
    }

    /// Takes pages that follow each other.
    pub fn take(&mut self, count: usize) -> Vec<Page> {
        let left = self.free.len().checked_sub(count);
        let left = left.expect("the memory is large enough for what is run");
        let mut pages = self.free.split_off(left);
        pages.reverse();
        pages
    }

    pub fn take_one(&mut self) -> Page {
        self.take(1)[0]
    }

    /// Takes pages from here and there.
    pub fn take_scattered(&mut self, count: usize, rng: &mut SmallRng) -> Vec<Page> {
        let mut one = || {
            let at = rng.random_range(0..self.free.len().min(SCATTER));
            self.free.remove(at)
        };
        (0..count).map(|_| one()).collect()
    }

    /// Gives a page back. What it holds has to stay.
    pub fn give_back(&mut self, page: Page) {
        self.free.insert(0, page);
    }

    /// Where the device finds a page.
    pub fn address(&self, page: Page) -> u64 {
        self.address + (page.0 * PAGE) as u64
    }

    /// Where the device finds all of it.
    pub fn base(&self) -> u64 {
        self.address
    }

    /// How far into the memory a page is.
    pub fn offset(&self, page: Page) -> u64 {
        (page.0 * PAGE) as u64
    }

    /// This program writes.
    pub fn write(&mut self, page: Page, offset: usize, bytes: &[u8]) {
        self.expect(page, offset, bytes);
        // SAFETY: the model's page has just been found to have these bytes, and the memory has as many pages.
        unsafe {
            let to = self.pointer(page).cast::<u8>().add(offset);
            ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        // The device looks when it is told to, by a write to a register.
        fence(Ordering::SeqCst);
    }

    pub fn write_u32(&mut self, page: Page, offset: usize, value: u32) {
        self.write(page, offset, &value.to_le_bytes());
    }

    pub fn write_u64(&mut self, page: Page, offset: usize, value: u64) {
        self.write(page, offset, &value.to_le_bytes());
    }

    /// Any bytes.
    pub fn fill(&mut self, page: Page, rng: &mut SmallRng) {
        let mut bytes = [0; PAGE];
        rng.fill(&mut bytes[..]);
        self.write(page, 0, &bytes);
    }

    /// The device is to write.
    pub fn expect(&mut self, page: Page, offset: usize, bytes: &[u8]) {
        self.model[page.0][offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// What a page is to be.
    pub fn model(&mut self, page: Page) -> &mut Bytes {
        &mut self.model[page.0]
    }

    /// Takes what is there for what is to be there: where an engine was stopped in the middle.
    pub fn adopt(&mut self, page: Page) {
        self.model[page.0] = self.read(page);
    }

    /// What a page is.
    pub fn read(&self, page: Page) -> Bytes {
        fence(Ordering::SeqCst);
        // SAFETY: a page of the memory, aligned as pages are; any bytes are a value.
        unsafe { self.pointer(page).read_volatile() }
    }

    /// What the device has written last.
    pub fn read_u32(&self, page: Page, offset: usize) -> u32 {
        let word = self.word(page, offset);
        // SAFETY: `word` has looked where that is, and the memory stays.
        u32::from_le(unsafe { word.read_volatile() })
    }

    pub fn read_u64(&self, page: Page, offset: usize) -> u64 {
        assert!(offset % 8 == 0);
        let word = self.word(page, offset).cast::<u64>();
        // SAFETY: as above, and eight bytes that are aligned are in one page.
        u64::from_le(unsafe { word.read_volatile() })
    }

    /// Where four bytes of a page are, for a thread that looks at them.
    pub fn word(&self, page: Page, offset: usize) -> *const u32 {
        assert!(offset % 4 == 0 && offset < PAGE);
        self.pointer(page)
            .cast::<u8>()
            .cast_const()
            .wrapping_add(offset)
            .cast()
    }

    /// Compares pages with what they are to be.
    pub fn verify(&mut self, what: &str, pages: impl IntoIterator<Item = Page>) {
        for page in pages {
            let got = self.read(page);
            self.verified.bytes += PAGE as u64;
            let expected = &self.model[page.0];
            if got == *expected {
                continue;
            }
            let wrong = (0..PAGE).filter(|at| got[*at] != expected[*at]);
            let count = wrong.clone().count() as u64;
            let first = wrong.clone().next().unwrap_or(0);
            self.verified.wrong(count, || {
                format!(
                    "{what}: {count} bytes of page {}, the first at {first:#x}: {:#x} instead of {:#x}",
                    page.0, got[first], expected[first]
                )
            });
            // Once is enough.
            self.model[page.0] = got;
        }
    }

    /// Compares all of it.
    pub fn verify_all(&mut self) {
        self.verify("all of the memory", (0..PAGES).map(Page));
    }

    fn pointer(&self, page: Page) -> *mut Bytes {
        self.at.wrapping_add(page.0)
    }
}

/// Memory of this process, from the kernel's huge pages or not.
pub fn allocate(pages: usize, huge: bool) -> io::Result<*mut u8> {
    let huge = if huge { libc::MAP_HUGETLB } else { 0 };
    // SAFETY: new memory, nowhere in particular.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            pages * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | huge,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(at.cast())
}

/// The physical address of a page of this process, of which root is told.
pub fn physical(at: *const u8) -> io::Result<u64> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let mut entry = [0; 8];
    let number = at.addr() / PAGE;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, number as u64 * 8)?;
    let entry = u64::from_le_bytes(entry);
    if entry & PRESENT == 0 || entry & FRAME == 0 {
        return Err(io::Error::other(format!("{at:?} has no physical address")));
    }
    Ok((entry & FRAME) * PAGE as u64)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn memory() -> (Memory, *mut u8) {
        let at = allocate(PAGES, false).unwrap();
        let mut rng = SmallRng::seed_from_u64(1);
        (Memory::new(at, 0x4000_0000, &mut rng), at)
    }

    #[test]
    fn whatever_is_not_as_it_is_to_be_is_counted_once() {
        let (mut memory, at) = memory();
        let page = memory.take_one();
        let offset = memory.offset(page) as usize;
        memory.verify_all();
        assert_eq!(memory.verified.wrong, 0);
        // Two bytes come that nobody asked for, three are asked for and do not come.
        for byte in [7, 4095] {
            // SAFETY: inside of the memory.
            unsafe { *at.add(offset + byte) ^= 0x10 };
        }
        let asked = memory.read(page)[100..103]
            .iter()
            .map(|byte| !byte)
            .collect::<Vec<_>>();
        memory.expect(page, 100, &asked);
        memory.verify("a page", [page]);
        assert_eq!(memory.verified.wrong, 5);
        memory.verify_all();
        assert_eq!(memory.verified.wrong, 5);
        assert_eq!(memory.verified.bytes, ((2 * PAGES + 1) * PAGE) as u64);
    }

    #[test]
    fn pages_are_taken_once() {
        let (mut memory, _) = memory();
        let mut rng = SmallRng::seed_from_u64(2);
        let mut taken = memory.take(20);
        assert!(taken.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1));
        taken.extend(memory.take_scattered(PAGES - 40, &mut rng));
        taken.extend(memory.take(20));
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), PAGES);
    }
}
