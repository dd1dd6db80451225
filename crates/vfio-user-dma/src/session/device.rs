// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is asked of the device: its regions and its interrupts.

use std::os::fd::OwnedFd;

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_TYPE_MASK, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};

use super::{check_argsz, exactly, Reply, Session, WRONG_SIZE};
use crate::wire;
use crate::{Error, IrqAction, IrqData, IrqEventfd, Region, Result, SetIrqs};

const NO_IRQ: Error = Error::NoSuch("the device has no such interrupts");
const BAD_SET: Error = Error::Malformed("a change of interrupts that is none");

impl Session<'_> {
    pub(super) fn get_info(&mut self, body: &[u8]) -> Result<Reply> {
        // The kernel's structure has grown since; what is new is not asked for here.
        let (info, rest) = wire::DeviceInfo::decode(body).ok_or(WRONG_SIZE)?;
        if rest.len() > 8 {
            return Err(WRONG_SIZE);
        }
        check_argsz(info.argsz, wire::DeviceInfo::SIZE)?;
        let info = wire::DeviceInfo {
            argsz: wire::DeviceInfo::SIZE as u32,
            flags: self.backend.flags(),
            num_regions: self.backend.regions().len() as u32,
            num_irqs: self.backend.irqs().len() as u32,
        };
        Ok(Reply::of(|bytes| info.encode(bytes)))
    }

    fn region(&self, index: u32) -> Result<&Region> {
        let region = self.backend.regions().get(index as usize);
        region.ok_or(Error::NoSuch("the device has no such region"))
    }

    pub(super) fn get_region_info(&mut self, body: &[u8]) -> Result<Reply> {
        let asked = exactly(wire::RegionInfo::decode(body))?;
        check_argsz(asked.argsz, wire::RegionInfo::SIZE)?;
        let region = self.region(asked.index)?;
        let mut info = wire::RegionInfo {
            argsz: wire::RegionInfo::SIZE as u32,
            flags: region.flags,
            index: asked.index,
            size: region.size,
            ..wire::RegionInfo::default()
        };
        let may_send = self.client.is_some_and(|client| client.max_msg_fds > 0);
        let Some(file) = region.mmap.as_ref().filter(|_| may_send) else {
            return Ok(Reply::of(|bytes| info.encode(bytes)));
        };
        info.flags |= VFIO_REGION_INFO_FLAG_MMAP;
        info.offset = file.offset;
        let mut areas = Vec::new();
        if !file.areas.is_empty() {
            let cap = wire::SparseMmap {
                id: VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16,
                version: 1,
                nr_areas: file.areas.len() as u32,
                ..wire::SparseMmap::default()
            };
            cap.encode(&mut areas);
            for &(offset, size) in &file.areas {
                wire::SparseArea { offset, size }.encode(&mut areas);
            }
            info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
            info.argsz += areas.len() as u32;
        }
        // A client without room for all of it is told how much it takes, and asks again.
        let fits = info.argsz <= asked.argsz;
        if !areas.is_empty() && fits {
            info.cap_offset = wire::RegionInfo::SIZE as u32;
        }
        let mut reply = Reply::of(|bytes| info.encode(bytes));
        if fits {
            reply.body.append(&mut areas);
            reply.fd = Some(file.fd.clone());
        }
        Ok(reply)
    }

    pub(super) fn get_irq_info(&mut self, body: &[u8]) -> Result<Reply> {
        let asked = exactly(wire::IrqInfo::decode(body))?;
        check_argsz(asked.argsz, wire::IrqInfo::SIZE)?;
        let irqs = self
            .backend
            .irqs()
            .get(asked.index as usize)
            .ok_or(NO_IRQ)?;
        let info = wire::IrqInfo {
            argsz: wire::IrqInfo::SIZE as u32,
            flags: irqs.flags,
            index: asked.index,
            count: irqs.count,
        };
        Ok(Reply::of(|bytes| info.encode(bytes)))
    }

    pub(super) fn set_irqs(&mut self, body: &[u8], fds: Vec<OwnedFd>) -> Result<Reply> {
        let (set, rest) = wire::IrqSet::decode(body).ok_or(WRONG_SIZE)?;
        check_argsz(set.argsz, wire::IrqSet::SIZE)?;
        let irqs = self.backend.irqs().get(set.index as usize).ok_or(NO_IRQ)?;
        if set.flags & !(VFIO_IRQ_SET_ACTION_TYPE_MASK | VFIO_IRQ_SET_DATA_TYPE_MASK) != 0 {
            return Err(BAD_SET);
        }
        let action = match set.flags & VFIO_IRQ_SET_ACTION_TYPE_MASK {
            VFIO_IRQ_SET_ACTION_MASK => IrqAction::Mask,
            VFIO_IRQ_SET_ACTION_UNMASK => IrqAction::Unmask,
            VFIO_IRQ_SET_ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(BAD_SET),
        };
        let end = set.start.checked_add(set.count).ok_or(BAD_SET)?;
        if set.start >= irqs.count || end > irqs.count {
            return Err(Error::NoSuch("interrupts that the device does not have"));
        }
        let count = set.count as usize;
        // How many bytes and files go with it.
        let (bytes, files, data) = match set.flags & VFIO_IRQ_SET_DATA_TYPE_MASK {
            VFIO_IRQ_SET_DATA_NONE if count > 0 || action == IrqAction::Trigger => {
                (0, 0, IrqData::None)
            }
            VFIO_IRQ_SET_DATA_BOOL if count > 0 => (count, 0, IrqData::Bool(Vec::new())),
            // None at all takes the eventfds away.
            VFIO_IRQ_SET_DATA_EVENTFD if count > 0 && fds.is_empty() => {
                (0, 0, IrqData::Eventfd(Vec::new()))
            }
            VFIO_IRQ_SET_DATA_EVENTFD if count > 0 => (0, count, IrqData::Eventfd(Vec::new())),
            _ => return Err(BAD_SET),
        };
        if (rest.len(), fds.len()) != (bytes, files) {
            return Err(WRONG_SIZE);
        }
        let data = match data {
            IrqData::Eventfd(_) => {
                let fds = fds.into_iter().map(IrqEventfd::try_from);
                let fds = fds.collect::<std::io::Result<_>>();
                IrqData::Eventfd(fds.map_err(Error::io("the eventfd of an interrupt"))?)
            }
            IrqData::Bool(mut flags) => {
                let room = flags.try_reserve_exact(count);
                room.map_err(|_| Error::NoMemory(count))?;
                flags.extend(rest.iter().map(|byte| *byte != 0));
                IrqData::Bool(flags)
            }
            IrqData::None => IrqData::None,
        };
        let set = SetIrqs {
            index: set.index,
            start: set.start,
            count: set.count,
            action,
            data,
        };
        self.backend.set_irqs(set).map_err(Error::Device)?;
        Ok(Reply::empty())
    }

    fn max_data(&self) -> u32 {
        let client = self.client.unwrap_or_default();
        self.max_data.min(client.max_data_xfer_size)
    }

    fn check_access(&self, access: &wire::RegionAccess, flag: u32) -> Result<()> {
        let region = self.region(access.region)?;
        if access.count > self.max_data() {
            return Err(Error::Malformed("more data than agreed on"));
        }
        let end = access.offset.checked_add(access.count.into());
        if region.flags & flag == 0 || end.is_none_or(|end| end > region.size) {
            return Err(Error::NoSuch(
                "the region does not have that, or not for this",
            ));
        }
        Ok(())
    }

    pub(super) fn region_read(&mut self, body: &[u8]) -> Result<Reply> {
        let access = exactly(wire::RegionAccess::decode(body))?;
        self.check_access(&access, VFIO_REGION_INFO_FLAG_READ)?;
        let count = access.count as usize;
        let mut reply = Reply::of(|bytes| access.encode(bytes));
        let room = reply.body.try_reserve_exact(count);
        room.map_err(|_| Error::NoMemory(count))?;
        reply.body.resize(wire::RegionAccess::SIZE + count, 0);
        let data = &mut reply.body[wire::RegionAccess::SIZE..];
        let read = self.backend.region_read(access.region, access.offset, data);
        read.map_err(Error::Device)?;
        Ok(reply)
    }

    pub(super) fn region_write(&mut self, body: &[u8]) -> Result<Reply> {
        let (access, data) = wire::RegionAccess::decode(body).ok_or(WRONG_SIZE)?;
        self.check_access(&access, VFIO_REGION_INFO_FLAG_WRITE)?;
        if data.len() != access.count as usize {
            return Err(WRONG_SIZE);
        }
        let write = self
            .backend
            .region_write(access.region, access.offset, data);
        write.map_err(Error::Device)?;
        Ok(Reply::of(|bytes| access.encode(bytes)))
    }
}
