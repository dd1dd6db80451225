// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From an event of an engine to an interrupt of the guest.
//!
//! The registers are those of generation 8: an event that IMR lets pass stays in IIR until the guest clears it;
//! one that IER has as well raises the device's interrupt while MASTER_IRQ lets it through. With MSI the guest
//! gets a message each time it is raised. With INTx it is a level: it is signalled, masked by that, and
//! signalled again at the unmask if it is still there.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gvt_scheduler::{interrupt_register as register, EngineId};
use vfio_user_dma::{IrqAction, IrqData, IrqEventfd, SetIrqs};

use crate::counters::Counters;

/// Kinds of interrupts by index, as VFIO has them.
pub const INTX: u32 = 0;
pub const MSI: u32 = 1;

const BANKS: usize = register::GT_COUNT as usize;

#[derive(Debug)]
pub struct Interrupts {
    state: Mutex<State>,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct State {
    banks: [Bank; BANKS],
    master_control: bool,
    /// Whether the device raised its interrupt when that was looked at last.
    raised: bool,
    msi: Option<IrqEventfd>,
    intx: Option<IrqEventfd>,
    /// By the client, or by having been signalled.
    intx_masked: bool,
    /// By the guest, in the command register.
    intx_disabled: bool,
    /// By the guest, in the MSI capability: INTx is not used then.
    msi_enabled: bool,
}

#[derive(Clone, Copy, Debug)]
struct Bank {
    imr: u32,
    iir: u32,
    ier: u32,
}

impl Bank {
    const RESET: Bank = Bank {
        imr: u32::MAX,
        iir: 0,
        ier: 0,
    };
}

impl Interrupts {
    pub fn new(counters: Arc<Counters>) -> Self {
        Interrupts {
            state: Mutex::new(State {
                banks: [Bank::RESET; BANKS],
                master_control: false,
                raised: false,
                msi: None,
                intx: None,
                intx_masked: false,
                intx_disabled: false,
                msi_enabled: false,
            }),
            counters,
        }
    }

    /// An engine has events ([`register::USER`], [`register::CONTEXT_SWITCH`]).
    pub fn raise(&self, engine: EngineId, events: u32) {
        let (bank, shift) = engine.gt_interrupt();
        let mut state = self.lock();
        let bank = &mut state.banks[bank as usize];
        bank.iir |= (events << shift) & !bank.imr;
        self.update(&mut state);
    }

    /// Reads a register of the device's interrupts.
    pub fn read(&self, offset: u32) -> Option<u32> {
        let state = self.lock();
        if offset == register::MASTER_IRQ {
            return Some(state.master());
        }
        let (bank, field) = bank_of(offset)?;
        let bank = &state.banks[bank];
        Some(match field {
            // Events are short: nothing of them is left to be seen.
            0 => 0,
            1 => bank.imr,
            2 => bank.iir,
            _ => bank.ier,
        })
    }

    /// Writes one; `false` if it is none of them.
    pub fn write(&self, offset: u32, value: u32) -> bool {
        let mut state = self.lock();
        if offset == register::MASTER_IRQ {
            state.master_control = value & register::MASTER_CONTROL != 0;
        } else if let Some((bank, field)) = bank_of(offset) {
            let bank = &mut state.banks[bank];
            match field {
                0 => {}
                1 => bank.imr = value,
                2 => bank.iir &= !value,
                _ => bank.ier = value,
            }
        } else {
            return false;
        }
        self.update(&mut state);
        true
    }

    /// Whether the device asks for INTx: the bit of the status register, which is there though INTx is disabled.
    pub fn intx_status(&self) -> bool {
        let state = self.lock();
        state.is_raised() && !state.msi_enabled
    }

    /// What the guest has set in configuration space.
    pub fn configure(&self, intx_disabled: bool, msi_enabled: bool) {
        let mut state = self.lock();
        state.intx_disabled = intx_disabled;
        state.msi_enabled = msi_enabled;
        self.update(&mut state);
    }

    /// As after power-on; eventfds stay.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.banks = [Bank::RESET; BANKS];
        state.master_control = false;
        state.intx_disabled = false;
        state.msi_enabled = false;
        self.update(&mut state);
    }

    /// The client has gone, and its eventfds with it.
    pub fn disconnect(&self) {
        let mut state = self.lock();
        (state.msi, state.intx, state.intx_masked) = (None, None, false);
    }

    /// VFIO_DEVICE_SET_IRQS.
    pub fn set(&self, set: SetIrqs) -> io::Result<()> {
        let refused = Err(io::Error::from_raw_os_error(libc::ENOTTY));
        if !matches!(set.index, INTX | MSI) {
            return refused;
        }
        let mut state = self.lock();
        let concerned = match &set.data {
            IrqData::Bool(flags) => flags.first() == Some(&true),
            _ => true,
        };
        match (set.action, set.data) {
            (IrqAction::Trigger, IrqData::Eventfd(fds)) => {
                let fd = fds.into_iter().next();
                match set.index {
                    // What was raised before has been sent to nobody.
                    MSI => (state.msi, state.raised) = (fd, false),
                    _ => (state.intx, state.intx_masked) = (fd, false),
                }
            }
            (IrqAction::Trigger, IrqData::None) if set.count == 0 => match set.index {
                MSI => state.msi = None,
                _ => (state.intx, state.intx_masked) = (None, false),
            },
            // To try whether it arrives.
            (IrqAction::Trigger, _) if concerned => match set.index {
                MSI => self.signal(&state.msi),
                _ => self.signal(&state.intx),
            },
            (IrqAction::Trigger, _) => {}
            // No eventfd of the client's unmasks: it unmasks by messages. MSI is not masked at all.
            (_, IrqData::Eventfd(_)) => return refused,
            (_, _) if set.index != INTX => return refused,
            (IrqAction::Mask, _) => state.intx_masked |= concerned,
            (IrqAction::Unmask, _) => state.intx_masked &= !concerned,
        }
        self.update(&mut state);
        Ok(())
    }

    fn update(&self, state: &mut State) {
        let before = state.raised;
        state.raised = state.is_raised();
        if !state.raised {
            return;
        }
        if state.msi.is_some() {
            if !before {
                self.signal(&state.msi);
            }
        } else if state.intx.is_some()
            && !(state.intx_masked || state.intx_disabled || state.msi_enabled)
        {
            state.intx_masked = true;
            self.signal(&state.intx);
        }
    }

    fn signal(&self, eventfd: &Option<IrqEventfd>) {
        match eventfd.as_ref().map(IrqEventfd::signal) {
            None => {}
            Some(Ok(())) => self.counters.interrupts.add(1),
            Some(Err(error)) => log::warn!("an interrupt is lost: {error}"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn master(&self) -> u32 {
        let control = u32::from(self.master_control) * register::MASTER_CONTROL;
        EngineId::ALL
            .into_iter()
            .filter(|engine| {
                let (bank, shift) = engine.gt_interrupt();
                let bank = &self.banks[bank as usize];
                (bank.iir & bank.ier) >> shift & 0xffff != 0
            })
            .fold(control, |master, engine| master | engine.master_interrupt())
    }

    fn is_raised(&self) -> bool {
        let any = self.banks.iter().any(|bank| bank.iir & bank.ier != 0);
        self.master_control && any
    }
}

/// Which bank and which of its four registers.
fn bank_of(offset: u32) -> Option<(usize, u32)> {
    let at = offset.checked_sub(register::GT_ISR)?;
    let bank = (at / register::GT_STRIDE) as usize;
    (bank < BANKS && at % 4 == 0).then_some((bank, at % register::GT_STRIDE / 4))
}
