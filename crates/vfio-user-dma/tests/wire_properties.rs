// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages survive being written and read, and nothing that is read can do harm.

use proptest::prelude::*;
use vfio_user_dma::wire::{
    self, DeviceInfo, DmaAccess, DmaMap, DmaUnmap, Header, IrqInfo, IrqSet, NarrowDmaAccess,
    RegionAccess, RegionInfo, SparseArea, SparseMmap, Version,
};
use vfio_user_dma::Capabilities;

macro_rules! every {
    ($bytes:expr, $($message:ident)*) => {
        $({
            let decoded = $message::decode($bytes);
            prop_assert_eq!(decoded.is_some(), $bytes.len() >= $message::SIZE);
            if let Some((message, rest)) = decoded {
                let mut again = Vec::new();
                message.encode(&mut again);
                again.extend_from_slice(rest);
                prop_assert_eq!(&again[..], $bytes);
            }
        })*
    };
}

proptest! {
    #[test]
    fn what_is_read_is_what_was_written(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
        let bytes = &bytes[..];
        every!(bytes, Header Version DmaMap DmaUnmap DeviceInfo RegionInfo SparseMmap SparseArea
            IrqInfo IrqSet RegionAccess DmaAccess NarrowDmaAccess);
    }

    #[test]
    fn a_message_knows_its_size(id: u16, command: u16, flags: u32, body in proptest::collection::vec(any::<u8>(), 0..80)) {
        let header = Header { message_id: id, command, flags, ..Header::default() };
        let bytes = wire::message(header, |bytes| bytes.extend_from_slice(&body));
        let (decoded, rest) = Header::decode(&bytes).unwrap();
        let size = bytes.len() as u32;
        prop_assert_eq!(decoded, Header { message_size: size, ..header });
        prop_assert_eq!(rest, &body[..]);
    }

    #[test]
    fn capabilities_are_read_as_written(
        fds: u32,
        size in 1..=u32::MAX,
        pgsizes: u64,
        maps in 0..=65535_u32,
        pgsize: Option<u32>,
    ) {
        let capabilities = Capabilities {
            max_msg_fds: fds,
            max_data_xfer_size: size,
            pgsizes,
            max_dma_maps: maps,
            migration_pgsize: pgsize.map(u64::from),
        };
        prop_assert_eq!(Capabilities::parse(&capabilities.to_text()).unwrap(), capabilities);
    }

    #[test]
    fn text_of_any_kind_is_read_or_refused(text in "\\PC*|[\\[\\]{}\",:0-9a-z_]*") {
        let _ = Capabilities::parse(text.as_bytes());
    }
}

#[test]
fn sizes_are_those_of_the_kernel() {
    assert_eq!(
        (Header::SIZE, DmaMap::SIZE, DmaUnmap::SIZE, RegionInfo::SIZE),
        (16, 32, 24, 32)
    );
    assert_eq!(
        (DeviceInfo::SIZE, IrqInfo::SIZE, IrqSet::SIZE),
        (16, 16, 20)
    );
    assert_eq!(
        (RegionAccess::SIZE, DmaAccess::SIZE, NarrowDmaAccess::SIZE),
        (16, 16, 12)
    );
}
