// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a plan puts into the guest against the recorded machine, rebuilt naively: the GPU must see
//! the same address space with the same contents, at other physical addresses.

use std::collections::{HashMap, HashSet};

use gvt_replay::aub::{PacketKind, Space, Trace};
use gvt_replay::plan::Action;
use gvt_replay::{Contiguity, Model, Plan};

type Memory = HashMap<u64, Vec<u8>>;

/// Physical memory and GGTT of the recorded machine at the end of the trace.
fn recorded(trace: &Trace) -> (Memory, HashMap<u64, u64>) {
    let (mut memory, mut ggtt) = (Memory::new(), HashMap::new());
    for packet in trace.packets() {
        let PacketKind::MemoryWrite {
            space,
            address,
            data,
        } = &packet.kind
        else {
            continue;
        };
        let bytes = trace.bytes(data);
        if *space == Space::GgttEntries {
            for (index, entry) in bytes.chunks(8).enumerate() {
                let entry = u64::from_le_bytes(entry.try_into().unwrap());
                ggtt.insert(address / 8 + index as u64, entry);
            }
            continue;
        }
        for (at, byte) in (*address..).zip(bytes) {
            let physical = match space {
                Space::Ggtt => (ggtt[&(at >> 12)] & !0xfff) | (at & 0xfff),
                _ => at,
            };
            let page = memory
                .entry(physical >> 12)
                .or_insert_with(|| vec![0; 4096]);
            page[(physical & 0xfff) as usize] = *byte;
        }
    }
    (memory, ggtt)
}

/// Pages a page table tree reaches, its own and the mapped ones, by level and index.
fn walk(
    read: &dyn Fn(u64) -> u64,
    table: u64,
    level: u32,
    va: u64,
    out: &mut Vec<(u32, u64, u64)>,
) {
    out.push((level, va, table >> 12));
    if level == 0 {
        return;
    }
    for index in 0..512 {
        let entry = read(table + index * 8);
        if entry & 1 == 1 {
            walk(
                read,
                entry & 0x3fff_ffff_f000,
                level - 1,
                va << 9 | index,
                out,
            );
        }
    }
}

fn check(stored: &[u8], profile: &str) {
    let trace = Trace::from_bytes(stored).unwrap();
    let plan = Plan::new(&trace, &Contiguity::bundled(profile).unwrap()).unwrap();
    let model = Model::after(&plan).unwrap();
    let (memory, recorded_ggtt) = recorded(&trace);
    let ggtt: HashMap<u64, u64> = plan
        .events()
        .iter()
        .filter_map(|event| match event.action {
            Action::GgttEntry { index, value } => Some((index.into(), value)),
            _ => None,
        })
        .collect();

    // The GGTT: the same entries, at other pages.
    let mut place = HashMap::new();
    let mut put = |page: u64, gpa_page: u64| {
        assert_eq!(
            *place.entry(page).or_insert(gpa_page),
            gpa_page,
            "page {page:#x}"
        );
    };
    assert_eq!(ggtt.len(), recorded_ggtt.len());
    for (index, entry) in &recorded_ggtt {
        assert_eq!(entry & 0xfff, ggtt[index] & 0xfff);
        put(entry >> 12, ggtt[index] >> 12);
    }

    // The page tables of the first context (all have the same), from the root in its page 1.
    let page1 = ggtt[&(u64::from(plan.contexts()[0].lrca) + 1)] & !0xfff;
    let dword = |at: usize| {
        let bytes = &model.page(page1).unwrap()[at..at + 4];
        u64::from(u32::from_le_bytes(bytes.try_into().unwrap()))
    };
    let root = dword(0xc4) << 32 | dword(0xcc);
    let entry = |page: Option<&[u8]>, at: u64| {
        let at = (at & 0xfff) as usize;
        page.map_or(0, |page| {
            u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
        })
    };
    let (mut before, mut after) = (Vec::new(), Vec::new());
    walk(
        &|at| entry(memory.get(&(at >> 12)).map(Vec::as_slice), at),
        0,
        4,
        0,
        &mut before,
    );
    walk(
        &|at| entry(model.page(at).map(|page| &page[..]), at),
        root,
        4,
        0,
        &mut after,
    );
    assert_eq!(before.len(), after.len());
    let mut mapped = 0;
    for ((level, va, page), (level_after, va_after, gpa_page)) in before.iter().zip(&after) {
        assert_eq!((level, va), (level_after, va_after));
        put(*page, *gpa_page);
        if *level == 0 {
            mapped += 1;
            let recorded = memory.get(page).map_or(&[0; 4096][..], Vec::as_slice);
            let found = model
                .page(gpa_page << 12)
                .map_or(&[0; 4096][..], |page| &page[..]);
            assert!(recorded == found, "contents of virtual page {va:#x}");
        }
    }
    assert!(mapped > 300);

    // No two recorded pages in one place, and none in the guest's first.
    let places: HashSet<u64> = place.values().copied().collect();
    assert_eq!(places.len(), place.len());
    assert!(!places.contains(&0));
}

#[test]
fn the_gpu_sees_what_was_recorded() {
    for profile in ["consecutive", "recycled"] {
        check(include_bytes!("../data/glmark2-skl.aub.xz"), profile);
        check(include_bytes!("../data/ncnn-vulkan-skl.aub.xz"), profile);
        check(include_bytes!("../data/h264-vcs-skl.aub.xz"), profile);
    }
}
