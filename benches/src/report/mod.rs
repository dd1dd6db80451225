// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From what was recorded to `docs/benchmarks.md` and its plots.

mod machine;
mod plot;
mod table;

use std::fmt::Write as _;
use std::path::Path;
use std::{fs, io};

use crate::bars::Outcome;
use crate::record::{load, Row};

pub use table::number;

/// A group of benches, as a reader meets it.
struct Group {
    name: &'static str,
    title: &'static str,
    text: &'static str,
}

const GROUPS: [Group; 7] = [
    Group {
        name: "seed_table",
        title: "The kernel's comparison",
        text: "The series that gave the kernel `vfio_dma_rw` published what it costs more than a loop of \
               `kvm_read_guest` over pages: +155 to +195 cycles up to 1 page, -530 for 5 pages, -2 005 to \
               -2 533 for 20 pages. Here the handle stands for the former, a page-by-page loop over \
               `GuestMemoryMmap` of one region for the latter, and `memcpy` of the same bytes is the limit. 16 \
               mappings of 16 MiB. A page of the loop is one call, not inlined, of a function that contains all \
               of vm-memory's `read_slice`, inlined: the fastest form of the loop.",
    },
    Group {
        name: "hold_vs_lookup",
        title: "Holding the group against looking it up",
        text: "Each access takes the external user of a group out of a map and drops it after, or uses one that \
               is held, or the handle of one that is held. The kernel's series published about 500 cycles \
               saved. 16 groups, one mapping.",
    },
    Group {
        name: "peers",
        title: "Reads beside what a VMM uses today",
        text: "256 MiB of memory in mappings of equal size, none of which can be merged with its neighbour. \
               `GuestMemoryMmap` and `GuestMemoryAtomic` do not translate: they show what memory without an \
               IOMMU costs. `memcpy` copies from a host address that it is given. `membarrier` is an option of our \
               spaces, `ReaderBarrier::Membarrier`; all else of ours is as spaces are by default.",
    },
    Group {
        name: "virtqueue",
        title: "Virtqueue",
        text: "A chain of 8 readable descriptors popped from a `virtio_queue::Queue`, made a `Reader`, and read. \
               Rings and buffers lie in 9 mappings where there are that many. Our guard is taken and dropped \
               for each chain, also where the space has `ReaderBarrier::Membarrier`; `GuestMemoryMmap` does not \
               translate.",
    },
    Group {
        name: "scaling",
        title: "Threads",
        text: "Two readers, and a reader in turns alone and beside a writer that maps and unmaps a page elsewhere: \
               250 000 times a second, or as often where it does not get that far, and as fast as it can. A \
               reader that keeps its speed beside a writer that hardly gets to work is no better than the \
               reverse: see both tables.",
    },
    Group {
        name: "map_unmap",
        title: "Changing mappings",
        text: "One-page mappings of the same page. A pair is an unmap of one of them and a map in its place; those \
               in batches do it with neighbours at once, and show what one of them takes. Dirty pages: one of \
               two spaces with the same mappings keeps them, and both are written in turns.",
    },
    Group {
        name: "gvt_workload",
        title: "GPU workloads",
        text: GPU_WORKLOADS,
    },
];

const GPU_WORKLOADS: &str = "\
The submissions of the bundled recording of glmark2 (34 contexts of 20 pages), again and again, in a guest that has replayed it: each from the
guest's write of the ring's tail to the event that tells it of the end. The GPU takes no time and changes nothing, so a figure is what the
scheduler costs, and no more than that many workloads a second can be had of one core. Several vGPUs take turns on one thread, as the
time-based policy says.

- `ours`: a held handle, one access for each run of ascending or descending pages, contexts that have not changed are not read again. In
  this recording 168 of 202 submissions are of the context that ran last, which flatters the latter.
- `base + series`: what patches 4 to 7 of the kernel's series do. A held external user, one access for each run of ascending pages. (The
  kernel's loop loses a last page that is alone; this one does not.)
- `base`: the group is looked up for each access, by device, and each page is one access. That is `vfio_dma_rw` before a group could be
  held. Our look-up takes a whole external user, which costs more than the some 500 cycles that it costs the kernel.
- `slots, page by page`: the same accesses on `GuestMemoryMmap` itself: `kvm_read_guest`, which the kernel's series replaced. Nothing is
  translated, and an unmap waits for nobody. It is what `base` is to the kernel.

A case is how the pages of contexts lie in guest memory ([replay.md](replay.md)). `descending` profiles are the same runs the other way
round; whether there are such guests nobody has measured.

The series published these scores of programs in virtual machines, higher is better (v4, cover letter; in two machines the sum of both):

| | glmark2 | lightsmark | openarena | heaven |
|---|---:|---:|---:|---:|
| 1 VM, base | 1248 | 219.70 | 114.9 | 560 |
| 1 VM, base + series | 1248 | 225.8 | 115 | 559 |
| 2 VMs, base | 812 | 211.46 | 115.3 | |
| 2 VMs, base + series | 814 | 214.69 | 115.9 | |

and these cycles to populate and write back a context (patch 7), with the pages it moved by one access:

| | glmark2 | lightsmark | openarena |
|---|---:|---:|---:|
| base | 65 968 | 97 852 | 61 373 |
| base + series | 56 017 | 73 862 | 47 463 |
| less | 15 % | 25 % | 23 % |
| pages an access | 5.25 | 19.99 | 20 |

What can be compared: the cycles, as parts of each other (`nor runs` against `nor handle` below is patch 7 alone), because both are of the
scheduler's copies. What cannot: the scores. They are of programs on a real GPU, which is what they wait for, and the scheduler is a small part of it: +0 % to
+3 % is what its copies were worth there. Workloads a second are no frames a second.
";

/// Writes `benchmarks.md` and `benchmarks/*.svg` into a folder in place of what is there, of what the
/// last runs recorded.
///
/// # Errors
///
/// What the file system says.
pub fn write(docs: &Path) -> io::Result<()> {
    let plots = docs.join("benchmarks");
    // No plot of a section that is no more.
    if plots.exists() {
        fs::remove_dir_all(&plots)?;
    }
    fs::create_dir_all(&plots)?;
    let mut page = String::from(INTRODUCTION);
    page.push_str(&machine::describe());
    bars(&mut page, &load::<Outcome>("bars")?);
    for group in GROUPS {
        let rows: Vec<Row> = load(group.name)?;
        // Writing into a string does not fail.
        let _ = write!(page, "\n## {}\n\n{}\n", group.title, group.text);
        if rows.is_empty() {
            page.push_str("\nNot measured.\n");
        }
        for (i, section) in table::sections(&rows).iter().enumerate() {
            let file = format!("{}-{}.svg", group.name, i + 1);
            fs::write(plots.join(&file), plot::draw(section))?;
            let title = section.title;
            let _ = write!(page, "\n### {title}\n\n{}", section.markdown());
            let _ = write!(page, "\n![{title}](benchmarks/{file})\n");
        }
    }
    fs::write(docs.join("benchmarks.md"), page)
}

const INTRODUCTION: &str = "\
# Benchmarks

Generated by `ci/bench-report`; `ci/bench-report run` measures first. `ci/bench-bars` measures the table of bars alone.

Candidates take turns (A B A B ...), 101 rounds (31 where threads meet; bars are of three such turns, with candidates made anew). A figure is the median of the rounds. In brackets stands what the
first column takes as a part of this one, the median of the rounds' ratios: below 1 the first is faster. Where the middle half of the
ratios (of the figures, where there is no ratio) is spread over more than 15 % of their median it says `noisy`, and nothing can be concluded. A candidate is one call that is
not inlined. vm-memory is generic code: it is compiled into the benches, and inlined into that call as the optimizer sees fit. That is
the fastest form its users can have, and what all figures of `GuestMemoryMmap`, `GuestMemoryAtomic`, `IommuMemory` and the page loops
are of.

";

fn bars(page: &mut String, outcomes: &[Outcome]) {
    page.push_str("\n## What has to be reached\n\n");
    if outcomes.is_empty() {
        page.push_str("Not measured.\n");
        return;
    }
    page.push_str(
        "Each line decides in the spaces it is meant for: as they are by default, or with \
         `ReaderBarrier::Membarrier` where an access is short and the bar leaves no room for a barrier \
         (why: [design.md](design.md), \"Which configuration a bar is for\").\n\n",
    );
    table_of_bars(page, outcomes.iter().filter(|outcome| outcome.decides));
    page.push_str(
        "\nThe same lines in the other spaces. This decides nothing, and is here so that nothing is left out: \
         one configuration does not reach every bar.\n\n",
    );
    table_of_bars(page, outcomes.iter().filter(|outcome| !outcome.decides));
}

fn table_of_bars<'a>(page: &mut String, outcomes: impl Iterator<Item = &'a Outcome>) {
    page.push_str(
        "| name | what | spaces | measured | spread | bar | | |\n|---|---|---|---:|---:|---:|---|---|\n",
    );
    for outcome in outcomes {
        let Outcome {
            name,
            how,
            spaces,
            value,
            unit,
            bar,
            note,
            ..
        } = outcome;
        let how = table::escaped(how);
        let spread = outcome.spread * 100.0;
        let verdict = outcome.verdict.name();
        let _ = writeln!(
            page,
            "| {name} | {how} | {spaces} | {value:.2} {unit} | {spread:.0} % | {bar} | {verdict} | {note} |"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_is_a_bench_target() {
        let manifest = include_str!("../../Cargo.toml");
        let targets = manifest.matches("[[bench]]").count();
        assert_eq!(targets, GROUPS.len());
        for group in GROUPS {
            let line = format!("name = \"{}\"", group.name);
            assert!(manifest.contains(&line), "{}", group.name);
        }
    }
}
