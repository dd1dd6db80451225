// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages of the vfio-user protocol as bytes, versions 0.0 and 0.1.
//!
//! Integers are in the byte order of the host, as both ends of a Unix socket run on it. Nothing here
//! allocates by what a message says of itself.

/// Commands by number.
pub mod command {
    /// Negotiates the version; the first message of a client.
    pub const VERSION: u16 = 1;
    /// Maps memory for the device.
    pub const DMA_MAP: u16 = 2;
    /// Unmaps it.
    pub const DMA_UNMAP: u16 = 3;
    /// What the device is.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// What one of its regions is.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// File descriptors for parts of a region.
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    /// What one of its interrupts is.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// How an interrupt is signalled.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Reads a region.
    pub const REGION_READ: u16 = 9;
    /// Writes a region.
    pub const REGION_WRITE: u16 = 10;
    /// The server reads memory of the client.
    pub const DMA_READ: u16 = 11;
    /// The server writes memory of the client.
    pub const DMA_WRITE: u16 = 12;
    /// Resets the device.
    pub const DEVICE_RESET: u16 = 13;
    /// Several writes of regions in one message.
    pub const REGION_WRITE_MULTI: u16 = 15;
    /// The last number that any version gives to a command.
    pub const LAST: u16 = 18;
}

/// The flag bits of a header.
pub mod flags {
    /// Which of the bits say what kind of message it is.
    pub const TYPE: u32 = 0xf;
    /// A command.
    pub const COMMAND: u32 = 0;
    /// A reply.
    pub const REPLY: u32 = 1;
    /// The sender of a command wants no reply.
    pub const NO_REPLY: u32 = 1 << 4;
    /// A reply that carries an errno.
    pub const ERROR: u32 = 1 << 5;
}

macro_rules! message {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl $name {
            /// Bytes that it takes.
            pub const SIZE: usize = 0 $(+ size_of::<$type>())*;

            /// Takes it from the beginning of `bytes`, and returns what is behind it as well; `None` if
            /// there are too few.
            pub fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
                let mut rest = bytes;
                let message = $name {
                    $($field: {
                        let (field, behind) = rest.split_first_chunk()?;
                        rest = behind;
                        <$type>::from_ne_bytes(*field)
                    },)*
                };
                Some((message, rest))
            }

            /// Appends it to `bytes`.
            pub fn encode(&self, bytes: &mut Vec<u8>) {
                $(bytes.extend_from_slice(&self.$field.to_ne_bytes());)*
            }
        }
    };
}

message! {
    /// What every message begins with.
    Header {
        /// Chosen by the sender of a command, repeated in its reply.
        message_id: u16,
        /// One of [`command`].
        command: u16,
        /// Bytes of the whole message, the header with them.
        message_size: u32,
        /// Bits of [`flags`].
        flags: u32,
        /// The errno of a reply with [`flags::ERROR`].
        error: u32,
    }
}

message! {
    /// [`command::VERSION`], before its JSON text, which ends with a NUL.
    Version {
        /// Must be 0.
        major: u16,
        /// The newest that the sender knows.
        minor: u16,
    }
}

message! {
    /// [`command::DMA_MAP`].
    DmaMap {
        /// Bytes of this structure.
        argsz: u32,
        /// `VFIO_DMA_MAP_FLAG_READ` and `_WRITE`.
        flags: u32,
        /// Where in the file that comes with the message.
        offset: u64,
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
    }
}

message! {
    /// [`command::DMA_UNMAP`].
    DmaUnmap {
        /// Bytes of this structure.
        argsz: u32,
        /// `VFIO_DMA_UNMAP_FLAG_ALL` or nothing.
        flags: u32,
        /// I/O virtual address.
        address: u64,
        /// Bytes; in a reply those that were unmapped.
        size: u64,
    }
}

message! {
    /// [`command::DEVICE_GET_INFO`].
    DeviceInfo {
        /// Bytes of this structure.
        argsz: u32,
        /// `VFIO_DEVICE_FLAGS_*`.
        flags: u32,
        /// How many regions it has.
        num_regions: u32,
        /// How many kinds of interrupts it has.
        num_irqs: u32,
    }
}

message! {
    /// [`command::DEVICE_GET_REGION_INFO`].
    RegionInfo {
        /// Bytes that the asker has room for; in a reply those needed.
        argsz: u32,
        /// `VFIO_REGION_INFO_FLAG_*`.
        flags: u32,
        /// Which region.
        index: u32,
        /// Where capabilities begin, counted from the beginning of this structure.
        cap_offset: u32,
        /// Bytes of the region.
        size: u64,
        /// Where it begins in the file that comes with the reply.
        offset: u64,
    }
}

message! {
    /// The capability of a region of which only parts can be mapped, before its areas.
    SparseMmap {
        /// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
        id: u16,
        /// 1.
        version: u16,
        /// Where the next capability begins; 0, as there is none.
        next: u32,
        /// How many areas follow.
        nr_areas: u32,
        /// 0.
        reserved: u32,
    }
}

message! {
    /// A part of a region that can be mapped.
    SparseArea {
        /// Where it begins in the region.
        offset: u64,
        /// Bytes.
        size: u64,
    }
}

message! {
    /// [`command::DEVICE_GET_IRQ_INFO`].
    IrqInfo {
        /// Bytes of this structure.
        argsz: u32,
        /// `VFIO_IRQ_INFO_*`.
        flags: u32,
        /// Which kind of interrupt.
        index: u32,
        /// How many of it there are.
        count: u32,
    }
}

message! {
    /// [`command::DEVICE_SET_IRQS`], before its data.
    IrqSet {
        /// Bytes of this structure.
        argsz: u32,
        /// `VFIO_IRQ_SET_*`.
        flags: u32,
        /// Which kind of interrupt.
        index: u32,
        /// The first of it.
        start: u32,
        /// How many of it.
        count: u32,
    }
}

message! {
    /// [`command::REGION_READ`] and [`command::REGION_WRITE`], before their data.
    RegionAccess {
        /// Where in the region.
        offset: u64,
        /// Which region.
        region: u32,
        /// Bytes.
        count: u32,
    }
}

message! {
    /// [`command::DMA_READ`] and [`command::DMA_WRITE`], before their data, as the protocol has them.
    DmaAccess {
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        count: u64,
    }
}

message! {
    /// The same as QEMU 10.1 to 11.1 have it: their data begin four bytes earlier. Messages are as long as with
    /// [`DmaAccess`], so four bytes behind the data say nothing.
    NarrowDmaAccess {
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        count: u32,
    }
}

impl Header {
    /// Whether it begins a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & flags::TYPE == flags::REPLY
    }

    /// Whether the sender wants no reply.
    pub fn no_reply(&self) -> bool {
        self.flags & flags::NO_REPLY != 0
    }
}

/// A whole message: the header, which gets its size, and what `body` appends.
pub fn message(header: Header, body: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    encode(Vec::with_capacity(64), header, body)
}

/// As [`message`] with so many bytes of data at most; `None` where there is no memory for them.
pub(crate) fn message_with_data(
    header: Header,
    data: usize,
    body: impl FnOnce(&mut Vec<u8>),
) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(data + 64).ok()?;
    Some(encode(bytes, header, body))
}

fn encode(mut bytes: Vec<u8>, header: Header, body: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    header.encode(&mut bytes);
    body(&mut bytes);
    let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    bytes[4..8].copy_from_slice(&size.to_ne_bytes());
    bytes
}
