// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who gives the device to this program: uio_pci_generic where there is no IOMMU, else vfio-pci. And how its
//! interrupts arrive.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
};
use vfio_ioctls::{VfioContainer, VfioDevice};
use vmm_sys_util::eventfd::EventFd;

use crate::pci::{self, Bar};

/// The command register in configuration space: memory and bus mastering, and INTx is not disabled.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: [u8; 2] = [0x6, 0];

/// The device, given to this program.
pub struct Device {
    pub bar: Bar,
    through: Through,
}

/// By whom.
enum Through {
    /// uio_pci_generic knows INTx only, which it disables in configuration space each time it comes.
    Uio { file: File, config: File },
    /// vfio-pci masks INTx each time; messages need nothing.
    Vfio {
        device: VfioDevice,
        eventfd: EventFd,
        msi: bool,
    },
}

impl Device {
    /// Through uio_pci_generic.
    pub fn uio() -> io::Result<Self> {
        let name = pci::find()?;
        fs::write("/sys/bus/pci/drivers/uio_pci_generic/new_id", pci::IDS)?;
        let folder = format!("/sys/bus/pci/devices/{name}");
        let read_write = |path: &str| File::options().read(true).write(true).open(path);
        let config = read_write(&format!("{folder}/config"))?;
        config.write_all_at(&MEMORY_AND_MASTER, COMMAND)?;
        let bar = Bar::map(&read_write(&format!("{folder}/resource0"))?, 0)?;
        guest_init::wait_for("/dev/uio0")?;
        let file = read_write("/dev/uio0")?;
        Ok(Device {
            bar,
            through: Through::Uio { file, config },
        })
    }

    /// Through vfio-pci, and the container it is in. Interrupts are INTx at first.
    pub fn vfio() -> io::Result<(Self, Arc<VfioContainer>)> {
        let given = guest_init::give_to_vfio(pci::IDS)?;
        let path = format!("/sys/bus/pci/devices/{}", given.name);
        let container = Arc::new(VfioContainer::new(None).map_err(io::Error::other)?);
        let device = VfioDevice::new(Path::new(&path), container.clone(), false)
            .map_err(io::Error::other)?;
        device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &MEMORY_AND_MASTER, COMMAND);
        let offset = device.get_region_offset(VFIO_PCI_BAR0_REGION_INDEX);
        let bar = Bar::map(&device, offset)?;
        let eventfd = EventFd::new(0)?;
        device
            .enable_irq(VFIO_PCI_INTX_IRQ_INDEX, vec![&eventfd])
            .map_err(io::Error::other)?;
        let through = Through::Vfio {
            device,
            eventfd,
            msi: false,
        };
        Ok((Device { bar, through }, container))
    }

    /// From now on by messages.
    pub fn use_msi(&mut self) -> io::Result<()> {
        let Through::Vfio {
            device,
            eventfd,
            msi,
        } = &mut self.through
        else {
            return Err(io::Error::other("uio_pci_generic has no messages"));
        };
        *eventfd = EventFd::new(0)?;
        device
            .disable_irq(VFIO_PCI_INTX_IRQ_INDEX)
            .and_then(|()| device.enable_msi(vec![eventfd]))
            .map_err(io::Error::other)?;
        *msi = true;
        Ok(())
    }

    /// Waits for an interrupt. Whether one has come.
    pub fn wait(&mut self, deadline: Duration) -> io::Result<bool> {
        let fd = match &self.through {
            Through::Uio { file, .. } => file.as_raw_fd(),
            Through::Vfio { eventfd, .. } => eventfd.as_raw_fd(),
        };
        let mut poll = libc::pollfd {
            fd,
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
        // How many there were is not of interest.
        match &mut self.through {
            Through::Uio { file, .. } => file.read_exact(&mut [0; 4])?,
            Through::Vfio { eventfd, .. } => drop(eventfd.read()?),
        }
        Ok(true)
    }

    /// Lets the next one through, once the device does not ask for this one any more.
    pub fn rearm(&self) -> io::Result<()> {
        match &self.through {
            Through::Uio { config, .. } => config.write_all_at(&MEMORY_AND_MASTER, COMMAND),
            Through::Vfio { msi: true, .. } => Ok(()),
            Through::Vfio { device, .. } => device
                .unmask_irq(VFIO_PCI_INTX_IRQ_INDEX)
                .map_err(io::Error::other),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.through {
            Through::Uio { .. } => "INTx through uio_pci_generic",
            Through::Vfio { msi: false, .. } => "INTx through vfio-pci",
            Through::Vfio { msi: true, .. } => "MSI through vfio-pci",
        })
    }
}
