// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Those who are told what is mapped: a mirror of the space, in hardware or elsewhere.
//!
//! Who listens is told before a mapping can be found, and may refuse it; and is told of an unmap as soon as
//! nobody can find the mapping any more, before anybody is waited for. So what a mirror has is always a part
//! of what the space keeps the memory of.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use checked_sync::{lock, thread_local};
use vm_memory::Permissions;

use crate::mapping::Mapping;
use crate::range::IovaRange;
use crate::space::{Space, View};
use crate::unmap::share_all;
use crate::{Backing, Error, IoAddressSpace, Result};

/// How many may listen to a space at a time: each is called for each mapping while others who map wait. More
/// than there are containers and virtual machines for one device.
pub const LISTENER_LIMIT: usize = 64;

/// Who is told of every mapping of a space, from [`IoAddressSpace::listen`].
///
/// Each call is about one mapping, whole: what was given to `map` is taken back by one `unmap` of the same
/// address and size. In between, `map` is not called with an address of it. All calls of a space come one
/// after the other, also those to several listeners.
///
/// A call may access the space, but must not map, unmap or listen there: that fails with
/// [`Error::InsideListener`], as the calls are made by the thread that maps or unmaps, while others who want to
/// do so wait. It must not wait for such a thread either. A panic in `map` counts as a refusal, one in `unmap`
/// as if nothing had happened; both are logged.
///
/// | | is told as |
/// |---|---|
/// | a map, also of a batch | `map` of each before an access can find any; if one is refused, `unmap` of those before |
/// | an unmap, also of a batch | `unmap` of each when no later access can find it, before anybody is waited for |
/// | an unmap that ends at its deadline | nothing more with [`UnmapPolicy::Revoked`](crate::UnmapPolicy::Revoked); `map` with [`UnmapPolicy::Restore`](crate::UnmapPolicy::Restore): who refuses it leaves it revoked |
/// | a replacement | `unmap` of what is replaced, `map` of what is left of it and of what comes; if that is refused, `unmap` and `map` of what was there |
/// | a cut ([`Profile::Iotlb`](crate::Profile::Iotlb)) | `unmap` of the whole, `map` of the parts that stay |
/// | memory that is taken away | `unmap`, and `map` when the mapping gets other memory |
///
/// Between the calls of a replacement or a cut the mirror has nothing there, though the space does.
///
/// What a listener had before it must take back: after a refusal elsewhere, or as the parts of a cut. If it
/// refuses that, it is *lost*: everything is taken back from it and it is told nothing more
/// ([`Listening::is_lost`]).
pub trait Listener: Send + Sync {
    /// Something is about to be mapped.
    ///
    /// # Errors
    ///
    /// Then it is not mapped, and whoever wanted to map it gets [`Error::Refused`]. Its errno is the
    /// error's ([`errno_of`](crate::errno_of)).
    fn map(&self, mapping: &MappingInfo) -> io::Result<()>;

    /// What was given to [`map`](Listener::map) is not mapped any more. Its memory lives until this has
    /// returned.
    fn unmap(&self, iova: u64, size: u64);
}

/// A mapping, as a [`Listener`] is told of it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MappingInfo {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// What it is mapped for.
    pub permissions: Permissions,
    /// The memory. Who keeps a clone keeps the memory, also after the unmap.
    pub backing: Backing,
}

impl MappingInfo {
    fn of(mapping: &Mapping) -> Self {
        MappingInfo {
            iova: mapping.range.first,
            size: mapping.range.size(),
            permissions: mapping.permissions(),
            backing: mapping.backing(mapping.range),
        }
    }
}

impl IoAddressSpace {
    /// Has somebody told of every mapping: first of those there are, ascending, then of each that comes and
    /// goes. No map or unmap comes in between, so nothing is missed and nothing told twice.
    ///
    /// Mappings that are being unmapped, whose unmap has ended at its deadline, or that have no memory are not
    /// there.
    ///
    /// ```
    /// use std::io;
    /// use std::sync::atomic::{AtomicU64, Ordering};
    /// use std::sync::Arc;
    /// use iommu_type1::{Backing, IoAddressSpace, Listener, MappingInfo};
    /// use vm_memory::Permissions::ReadWrite;
    ///
    /// /// Hardware that has room for a few pages.
    /// #[derive(Default)]
    /// struct Hardware(AtomicU64);
    ///
    /// impl Listener for Hardware {
    ///     fn map(&self, mapping: &MappingInfo) -> io::Result<()> {
    ///         if self.0.load(Ordering::Relaxed) + mapping.size > 0x4000 {
    ///             return Err(io::ErrorKind::StorageFull.into());
    ///         }
    ///         self.0.fetch_add(mapping.size, Ordering::Relaxed);
    ///         Ok(())
    ///     }
    ///
    ///     fn unmap(&self, _iova: u64, size: u64) {
    ///         self.0.fetch_sub(size, Ordering::Relaxed);
    ///     }
    /// }
    ///
    /// let space = IoAddressSpace::new();
    /// space.map(0x1000, Backing::anonymous(0x1000)?, ReadWrite)?;
    /// let hardware = Arc::new(Hardware::default());
    /// let listening = space.listen(hardware.clone())?;
    /// assert_eq!(hardware.0.load(Ordering::Relaxed), 0x1000);
    /// assert!(space.map(0x8000, Backing::anonymous(0x4000)?, ReadWrite).is_err());
    /// assert_eq!(space.mappings(), 1);
    /// drop(listening);
    /// assert_eq!(hardware.0.load(Ordering::Relaxed), 0);
    /// # Ok::<(), iommu_type1::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] of a mapping that is there: those given before were taken back then.
    /// [`Error::InsideListener`] (EDEADLK), [`Error::ListenerLimit`] (ENOSPC), [`Error::NoMemory`] (ENOMEM).
    pub fn listen(&self, listener: Arc<dyn Listener>) -> Result<Listening> {
        let space = &*self.view.space;
        check_not_told(space, IovaRange::ALL)?;
        let mut listeners = lock(&space.listeners);
        if listeners.entries.len() >= LISTENER_LIMIT {
            let limit = LISTENER_LIMIT;
            return Err(Error::ListenerLimit { limit });
        }
        let mut writer = lock(&space.writer);
        writer.is_heard = true;
        let mut mappings = Vec::new();
        let shared = share_all(space, IovaRange::ALL, &mut mappings);
        drop(writer);
        let state = Arc::new(State::default());
        let mut entry = Entry {
            listener,
            state: state.clone(),
            held: BTreeMap::new(),
        };
        let told = shared.and_then(|()| {
            let _inside = Inside::enter(space);
            entry.map_all(&mappings)
        });
        match told {
            Ok(()) => listeners.entries.push(entry),
            Err(error) => {
                listeners.silence(space);
                return Err(error);
            }
        }
        drop(listeners);
        Ok(Listening {
            view: self.view.clone(),
            state,
        })
    }
}

/// That somebody is told; from [`IoAddressSpace::listen`].
///
/// When it is dropped everything is taken back from the listener with `unmap`, and it is told nothing more. It
/// keeps the space alive. Dropped inside of a call to a listener, it ends when that call has returned.
#[must_use = "dropping it ends the listening"]
pub struct Listening {
    view: Arc<View>,
    state: Arc<State>,
}

impl Listening {
    /// Whether the listener has refused what it must not refuse, and is not told any more.
    pub fn is_lost(&self) -> bool {
        self.state.lost.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Listening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listening")
            .field("space", &self.view.name)
            .field("lost", &self.is_lost())
            .finish()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::Relaxed);
        let space = &*self.view.space;
        if is_inside(space) {
            // Whoever makes the call sees it.
            return;
        }
        let mut listeners = lock(&space.listeners);
        let departed = {
            let _inside = Inside::enter(space);
            listeners.dismiss()
        };
        listeners.silence(space);
        drop(listeners);
        // What is the caller's runs without a lock.
        drop(departed);
    }
}

/// Why a listener is told nothing more.
#[derive(Default)]
struct State {
    over: AtomicBool,
    lost: AtomicBool,
}

/// Those who listen. While there are any, whoever changes what is mapped has their lock
/// ([`Turn`](crate::turn::Turn)).
#[derive(Default)]
pub(crate) struct Listeners {
    entries: Vec<Entry>,
}

struct Entry {
    listener: Arc<dyn Listener>,
    state: Arc<State>,
    /// What it was given and still has, by address.
    held: BTreeMap<u64, IovaRange>,
}

impl Listeners {
    /// Tells that some mappings go and others come, if nobody refuses; has told nothing in effect if somebody
    /// does.
    pub(crate) fn exchange(
        &mut self,
        space: &Space,
        before: &[Arc<Mapping>],
        after: &[Arc<Mapping>],
    ) -> Result<()> {
        let _inside = Inside::enter(space);
        self.unmap_all(before);
        let told = self.map_all(after);
        if told.is_err() {
            self.insist(before);
        }
        self.dismiss();
        told
    }

    /// Tells that some mappings have gone and others come: nobody can refuse.
    pub(crate) fn report(
        &mut self,
        space: &Space,
        before: &[Arc<Mapping>],
        after: &[Arc<Mapping>],
    ) {
        let _inside = Inside::enter(space);
        self.unmap_all(before);
        self.insist(after);
        self.dismiss();
    }

    fn map_all(&mut self, mappings: &[Arc<Mapping>]) -> Result<()> {
        for at in 0..self.entries.len() {
            let told = self.entries[at].map_all(mappings);
            if told.is_err() {
                for before in self.entries[..at].iter_mut().rev() {
                    before.unmap_all(mappings);
                }
                return told;
            }
        }
        Ok(())
    }

    fn unmap_all(&mut self, mappings: &[Arc<Mapping>]) {
        for entry in self.entries.iter_mut().rev() {
            entry.unmap_all(mappings);
        }
    }

    fn insist(&mut self, mappings: &[Arc<Mapping>]) {
        for entry in &mut self.entries {
            if let Err(error) = entry.map_all(mappings) {
                log::error!("a listener is told nothing more, as it does not take back: {error}");
                entry.state.lost.store(true, Ordering::Relaxed);
                entry.state.over.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Takes everything back from those who are told nothing more.
    fn dismiss(&mut self) -> Vec<Entry> {
        let (over, stay) = std::mem::take(&mut self.entries)
            .into_iter()
            .partition::<Vec<_>, _>(|entry| entry.state.over.load(Ordering::Relaxed));
        self.entries = stay;
        over.into_iter()
            .map(|mut entry| {
                for (_, range) in std::mem::take(&mut entry.held).into_iter().rev() {
                    entry.tell_unmap(range);
                }
                entry
            })
            .collect()
    }

    /// Has maps and unmaps go without this lock again when nobody listens.
    fn silence(&self, space: &Space) {
        if self.entries.is_empty() {
            lock(&space.writer).is_heard = false;
        }
    }
}

impl Entry {
    /// All of them, or none.
    fn map_all(&mut self, mappings: &[Arc<Mapping>]) -> Result<()> {
        for (told, mapping) in mappings.iter().enumerate() {
            if self.state.over.load(Ordering::Relaxed) {
                return Ok(());
            }
            let info = MappingInfo::of(mapping);
            let call = AssertUnwindSafe(|| self.listener.map(&info));
            let answer =
                catch_unwind(call).unwrap_or_else(|_| Err(io::Error::other("a listener panicked")));
            if let Err(source) = answer {
                self.unmap_all(&mappings[..told]);
                return Err(Error::Refused {
                    iova: info.iova,
                    size: info.size,
                    source,
                });
            }
            self.held.insert(info.iova, mapping.range);
        }
        Ok(())
    }

    /// The last first.
    fn unmap_all(&mut self, mappings: &[Arc<Mapping>]) {
        for mapping in mappings.iter().rev() {
            if let Some(range) = self.held.remove(&mapping.range.first) {
                self.tell_unmap(range);
            }
        }
    }

    fn tell_unmap(&self, range: IovaRange) {
        let call = AssertUnwindSafe(|| self.listener.unmap(range.first, range.size()));
        if catch_unwind(call).is_err() {
            log::error!("a listener panicked at the unmap of {:#x}", range.first);
        }
    }
}

thread_local! {
    /// The spaces whose listeners this thread is calling.
    static INSIDE: RefCell<Vec<*const Space>> = const { RefCell::new(Vec::new()) };
}

fn is_inside(space: &Space) -> bool {
    INSIDE.with(|spaces| spaces.borrow().contains(&ptr::from_ref(space)))
}

/// Refuses to change what is mapped from inside a call to a listener of the same space.
pub(crate) fn check_not_told(space: &Space, range: IovaRange) -> Result<()> {
    if !is_inside(space) {
        return Ok(());
    }
    Err(Error::InsideListener {
        iova: range.first,
        size: range.size(),
    })
}

struct Inside;

impl Inside {
    fn enter(space: &Space) -> Self {
        INSIDE.with(|spaces| spaces.borrow_mut().push(ptr::from_ref(space)));
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with(|spaces| spaces.borrow_mut().pop());
    }
}
