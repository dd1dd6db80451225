// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The same sequence on two machines, and where they first differ.

use crate::explained::Explained;
use crate::live::Live;
use crate::op::{Machine, Op, Outcome};

/// An operation that did not do the same on both, for no reason that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The operation.
    pub op: Op,
    /// What the kernel did.
    pub kernel: Outcome,
    /// What the other did.
    pub other: Outcome,
}

/// Does a sequence on both and returns the first difference.
pub fn compare(
    ops: &[Op],
    kernel: &mut dyn Machine,
    other: &mut dyn Machine,
) -> Option<Difference> {
    let (mut live, mut explained) = (Live::default(), Explained::default());
    ops.iter().find_map(|op| {
        let (kernel, other) = (kernel.apply(op), other.apply(op));
        let same = kernel == other || explained.explain(op, &kernel, &other, &live).is_some();
        live.note(op, &kernel);
        let op = *op;
        (!same).then_some(Difference { op, kernel, other })
    })
}

/// The shortest sequence that can be had from one by leaving operations out, such that `differs`.
pub fn shrink<T: Clone>(ops: &[T], mut differs: impl FnMut(&[T]) -> bool) -> Vec<T> {
    let mut ops = ops.to_vec();
    let mut chunk = ops.len().div_ceil(2);
    while chunk > 0 && !ops.is_empty() {
        let mut at = 0;
        while at < ops.len() {
            let mut fewer = ops.clone();
            fewer.drain(at..ops.len().min(at + chunk));
            if differs(&fewer) {
                ops = fewer;
            } else {
                at += chunk;
            }
        }
        chunk /= 2;
    }
    ops
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_needed_is_left_out() {
        let ops: Vec<_> = (0..100).map(Op::Extension).collect();
        let needed = [Op::Extension(17), Op::Extension(83)];
        let least = shrink(&ops, |ops| needed.iter().all(|op| ops.contains(op)));
        assert_eq!(least, needed);
    }

    #[test]
    fn the_first_difference_is_found() {
        struct Adds(i32);
        impl Machine for Adds {
            fn apply(&mut self, op: &Op) -> Outcome {
                let Op::Extension(number) = op else {
                    return Outcome::plain(Err(0));
                };
                Outcome::plain(Ok((*number as i32).min(self.0)))
            }
        }
        let ops: Vec<_> = (0..10).map(Op::Extension).collect();
        let found = compare(&ops, &mut Adds(9), &mut Adds(5)).unwrap();
        assert_eq!(found.op, Op::Extension(6));
        assert_eq!(compare(&ops, &mut Adds(5), &mut Adds(5)), None);
    }
}
