// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The default auditor.

use std::collections::BTreeSet;

use crate::audit::{CommandAuditor, CommandError, CommandPlace, CommandProblem, CopiedBatch, Scan};
use crate::command::{dword_at, dwords, length, opcode, Gtt, Operation, Store, Target};
use crate::error::{Error, Result};
use crate::memory;
use crate::regs::{PAGE_MASK, PAGE_SIZE, REGISTER_SPACE};

/// Commands that a guest may not use.
const FORBIDDEN: [u8; 7] = [
    opcode::SEMAPHORE_WAIT,
    opcode::STORE_DATA_INDEX,
    opcode::UPDATE_GTT,
    opcode::CLFLUSH,
    opcode::REPORT_PERF_COUNT,
    opcode::COPY_MEM_MEM,
    opcode::CONDITIONAL_BATCH_BUFFER_END,
];

/// Judges what can be judged without the register tables of the device.
///
/// It looks at the ring, the indirect context batch, and the batches in the GGTT that these start; of the
/// latter the engine is given the copies it has looked at. Batches in the PPGTT are not read: they come
/// from programs, from which the device itself keeps what is not for them.
///
/// | refused | errno |
/// |---|---|
/// | a command no engine has; MI_SEMAPHORE_WAIT, MI_STORE_DATA_INDEX, MI_UPDATE_GTT, MI_CLFLUSH, MI_REPORT_PERF_COUNT, MI_COPY_MEM_MEM, MI_CONDITIONAL_BATCH_BUFFER_END; a length that the command cannot have | `EBADRQC` |
/// | MI_LOAD_REGISTER_IMM with other than 3 to 127 dwords, or with a register beyond the register space | `EFAULT` |
/// | a command that does not end where its ring or batch does | `EFAULT` |
/// | a use of the GGTT outside the graphics memory of the vGPU | `EFAULT` |
/// | a batch of the second level started from the ring, any batch from the second level, an end of a batch in the ring | `EFAULT` |
/// | more than [`BATCH_LIMIT`](Self::BATCH_LIMIT) bytes of batches, each of which counts as a page at least | `EFAULT` |
///
/// ```
/// use gvt_scheduler::{
///     ring_context, AddressingMode, ContextDescriptor, EngineId, FailsafeReason, Vgpu, VgpuConfig,
/// };
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)])?;
/// let mut vgpu = Vgpu::new(memory.clone(), (), (), VgpuConfig::default());
/// for page in [2, 9] {
///     vgpu.write_ggtt_entry(page, u64::from(page) << 12 | 1)?;
/// }
/// for (field, value) in [(ring_context::TAIL, 16), (ring_context::START, 2 << 12)] {
///     memory.write_obj::<u32>(value, GuestAddress(0x9000 + field as u64))?;
/// }
/// memory.write_obj::<u32>(0x0e00_0002, GuestAddress(0x2000))?; // MI_SEMAPHORE_WAIT
///
/// let context = u64::from(ContextDescriptor::new(8, 42, AddressingMode::Legacy64));
/// let port = EngineId::Bcs.mmio_base() + 0x230;
/// for dword in [0, 0, (context >> 32) as u32] {
///     vgpu.mmio_write(port, dword)?;
/// }
/// let error = vgpu.mmio_write(port, context as u32).unwrap_err();
/// assert_eq!(error.errno(), libc::EBADRQC);
/// assert_eq!(vgpu.failsafe(), Some(FailsafeReason::GuestError));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MiAuditor {
    batch_limit: usize,
}

impl MiAuditor {
    /// Bytes of batches in the GGTT, of one workload, that are looked at unless another limit is
    /// [set](Self::batch_limit). Drivers have a few hundred bytes of them.
    pub const BATCH_LIMIT: usize = 1 << 20;

    /// An auditor with the usual limit.
    pub const fn new() -> Self {
        Self {
            batch_limit: Self::BATCH_LIMIT,
        }
    }

    /// Looks at `bytes` of batches of a workload at most.
    pub const fn batch_limit(self, bytes: usize) -> Self {
        Self { batch_limit: bytes }
    }
}

impl Default for MiAuditor {
    fn default() -> Self {
        Self::new()
    }
}

impl CommandAuditor for MiAuditor {
    fn audit(&self, scan: &mut Scan<'_>) -> Result<()> {
        let mut next: Vec<(u64, Level)> = Vec::new();
        for (place, commands) in [
            (CommandPlace::IndirectCtx, scan.indirect_ctx),
            (CommandPlace::Ring, scan.ring),
        ] {
            audit_commands(scan, place, Level::Ring, commands, &mut next)?;
        }
        if let Some(gma) = scan.per_ctx {
            memory::push(&mut next, (gma, Level::First))?;
        }
        // A ring has room for 170 000 starts of batches it has started before.
        let mut seen = BTreeSet::new();
        let mut left = self.batch_limit;
        while let Some((gma, level)) = next.pop() {
            if !seen.insert((gma, level)) {
                continue;
            }
            let place = CommandPlace::Batch { gma };
            let copied = scan.batches().iter().position(|batch| batch.gma == gma);
            let copied = match copied {
                Some(copied) => copied,
                None => {
                    let bytes = self.copy_batch(scan, gma, left)?;
                    // So a guest cannot have any number of short ones kept.
                    left = left.saturating_sub(bytes.len().max(PAGE_SIZE));
                    scan.keep_batch(CopiedBatch { gma, bytes })?;
                    scan.batches().len() - 1
                }
            };
            let bytes = std::mem::take(&mut scan.batches[copied].bytes);
            let audited = audit_commands(scan, place, level, &bytes, &mut next);
            scan.batches[copied].bytes = bytes;
            audited?;
        }
        Ok(())
    }
}

impl MiAuditor {
    /// Reads a batch up to the command that leaves it, page by page.
    fn copy_batch(&self, scan: &mut Scan<'_>, gma: u64, left: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut at = 0;
        loop {
            while at >= bytes.len() {
                read_on(scan, gma, &mut bytes)?;
            }
            let header = dword_at(&bytes, at).unwrap_or(0);
            let refuse = |problem| refuse(header, CommandPlace::Batch { gma }, at, problem);
            let len = length(header).ok_or_else(|| refuse(CommandProblem::Unknown))?;
            let end = at + 4 * len;
            if end > left {
                let limit = self.batch_limit;
                return Err(refuse(CommandProblem::TooLong { limit }));
            }
            if leaves(header) {
                while bytes.len() < end {
                    read_on(scan, gma, &mut bytes)?;
                }
                bytes.truncate(end);
                return Ok(bytes);
            }
            at = end;
        }
    }
}

/// Where commands stand, as the device counts.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Level {
    Ring,
    First,
    Second,
}

/// Whether no command of the batch is executed behind this one: its end, or a jump.
fn leaves(header: u32) -> bool {
    const SECOND_LEVEL: u32 = 1 << 22;
    match opcode::mi(header) {
        Some(opcode::BATCH_BUFFER_END) => true,
        Some(opcode::BATCH_BUFFER_START) => header & SECOND_LEVEL == 0,
        _ => false,
    }
}

/// Reads what follows `bytes` in its page.
fn read_on(scan: &mut Scan<'_>, gma: u64, bytes: &mut Vec<u8>) -> Result<()> {
    let done = bytes.len();
    let next = gma + done as u64;
    let len = PAGE_SIZE - (next & PAGE_MASK) as usize;
    memory::grow(bytes, len)?;
    scan.read(next, &mut bytes[done..])
}

/// Judges commands one by one; adds the batches in the GGTT that they start to `next`.
fn audit_commands(
    scan: &Scan<'_>,
    place: CommandPlace,
    level: Level,
    bytes: &[u8],
    next: &mut Vec<(u64, Level)>,
) -> Result<()> {
    let mut command = Vec::new();
    let mut at = 0;
    while let Some(header) = dword_at(bytes, at) {
        let refuse = |problem| refuse(header, place, at, problem);
        let len = length(header).ok_or_else(|| refuse(CommandProblem::Unknown))?;
        check_kind(header, len).map_err(refuse)?;
        let end = at + 4 * len;
        let all = bytes.get(at..end);
        let all = all.ok_or_else(|| refuse(CommandProblem::Truncated))?;
        command.clear();
        memory::reserve(&mut command, len)?;
        command.extend(dwords(all));
        check_registers(&command).map_err(refuse)?;
        if let Some((gma, len)) = global_address(&command) {
            if !scan.owns(gma, len) {
                return Err(refuse(CommandProblem::Address { gma, len }));
            }
        }
        match Operation::decode(&command) {
            Operation::BatchEnd if level == Level::Ring => {
                return Err(refuse(CommandProblem::BatchEnd));
            }
            Operation::BatchStart(start) => {
                let started = match (level, start.second_level) {
                    (Level::Ring | Level::First, false) => Level::First,
                    (Level::First, true) => Level::Second,
                    _ => return Err(refuse(CommandProblem::BatchStart)),
                };
                if start.gtt == Gtt::Global {
                    memory::push(next, (start.gma, started))?;
                }
            }
            _ => {}
        }
        at = end;
    }
    Ok(())
}

/// Whether the command is allowed at all, and with this length.
fn check_kind(header: u32, len: usize) -> std::result::Result<(), CommandProblem> {
    if header >> 16 == opcode::PIPE_CONTROL && len != 6 {
        return Err(CommandProblem::Length { dwords: len });
    }
    let Some(number) = opcode::mi(header) else {
        return Ok(());
    };
    if FORBIDDEN.contains(&number) {
        return Err(CommandProblem::Forbidden);
    }
    let possible = match number {
        opcode::BATCH_BUFFER_START | opcode::LOAD_REGISTER_REG => len == 3,
        opcode::STORE_DATA_IMM => len == if header >> 21 & 1 == 0 { 4 } else { 5 },
        opcode::STORE_REGISTER_MEM | opcode::LOAD_REGISTER_MEM => len == 4,
        opcode::FLUSH_DW => len == 4 || len == 5,
        opcode::LOAD_REGISTER_IMM => (3..=127).contains(&len) && len % 2 == 1,
        _ => true,
    };
    if possible {
        Ok(())
    } else {
        Err(CommandProblem::Length { dwords: len })
    }
}

fn check_registers(command: &[u32]) -> std::result::Result<(), CommandProblem> {
    let Operation::LoadRegisters(pairs) = Operation::decode(command) else {
        return Ok(());
    };
    let mut registers = pairs.iter().step_by(2).map(|register| register & !0x3);
    match registers.find(|register| *register >= REGISTER_SPACE) {
        Some(register) => Err(CommandProblem::Register { register }),
        None => Ok(()),
    }
}

/// What the command uses of the GGTT, as address and length.
fn global_address(command: &[u32]) -> Option<(u64, u64)> {
    match Operation::decode(command) {
        Operation::BatchStart(start) if start.gtt == Gtt::Global => Some((start.gma, 4)),
        Operation::Store(
            store @ Store {
                target:
                    Target::Memory {
                        gtt: Gtt::Global,
                        gma,
                    },
                ..
            },
        ) => Some((gma, store.len())),
        Operation::Other => {
            const GLOBAL: u32 = 1 << 22;
            let &[header, _, low, high] = command else {
                return None;
            };
            let number = opcode::mi(header)?;
            let accesses =
                [opcode::STORE_REGISTER_MEM, opcode::LOAD_REGISTER_MEM].contains(&number);
            let gma = u64::from(high & 0xffff) << 32 | u64::from(low & !0x3);
            (accesses && header & GLOBAL != 0).then_some((gma, 4))
        }
        _ => None,
    }
}

fn refuse(header: u32, place: CommandPlace, offset: usize, problem: CommandProblem) -> Error {
    Error::Command(CommandError {
        header,
        place,
        offset,
        problem,
    })
}
