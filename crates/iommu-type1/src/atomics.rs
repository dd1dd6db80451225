// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Compare-exchange on values in memory, which vm-memory's `AtomicAccess` does not have.

use std::sync::atomic::{
    AtomicI16, AtomicI32, AtomicI64, AtomicI8, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering,
};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{AtomicAccess, VolatileMemory, VolatileMemoryResult, VolatileSlice};

/// Integers that can be compared and exchanged in one step: those of 8 to 64 bits, on hosts that
/// have such an instruction for each. Sealed.
pub trait CompareExchange: AtomicAccess + private::Exchange {}

pub(crate) mod private {
    use super::{BitmapSlice, Ordering, VolatileMemoryResult, VolatileSlice};

    pub trait Exchange: Sized {
        /// The value in `slice` before, which is `current` in `Ok` and any other in `Err`.
        fn exchange_in<B: BitmapSlice>(
            slice: &VolatileSlice<'_, B>,
            current: Self,
            new: Self,
            orders: (Ordering, Ordering),
        ) -> VolatileMemoryResult<Result<Self, Self>>;
    }
}

macro_rules! compare_exchange {
    ($($width:literal: $int:ty => $atomic:ty;)*) => {
        $(
            #[cfg(target_has_atomic = $width)]
            impl private::Exchange for $int {
                fn exchange_in<B: BitmapSlice>(
                    slice: &VolatileSlice<'_, B>,
                    current: Self,
                    new: Self,
                    (success, failure): (Ordering, Ordering),
                ) -> VolatileMemoryResult<Result<Self, Self>> {
                    let value = slice.get_atomic_ref::<$atomic>(0)?;
                    let before = value.compare_exchange(current, new, success, failure);
                    slice.bitmap().mark_dirty(0, size_of::<Self>());
                    Ok(before)
                }
            }

            #[cfg(target_has_atomic = $width)]
            impl CompareExchange for $int {}
        )*
    };
}

compare_exchange! {
    "8": u8 => AtomicU8;
    "8": i8 => AtomicI8;
    "16": u16 => AtomicU16;
    "16": i16 => AtomicI16;
    "32": u32 => AtomicU32;
    "32": i32 => AtomicI32;
    "64": u64 => AtomicU64;
    "64": i64 => AtomicI64;
}
