// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What both ends tell each other when they negotiate the version.

use iommu_type1::page_size;
use serde_json::{json, Value};

use crate::{Error, Result};

/// Most bytes of data in one message unless told otherwise.
pub const MAX_DATA_XFER_SIZE: u32 = 1 << 20;

/// Most mappings, and the smallest page, of an end that does not say; QEMU takes less and larger only.
const MAX_DMA_MAPS: u32 = 65535;
const PGSIZES: u64 = 4096;

/// Most bytes of capabilities that are looked at.
pub(crate) const TEXT_LIMIT: usize = 4096;

/// What one end of a connection can take.
///
/// ```
/// use vfio_user_dma::Capabilities;
///
/// let text = br#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":65536}}"#;
/// let capabilities = Capabilities::parse(text)?;
/// assert_eq!((capabilities.max_msg_fds, capabilities.max_data_xfer_size), (16, 65536));
/// # Ok::<(), vfio_user_dma::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// File descriptors in one message.
    pub max_msg_fds: u32,
    /// Bytes of data in one message.
    pub max_data_xfer_size: u32,
    /// Page sizes of maps, a bit each.
    pub pgsizes: u64,
    /// Mappings at a time.
    pub max_dma_maps: u32,
    /// Page size of dirty bitmaps, of an end that migrates. A [`Server`](crate::Server) does not.
    pub migration_pgsize: Option<u64>,
}

impl Default for Capabilities {
    /// Of an end that says nothing.
    fn default() -> Self {
        Capabilities {
            max_msg_fds: 1,
            max_data_xfer_size: MAX_DATA_XFER_SIZE,
            pgsizes: PGSIZES,
            max_dma_maps: MAX_DMA_MAPS,
            migration_pgsize: None,
        }
    }
}

impl Capabilities {
    /// Reads them from JSON text, with or without the NUL behind it. What is missing has its default,
    /// what is not known is passed over.
    ///
    /// # Errors
    ///
    /// [`Error::Malformed`]: too long, not JSON, not an object, a value of a wrong type or 0.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let mut capabilities = Capabilities::default();
        let text = text.strip_suffix(b"\0").unwrap_or(text);
        if text.is_empty() {
            return Ok(capabilities);
        }
        if text.len() > TEXT_LIMIT {
            return Err(Error::Malformed("the capabilities are too long"));
        }
        let json: Value = serde_json::from_slice(text)
            .map_err(|_| Error::Malformed("the capabilities are not JSON"))?;
        let of = object(Some(&json))?.and_then(|json| json.get("capabilities"));
        let Some(of) = object(of)? else {
            return Ok(capabilities);
        };
        if let Some(fds) = of.get("max_msg_fds") {
            capabilities.max_msg_fds = number(fds)?;
        }
        if let Some(size) = of.get("max_data_xfer_size") {
            capabilities.max_data_xfer_size = number(size)?;
        }
        if capabilities.max_data_xfer_size == 0 {
            return Err(Error::Malformed("max_data_xfer_size is 0"));
        }
        if let Some(maps) = of.get("max_dma_maps") {
            capabilities.max_dma_maps = number(maps)?;
        }
        if let Some(pgsizes) = of.get("pgsizes") {
            let pgsizes = pgsizes.as_u64();
            capabilities.pgsizes = pgsizes.ok_or(Error::Malformed("pgsizes is not a number"))?;
        }
        if let Some(migration) = object(of.get("migration"))? {
            let pgsize = migration.get("pgsize").map(number).transpose()?;
            capabilities.migration_pgsize = Some(pgsize.map_or(page_size(), u64::from));
        }
        Ok(capabilities)
    }

    /// As JSON text with the NUL behind it. More mappings than clients take for granted are not promised.
    pub fn to_text(&self) -> Vec<u8> {
        let mut of = json!({
            "max_msg_fds": self.max_msg_fds,
            "max_data_xfer_size": self.max_data_xfer_size,
        });
        if self.max_dma_maps < MAX_DMA_MAPS {
            of["max_dma_maps"] = json!(self.max_dma_maps);
        }
        if self.pgsizes != PGSIZES {
            of["pgsizes"] = json!(self.pgsizes);
        }
        if let Some(pgsize) = self.migration_pgsize {
            of["migration"] = json!({ "pgsize": pgsize });
        }
        let json = json!({ "capabilities": of });
        let mut text = json.to_string().into_bytes();
        text.push(0);
        text
    }
}

fn object(value: Option<&Value>) -> Result<Option<&serde_json::Map<String, Value>>> {
    let Some(value) = value else { return Ok(None) };
    let object = value.as_object();
    object.map_or(
        Err(Error::Malformed("a capability is not an object")),
        |object| Ok(Some(object)),
    )
}

fn number(value: &Value) -> Result<u32> {
    let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
    number.ok_or(Error::Malformed("a capability is not a number"))
}
