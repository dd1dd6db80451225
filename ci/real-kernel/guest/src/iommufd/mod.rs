// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Generated sequences on the IOASes of an iommufd, one of them with a device, and on our spaces by its
//! rules.

mod explained;
mod generate;
mod op;
mod ours;
mod rates;
mod rules;
mod uapi;

use std::fs::{self, File};
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use crate::compare::shrink;
use crate::memory::PAGE;
use guest_init::Given;

use explained::Explained;
use generate::Generator;
use op::{Op, Outcome, ATTACHED};
use ours::Ours;
use rates::Rates;
use rules::{around, Rules};
use uapi::{Kernel, DEV_IOMMU};

/// Pages of the file that is mapped.
const FILE_PAGES: u64 = 8;

/// Operations on an iommufd before a fresh one is taken.
const SEQUENCE: u64 = 200;

/// Differences that are shrunk and printed; those after them are only counted.
const PRINTED: usize = 10;

/// Most ranges that a device can reach.
const MOST_RANGES: u32 = 8;

/// What every sequence begins with.
#[derive(Debug)]
struct Start {
    device: String,
    file: Arc<File>,
    reserved: Vec<(u64, u64)>,
}

/// An operation that did not do the same everywhere, for no reason that is known.
#[derive(Clone, Debug)]
struct Difference {
    op: Op,
    kernel: Outcome,
    rules: Outcome,
    ours: Outcome,
}

/// Spaces by the rules and of ours. The two follow what a kernel answers.
#[derive(Debug)]
struct Ourselves {
    rules: Rules,
    ours: Ours,
}

/// The same spaces of everybody's.
#[derive(Debug)]
struct All {
    kernel: Kernel,
    ourselves: Ourselves,
}

impl Start {
    fn new(device: &str) -> Result<Self, String> {
        let file = Arc::new(memory_file().map_err(|error| error.to_string())?);
        let mut kernel = Kernel::new(device, &file).map_err(opening)?;
        let ranges = kernel.apply(&Op::Ranges(ATTACHED, MOST_RANGES));
        if ranges.result.is_err() {
            return Err(format!("no ranges of addresses: {ranges}"));
        }
        println!("iommufd: {:x?} can be mapped", ranges.ranges);
        Ok(Start {
            device: device.into(),
            file,
            reserved: around(&ranges.ranges, 0, u64::MAX),
        })
    }

    fn all(&self) -> Result<All, String> {
        Ok(All {
            kernel: Kernel::new(&self.device, &self.file).map_err(opening)?,
            ourselves: Ourselves::new(&self.reserved, &self.file)?,
        })
    }
}

fn opening(errno: i32) -> String {
    format!("an iommufd: errno {errno}")
}

fn memory_file() -> io::Result<File> {
    // SAFETY: the name ends with a zero byte.
    let file = unsafe { libc::memfd_create(c"iommufd".as_ptr(), 0) };
    if file < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was opened for us.
    let file = unsafe { File::from_raw_fd(file) };
    file.set_len(FILE_PAGES * PAGE)?;
    Ok(file)
}

impl Ourselves {
    fn new(reserved: &[(u64, u64)], file: &Arc<File>) -> Result<Self, String> {
        Ok(Ourselves {
            rules: Rules::new(reserved),
            ours: Ours::new(reserved, file).map_err(|error| error.to_string())?,
        })
    }

    /// Does an operation that a kernel has done, or nobody else; how that differs.
    fn step(
        &mut self,
        op: &Op,
        kernel: Option<Outcome>,
        explained: &mut Explained,
    ) -> Result<Outcome, Box<Difference>> {
        let sources = match op {
            Op::Copy(copy) => self.rules.sources(copy),
            _ => Vec::new(),
        };
        let rules = self.rules.apply(op);
        let kernel = kernel.unwrap_or_else(|| rules.clone());
        let ours = self.ours.apply(op, &kernel, &self.rules);
        if !self.rules.removed().is_empty() {
            explained.removed();
        }
        let mut same = kernel == ours;
        if !same && explained.explain(op, &kernel, &ours, &sources) {
            // What the kernel has copied is needed for what follows.
            same = match op {
                Op::Copy(copy) => self
                    .ours
                    .follow(copy.to, kernel.value, &sources, copy.flags),
                _ => true,
            };
        }
        if kernel == rules && same {
            return Ok(kernel);
        }
        let op = *op;
        Err(Box::new(Difference {
            op,
            kernel,
            rules,
            ours,
        }))
    }
}

impl All {
    /// Does an operation everywhere; what it did, or how that differs.
    fn step(&mut self, op: &Op, explained: &mut Explained) -> Result<Outcome, Box<Difference>> {
        let kernel = self.kernel.apply(op);
        self.ourselves.step(op, Some(kernel), explained)
    }
}

/// Runs so many operations, where the kernel has an iommufd.
pub fn run(given: &Given, operations: u64, seed: u64) -> Result<(), String> {
    if !fs::exists(DEV_IOMMU).map_err(|error| error.to_string())? {
        println!("iommufd: none in this kernel, nothing compared");
        return Ok(());
    }
    let start = Start::new(&given.name)?;
    let (mut rates, mut explained) = (Rates::default(), Explained::default());
    let mut differences = 0;
    for sequence in 0..operations.div_ceil(SEQUENCE) {
        let mut generator = Generator::new(seed ^ sequence << 32);
        let (mut all, mut ops) = (start.all()?, Vec::new());
        for _ in 0..SEQUENCE {
            let op = generator.next(&all.ourselves.rules);
            ops.push(op);
            match all.step(&op, &mut explained) {
                Ok(outcome) => rates.count(&op, &outcome, all.ourselves.rules.areas()),
                Err(difference) => {
                    drop(all);
                    differences += 1;
                    if differences <= PRINTED {
                        print(&start, &ops, &difference);
                    }
                    break;
                }
            }
        }
    }
    let wrong = [rates.check(), explained.check(rates.operations())].concat();
    println!(
        "iommufd: operations {}, differences {differences}, explained {}",
        rates.operations(),
        explained.total()
    );
    if differences > 0 {
        return Err(format!("iommufd: {differences} sequences differ"));
    }
    wrong
        .first()
        .map_or(Ok(()), |wrong| Err(format!("iommufd: {wrong}")))
}

fn print(start: &Start, ops: &[Op], found: &Difference) {
    let again = |ops: &[Op]| -> Option<Difference> {
        let (mut all, mut aside) = (start.all().ok()?, Explained::default());
        ops.iter()
            .find_map(|op| all.step(op, &mut aside).err().map(|differs| *differs))
    };
    let least = shrink(ops, |ops| {
        again(ops).is_some_and(|again| again.op == found.op)
    });
    println!("difference on iommufd:");
    for op in &least {
        println!("    {op}");
    }
    let shown = again(&least).unwrap_or_else(|| found.clone());
    println!("    the kernel: {}", shown.kernel);
    println!("    the rules: {}", shown.rules);
    println!("    ours: {}", shown.ours);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn without_a_kernel_ours_does_what_the_rules_say() {
        memory::make().unwrap();
        let file = Arc::new(memory_file().unwrap());
        let reserved = [(0xfee0_0000, 0xfeef_ffff), (1 << 48, u64::MAX)];
        let (mut rates, mut explained) = (Rates::default(), Explained::default());
        for sequence in 0..100 {
            let mut generator = Generator::new(sequence);
            let mut ourselves = Ourselves::new(&reserved, &file).unwrap();
            for _ in 0..SEQUENCE {
                let op = generator.next(&ourselves.rules);
                let outcome = ourselves.step(&op, None, &mut explained);
                let outcome = outcome.unwrap_or_else(|differs| {
                    panic!("{op}: {} beside {}", differs.rules, differs.ours)
                });
                rates.count(&op, &outcome, ourselves.rules.areas());
            }
        }
        assert_eq!(
            [rates.check(), explained.check(rates.operations())].concat(),
            [""; 0],
            "the generator has to reach everything"
        );
    }
}
