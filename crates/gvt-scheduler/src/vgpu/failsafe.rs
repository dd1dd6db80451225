// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vGPU whose guest cannot be served any more, and the way back.

use std::fmt;

use page_pin::PinPages;

use crate::error::Error;
use crate::guest_dma::GuestDma;
use crate::observe::Observer;
use crate::vgpu::engine_state::EngineState;
use crate::vgpu::Vgpu;

/// Why a vGPU is in failsafe mode.
///
/// ```
/// use gvt_scheduler::{FailsafeReason, Vgpu, VgpuConfig};
/// use vm_memory::GuestMemoryMmap;
///
/// let mut vgpu = Vgpu::new(GuestMemoryMmap::<()>::new(), (), (), VgpuConfig::default());
/// vgpu.enter_failsafe(FailsafeReason::UnsupportedGuest);
/// // The submission port is a register like any other now.
/// for dword in [1, 2, 3, 4] {
///     assert_eq!(vgpu.mmio_write(0x2230, dword)?, None);
/// }
/// assert_eq!(vgpu.mmio_read(0x2230), 4);
/// vgpu.reset();
/// assert_eq!(vgpu.failsafe(), None);
/// # Ok::<(), gvt_scheduler::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum FailsafeReason {
    /// The guest's driver does not know that its device is a vGPU.
    UnsupportedGuest,
    /// The host has not what the guest needs.
    InsufficientResource,
    /// The guest has submitted what cannot be executed.
    GuestError,
}

impl fmt::Display for FailsafeReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FailsafeReason::UnsupportedGuest => "unsupported guest",
            FailsafeReason::InsufficientResource => "insufficient resource",
            FailsafeReason::GuestError => "guest error",
        })
    }
}

impl<M: GuestDma, P: PinPages, O: Observer> Vgpu<M, P, O> {
    /// Why the vGPU is in failsafe mode; `None` when it is not.
    ///
    /// A vGPU enters it when a workload is refused or fails with `EBADRQC` or `EFAULT`, or by
    /// [`enter_failsafe`](Self::enter_failsafe), and leaves it by [`reset`](Self::reset) only. An access that guest
    /// memory refuses ([`Error::Read`], [`Error::Write`]) is no reason, though it is `EFAULT`: a mapping that
    /// was taken away may come back, and the kernel does not even look. In failsafe mode
    /// registers and the GGTT store what is written and do nothing else: submissions are ignored, nothing
    /// is queued, and no page table is shadowed.
    pub fn failsafe(&self) -> Option<FailsafeReason> {
        self.failsafe
    }

    /// Enters failsafe mode: drops what is queued, and the shadow of all page tables with its pins. The first
    /// reason stays.
    pub fn enter_failsafe(&mut self, reason: FailsafeReason) {
        if self.failsafe.is_some() {
            return;
        }
        log::warn!("a vGPU enters failsafe mode: {reason}");
        self.failsafe = Some(reason);
        self.drop_page_tables();
        for state in &mut self.engines {
            state.queue.clear();
            state.skip.forget();
        }
    }

    /// Resets the whole device: it is as it was when it was made, but for what its observer has seen and
    /// its auditor is.
    pub fn reset(&mut self) {
        self.failsafe = None;
        self.ggtt.clear();
        self.drop_page_tables();
        self.registers.clear();
        self.engines.iter_mut().for_each(EngineState::reset);
        self.next_sequence = 0;
        self.skips = 0;
    }

    /// A workload was refused or failed: the guest is not served any more if that is its fault.
    pub(super) fn check_health(&mut self, error: &Error) {
        let memory_refused = matches!(error, Error::Read { .. } | Error::Write { .. });
        if !memory_refused && [libc::EBADRQC, libc::EFAULT].contains(&error.errno()) {
            self.enter_failsafe(FailsafeReason::GuestError);
        }
    }
}
