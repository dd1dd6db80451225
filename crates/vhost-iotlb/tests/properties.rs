// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any messages, beside a map of pages.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{p, table, Nobody, LOW, PAGES};
use proptest::prelude::*;
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vhost_iotlb::{message, VhostIotlb};

/// Pages that messages are about, from both ends of the address space.
const SPAN: u64 = 8;

fn at(page: u64) -> u64 {
    // Behind the last of the low ones come those that end with the last address.
    if page < SPAN {
        p(page)
    } else {
        0_u64.wrapping_sub(p(2 * SPAN - page))
    }
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    kind: VhostIotlbType,
    iova: u64,
    size: u64,
    userspace_addr: u64,
    perm: VhostAccess,
}

impl Sent {
    fn message(self) -> VhostIotlbMsg {
        VhostIotlbMsg {
            iova: self.iova,
            size: self.size,
            userspace_addr: self.userspace_addr,
            perm: self.perm,
            msg_type: self.kind,
        }
    }
}

fn sent() -> impl Strategy<Value = Sent> {
    let kind = prop_oneof![
        12 => Just(VhostIotlbType::Update),
        8 => Just(VhostIotlbType::Invalidate),
        2 => Just(VhostIotlbType::BatchBegin),
        3 => Just(VhostIotlbType::BatchEnd),
        1 => prop::sample::select(vec![VhostIotlbType::Empty, VhostIotlbType::Miss, VhostIotlbType::AccessFail]),
    ];
    let perm = prop_oneof![
        1 => Just(VhostAccess::No),
        9 => prop::sample::select(vec![VhostAccess::ReadOnly, VhostAccess::WriteOnly, VhostAccess::ReadWrite]),
    ];
    let odd =
        || prop_oneof![15 => Just(0_u64), 1 => prop::sample::select(vec![1, p(1) - 1, u64::MAX])];
    let size = prop_oneof![
        12 => (1..5_u64).prop_map(p),
        1 => prop::sample::select(vec![0, 1, p(1) + 1, u64::MAX, 1 << 63]),
    ];
    let place = prop_oneof![
        12 => (0..2 * PAGES + 1).prop_map(|page| LOW + p(page)),
        1 => any::<u64>(),
        1 => Just(LOW - p(1)),
    ];
    (kind, 0..2 * SPAN, odd(), size, place, perm).prop_map(
        |(kind, page, odd, size, userspace_addr, perm)| Sent {
            kind,
            iova: at(page).wrapping_add(odd),
            size,
            userspace_addr,
            perm,
        },
    )
}

/// By the number of a page of 64 bits: its byte, and what it is for.
type Pages = BTreeMap<u64, (u8, VhostAccess)>;

#[derive(Default)]
struct Oracle {
    pages: Pages,
    /// What the pages will be, and whether anything was refused.
    batch: Option<(Pages, bool)>,
}

impl Oracle {
    /// Whether the message is refused.
    fn apply(&mut self, sent: Sent) -> bool {
        match (sent.kind, &mut self.batch) {
            (VhostIotlbType::BatchBegin, None) => {
                self.batch = Some((self.pages.clone(), false));
                return false;
            }
            (VhostIotlbType::BatchEnd, None) => return true,
            (VhostIotlbType::BatchEnd, Some(_)) => {
                let (pages, is_spoilt) = self.batch.take().unwrap();
                if !is_spoilt {
                    self.pages = pages;
                }
                return is_spoilt;
            }
            _ => {}
        }
        let (pages, is_spoilt) = match &mut self.batch {
            Some((pages, is_spoilt)) => (pages, Some(is_spoilt)),
            None => (&mut self.pages, None),
        };
        let is_refused = !Oracle::change(pages, sent);
        if let Some(is_spoilt) = is_spoilt {
            *is_spoilt |= is_refused;
        }
        is_refused
    }

    fn change(pages: &mut Pages, sent: Sent) -> bool {
        let Sent { iova, size, .. } = sent;
        let (first, end) = (u128::from(iova), u128::from(iova) + u128::from(size));
        let is_range = size > 0 && end <= 1 << 64;
        let page = u128::from(p(1));
        match sent.kind {
            VhostIotlbType::Invalidate if (iova, size) == (0, 0) => {
                pages.clear();
                true
            }
            VhostIotlbType::Invalidate if is_range => {
                pages.retain(|number, _| {
                    let start = u128::from(*number) * page;
                    start + page <= first || end <= start
                });
                true
            }
            VhostIotlbType::Update if is_range => {
                let from = u128::from(sent.userspace_addr);
                let low = u128::from(LOW);
                let is_in_table =
                    low <= from && from + u128::from(size) <= low + u128::from(p(2 * PAGES));
                let is_aligned = (iova | size | sent.userspace_addr) % p(1) == 0;
                if !is_in_table || !is_aligned || sent.perm == VhostAccess::No {
                    return false;
                }
                for i in 0..size / p(1) {
                    let number = (sent.userspace_addr - LOW) / p(1) + i;
                    let byte = if number < PAGES {
                        1 + number
                    } else {
                        101 + number - PAGES
                    };
                    pages.insert(iova / p(1) + i, (byte as u8, sent.perm));
                }
                true
            }
            VhostIotlbType::AccessFail => is_range,
            _ => false,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_space_is_what_the_messages_say(messages in prop::collection::vec(sent(), 1..24)) {
        let iotlb = VhostIotlb::new(Nobody).miss_deadline(Duration::ZERO);
        iotlb.set_mem_table(table()).unwrap();
        let mut oracle = Oracle::default();
        for sent in messages {
            let message = message::decode(&message::encode(&sent.message())).unwrap();
            let applied = iotlb.apply(&message);
            prop_assert_eq!(applied.is_err(), oracle.apply(sent), "{:?}: {:?}", sent, applied);
            for page in (0..SPAN + 5).map(p).chain((SPAN..2 * SPAN).map(at)) {
                let mut byte = [0];
                let read = iotlb.space().read(page + (p(1) - 1), &mut byte);
                let write = iotlb.space().scatter(page, 1, vm_memory::Permissions::Write).map(drop);
                let errno = |result: Result<(), iommu_type1::Error>| result.map_err(|error| error.errno());
                let (expected_read, expected_write) = match oracle.pages.get(&(page / p(1))) {
                    None => (Err(libc::EAGAIN), Err(libc::EAGAIN)),
                    Some((_, VhostAccess::ReadOnly)) => (Ok(()), Err(libc::EPERM)),
                    Some((_, VhostAccess::WriteOnly)) => (Err(libc::EPERM), Ok(())),
                    Some(_) => (Ok(()), Ok(())),
                };
                prop_assert_eq!(errno(read), expected_read, "page {:#x} after {:?}", page, sent);
                prop_assert_eq!(errno(write), expected_write, "page {:#x} after {:?}", page, sent);
                if expected_read.is_ok() {
                    prop_assert_eq!(byte[0], oracle.pages[&(page / p(1))].0);
                }
            }
        }
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        if let Ok(message) = message::decode(&bytes) {
            let iotlb = VhostIotlb::new(Nobody).miss_deadline(Duration::ZERO);
            let _ = iotlb.apply(&message);
        }
    }
}
