// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bytes of a message, `struct vhost_iotlb_msg` of the kernel's header.

use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};

use crate::{Error, Result};

/// Bytes of a message.
pub const SIZE: usize = 32;

/// Bytes of it that say something; the rest is padding, which may be left out.
pub const USED: usize = 26;

/// Reads a message as it comes from a socket or a vhost device, in the byte order of the machine.
///
/// Nothing is taken for granted but the length: an access or type that is not known is an error here, and cannot be
/// in a [`VhostIotlbMsg`]. Addresses and sizes are looked at by whoever applies the message.
/// [`VhostIotlb::apply_bytes`](crate::VhostIotlb::apply_bytes) does both, and knows what is no message inside of a batch.
///
/// ```
/// use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
/// use vhost_iotlb::message;
///
/// let mut bytes = message::encode(&VhostIotlbMsg {
///     iova: 0x1000,
///     size: 0x1000,
///     perm: VhostAccess::ReadOnly,
///     msg_type: VhostIotlbType::Miss,
///     ..Default::default()
/// });
/// assert_eq!(message::decode(&bytes)?.iova, 0x1000);
/// bytes[25] = 77;
/// assert_eq!(message::decode(&bytes).err().unwrap().errno(), libc::EINVAL);
/// # Ok::<(), vhost_iotlb::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::MessageSize`], [`Error::UnknownType`], [`Error::UnknownAccess`] (EINVAL).
pub fn decode(bytes: &[u8]) -> Result<VhostIotlbMsg> {
    let len = bytes.len();
    if !(USED..=SIZE).contains(&len) {
        return Err(Error::MessageSize { len });
    }
    let number = |at: usize| {
        let mut number = [0; 8];
        number.copy_from_slice(&bytes[at..at + 8]);
        u64::from_ne_bytes(number)
    };
    Ok(VhostIotlbMsg {
        iova: number(0),
        size: number(8),
        userspace_addr: number(16),
        perm: access(bytes[24])?,
        msg_type: kind(bytes[25])?,
    })
}

/// The bytes of a message.
pub fn encode(message: &VhostIotlbMsg) -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    let numbers = [message.iova, message.size, message.userspace_addr];
    for (to, number) in bytes.chunks_exact_mut(8).zip(numbers) {
        to.copy_from_slice(&number.to_ne_bytes());
    }
    bytes[24] = message.perm as u8;
    bytes[25] = message.msg_type as u8;
    bytes
}

fn access(value: u8) -> Result<VhostAccess> {
    Ok(match value {
        0 => VhostAccess::No,
        1 => VhostAccess::ReadOnly,
        2 => VhostAccess::WriteOnly,
        3 => VhostAccess::ReadWrite,
        _ => return Err(Error::UnknownAccess(value)),
    })
}

fn kind(value: u8) -> Result<VhostIotlbType> {
    Ok(match value {
        0 => VhostIotlbType::Empty,
        1 => VhostIotlbType::Miss,
        2 => VhostIotlbType::Update,
        3 => VhostIotlbType::Invalidate,
        4 => VhostIotlbType::AccessFail,
        5 => VhostIotlbType::BatchBegin,
        6 => VhostIotlbType::BatchEnd,
        _ => return Err(Error::UnknownType(value)),
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_access_and_type_is_known_or_refused() {
        let mut bytes = [0; SIZE];
        for access in 0..=255 {
            for kind in 0..=255 {
                (bytes[24], bytes[25]) = (access, kind);
                match decode(&bytes) {
                    Ok(message) => {
                        assert!(access < 4 && kind < 7);
                        assert_eq!(encode(&message), bytes);
                    }
                    Err(Error::UnknownAccess(value)) => assert!(value == access && access > 3),
                    Err(Error::UnknownType(value)) => assert!(value == kind && kind > 6),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    #[test]
    fn a_message_of_another_length_is_refused() {
        for len in 0..64 {
            let decoded = decode(&vec![1; len]);
            assert_eq!(decoded.is_ok(), (26..=32).contains(&len), "{len}");
        }
    }
}
