// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices to be served.

use std::io;
use std::sync::{Arc, Mutex};

use vfio_user_dma::{Backend, DmaTable, Irqs, Region, RegionFile, SetIrqs};

use super::{memfd, PAGE};

/// Region 0 is memory, region 1 can be mapped in parts, region 2 cannot be accessed.
pub struct Device {
    pub table: DmaTable,
    pub regions: Vec<Region>,
    pub memory: Vec<u8>,
    pub irqs: Vec<SetIrqs>,
    pub seen: Arc<Mutex<Vec<String>>>,
}

impl Device {
    pub fn new(table: DmaTable) -> Self {
        let file = RegionFile {
            fd: Arc::new(memfd(4).into()),
            offset: PAGE,
            areas: vec![(0, PAGE), (2 * PAGE, PAGE)],
        };
        let sparse = Region {
            mmap: Some(file),
            ..Region::new(3 * PAGE)
        };
        Device {
            table,
            regions: vec![Region::new(2 << 20), sparse, Region::default()],
            memory: vec![0; 2 << 20],
            irqs: Vec::new(),
            seen: Arc::default(),
        }
    }

    fn saw(&self, what: String) {
        self.seen.lock().unwrap().push(what);
    }
}

impl Backend for Device {
    fn dma(&self) -> &DmaTable {
        &self.table
    }

    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn irqs(&self) -> &[Irqs] {
        const IRQS: [Irqs; 2] = [
            Irqs::new(1),
            Irqs {
                flags: 9,
                count: 32,
            },
        ];
        &IRQS
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if region == 1 {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        data.copy_from_slice(&self.memory[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn set_irqs(&mut self, set: SetIrqs) -> io::Result<()> {
        self.saw(format!(
            "{:?} {} {}+{} {:?}",
            set.action, set.index, set.start, set.count, set.data
        ));
        self.irqs.push(set);
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.saw("reset".to_owned());
        Ok(())
    }

    fn disconnected(&mut self) {
        self.irqs.clear();
        self.saw("disconnected".to_owned());
    }
}

/// A device of which a test says what it does. It has a region of a megabyte, and no interrupts.
pub struct Plain<F> {
    table: DmaTable,
    regions: [Region; 1],
    told: F,
}

/// What a [`Plain`] device is told.
pub enum Told<'a> {
    /// To read so many bytes of its region from an offset.
    Read(u64, &'a mut [u8]),
    /// Of a range that was mapped.
    Mapped(u64, u64),
    /// Of a range that was unmapped.
    Unmapped(u64, u64),
    /// Anything else.
    Other,
}

impl<F: FnMut(&DmaTable, Told<'_>) -> io::Result<()>> Plain<F> {
    pub fn new(told: F) -> Self {
        Plain {
            table: DmaTable::new().unwrap(),
            regions: [Region::new(1 << 20)],
            told,
        }
    }

    fn tell(&mut self, what: Told<'_>) -> io::Result<()> {
        (self.told)(&self.table, what)
    }
}

impl<F: FnMut(&DmaTable, Told<'_>) -> io::Result<()>> Backend for Plain<F> {
    fn dma(&self) -> &DmaTable {
        &self.table
    }

    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn irqs(&self) -> &[Irqs] {
        &[]
    }

    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.tell(Told::Read(offset, data))
    }

    fn region_write(&mut self, _region: u32, _offset: u64, _data: &[u8]) -> io::Result<()> {
        self.tell(Told::Other)
    }

    fn set_irqs(&mut self, _set: SetIrqs) -> io::Result<()> {
        self.tell(Told::Other)
    }

    fn reset(&mut self) -> io::Result<()> {
        self.tell(Told::Other)
    }

    fn dma_mapped(&mut self, address: u64, size: u64) {
        self.tell(Told::Mapped(address, size)).unwrap();
    }

    fn dma_unmapped(&mut self, address: u64, size: u64) {
        self.tell(Told::Unmapped(address, size)).unwrap();
    }
}
