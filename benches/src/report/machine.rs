// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the figures come from.

use std::fs;
use std::process::Command;

use crate::cycles;
use crate::record::workspace;
use crate::world::TOTAL;

/// Machine, versions and features, as a list.
pub(super) fn describe() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let lines = [
        format!("{}, {cpus} CPUs, counting in {}", cpu(), cycles::UNIT),
        format!("Linux {}, {}", kernel(), virtualized()),
        format!("transparent huge pages of shared memory: {}", huge_pages()),
        format!("{}, cargo's bench profile (no LTO)", rustc()),
        format!(
            "{} with backend-mmap, backend-atomic and iommu; {}",
            version("vm-memory"),
            version("virtio-queue")
        ),
        format!(
            "{} MiB of guest memory in a memfd, every page present",
            TOTAL >> 20
        ),
    ];
    lines.iter().map(|line| format!("- {line}\n")).collect()
}

fn cpu() -> String {
    field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

fn virtualized() -> &'static str {
    let flags = field("/proc/cpuinfo", "flags").unwrap_or_default();
    if flags.split(' ').any(|flag| flag == "hypervisor") {
        "in a virtual machine"
    } else {
        "on hardware"
    }
}

/// Major and minor version: what follows names a build.
fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.split('.').take(2).collect::<Vec<_>>().join(".")
}

fn huge_pages() -> String {
    let modes = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let modes = modes.unwrap_or_default();
    let chosen = modes
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    chosen.map_or_else(|| String::from("unknown"), |(mode, _)| mode.to_owned())
}

fn rustc() -> String {
    let output = Command::new("rustc").arg("--version").output();
    let version = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let version = version.unwrap_or_default();
    let words: Vec<_> = version.split_whitespace().take(2).collect();
    words.join(" ")
}

/// A dependency and the version that was built.
fn version(package: &str) -> String {
    let lock = fs::read_to_string(workspace().join("Cargo.lock")).unwrap_or_default();
    let entry = format!("name = \"{package}\"\nversion = \"");
    let found = lock
        .split_once(&entry)
        .and_then(|(_, rest)| rest.split_once('"'));
    found.map_or_else(
        || package.to_owned(),
        |(version, _)| format!("{package} {version}"),
    )
}

fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
