// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong, and what the kernel would return for it.

use std::borrow::Cow;
use std::io;

use crate::audit::CommandError;
use crate::command::Gtt;
use crate::descriptor::AddressingMode;
use crate::observe::AccessKind;
use crate::regs::EngineId;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// The cause of a failed access or pin, of whatever type the memory behind it has.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why an operation failed.
///
/// ```
/// use gvt_scheduler::{Error, Ggtt};
///
/// let error = Ggtt::new(16).write_entry(16, 0).unwrap_err();
/// assert_eq!(error.errno(), libc::EINVAL);
/// assert_eq!(error.to_string(), "GGTT entry 0x10 is beyond the table of 0x10 entries");
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A register offset is not a multiple of four or lies outside the register space.
    #[error("register offset {offset:#x} is unaligned or beyond the register space")]
    Register {
        /// Offset in the MMIO BAR.
        offset: u32,
    },
    /// An entry number lies outside the GGTT.
    #[error("GGTT entry {index:#x} is beyond the table of {entries:#x} entries")]
    GgttIndex {
        /// Number of the entry.
        index: u32,
        /// Size of the table, in entries.
        entries: u32,
    },
    /// The first element of a submission is not in use.
    #[error("element 0 of a submission to {engine:?} is not valid")]
    EmptySubmission {
        /// Engine the submission was for.
        engine: EngineId,
    },
    /// An element of a submission lacks the privilege bit.
    #[error("element {element} of a submission to {engine:?} lacks the privilege bit")]
    NotPrivileged {
        /// Engine the submission was for.
        engine: EngineId,
        /// Which of the two elements.
        element: usize,
    },
    /// The queue of an engine has no room for a submission.
    #[error("the queue of {engine:?} is full: it takes {limit} workloads")]
    TooManyWorkloads {
        /// Engine the submission was for.
        engine: EngineId,
        /// Workloads the queue takes.
        limit: usize,
    },
    /// The addressing mode of a context is not one of the two legacy ones.
    #[error("addressing mode {mode:?} is not supported")]
    AddressingMode {
        /// The mode that was asked for.
        mode: AddressingMode,
    },
    /// The page of the ring context has no translation.
    #[error("the ring context of LRCA {lrca:#x} does not translate")]
    RingContextUnmapped {
        /// GGTT page number of the context object.
        lrca: u32,
    },
    /// A structure lies outside the graphics memory of the vGPU.
    #[error("{name} at {gma:#x} of {len:#x} bytes is outside the graphics memory of the vGPU")]
    OutsideGraphicsMemory {
        /// What lies there.
        name: &'static str,
        /// Graphics address.
        gma: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A structure does not begin at a page.
    #[error("{name} at {gma:#x} does not begin at a page")]
    NotPageAligned {
        /// What lies there.
        name: &'static str,
        /// Graphics address.
        gma: u64,
    },
    /// The head or the tail of a ring lies outside the ring.
    #[error("head {head:#x} or tail {tail:#x} is beyond the ring of {size:#x} bytes")]
    RingPointer {
        /// Offset of the head.
        head: u32,
        /// Offset of the tail.
        tail: u32,
        /// Size of the ring in bytes.
        size: u32,
    },
    /// A page of a ring or of an indirect context batch has no translation.
    #[error("graphics address {gma:#x} does not translate")]
    BufferUnmapped {
        /// Graphics address.
        gma: u64,
    },
    /// A page of a context object has no translation.
    #[error("page {page} of the context at LRCA {lrca:#x} does not translate")]
    ContextPageUnmapped {
        /// GGTT page number of the context object.
        lrca: u32,
        /// Page of the object.
        page: usize,
    },
    /// The buffer for the pages of a context has another size than they.
    #[error("{actual:#x} bytes were given for context pages of {expected:#x} bytes")]
    BufferSize {
        /// Bytes of the pages.
        expected: usize,
        /// Bytes of the buffer.
        actual: usize,
    },
    /// A page table holds an entry for a page of 1 GiB.
    #[error("page table entry {entry:#x} maps a page of 1 GiB")]
    HugePage {
        /// The entry.
        entry: u64,
    },
    /// The guest uses more page tables than may be shadowed.
    #[error("no more than {limit} page tables and roots are shadowed")]
    TooManyTables {
        /// Tables and roots that may be shadowed.
        limit: usize,
    },
    /// There is no memory for what the guest asks for.
    #[error("{bytes:#x} bytes of memory are not there")]
    NoMemory {
        /// What was asked for in vain.
        bytes: usize,
    },
    /// A page that a page table maps could not be pinned.
    #[error("guest frame {gfn:#x} cannot be pinned")]
    LeafPin {
        /// Guest frame number, in pages of 4 KiB.
        gfn: u64,
        /// What the pinning said.
        source: Cause,
    },
    /// Guest memory could not be read.
    #[error("cannot read {len:#x} bytes of guest memory at {gpa:#x} ({kind})")]
    Read {
        /// What was read.
        kind: AccessKind,
        /// Guest physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
        /// What the memory said.
        source: Cause,
    },
    /// Guest memory could not be written.
    #[error("cannot write {len:#x} bytes of guest memory at {gpa:#x} ({kind})")]
    Write {
        /// What was written.
        kind: AccessKind,
        /// Guest physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
        /// What the memory said.
        source: Cause,
    },
    /// A command is not for guests, or is wrong.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// An address that an engine uses has no translation.
    #[error("{gtt} address {gma:#x} does not translate")]
    NotTranslated {
        /// The table it goes through.
        gtt: Gtt,
        /// Graphics address.
        gma: u64,
    },
    /// Both execlist slots of an engine are taken.
    #[error("the execlist queue of {engine:?} is full")]
    QueueFull {
        /// The engine.
        engine: EngineId,
    },
    /// A context finished that was not the running one.
    #[error("context {context_id:#x} is not running on {engine:?}")]
    NotRunning {
        /// The engine.
        engine: EngineId,
        /// Identifier of the context that finished.
        context_id: u32,
    },
    /// The engine reported a fault.
    #[error("{engine:?} failed")]
    Engine {
        /// The engine.
        engine: EngineId,
        /// What it said.
        source: EngineFault,
    },
}

impl Error {
    /// The error number the kernel has for this failure.
    ///
    /// The kernel ignores failed reads and writes of guest memory; here they are `EFAULT`. It has no
    /// limit to the workloads of a queue; here there is one, and it is `EBUSY`.
    pub fn errno(&self) -> i32 {
        match self {
            Error::BufferUnmapped { .. }
            | Error::ContextPageUnmapped { .. }
            | Error::NotTranslated { .. }
            | Error::Read { .. }
            | Error::Write { .. } => libc::EFAULT,
            Error::Command(error) => error.errno(),
            Error::LeafPin { .. } => libc::ENXIO,
            Error::TooManyWorkloads { .. } => libc::EBUSY,
            Error::TooManyTables { .. } | Error::NoMemory { .. } => libc::ENOMEM,
            Error::Engine { .. } => libc::EIO,
            Error::Register { .. }
            | Error::GgttIndex { .. }
            | Error::EmptySubmission { .. }
            | Error::NotPrivileged { .. }
            | Error::AddressingMode { .. }
            | Error::RingContextUnmapped { .. }
            | Error::OutsideGraphicsMemory { .. }
            | Error::NotPageAligned { .. }
            | Error::RingPointer { .. }
            | Error::BufferSize { .. }
            | Error::HugePage { .. }
            | Error::QueueFull { .. }
            | Error::NotRunning { .. } => libc::EINVAL,
        }
    }
}

/// Its errno, for those who answer with one. The values are in the error alone: log them before.
///
/// ```
/// use gvt_scheduler::{Vgpu, VgpuConfig};
/// use vm_memory::GuestMemoryMmap;
///
/// let memory = GuestMemoryMmap::<()>::new();
/// let mut vgpu = Vgpu::new(memory, (), (), VgpuConfig::default());
/// let error = std::io::Error::from(vgpu.write_ggtt_entry(u32::MAX, 0).unwrap_err());
/// assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
/// ```
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::from_raw_os_error(error.errno())
    }
}

/// An engine could not finish a job: a hang, or an error of its fence.
///
/// ```
/// use gvt_scheduler::EngineFault;
///
/// assert_eq!(EngineFault::new("hang").to_string(), "hang");
/// ```
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct EngineFault {
    reason: Cow<'static, str>,
}

impl EngineFault {
    /// A fault with a reason for the log.
    pub fn new(reason: impl Into<Cow<'static, str>>) -> Self {
        Self {
            reason: reason.into(),
        }
    }
}

impl From<Error> for EngineFault {
    /// An access of the engine that failed.
    fn from(error: Error) -> Self {
        Self::new(match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        })
    }
}
