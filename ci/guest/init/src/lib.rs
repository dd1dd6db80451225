// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the first process of a guest has to do before anything else works: file systems, modules, and
//! the device given to VFIO. Modules are in the folder that guest-initramfs packs.

use std::error::Error;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// The device that was given to VFIO.
#[derive(Debug)]
pub struct Given {
    /// Its name on the PCI bus.
    pub name: String,
    /// The number of its group.
    pub group: u32,
}

/// Mounts what the kernel offers, and loads the modules.
///
/// # Errors
///
/// What the kernel answered.
pub fn prepare() -> io::Result<()> {
    mount("proc", "/proc")?;
    mount("sysfs", "/sys")?;
    mount("devtmpfs", "/dev")?;
    load_modules("/modules")
}

/// A parameter of the kernel's command line, where that has it.
///
/// # Errors
///
/// The command line cannot be read, or the parameter is not what is asked for.
pub fn parameter<T>(name: &str) -> io::Result<Option<T>>
where
    T: FromStr<Err: Error + Send + Sync + 'static>,
{
    let line = fs::read_to_string("/proc/cmdline")?;
    let mut words = line
        .split_whitespace()
        .filter_map(|word| word.split_once('='));
    let found = words.find(|(key, _)| *key == name);
    found
        .map(|(_, value)| value.parse().map_err(io::Error::other))
        .transpose()
}

/// Ends the guest.
pub fn end() -> ! {
    // SAFETY: neither call takes a pointer.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_AUTOBOOT);
    }
    loop {
        std::thread::park();
    }
}

fn mount(kind: &str, at: &str) -> io::Result<()> {
    match fs::create_dir(at) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => (),
    }
    let (kind, at) = (CString::new(kind)?, CString::new(at)?);
    // SAFETY: strings that end with a zero byte, and no data.
    let done = unsafe {
        libc::mount(
            kind.as_ptr(),
            at.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    match (done, io::Error::last_os_error()) {
        (0, _) => Ok(()),
        // The kernel has mounted it before it started us.
        (_, error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
        (_, error) => Err(error),
    }
}

fn load_modules(folder: &str) -> io::Result<()> {
    let mut paths = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        let file = File::open(&path)?;
        // SAFETY: a file and an empty string of parameters.
        let done =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if done != 0 {
            let error = io::Error::last_os_error();
            return Err(io::Error::other(format!("{}: {error}", path.display())));
        }
    }
    Ok(())
}

/// Gives the device with these ids (vendor and device as the kernel takes them: `1234 11e8`) to vfio-pci.
///
/// # Errors
///
/// What the kernel answered; that it has no such device behind an IOMMU.
pub fn give_to_vfio(ids: &str) -> io::Result<Given> {
    fs::write("/sys/bus/pci/drivers/vfio-pci/new_id", ids)?;
    for entry in fs::read_dir("/sys/bus/pci/drivers/vfio-pci")? {
        let entry = entry?;
        let Ok(group) = fs::read_link(entry.path().join("iommu_group")) else {
            continue;
        };
        let number = group
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        let group = number.ok_or_else(|| io::Error::other("a group without a number"))?;
        wait_for(&format!("/dev/vfio/{group}"))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        return Ok(Given { name, group });
    }
    Err(io::Error::other(
        "vfio-pci has no device: is there an IOMMU?",
    ))
}

/// Waits for a file that the kernel makes.
///
/// # Errors
///
/// It does not come within 10 s.
pub fn wait_for(path: &str) -> io::Result<()> {
    let begun = Instant::now();
    while !fs::exists(path)? {
        if begun.elapsed() > Duration::from_secs(10) {
            return Err(io::Error::other(format!("{path} does not appear")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
