// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong, with the errno the kernel answers in the same case.

use std::io;

use crate::IommuType;

/// Errors of containers, groups, devices and external users.
///
/// [`errno`](Error::errno) is what Linux 6.18 and later answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A group can be open once at a time.
    #[error("group {group} is open already")]
    GroupOpen {
        /// Id of the group.
        group: u32,
    },
    /// Somebody from the last time the group was open still keeps its attachment.
    #[error("group {group} is still attached to a container by {users} users")]
    StillAttached {
        /// Id of the group.
        group: u32,
        /// Its container users.
        users: u32,
    },
    /// The group is attached already, or its detaching has not finished.
    #[error("group {group} is attached to a container already")]
    AlreadyAttached {
        /// Id of the group.
        group: u32,
    },
    /// The group is attached to no container.
    #[error("group {group} is not attached to a container")]
    NotAttached {
        /// Id of the group.
        group: u32,
    },
    /// Others than the group file itself use the container through the group.
    #[error("group {group} cannot leave its container: it has {users} users")]
    ContainerUsers {
        /// Id of the group.
        group: u32,
        /// Its container users, the group file included.
        users: u32,
    },
    /// An IOMMU can be set only in a container with a group.
    #[error("an IOMMU was asked for in a container without a group")]
    NoGroup,
    /// The IOMMU of a container cannot be set twice.
    #[error("the container has an IOMMU already")]
    IommuSet,
    /// No IOMMU driver offers the type.
    #[error("no IOMMU driver offers type {}", u32::from(*.iommu_type))]
    NoDriver {
        /// Type asked for.
        iommu_type: IommuType,
    },
    /// The container has no IOMMU: not yet set, or released with the last group.
    #[error("the container has no IOMMU")]
    NoIommu,
    /// A second device of the same name.
    #[error("group {group} has a device {name:?} already")]
    DeviceExists {
        /// Id of the group.
        group: u32,
        /// Name of the device.
        name: String,
    },
    /// The group has no such device, or no longer.
    #[error("group {group} has no device {name:?}")]
    NoDevice {
        /// Id of the group.
        group: u32,
        /// Name asked for.
        name: String,
    },
    /// The device is open, so it cannot be removed.
    #[error("device {name:?} of group {group} is open: {}", .users.join(", "))]
    DeviceOpen {
        /// Id of the group.
        group: u32,
        /// Name of the device.
        name: String,
        /// Who has it open, as [`GroupFile::device_for`](crate::GroupFile::device_for) was told.
        users: Vec<String>,
    },
    /// Another driver has a device of the group.
    #[error("group {group} is not viable: a device of it is bound to another driver")]
    NotViable {
        /// Id of the group.
        group: u32,
    },
    /// No-IOMMU groups are for those with `CAP_SYS_RAWIO`.
    #[error("group {group} has no IOMMU, which takes CAP_SYS_RAWIO")]
    NotPermitted {
        /// Id of the group.
        group: u32,
    },
    /// A container has groups with an IOMMU or without, not both.
    #[error("group {group} cannot share the container: either all groups have an IOMMU or none")]
    MixedGroups {
        /// Id of the group.
        group: u32,
    },
    /// Mappings of the container have no memory at the moment, and what is behind the group might need it at once.
    #[error(
        "group {group} cannot be attached: {mappings} mappings of the container have no memory"
    )]
    VaddrInvalid {
        /// Id of the group.
        group: u32,
        /// How many mappings.
        mappings: usize,
    },
    /// Nobody but its files uses a group without an IOMMU.
    #[error("group {group} has no IOMMU, and so no external user")]
    NoExternalUser {
        /// Id of the group.
        group: u32,
    },
    /// The container of no-IOMMU groups has no address space.
    #[error("a container without an IOMMU has nothing to map")]
    NothingToMap,
    /// Only v2 pins pages for others.
    #[error("pages are not pinned with VFIO_TYPE1_IOMMU")]
    PinsNeedV2,
    /// Who wants to be told of a group must be able to use its container.
    #[error("nobody can listen to group {group} now: {reason}")]
    CannotListen {
        /// Id of the group.
        group: u32,
        /// Why there can be no external user.
        #[source]
        reason: Box<Error>,
    },
    /// Pages are pinned only for a group with a single device: pins do not say which device dirties
    /// the pages.
    #[error("pages cannot be pinned for group {group}: it has {devices} devices")]
    NotSingleton {
        /// Id of the group.
        group: u32,
        /// How many devices it has.
        devices: usize,
    },
    /// Pages are pinned only by those who can be told that they go.
    #[error("pages cannot be pinned through group {group} before ExternalUser::register_notifier")]
    NoNotifier {
        /// Id of the group.
        group: u32,
    },
    /// An external user has one notifier.
    #[error("this external user of group {group} has a notifier already")]
    NotifierRegistered {
        /// Id of the group.
        group: u32,
    },
    /// The kernel refused.
    #[cfg(any(feature = "hardware", feature = "kvm"))]
    #[error("{operation}: {source}")]
    Hardware {
        /// What was asked for: an ioctl's name, or `open`, or `dup`.
        operation: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The IO address space refused.
    #[error(transparent)]
    Iommu(#[from] iommu_type1::Error),
}

/// Result of containers, groups, devices and external users.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The errno the kernel answers in this case.
    pub fn errno(&self) -> i32 {
        match self {
            Error::GroupOpen { .. }
            | Error::StillAttached { .. }
            | Error::ContainerUsers { .. }
            | Error::DeviceOpen { .. }
            | Error::VaddrInvalid { .. }
            | Error::NotifierRegistered { .. } => libc::EBUSY,
            Error::AlreadyAttached { .. }
            | Error::NotAttached { .. }
            | Error::NoGroup
            | Error::IommuSet
            | Error::NoIommu
            | Error::NotViable { .. }
            | Error::CannotListen { .. }
            | Error::NotSingleton { .. }
            | Error::NoNotifier { .. } => libc::EINVAL,
            Error::NoDriver { .. } | Error::NoDevice { .. } => libc::ENODEV,
            Error::DeviceExists { .. } => libc::EEXIST,
            Error::NotPermitted { .. }
            | Error::MixedGroups { .. }
            | Error::NoExternalUser { .. } => libc::EPERM,
            Error::NothingToMap => libc::ENOTTY,
            Error::PinsNeedV2 => libc::EACCES,
            #[cfg(any(feature = "hardware", feature = "kvm"))]
            Error::Hardware { source, .. } => iommu_type1::errno_of(source),
            Error::Iommu(error) => error.errno(),
        }
    }

    /// Bytes that an access had done before it failed.
    pub fn completed(&self) -> usize {
        match self {
            Error::Iommu(error) => error.completed(),
            _ => 0,
        }
    }
}

/// Its errno, for those who answer with one. The values are in the error alone: log them before.
///
/// ```
/// let error = std::io::Error::from(vfio_group::Container::open().unmap(0, 0x1000).unwrap_err());
/// assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
/// ```
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::from_raw_os_error(error.errno())
    }
}
