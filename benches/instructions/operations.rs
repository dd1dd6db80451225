// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The operations whose instructions are counted. A line of [`operation`] makes one more; then
//! `ci/instructions --update` keeps its figure.
//!
//! Each runs in a process of its own, warmed up: what is counted is its steady state. A name ends
//! with bytes and mappings where it depends on them.
//!
//! What the kernel executes does not count. Valgrind shows every program the same processor, so that
//! the C library's copies are the same everywhere.

// The harness's macros make public items.
#![allow(missing_docs)]

use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};

use benches::candidates::{ours, Reader};
use benches::chain::Device;
use benches::churn;
use benches::compare::Candidate;
use benches::workload::{Pattern, Random, Workload};
use benches::world::{Memory, World};
use gungraun::{
    library_benchmark, library_benchmark_group, main, Callgrind, LibraryBenchmarkConfig,
};
use instructions::OPERATIONS;
use iommu_type1::{Backing, DmaHandle, Interest, IoAddressSpace, Transfer};
use vfio_group::{Container, ExternalUser, Group, IommuType};
use vm_memory::{Bytes, GuestAddress, Permissions};

const PAGE: usize = 4096;

#[library_benchmark(setup = warmed_up)]
#[bench::handle_read_8_of_1(read(Reader::Handle, 1, 8))]
#[bench::handle_read_8_of_16(read(Reader::Handle, 16, 8))]
#[bench::handle_read_8_of_1024(read(Reader::Handle, 1024, 8))]
#[bench::handle_read_8_of_65535(read(Reader::Handle, 65_535, 8))]
#[bench::handle_read_64_of_1(read(Reader::Handle, 1, 64))]
#[bench::handle_read_64_of_16(read(Reader::Handle, 16, 64))]
#[bench::handle_read_64_of_1024(read(Reader::Handle, 1024, 64))]
#[bench::handle_read_64_of_65535(read(Reader::Handle, 65_535, 64))]
#[bench::handle_read_4096_of_1(read(Reader::Handle, 1, PAGE))]
#[bench::handle_read_4096_of_16(read(Reader::Handle, 16, PAGE))]
#[bench::handle_read_4096_of_1024(read(Reader::Handle, 1024, PAGE))]
#[bench::handle_read_4096_of_65535(read(Reader::Handle, 65_535, PAGE))]
#[bench::handle_read_across_20(read(Reader::Handle, 65_535, 20 * PAGE))]
#[bench::handle_write_64_of_1(by_handle(1, write_64))]
#[bench::handle_write_64_of_16(by_handle(16, write_64))]
#[bench::handle_write_64_of_1024(by_handle(1024, write_64))]
#[bench::handle_write_64_of_65535(by_handle(65_535, write_64))]
#[bench::handle_write_64_dirty_of_16(by_handle(16, tracked(write_64)))]
#[bench::handle_write_64_dirty_of_65535(by_handle(65_535, tracked(write_64)))]
#[bench::handle_read_64_unfenced(unfenced(read(Reader::HandleMembarrier, 16, 64)))]
#[bench::handle_compare_exchange_u32(by_handle(16, compare_exchange_u32))]
#[bench::handle_load_u32(by_handle(16, load_u32))]
#[bench::handle_store_u32(by_handle(16, store_u32))]
#[bench::shared_read_64(read(Reader::Shared, 16, 64))]
#[bench::user_dma_rw_64(user_dma_rw())]
#[bench::guard(in_space(16, ours::guard_alone))]
#[bench::guard_read_64(read(Reader::Guard, 16, 64))]
#[bench::guard_chain_of_8(Device::Guard.reading(world(1024), 512))]
#[bench::lease_of_1(in_space(16, lease))]
#[bench::pin_unpin_1(pin())]
#[bench::handle_new_drop(in_space(16, handle))]
#[bench::unmap_map_batch_of_16(in_space(1000, batch))]
#[bench::unmap_map_of_1000(churn::pairs(order(1000)).swap_remove(0))]
#[bench::unmap_map_of_65000(churn::pairs(order(65_000)).swap_remove(0))]
fn operation(mut candidate: Candidate<'static>) -> Candidate<'static> {
    candidate.run(OPERATIONS);
    candidate
}

library_benchmark_group!(
    name = operations;
    benchmarks = operation
);
main!(
    config = LibraryBenchmarkConfig::default()
        .tool(Callgrind::with_args(["--cache-sim=no"]));
    library_benchmark_groups = operations
);

fn warmed_up(mut candidate: Candidate<'static>) -> Candidate<'static> {
    candidate.run(OPERATIONS);
    candidate
}

/// The process ends with the benchmark.
fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

fn world(mappings: u64) -> &'static World {
    leak(World::new(mappings, &Memory::untouched()))
}

fn order(mappings: u64) -> &'static [u64] {
    leak(Random::order(mappings))
}

fn read(reader: Reader, mappings: u64, size: usize) -> Candidate<'static> {
    let world = world(mappings);
    let work = Workload::new(&world.layout, Pattern::Spread, size);
    reader.reading(world, leak(work))
}

fn by_handle(mappings: u64, op: impl Fn(&DmaHandle, u64) + 'static) -> Candidate<'static> {
    let world = world(mappings);
    let iovas = Workload::new(&world.layout, Pattern::Spread, 64).iovas;
    let handle = world.space.handle();
    let mut next = 0;
    Candidate::of("by handle", move || {
        // As many addresses as a power of two.
        op(&handle, iovas[next & (iovas.len() - 1)]);
        next += 1;
    })
}

#[inline(never)]
fn write_64(handle: &DmaHandle, iova: u64) {
    handle.write(iova, &[7; 64]).expect("mapped");
}

/// The operation in a space that keeps which pages are written.
fn tracked(op: impl Fn(&DmaHandle, u64) + 'static) -> impl Fn(&DmaHandle, u64) + 'static {
    let once = Once::new();
    move |handle, iova| {
        once.call_once(|| handle.space().start_dirty_tracking().expect("nobody else"));
        op(handle, iova);
    }
}

/// A reader that has met no unmap for long.
fn unfenced(mut reader: Candidate<'static>) -> Candidate<'static> {
    reader.run(1 << 17);
    reader
}

#[inline(never)]
fn compare_exchange_u32(handle: &DmaHandle, iova: u64) {
    let before = handle.compare_exchange(iova, 0_u32, 0, Ordering::AcqRel, Ordering::Acquire);
    let _ = std::hint::black_box(before.expect("mapped"));
}

#[inline(never)]
fn batch(space: &IoAddressSpace) {
    let page = |i| (i * churn::PAGE, churn::PAGE);
    let pages: Vec<_> = (100..116).map(page).collect();
    space.unmap_batch(&pages).expect("nobody holds them");
    let backing = Backing::anonymous(churn::PAGE as usize).expect("a page");
    let mappings = pages
        .iter()
        .map(|(iova, _)| (*iova, backing.clone(), Permissions::ReadWrite));
    space.map_batch(mappings).expect("free");
}

#[inline(never)]
fn load_u32(handle: &DmaHandle, iova: u64) {
    let loaded: u32 = handle
        .load(GuestAddress(iova), Ordering::Acquire)
        .expect("mapped");
    std::hint::black_box(loaded);
}

#[inline(never)]
fn store_u32(handle: &DmaHandle, iova: u64) {
    handle
        .store(7_u32, GuestAddress(iova), Ordering::Release)
        .expect("mapped");
}

fn in_space(mappings: u64, op: impl Fn(&IoAddressSpace) + 'static) -> Candidate<'static> {
    let space = churn::space(mappings, churn::PAGE, &churn::page());
    Candidate::of("in space", move || op(&space))
}

#[inline(never)]
fn handle(space: &IoAddressSpace) {
    drop(std::hint::black_box(space.handle()));
}

#[inline(never)]
fn lease(space: &IoAddressSpace) {
    let list = space.scatter(0, 64, Permissions::Read).expect("mapped");
    drop(std::hint::black_box(list));
}

fn pin() -> Candidate<'static> {
    let space = churn::space(1024, churn::PAGE, &churn::page());
    let pinner = space.pinner(
        "instructions",
        Interest::Holder,
        Arc::new(|_: u64, _: u64| ()),
    );
    Candidate::of("pin", move || {
        let pinned = pinner.pin_pages(0, 1, Permissions::ReadWrite);
        drop(pinned.expect("mapped"));
    })
}

fn user_dma_rw() -> Candidate<'static> {
    let container = Container::open();
    let file = Group::new(0).open().expect("a group of its own");
    file.set_container(&container).expect("no other container");
    container.set_iommu(IommuType::Type1v2).expect("supported");
    let memory = Backing::anonymous(1 << 20).expect("memory");
    container
        .map(0, memory, Permissions::ReadWrite)
        .expect("free");
    let user = ExternalUser::from_group(&file).expect("attached");
    let mut buf = [0; 64];
    Candidate::of("user", move || {
        let transfer = Transfer::Read(std::hint::black_box(&mut buf));
        user.dma_rw(0x1000, transfer).expect("mapped");
    })
}
