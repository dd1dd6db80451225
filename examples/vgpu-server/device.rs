// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The PCI device: what its regions do when they are read and written.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use gvt_scheduler::{
    ring_register, AddressingMode, EngineId, Ggtt, HalfEntry, PageTableRoot, VgpuConfig,
};
use vfio_user_dma::{Backend, DmaTable, Irqs, Region, SetIrqs, Stopper};

use crate::config_space::{self, ConfigSpace};
use crate::counters::Counters;
use crate::engine::{Engine, Post, Reset};
use crate::interrupts::Interrupts;
use crate::registers::{self, pvinfo, BAR_SIZE, GGTT, REGISTERS};

/// Regions by index, as VFIO has them for PCI.
const BAR0: u32 = 0;
const CONFIG: u32 = 7;
const REGIONS: usize = 9;

/// VFIO_IRQ_INFO_EVENTFD, _MASKABLE and _AUTOMASKED; _NORESIZE for MSI.
const IRQS: [Irqs; 5] = [
    Irqs {
        flags: 0x7,
        count: 1,
    },
    Irqs {
        flags: 0x9,
        count: 1,
    },
    Irqs { flags: 0, count: 0 },
    Irqs { flags: 0, count: 0 },
    Irqs { flags: 0, count: 0 },
];

#[derive(Debug)]
pub struct VgpuDevice {
    dma: DmaTable,
    regions: Vec<Region>,
    config: ConfigSpace,
    interrupts: Arc<Interrupts>,
    engines: Vec<Engine>,
    /// As the guest reads it; each engine has its own.
    ggtt: Ggtt,
    /// Registers that nothing else has.
    stored: HashMap<u32, u32>,
    /// The dwords last written to the submission port of each engine, the oldest first.
    elsp: [[u32; 4]; EngineId::ALL.len()],
    counters: Arc<Counters>,
    /// What ends the server when the client has gone.
    once: Option<Stopper>,
}

impl VgpuDevice {
    pub fn new(
        dma: DmaTable,
        counters: Arc<Counters>,
        once: Option<Stopper>,
    ) -> vfio_user_dma::Result<Self> {
        let interrupts = Arc::new(Interrupts::new(counters.clone()));
        let mut regions = vec![Region::default(); REGIONS];
        regions[BAR0 as usize] = Region::new(BAR_SIZE);
        regions[CONFIG as usize] = Region::new(config_space::SIZE as u64);
        let engines = EngineId::ALL
            .into_iter()
            .map(|id| Engine::start(id, &dma, &interrupts, &counters))
            .collect::<io::Result<_>>()
            .map_err(vfio_user_dma::Error::Device)?;
        Ok(VgpuDevice {
            dma,
            regions,
            config: ConfigSpace::new(),
            interrupts,
            engines,
            ggtt: empty_ggtt(),
            stored: HashMap::new(),
            elsp: Default::default(),
            counters,
            once,
        })
    }

    fn read_dword(&self, offset: u64) -> u32 {
        if let Some((index, half)) = self.ggtt_entry(offset) {
            let entry = self.ggtt.entry(index).unwrap_or(0);
            return match half {
                HalfEntry::Low => entry as u32,
                HalfEntry::High => (entry >> 32) as u32,
            };
        }
        // Nothing is between the registers and the GGTT.
        let Some(offset) = u32::try_from(offset).ok().filter(is_register) else {
            return 0;
        };
        let of_engine = || {
            let (engine, register) = EngineId::from_mmio(offset)?;
            self.engines[engine as usize].read(register)
        };
        match offset {
            pvinfo::MAGIC => pvinfo::MAGIC_VALUE as u32,
            0x7_8004 => (pvinfo::MAGIC_VALUE >> 32) as u32,
            pvinfo::VERSION => pvinfo::VERSION_VALUE,
            _ => of_engine()
                .or_else(|| self.interrupts.read(offset))
                .or_else(|| self.stored.get(&offset).copied())
                .unwrap_or(0),
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) -> io::Result<()> {
        log::trace!("{offset:#x} <- {value:#x}");
        if let Some((index, half)) = self.ggtt_entry(offset) {
            self.ggtt.write_half(index, half, value)?;
            return self.post_to_all(Post::GgttHalf { index, half, value });
        }
        let Some(offset) = u32::try_from(offset).ok().filter(is_register) else {
            return Ok(());
        };
        if self.interrupts.write(offset, value) {
            return Ok(());
        }
        if let Some((engine, register)) = EngineId::from_mmio(offset) {
            if register == ring_register::ELSP {
                let written = &mut self.elsp[engine as usize];
                written.rotate_left(1);
                written[3] = value;
            } else if self.engines[engine as usize].read(register).is_none() {
                self.stored.insert(offset, value);
            }
            return self.engines[engine as usize].post(Post::Register { offset, value });
        }
        match offset {
            registers::GDRST => self.reset_engines(value),
            pvinfo::FIRST..=pvinfo::LAST => self.write_pvinfo(offset, value),
            _ => {
                self.stored.insert(offset, value);
                Ok(())
            }
        }
    }

    fn write_pvinfo(&mut self, offset: u32, value: u32) -> io::Result<()> {
        self.stored.insert(offset, value);
        match offset {
            pvinfo::G2V_NOTIFY => self.notified(value),
            pvinfo::PAGE_TABLE_WRITTEN => self.post_to_all(Post::PageTableWritten {
                gpa: u64::from(value) << 12,
                len: 0x1000,
            }),
            offset if offset == pvinfo::ENTRY_WRITTEN + 4 => {
                let gpa = self.stored_pair(pvinfo::ENTRY_WRITTEN);
                self.post_to_all(Post::PageTableWritten { gpa, len: 8 })
            }
            _ => match offset.checked_sub(pvinfo::DOORBELL).map(|at| at / 4) {
                Some(index) if (index as usize) < EngineId::ALL.len() => {
                    self.ring(EngineId::ALL[index as usize])
                }
                _ => Ok(()),
            },
        }
    }

    /// Submits again what was submitted last: the engine looks at the tail of its context anew.
    fn ring(&mut self, engine: EngineId) -> io::Result<()> {
        let offset = engine.mmio_base() + ring_register::ELSP;
        for value in self.elsp[engine as usize] {
            self.engines[engine as usize].post(Post::Register { offset, value })?;
        }
        Ok(())
    }

    fn notified(&mut self, notification: u32) -> io::Result<()> {
        let mode = match notification {
            pvinfo::L3_PAGE_TABLE_DESTROY => AddressingMode::Legacy32,
            pvinfo::L4_PAGE_TABLE_DESTROY => AddressingMode::Legacy64,
            // Page tables are shadowed when they are used.
            _ => return Ok(()),
        };
        let pdps = [0, 1, 2, 3].map(|index| self.stored_pair(pvinfo::PDP + 8 * index));
        let root = PageTableRoot::new(mode, pdps)?;
        self.post_to_all(Post::PageTablesDropped(root))
    }

    fn reset_engines(&mut self, value: u32) -> io::Result<()> {
        let engines = registers::reset_by(value).map(|id| &self.engines[id as usize]);
        Engine::reset(engines, Reset::Engine, &self.dma)
    }

    fn reset_device(&mut self) -> io::Result<()> {
        Engine::reset(self.engines.iter(), Reset::Device, &self.dma)?;
        self.interrupts.reset();
        self.config = ConfigSpace::new();
        self.ggtt = empty_ggtt();
        self.stored.clear();
        self.elsp = Default::default();
        Ok(())
    }

    /// Posts to each engine, however far others are behind.
    ///
    /// # Errors
    ///
    /// EBUSY: some are too far behind, as the log says.
    fn post_to_all(&self, post: Post) -> io::Result<()> {
        let engines = self.engines.iter().zip(EngineId::ALL);
        let behind = engines.filter(|(engine, _)| engine.post(post).is_err());
        let behind: Vec<_> = behind.map(|(_, id)| id).collect();
        if behind.is_empty() {
            return Ok(());
        }
        log::warn!("{behind:?} are too far behind for {post:x?}");
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    fn stored_pair(&self, offset: u32) -> u64 {
        let dword = |offset| u64::from(self.stored.get(&offset).copied().unwrap_or(0));
        dword(offset) | dword(offset + 4) << 32
    }

    fn ggtt_entry(&self, offset: u64) -> Option<(u32, HalfEntry)> {
        let at = offset.checked_sub(GGTT)?;
        let half = match at % 8 {
            0 => HalfEntry::Low,
            _ => HalfEntry::High,
        };
        Some((u32::try_from(at / 8).ok()?, half))
    }

    fn read_bar(&self, mut offset: u64, mut data: &mut [u8]) {
        while !data.is_empty() {
            let (dword, within) = (offset & !3, (offset & 3) as usize);
            let bytes = &self.read_dword(dword).to_le_bytes()[within..];
            let len = bytes.len().min(data.len());
            let (now, rest) = data.split_at_mut(len);
            now.copy_from_slice(&bytes[..len]);
            (offset, data) = (offset + len as u64, rest);
        }
    }

    fn write_bar(&mut self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        if offset % 4 != 0 || data.len() % 4 != 0 {
            log::warn!(
                "{} bytes to {offset:#x} are not whole registers",
                data.len()
            );
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        while let Some((dword, rest)) = data.split_first_chunk() {
            match data.first_chunk() {
                // An entry at once, as it must never be seen half changed.
                Some(entry) if offset >= GGTT && offset % 8 == 0 => {
                    let index = ((offset - GGTT) / 8) as u32;
                    let value = u64::from_le_bytes(*entry);
                    self.ggtt.write_entry(index, value)?;
                    self.post_to_all(Post::Ggtt { index, value })?;
                    (offset, data) = (offset + 8, &data[8..]);
                }
                _ => {
                    self.write_dword(offset, u32::from_le_bytes(*dword))?;
                    (offset, data) = (offset + 4, rest);
                }
            }
        }
        Ok(())
    }
}

impl Backend for VgpuDevice {
    fn dma(&self) -> &DmaTable {
        &self.dma
    }

    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn irqs(&self) -> &[Irqs] {
        &IRQS
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match region {
            CONFIG => {
                let intx = self.interrupts.intx_status();
                self.config.read(offset as usize, data, intx);
            }
            _ => self.read_bar(offset, data),
        }
        log::trace!("region {region}: {offset:#x} -> {data:x?}");
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        if region != CONFIG {
            return self.write_bar(offset, data);
        }
        self.config.write(offset as usize, data);
        let (intx_disabled, msi_enabled) = (self.config.intx_disabled(), self.config.msi_enabled());
        self.interrupts.configure(intx_disabled, msi_enabled);
        Ok(())
    }

    fn set_irqs(&mut self, set: SetIrqs) -> io::Result<()> {
        log::debug!("{set:?}");
        self.interrupts.set(set)
    }

    fn reset(&mut self) -> io::Result<()> {
        self.counters.resets.add(1);
        self.reset_device()
    }

    fn dma_mapped(&mut self, _address: u64, _size: u64) {
        self.counters.maps.add(1);
    }

    fn dma_unmapped(&mut self, _address: u64, _size: u64) {
        self.counters.unmaps.add(1);
        let in_flight = self.engines.iter().any(Engine::is_running);
        self.counters.unmaps_in_flight.add(in_flight.into());
    }

    fn disconnected(&mut self) {
        self.interrupts.disconnect();
        if let Err(error) = self.reset_device() {
            log::error!("a device whose client has gone: {error}");
        }
        let of_files = self.dma.space().stats().maps;
        self.counters.maps_of_files.set(of_files);
        log::info!("{}", self.counters);
        if let Some(stopper) = &self.once {
            stopper.stop();
        }
    }
}

fn is_register(offset: &u32) -> bool {
    u64::from(*offset) < REGISTERS
}

fn empty_ggtt() -> Ggtt {
    Ggtt::new(VgpuConfig::default().ggtt_entries)
}
