// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a message of a client means, and what it is answered.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use iommu_type1::page_size;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_TYPE_MASK, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};

use crate::capabilities::TEXT_LIMIT;
use crate::connection::{Connection, Message, NO_MEMORY, OVERHEAD};
use crate::socket::MAX_FDS;
use crate::wire::{self, command, flags, Header};
use crate::{
    Backend, Capabilities, Error, IrqAction, IrqData, IrqEventfd, Region, Result, SetIrqs,
};

/// The newest minor version that is spoken.
const MINOR: u16 = 1;

/// Bytes of a message before both ends know what the other can take.
pub(crate) const FIRST_LIMIT: usize = TEXT_LIMIT + OVERHEAD;

/// What goes into a reply behind its header.
struct Reply {
    body: Vec<u8>,
    fd: Option<Arc<OwnedFd>>,
}

impl Reply {
    fn empty() -> Self {
        Reply::of(|_| {})
    }

    fn of(encode: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut body = Vec::new();
        encode(&mut body);
        Reply { body, fd: None }
    }
}

pub(crate) struct Session<'a> {
    backend: &'a mut dyn Backend,
    max_data: u32,
    /// What the client can take, once it has said so.
    client: Option<Capabilities>,
}

impl<'a> Session<'a> {
    pub(crate) fn new(backend: &'a mut dyn Backend, max_data: u32) -> Self {
        Session {
            backend,
            max_data,
            client: None,
        }
    }

    pub(crate) fn backend(&mut self) -> &mut dyn Backend {
        self.backend
    }

    /// Serves a message, and leaves the answer to be sent.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`]: it cannot be left, and the client would wait for it.
    pub(crate) fn serve(
        &mut self,
        message: Message,
        connection: &mut Connection<'_>,
    ) -> Result<()> {
        let header = message.header;
        if header.is_reply() {
            if message.error.is_none() {
                self.backend.dma().messages().reply(&header, &message.body);
            }
            return Ok(());
        }
        let result = self.answer(message, connection);
        if let Err(error) = &result {
            log::warn!("command {}: {error}", header.command);
        }
        if header.no_reply() {
            return Ok(());
        }
        let mut reply = Header {
            message_id: header.message_id,
            command: header.command,
            flags: flags::REPLY,
            ..Header::default()
        };
        let (body, fd) = match result {
            Ok(Reply { body, fd }) => (body, fd),
            Err(error) => {
                reply.flags |= flags::ERROR;
                reply.error = error.errno().unsigned_abs();
                (Vec::new(), None)
            }
        };
        let message =
            wire::message_with_data(reply, body.len(), |bytes| bytes.extend_from_slice(&body));
        let message = message.unwrap_or_else(|| {
            reply.flags |= flags::ERROR;
            reply.error = libc::ENOMEM.unsigned_abs();
            wire::message(reply, |_| ())
        });
        connection.push(message, fd)
    }

    fn answer(&mut self, message: Message, connection: &mut Connection<'_>) -> Result<Reply> {
        let Message {
            header,
            body,
            fds,
            error,
        } = message;
        if let Some(error) = error {
            return Err(match error {
                NO_MEMORY => Error::NoMemory(header.message_size as usize),
                error => Error::Malformed(error),
            });
        }
        if header.flags & flags::TYPE != flags::COMMAND {
            return Err(Error::Malformed("neither a command nor a reply"));
        }
        if !fds.is_empty() && !matches!(header.command, command::DMA_MAP | command::DEVICE_SET_IRQS)
        {
            return Err(Error::Malformed("file descriptors where none belong"));
        }
        match (header.command, self.client) {
            (command::VERSION, None) => return self.version(&body, connection),
            (command::VERSION, Some(_)) => {
                return Err(Error::Malformed("the version is agreed on already"))
            }
            (_, None) => return Err(Error::Malformed("the version comes first")),
            (_, Some(_)) => {}
        }
        match header.command {
            command::DMA_MAP => self.dma_map(&body, fds),
            command::DMA_UNMAP => self.dma_unmap(&body),
            command::DEVICE_GET_INFO => self.get_info(&body),
            command::DEVICE_GET_REGION_INFO => self.get_region_info(&body),
            command::DEVICE_GET_IRQ_INFO => self.get_irq_info(&body),
            command::DEVICE_SET_IRQS => self.set_irqs(&body, fds),
            command::REGION_READ => self.region_read(&body),
            command::REGION_WRITE => self.region_write(&body),
            command::DEVICE_RESET => {
                if !body.is_empty() {
                    return Err(WRONG_SIZE);
                }
                self.backend.reset().map_err(Error::Device)?;
                Ok(Reply::empty())
            }
            0 => Err(Error::Malformed("command 0")),
            other if other <= command::LAST => Err(Error::Unsupported(other)),
            _ => Err(Error::Malformed("an unknown command")),
        }
    }

    fn version(&mut self, body: &[u8], connection: &mut Connection<'_>) -> Result<Reply> {
        let (version, text) = wire::Version::decode(body).ok_or(WRONG_SIZE)?;
        if version.major != 0 {
            return Err(Error::Malformed("only major version 0 is spoken"));
        }
        let client = Capabilities::parse(text)?;
        let max_data = self.max_data.min(client.max_data_xfer_size);
        self.client = Some(client);
        connection.set_limit(max_data.max(TEXT_LIMIT as u32) as usize + OVERHEAD);
        let table = self.backend.dma();
        table.messages().connected(max_data as usize);
        let max_dma_maps = u32::try_from(table.entry_limit()).unwrap_or(u32::MAX);
        Ok(Reply::of(|bytes| {
            let version = wire::Version {
                major: 0,
                minor: version.minor.min(MINOR),
            };
            let capabilities = Capabilities {
                max_msg_fds: MAX_FDS as u32,
                max_data_xfer_size: self.max_data,
                max_dma_maps,
                pgsizes: page_size(),
                ..Capabilities::default()
            };
            version.encode(bytes);
            bytes.extend_from_slice(&capabilities.to_text());
        }))
    }

    fn max_data(&self) -> u32 {
        let client = self.client.unwrap_or_default();
        self.max_data.min(client.max_data_xfer_size)
    }

    fn dma_map(&mut self, body: &[u8], mut fds: Vec<OwnedFd>) -> Result<Reply> {
        let map = exactly(wire::DmaMap::decode(body))?;
        check_argsz(map.argsz, wire::DmaMap::SIZE)?;
        let fd = fds.pop();
        if !fds.is_empty() {
            return Err(Error::Malformed("more than one file for a map"));
        }
        let table = self.backend.dma();
        table.map(map.flags, map.offset, map.address, map.size, fd)?;
        self.backend.dma_mapped(map.address, map.size);
        Ok(Reply::empty())
    }

    fn dma_unmap(&mut self, body: &[u8]) -> Result<Reply> {
        let (unmap, rest) = wire::DmaUnmap::decode(body).ok_or(WRONG_SIZE)?;
        check_argsz(unmap.argsz, wire::DmaUnmap::SIZE)?;
        // One that asks for dirty pages is longer, and refused for that.
        if !rest.is_empty() && unmap.flags == 0 {
            return Err(WRONG_SIZE);
        }
        let size = self
            .backend
            .dma()
            .unmap(unmap.flags, unmap.address, unmap.size)?;
        match unmap.flags {
            0 => self.backend.dma_unmapped(unmap.address, unmap.size),
            _ => self.backend.dma_unmapped(0, u64::MAX),
        }
        Ok(Reply::of(|bytes| {
            wire::DmaUnmap { size, ..unmap }.encode(bytes)
        }))
    }

    fn get_info(&mut self, body: &[u8]) -> Result<Reply> {
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

    fn get_region_info(&mut self, body: &[u8]) -> Result<Reply> {
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

    fn get_irq_info(&mut self, body: &[u8]) -> Result<Reply> {
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

    fn set_irqs(&mut self, body: &[u8], fds: Vec<OwnedFd>) -> Result<Reply> {
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

    fn region_read(&mut self, body: &[u8]) -> Result<Reply> {
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

    fn region_write(&mut self, body: &[u8]) -> Result<Reply> {
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

const WRONG_SIZE: Error = Error::Malformed("a message of a wrong size");
const NO_IRQ: Error = Error::NoSuch("the device has no such interrupts");
const BAD_SET: Error = Error::Malformed("a change of interrupts that is none");

/// A structure with nothing behind it.
fn exactly<T>(decoded: Option<(T, &[u8])>) -> Result<T> {
    match decoded {
        Some((message, [])) => Ok(message),
        _ => Err(WRONG_SIZE),
    }
}

fn check_argsz(argsz: u32, size: usize) -> Result<()> {
    if (argsz as usize) < size {
        return Err(Error::Malformed("argsz is less than the structure"));
    }
    Ok(())
}
