// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Faults on the way to guest memory, to see that the verification finds them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, Bytes, GuestAddress, ReadVolatile, WriteVolatile};

use crate::layout::PAGE_SIZE;
use crate::plan::Plan;

const PAGE: usize = PAGE_SIZE as usize;

/// A fault in the copies of context pages, whatever runs they are copied in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The last page of a context never reaches guest memory.
    LoseTail,
    /// The first two pages that are copied change places on their way to guest memory.
    SwapPages,
    /// The first populate after a switch gives what the context that ran before left in the
    /// buffer, as skipping it would if the record of the last context had not been invalidated.
    StaleSkip,
}

impl Fault {
    /// All faults.
    pub const ALL: [Fault; 3] = [Fault::LoseTail, Fault::SwapPages, Fault::StaleSkip];

    /// Its name: `lose-tail`, `swap-pages` or `stale-skip`.
    pub fn name(self) -> &'static str {
        match self {
            Fault::LoseTail => "lose-tail",
            Fault::SwapPages => "swap-pages",
            Fault::StaleSkip => "stale-skip",
        }
    }
}

/// Guest memory with a [`Fault`] in front of it. Without one, every access goes straight through.
///
/// ```
/// use gvt_replay::aub::Trace;
/// use gvt_replay::inject::{Fault, Faulty};
/// use gvt_replay::{Contiguity, Plan};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let profile = Contiguity::bundled("consecutive").expect("a bundled profile");
/// let plan = Plan::new(&Trace::bundled()?, &profile)?;
/// let pages = &plan.contexts()[0].pages;
/// let base = GuestAddress(pages[0]);
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(base, 20 * 4096)]).expect("memory");
///
/// let faulty = Faulty::new(memory, &plan, Some(Fault::LoseTail));
/// faulty.write_slice(&[1; 20 * 4096], base).expect("in memory");
/// let mut last = [0xff; 4096];
/// faulty.read_slice(&mut last, GuestAddress(pages[19])).expect("in memory");
/// assert_eq!(last, [0; 4096]);
/// # Ok::<(), gvt_replay::Error>(())
/// ```
#[derive(Debug)]
pub struct Faulty<M> {
    memory: M,
    fault: Option<Fault>,
    /// By guest page: which context object, and which of its copied pages.
    pages: HashMap<u64, (usize, usize)>,
    contexts: Vec<Vec<u64>>,
    buffer: RefCell<StaleBuffer>,
}

impl<M> Faulty<M> {
    /// Puts `fault` in front of the `memory` of a guest that follows `plan`.
    pub fn new(memory: M, plan: &Plan, fault: Option<Fault>) -> Self {
        let contexts: Vec<Vec<u64>> = match fault {
            Some(_) => plan.contexts().iter().map(|c| c.pages.clone()).collect(),
            None => Vec::new(),
        };
        let pages = contexts.iter().enumerate().flat_map(|(context, pages)| {
            let pages = pages.iter().enumerate();
            pages.map(move |(index, gpa)| (gpa / PAGE_SIZE, (context, index)))
        });
        Faulty {
            memory,
            fault,
            pages: pages.collect(),
            contexts,
            buffer: RefCell::default(),
        }
    }

    /// The fault, and which context page an access begins with, if it is one of whole context
    /// pages. Copies of context pages never hold anything else.
    fn context_access(&self, gpa: u64, len: usize) -> Option<Fault> {
        let whole = gpa % PAGE_SIZE == 0 && len > 0 && len % PAGE == 0;
        self.fault
            .filter(|_| whole && self.pages.contains_key(&(gpa / PAGE_SIZE)))
    }
}

impl<M: Bytes<GuestAddress>> Faulty<M> {
    fn write_page(&self, fault: Fault, gpa: u64, page: &[u8]) -> Result<(), M::E> {
        let straight = |gpa| self.memory.write_slice(page, GuestAddress(gpa));
        let Some((context, index)) = self.pages.get(&(gpa / PAGE_SIZE)).copied() else {
            return straight(gpa);
        };
        // The indices are those `new` has put into `pages`.
        let gpas = &self.contexts[context];
        match fault {
            Fault::LoseTail if index + 1 == gpas.len() => Ok(()),
            Fault::SwapPages if index < 2 && gpas.len() > 1 => straight(gpas[1 - index]),
            Fault::StaleSkip => {
                self.buffer.borrow_mut().written(context, index, page);
                straight(gpa)
            }
            _ => straight(gpa),
        }
    }

    fn read_page(&self, fault: Fault, gpa: u64, page: &mut [u8]) -> Result<(), M::E> {
        if let (Fault::StaleSkip, Some((context, index))) =
            (fault, self.pages.get(&(gpa / PAGE_SIZE)).copied())
        {
            if self.buffer.borrow_mut().read(context, index, page) {
                return Ok(());
            }
        }
        self.memory.read_slice(page, GuestAddress(gpa))
    }
}

/// What the engine's one buffer of context pages holds.
#[derive(Debug, Default)]
struct StaleBuffer {
    context: Option<usize>,
    /// Pages of `context`, as far as they were written back.
    current: HashMap<usize, Vec<u8>>,
    /// Pages of the context that ran before.
    previous: HashMap<usize, Vec<u8>>,
    /// `context` was not populated since the switch to it.
    stale: bool,
    populating: bool,
}

impl StaleBuffer {
    fn switch_to(&mut self, context: usize) {
        if self.context != Some(context) {
            self.context = Some(context);
            self.previous = std::mem::take(&mut self.current);
            self.stale = true;
            self.populating = false;
        }
    }

    fn written(&mut self, context: usize, index: usize, page: &[u8]) {
        self.switch_to(context);
        self.current.insert(index, page.to_vec());
        if self.populating {
            self.stale = false;
        }
    }

    /// Fills `page` and returns true if what the buffer holds is stale.
    fn read(&mut self, context: usize, index: usize, page: &mut [u8]) -> bool {
        self.switch_to(context);
        if !self.stale {
            return false;
        }
        self.populating = true;
        match self.previous.get(&index) {
            Some(bytes) if bytes.len() == page.len() => page.copy_from_slice(bytes),
            _ => page.fill(0),
        }
        true
    }
}

impl<M: Bytes<GuestAddress>> Bytes<GuestAddress> for Faulty<M> {
    type E = M::E;

    fn write(&self, buf: &[u8], addr: GuestAddress) -> Result<usize, M::E> {
        match self.context_access(addr.0, buf.len()) {
            None => self.memory.write(buf, addr),
            Some(_) => self.write_slice(buf, addr).map(|()| buf.len()),
        }
    }

    fn read(&self, buf: &mut [u8], addr: GuestAddress) -> Result<usize, M::E> {
        match self.context_access(addr.0, buf.len()) {
            None => self.memory.read(buf, addr),
            Some(_) => self.read_slice(buf, addr).map(|()| buf.len()),
        }
    }

    fn write_slice(&self, buf: &[u8], addr: GuestAddress) -> Result<(), M::E> {
        let Some(fault) = self.context_access(addr.0, buf.len()) else {
            return self.memory.write_slice(buf, addr);
        };
        for (page, gpa) in buf.chunks(PAGE).zip((addr.0..).step_by(PAGE)) {
            self.write_page(fault, gpa, page)?;
        }
        Ok(())
    }

    fn read_slice(&self, buf: &mut [u8], addr: GuestAddress) -> Result<(), M::E> {
        let Some(fault) = self.context_access(addr.0, buf.len()) else {
            return self.memory.read_slice(buf, addr);
        };
        for (page, gpa) in buf.chunks_mut(PAGE).zip((addr.0..).step_by(PAGE)) {
            self.read_page(fault, gpa, page)?;
        }
        Ok(())
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        addr: GuestAddress,
        src: &mut F,
        count: usize,
    ) -> Result<usize, M::E> {
        self.memory.read_volatile_from(addr, src, count)
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        addr: GuestAddress,
        src: &mut F,
        count: usize,
    ) -> Result<(), M::E> {
        self.memory.read_exact_volatile_from(addr, src, count)
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        addr: GuestAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<usize, M::E> {
        self.memory.write_volatile_to(addr, dst, count)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        addr: GuestAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<(), M::E> {
        self.memory.write_all_volatile_to(addr, dst, count)
    }

    fn store<T: AtomicAccess>(
        &self,
        val: T,
        addr: GuestAddress,
        order: Ordering,
    ) -> Result<(), M::E> {
        self.memory.store(val, addr, order)
    }

    fn load<T: AtomicAccess>(&self, addr: GuestAddress, order: Ordering) -> Result<T, M::E> {
        self.memory.load(addr, order)
    }
}
