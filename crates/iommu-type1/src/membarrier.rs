// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who passes the barriers between accesses and unmaps, and the system call that does it for others.

/// How inline accesses are kept apart from unmaps; see
/// [`IoAddressSpaceBuilder::reader_barrier`](crate::IoAddressSpaceBuilder::reader_barrier).
///
/// What each costs is measured in the project's `docs/benchmarks.md`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReaderBarrier {
    /// Every access passes a full barrier. No system call is needed, and an unmap beside busy readers
    /// costs them and itself little.
    #[default]
    Fence,
    /// Accesses of a handle or guard that have met no unmap for some ten thousand accesses go without;
    /// an unmap that meets such a one asks the kernel for a barrier in every running thread
    /// (`membarrier(2)`, `MEMBARRIER_CMD_PRIVATE_EXPEDITED`), which interrupts them.
    ///
    /// For short accesses beside rare unmaps. The call must stay allowed for the life of the space, in
    /// every thread that unmaps, starts dirty tracking or takes dirty pages. Where a seccomp filter
    /// refuses it, an unmap that needs it fails at once with [`Error::Deadline`](crate::Error::Deadline),
    /// which names "a running access", and dirty tracking with
    /// [`Error::AccessRuns`](crate::Error::AccessRuns), until the handle or guard concerned is dropped; the
    /// log has the reason. Where the filter kills, it kills.
    Membarrier,
}

/// What the kernel lets this process have of what is wanted.
pub(crate) fn granted(wanted: ReaderBarrier) -> ReaderBarrier {
    match wanted {
        ReaderBarrier::Fence => ReaderBarrier::Fence,
        ReaderBarrier::Membarrier => match call::register() {
            Ok(()) => ReaderBarrier::Membarrier,
            Err(error) => {
                log::warn!(
                    "accesses pass barriers of their own, as membarrier is refused: {error}"
                );
                ReaderBarrier::Fence
            }
        },
    }
}

#[cfg(not(any(loom, shuttle)))]
mod call {
    use std::io;

    fn membarrier(command: i32) -> io::Result<()> {
        // SAFETY: the call takes three integers and touches no memory of ours.
        match unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Says that this process will ask for barriers.
    pub(crate) fn register() -> io::Result<()> {
        membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
    }

    /// When this returns, every thread of the process has passed a full barrier since it was called.
    pub(crate) fn everywhere() -> io::Result<()> {
        membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
    }

    /// The place of a barrier that [`everywhere`] provides when there is need for one: the compiler
    /// moves nothing across.
    #[inline]
    pub(crate) fn here() {
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    }
}

/// Checkers know nothing of the kernel: here every access passes the barrier that it stands in for. The
/// models of this crate have something nearer to it.
#[cfg(any(all(loom, not(test)), shuttle))]
mod call {
    use checked_sync::{fence, Ordering};
    use std::io;

    pub(crate) fn register() -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn everywhere() -> io::Result<()> {
        fence(Ordering::SeqCst);
        Ok(())
    }

    pub(crate) fn here() {
        fence(Ordering::SeqCst);
    }
}

#[cfg(all(loom, test))]
use crate::model::kernel as call;

pub(crate) use call::{everywhere, here};
