// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The execution of a job's commands.

use crate::command::{
    dword_at, dwords, length, name, BatchStart, Gtt, Operation, Store, Target, Value,
};
use crate::engine::{registers, EngineJob, Executed};
use crate::error::EngineFault;
use crate::memory;
use crate::regs::PAGE_MASK;

/// Batches are read by lines of this many bytes, which never cross a page.
const LINE: usize = 64;
/// Bits 22:2: the offset of a register in MI_LOAD_REGISTER_IMM.
const REGISTER: u32 = 0x007f_fffc;

/// A batch in execution, as the address of its next command.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Batch {
    gtt: Gtt,
    gma: u64,
    /// Which of the job's copies it is executed from.
    copy: Option<usize>,
}

/// Where a command was found.
#[derive(Clone, Copy, Debug)]
enum Place {
    Copied(&'static str),
    Batch(Batch),
}

/// Executes the commands of one job.
pub(super) struct Execution<'a, 'b> {
    job: &'a mut EngineJob<'b>,
    steps_left: u32,
    step_limit: u32,
    /// Time stamp of the context before it ran.
    began: u32,
    executed: Executed,
    /// The batch of the first level, and that of the second.
    batches: Vec<Batch>,
    /// What was read last, and from where. A write may change it.
    line: Option<(Batch, [u8; LINE])>,
    command: Vec<u32>,
    place: Place,
}

impl<'a, 'b> Execution<'a, 'b> {
    pub(super) fn new(job: &'a mut EngineJob<'b>, step_limit: u32) -> Self {
        Self {
            began: job.image.ctx_timestamp(),
            job,
            steps_left: step_limit,
            step_limit,
            executed: Executed::default(),
            batches: Vec::new(),
            line: None,
            command: Vec::new(),
            place: Place::Copied("the ring"),
        }
    }

    pub(super) fn run(mut self) -> Result<Executed, EngineFault> {
        self.run_copied("the indirect context batch", self.job.indirect_ctx)?;
        if let Some(gma) = self.job.per_ctx {
            let batch = self.batch(Gtt::Global, gma);
            self.batches.push(batch);
            self.run_copied("the per-context batch", &[])?;
        }
        self.run_copied("the ring", self.job.ring)?;
        Ok(self.executed)
    }

    /// Executes commands that were copied, and the batches they start.
    fn run_copied(&mut self, name: &'static str, bytes: &[u8]) -> Result<(), EngineFault> {
        let mut copied = dwords(bytes);
        loop {
            match self.batches.last().copied() {
                Some(batch) => self.fetch(batch)?,
                None => match copied.next() {
                    Some(header) => self.fetch_copied(header, &mut copied, name)?,
                    None => return Ok(()),
                },
            }
            let limit = self.step_limit;
            self.steps_left = self.steps_left.checked_sub(1).ok_or_else(|| {
                EngineFault::new(format!("the workload has more than {limit} commands"))
            })?;
            self.execute()?;
        }
    }

    fn fetch_copied(
        &mut self,
        header: u32,
        copied: &mut impl Iterator<Item = u32>,
        name: &'static str,
    ) -> Result<(), EngineFault> {
        let len = self.begin_command(header, Place::Copied(name))?;
        memory::reserve(&mut self.command, len - 1)?;
        self.command.extend(copied.take(len - 1));
        if self.command.len() < len {
            return Err(self.fault("does not end there"));
        }
        Ok(())
    }

    fn fetch(&mut self, batch: Batch) -> Result<(), EngineFault> {
        let mut next = batch;
        let header = self.dword(next)?;
        let len = self.begin_command(header, Place::Batch(batch))?;
        memory::reserve(&mut self.command, len - 1)?;
        for _ in 1..len {
            next.gma = next.gma.wrapping_add(4);
            let dword = self.dword(next)?;
            self.command.push(dword);
        }
        next.gma = next.gma.wrapping_add(4);
        if let Some(batch) = self.batches.last_mut() {
            *batch = next;
        }
        Ok(())
    }

    /// Takes the first dword of a command; gives the number of its dwords.
    fn begin_command(&mut self, header: u32, place: Place) -> Result<usize, EngineFault> {
        self.place = place;
        self.command.clear();
        self.command.push(header);
        length(header).ok_or_else(|| self.fault("is unknown"))
    }

    fn dword(&mut self, at: Batch) -> Result<u32, EngineFault> {
        if let Some(copy) = at.copy.and_then(|copy| self.job.batches.get(copy)) {
            // A batch is executed from its beginning on.
            let offset = (at.gma - copy.gma) as usize;
            return dword_at(&copy.bytes, offset)
                .ok_or_else(|| self.fault("is followed by nothing that was audited"));
        }
        let offset = at.gma % LINE as u64;
        let wanted = Batch {
            gma: at.gma - offset,
            ..at
        };
        let bytes = match self.line {
            Some((held, bytes)) if held == wanted => bytes,
            _ => {
                let mut bytes = [0; LINE];
                self.job.memory.read(wanted.gtt, wanted.gma, &mut bytes)?;
                self.line = Some((wanted, bytes));
                bytes
            }
        };
        // Commands are aligned to dwords, so one is in the line.
        Ok(dword_at(&bytes, offset as usize).unwrap_or(0))
    }

    fn execute(&mut self) -> Result<(), EngineFault> {
        match Operation::decode(&self.command) {
            Operation::Nothing => Ok(()),
            Operation::UserInterrupt => {
                self.executed.user_interrupts += 1;
                Ok(())
            }
            Operation::BatchEnd => match self.batches.pop() {
                Some(_) => Ok(()),
                None => Err(self.fault("ends no batch")),
            },
            Operation::BatchStart(start) => self.start_batch(start),
            Operation::Store(store) => self.store(store),
            Operation::LoadRegisters(pairs) => {
                // A register is looked for in all of a page, so each counts as a command.
                let further = (pairs.len() as u32 / 2).saturating_sub(1);
                self.steps_left = self.steps_left.saturating_sub(further);
                for pair in pairs.chunks_exact(2) {
                    let (register, value) = (pair[0] & REGISTER, pair[1]);
                    registers::load(self.job.image, self.job.engine, register, value);
                }
                Ok(())
            }
            Operation::Other => Err(self.fault("is not simulated")),
        }
    }

    fn start_batch(&mut self, start: BatchStart) -> Result<(), EngineFault> {
        let BatchStart { gtt, gma, .. } = start;
        self.check_privilege(gtt)?;
        match (self.batches.len(), start.second_level) {
            (0, false) | (1, true) => {}
            (1, false) => self.batches.clear(),
            (0, true) => return Err(self.fault("starts the second level without a first")),
            _ => return Err(self.fault("starts a batch from the second level")),
        }
        let batch = self.batch(gtt, gma);
        self.batches.push(batch);
        Ok(())
    }

    /// The batch that begins at `gma`.
    fn batch(&self, gtt: Gtt, gma: u64) -> Batch {
        let copies = self.job.batches;
        let copy = copies.iter().position(|copy| copy.gma == gma);
        Batch {
            gtt,
            gma,
            copy: copy.filter(|_| gtt == Gtt::Global),
        }
    }

    fn store(&mut self, store: Store) -> Result<(), EngineFault> {
        let (gtt, gma) = match store.target {
            Target::Memory { gtt, gma } => {
                self.check_privilege(gtt)?;
                (gtt, gma)
            }
            Target::StatusPage(offset) => {
                let page = self.job.status_page & !PAGE_MASK;
                (Gtt::Global, page + offset)
            }
        };
        self.line = None;
        let memory = &mut *self.job.memory;
        match store.value {
            Value::Dword(value) => memory.write(gtt, gma, &value.to_le_bytes())?,
            Value::Qword(value) => memory.write(gtt, gma, &value.to_le_bytes())?,
            Value::Timestamp => memory.write(gtt, gma, &u64::from(self.began).to_le_bytes())?,
        }
        Ok(())
    }

    /// What runs in the address space of a program has no say in the one of the driver.
    fn check_privilege(&self, gtt: Gtt) -> Result<(), EngineFault> {
        match self.place {
            Place::Batch(batch) if batch.gtt == Gtt::PerProcess && gtt == Gtt::Global => {
                Err(self.fault("uses the GGTT"))
            }
            _ => Ok(()),
        }
    }

    fn fault(&self, what: &str) -> EngineFault {
        let header = self.command.first().copied().unwrap_or(0);
        let command = name(header).unwrap_or("command");
        let place = match self.place {
            Place::Copied(name) => name.to_string(),
            Place::Batch(batch) => format!("the batch at {} address {:#x}", batch.gtt, batch.gma),
        };
        EngineFault::new(format!("{command} ({header:#010x}) in {place} {what}"))
    }
}
