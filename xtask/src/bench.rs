//! `cargo xtask bench`: figures for docs/performance.md, measured beside peers in one run on one machine.
//!
//! Core 0 has the load generator (wrk) and the backend (nginx, a 1 KiB answer); core 1 has the proxy under test with one worker. CPU per
//! request is user and system time of the proxy's process divided by wrk's requests. Rounds are interleaved; medians are printed.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::judges::install;
use crate::run;

mod decide;
mod discovery;
mod mtls;
mod peers;
mod rotate;
mod sidecar;

/// What to measure.
#[derive(clap::Args)]
pub struct Args {
    /// Rounds per proxy, interleaved.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of load a round.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Keep-alive connections.
    #[arg(long, default_value_t = 32)]
    connections: u32,
    /// What to measure.
    #[arg(long, value_enum, default_value = "all")]
    part: Part,
    /// The binary to measure; `cargo build --profile dist` makes it when it is not given.
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// Parts of the measurement.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Everything, one part after the other.
    All,
    /// CPU per request and latency of one hop, beside the peers.
    Load,
    /// The same of a pair of proxies with mutual TLS between them, beside a pair of Envoys.
    Mtls,
    /// A pair of proxies under load while every certificate is changed twenty times and the root once: what is counted is what fails.
    Rotate,
    /// Time from a proxy's start to ready.
    Start,
    /// Memory of the proxies of a local cluster.
    Memory,
    /// Time and instructions of one route decision.
    Decide,
}

/// Where nginx answers.
const BACKEND: u16 = 18080;

/// A proxy under test.
struct Peer {
    name: &'static str,
    port: u16,
    /// One process, or two that stand one behind the other.
    children: Vec<Child>,
}

impl Peer {
    /// Of all its processes.
    fn sum<T: std::iter::Sum>(&self, of: impl Fn(u32) -> anyhow::Result<T>) -> anyhow::Result<T> {
        self.children.iter().map(|child| of(child.id())).sum()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        for child in &mut self.children {
            // Killing is enough: none of them has anything to say at its end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One round of load.
#[derive(Clone, Copy, Default)]
struct Figures {
    cpu_micros: f64,
    per_second: f64,
    p50_millis: f64,
    p99_millis: f64,
}

/// Runs the measurement and prints a table for the document.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let wants = |part| args.part == part || args.part == Part::All;
    if wants(Part::Decide) {
        decide::run(args.rounds)?;
    }
    if args.part == Part::Decide {
        return Ok(());
    }
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => {
            run::check(run::cargo().args(["build", "--profile", "dist", "--package", "mesh"]))?;
            run::target().join("dist/mesh")
        }
    };
    if wants(Part::Start) {
        sidecar::start(&binary)?;
    }
    if wants(Part::Memory) {
        sidecar::memory(&binary)?;
    }
    if wants(Part::Load) {
        beside_peers(args, &binary)?;
    }
    if wants(Part::Mtls) {
        mtls::beside_envoys(args, &binary)?;
    }
    if wants(Part::Rotate) {
        rotate::under_load(&binary)?;
    }
    Ok(())
}

fn beside_peers(args: &Args, binary: &Path) -> anyhow::Result<()> {
    let wrk = install::debian("wrk", "wrk")?;
    let place = tempfile::Builder::new().prefix("mesh-bench-").tempdir()?;
    let mut backend = peers::nginx(place.path(), BACKEND)?;
    let peers = vec![
        peers::mesh(binary, place.path(), 18081, BACKEND)?,
        peers::envoy(place.path(), 18082, BACKEND)?,
        peers::haproxy(place.path(), 18083, BACKEND)?,
    ];
    let outcome = measure(args, &wrk, &peers);
    drop(peers);
    let _ = backend.kill();
    let _ = backend.wait();
    outcome
}

fn measure(args: &Args, wrk: &Path, peers: &[Peer]) -> anyhow::Result<()> {
    for peer in peers {
        await_port(peer.port).with_context(|| format!("{} is not up", peer.name))?;
        load(wrk, peer, 32, 1).with_context(|| format!("warming {}", peer.name))?;
    }
    let mut rounds: Vec<Vec<Figures>> = vec![Vec::new(); peers.len()];
    for round in 1..=args.rounds {
        for (peer, figures) in peers.iter().zip(&mut rounds) {
            let taken = load(wrk, peer, args.connections, args.seconds)?;
            println!(
                "round {round} {:<13} {:>6.2} µs/request {:>8.0} requests/s",
                peer.name, taken.cpu_micros, taken.per_second
            );
            figures.push(taken);
        }
    }
    println!(
        "\n| proxy | CPU µs per request (min to max) | ratio to Envoy | p50 ms | p99 ms | PSS MiB |\n| --- | --- | --- | --- | --- | --- |"
    );
    let envoy = peers.iter().position(|p| p.name == "envoy").unwrap_or(0);
    let reference = median(&rounds[envoy], |f| f.cpu_micros);
    for (peer, figures) in peers.iter().zip(&rounds) {
        let cpu = median(figures, |f| f.cpu_micros);
        let least = figures
            .iter()
            .map(|f| f.cpu_micros)
            .fold(f64::MAX, f64::min);
        let most = figures.iter().map(|f| f.cpu_micros).fold(0.0, f64::max);
        println!(
            "| {} | {cpu:.1} ({least:.1} to {most:.1}) | {:.2} | {:.2} | {:.2} | {:.1} |",
            peer.name,
            cpu / reference,
            median(figures, |f| f.p50_millis),
            median(figures, |f| f.p99_millis),
            peer.sum(pss_mib)?
        );
    }
    Ok(())
}

fn median(figures: &[Figures], of: impl Fn(&Figures) -> f64) -> f64 {
    let mut values: Vec<f64> = figures.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// A program on one core.
fn pinned(core: u32, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command
        .args(["-c", &core.to_string()])
        .arg(program)
        .stdin(Stdio::null());
    command
}

fn load(wrk: &Path, peer: &Peer, connections: u32, seconds: u64) -> anyhow::Result<Figures> {
    let before: u64 = peer.sum(cpu_ticks)?;
    let out = run::output(
        pinned(0, wrk)
            .args([
                "-t1",
                "--latency",
                "-c",
                &connections.to_string(),
                "-d",
                &format!("{seconds}s"),
            ])
            .arg(format!("http://127.0.0.1:{}/", peer.port)),
    )?;
    let used = peer.sum(cpu_ticks)? - before;
    if out.contains("Non-2xx") || out.contains("Socket errors") {
        bail!("{} did not answer every request:\n{out}", peer.name);
    }
    let words: Vec<&str> = out.split_whitespace().collect();
    let before_word = |word: &str| {
        words
            .iter()
            .position(|w| *w == word)
            .and_then(|i| words.get(i.wrapping_sub(1)).copied())
    };
    let after_word = |word: &str| {
        words
            .iter()
            .position(|w| *w == word)
            .and_then(|i| words.get(i + 1).copied())
    };
    let requests: f64 = before_word("requests")
        .and_then(|w| w.parse().ok())
        .with_context(|| format!("no count of requests in\n{out}"))?;
    // One tick is a hundredth of a second on every Linux that we run on (getconf CLK_TCK).
    let cpu_micros = used as f64 * 10_000.0 / requests;
    Ok(Figures {
        cpu_micros,
        per_second: after_word("Requests/sec:")
            .and_then(|w| w.parse().ok())
            .unwrap_or_default(),
        p50_millis: after_word("50%").map(millis).unwrap_or_default(),
        p99_millis: after_word("99%").map(millis).unwrap_or_default(),
    })
}

/// `12.30ms`, `870.00us` or `1.20s`.
fn millis(text: &str) -> f64 {
    let number: f64 = text
        .trim_end_matches(char::is_alphabetic)
        .parse()
        .unwrap_or_default();
    match text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.') {
        "us" => number / 1000.0,
        "s" => number * 1000.0,
        _ => number,
    }
}

/// User and system time of a process in ticks (proc(5), fields 14 and 15 of stat).
fn cpu_ticks(pid: u32) -> anyhow::Result<u64> {
    let stat =
        std::fs::read_to_string(format!("/proc/{pid}/stat")).context("the proxy has ended")?;
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let number = |i: usize| {
        fields
            .get(i)
            .and_then(|f| f.parse::<u64>().ok())
            .context("reading stat")
    };
    Ok(number(11)? + number(12)?)
}

fn pss_mib(pid: u32) -> anyhow::Result<f64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup
        .lines()
        .find(|l| l.starts_with("Pss:"))
        .context("no Pss")?;
    let kib: f64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|w| w.parse().ok())
        .context("reading Pss")?;
    Ok(kib / 1024.0)
}

fn await_port(port: u16) -> anyhow::Result<()> {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(20) {
        if TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("nothing listens on port {port}")
}
