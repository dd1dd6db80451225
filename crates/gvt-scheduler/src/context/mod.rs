// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Copying contexts: from the guest's object in the GGTT to the shadow image and back.

mod runs;
mod scatter;
mod shadow_image;
mod skip;
mod transfer;

pub use runs::{CopyMode, Run, Runs};
pub(crate) use scatter::FromLastPage;
pub use shadow_image::ShadowImage;
pub(crate) use skip::SkipRecord;
pub use transfer::{ContextPages, CopyStats};
