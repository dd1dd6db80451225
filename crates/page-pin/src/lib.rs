// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Refcounted pins of guest pages, owned by an access id.
//!
//! # What for
//!
//! A device model that keeps a host pointer to a guest page must be told before that page goes
//! away, and whoever takes the page away must be able to wait until nobody uses it. The Linux
//! kernel offers this to its own device models as `vfio_pin_pages` and the `dma_unmap` notice;
//! this crate is the bookkeeping behind the same promise in user space. It knows nothing of
//! IOMMUs: it counts who pinned which pages, tells those who asked to be told, and waits.
//!
//! # How it works
//!
//! - A [`PinTable`] counts pins by page and owner.
//! - An [`Access`] is the registration of one owner: its name, what it wants to be told
//!   ([`Interest`]) and whom to call ([`UnmapNotice`]). The registration lasts as long as the
//!   `Access` or any pin made through it, so whoever holds a pin can be told.
//! - [`Access::pin`] and [`Access::pin_list`] return a [`PinGuard`]; dropping it unpins.
//!   [`PinGuard::keep`] leaves the pins to the access instead, until [`Access::unpin`].
//! - All pages of a call are pinned or none. An [`Account`] may refuse: it is charged for a page's
//!   first pin and gets it back with the last.
//! - Whoever unmaps prevents new pins ([`PinTable::prevent`], or by its own means), calls
//!   [`PinTable::tell`], then [`PinTable::wait_released`] with a deadline, or [`PinTable::remind`],
//!   which tells those who do not let go again.
//! - An access leaves its table with [`Access::detach`], and after [`Access::end`] it is never told
//!   of anything again.
//!
//! # Example
//!
//! ```
//! use std::sync::Arc;
//! use std::time::{Duration, Instant};
//!
//! use page_pin::{Interest, PinTable};
//!
//! let table = PinTable::new(4096);
//! let access = table.register("vgpu0", Interest::Holder, Arc::new(|iova, size| {
//!     println!("{size} bytes at {iova:#x} are about to go");
//! }));
//!
//! let pin = access.pin(0x10_0000, 4)?;
//! table.tell(0x10_0000, 0x4000);
//! let late = table.wait_released(0x10_0000, 0x4000, Instant::now()).unwrap_err();
//! assert_eq!((late[0].name.as_str(), late[0].pages), ("vgpu0", 4));
//!
//! drop(pin);
//! assert!(table.wait_released(0x10_0000, 0x4000, Instant::now() + Duration::from_secs(1)).is_ok());
//! # Ok::<(), page_pin::Error>(())
//! ```
//!
//! # Gotchas
//!
//! - A notice runs on the thread that unmaps, with no lock of this crate held: it may unpin, pin
//!   elsewhere or drop its own access. It must not unmap the same range again.
//! - A notice that is already under way may still run once after its [`Access`] was dropped on
//!   another thread; [`Access::end`] waits for it. Dropping does not wait, as it may happen under a lock
//!   that the notice takes.
//! - An [`Account`] is called under the table's lock, a notice never is.
//! - A pin keeps nobody's memory alive by itself: the owner of the memory waits for it.

#![forbid(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("page-pin models Linux VFIO page pinning and is built for Linux only");

mod account;
mod error;
mod guard;
mod notice;
mod options;
mod owner;
mod pages;
mod prevent;
mod source;
mod table;

pub use account::{Account, NoAccount, PinnedPage, Quota, Refusal};
pub use error::{Error, Result};
pub use guard::PinGuard;
pub use notice::{Interest, UnmapNotice};
pub use options::{PinOptions, PIN_LIMIT};
pub use owner::{Access, AccessId};
pub use prevent::Prevented;
pub use source::PinPages;
pub use table::{Holder, PinTable};

/// Examples of the README are tested as those here are.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
