// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who gives the device to this program: uio_pci_generic where there is no IOMMU, else vfio-pci. And how its
//! interrupts arrive.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use libc::c_ulong;
use vfio_bindings::bindings::vfio::{
    vfio_irq_set, vfio_region_info, VFIO_BASE, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_TYPE,
};
use vfio_group::hardware::{HardwareContainer, HardwareGroup};
use vfio_group::IommuType;

use crate::pci::{self, Bar};

/// The command register in configuration space: memory and bus mastering, and INTx is not disabled.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0x6;

/// The device, given to this program.
#[derive(Debug)]
pub struct Device {
    pub bar: Bar,
    pub irq: Irq,
    /// Where the device has an IOMMU.
    pub vfio: Option<Vfio>,
}

/// What keeps the device's group attached.
#[derive(Debug)]
pub struct Vfio {
    pub container: Arc<HardwareContainer>,
    _group: HardwareGroup,
    device: File,
}

/// How interrupts arrive.
#[derive(Debug)]
pub enum Irq {
    /// INTx, which uio_pci_generic turns off in the device each time. The second file is its configuration
    /// space.
    Uio(File, File),
    /// INTx, which vfio-pci masks each time.
    Intx(File),
    /// Messages.
    Msi(File),
}

impl fmt::Display for Irq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Irq::Uio(..) => "INTx through uio_pci_generic",
            Irq::Intx(_) => "INTx through vfio-pci",
            Irq::Msi(_) => "MSI through vfio-pci",
        })
    }
}

impl Device {
    /// Through uio_pci_generic, which knows INTx only.
    pub fn uio() -> io::Result<Self> {
        let name = pci::find()?;
        fs::write("/sys/bus/pci/drivers/uio_pci_generic/new_id", pci::IDS)?;
        let folder = format!("/sys/bus/pci/devices/{name}");
        let read_write = |path: &str| File::options().read(true).write(true).open(path);
        let config = read_write(&format!("{folder}/config"))?;
        command(&config, 0, MEMORY_AND_MASTER)?;
        let bar = Bar::map(&read_write(&format!("{folder}/resource0"))?, 0)?;
        guest_init::wait_for("/dev/uio0")?;
        Ok(Device {
            bar,
            irq: Irq::Uio(read_write("/dev/uio0")?, config),
            vfio: None,
        })
    }

    /// Through vfio-pci. Interrupts are INTx at first.
    pub fn vfio() -> io::Result<Self> {
        let given = guest_init::give_to_vfio(pci::IDS)?;
        let failed = io::Error::other::<vfio_group::Error>;
        let container = HardwareContainer::open().map_err(failed)?;
        let group = HardwareGroup::open(given.group).map_err(failed)?;
        group.set_container(&container).map_err(failed)?;
        container.set_iommu(IommuType::Type1v2).map_err(failed)?;
        let device = group.device(&given.name).map_err(failed)?;
        let device = File::from(OwnedFd::from(device));
        let config = region(&device, VFIO_PCI_CONFIG_REGION_INDEX)?;
        command(&device, config, MEMORY_AND_MASTER)?;
        let bar = Bar::map(&device, region(&device, VFIO_PCI_BAR0_REGION_INDEX)?)?;
        let irq = Irq::Intx(trigger(&device, VFIO_PCI_INTX_IRQ_INDEX)?);
        Ok(Device {
            bar,
            irq,
            vfio: Some(Vfio {
                container: Arc::new(container),
                _group: group,
                device,
            }),
        })
    }

    /// From now on by messages.
    pub fn use_msi(&mut self) -> io::Result<()> {
        let Some(vfio) = &self.vfio else {
            return Err(io::Error::other("uio_pci_generic has no messages"));
        };
        set_irqs::<0>(&vfio.device, VFIO_PCI_INTX_IRQ_INDEX, OFF, 0, [])?;
        self.irq = Irq::Msi(trigger(&vfio.device, VFIO_PCI_MSI_IRQ_INDEX)?);
        Ok(())
    }

    /// Waits for an interrupt. Whether one has come.
    pub fn wait(&mut self, deadline: Duration) -> io::Result<bool> {
        let (Irq::Uio(file, _) | Irq::Intx(file) | Irq::Msi(file)) = &mut self.irq;
        let mut poll = libc::pollfd {
            fd: file.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let millis = i32::try_from(deadline.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one struct, which outlives the call.
        match unsafe { libc::poll(&mut poll, 1, millis) } {
            0 => return Ok(false),
            1.. => {}
            _ => return Err(io::Error::last_os_error()),
        }
        // How many there were since.
        let mut count = [0; 8];
        let len = if matches!(self.irq, Irq::Uio(..)) {
            4
        } else {
            8
        };
        let (Irq::Uio(file, _) | Irq::Intx(file) | Irq::Msi(file)) = &mut self.irq;
        file.read_exact(&mut count[..len])?;
        Ok(true)
    }

    /// Lets the next one through, once the device does not ask for this one any more.
    pub fn rearm(&mut self) -> io::Result<()> {
        match (&mut self.irq, &self.vfio) {
            (Irq::Uio(_, config), _) => command(config, 0, MEMORY_AND_MASTER),
            (Irq::Intx(_), Some(vfio)) => {
                set_irqs::<0>(&vfio.device, VFIO_PCI_INTX_IRQ_INDEX, UNMASK, 1, [])
            }
            _ => Ok(()),
        }
    }
}

/// Writes the command register; `at` is where configuration space begins.
fn command(config: &File, at: u64, bits: u16) -> io::Result<()> {
    config.write_all_at(&bits.to_le_bytes(), at + COMMAND)
}

const DEVICE_GET_REGION_INFO: u32 = 8;
const DEVICE_SET_IRQS: u32 = 10;

const OFF: u32 = VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_NONE;
const UNMASK: u32 = VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_DATA_NONE;
const TRIGGER: u32 = VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_EVENTFD;

/// # Safety
///
/// `T` is what the call takes, with its size in `argsz`.
unsafe fn ioctl<T>(file: &File, number: u32, arg: &mut T) -> io::Result<()> {
    let request = c_ulong::from(VFIO_TYPE) << 8 | c_ulong::from(VFIO_BASE + number);
    // SAFETY: as promised.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(arg)) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where in the device's file a region begins.
fn region(device: &File, index: u32) -> io::Result<u64> {
    let mut info = vfio_region_info {
        argsz: size_of::<vfio_region_info>() as u32,
        index,
        ..Default::default()
    };
    // SAFETY: the call fills in at most what `argsz` says.
    unsafe { ioctl(device, DEVICE_GET_REGION_INFO, &mut info) }?;
    Ok(info.offset)
}

/// The struct, and the file descriptors behind it.
#[repr(C)]
struct IrqSet<const N: usize> {
    set: vfio_irq_set,
    fds: [i32; N],
}

fn set_irqs<const N: usize>(
    device: &File,
    index: u32,
    flags: u32,
    count: u32,
    fds: [i32; N],
) -> io::Result<()> {
    let mut set = IrqSet {
        set: vfio_irq_set {
            argsz: size_of::<IrqSet<N>>() as u32,
            flags,
            index,
            start: 0,
            count,
            ..Default::default()
        },
        fds,
    };
    // SAFETY: the call reads what `argsz` says.
    unsafe { ioctl(device, DEVICE_SET_IRQS, &mut set) }
}

fn trigger(device: &File, index: u32) -> io::Result<File> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was opened for us.
    let file = unsafe { File::from_raw_fd(fd) };
    set_irqs(device, index, TRIGGER, 1, [fd])?;
    Ok(file)
}
