// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Threads on processors of their own. Two of them that share one only take turns there, and never
//! meet: their figures would be of something else.

use libc::{cpu_set_t, CPU_ISSET, CPU_SET, CPU_SETSIZE};

/// The processors that the calling thread may run on.
#[derive(Clone)]
pub struct Cpus {
    allowed: cpu_set_t,
    numbers: Vec<usize>,
}

impl std::fmt::Debug for Cpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Cpus").field(&self.numbers).finish()
    }
}

impl Cpus {
    /// Those of now; none where the system does not say.
    pub fn allowed() -> Self {
        let mut allowed = none();
        // SAFETY: the kernel writes at most as many bytes as it is told there are.
        let said = unsafe { libc::sched_getaffinity(0, size_of::<cpu_set_t>(), &mut allowed) };
        let count = if said == 0 { CPU_SETSIZE as usize } else { 0 };
        // SAFETY: the set has `CPU_SETSIZE` bits.
        let numbers = (0..count).filter(|cpu| unsafe { CPU_ISSET(*cpu, &allowed) });
        Cpus {
            allowed,
            numbers: numbers.collect(),
        }
    }

    /// Has the calling thread stay on the `n`th of them, round and round, until the result is dropped.
    /// Where that is refused it runs anywhere, as before.
    pub fn stay_on(&self, n: usize) -> Stay<'_> {
        let mut one = none();
        if !self.numbers.is_empty() {
            // SAFETY: the number is below `CPU_SETSIZE`.
            unsafe { CPU_SET(self.numbers[n % self.numbers.len()], &mut one) };
            set(&one);
        }
        Stay(self)
    }
}

/// A thread stays on a processor.
#[derive(Debug)]
pub struct Stay<'a>(&'a Cpus);

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        if !self.0.numbers.is_empty() {
            set(&self.0.allowed);
        }
    }
}

fn none() -> cpu_set_t {
    // SAFETY: a set is an array of integers.
    unsafe { std::mem::zeroed() }
}

fn set(cpus: &cpu_set_t) {
    // SAFETY: the kernel reads as many bytes as it is told there are. That it refuses is no matter.
    let _ = unsafe { libc::sched_setaffinity(0, size_of::<cpu_set_t>(), cpus) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_stays_on_one_and_may_run_on_all_again() {
        let all = Cpus::allowed();
        assert!(!all.numbers.is_empty());
        for (n, number) in all.numbers.iter().enumerate() {
            let stay = all.stay_on(n);
            assert_eq!(Cpus::allowed().numbers, [*number]);
            drop(stay);
            assert_eq!(Cpus::allowed().numbers, all.numbers);
        }
    }
}
