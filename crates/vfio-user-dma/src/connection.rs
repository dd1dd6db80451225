// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bytes of one client: messages in, one at a time, and messages out, neither ever blocking.
//!
//! A message is read to its end whatever it says, so the next one begins where it begins. What is too long to
//! be kept is read and forgotten.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::socket::{self, MAX_FDS};
use crate::wire::Header;
use crate::{Error, Result};

/// Bytes of a message beside its data: more than any of them has.
pub(crate) const OVERHEAD: usize = 64;

/// Bytes that are read at a time of what nobody will look at.
const FORGET: usize = 4096;

/// Reads in a row.
const READS: usize = 64;

/// A message that was read to its end.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// Why it cannot be served, whatever it is.
    pub(crate) error: Option<&'static str>,
}

#[derive(Debug, Default)]
struct Incoming {
    header: [u8; Header::SIZE],
    /// Bytes of the header that have come.
    have: usize,
    body: Vec<u8>,
    /// Bytes of the body that have come.
    filled: usize,
    /// Bytes still to be read and forgotten.
    forget: usize,
    fds: Vec<OwnedFd>,
    error: Option<&'static str>,
    since: Option<Instant>,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    at: usize,
    fd: Option<Arc<OwnedFd>>,
}

#[derive(Debug)]
pub(crate) struct Connection<'a> {
    socket: &'a UnixStream,
    incoming: Incoming,
    outgoing: VecDeque<Outgoing>,
    outgoing_bytes: usize,
    /// When a byte was sent last, or there was nothing to send.
    sent: Instant,
    /// Most bytes of a message that is kept.
    limit: usize,
    deadline: Duration,
}

/// What reading has led to.
pub(crate) enum Input {
    Message(Message),
    Nothing,
    Closed,
}

impl<'a> Connection<'a> {
    pub(crate) fn new(socket: &'a UnixStream, limit: usize, deadline: Duration) -> Self {
        Connection {
            socket,
            incoming: Incoming::default(),
            outgoing: VecDeque::new(),
            outgoing_bytes: 0,
            sent: Instant::now(),
            limit,
            deadline,
        }
    }

    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Whether more may be read: not while a client that does not take its answers has too many of them.
    pub(crate) fn may_read(&self) -> bool {
        self.outgoing_bytes <= self.limit
    }

    pub(crate) fn has_output(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// When the client has been too slow, if it is in the middle of something.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let sending = self.has_output().then_some(self.sent);
        // A message that we do not read is not late.
        let reading = self.incoming.since.filter(|_| self.may_read());
        sending
            .into_iter()
            .chain(reading)
            .min()
            .map(|since| since + self.deadline)
    }

    /// Reads what there is, up to the end of a message.
    ///
    /// # Errors
    ///
    /// The socket's, and a header that says it is shorter than itself: nobody knows where the next begins.
    pub(crate) fn read(&mut self) -> Result<Input> {
        // A client that sends without end does not keep us from everything else.
        for _ in 0..READS {
            if let Some(message) = self.incoming.complete(self.limit)? {
                return Ok(Input::Message(message));
            }
            let incoming = &mut self.incoming;
            let mut forget = [0; FORGET];
            let room = if incoming.have < Header::SIZE {
                &mut incoming.header[incoming.have..]
            } else if incoming.forget > 0 {
                let some = incoming.forget.min(FORGET);
                &mut forget[..some]
            } else {
                &mut incoming.body[incoming.filled..]
            };
            let received = match socket::receive(self.socket, room) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Input::Nothing)
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(Input::Closed)
                }
                Err(error) => return Err(Error::io("receiving")(error)),
            };
            if received.bytes == 0 {
                return Ok(Input::Closed);
            }
            incoming.received(received);
        }
        // The last of them may have been the end of the message: nothing else will wake us for it.
        let message = self.incoming.complete(self.limit)?;
        Ok(message.map_or(Input::Nothing, Input::Message))
    }

    /// Leaves a message to be sent.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`]: a client that takes no answers may have as many of them wait as it likes short messages.
    pub(crate) fn push(&mut self, bytes: Vec<u8>, fd: Option<Arc<OwnedFd>>) -> Result<()> {
        let room = self.outgoing.try_reserve(1);
        room.map_err(|_| Error::NoMemory(bytes.len()))?;
        if self.outgoing.is_empty() {
            self.sent = Instant::now();
        }
        self.outgoing_bytes += bytes.len();
        self.outgoing.push_back(Outgoing { bytes, at: 0, fd });
        Ok(())
    }

    /// Sends what there is room for.
    pub(crate) fn flush(&mut self) -> Result<()> {
        while let Some(message) = self.outgoing.front_mut() {
            let fd = message.fd.as_ref().map(|fd| fd.as_fd());
            match socket::send(self.socket, &message.bytes[message.at..], fd) {
                Ok(sent) => {
                    message.fd = None;
                    message.at += sent;
                    self.sent = Instant::now();
                    if message.at == message.bytes.len() {
                        self.outgoing_bytes -= message.bytes.len();
                        self.outgoing.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("sending")(error)),
            }
        }
        Ok(())
    }
}

impl Incoming {
    fn received(&mut self, mut received: socket::Received) {
        self.since.get_or_insert_with(Instant::now);
        if self.have < Header::SIZE {
            self.have += received.bytes;
        } else if self.forget > 0 {
            self.forget -= received.bytes;
        } else {
            self.filled += received.bytes;
        }
        self.fds.append(&mut received.fds);
        if received.truncated || self.fds.len() > MAX_FDS {
            self.fds.clear();
            self.error.get_or_insert("too many file descriptors");
        }
    }

    /// Whether there is memory for so many bytes of a body.
    fn has_room(&mut self, body: usize) -> bool {
        let more = body.saturating_sub(self.body.len());
        self.body.try_reserve_exact(more).is_ok()
    }

    /// The message, if it is there to its end. Makes room for the rest once the header is there.
    fn complete(&mut self, limit: usize) -> Result<Option<Message>> {
        if self.have < Header::SIZE {
            return Ok(None);
        }
        let Some((header, _)) = Header::decode(&self.header) else {
            return Ok(None);
        };
        let size = header.message_size as usize;
        let Some(body) = size.checked_sub(Header::SIZE) else {
            return Err(Error::Malformed("a message shorter than its header"));
        };
        // A body that is not kept is forgotten from its first byte on; `filled` then counts nothing.
        let refused = if size > limit {
            Some(TOO_LONG)
        } else if self.error == Some(NO_MEMORY) || !self.has_room(body) {
            Some(NO_MEMORY)
        } else {
            None
        };
        if let Some(why) = refused {
            if self.error != Some(why) {
                self.error = Some(why);
                self.forget = body;
            }
            if self.forget > 0 {
                return Ok(None);
            }
        } else {
            self.body.resize(body, 0);
            if self.filled < body {
                return Ok(None);
            }
        }
        let done = std::mem::take(self);
        Ok(Some(Message {
            header,
            body: done.body,
            fds: done.fds,
            error: done.error,
        }))
    }
}

const TOO_LONG: &str = "a message longer than what was agreed on";
/// Of a message for which there is no memory; it is read and forgotten too.
pub(crate) const NO_MEMORY: &str = "no memory for a message";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Header;

    #[test]
    fn a_message_that_ends_with_the_last_read_in_a_row_is_there() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut header = Vec::new();
        let message_size = (Header::SIZE + READS - 1) as u32;
        Header {
            message_size,
            ..Header::default()
        }
        .encode(&mut header);
        socket::send(&ours, &header, None).unwrap();
        // What comes with a file descriptor is read by itself.
        for _ in 1..READS {
            socket::send(&ours, &[0], Some(theirs.as_fd())).unwrap();
        }
        let mut connection = Connection::new(&theirs, 4096, Duration::from_secs(5));
        match connection.read().unwrap() {
            Input::Message(message) => {
                assert_eq!(message.body.len(), READS - 1);
                assert!(message.fds.len() <= MAX_FDS && message.error.is_some());
            }
            Input::Nothing | Input::Closed => panic!("it is not there"),
        }
    }
}
