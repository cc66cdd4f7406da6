//! What a sidecar costs: the time from its start to ready, and its memory with Bookinfo's configuration.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::peers;
use crate::e2e::{Cluster, family};

/// Starts that are timed.
const STARTS: usize = 15;
/// Product pages before memory is read.
const PAGES: usize = 100;

/// From the start of the process to the first 200 of its readiness probe, with a discovery server that is there.
pub(super) fn start(binary: &Path) -> anyhow::Result<()> {
    let place = tempfile::Builder::new().prefix("mesh-bench-").tempdir()?;
    let mut taken = Vec::new();
    for _ in 0..STARTS {
        let began = Instant::now();
        let proxy = peers::mesh(binary, place.path(), 18081, super::BACKEND)?;
        let ready = until_ready(began);
        drop(proxy);
        taken.push(ready?.as_secs_f64() * 1000.0);
        // The kept configuration of the run before would make the next one's start another kind of start.
        let _ = std::fs::remove_dir_all(place.path().join(format!("proxy-{}", peers::HEALTH)));
    }
    taken.sort_by(f64::total_cmp);
    println!(
        "start of a proxy to ready: {:.1} ms (median of {STARTS}; {:.1} to {:.1})",
        taken[STARTS / 2],
        taken[0],
        taken[STARTS - 1]
    );
    Ok(())
}

fn until_ready(began: Instant) -> anyhow::Result<Duration> {
    while began.elapsed() < Duration::from_secs(20) {
        if probe().unwrap_or(false) {
            return Ok(began.elapsed());
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    bail!("the proxy is not ready after 20 s")
}

fn probe() -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(("127.0.0.1", peers::HEALTH))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(
        b"GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
    )?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    Ok(head.ends_with(b" 200"))
}

/// Memory of each proxy of a local cluster with Bookinfo, before and after somebody asked for its whole configuration.
pub(super) fn memory(binary: &Path) -> anyhow::Result<()> {
    let cluster = Cluster::start(binary, None)?;
    let outcome = table(&cluster);
    if outcome.is_err() {
        cluster.show_state();
    }
    outcome.and(cluster.stop())
}

fn table(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.pages(PAGES)?;
    let proxies = proxies(cluster)?;
    let before: Vec<_> = proxies
        .iter()
        .map(|&pid| memory_of(pid))
        .collect::<Result<_, _>>()?;
    for pod in cluster.pods("app")? {
        let dump = "http://127.0.0.1:15000/config_dump";
        cluster.exec(
            &pod,
            "istio-proxy",
            &["curl", "-sS", "-o", "/dev/null", dump],
        )?;
    }
    println!(
        "\n| proxy (pid) | PSS MiB | private MiB | PSS after a config_dump | private |\n| --- | --- | --- | --- | --- |"
    );
    for (pid, (pss, private)) in proxies.iter().zip(before) {
        let (pss_after, private_after) = memory_of(*pid)?;
        println!("| {pid} | {pss:.1} | {private:.1} | {pss_after:.1} | {private_after:.1} |");
    }
    Ok(())
}

/// The processes of the cluster that are proxies.
fn proxies(cluster: &Cluster) -> anyhow::Result<Vec<u32>> {
    let is_proxy = |pid: &u32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = command.split(|byte| *byte == 0).collect();
        matches!(words.get(1..3), Some([b"proxy", b"sidecar" | b"router"]))
    };
    Ok(family(cluster.pid()?)
        .into_iter()
        .filter(is_proxy)
        .collect())
}

/// Proportional and private memory in MiB (proc(5), smaps_rollup).
fn memory_of(pid: u32) -> anyhow::Result<(f64, f64)> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .context("reading a proxy's memory")?;
    let sum = |names: &[&str]| {
        let lines = rollup
            .lines()
            .filter(|line| names.iter().any(|name| line.starts_with(name)));
        let kib: f64 = lines
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok())
            .sum();
        kib / 1024.0
    };
    Ok((sum(&["Pss:"]), sum(&["Private_Clean:", "Private_Dirty:"])))
}
