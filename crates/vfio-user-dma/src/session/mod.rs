// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a message of a client means, and what it is answered.

mod device;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use iommu_type1::page_size;

use crate::capabilities::TEXT_LIMIT;
use crate::connection::{Connection, Message, NO_MEMORY, OVERHEAD};
use crate::socket::MAX_FDS;
use crate::wire::{self, command, flags, Header};
use crate::{Backend, Capabilities, Error, Result};

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
}

const WRONG_SIZE: Error = Error::Malformed("a message of a wrong size");

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
