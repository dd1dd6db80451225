// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The submission port: four dwords make a submission.

use crate::descriptor::ContextDescriptor;

/// Collects the dwords of a submission.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ElspPort {
    dwords: [u32; 4],
    collected: usize,
}

impl ElspPort {
    /// Takes a dword; the fourth one gives the two elements. The guest writes element 1 before
    /// element 0 and the upper dword before the lower one.
    pub(crate) fn write(&mut self, value: u32) -> Option<[ContextDescriptor; 2]> {
        self.dwords.rotate_right(1);
        self.dwords[0] = value;
        self.collected = (self.collected + 1) % self.dwords.len();
        let [lower0, upper0, lower1, upper1] = self.dwords;
        (self.collected == 0).then(|| {
            [
                ContextDescriptor::from_dwords(lower0, upper0),
                ContextDescriptor::from_dwords(lower1, upper1),
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fourth_dword_submits_element_0_last() {
        let mut port = ElspPort::default();
        for round in 0..3u32 {
            assert!(port.write(0x40 + round).is_none());
            assert!(port.write(0x30).is_none());
            assert!(port.write(0x20).is_none());
            let [first, second] = port.write(0x10).unwrap();
            assert_eq!(u64::from(first), 0x20_0000_0010);
            assert_eq!(u64::from(second), u64::from(0x40 + round) << 32 | 0x30);
        }
    }
}
