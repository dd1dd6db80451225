// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The example as a program.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

use vfio_user_dma::Capabilities;

use crate::common::deadline::{must_end, within};
use crate::common::Client;
use crate::example;

fn example() -> &'static Path {
    static EXAMPLE: OnceLock<PathBuf> = OnceLock::new();
    EXAMPLE.get_or_init(|| example::example("vgpu-server"))
}

/// A server that runs.
pub struct Server {
    pub process: Child,
    pub socket: PathBuf,
    output: Option<BufReader<ChildStdout>>,
}

impl Server {
    pub fn start(args: &[&str]) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vgpu-server-{}-{number}.sock", std::process::id());
        Server::start_at(std::env::temp_dir().join(name), args)
    }

    pub fn start_at(socket: PathBuf, args: &[&str]) -> Self {
        let mut process = Command::new(example())
            .arg("--socket")
            .arg(&socket)
            // The client may not get the processor for a while, and what it does not answer is ended by a reset.
            .args(["--answer-deadline", "60"])
            .args(args)
            .stdout(Stdio::piped())
            // What is refused is logged there.
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        // It is killed, and its socket removed, where it does not begin as it should.
        let mut server = Server {
            process,
            socket,
            output: None,
        };
        let (line, output) = must_end("reading that the server listens", move || {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            (line, output)
        });
        assert!(line.contains("listening"), "{line}");
        server.output = Some(output);
        server
    }

    pub fn connect(&self) -> Client {
        let mut client = Client::new(UnixStream::connect(&self.socket).unwrap());
        assert_eq!(client.version(Capabilities::default()).errno(), 0);
        client
    }

    /// What it says at its end, by itself.
    pub fn last_words(mut self) -> String {
        within("the server ends by itself", || {
            self.process.try_wait().unwrap().is_some()
        });
        assert!(self.process.wait().unwrap().success());
        let mut words = String::new();
        let output = self.output.as_mut().unwrap();
        output.read_to_string(&mut words).unwrap();
        words
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}
