// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Everything that one thread can do with a space, against a naive model that knows every byte and
//! every dirty page by itself.

mod model;
mod ops;
mod real;

use std::sync::atomic::Ordering;
use std::time::Duration;

use iommu_type1::{page_size, ReaderBarrier, UnmapOptions, UnmapPolicy};
use proptest::prelude::*;
use vm_memory::Permissions::ReadWrite;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use model::{Counts, Held, Model};
use ops::{op, Op, Range, Through};
use real::{outcome, partial, unmapped, with_memory, Real};

/// Accesses after which a handle that has met no unmap goes without barriers, and one more.
const ENOUGH: usize = (1 << 16) + 1;

/// Both do it, and say the same.
fn step(real: &mut Real, model: &mut Model, op: Op) -> Result<(), TestCaseError> {
    let options = |policy| UnmapOptions::new().deadline(Duration::ZERO).policy(policy);
    match op {
        Op::Map(new) => {
            let (iova, backing, prot) = with_memory(new);
            let result = real.space.map(iova, backing, prot).map_err(|e| e.errno());
            prop_assert_eq!(result, model.map(&[new]));
        }
        Op::MapBatch(new) => {
            let batch = new.iter().copied().map(with_memory);
            let result = real.space.map_batch(batch).map_err(|e| e.errno());
            prop_assert_eq!(result, model.map(&new));
        }
        Op::Unmap((iova, size), policy) => {
            let result = unmapped(real.space.unmap_with(iova, size, options(policy)));
            prop_assert_eq!(result, model.unmap(&[(iova, size)], policy));
        }
        Op::UnmapBatch(ranges, policy) => {
            let result = unmapped(real.space.unmap_batch_with(&ranges, options(policy)));
            prop_assert_eq!(result, model.unmap(&ranges, policy));
        }
        Op::UnmapAll => {
            let all = model.mappings.keys().copied().collect();
            let expected = model.remove(all, UnmapPolicy::Revoked);
            prop_assert_eq!(unmapped(real.space.unmap_all()), Ok(expected));
        }
        Op::Read(at, len, through) => {
            let (mut found, mut expected) = (vec![0xee; len], vec![0xee; len]);
            let wanted = model.access(at, len, false, |i, byte| expected[i] = *byte);
            match through {
                Through::Handle => {
                    prop_assert_eq!(outcome(real.handle.read(at, &mut found)), wanted)
                }
                Through::Space => prop_assert_eq!(outcome(real.space.read(at, &mut found)), wanted),
                Through::Guard => {
                    let result = real.space.memory().read(&mut found, GuestAddress(at));
                    prop_assert_eq!(partial(result), as_partial(wanted, len));
                }
                Through::Stream => {
                    let mut sink = Vec::new();
                    let at = GuestAddress(at);
                    let result = real.handle.write_all_volatile_to(at, &mut sink, len);
                    prop_assert_eq!(outcome(result), wanted);
                    found[..sink.len()].copy_from_slice(&sink);
                }
            }
            prop_assert_eq!(found, expected);
        }
        Op::Write(at, len, seed, through) => {
            let data: Vec<u8> = (0..len).map(|i| seed.wrapping_add(i as u8)).collect();
            let wanted = model.access(at, len, true, |i, byte| *byte = data[i]);
            match through {
                Through::Handle => prop_assert_eq!(outcome(real.handle.write(at, &data)), wanted),
                Through::Space => prop_assert_eq!(outcome(real.space.write(at, &data)), wanted),
                Through::Guard => {
                    let result = real.space.memory().write(&data, GuestAddress(at));
                    prop_assert_eq!(partial(result), as_partial(wanted, len));
                }
                Through::Stream => {
                    let (at, src) = (GuestAddress(at), &mut &data[..]);
                    let result = real.handle.read_exact_volatile_from(at, src, len);
                    prop_assert_eq!(outcome(result), wanted);
                }
            }
        }
        Op::Store(at, value) => {
            let wanted = model.atomic(at, 4).map(|_| {
                for (i, byte) in value.to_ne_bytes().into_iter().enumerate() {
                    *model.byte(at + i as u64, true) = byte;
                }
            });
            let result = real
                .handle
                .store(value, GuestAddress(at), Ordering::Release);
            prop_assert_eq!(outcome(result), wanted);
        }
        Op::CompareExchange {
            at,
            width,
            new,
            hit,
        } => {
            let there = model.atomic(at, width);
            let mut current = there.clone().unwrap_or(vec![0; width as usize]);
            if !hit {
                current[0] ^= 1;
            }
            if hit && there.is_ok() {
                for (i, byte) in new.to_ne_bytes()[..width as usize].iter().enumerate() {
                    *model.byte(at + i as u64, true) = *byte;
                }
            }
            let wanted = there.map(|before| (hit, before));
            prop_assert_eq!(real.exchange(at, &current, new), wanted);
        }
        Op::Hold(at, len, access) => {
            let wanted = model.reach(at, len, access == ReadWrite);
            let result = real.space.scatter(at, len, access);
            prop_assert_eq!(
                result
                    .as_ref()
                    .map(|_| ())
                    .map_err(|e| (e.errno(), e.completed())),
                wanted
            );
            if let Ok(list) = result {
                let segments = model.segments(at, len);
                let writable = access == ReadWrite;
                let lens: Vec<_> = list.iter().map(|slice| slice.len()).collect();
                let expected: Vec<_> = segments.iter().map(|(_, len)| *len).collect();
                prop_assert_eq!(lens, expected);
                real.held.push(list);
                model.held.push(Held { segments, writable });
            }
        }
        Op::WriteHeld(index, seed) if !model.held.is_empty() => {
            let index = index.index(model.held.len());
            let held = model.held[index].clone();
            let written = usize::from(held.writable) * held.segments.len();
            for (slice, (at, len)) in real.held[index].iter().zip(held.segments).take(written) {
                let data: Vec<u8> = (0..len).map(|i| seed ^ i as u8).collect();
                slice.copy_from(&data);
                for (i, value) in data.into_iter().enumerate() {
                    *model.byte(at + i as u64, true) = value;
                }
            }
        }
        Op::Release(index) if !model.held.is_empty() => {
            let index = index.index(model.held.len());
            real.held.swap_remove(index);
            model.held.swap_remove(index);
        }
        Op::WriteHeld(..) | Op::Release(_) => {}
        Op::StartDirty => {
            real.space.start_dirty_tracking().unwrap();
            model.set_tracking(true);
        }
        Op::StopDirty => {
            real.space.stop_dirty_tracking();
            model.set_tracking(false);
        }
        Op::TakeDirty(range) => take(real, model, range)?,
        Op::GoUnfenced => {
            (0..ENOUGH).for_each(|_| real.handle.read(0, &mut []).unwrap());
        }
    }
    Ok(())
}

/// What a guard should say of it.
fn as_partial(result: Result<(), (i32, usize)>, len: usize) -> Result<usize, i32> {
    match result {
        Ok(()) => Ok(len),
        Err((errno, 0)) => Err(errno),
        Err((_, done)) => Ok(done),
    }
}

fn take(real: &Real, model: &mut Model, range: Range) -> Result<(), TestCaseError> {
    let result = real.space.take_dirty(range.0, range.1);
    let pages = result
        .map(|dirty| {
            let mut pages: Vec<_> = dirty.iter().collect();
            assert_eq!(
                (dirty.len(), dirty.is_empty()),
                (pages.len(), pages.is_empty())
            );
            pages.sort_unstable();
            pages
        })
        .map_err(|error| error.errno());
    prop_assert_eq!(pages, model.take(range));
    Ok(())
}

/// The counters of the space are those of the model.
fn compare_counts(real: &Real, model: &Model) -> Result<(), TestCaseError> {
    let stats = real.space.stats();
    let counts = Counts {
        maps: stats.maps,
        unmaps: stats.unmaps,
        stragglers: stats.stragglers,
        misses: stats.misses,
    };
    prop_assert_eq!(&counts, &model.counts);
    let leaving = model.mappings.values().filter(|mapped| mapped.revoked);
    prop_assert_eq!(stats.mappings, model.mappings.len() as u64);
    prop_assert_eq!(stats.leaving, leaving.count() as u64);
    prop_assert_eq!(stats.leases, model.leases().count() as u64);
    prop_assert_eq!(real.space.mappings() as u64, stats.mappings);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn every_byte_errno_and_dirty_page_equals_the_naive_model(
        fenced in any::<bool>(),
        ops in prop::collection::vec(op(), 1..80)
    ) {
        let barrier = if fenced { ReaderBarrier::Fence } else { ReaderBarrier::Membarrier };
        let mut real = Real::new(barrier);
        let mut model = Model::default();
        for op in ops {
            step(&mut real, &mut model, op)?;
            compare_counts(&real, &model)?;
        }

        // Whatever was not read or taken on the way.
        for (&start, mapped) in &model.mappings {
            let mut found = vec![0; mapped.bytes.len()];
            if real.space.read(start, &mut found).is_ok() {
                prop_assert_eq!(&found, &mapped.bytes);
            }
        }
        let everything = (0, 0_u64.wrapping_sub(page_size()));
        let last_page = (everything.1, page_size());
        if model.inside(everything).is_ok() {
            take(&real, &mut model, everything)?;
            take(&real, &mut model, last_page)?;
        }

        // Nothing stays behind.
        real.held.clear();
        real.space.unmap_all().unwrap();
        let stats = real.space.stats();
        prop_assert_eq!((stats.mappings, stats.leaving, stats.leases, stats.table_bytes), (0, 0, 0, 0));
    }
}
