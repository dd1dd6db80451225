// Copyright (c) the vfio-dma authors.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The replay example as a program: exit statuses, what goes to stdout and stderr, JSON.

#[path = "../crates/page-pin/tests/common/deadline.rs"]
mod deadline;
mod example;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use deadline::{must_end, output};
use serde_json::Value;

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/crates/gvt-replay/data");

fn example() -> &'static Path {
    static EXAMPLE: OnceLock<PathBuf> = OnceLock::new();
    EXAMPLE.get_or_init(|| example::example("replay"))
}

fn replay(args: &[&str]) -> Output {
    let mut program = Command::new(example());
    program.args(args);
    output(program)
}

fn recording(name: &str) -> String {
    format!("{DATA}/{name}-skl.aub.xz")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A file that is removed again.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, contents: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("replay-cli-{}-{name}", std::process::id()));
        fs::write(&path, contents).unwrap();
        Scratch(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn json_is_one_object_with_the_published_figures() {
    let output = replay(&["--json"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
    let report = json(&output);
    assert_eq!(report["workloads"], 202);
    assert_eq!(report["contexts"], 34);
    assert_eq!(report["verified"], true);
    let modes = report["modes"].as_object().unwrap();
    assert_eq!(modes.keys().collect::<Vec<_>>(), ["page", "run", "skip"]);
    for (mode, reads, writes) in [("page", 3360, 4040), ("run", 168, 202), ("skip", 34, 202)] {
        assert_eq!(modes[mode]["context_page"]["reads"], reads);
        assert_eq!(modes[mode]["context_page"]["writes"], writes);
        assert_eq!(modes[mode]["context_page"]["written_bytes"], 16_547_840);
        assert_eq!(modes[mode]["page_table"]["reads"], 24_202);
        assert_eq!(modes[mode]["completion"]["writes"], 1414);
        for kind in ["context_dword", "ring", "page1"] {
            assert!(modes[mode][kind]["read_bytes"].is_u64(), "{mode} {kind}");
        }
    }
    assert_eq!(report["expected"], report["modes"]);
    let contiguity = report["contiguity"].as_array().unwrap();
    assert_eq!(contiguity.len(), 5);
    assert!(contiguity
        .iter()
        .all(|figures| figures["memory_as_expected"] == true));
    assert_eq!(report["trace"], "glmark2-skl.aub.xz");
    assert_eq!(report["bundled"], true);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("\"verified\"").count(), 1);
}

#[test]
fn the_verdict_comes_first_and_the_known_figures_are_shown() {
    let output = replay(&["--mode", "page", "--inject", "lose-tail"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let head = "glmark2-skl.aub.xz, bundled (PCI-ID=0x1912 glmark2-es2-gbm)\nverified: false\n";
    assert!(text.starts_with(head), "{text}");
    assert!(text.contains("expected:"));
    assert_eq!(text.matches("the same").count(), 7, "{text}");
    assert!(!text.contains("NOT"));
}

#[test]
fn text_shows_each_mode_and_the_verdict() {
    let output = replay(&[&recording("ncnn-vulkan"), "--profile", "as-found"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "6 workloads of 1 context on 1 vGPU",
        "mode page",
        "mode run",
        "mode skip",
        "recycled",
        "page/run",
        "Made up by the recorder",
        "verified: true",
    ] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
    assert!(
        !text.contains("expected:"),
        "nothing is known beforehand:\n{text}"
    );
    assert!(text.lines().all(|line| line.len() <= 110), "{text}");
}

#[test]
fn a_recording_without_context_pages_has_no_contiguity_table() {
    let output = replay(&[&recording("h264-vcs"), "--mode", "run"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("copies no context pages"), "{text}");
    assert!(
        !text.contains("recycled") && !text.contains("page/run"),
        "{text}"
    );
}

#[test]
fn a_profile_of_ones_own_is_compared_with_the_bundled_ones() {
    let profile = Scratch::new("own.csv", b"5,15\n\n10,10\n");
    let ncnn = recording("ncnn-vulkan");
    let own = ["--profile", profile.path(), "--mode", "run"];
    let output = replay(&[&[ncnn.as_str(), "--json"], &own[..]].concat());
    let report = json(&output);
    assert_eq!(report["profile"], profile.path());
    assert_eq!(report["bundled"], false);
    assert_eq!(report["expected"], Value::Null);
    let figures = report["contiguity"].as_array().unwrap();
    assert_eq!(figures.len(), 6);
    assert_eq!(figures[0]["profile"], profile.path());
    assert_eq!(figures[0]["pages_per_write"], 10.0);
    assert_eq!(figures[0]["memory_as_expected"], true);
}

#[test]
fn one_mode_and_more_vgpus() {
    let output = replay(&[
        &recording("ncnn-vulkan"),
        "--mode",
        "skip",
        "--vgpus",
        "2",
        "--json",
    ]);
    assert_eq!(output.status.code(), Some(0));
    let report = json(&output);
    assert_eq!(report["workloads"], 12);
    assert_eq!(report["contexts"], 2);
    assert_eq!(report["modes"].as_object().unwrap().len(), 1);
    assert_eq!(
        report["modes"]["skip"]["page_table"]["reads"],
        2 * (26_624 + 1480)
    );
}

#[test]
fn vgpus_share_a_gpu_by_weight() {
    let h264 = recording("h264-vcs");
    let output = replay(&[&h264, "--vgpus", "2", "--weights", "2,1", "--json"]);
    assert_eq!(output.status.code(), Some(0));
    let report = json(&output);
    assert_eq!(report["vgpus"], 2);
    assert_eq!(report["verified"], true);
    assert_eq!(report["differences"]["side-by-side"], Value::Array(vec![]));
    let shares = report["shares"].as_array().unwrap();
    assert_eq!(shares.len(), 2);
    for (vgpu, expected) in [2.0 / 3.0, 1.0 / 3.0].into_iter().enumerate() {
        let share = &shares[vgpu];
        assert_eq!(
            (&share["vgpu"], &share["fair"]),
            (&vgpu.into(), &true.into())
        );
        let had = share["share"].as_f64().unwrap();
        assert!((had - expected).abs() < 0.05 * expected, "{share}");
        assert!(share["workloads"].as_u64().unwrap() > 30, "{share}");
        assert!(share["longest_wait_ns"].as_u64().unwrap() < 200_000_000);
        assert_eq!(share["recording"], h264);
    }
    // One vGPU for each weight, also where their number is not given.
    let text = String::from_utf8(replay(&[&h264, "--weights", "1,1,2"]).stdout).unwrap();
    assert_eq!(text.matches("  fair  ").count(), 3, "{text}");
    assert!(text.contains("on 3 vGPUs"), "{text}");
}

#[test]
fn shares_are_not_there_without_weights() {
    let report = json(&replay(&[
        &recording("h264-vcs"),
        "--mode",
        "run",
        "--json",
    ]));
    assert_eq!(report["shares"], Value::Null);
    assert_eq!(report["trace_check"], Value::Null);
}

#[test]
fn a_trace_of_the_accesses_is_written_and_compared() {
    let file = Scratch::new("accesses.trace", b"");
    let ncnn = recording("ncnn-vulkan");
    let traced = |args: &[&str]| replay(&[&[ncnn.as_str(), "--json"], args].concat());
    let written = traced(&["--mode", "run", "--trace", file.path()]);
    assert_eq!(written.status.code(), Some(0));
    let run = &json(&written)["modes"]["run"];
    let kinds = run.as_object().unwrap().values();
    let calls =
        kinds.map(|kind| kind["reads"].as_u64().unwrap() + kind["writes"].as_u64().unwrap());
    let calls: u64 = calls.sum();
    assert_eq!(fs::read(&file.0).unwrap().len() as u64, 24 + 24 * calls);

    let same = traced(&["--mode", "run", "--check-trace", file.path()]);
    assert_eq!(same.status.code(), Some(0));
    let check = &json(&same)["trace_check"];
    assert_eq!(
        (&check["same"], &check["accesses"]),
        (&true.into(), &calls.into())
    );

    // Page by page there are other accesses, in guest memory that is as it must be.
    let other = traced(&["--mode", "page", "--check-trace", file.path()]);
    assert_eq!(other.status.code(), Some(1));
    let report = json(&other);
    assert_eq!(report["verified"], true);
    let difference = &report["trace_check"]["first_difference"];
    let expected = difference["expected"].as_str().unwrap();
    let made = difference["made"].as_str().unwrap();
    assert!(
        expected.ends_with(" 81920") && made.ends_with(" 4096"),
        "{difference}"
    );

    let over = refused(&[&ncnn, "--check-trace", file.path(), "--trace", file.path()]);
    assert!(over.contains("--trace would write over"), "{over}");
    let none = refused(&[&ncnn, "--check-trace", &ncnn]);
    assert!(none.contains("no trace of accesses"), "{none}");
}

#[test]
fn every_fault_ends_unverified() {
    for fault in ["lose-tail", "swap-pages", "stale-skip"] {
        for profile in ["consecutive", "as-found"] {
            let output = replay(&["--inject", fault, "--profile", profile, "--json"]);
            assert_eq!(output.status.code(), Some(1), "{fault} {profile}");
            let report = json(&output);
            assert_eq!(report["verified"], false);
            assert_eq!(report["injected"], fault);
            let first = &report["differences"]["run"][0];
            assert_eq!(first["vgpu"], 0);
            assert!(first["page"].is_u64());
            for address in ["gpa", "context"] {
                assert!(
                    first[address].as_str().unwrap().starts_with("0x"),
                    "{first}"
                );
            }
        }
    }
}

#[test]
fn accesses_are_dumped_one_a_line() {
    let file = Scratch::new("dump", b"");
    let trace = recording("h264-vcs");
    let output = replay(&[
        &trace,
        "--mode",
        "run",
        "--json",
        "--dump-accesses",
        file.path(),
    ]);
    assert_eq!(output.status.code(), Some(0));
    let report = json(&output);
    let kinds = report["modes"]["run"].as_object().unwrap();
    let calls = |member| {
        kinds
            .values()
            .map(|k| k[member].as_u64().unwrap())
            .sum::<u64>()
    };
    let dump = fs::read_to_string(&file.0).unwrap();
    assert_eq!(
        dump.lines().count() as u64,
        calls("reads") + calls("writes")
    );
    for line in dump.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [vgpu, mode, submission, kind, direction, gpa, len] = fields[..] else {
            panic!("{line}");
        };
        assert_eq!((vgpu, mode), ("0", "run"));
        assert!(submission.parse::<u64>().unwrap() < 30);
        assert!(kinds.contains_key(kind));
        assert!(["R", "W"].contains(&direction));
        assert!(u64::from_str_radix(gpa.strip_prefix("0x").unwrap(), 16).is_ok());
        assert!(len.parse::<u64>().unwrap() > 0);
    }
}

/// Status 2, nothing on stdout, and one line on stderr, which is returned.
fn refused(args: &[&str]) -> String {
    let output = replay(args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert!(output.stdout.is_empty(), "{args:?}");
    assert_eq!(error.lines().count(), 1, "{args:?}: {error}");
    error
}

#[test]
fn wrong_traces_are_refused_in_one_line_with_an_offset() {
    let whole = fs::read(recording("h264-vcs")).unwrap();
    let cut = Scratch::new("cut.aub.xz", &whole[..whole.len() / 2]);
    let text = Scratch::new("text.aub", b"this is no recording");
    let empty = Scratch::new("empty.aub", b"");
    let gzip = Scratch::new("bad.aub.gz", &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xff]);
    // A version packet, then an unknown one.
    let packets: Vec<u8> = [0xf70e_0003u32, 1, 12 << 8, 0, 0xf705_0000]
        .iter()
        .flat_map(|dword| dword.to_le_bytes())
        .collect();
    let unknown = Scratch::new("unknown.aub", &packets);
    let truncated = Scratch::new("truncated.aub", &packets[..10]);
    for (file, of) in [
        (&cut, "of the compressed file"),
        (&gzip, "of the compressed file"),
        (&text, "of the decompressed trace"),
        (&empty, "of the decompressed trace"),
        (&unknown, "of the decompressed trace"),
        (&truncated, "of the decompressed trace"),
    ] {
        let error = refused(&[file.path()]);
        let head = format!("error: {}: byte offset ", file.path());
        assert!(error.starts_with(&head) && error.contains(of), "{error}");
    }
    assert!(refused(&[unknown.path()]).contains("byte offset 16 of"));
    let odd = Scratch::new("odd\n\u{1b}[31m.aub", b"this is no recording");
    assert!(refused(&[odd.path()]).contains("odd\\n\\u{1b}[31m.aub: byte offset 0 of"));
    assert!(refused(&["/nonexistent.aub"]).contains("/nonexistent.aub"));
}

#[test]
fn a_file_that_is_read_is_not_written_over() {
    let trace = Scratch::new("in.aub.xz", &fs::read(recording("h264-vcs")).unwrap());
    let link = Scratch(
        trace
            .0
            .with_file_name(format!("link-{}", std::process::id())),
    );
    fs::hard_link(&trace.0, &link.0).unwrap();
    let profile = Scratch::new("in.csv", b"20\n");
    let before = [&trace, &profile].map(|file| fs::read(&file.0).unwrap());
    for output in [trace.path(), link.path(), profile.path()] {
        let args = [
            trace.path(),
            "--profile",
            profile.path(),
            "--dump-accesses",
            output,
        ];
        let error = refused(&args);
        assert!(
            error.contains(output) && error.contains("write over"),
            "{error}"
        );
    }
    assert_eq!(
        [&trace, &profile].map(|file| fs::read(&file.0).unwrap()),
        before
    );
}

#[test]
fn wrong_arguments_are_refused_in_one_line() {
    let profile = Scratch::new("profile.csv", b"20\n\n4,4\n");
    let error = refused(&["--profile", profile.path()]);
    let place = format!("error: profile {}, line 3, column 4: ", profile.path());
    assert!(error.starts_with(&place), "{error}");
    let error = refused(&["--profile", "as-fond"]);
    assert!(
        error.contains("consecutive, fresh, as-found, churned, recycled"),
        "{error}"
    );
    for (args, said) in [
        (&["--profile", ""][..], "a value is required for '--profile"),
        (
            &["--mode", "fast"],
            "possible values: page, run, skip]; see --help",
        ),
        (&["--inject", "nothing"], "lose-tail"),
        (&["--vgpus", "0"], "; see --help"),
        (&["--weights", "2,17"], "a weight is one of 1 to 16"),
        (&["--weights", ""], "; see --help"),
        (
            &["--vgpus", "3", "--weights", "2,1"],
            "--vgpus 3 and 2 weights: there must be one for each; see --help",
        ),
        (
            &["--unknown"],
            "'--unknown' found; tip: to pass '--unknown' as a value, use '-- --unknown'; see --help",
        ),
        (&["one", "two\nthree"], "; see --help"),
    ] {
        let error = refused(args);
        assert!(error.contains(said), "{args:?}: {error}");
    }
    let h264 = recording("h264-vcs");
    refused(&[&h264, "--inject", "lose-tail"]);
    refused(&[&h264, "--dump-accesses", "/nonexistent/dump"]);
}

#[test]
fn help_is_no_error() {
    let output = replay(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout)
        .unwrap()
        .contains("--dump-accesses"));
    let version = replay(&["--version"]);
    assert_eq!(version.status.code(), Some(0));
    let text = String::from_utf8(version.stdout).unwrap();
    assert_eq!(text, concat!("replay ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = Command::new(example())
        .arg(recording("ncnn-vulkan"))
        .args(["--mode", "run"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = must_end("a program whose output nobody reads", || {
        child.wait_with_output().unwrap()
    });
    assert_eq!(output.status.code(), Some(0));
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
