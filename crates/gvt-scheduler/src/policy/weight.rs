// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How much of the time a vGPU gets.

use crate::policy::PolicyError;

/// The weight of a vGPU: 1 to 16. A vGPU that always has something to do gets its weight's part of
/// the sum of all weights.
///
/// The kernel's four types of vGPU, an eighth of the GPU to the whole of it, weigh 2, 4, 8 and 16.
///
/// ```
/// use gvt_scheduler::policy::Weight;
///
/// assert_eq!(Weight::new(4)?.get(), 4);
/// assert_eq!(Weight::new(17).unwrap_err().to_string(), "weight 17 is not one of 1 to 16");
/// # Ok::<(), gvt_scheduler::policy::PolicyError>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Weight(u8);

impl Weight {
    /// The least.
    pub const MIN: Weight = Weight(1);
    /// The most.
    pub const MAX: Weight = Weight(16);

    /// A weight of 1 to 16.
    ///
    /// # Errors
    ///
    /// [`PolicyError::Weight`] (EINVAL) for any other.
    pub fn new(weight: u8) -> Result<Self, PolicyError> {
        match weight {
            1..=16 => Ok(Weight(weight)),
            _ => Err(PolicyError::Weight { weight }),
        }
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}
