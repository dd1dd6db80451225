// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the IOMMU can do: not a rule but hardware, so the rules get it from the kernel.

use crate::op::{Outcome, INFO_BYTES};

/// Page sizes, usable addresses and extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Mask of the page sizes.
    pub page_sizes: u64,
    /// First and last address of each range that can be mapped.
    pub ranges: Vec<(u64, u64)>,
    /// What `VFIO_CHECK_EXTENSION` says yes to.
    pub extensions: Vec<u32>,
}

/// Most links of a chain that are followed.
const LINKS: usize = 16;

const IOVA_RANGE: u16 = 1;

impl Setup {
    /// From what `VFIO_IOMMU_GET_INFO` has said, `None` where that makes no sense.
    pub fn from_info(info: &Outcome, extensions: Vec<u32>) -> Option<Self> {
        let info = &info.info[..INFO_BYTES.min(info.info.len())];
        let page_sizes = u64::from_ne_bytes(bytes(info, 8)?);
        let mut at = u32::from_ne_bytes(bytes(info, 16)?) as usize;
        for _ in 0..LINKS {
            let id = u16::from_ne_bytes(bytes(info, at)?);
            if id == IOVA_RANGE {
                let count = u32::from_ne_bytes(bytes(info, at + 8)?) as usize;
                let number = |from| Some(u64::from_ne_bytes(bytes(info, from)?));
                let range = |i| Some((number(at + 16 + i * 16)?, number(at + 24 + i * 16)?));
                let ranges = (0..count).map(range).collect::<Option<_>>()?;
                return Some(Setup {
                    page_sizes,
                    ranges,
                    extensions,
                });
            }
            at = u32::from_ne_bytes(bytes(info, at + 4)?) as usize;
        }
        None
    }
}

fn bytes<const N: usize>(info: &[u8], at: usize) -> Option<[u8; N]> {
    info.get(at..at.checked_add(N)?)?.try_into().ok()
}
