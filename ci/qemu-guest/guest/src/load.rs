// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! DMA that does not end while pages are unmapped: the blitter runs one long batch after the other.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vfio_ioctls::VfioContainer;

use crate::context::{Context, Shape};
use crate::engine::{Engine, BLITTER};
use crate::machine::{Machine, DEADLINE};
use crate::memory::{self, PAGE};

/// The context of the blitter.
const CONTEXT: u32 = 30;

/// Runs of the long batch in a workload; a workload may have 262 144 commands.
const TIMES: usize = 900;

/// Where the device finds pages that are mapped and unmapped beside what runs, and how many they are.
const OTHERS: u64 = 0x8000_0000;
const OTHER_PAGES: usize = 64;

/// Where it finds the page that is unmapped under a running batch.
const REVOKED: u64 = 0x9000_0000;

#[derive(Debug)]
pub struct Load {
    engine: Engine,
    contexts: [Context; 1],
    pub submissions: u64,
}

impl Load {
    pub fn new(machine: &mut Machine) -> Self {
        let Machine {
            memory,
            device,
            rng,
            ..
        } = machine;
        let engine = Engine::new(memory, &device.bar, &BLITTER);
        let shape = Shape {
            ring: 4,
            four_level: true,
            scattered: false,
            inhibited: false,
            indirect: false,
        };
        let context = Context::new(memory, &device.bar, &BLITTER, CONTEXT, shape, rng);
        Load {
            engine,
            contexts: [context],
            submissions: 0,
        }
    }

    /// Begins a workload.
    pub fn submit(&mut self, machine: &mut Machine) {
        let [context] = &mut self.contexts;
        let (memory, rng) = (&mut machine.memory, &mut machine.rng);
        let work = context.long_request(memory, &self.engine, TIMES, rng);
        self.engine.prepare(context, work);
        self.engine.submit(&machine.device.bar, &[context], true);
        self.submissions += 1;
    }

    /// When a workload is done, compares what it did and begins the next.
    pub fn poll(&mut self, machine: &mut Machine) {
        if self.engine.is_done(&machine.memory) {
            self.complete(machine);
            self.submit(machine);
        }
    }

    pub fn is_done(&self, machine: &Machine) -> bool {
        self.engine.is_done(&machine.memory)
    }

    pub fn complete(&mut self, machine: &mut Machine) {
        self.engine.complete(&mut machine.memory, &self.contexts);
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }
}

/// Which workload of an engine runs, from what that has written to its status page.
#[derive(Clone, Copy, Debug)]
pub struct Progress([*const u32; 2]);

// SAFETY: the memory that the device writes is never given back, and is only read here.
unsafe impl Send for Progress {}

impl Progress {
    pub fn of(engine: &Engine, machine: &Machine) -> Self {
        Progress(engine.progress(&machine.memory))
    }

    /// The number of the workload that has begun and is not done.
    fn running(&self) -> Option<u32> {
        // SAFETY: as above.
        let [started, done] = self.0.map(|word| unsafe { word.read_volatile() });
        (started != done).then_some(started)
    }
}

/// Maps and unmaps pages in a thread of its own, one by one.
#[derive(Debug)]
pub struct Unmaps {
    counts: Arc<Counts>,
    thread: JoinHandle<io::Result<()>>,
}

#[derive(Debug, Default)]
struct Counts {
    all: AtomicU64,
    in_flight: AtomicU64,
    stop: AtomicBool,
}

impl Unmaps {
    pub fn start(container: Arc<VfioContainer>, progress: Progress) -> io::Result<Self> {
        let counts = Arc::new(Counts::default());
        let counted = counts.clone();
        let pages = memory::allocate(OTHER_PAGES, false)?.expose_provenance();
        let run = move || {
            // Whole, not its fields.
            let progress = progress;
            for at in (0..OTHER_PAGES).cycle() {
                if counted.stop.load(Ordering::Relaxed) {
                    break;
                }
                let iova = OTHERS + (at * PAGE) as u64;
                let page = ptr::with_exposed_provenance_mut(pages + at * PAGE);
                map(&container, iova, page)?;
                // The same workload before and after: it ran all the while.
                let before = progress.running();
                unmap(&container, iova)?;
                let in_flight = before.is_some() && before == progress.running();
                counted
                    .in_flight
                    .fetch_add(in_flight.into(), Ordering::Relaxed);
                counted.all.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        Ok(Unmaps {
            counts,
            thread: thread::spawn(run),
        })
    }

    pub fn in_flight(&self) -> u64 {
        self.counts.in_flight.load(Ordering::Relaxed)
    }

    pub fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// All, and those during which a workload ran.
    pub fn end(self) -> io::Result<(u64, u64)> {
        self.counts.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(done) => done?,
            Err(_) => return Err(io::Error::other("the thread that unmaps has panicked")),
        }
        let all = self.counts.all.load(Ordering::Relaxed);
        Ok((all, self.counts.in_flight.load(Ordering::Relaxed)))
    }
}

/// Unmaps the page that a running batch writes, and looks that nothing comes there any more. How often the
/// batch did not come to its end.
pub fn revoke(
    machine: &mut Machine,
    load: &mut Load,
    container: &VfioContainer,
    rounds: usize,
) -> io::Result<usize> {
    let page = memory::allocate(1, false)?;
    let progress = Progress::of(&load.engine, machine);
    let mut met = 0;
    for round in 0..rounds {
        map(container, REVOKED, page)?;
        let entry = load.contexts[0].aim(&mut machine.memory, REVOKED);
        machine.page_table_entry_written(entry);
        load.submit(machine);
        let deadline = Instant::now() + DEADLINE;
        while progress.running().is_none() {
            if Instant::now() > deadline {
                return Err(io::Error::other("the blitter does not begin"));
            }
        }
        unmap(container, REVOKED)?;
        let ours = [0xa5 ^ round as u8; PAGE];
        // SAFETY: a page of this program, of which nobody has references.
        unsafe { page.cast::<[u8; PAGE]>().write_volatile(ours) };
        thread::sleep(Duration::from_millis(5));
        // SAFETY: as above.
        let now = unsafe { page.cast::<[u8; PAGE]>().read_volatile() };
        let wrong = (0..PAGE).filter(|at| now[*at] != ours[*at]).count();
        machine.memory.verified.bytes += PAGE as u64;
        if wrong > 0 {
            let what = || format!("{wrong} bytes came to a page that was unmapped");
            machine.memory.verified.wrong(wrong as u64, what);
        }
        // To the driver the engine hangs.
        let memory = &mut machine.memory;
        let done = load.engine.reset(&machine.device.bar, memory);
        load.contexts[0].forget(memory, done);
        memory.verify("a context that was stopped", load.contexts[0].pages());
        met += usize::from(!done);
    }
    Ok(met)
}

/// Maps a page that stays what it is for as long as this program runs.
pub fn map(container: &VfioContainer, iova: u64, page: *mut u8) -> io::Result<()> {
    // SAFETY: nobody has references into memory that is given to the device.
    unsafe { container.vfio_dma_map(iova, PAGE, page) }.map_err(io::Error::other)
}

fn unmap(container: &VfioContainer, iova: u64) -> io::Result<()> {
    container
        .vfio_dma_unmap(iova, PAGE)
        .map_err(io::Error::other)
}
