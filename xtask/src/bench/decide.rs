//! What one route decision costs: time by `cargo bench`, instructions by valgrind's callgrind, which counts the same on every machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::judges::install;
use crate::run;

/// Cases of the benchmark (variable `CASE`), and what they are.
const CASES: &[(&str, &str)] = &[
    ("hosts", "one of 5,000 routes on 1,000 hosts"),
    ("paths", "one of 5,000 exact paths of one host"),
];

/// What a decision may take.
const TARGET_MICROS: f64 = 2.0;

/// Decisions counted, and counted again on top of them: the difference is free of building the table.
const COUNTED: u64 = 10_000;

/// Measures and prints a table for the document; too slow is a failure.
pub fn run(rounds: usize) -> anyhow::Result<()> {
    let valgrind = install::debian("valgrind", "valgrind")?;
    let bench = build()?;
    println!("| decision | ns (least to most) | instructions |\n| --- | --- | --- |");
    for (case, what) in CASES {
        let mut times = (0..rounds.max(1))
            .map(|_| time(&bench, case))
            .collect::<anyhow::Result<Vec<_>>>()?;
        times.sort_by(f64::total_cmp);
        let (least, most) = (times[0], times[times.len() - 1]);
        let median = times[times.len() / 2];
        let few = instructions(&valgrind, &bench, case, COUNTED)?;
        let many = instructions(&valgrind, &bench, case, 2 * COUNTED)?;
        let each = many.saturating_sub(few) / COUNTED;
        println!(
            "| {what} | {:.0} ({:.0} to {:.0}) | {each} |",
            median * 1000.0,
            least * 1000.0,
            most * 1000.0
        );
        if median > TARGET_MICROS {
            bail!("{what} takes {median:.2} µs, more than {TARGET_MICROS} µs");
        }
    }
    Ok(())
}

/// The benchmark's program, built with cargo's profile for benchmarks.
fn build() -> anyhow::Result<PathBuf> {
    let printed = run::output(run::cargo().args([
        "bench",
        "--locked",
        "--package",
        "mesh-routing",
        "--bench",
        "decide",
        "--no-run",
        "--message-format=json",
    ]))?;
    let program = printed
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "decide")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from));
    program.context("cargo named no program for the benchmark decide")
}

/// Microseconds of one decision, among a million.
fn time(bench: &Path, case: &str) -> anyhow::Result<f64> {
    let printed = run::output(Command::new(bench).env("CASE", case))?;
    let word = printed
        .split_once(": ")
        .and_then(|(_, rest)| rest.split_whitespace().next())
        .with_context(|| format!("no time in {printed:?}"))?;
    let number = word.trim_end_matches(|c: char| !c.is_ascii_digit());
    let value: f64 = number.parse().with_context(|| printed.clone())?;
    match &word[number.len()..] {
        "ns" => Ok(value / 1000.0),
        "µs" => Ok(value),
        "ms" => Ok(value * 1000.0),
        unit => bail!("a time in {unit:?}: {printed}"),
    }
}

/// All instructions of one run, as callgrind tells them in the end.
fn instructions(valgrind: &Path, bench: &Path, case: &str, decisions: u64) -> anyhow::Result<u64> {
    let output = Command::new(valgrind)
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(bench)
        .env("CASE", case)
        .env("DECISIONS", decisions.to_string())
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", valgrind.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let count = said
        .lines()
        .find_map(|line| line.split_once("Collected :"))
        .and_then(|(_, count)| count.trim().parse().ok());
    count.with_context(|| format!("callgrind told no count:\n{said}"))
}
