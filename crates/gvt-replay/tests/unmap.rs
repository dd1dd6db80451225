// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that is unmapped while a vGPU holds pins in it: the notice, and what happens when nobody
//! reads it.

#[path = "../../page-pin/tests/common/deadline.rs"]
mod deadline;

use std::thread;
use std::time::Duration;

use deadline::{within, DEADLINE};
use gvt_replay::layout::{Slot, SLOTS};
use gvt_replay::{Contiguity, Machine, Model, Plan, Trace};
use gvt_scheduler::VgpuConfig;
use iommu_type1::{Error, UnmapOptions};

/// A machine that has replayed the recording of H.264 decoding, and is as it must be.
fn replayed() -> Machine<()> {
    let trace = Trace::from_bytes(include_bytes!("../data/h264-vcs-skl.aub.xz")).unwrap();
    let plan = Plan::new(&trace, &Contiguity::bundled("consecutive").unwrap()).unwrap();
    let mut machine = Machine::new(0, &plan, VgpuConfig::default(), None, ()).unwrap();
    for event in plan.events() {
        machine.play(event).unwrap();
    }
    let model = Model::after(&plan).unwrap();
    assert!(machine.verify(&model, &plan).unwrap().verified());
    machine
}

#[test]
fn the_vgpu_pins_the_pages_its_page_tables_map() {
    let machine = replayed();
    assert_eq!(machine.vgpu().shadowed_tables(), 4);
    assert!(machine.vgpu().pinned_leaves() > 300);
    // Through the external user, which it has: the group file and this are the users of the container.
    assert_eq!(machine.vgpu().pins().group().container_users(), 2);
}

#[test]
fn an_unmap_ends_when_the_vgpus_thread_reads_the_notice() {
    let mut machine = replayed();
    // The VMM has the container's mappings too, on a thread of its own.
    let space = machine.container().address_space().unwrap();
    for Slot { gpa, len } in SLOTS {
        let pinned = machine.vgpu().pinned_leaves();
        let space = space.clone();
        let vmm = thread::spawn(move || {
            let patient = UnmapOptions::new().deadline(DEADLINE);
            space.unmap_with(gpa, len, patient)
        });
        within("an unmap ends when the notice is read", || {
            machine.release_unmapped();
            thread::sleep(Duration::from_millis(1));
            vmm.is_finished()
        });
        assert_eq!(vmm.join().unwrap().unwrap(), len);
        assert!(machine.vgpu().pinned_leaves() < pinned, "slot {gpa:#x}");
    }
    assert_eq!(machine.vgpu().pinned_leaves(), 0);
}

/// The VMM and the vGPU are one thread here: it waits for a message that it should read itself.
#[test]
fn an_unmap_that_the_vgpu_does_not_hear_of_ends_at_its_deadline_and_names_it() {
    let mut machine = replayed();
    let space = machine.container().address_space().unwrap();
    let Slot { gpa, len } = SLOTS[3];
    let hasty = UnmapOptions::new().deadline(Duration::from_millis(20));
    match space.unmap_with(gpa, len, hasty) {
        Err(Error::Deadline {
            unmapped: 0,
            left,
            holders,
        }) => {
            assert_eq!(left, len);
            assert!(!holders.is_empty());
            assert!(holders.iter().all(|holder| holder.name == "vgpu0"));
        }
        other => panic!("{other:?}"),
    }
    // The notice was not lost, and the unmap can be done again.
    machine.release_unmapped();
    assert_eq!(space.unmap_with(gpa, len, hasty).unwrap(), len);
}
