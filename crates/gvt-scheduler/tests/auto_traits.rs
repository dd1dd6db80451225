// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What may be sent to and shared with other threads.

use gvt_scheduler::{
    AccessCounts, Completion, ContextPages, Engine, Error, Ggtt, Observer, Runs, ShadowImage,
    SimulatedEngine, Vgpu, VgpuConfig,
};
use vm_memory::GuestMemoryMmap;

const fn send_and_sync<T: Send + Sync>() {}

const _: () = {
    send_and_sync::<Vgpu<GuestMemoryMmap>>();
    send_and_sync::<VgpuConfig>();
    send_and_sync::<Completion>();
    send_and_sync::<Ggtt>();
    send_and_sync::<ContextPages<'_>>();
    send_and_sync::<Runs<'_>>();
    send_and_sync::<ShadowImage>();
    send_and_sync::<SimulatedEngine>();
    send_and_sync::<AccessCounts>();
    send_and_sync::<Error>();
};

#[test]
fn traits_can_be_objects() {
    let _engine: Box<dyn Engine> = Box::new(SimulatedEngine::new());
    let _observer: &mut dyn Observer = &mut AccessCounts::default();
}
