// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random operations on a few groups and containers.

use proptest::prelude::*;
use proptest::sample::Index;
use vfio_group::GroupType;

/// The types of the groups.
pub const TYPES: [GroupType; GROUPS] = [
    GroupType::EmulatedIommu,
    GroupType::EmulatedIommu,
    GroupType::Iommu,
    GroupType::NoIommu,
];
pub const GROUPS: usize = 4;
pub const CONTAINERS: usize = 2;
pub const PAGES: u64 = 3;

#[derive(Clone, Debug)]
pub enum Op {
    /// With the privilege or without.
    OpenGroup(usize, bool),
    SetPrivileged(usize, bool),
    CloseGroup(usize),
    OpenContainer(usize),
    CloseContainer(usize),
    SetContainer(usize, usize),
    UnsetContainer(usize),
    SetIommu(usize, u32),
    Map(usize, u64),
    Unmap(usize, u64),
    AddDevice(usize),
    RemoveDevice(usize),
    OpenDevice(usize),
    CloseDevice(Index),
    Unplug(usize),
    SetRequestNotifier(usize),
    RequestRelease(usize, u32),
    BindElsewhere(usize),
    UnbindElsewhere(usize),
    SetKvm(usize, Option<u32>),
    Listen(usize),
    Unlisten(Index),
    CheckExtension(usize, u32),
    ExtensionOfUser(Index, u32),
    UserOfGroup(usize),
    UserOfDevice(usize),
    CloneUser(Index),
    DropUser(Index),
}

pub fn op() -> impl Strategy<Value = Op> {
    let group = || 0..GROUPS;
    let container = || 0..CONTAINERS;
    prop_oneof![
        4 => (group(), prop::bool::weighted(0.8)).prop_map(|(g, p)| Op::OpenGroup(g, p)),
        1 => (group(), prop::bool::weighted(0.7)).prop_map(|(g, p)| Op::SetPrivileged(g, p)),
        2 => group().prop_map(Op::CloseGroup),
        3 => container().prop_map(Op::OpenContainer),
        1 => container().prop_map(Op::CloseContainer),
        5 => (group(), container()).prop_map(|(g, c)| Op::SetContainer(g, c)),
        3 => group().prop_map(Op::UnsetContainer),
        5 => (container(), prop_oneof![9 => Just(3), 2 => Just(1), 3 => Just(8), 1 => 0..12_u32])
            .prop_map(|(c, t)| Op::SetIommu(c, t)),
        4 => (container(), 0..PAGES).prop_map(|(c, page)| Op::Map(c, page)),
        1 => (container(), 0..PAGES).prop_map(|(c, page)| Op::Unmap(c, page)),
        2 => group().prop_map(Op::AddDevice),
        1 => group().prop_map(Op::RemoveDevice),
        4 => group().prop_map(Op::OpenDevice),
        3 => any::<Index>().prop_map(Op::CloseDevice),
        1 => group().prop_map(Op::Unplug),
        1 => group().prop_map(Op::SetRequestNotifier),
        1 => (group(), 0..4_u32).prop_map(|(g, times)| Op::RequestRelease(g, times)),
        1 => group().prop_map(Op::BindElsewhere),
        2 => group().prop_map(Op::UnbindElsewhere),
        2 => (group(), prop::option::of(any::<u32>())).prop_map(|(g, kvm)| Op::SetKvm(g, kvm)),
        2 => group().prop_map(Op::Listen),
        1 => any::<Index>().prop_map(Op::Unlisten),
        1 => (container(), 0..12_u32).prop_map(|(c, n)| Op::CheckExtension(c, n)),
        1 => (any::<Index>(), 0..12_u32).prop_map(|(at, n)| Op::ExtensionOfUser(at, n)),
        4 => group().prop_map(Op::UserOfGroup),
        2 => group().prop_map(Op::UserOfDevice),
        2 => any::<Index>().prop_map(Op::CloneUser),
        5 => any::<Index>().prop_map(Op::DropUser),
    ]
}

/// What an operation answers: bytes for an unmap, otherwise 0; or an errno.
pub type Answer = Result<u64, i32>;

pub fn pick<'a, T>(from: &'a [T], at: &Index) -> Option<&'a T> {
    (!from.is_empty()).then(|| at.get(from))
}

pub fn take<T>(from: &mut Vec<T>, at: &Index) -> Option<T> {
    (!from.is_empty()).then(|| from.remove(at.index(from.len())))
}
