// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Traces as they lie on disk: plain, xz or gzip, told apart by their first bytes.

use std::io::{self, Read};

use flate2::bufread::MultiGzDecoder;
use lzma_rust2::{Action, Status, XzStream};

use crate::error::{Error, Result};

const XZ_MAGIC: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];

/// Memory an xz stream may ask its decoder for, in KiB: twice the dictionary of `xz -9`.
const XZ_MEMORY_KIB: u32 = 128 << 10;

/// Returns the plain bytes of `stored`, which may be plain, xz or gzip.
///
/// # Errors
///
/// [`Error::Compressed`] if the stream is damaged, with the place its decoder has come to;
/// [`Error::TooLarge`] as soon as there are more than `limit` plain bytes, however small the stream
/// that makes them.
///
/// ```
/// use gvt_replay::decompress::decompress;
///
/// assert_eq!(decompress(b"plain", 100)?, b"plain");
/// assert!(decompress(b"plain", 4).is_err());
/// assert!(decompress(&[0x1f, 0x8b, 8, 0], 100).is_err());
/// # Ok::<(), gvt_replay::Error>(())
/// ```
pub fn decompress(stored: &[u8], limit: u64) -> Result<Vec<u8>> {
    let damaged = |offset: u64, source| Error::Compressed { offset, source };
    let plain = if stored.starts_with(XZ_MAGIC) {
        let mut decoder = XzDecoder {
            stream: XzStream::new_mem_limit(true, XZ_MEMORY_KIB),
            rest: stored,
        };
        read_to_limit(&mut decoder, limit)
            .map_err(|source| damaged(decoder.stream.total_in(), source))?
    } else if stored.starts_with(GZIP_MAGIC) {
        let mut decoder = MultiGzDecoder::new(stored);
        read_to_limit(&mut decoder, limit)
            .map_err(|source| damaged((stored.len() - decoder.get_ref().len()) as u64, source))?
    } else {
        stored.to_vec()
    };
    if plain.len() as u64 > limit {
        return Err(Error::TooLarge { limit });
    }
    Ok(plain)
}

/// Reads at most one byte more than `limit`, so that the caller sees when there are too many.
fn read_to_limit(reader: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut plain = Vec::new();
    reader
        .take(limit.saturating_add(1))
        .read_to_end(&mut plain)?;
    Ok(plain)
}

/// An xz decoder that knows how far it has come: unlike `XzReader`, which takes in 64 KiB at once.
struct XzDecoder<'a> {
    stream: XzStream,
    rest: &'a [u8],
}

impl Read for XzDecoder<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let step = self.stream.process(self.rest, buf, Action::Finish)?;
            self.rest = self.rest.get(step.bytes_consumed..).unwrap_or_default();
            if step.bytes_produced > 0 || step.status == Status::StreamEnd {
                return Ok(step.bytes_produced);
            }
            if step.bytes_consumed == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::write::GzEncoder;
    use flate2::Compression;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    const XZ: &[u8] = include_bytes!("../data/h264-vcs-skl.aub.xz");

    #[test]
    fn plain_xz_and_gzip_give_the_same_bytes() {
        let plain = decompress(XZ, 1 << 20).unwrap();
        assert_eq!(plain.len(), 149_876);
        assert_eq!(decompress(&gzip(&plain), 1 << 20).unwrap(), plain);
        assert_eq!(decompress(&plain, 1 << 20).unwrap(), plain);
    }

    #[test]
    fn every_cut_of_a_compressed_trace_is_an_error() {
        for len in XZ_MAGIC.len()..XZ.len() {
            let error = decompress(&XZ[..len], 1 << 20).unwrap_err();
            assert!(
                matches!(error, Error::Compressed { offset, .. } if offset <= len as u64),
                "{len}: {error}"
            );
        }
        let gz = gzip(&[7; 1000]);
        for len in GZIP_MAGIC.len()..gz.len() {
            assert!(decompress(&gz[..len], 1 << 20).is_err(), "{len}");
        }
    }

    #[test]
    fn damage_is_reported_where_the_decoder_stands_and_not_at_the_end() {
        let xz = include_bytes!("../data/glmark2-skl.aub.xz").to_vec();
        let gz = gzip(&decompress(&xz, 1 << 23).unwrap());
        for mut stored in [xz, gz] {
            let damage = stored.len() / 4;
            stored[damage..damage + 64].fill(0xff);
            match decompress(&stored, 1 << 23).unwrap_err() {
                Error::Compressed { offset, .. } => {
                    let near = damage as u64..stored.len() as u64 / 2;
                    assert!(near.contains(&offset), "{offset} is not in {near:?}");
                }
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_compression_bomb_stops_at_the_limit() {
        let mut bomb = gzip(&vec![0; 16 << 20]);
        assert!(bomb.len() < 32 << 10);
        // Who reads on past the limit comes to the missing end.
        bomb.truncate(bomb.len() - 8);
        let error = decompress(&bomb, 1 << 20).unwrap_err();
        assert!(matches!(error, Error::TooLarge { limit } if limit == 1 << 20));
    }

    #[test]
    fn a_hostile_dictionary_size_is_refused() {
        // The dictionary size byte of the first LZMA2 block (40 = 4 GiB - 1), header CRC redone.
        let mut hostile = XZ.to_vec();
        let header_len = (usize::from(hostile[12]) + 1) * 4;
        let filter = hostile[12..12 + header_len]
            .windows(2)
            .position(|pair| pair == [0x21, 0x01])
            .unwrap();
        hostile[12 + filter + 2] = 40;
        let crc_at = 12 + header_len - 4;
        let mut crc = flate2::Crc::new();
        crc.update(&hostile[12..crc_at]);
        hostile[crc_at..crc_at + 4].copy_from_slice(&crc.sum().to_le_bytes());
        assert!(decompress(&hostile, 1 << 20).is_err());
    }
}
