// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The server: who waits for a client, serves it and waits for the next.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use checked_sync::LONGEST;

use crate::connection::{Connection, Input};
use crate::event::Event;
use crate::session::{Session, FIRST_LIMIT};
use crate::{socket, Backend, Error, Result, MAX_DATA_XFER_SIZE};

/// How long a client may take for the rest of a message, or to take what it is sent, unless told otherwise.
pub const IO_DEADLINE: Duration = Duration::from_secs(5);

/// Messages that are served before what the device wants is looked at.
const MESSAGES: usize = 64;

/// A vfio-user server on a Unix socket. It serves one client at a time, in the thread that calls it, and
/// allocates nothing by what a client says before it has checked that.
///
/// When a client goes, what it has mapped is unmapped, and the next one is waited for.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    /// The path that was bound, with the device and inode it had then.
    path: Option<(PathBuf, (u64, u64))>,
    stop: Arc<Event>,
    max_data: u32,
    deadline: Duration,
}

/// Ends [`Server::run`], from any thread.
///
/// ```
/// # let dir = std::env::temp_dir().join(format!("vfio-user-dma-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir)?;
/// let server = vfio_user_dma::Server::bind(dir.join("stop.sock"))?;
/// let stopper = server.stopper();
/// stopper.stop();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Event>);

impl Stopper {
    /// Ends the server that it belongs to, now or when it is run.
    pub fn stop(&self) {
        self.0.signal();
    }
}

/// Why a client is not served any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// It has gone.
    Closed,
    /// [`Stopper::stop`].
    Stopped,
}

impl Server {
    /// A server on a new socket at `path`. The socket of a server that was killed is replaced.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]: something else is there, or a server that is alive (EADDRINUSE).
    pub fn bind(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bind = || UnixListener::bind(path);
        let listener = match bind() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_dead(path) => {
                fs::remove_file(path).map_err(Error::io("removing a dead socket"))?;
                bind()
            }
            listener => listener,
        };
        let mut server = Server::from_listener(listener.map_err(Error::io("binding the socket"))?)?;
        let metadata = fs::symlink_metadata(path).map_err(Error::io("the socket's file"))?;
        server.path = Some((path.to_owned(), (metadata.dev(), metadata.ino())));
        Ok(server)
    }

    /// A server on a socket that listens already.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn from_listener(listener: UnixListener) -> Result<Self> {
        listener
            .set_nonblocking(true)
            .map_err(Error::io("the socket"))?;
        Ok(Server {
            listener,
            path: None,
            stop: Arc::new(Event::new().map_err(Error::io("an eventfd"))?),
            max_data: MAX_DATA_XFER_SIZE,
            deadline: IO_DEADLINE,
        })
    }

    /// Most bytes of data in a message, [`MAX_DATA_XFER_SIZE`] unless told otherwise.
    pub fn max_data_xfer_size(mut self, bytes: u32) -> Self {
        self.max_data = bytes.max(1);
        self
    }

    /// How long a client may take for the rest of a message, or to take what it is sent, [`IO_DEADLINE`] unless
    /// told otherwise.
    pub fn io_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline.min(LONGEST);
        self
    }

    /// What ends it.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Serves one client after the other until it is stopped. What goes wrong with one is logged and ends
    /// that one only. A device for one client alone stops its server in
    /// [`Backend::disconnected`](crate::Backend::disconnected).
    ///
    /// # Errors
    ///
    /// [`Error::Io`]: the listening socket fails.
    pub fn run(&self, backend: &mut dyn Backend) -> Result<()> {
        loop {
            let [stopped, connected] = poll(
                [
                    (self.stop.as_fd(), libc::POLLIN),
                    (self.listener.as_fd(), libc::POLLIN),
                ],
                None,
            )?;
            if stopped != 0 {
                return Ok(());
            }
            if connected == 0 {
                continue;
            }
            let client = match self.listener.accept() {
                Ok((client, _)) => client,
                Err(error) if is_passing(&error) => {
                    log::warn!("accepting a client: {error}");
                    // It waits in the queue until there is room for its descriptor.
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
                Err(error) => return Err(Error::io("accepting a client")(error)),
            };
            match self.serve(&client, backend) {
                Ok(End::Stopped) => return Ok(()),
                Ok(End::Closed) => {}
                Err(error) => log::warn!("a client is cut off: {error}"),
            }
        }
    }

    /// Serves one client that is connected already, until it goes or the server is stopped. What it has mapped
    /// is unmapped then, and before it whatever the table has.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]: the socket failed, or the client was too slow (ETIMEDOUT). [`Error::Malformed`]: where its next
    /// message begins cannot be told. [`Error::NoMemory`]: an answer cannot be kept until the client takes it.
    /// [`Error::Space`]: memory of the client before is still held (EDEADLK), as [`DmaTable::clear`](crate::DmaTable::clear)
    /// says; this one is not served.
    pub fn serve(&self, client: &UnixStream, backend: &mut dyn Backend) -> Result<End> {
        let table = backend.dma().clone();
        // What could not be unmapped when the client before has gone is not for this one.
        table.clear()?;
        table.set_client(socket::peer(client));
        let mut session = Session::new(backend, self.max_data);
        let result = match self.serve_session(client, &mut session) {
            // Gone while something was being sent to it.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => {
                Ok(End::Closed)
            }
            result => result,
        };
        table.messages().disconnected();
        session.backend().disconnected();
        table.set_client(None);
        if let Err(error) = table.clear() {
            log::warn!("memory of a client that has gone: {error}");
        }
        result
    }

    fn serve_session(&self, client: &UnixStream, session: &mut Session<'_>) -> Result<End> {
        let table = session.backend().dma().clone();
        let messages = table.messages();
        let mut connection = Connection::new(client, FIRST_LIMIT, self.deadline);
        loop {
            connection.flush()?;
            while !connection.has_output() {
                let Some(message) = messages.next_message() else {
                    break;
                };
                connection.push(message, None)?;
                connection.flush()?;
            }
            let sending = connection.has_output();
            let mut events = 0;
            if sending {
                events |= libc::POLLOUT;
            }
            if connection.may_read() {
                events |= libc::POLLIN;
            }
            // What the device wants is sent when everything else is.
            let wanted = if sending { 0 } else { libc::POLLIN };
            let deadline = connection.deadline();
            let [stopped, _, ready] = poll(
                [
                    (self.stop.as_fd(), libc::POLLIN),
                    (messages.wanted(), wanted),
                    (client.as_fd(), events),
                ],
                deadline,
            )?;
            if stopped != 0 {
                return Ok(End::Stopped);
            }
            if ready == 0 && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let late = io::Error::from_raw_os_error(libc::ETIMEDOUT);
                return Err(Error::io("waiting for the client")(late));
            }
            if ready & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0 && connection.may_read()
            {
                for _ in 0..MESSAGES {
                    match connection.read()? {
                        Input::Message(message) => session.serve(message, &mut connection)?,
                        Input::Nothing => break,
                        Input::Closed => return Ok(End::Closed),
                    }
                    connection.flush()?;
                    if !connection.may_read() {
                        break;
                    }
                }
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Another server may have taken the path over.
        if let Some((path, id)) = &self.path {
            let ours = fs::symlink_metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == *id);
            if ours {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Whether there is a socket on which nobody listens.
fn is_dead(path: &Path) -> bool {
    let socket = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    socket && UnixStream::connect(path).err().is_some_and(refused)
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EAGAIN
                | libc::EINTR
                | libc::ECONNABORTED
                | libc::EMFILE
                | libc::ENFILE
                | libc::ENOBUFS
                | libc::ENOMEM
        )
    )
}

/// Waits for any of the events, or the deadline, and says what happened.
fn poll<const N: usize>(
    wanted: [(BorrowedFd<'_>, i16); N],
    deadline: Option<Instant>,
) -> Result<[i16; N]> {
    let mut fds = wanted.map(|(fd, events)| libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    });
    let timeout = deadline.map_or(-1, |deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the deadline has passed when nothing has happened.
        i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
    });
    // SAFETY: the array has `N` elements and outlives the call.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, timeout) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(Error::io("poll")(error));
        }
        return Ok([0; N]);
    }
    Ok(fds.map(|fd| fd.revents))
}
