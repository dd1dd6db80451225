// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The context descriptor: what the guest submits.

use std::fmt;

/// How the page tables of a context are addressed (bits 4:3 of the descriptor).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum AddressingMode {
    /// 0: shared virtual memory; refused.
    Advanced,
    /// 1: 32 bit, three levels.
    Legacy32,
    /// 2: shared virtual memory with accessed and dirty bits; refused.
    AdvancedAccessDirty,
    /// 3: 48 bit, four levels.
    Legacy64,
}

/// A context descriptor, as one of the two elements of an execlist submission.
///
/// ```
/// use gvt_scheduler::{AddressingMode, ContextDescriptor};
///
/// let descriptor = ContextDescriptor::new(0x1234, 7, AddressingMode::Legacy64);
/// assert!(descriptor.valid() && descriptor.privilege());
/// assert_eq!(descriptor.lrca(), 0x1234);
/// assert_eq!(u64::from(descriptor), 0x7_0123_4119);
/// assert_eq!(ContextDescriptor::from(0x7_0123_4119), descriptor);
/// ```
#[derive(Clone, Copy, Default, Eq, Hash, PartialEq)]
pub struct ContextDescriptor(u64);

impl ContextDescriptor {
    const VALID: u64 = 1 << 0;
    const PRIVILEGE: u64 = 1 << 8;
    const ADDRESSING_MODE_SHIFT: u32 = 3;
    const LRCA_SHIFT: u32 = 12;
    const LRCA_MASK: u64 = 0xf_ffff;
    const CONTEXT_ID_SHIFT: u32 = 32;

    /// A valid descriptor with the privilege bit set. `lrca` is the GGTT page number of the context
    /// object (its low 20 bits are taken).
    pub const fn new(lrca: u32, context_id: u32, mode: AddressingMode) -> Self {
        let lrca = (lrca as u64 & Self::LRCA_MASK) << Self::LRCA_SHIFT;
        let id = (context_id as u64) << Self::CONTEXT_ID_SHIFT;
        let mode = (mode as u64) << Self::ADDRESSING_MODE_SHIFT;
        Self(id | lrca | mode | Self::PRIVILEGE | Self::VALID)
    }

    /// Joins the two dwords as they are written to the submission port.
    pub const fn from_dwords(lower: u32, upper: u32) -> Self {
        Self((upper as u64) << 32 | lower as u64)
    }

    /// Whether the element is in use (bit 0).
    pub const fn valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// The addressing mode (bits 4:3).
    pub const fn addressing_mode(self) -> AddressingMode {
        match self.0 >> Self::ADDRESSING_MODE_SHIFT & 0x3 {
            0 => AddressingMode::Advanced,
            1 => AddressingMode::Legacy32,
            2 => AddressingMode::AdvancedAccessDirty,
            _ => AddressingMode::Legacy64,
        }
    }

    /// Whether the context uses its own page tables (bit 8).
    pub const fn privilege(self) -> bool {
        self.0 & Self::PRIVILEGE != 0
    }

    /// Logical ring context address: the GGTT page number of the context object (bits 31:12).
    pub const fn lrca(self) -> u32 {
        (self.0 >> Self::LRCA_SHIFT & Self::LRCA_MASK) as u32
    }

    /// The identifier the guest gave the context (bits 63:32).
    pub const fn context_id(self) -> u32 {
        (self.0 >> Self::CONTEXT_ID_SHIFT) as u32
    }

    /// Whether both name the same context: identifier and LRCA are equal.
    pub fn same_context(&self, other: &Self) -> bool {
        self.context_id() == other.context_id() && self.lrca() == other.lrca()
    }
}

impl From<u64> for ContextDescriptor {
    fn from(value: u64) -> Self {
        Self(value)
    }
}

impl From<ContextDescriptor> for u64 {
    fn from(descriptor: ContextDescriptor) -> Self {
        descriptor.0
    }
}

impl fmt::Debug for ContextDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContextDescriptor")
            .field("valid", &self.valid())
            .field("addressing_mode", &self.addressing_mode())
            .field("privilege", &self.privilege())
            .field("lrca", &format_args!("{:#x}", self.lrca()))
            .field("context_id", &format_args!("{:#x}", self.context_id()))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_hardware_has_them() {
        let descriptor = ContextDescriptor::from(0xdead_beef_abcd_e119);
        assert!(descriptor.valid());
        assert!(descriptor.privilege());
        assert_eq!(descriptor.addressing_mode(), AddressingMode::Legacy64);
        assert_eq!(descriptor.lrca(), 0xabcde);
        assert_eq!(descriptor.context_id(), 0xdead_beef);
        assert_eq!(
            ContextDescriptor::from_dwords(0xabcd_e119, 0xdead_beef),
            descriptor
        );
    }

    #[test]
    fn parts_survive_the_round_trip() {
        for mode in [
            AddressingMode::Advanced,
            AddressingMode::Legacy32,
            AddressingMode::AdvancedAccessDirty,
            AddressingMode::Legacy64,
        ] {
            let descriptor = ContextDescriptor::new(0xfffff, u32::MAX, mode);
            assert_eq!(descriptor.addressing_mode(), mode);
            assert_eq!(descriptor.lrca(), 0xfffff);
            assert_eq!(descriptor.context_id(), u32::MAX);
        }
    }

    #[test]
    fn same_context_ignores_everything_but_id_and_lrca() {
        let one = ContextDescriptor::new(5, 9, AddressingMode::Legacy64);
        let two = ContextDescriptor::new(5, 9, AddressingMode::Legacy32);
        assert!(one.same_context(&two));
        assert!(!one.same_context(&ContextDescriptor::new(6, 9, AddressingMode::Legacy64)));
        assert!(!one.same_context(&ContextDescriptor::new(5, 8, AddressingMode::Legacy64)));
    }

    #[test]
    fn a_default_descriptor_is_not_valid() {
        assert!(!ContextDescriptor::default().valid());
    }
}
