// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Generated sequences on containers of both types.

use std::fs;

use vfio_bindings::bindings::vfio::{VFIO_TYPE1_IOMMU, VFIO_TYPE1v2_IOMMU};

use crate::compare::{compare, shrink, Difference};
use crate::generate::Generator;
use crate::init::Given;
use crate::op::{Machine, Op, INFO_BYTES};
use crate::rates::Rates;
use crate::rules::Rules;
use crate::setup::Setup;
use crate::vfio::Kernel;

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

    fn rules(&self) -> Rules {
        Rules::new(&self.setup, self.v2, self.entry_limit)
    }
}

fn open(group: u32, v2: bool) -> Result<Kernel, String> {
    let iommu_type = if v2 { VFIO_TYPE1v2_IOMMU } else { VFIO_TYPE1_IOMMU };
    Kernel::new(group, iommu_type).map_err(|errno| format!("a container: errno {errno}"))
}

fn setup(group: u32) -> Result<Setup, String> {
    let mut kernel = open(group, true)?;
    let info = kernel.apply(&Op::Info(INFO_BYTES as u32));
    let has = |extension: &u32| kernel.container().check_extension(*extension) == Ok(1);
    let extensions = EXTENSIONS.filter(has).collect();
    Setup::from_info(&info, extensions).ok_or_else(|| format!("no ranges of addresses in {info}"))
}

/// Runs so many operations, half on each type of container.
pub fn run(given: &Given, operations: u64, seed: u64) -> Result<(), String> {
    let setup = setup(given.group)?;
    println!("{setup:x?}");
    let mut rates = Rates::default();
    let mut differences = 0;
    for sequence in 0..operations.div_ceil(SEQUENCE) {
        let mut generator = Generator::new(seed ^ sequence << 32);
        let kind = Kind {
            group: given.group,
            v2: sequence % 2 == 0,
            entry_limit: generator.entry_limit(),
            setup: setup.clone(),
        };
        let (ops, found) = one(&kind, &mut generator, &mut rates)?;
        if let Some(difference) = found {
            differences += 1;
            if differences <= PRINTED {
                print(&kind, &ops, &difference)?;
            }
        }
    }
    let missing = rates.check();
    println!("operations {}, differences {differences}, explained 0", rates.operations());
    if differences > 0 {
        return Err(format!("{differences} sequences differ"));
    }
    missing.first().map_or(Ok(()), |missing| Err(missing.clone()))
}

/// Runs one sequence up to the first difference.
fn one(
    kind: &Kind,
    generator: &mut Generator,
    rates: &mut Rates,
) -> Result<(Vec<Op>, Option<Difference>), String> {
    let (mut kernel, mut rules) = (kind.kernel()?, kind.rules());
    let mut ops = Vec::new();
    for at in 0..SEQUENCE as usize {
        let op = generator.next();
        ops.push(op);
        let (kernel, ours) = (kernel.apply(&op), rules.apply(&op));
        rates.count(&op, &kernel, generator.live().all().len());
        if kernel != ours {
            return Ok((ops, Some(Difference { at, op, kernel, ours })));
        }
        generator.note(&op, &kernel);
    }
    Ok((ops, None))
}

fn print(kind: &Kind, ops: &[Op], difference: &Difference) -> Result<(), String> {
    let again = |ops: &[Op]| -> Option<Difference> {
        let mut kernel = kind.kernel().ok()?;
        compare(ops, &mut kernel, &mut kind.rules())
    };
    let same = |found: Difference| found.op == difference.op;
    let least = shrink(ops, |ops| again(ops).is_some_and(same));
    let version = if kind.v2 { 2 } else { 1 };
    println!("difference on type 1 version {version}, at most {} mappings:", kind.entry_limit);
    for op in &least {
        println!("    {op}");
    }
    let shown = again(&least).unwrap_or_else(|| difference.clone());
    println!("    the kernel: {}", shown.kernel);
    println!("    ours:       {}", shown.ours);
    Ok(())
}
