// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The AUB parser against a naive encoder, against every truncation and against random bytes.

use gvt_replay::aub::{PacketKind, Space, Trace, MAX_EVENTS};
use gvt_replay::{Contiguity, Error, Plan};
use proptest::prelude::*;

/// What the encoder writes.
#[derive(Clone, Debug)]
enum Wanted {
    Memory {
        space: Space,
        address: u64,
        data: Vec<u8>,
    },
    Write {
        register: u32,
        value: u32,
    },
    Poll {
        register: u32,
        mask: u32,
        expected: u32,
    },
}

fn packet(sub_opcode: u32, dwords: &[u32]) -> Vec<u8> {
    let header = 7 << 29 | 0x2e << 23 | sub_opcode << 16 | dwords.len() as u32;
    let all = std::iter::once(header).chain(dwords.iter().copied());
    all.flat_map(u32::to_le_bytes).collect()
}

fn version() -> Vec<u8> {
    packet(0x0e, &[1, 12 << 8, 0, 0, u32::from_le_bytes(*b"test")])
}

fn memory_packet(space: u32, address: u64, data: &[u8]) -> Vec<u8> {
    let mut padded = data.to_vec();
    padded.resize(data.len().next_multiple_of(4), 0);
    let mut dwords = vec![
        address as u32,
        (address >> 32) as u32,
        space << 28,
        data.len() as u32,
    ];
    dwords.extend(
        padded
            .chunks(4)
            .map(|d| u32::from_le_bytes([d[0], d[1], d[2], d[3]])),
    );
    packet(0x06, &dwords)
}

fn register_packet(sub_opcode: u32, register: u32, mask: u32, value: u32) -> Vec<u8> {
    packet(sub_opcode, &[register, 2 << 16, mask, 0, value])
}

fn encode(wanted: &[Wanted]) -> Vec<u8> {
    let mut file = version();
    for wanted in wanted {
        file.extend(match wanted {
            Wanted::Memory {
                space,
                address,
                data,
            } => {
                let space = match space {
                    Space::Ggtt => 0,
                    Space::Physical => 2,
                    Space::GgttEntries => 4,
                };
                memory_packet(space, *address, data)
            }
            Wanted::Write { register, value } => register_packet(3, *register, u32::MAX, *value),
            Wanted::Poll {
                register,
                mask,
                expected,
            } => register_packet(2, *register, *mask, *expected),
        });
    }
    file
}

fn parse(file: &[u8]) -> Result<Trace, Error> {
    Trace::from_bytes(file)
}

fn wanted() -> impl Strategy<Value = Wanted> {
    let data = || prop::collection::vec(any::<u8>(), 0..200);
    let entries = prop::collection::vec(any::<u64>(), 0..20).prop_map(|entries| {
        entries
            .iter()
            .flat_map(|e| e.to_le_bytes())
            .collect::<Vec<u8>>()
    });
    // 0x2xx is left to polls: submissions come in fours and have a test of their own.
    let register = (0u32..0x8000)
        .prop_map(|index| index * 4)
        .prop_filter("no port", |register| register & 0xfff != 0x230);
    prop_oneof![
        (0..(1u64 << 32) - 200, data()).prop_map(|(address, data)| Wanted::Memory {
            space: Space::Ggtt,
            address,
            data
        }),
        (0..(1u64 << 46) - 200, data()).prop_map(|(address, data)| Wanted::Memory {
            space: Space::Physical,
            address,
            data
        }),
        (0..(1u64 << 20) - 20, entries).prop_map(|(index, data)| Wanted::Memory {
            space: Space::GgttEntries,
            address: index * 8,
            data
        }),
        (register.clone(), any::<u32>())
            .prop_map(|(register, value)| Wanted::Write { register, value }),
        (register, any::<u32>(), any::<u32>()).prop_map(|(register, mask, expected)| {
            Wanted::Poll {
                register,
                mask,
                expected,
            }
        }),
    ]
}

proptest! {
    #[test]
    fn what_was_encoded_is_parsed(wanted in prop::collection::vec(wanted(), 0..30)) {
        let trace = parse(&encode(&wanted)).unwrap();
        prop_assert_eq!(trace.program(), "test");
        prop_assert_eq!(trace.packets().len(), wanted.len());
        for (packet, wanted) in trace.packets().iter().zip(wanted) {
            match (&packet.kind, wanted) {
                (
                    PacketKind::MemoryWrite { space, address, data },
                    Wanted::Memory { space: s, address: a, data: d },
                ) => {
                    prop_assert_eq!((*space, *address), (s, a));
                    prop_assert_eq!(trace.bytes(data), &d[..]);
                }
                (
                    PacketKind::RegisterWrite { register, value },
                    Wanted::Write { register: r, value: v },
                ) => prop_assert_eq!((*register, *value), (r, v)),
                (
                    PacketKind::RegisterPoll { register, mask, expected },
                    Wanted::Poll { register: r, mask: m, expected: e },
                ) => prop_assert_eq!((*register, *mask, *expected), (r, m, e)),
                (kind, wanted) => prop_assert!(false, "{:?} for {:?}", kind, wanted),
            }
        }
    }

    #[test]
    fn a_truncated_file_is_an_error_or_a_prefix(wanted in prop::collection::vec(wanted(), 0..8)) {
        let file = encode(&wanted);
        let whole = parse(&file).unwrap();
        let ends: Vec<u64> = whole.packets().iter().map(|p| p.offset).chain([whole.len()]).collect();
        for len in 0..file.len() {
            match parse(&file[..len]) {
                Ok(prefix) => {
                    prop_assert!(ends.contains(&(len as u64)));
                    prop_assert_eq!(prefix.packets(), &whole.packets()[..prefix.packets().len()]);
                }
                Err(Error::NotAub | Error::Truncated { .. }) => {
                    prop_assert!(!ends.contains(&(len as u64)));
                }
                Err(error) => prop_assert!(false, "{} bytes: {}", len, error),
            }
        }
    }

    #[test]
    fn random_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        packets in prop::collection::vec((0u32..16, prop::collection::vec(any::<u32>(), 0..12)), 0..10),
    ) {
        let _ = parse(&bytes);
        let mut file = version();
        file.extend(&bytes);
        let _ = parse(&file);
        let mut file = version();
        for (sub_opcode, dwords) in packets {
            file.extend(packet(sub_opcode, &dwords));
        }
        let _ = parse(&file);
    }

    /// Recorded files with bytes changed, followed until nothing is left to plan.
    #[test]
    fn a_damaged_recording_never_panics(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
    ) {
        let mut file = plain(include_bytes!("../data/h264-vcs-skl.aub.xz"));
        for (at, value) in damage {
            let at = at.index(file.len());
            file[at] = value;
        }
        let profile = Contiguity::bundled("churned").unwrap();
        let _ = parse(&file).and_then(|trace| Plan::new(&trace, &profile));
    }
}

fn plain(stored: &[u8]) -> Vec<u8> {
    gvt_replay::decompress::decompress(stored, 1 << 30).unwrap()
}

fn error_of(packet: &[u8]) -> (String, u64) {
    let mut file = version();
    let offset = file.len() as u64;
    file.extend(packet);
    (parse(&file).unwrap_err().to_string(), offset)
}

#[test]
fn each_wrong_packet_is_named_with_its_offset() {
    let mut wrong_length = memory_packet(2, 0, &[1, 2, 3, 4]);
    wrong_length[16] = 5;
    let mut wrong_size = register_packet(3, 0x2000, u32::MAX, 0);
    wrong_size[8..12].copy_from_slice(&(3u32 << 16).to_le_bytes());
    for (packet, message) in [
        (packet(0x05, &[0; 4]), "unknown packet header"),
        (version(), "unknown packet header"),
        (vec![0; 4], "unknown packet header"),
        (packet(0x06, &[0; 2]), "a memory write packet of 3 dwords"),
        (
            wrong_length,
            "a memory write packet of 6 dwords, 7 are needed",
        ),
        (memory_packet(2, u64::MAX - 2, &[0; 4]), "out of range"),
        (memory_packet(2, (1 << 46) - 2, &[0; 4]), "out of range"),
        (memory_packet(0, (1 << 32) - 2, &[0; 4]), "out of range"),
        (memory_packet(4, 8 << 20, &[0; 8]), "out of range"),
        (memory_packet(4, 4, &[0; 8]), "out of range"),
        (memory_packet(4, 8, &[0; 4]), "out of range"),
        (
            memory_packet(1, 0, &[0; 4]),
            "the address space is 0x10000000",
        ),
        (wrong_size, "the register size is 0x30000"),
        (
            register_packet(3, 0x2000, 0xffff, 0),
            "the write mask is 0xffff",
        ),
        (
            register_packet(3, 0x2002, u32::MAX, 0),
            "the register offset is 0x2002",
        ),
        (
            register_packet(2, 1 << 24, 1, 0),
            "the register offset is 0x1000000",
        ),
        (packet(0x03, &[0; 4]), "a register write packet of 5 dwords"),
        (
            packet(0x06, &[0, 0, 2 << 28, 4096])[..20].to_vec(),
            "5 dwords, 1029 are needed",
        ),
        (
            memory_packet(2, 0, &[0; 8])[..24].to_vec(),
            "truncated, the packet needs 28 bytes and 24",
        ),
    ] {
        let (error, offset) = error_of(&packet);
        assert!(error.contains(message), "{message:?}: {error}");
        assert!(
            error.starts_with(&format!("byte offset {offset} of")),
            "{error}"
        );
    }
}

#[test]
fn a_submission_that_is_cut_off_is_named() {
    for dwords in 1..4 {
        let (error, offset) = error_of(&register_packet(3, 0x12230, u32::MAX, 0).repeat(dwords));
        assert!(
            error.starts_with(&format!("byte offset {offset} of ")),
            "{error}"
        );
        assert!(
            error.contains(&format!("after {dwords} of the 4 dwords")),
            "{error}"
        );
    }
    let mut file = version();
    file.extend(register_packet(3, 0x2230, u32::MAX, 0).repeat(8));
    assert_eq!(parse(&file).unwrap().packets().len(), 8);
}

#[test]
fn what_is_not_an_aub_file_is_refused() {
    let not_first = register_packet(3, 0x2000, u32::MAX, 0);
    for file in [
        &b""[..],
        b"\0",
        b"ELF, or whatever",
        &not_first,
        &version()[..2],
    ] {
        assert!(matches!(parse(file), Err(Error::NotAub)), "{file:?}");
    }
    assert!(matches!(
        parse(&version()[..9]),
        Err(Error::Truncated { offset: 0, .. })
    ));
    let other_version = packet(0x0e, &[2, 12 << 8, 0, 0]);
    assert!(parse(&other_version)
        .unwrap_err()
        .to_string()
        .contains("file version is 0x2"));
    let other_gpu = packet(0x0e, &[1, 11 << 8, 0, 0]);
    assert!(parse(&other_gpu)
        .unwrap_err()
        .to_string()
        .contains("device is 0xb"));
}

#[test]
fn the_recordings_are_read_to_their_end() {
    let counts = |stored: &[u8]| {
        let trace = Trace::from_bytes(stored).unwrap();
        let plan = Plan::new(&trace, &Contiguity::bundled("consecutive").unwrap()).unwrap();
        (
            trace.packets().len(),
            plan.submissions(),
            plan.contexts().len(),
        )
    };
    assert_eq!(
        counts(include_bytes!("../data/glmark2-skl.aub.xz")),
        (2191, 202, 34)
    );
    assert_eq!(
        counts(include_bytes!("../data/ncnn-vulkan-skl.aub.xz")),
        (148, 6, 1)
    );
    assert_eq!(
        counts(include_bytes!("../data/h264-vcs-skl.aub.xz")),
        (295, 30, 1)
    );
}

fn plan_error(packets: &[Vec<u8>]) -> String {
    let file: Vec<u8> = std::iter::once(version())
        .chain(packets.iter().cloned())
        .flatten()
        .collect();
    let profile = Contiguity::bundled("consecutive").unwrap();
    let planned = parse(&file).and_then(|trace| Plan::new(&trace, &profile));
    planned.unwrap_err().to_string()
}

fn submission(second: u32, descriptor: u32) -> Vec<u8> {
    [0, second, 0, descriptor]
        .iter()
        .flat_map(|dword| register_packet(3, 0x12230, u32::MAX, *dword))
        .collect()
}

#[test]
fn what_the_replay_does_not_do_is_refused_with_its_offset() {
    let ggtt: Vec<u8> = [0x1001u64, 0x2001, 0x3001]
        .iter()
        .flat_map(|e| e.to_le_bytes())
        .collect();
    let ggtt = || memory_packet(4, 0, &ggtt);
    let huge = memory_packet(2, 0, &(0x8000_0081u64).to_le_bytes());
    let chain =
        |level: u64| memory_packet(2, level << 12, &(((level + 1) << 12) | 3).to_le_bytes());
    for (packets, message) in [
        (vec![], "without a submission"),
        (
            vec![memory_packet(0, 0x1000, &[1])],
            "graphics address 0x1000 has no GGTT entry",
        ),
        (
            vec![ggtt(), submission(1, 0x119)],
            "second context descriptor",
        ),
        (
            vec![ggtt(), submission(0, 0x118)],
            "the context descriptor is 0x118",
        ),
        (
            vec![ggtt(), submission(0, 0x109)],
            "the context descriptor is 0x109",
        ),
        (
            vec![ggtt(), submission(0, 0xffff_f119)],
            "graphics address 0x100000000 has no GGTT",
        ),
        (
            vec![memory_packet(2, 0, &[3]), submission(0, 0x119)],
            "0x1000 has no GGTT entry",
        ),
        (
            vec![
                ggtt(),
                memory_packet(2, 0x20c4, &[0xff; 4]),
                submission(0, 0x119),
            ],
            "page table root",
        ),
        (
            vec![
                ggtt(),
                chain(0),
                chain(1),
                memory_packet(2, 0x2000, &(0x8083u64).to_le_bytes()),
                submission(0, 0x119),
            ],
            "larger than 4 KiB",
        ),
        (
            vec![huge, memory_packet(4, 0, &u64::MAX.to_le_bytes())],
            "without a submission",
        ),
    ] {
        let error = plan_error(&packets);
        assert!(error.contains(message), "{message:?}: {error}");
        assert!(error.starts_with("byte offset "), "{error}");
    }
}

#[test]
fn a_trace_that_names_more_pages_than_the_guest_has_is_refused() {
    let mut entries = Vec::new();
    for index in 0..200_000u64 {
        entries.extend((index << 12 | 1).to_le_bytes());
    }
    let packets: Vec<Vec<u8>> = (0..)
        .step_by(128 << 10)
        .zip(entries.chunks(128 << 10))
        .map(|(address, chunk)| memory_packet(4, address, chunk))
        .collect();
    let error = plan_error(&packets);
    assert!(error.contains("needs more than the guest's"), "{error}");
}

#[test]
fn a_small_file_does_not_fill_the_memory() {
    let write = register_packet(3, 0x9998, 0xffff_ffff, 0);
    let mut file = version();
    file.extend(
        write
            .iter()
            .copied()
            .cycle()
            .take(write.len() * (MAX_EVENTS + 1)),
    );
    let last = file.len() - write.len();
    let error = parse(&file).unwrap_err().to_string();
    let expected =
        format!("byte offset {last} of the decompressed trace: more than 1048576 packets");
    assert!(error.starts_with(&expected), "{error}");

    // One packet of the largest size writes 8 191 entries of the GGTT.
    let mut file = plain(include_bytes!("../data/h264-vcs-skl.aub.xz"));
    let entries = memory_packet(4, 0, &[0; 8 * 8191]);
    file.extend(
        entries
            .iter()
            .copied()
            .cycle()
            .take(entries.len() * (MAX_EVENTS / 8191 + 2)),
    );
    let profile = Contiguity::bundled("consecutive").unwrap();
    let error = Plan::new(&parse(&file).unwrap(), &profile)
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("more than 1048576 packets or table entries"),
        "{error}"
    );
}
