// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Generated sequences on containers of both types.

use std::fs;

use vfio_bindings::bindings::vfio::{VFIO_TYPE1v2_IOMMU, VFIO_TYPE1_IOMMU};

use crate::compare::{compare, shrink, Difference};
use crate::explained::Explained;
use crate::generate::Generator;
use crate::op::{Machine, Op, INFO_BYTES};
use crate::ours::Ours;
use crate::rates::Rates;
use crate::rules::Rules;
use crate::setup::Setup;
use crate::vfio::Kernel;
use guest_init::Given;

/// Operations on a container before a fresh one is taken.
const SEQUENCE: u64 = 200;

/// Extensions that are asked for.
const EXTENSIONS: std::ops::Range<u32> = 0..13;

/// Differences that are shrunk and printed; those after them are only counted.
const PRINTED: usize = 10;

const ENTRY_LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// One kind of container.
#[derive(Clone, Debug)]
struct Kind {
    group: u32,
    v2: bool,
    entry_limit: u32,
    setup: Setup,
}

impl Kind {
    fn kernel(&self) -> Result<Kernel, String> {
        fs::write(ENTRY_LIMIT, self.entry_limit.to_string())
            .map_err(|error| format!("{ENTRY_LIMIT}: {error}"))?;
        open(self.group, self.v2)
    }

    /// A fresh container of somebody's beside the kernel.
    fn other(&self, whose: Whose) -> Result<Box<dyn Machine>, String> {
        let (setup, v2, limit) = (&self.setup, self.v2, self.entry_limit);
        Ok(match whose {
            Whose::Rules => Box::new(Rules::new(setup, v2, limit)),
            Whose::Ours => {
                Box::new(Ours::new(setup, v2, limit).map_err(|error| error.to_string())?)
            }
        })
    }
}

/// Who does what the kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// The rules as a plain program: where only our crate differs from the kernel, it is wrong; where these do
    /// too, the contract may be.
    Rules,
    /// Our crate.
    Ours,
}

const ALL: [Whose; 2] = [Whose::Rules, Whose::Ours];

fn open(group: u32, v2: bool) -> Result<Kernel, String> {
    let iommu_type = if v2 {
        VFIO_TYPE1v2_IOMMU
    } else {
        VFIO_TYPE1_IOMMU
    };
    Kernel::new(group, iommu_type).map_err(|errno| format!("a container: errno {errno}"))
}

/// What the IOMMU of a group can do.
pub fn setup(group: u32) -> Result<Setup, String> {
    let mut kernel = open(group, true)?;
    let info = kernel.apply(&Op::Info(INFO_BYTES as u32));
    let has = |extension: &u32| kernel.container().check_extension(*extension) == Ok(1);
    let extensions = EXTENSIONS.filter(has).collect();
    Setup::from_info(&info, extensions).ok_or_else(|| format!("no ranges of addresses in {info}"))
}

/// Runs so many operations, half on each type of container.
pub fn run(given: &Given, setup: &Setup, operations: u64, seed: u64) -> Result<(), String> {
    let (mut rates, mut explained) = (Rates::default(), Explained::default());
    let mut differences = 0;
    for sequence in 0..operations.div_ceil(SEQUENCE) {
        let mut generator = Generator::new(seed ^ sequence << 32);
        let kind = Kind {
            group: given.group,
            v2: sequence % 2 == 0,
            entry_limit: generator.entry_limit(),
            setup: setup.clone(),
        };
        let mut tally = (&mut rates, &mut explained);
        if let Some(found) = one(&kind, &mut generator, &mut tally)? {
            differences += 1;
            if differences <= PRINTED {
                print(&kind, &found)?;
            }
        }
    }
    let missing = [rates.check(), explained.check(rates.operations())].concat();
    println!(
        "operations {}, differences {differences}, explained {}",
        rates.operations(),
        explained.total()
    );
    if differences > 0 {
        return Err(format!("{differences} sequences differ"));
    }
    missing
        .first()
        .map_or(Ok(()), |missing| Err(missing.clone()))
}

/// A sequence whose last operation differs.
struct Found {
    ops: Vec<Op>,
    whose: Whose,
    difference: Difference,
}

/// Runs one sequence up to the first difference.
fn one(
    kind: &Kind,
    generator: &mut Generator,
    (rates, explained): &mut (&mut Rates, &mut Explained),
) -> Result<Option<Found>, String> {
    let mut kernel = kind.kernel()?;
    let mut others = Vec::new();
    for whose in ALL {
        others.push((whose, kind.other(whose)?));
    }
    let mut ops = Vec::new();
    for _ in 0..SEQUENCE {
        let op = generator.next();
        ops.push(op);
        let kernel = kernel.apply(&op);
        rates.count(&op, &kernel, generator.live().all().len());
        for (whose, machine) in &mut others {
            let other = machine.apply(&op);
            if kernel == other {
                continue;
            }
            // Counted for our crate only: that the rules are met too says nothing more.
            let mut aside = Explained::default();
            let count = if *whose == Whose::Ours {
                &mut **explained
            } else {
                &mut aside
            };
            if count
                .explain(&op, &kernel, &other, generator.live())
                .is_none()
            {
                let (whose, difference) = (*whose, Difference { op, kernel, other });
                return Ok(Some(Found {
                    ops,
                    whose,
                    difference,
                }));
            }
        }
        generator.note(&op, &kernel);
    }
    Ok(None)
}

fn print(kind: &Kind, found: &Found) -> Result<(), String> {
    let again = |ops: &[Op]| -> Option<Difference> {
        let (mut kernel, mut other) = (kind.kernel().ok()?, kind.other(found.whose).ok()?);
        compare(ops, &mut kernel, &mut *other)
    };
    let same = |again: Difference| again.op == found.difference.op;
    let least = shrink(&found.ops, |ops| again(ops).is_some_and(same));
    let version = if kind.v2 { 2 } else { 1 };
    println!(
        "difference on type 1 version {version}, at most {} mappings:",
        kind.entry_limit
    );
    for op in &least {
        println!("    {op}");
    }
    let shown = again(&least).unwrap_or_else(|| found.difference.clone());
    println!("    the kernel: {}", shown.kernel);
    println!("    {:?}: {}", found.whose, shown.other);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use crate::op::Outcome;

    /// What the kernel says of the device that the guest has.
    fn setup() -> Setup {
        Setup {
            page_sizes: 0x4020_1000,
            ranges: vec![(0, 0xfedf_ffff), (0xfef0_0000, 0xffff_ffff_ffff)],
            extensions: vec![1, 3, 9, 10],
        }
    }

    #[test]
    fn without_a_kernel_ours_does_what_the_rules_say() {
        memory::make().unwrap();
        let (mut rates, mut explained) = (Rates::default(), Explained::default());
        for sequence in 0..100 {
            let mut generator = Generator::new(sequence);
            let kind = Kind {
                group: 0,
                v2: sequence % 2 == 0,
                entry_limit: generator.entry_limit(),
                setup: setup(),
            };
            let mut machines = ALL.map(|whose| kind.other(whose).unwrap());
            for _ in 0..SEQUENCE {
                let op = generator.next();
                let [rules, ours] = machines.each_mut().map(|machine| machine.apply(&op));
                let mut same = |rules: &Outcome, ours: &Outcome| {
                    rules == ours
                        || explained
                            .explain(&op, rules, ours, generator.live())
                            .is_some()
                };
                assert!(same(&rules, &ours), "{op}: {rules} beside {ours}");
                rates.count(&op, &rules, generator.live().all().len());
                generator.note(&op, &rules);
            }
        }
        assert_eq!(
            rates.check(),
            [""; 0],
            "the generator has to reach everything"
        );
    }
}
