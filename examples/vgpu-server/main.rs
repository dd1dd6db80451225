// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A PCI device with a vGPU inside, served over vfio-user.
//!
//! `cargo run --release --example vgpu-server -- --socket PATH` waits for a client such as QEMU's
//! `vfio-user-pci`. docs/vgpu-server.md has the registers.

mod config_space;
mod counters;
mod device;
mod engine;
mod interrupts;
mod pins;
mod registers;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Parser;
use log::LevelFilter;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vfio_user_dma::{DmaTable, Server, Stopper, MESSAGE_DEADLINE};

use counters::Counters;
use device::VgpuDevice;

/// Serve a vGPU as a PCI device over vfio-user, to one client after the other.
#[derive(Parser)]
#[command(name = "vgpu-server", version)]
struct Args {
    /// Where to make the Unix socket; that of a server that was killed is replaced
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// End when the first client has gone
    #[arg(long)]
    once: bool,
    /// For how long an engine waits for memory that the client has for itself
    #[arg(long, value_name = "SECONDS", default_value_t = MESSAGE_DEADLINE.as_secs())]
    answer_deadline: u64,
    /// Log what the device does to stderr; twice for every register access
    #[arg(long, short, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let level = match args.verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    env_logger::Builder::new().filter_level(level).init();
    let counters = Arc::new(Counters::default());
    let result = serve(&args, &counters);
    println!("vgpu-server: {counters}");
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}: {error}", args.socket.display());
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &Args, counters: &Arc<Counters>) -> Result<(), Box<dyn std::error::Error>> {
    let server = Server::bind(&args.socket)?;
    stop_at_signals(server.stopper())?;
    let once = args.once.then(|| server.stopper());
    let dma = DmaTable::builder()
        // A client that shrinks its memory is not to end the server.
        .guard_files(true)
        .message_deadline(Duration::from_secs(args.answer_deadline))
        .build()?;
    let mut device = VgpuDevice::new(dma, counters.clone(), once)?;
    println!("vgpu-server: listening on {}", args.socket.display());
    Ok(server.run(&mut device)?)
}

/// Lets the server end as it should, and say what it has done.
fn stop_at_signals(stopper: Stopper) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || signals.forever().take(1).for_each(|_| stopper.stop()))?;
    Ok(())
}
