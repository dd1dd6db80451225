// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Everything that one thread can do with a space, against a naive model that knows every byte and
//! every dirty page by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use iommu_type1::{
    page_size, Backing, CompareExchange, DmaHandle, Error, IoAddressSpace, ReaderBarrier,
    ScatterList, UnmapOptions, UnmapPolicy,
};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError, Permissions};

use Permissions::{Read, ReadWrite};

/// Where mappings lie: some GiB apart, some with the same low bits, the last at the top of the 64-bit
/// space.
const CLUSTERS: [u64; 5] = [
    0x7000_0000,
    0x1_7000_0000,
    0x41_7000_0000,
    0x8000_0000_7000_0000,
    0,
];
/// Pages of each.
const PAGES: u64 = 4;
const LIMIT: usize = 8;

/// Accesses after which a handle that has met no unmap goes without barriers, and one more.
const ENOUGH: usize = (1 << 16) + 1;

fn cluster_bytes() -> u64 {
    PAGES * page_size()
}

fn base(cluster: usize) -> u64 {
    match CLUSTERS[cluster] {
        0 => 0_u64.wrapping_sub(cluster_bytes()),
        low => low,
    }
}

/// What memory is written through.
#[derive(Clone, Copy, Debug)]
enum Through {
    Handle,
    Space,
    Guard,
    Stream,
}

/// An address and a size.
type Range = (u64, u64);
type NewMapping = (u64, u64, Permissions);

#[derive(Clone, Debug)]
enum Op {
    Map(NewMapping),
    MapBatch(Vec<NewMapping>),
    Unmap(Range, UnmapPolicy),
    UnmapBatch(Vec<Range>, UnmapPolicy),
    UnmapAll,
    Read(u64, usize, Through),
    Write(u64, usize, u8, Through),
    Store(u64, u32),
    /// Of so many bytes; with what is there if `hit`.
    CompareExchange {
        at: u64,
        width: u64,
        new: u64,
        hit: bool,
    },
    Hold(u64, usize, Permissions),
    WriteHeld(prop::sample::Index, u8),
    Release(prop::sample::Index),
    StartDirty,
    StopDirty,
    TakeDirty(Range),
    /// So many accesses that a handle goes without barriers, where it may.
    GoUnfenced,
}

fn prot() -> impl Strategy<Value = Permissions> {
    prop_oneof![
        8 => Just(Permissions::ReadWrite),
        2 => Just(Permissions::Read),
        1 => Just(Permissions::Write),
    ]
}

/// Now and then a mapping that is refused for itself.
fn any_prot() -> impl Strategy<Value = Permissions> {
    prop_oneof![20 => prot(), 1 => Just(Permissions::No)]
}

/// A page of a cluster.
fn page() -> impl Strategy<Value = u64> {
    (0..CLUSTERS.len(), 0..PAGES).prop_map(|(cluster, page)| base(cluster) + page * page_size())
}

/// Now and then something else than whole pages.
fn odd() -> impl Strategy<Value = u64> {
    prop_oneof![20 => Just(0), 1 => 1..page_size()]
}

fn new_mapping() -> impl Strategy<Value = NewMapping> {
    (page(), odd(), 0..8_u64, odd(), any_prot()).prop_map(|(at, past, size, odd, prot)| {
        // Few of nothing, most of one page or two.
        let pages = [0, 1, 1, 1, 2, 2, 2, 3][size as usize];
        (at + past, pages * page_size() + odd, prot)
    })
}

fn range() -> impl Strategy<Value = Range> {
    let near = (page(), odd(), 0..5_u64, odd())
        .prop_map(|(at, past, pages, odd)| (at + past, pages * page_size() + odd));
    let far = (0..CLUSTERS.len(), 0..CLUSTERS.len()).prop_map(|(one, other)| {
        let (first, last) = (base(one.min(other)), base(one.max(other)));
        (
            first,
            last.wrapping_sub(first).wrapping_add(cluster_bytes()),
        )
    });
    prop_oneof![3 => near, 2 => far]
}

fn policy() -> impl Strategy<Value = UnmapPolicy> {
    prop_oneof![Just(UnmapPolicy::Revoked), Just(UnmapPolicy::Restore)]
}

/// A byte of a cluster, now and then one whose address differs from such a one in one bit.
fn byte() -> impl Strategy<Value = u64> {
    let flip = prop_oneof![8 => Just(0), 1 => (12..64_u32).prop_map(|bit| 1 << bit)];
    (page(), 0..page_size(), flip).prop_map(|(at, offset, flip)| (at + offset) ^ flip)
}

/// Short ones, and some over several pages.
fn len() -> impl Strategy<Value = usize> {
    prop_oneof![2 => 0..64_usize, 2 => 0..3 * page_size() as usize]
}

fn through() -> impl Strategy<Value = Through> {
    use Through::*;
    prop_oneof![Just(Handle), Just(Space), Just(Guard), Just(Stream)]
}

fn op() -> impl Strategy<Value = Op> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        10 => new_mapping().prop_map(Op::Map),
        5 => prop::collection::vec(new_mapping(), 0..4).prop_map(Op::MapBatch),
        4 => (range(), policy()).prop_map(|(range, policy)| Op::Unmap(range, policy)),
        4 => (prop::collection::vec(range(), 0..4), policy())
            .prop_map(|(ranges, policy)| Op::UnmapBatch(ranges, policy)),
        1 => Just(Op::UnmapAll),
        8 => (byte(), len(), through()).prop_map(|(at, len, through)| Op::Read(at, len, through)),
        16 => (byte(), len(), any::<u8>(), through())
            .prop_map(|(at, len, seed, through)| Op::Write(at, len, seed, through)),
        3 => (byte(), any::<bool>(), any::<u32>())
            .prop_map(|(at, odd, value)| Op::Store(if odd { at } else { at & !3 }, value)),
        6 => (byte(), 0..4_u32, any::<u64>(), any::<bool>(), 0..8_u8).prop_map(|(at, shift, new, hit, odd)| {
            let width = 1 << shift;
            let at = if odd == 0 { at } else { at & !(width - 1) };
            Op::CompareExchange { at, width, new, hit }
        }),
        6 => (byte(), len(), prop_oneof![3 => Just(ReadWrite), 1 => Just(Read)])
            .prop_map(|(at, len, access)| Op::Hold(at, len, access)),
        6 => (index(), any::<u8>()).prop_map(|(index, seed)| Op::WriteHeld(index, seed)),
        4 => index().prop_map(Op::Release),
        3 => Just(Op::StartDirty),
        1 => Just(Op::StopDirty),
        8 => range().prop_map(Op::TakeDirty),
        1 => Just(Op::GoUnfenced),
    ]
}

#[derive(Clone)]
struct Mapped {
    bytes: Vec<u8>,
    prot: Permissions,
    /// An unmap has given up on it.
    revoked: bool,
    /// Addresses of pages.
    dirty: BTreeSet<u64>,
}

/// What the counters of a space should say.
#[derive(Debug, Default, PartialEq)]
struct Counts {
    maps: u64,
    unmaps: u64,
    stragglers: u64,
    misses: u64,
}

/// Parts of mappings: where, and how many bytes.
type Segments = Vec<(u64, usize)>;

/// A list that somebody has.
#[derive(Clone)]
struct Held {
    segments: Segments,
    writable: bool,
}

#[derive(Default)]
struct Model {
    mappings: BTreeMap<u64, Mapped>,
    held: Vec<Held>,
    tracking: bool,
    counts: Counts,
}

/// What the kernel wants of a range: pages, some, inside the space. Its last byte.
fn check((iova, size): Range) -> Result<u64, i32> {
    if iova % page_size() != 0 || size % page_size() != 0 || size == 0 {
        return Err(libc::EINVAL);
    }
    iova.checked_add(size - 1).ok_or(libc::EOVERFLOW)
}

impl Mapped {
    fn last(&self, start: u64) -> u64 {
        start + (self.bytes.len() as u64 - 1)
    }
}

impl Model {
    /// All of them or none.
    fn map(&mut self, new: &[NewMapping]) -> Result<(), i32> {
        for &(iova, size, prot) in new {
            if size == 0 {
                return Err(libc::EINVAL);
            }
            iova.checked_add(size - 1).ok_or(libc::EOVERFLOW)?;
            check((iova, size))?;
            if prot == Permissions::No {
                return Err(libc::EINVAL);
            }
        }
        let meets = |one: Range, other: Range| {
            one.0 <= other.0 + (other.1 - 1) && other.0 <= one.0 + (one.1 - 1)
        };
        for (i, one) in new.iter().enumerate() {
            if new[..i]
                .iter()
                .any(|other| meets((one.0, one.1), (other.0, other.1)))
            {
                return Err(libc::EEXIST);
            }
        }
        for &(iova, size, _) in new {
            let met = |revoked| {
                self.mappings.iter().any(|(start, mapped)| {
                    let range = (*start, mapped.bytes.len() as u64);
                    mapped.revoked == revoked && meets((iova, size), range)
                })
            };
            if met(true) {
                return Err(libc::EBUSY);
            }
            if met(false) {
                return Err(libc::EEXIST);
            }
        }
        if self.mappings.len() + new.len() > LIMIT {
            return Err(libc::ENOSPC);
        }
        for &(iova, size, prot) in new {
            let mapped = Mapped {
                bytes: vec![0; size as usize],
                prot,
                revoked: false,
                dirty: BTreeSet::new(),
            };
            self.mappings.insert(iova, mapped);
            self.counts.maps += 1;
        }
        Ok(())
    }

    /// Starts of the mappings inside a range, unless it cuts one.
    fn inside(&self, range: Range) -> Result<Vec<u64>, i32> {
        let (first, last) = (range.0, check(range)?);
        let mut inside = Vec::new();
        for (start, mapped) in &self.mappings {
            let end = mapped.last(*start);
            if *start >= first && end <= last {
                inside.push(*start);
            } else if *start <= last && first <= end {
                return Err(libc::EINVAL);
            }
        }
        Ok(inside)
    }

    fn is_held(&self, start: u64) -> bool {
        self.leases().any(|leased| leased == start)
    }

    /// Starts of leased mappings, one for each mapping and list.
    fn leases(&self) -> impl Iterator<Item = u64> + '_ {
        self.held.iter().flat_map(|held| {
            let starts = held.segments.iter().map(|(at, _)| self.find(*at).unwrap());
            starts.collect::<BTreeSet<_>>()
        })
    }

    /// Bytes removed, and bytes left.
    fn unmap(&mut self, ranges: &[Range], policy: UnmapPolicy) -> Result<(u64, u64), i32> {
        for range in ranges {
            check(*range)?;
        }
        let mut inside = BTreeSet::new();
        for range in ranges {
            inside.extend(self.inside(*range)?);
        }
        Ok(self.remove(inside, policy))
    }

    fn remove(&mut self, starts: BTreeSet<u64>, policy: UnmapPolicy) -> (u64, u64) {
        let (mut unmapped, mut left) = (0, 0);
        for start in starts {
            let size = self.mappings[&start].bytes.len() as u64;
            if self.is_held(start) {
                let mapped = self.mappings.get_mut(&start).unwrap();
                mapped.revoked = policy == UnmapPolicy::Revoked;
                left += size;
                self.counts.stragglers += 1;
            } else {
                self.mappings.remove(&start);
                unmapped += size;
                self.counts.unmaps += 1;
            }
        }
        (unmapped, left)
    }

    /// Start of the mapping at an address.
    fn find(&self, at: u64) -> Option<u64> {
        let (start, mapped) = self.mappings.range(..=at).next_back()?;
        (at <= mapped.last(*start)).then_some(*start)
    }

    /// The byte at an address whatever it may be used for, marked if it is written.
    fn byte(&mut self, at: u64, write: bool) -> &mut u8 {
        let start = self.find(at).unwrap();
        let mapped = self.mappings.get_mut(&start).unwrap();
        if write && self.tracking {
            mapped.dirty.insert(at / page_size() * page_size());
        }
        &mut mapped.bytes[(at - start) as usize]
    }

    /// Byte by byte until one refuses: its errno and how many came before.
    fn access(
        &mut self,
        iova: u64,
        len: usize,
        write: bool,
        mut each: impl FnMut(usize, &mut u8),
    ) -> Result<(), (i32, usize)> {
        let reached = self.reach(iova, len, write);
        let done = match reached {
            Ok(()) => len,
            Err((_, done)) => done,
        };
        (0..done).for_each(|i| each(i, self.byte(iova + i as u64, write)));
        reached
    }

    /// As an access, but nothing is read or written.
    fn reach(&mut self, iova: u64, len: usize, write: bool) -> Result<(), (i32, usize)> {
        if iova as u128 + len as u128 > 1 << 64 {
            return Err((libc::EOVERFLOW, 0));
        }
        let needed = if write { ReadWrite } else { Read };
        for i in 0..len {
            let at = iova + i as u64;
            let refused = match self.find(at).map(|start| &self.mappings[&start]) {
                None => Some(libc::EINVAL),
                Some(mapped) if mapped.revoked => Some(libc::EBUSY),
                Some(mapped) if !mapped.prot.allow(needed) => Some(libc::EPERM),
                Some(_) => None,
            };
            if let Some(errno) = refused {
                self.counts.misses += 1;
                return Err((errno, i));
            }
        }
        Ok(())
    }

    /// The bytes there, if all of them lie in one place and may be written.
    fn atomic(&mut self, at: u64, width: u64) -> Result<Vec<u8>, (i32, usize)> {
        if at % width != 0 {
            return Err((libc::EINVAL, 0));
        }
        let mut bytes = Vec::new();
        self.access(at, width as usize, true, |_, byte| bytes.push(*byte))?;
        Ok(bytes)
    }

    /// Parts of mappings that make up a range, which is accessible.
    fn segments(&self, iova: u64, len: usize) -> Segments {
        let mut segments = Vec::new();
        let mut done = 0;
        while done < len {
            let at = iova + done as u64;
            let start = self.find(at).unwrap();
            let behind = self.mappings[&start].last(start) - at + 1;
            let n = behind.min((len - done) as u64) as usize;
            segments.push((at, n));
            done += n;
        }
        segments
    }

    fn set_tracking(&mut self, tracking: bool) {
        if self.tracking != tracking {
            self.mappings
                .values_mut()
                .for_each(|mapped| mapped.dirty.clear());
        }
        self.tracking = tracking;
    }

    fn take(&mut self, range: Range) -> Result<Vec<u64>, i32> {
        check(range)?;
        if !self.tracking {
            return Err(libc::EINVAL);
        }
        let inside = self.inside(range)?;
        let taken = inside
            .iter()
            .map(|start| std::mem::take(&mut self.mappings.get_mut(start).unwrap().dirty));
        Ok(taken.flatten().collect())
    }
}

/// The space that is tested, and one user of it.
struct Real {
    space: IoAddressSpace,
    handle: DmaHandle,
    held: Vec<ScatterList>,
}

fn outcome(result: Result<(), Error>) -> Result<(), (i32, usize)> {
    result.map_err(|error| (error.errno(), error.completed()))
}

/// Removed and left.
fn unmapped(result: Result<u64, Error>) -> Result<(u64, u64), i32> {
    match result {
        Ok(bytes) => Ok((bytes, 0)),
        Err(Error::Deadline { unmapped, left, .. }) => Ok((unmapped, left)),
        Err(error) => Err(error.errno()),
    }
}

/// Of a guard, which does what can be done.
fn partial(result: Result<usize, GuestMemoryError>) -> Result<usize, i32> {
    result.map_err(|error| match error {
        GuestMemoryError::IOError(error) => {
            let ours = error.get_ref().unwrap().downcast_ref::<Error>();
            ours.unwrap().errno()
        }
        other => panic!("{other}"),
    })
}

/// What a guard should say of it.
fn as_partial(result: Result<(), (i32, usize)>, len: usize) -> Result<usize, i32> {
    match result {
        Ok(()) => Ok(len),
        Err((errno, 0)) => Err(errno),
        Err((_, done)) => Ok(done),
    }
}

impl Real {
    fn new(barrier: ReaderBarrier) -> Self {
        let space = IoAddressSpace::builder()
            .entry_limit(LIMIT)
            .unmap_deadline(Duration::ZERO)
            .reader_barrier(barrier)
            .build();
        Real {
            handle: space.handle(),
            space,
            held: Vec::new(),
        }
    }

    fn exchange(&self, at: u64, current: &[u8], new: u64) -> Result<(bool, Vec<u8>), (i32, usize)> {
        let new = &new.to_ne_bytes()[..current.len()];
        match current.len() {
            1 => self.exchange_as(at, current, new, u8::from_ne_bytes, u8::to_ne_bytes),
            2 => self.exchange_as(at, current, new, u16::from_ne_bytes, u16::to_ne_bytes),
            4 => self.exchange_as(at, current, new, u32::from_ne_bytes, u32::to_ne_bytes),
            _ => self.exchange_as(at, current, new, u64::from_ne_bytes, u64::to_ne_bytes),
        }
    }

    fn exchange_as<T: CompareExchange, const N: usize>(
        &self,
        at: u64,
        current: &[u8],
        new: &[u8],
        from: impl Fn([u8; N]) -> T,
        to: impl Fn(T) -> [u8; N],
    ) -> Result<(bool, Vec<u8>), (i32, usize)> {
        let (current, new) = [current, new]
            .map(|bytes| from(bytes.try_into().unwrap()))
            .into();
        let found =
            self.handle
                .compare_exchange(at, current, new, Ordering::AcqRel, Ordering::Acquire);
        match found {
            Ok(Ok(before)) => Ok((true, to(before).to_vec())),
            Ok(Err(before)) => Ok((false, to(before).to_vec())),
            Err(error) => Err((error.errno(), error.completed())),
        }
    }
}

/// A new mapping with its memory.
fn with_memory((iova, size, prot): NewMapping) -> (u64, Backing, Permissions) {
    // No memory can be made of nothing: cut a page to nothing through a region.
    let backing = match size {
        0 => nothing(),
        _ => Backing::anonymous(size as usize).unwrap(),
    };
    (iova, backing, prot)
}

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

/// A backing of no bytes.
fn nothing() -> Backing {
    use vm_memory::GuestMemoryMmap;
    let memory =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), page_size() as usize)]).unwrap();
    Backing::from_guest_memory(&memory, GuestAddress(0), 0).unwrap()
}
