// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Answers of any content to `VFIO_IOMMU_GET_INFO`: an error, or values that are said and understood again.

#![no_main]

use iommu_type1::Info;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // The first byte says how much of the rest a user has room for.
    let Some((room, bytes)) = bytes.split_first() else {
        return;
    };
    let Ok(info) = Info::decode(bytes) else {
        return;
    };
    let needed = 24 + 48 + 16 + 16 * info.iova_ranges.len();
    let mut answer = vec![0; needed];
    answer[..4].copy_from_slice(&u32::try_from(needed).unwrap().to_ne_bytes());
    info.encode(&mut answer).unwrap();
    assert_eq!(Info::decode(&answer).unwrap(), info);

    // With less room it is as much as there is, or an error, but never more.
    let mut answer = vec![0xaa; usize::from(*room)];
    let Some(argsz) = answer.first_chunk_mut() else {
        return;
    };
    *argsz = u32::from(*room).to_ne_bytes();
    if info.encode(&mut answer).is_ok() {
        let fixed = Info::decode(&answer).unwrap();
        assert_eq!(fixed.page_sizes, info.page_sizes);
    }
});
