// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads of hot guest memory: each of our faces, beside what VMMs use today.
//!
//! `cargo bench -p benches --bench dma_rw`

use std::hint::black_box;

use benches::{guest_memory, identity_mapped};
use criterion::{BenchmarkId, Criterion, Throughput};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

const REGION: usize = 1 << 20;
const SIZES: [usize; 5] = [8, 64, 4096, 5 * 4096, 20 * 4096];

/// What user space does in place of `kvm_read_guest`: an access a page.
#[inline(never)]
fn page_by_page(memory: &GuestMemoryMmap, at: u64, buf: &mut [u8]) {
    let mut done = 0;
    while done < buf.len() {
        let gpa = at + done as u64;
        let left_in_page = 4096 - (gpa % 4096) as usize;
        let end = buf.len().min(done + left_in_page);
        memory
            .read_slice(&mut buf[done..end], GuestAddress(gpa))
            .expect("mapped");
        done = end;
    }
}

fn read(c: &mut Criterion) {
    let memory = guest_memory(1, REGION);
    let space = identity_mapped(&memory, 16, REGION / 16);
    let handle = space.handle();
    let mut group = c.benchmark_group("read");
    for size in SIZES {
        let at = GuestAddress(0x1000);
        let mut buf = vec![0; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("page by page", size), |b| {
            b.iter(|| page_by_page(&memory, black_box(at.0), &mut buf));
        });
        group.bench_function(BenchmarkId::new("handle", size), |b| {
            b.iter(|| handle.read_slice(&mut buf, black_box(at)).expect("mapped"));
        });
        group.bench_function(BenchmarkId::new("shared path", size), |b| {
            b.iter(|| space.read(black_box(at.0), &mut buf).expect("mapped"));
        });
        group.bench_function(BenchmarkId::new("guard", size), |b| {
            b.iter(|| {
                let guard = space.memory();
                guard.read_slice(&mut buf, black_box(at)).expect("mapped");
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    read(&mut criterion);
    criterion.final_summary();
}
