// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What groups and their users show of themselves in a log.

#![cfg(not(loom))]

use std::sync::Arc;

use iommu_type1::Interest;
use vfio_group::{Container, ExternalUser, Group, IommuType};

#[test]
fn groups_and_users_say_which_they_are_and_who_is_there() {
    let group = Group::new(7);
    assert_eq!(
        format!("{group:?}"),
        "Group { id: 7, container_users: 0, .. }"
    );
    let (container, file) = (Container::open(), group.open().unwrap());
    file.set_container(&container).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    let user = ExternalUser::from_group(&file).unwrap();
    assert_eq!(
        format!("{group:?}"),
        "Group { id: 7, container_users: 2, .. }"
    );
    let shown = format!("{user:?}");
    assert!(shown.starts_with("ExternalUser { group: 7, "), "{shown}");
    assert!(shown.contains("\"group 7\""), "{shown}");
    assert!(shown.ends_with("notifier: false, .. }"), "{shown}");
    user.register_notifier("edu", Interest::Holder, Arc::new(|_, _| ()))
        .unwrap();
    let shown = format!("{user:?}");
    assert!(shown.ends_with("notifier: true, .. }"), "{shown}");
}
