// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads and writes of memory that only the client has, by messages.
//!
//! A device's thread leaves what it wants and waits. The thread that serves the socket sends it between other
//! messages and brings the answer, so requests of the client are served meanwhile. Who stops waiting leaves the
//! message id behind, taken, until the answer comes or the client goes: an answer can never be taken for that
//! to another question.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crate::event::Event;
use crate::wire::{self, command, flags, DmaAccess, Header, NarrowDmaAccess};
use crate::{AccessError, Result};

/// Most messages whose answers are awaited.
const ON_THE_WIRE: usize = 64;

/// Most accesses that wait for the client, each with as much data as a message has: one for every thread of a large
/// device, and less than 1 GiB of what may be up to a guest.
pub const REQUEST_LIMIT: usize = 512;

/// How a client lays [`DmaAccess`] out; found out by a question that only one of them can answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Wide,
    Narrow,
}

#[derive(Debug, Clone)]
enum Want {
    Read(usize),
    Write(Vec<u8>),
    /// A byte, with a count of 2^32 + 1: an error where all of the count is looked at.
    Layout,
}

#[derive(Debug)]
struct Request {
    iova: u64,
    want: Want,
    layout: Layout,
    answer: Option<Answer>,
}

type Answer = std::result::Result<Vec<u8>, AccessError>;

#[derive(Debug)]
struct Link {
    server: ThreadId,
    max_data: usize,
    layout: Option<Layout>,
}

#[derive(Debug, Default)]
struct State {
    link: Option<Link>,
    next_ticket: u64,
    requests: HashMap<u64, Request>,
    /// Tickets of requests that are not sent yet.
    unsent: VecDeque<u64>,
    next_id: u16,
    /// Tickets by the message ids that the client has not answered.
    sent: HashMap<u16, u64>,
}

#[derive(Debug)]
pub(crate) struct MessageDma {
    state: Mutex<State>,
    answered: Condvar,
    wanted: Event,
    deadline: Duration,
}

/// A request that was left, to wait for without the locks of the table.
#[derive(Debug)]
pub(crate) struct Ticket(u64);

/// A request to make: what, and where.
pub(crate) enum Ask<'a> {
    Read(usize),
    Write(&'a [u8]),
}

impl Ask<'_> {
    /// The same of the bytes up to the one at `last`.
    pub(crate) fn up_to(self, last: u64) -> Self {
        let room = usize::try_from(last)
            .unwrap_or(usize::MAX)
            .saturating_add(1);
        match self {
            Ask::Read(len) => Ask::Read(len.min(room)),
            Ask::Write(bytes) => Ask::Write(&bytes[..bytes.len().min(room)]),
        }
    }
}

impl MessageDma {
    pub(crate) fn new(deadline: Duration) -> Result<Self> {
        Ok(MessageDma {
            state: Mutex::default(),
            answered: Condvar::new(),
            wanted: Event::new().map_err(crate::Error::io("an eventfd"))?,
            deadline,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When an access that begins now has taken too long.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.deadline
    }

    /// A client is connected and takes so much data in one message; the calling thread serves it.
    pub(crate) fn connected(&self, max_data: usize) {
        self.lock().link = Some(Link {
            server: thread::current().id(),
            max_data,
            layout: None,
        });
    }

    /// The client is gone, and with it all that was asked.
    pub(crate) fn disconnected(&self) {
        let mut state = self.lock();
        state.link = None;
        state.sent.clear();
        state.unsent.clear();
        for request in state.requests.values_mut() {
            request.answer.get_or_insert(Err(AccessError::Disconnected));
        }
        self.answered.notify_all();
    }

    /// The range is unmapped: nothing more is sent for it, and nobody waits for it any longer.
    pub(crate) fn unmapped(&self, first: u64, last: u64) {
        self.end(first, last, || AccessError::Unmapped);
    }

    /// Nobody waits any longer for what was asked by now.
    pub(crate) fn cancel(&self) {
        self.end(0, u64::MAX, || AccessError::Canceled);
    }

    fn end(&self, first: u64, last: u64, why: impl Fn() -> AccessError) {
        let mut state = self.lock();
        for request in state.requests.values_mut() {
            if (first..=last).contains(&request.iova) {
                request.answer.get_or_insert_with(|| Err(why()));
            }
        }
        let State {
            unsent, requests, ..
        } = &mut *state;
        unsent.retain(|ticket| {
            requests
                .get(ticket)
                .is_some_and(|request| request.answer.is_none())
        });
        self.answered.notify_all();
    }

    /// Leaves a request for as much as one message may have, and says how much that is. Before the first, the
    /// client is asked how it lays them out: then it is for nothing yet.
    pub(crate) fn ask(
        &self,
        iova: u64,
        ask: Ask<'_>,
    ) -> std::result::Result<(Ticket, usize), AccessError> {
        let mut state = self.lock();
        let Some(link) = &state.link else {
            return Err(AccessError::Disconnected);
        };
        if link.server == thread::current().id() {
            return Err(AccessError::ServerThread);
        }
        if state.requests.len() >= REQUEST_LIMIT {
            return Err(AccessError::TooMany(REQUEST_LIMIT));
        }
        let (want, layout, len) = match (link.layout, ask) {
            (None, _) => (Want::Layout, Layout::Narrow, 0),
            (Some(layout), Ask::Read(len)) => {
                let len = len.min(link.max_data);
                (Want::Read(len), layout, len)
            }
            (Some(layout), Ask::Write(bytes)) => {
                let bytes = &bytes[..bytes.len().min(link.max_data)];
                (Want::Write(copy(bytes)?), layout, bytes.len())
            }
        };
        let state = &mut *state;
        let room = state.requests.try_reserve(1);
        let room = room.and_then(|()| state.unsent.try_reserve(1));
        room.map_err(|_| AccessError::NoMemory(len))?;
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        let request = Request {
            iova,
            want,
            layout,
            answer: None,
        };
        state.requests.insert(ticket, request);
        state.unsent.push_back(ticket);
        self.wanted.signal();
        Ok((Ticket(ticket), len))
    }

    /// Waits for the answer.
    pub(crate) fn wait(&self, ticket: Ticket, deadline: Instant) -> Answer {
        let mut state = self.lock();
        loop {
            let answer = state
                .requests
                .get_mut(&ticket.0)
                .and_then(|request| request.answer.take());
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = match answer {
                None if left.is_zero() => Err(AccessError::Deadline(self.deadline)),
                None => {
                    let waited = self.answered.wait_timeout(state, left);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                    continue;
                }
                Some(answer) => answer,
            };
            state.requests.remove(&ticket.0);
            state.unsent.retain(|unsent| *unsent != ticket.0);
            return answer;
        }
    }

    /// What the thread that serves the socket polls: readable when there is something to send.
    pub(crate) fn wanted(&self) -> BorrowedFd<'_> {
        self.wanted.as_fd()
    }

    /// The next message to send.
    pub(crate) fn next_message(&self) -> Option<Vec<u8>> {
        self.wanted.clear();
        let mut state = self.lock();
        if state.sent.len() >= ON_THE_WIRE {
            return None;
        }
        let ticket = state.unsent.pop_front()?;
        let id = (0..=u16::MAX)
            .map(|step| state.next_id.wrapping_add(step))
            .find(|id| !state.sent.contains_key(id))?;
        state.next_id = id.wrapping_add(1);
        let request = state.requests.get_mut(&ticket)?;
        let message = request.message(id);
        match message {
            Some(_) => drop(state.sent.insert(id, ticket)),
            None => {
                let no_memory = AccessError::NoMemory(request.data());
                request.answer.get_or_insert(Err(no_memory));
                self.answered.notify_all();
                // There may be others.
                self.wanted.signal();
            }
        }
        message
    }

    /// Takes the client's reply to one of our messages. One that nobody waits for is passed over.
    pub(crate) fn reply(&self, header: &Header, body: &[u8]) {
        let mut state = self.lock();
        let Some(ticket) = state.sent.remove(&header.message_id) else {
            log::debug!("a reply with id {} to nothing", header.message_id);
            return;
        };
        let State { requests, link, .. } = &mut *state;
        if let Some(request) = requests.get_mut(&ticket) {
            if request.answer.is_none() {
                let mut answer = request.check(header, body);
                if let (Want::Layout, Some(link)) = (&request.want, link) {
                    answer = link.found_layout(answer);
                }
                request.answer = Some(answer);
                self.answered.notify_all();
            }
        }
        // Room on the wire for those who wait for it.
        if !state.unsent.is_empty() {
            self.wanted.signal();
        }
    }
}

impl Link {
    fn found_layout(&mut self, answer: Answer) -> Answer {
        let layout = match answer {
            Ok(_) => Layout::Narrow,
            // What a client that looks at the whole count may say of it; anything else may be about the
            // address.
            Err(AccessError::Client(
                libc::EINVAL
                | libc::E2BIG
                | libc::EFBIG
                | libc::ERANGE
                | libc::EOVERFLOW
                | libc::EMSGSIZE
                | libc::ENOMEM
                | libc::ENOSPC,
            )) => Layout::Wide,
            Err(error) => return Err(error),
        };
        self.layout = Some(layout);
        Ok(Vec::new())
    }
}

impl Request {
    fn command(&self) -> u16 {
        match self.want {
            Want::Write(_) => command::DMA_WRITE,
            _ => command::DMA_READ,
        }
    }

    /// Bytes of data that are sent.
    fn data(&self) -> usize {
        match &self.want {
            Want::Write(data) => data.len(),
            _ => 0,
        }
    }

    /// `None` where there is no memory for it.
    fn message(&mut self, message_id: u16) -> Option<Vec<u8>> {
        let header = Header {
            message_id,
            command: self.command(),
            flags: flags::COMMAND,
            ..Header::default()
        };
        wire::message_with_data(header, self.data(), |bytes| {
            let (count, data) = match &self.want {
                Want::Read(len) => (*len as u64, &[][..]),
                Want::Write(data) => (data.len() as u64, &data[..]),
                Want::Layout => ((1 << 32) + 1, &[][..]),
            };
            let access = DmaAccess {
                address: self.iova,
                count,
            };
            access.encode(bytes);
            if self.layout == Layout::Narrow && !data.is_empty() {
                bytes.truncate(Header::SIZE + NarrowDmaAccess::SIZE);
                bytes.extend_from_slice(data);
                bytes.resize(Header::SIZE + DmaAccess::SIZE + data.len(), 0);
            } else {
                bytes.extend_from_slice(data);
            }
        })
    }

    /// What a reply says.
    fn check(&self, header: &Header, body: &[u8]) -> Answer {
        if header.command != self.command() {
            return Err(AccessError::BadReply);
        }
        if header.flags & flags::ERROR != 0 {
            let errno = i32::try_from(header.error)
                .ok()
                .filter(|errno| (1..4096).contains(errno));
            return Err(AccessError::Client(errno.unwrap_or(libc::EIO)));
        }
        let data = match &self.want {
            // Some clients repeat the address and the count, some only the header.
            Want::Write(_) => {
                return match body.len() {
                    0 | NarrowDmaAccess::SIZE | DmaAccess::SIZE => Ok(Vec::new()),
                    _ => Err(AccessError::BadReply),
                };
            }
            Want::Read(len) => *len,
            Want::Layout => 1,
        };
        let access = match self.layout {
            Layout::Wide => {
                DmaAccess::decode(body).map(|(access, rest)| (access.address, access.count, rest))
            }
            Layout::Narrow => NarrowDmaAccess::decode(body)
                .map(|(access, rest)| (access.address, access.count.into(), rest)),
        };
        match access {
            Some((address, count, rest))
                if address == self.iova
                    && count == data as u64
                    && body.len() == DmaAccess::SIZE + data =>
            {
                copy(&rest[..data])
            }
            _ => Err(AccessError::BadReply),
        }
    }
}

/// A copy of data that a client or a guest has chosen the size of.
fn copy(data: &[u8]) -> Answer {
    let mut bytes = Vec::new();
    let room = bytes.try_reserve_exact(data.len());
    room.map_err(|_| AccessError::NoMemory(data.len()))?;
    bytes.extend_from_slice(data);
    Ok(bytes)
}
