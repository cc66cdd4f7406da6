//! `cargo xtask differential`: the same xDS served to a stock Envoy and to our proxy, the same requests sent through both, and
//! everything that can be seen compared: the answer, what reached which endpoint, how often it was tried, the response flags.
//!
//! Cases are written by hand in `xtask/differential/*.yaml` or generated from a seed. What differs on purpose stands with its reason in
//! `xtask/differential/differences.yaml`; an entry that is not needed is an error. Envoy's response flags come from its access
//! log, ours from the label `response_flags` of `istio_requests_total`; they are compared for a case as a whole.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::judges::install;
use crate::run;

mod authorizer;
mod case;
mod client;
mod compare;
mod generate;
mod known;
mod policies;
mod proxies;
mod resources;
mod upstream;

use case::{Case, Request};
use client::Facts;
use compare::compare;
use known::{Difference, Known};
use proxies::{Proxy, Tally};
use resources::{Maker, Side};
use upstream::Upstream;

/// What to compare.
#[derive(clap::Args)]
pub struct Args {
    /// The binary under test; `cargo build --release` makes it when it is not given.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Only the cases whose name contains this text; entries that are not needed are no error then.
    #[arg(long)]
    only: Option<String>,
    /// Generated route tables.
    #[arg(long, default_value_t = 120)]
    generated: usize,
    /// Generated sets of access control policies.
    #[arg(long, default_value_t = 40)]
    policies: usize,
    /// Where their random choices begin.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Show every fact of the chosen cases.
    #[arg(long)]
    show: bool,
}

/// Runs the comparison with what `args` ask for.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => {
            run::check(run::cargo().args(["build", "--release", "--quiet", "--package", "mesh"]))?;
            run::target().join("release/mesh")
        }
    };
    let folder = run::root().join("xtask/differential");
    let mut cases = case::load(&folder)?;
    cases.extend(generate::tables(args.seed, args.generated));
    cases.extend(policies::policies(args.seed, args.policies));
    if let Some(only) = &args.only {
        cases.retain(|case| case.name.contains(only.as_str()));
    }
    if cases.is_empty() {
        bail!("no case's name contains {:?}", args.only);
    }
    let known = Known::load(&folder)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(differences(&binary, &cases, args.show))?;
    judge(&outcome, &known, args.only.is_none())
}

/// As a judge: everything, with the defaults.
pub fn judge_all(binary: &Path) -> anyhow::Result<()> {
    run(&Args {
        binary: Some(binary.to_owned()),
        only: None,
        generated: 120,
        policies: 40,
        seed: 1,
        show: false,
    })
}

/// What a run came to.
struct Outcome {
    cases: usize,
    requests: usize,
    took: Duration,
    differences: Vec<Difference>,
}

fn judge(outcome: &Outcome, known: &Known, whole: bool) -> anyhow::Result<()> {
    let unknown: Vec<_> = outcome
        .differences
        .iter()
        .filter(|d| !known.covers(d))
        .collect();
    for difference in unknown.iter().take(400) {
        println!(
            "{}\n  {}\n  {}\n    envoy {:?}\n    mesh  {:?}",
            difference.case,
            difference.request,
            difference.field,
            difference.envoy,
            difference.mesh
        );
    }
    let unneeded = if whole { known.unneeded() } else { Vec::new() };
    for entry in &unneeded {
        println!("not needed any more: {entry}");
    }
    println!(
        "{} cases, {} requests to each proxy in {} s: {} differences, {} of them on purpose",
        outcome.cases,
        outcome.requests,
        outcome.took.as_secs(),
        outcome.differences.len(),
        outcome.differences.len() - unknown.len()
    );
    if !unknown.is_empty() || !unneeded.is_empty() {
        bail!(
            "{} differences are not listed, {} listed ones are gone",
            unknown.len(),
            unneeded.len()
        );
    }
    Ok(())
}

async fn differences(binary: &Path, cases: &[Case], show: bool) -> anyhow::Result<Outcome> {
    let program = install::envoy()?;
    let place = tempfile::Builder::new()
        .prefix("mesh-differential-")
        .tempdir()?;
    let upstream = Upstream::start().await?;
    let port = std::net::TcpListener::bind("0.0.0.0:0")?
        .local_addr()?
        .port();
    let access_log = place.path().join("access.log");
    let access_log = access_log.to_string_lossy();
    crate::pki::certificates(place.path())?;
    let make = |side| {
        Maker {
            cases,
            certificates: &place.path().to_string_lossy(),
            side,
            port,
            upstream: &upstream,
            access_log: &access_log,
        }
        .make()
    };
    let (address, [of_envoy, of_mesh]) =
        proxies::discovery(make(Side::Envoy)?, make(Side::Mesh)?).await?;
    let began = Instant::now();
    let mut envoy = Proxy::envoy(&program, place.path(), address, port, of_envoy)?;
    let mut mesh = Proxy::mesh(binary, place.path(), address, port, of_mesh)?;
    let (a, b) = tokio::join!(envoy.ready(cases), mesh.ready(cases));
    // Envoy listens before it says that it refuses a route table.
    tokio::time::sleep(Duration::from_millis(300)).await;
    if let Err(error) = a.and(b) {
        return Err(show_logs(place.path(), error));
    }
    println!(
        "{} listeners in both proxies after {} ms",
        cases.len(),
        began.elapsed().as_millis()
    );
    let mut outcome = Outcome {
        cases: cases.len(),
        requests: 0,
        took: Duration::ZERO,
        differences: Vec::new(),
    };
    let outcome_of = |error| show_logs(place.path(), error);
    for (i, case) in cases.iter().enumerate() {
        if acceptance(i, case, &envoy, &mesh, &mut outcome.differences).map_err(outcome_of)? {
            let (a, b) = tokio::join!(
                through(&envoy, i, case, &upstream),
                through(&mesh, i, case, &upstream)
            );
            let (a, b) = (a?, b?);
            outcome.requests += a.requests.len();
            if show {
                println!("{}: filters {}", case.name, serde_json::json!(case.filters));
                for (request, facts) in a.requests.iter().zip(&b.requests) {
                    println!(
                        "{}: {}\n  envoy {:#?}\n  mesh {:#?}",
                        case.name, request.0, request.1, facts.1
                    );
                }
            }
            compare(case, &a, &b, &mut outcome.differences);
        }
    }
    outcome.took = began.elapsed();
    Ok(outcome)
}

/// Shows what the proxies wrote, before the folder is gone.
fn show_logs(place: &Path, error: anyhow::Error) -> anyhow::Error {
    for name in ["envoy.stderr", "mesh.stderr", "mesh.stdout"] {
        let text = std::fs::read_to_string(place.join(name)).unwrap_or_default();
        // Envoy shows a refused resource whole; the reason is in the first line or the last.
        let lines: Vec<_> = text
            .lines()
            .filter(|line| !line.starts_with([' ', '}']))
            .collect();
        let tail = &lines[lines.len().saturating_sub(20)..];
        eprintln!("--- {name}\n{}", tail.join("\n"));
    }
    error
}

/// Whether both took the configuration. What only one takes is a difference; what Envoy does not take is a mistake in the case,
/// unless the case is about it.
fn acceptance(
    i: usize,
    case: &Case,
    envoy: &Proxy,
    mesh: &Proxy,
    differences: &mut Vec<Difference>,
) -> anyhow::Result<bool> {
    let (by_envoy, by_mesh) = (envoy.refusals.of(i), mesh.refusals.of(i));
    if let Some(reason) = &by_envoy
        && !case.refused
    {
        bail!("Envoy refuses the configuration of {}: {reason}", case.name);
    }
    if by_envoy.is_some() != by_mesh.is_some() {
        differences.push(Difference {
            case: case.name.clone(),
            request: "(its configuration)".to_owned(),
            field: "refused".to_owned(),
            envoy: by_envoy.clone().unwrap_or_default(),
            mesh: by_mesh.clone().unwrap_or_default(),
        });
    } else if by_envoy.is_none() && case.refused {
        bail!(
            "both proxies take the configuration of {}, which is meant to be refused",
            case.name
        );
    }
    Ok(by_envoy.is_none() && by_mesh.is_none())
}

/// What one proxy did with a case.
struct Run {
    /// What was sent, with what is known of it.
    requests: Vec<(String, Facts)>,
    /// How the requests ended.
    tally: Tally,
}

async fn through(proxy: &Proxy, i: usize, case: &Case, upstream: &Upstream) -> anyhow::Result<Run> {
    let before = proxy.tally().await?;
    let mut requests = Vec::new();
    let mut sent = 0_i64;
    for (r, spec) in case.requests.iter().enumerate() {
        let request = spec.full();
        let mut shares = Facts::new();
        tokio::time::sleep(Duration::from_millis(request.pause_ms)).await;
        for n in 0..request.times.unwrap_or(1) {
            let id = format!("{}-{i:04}-{r:03}-{n:05}", proxy.side.letter());
            let facts = one(proxy, i, &request, &id, upstream).await;
            sent += match facts.get("statuses") {
                // What was sent byte by byte may be several requests.
                Some(statuses) => i64::try_from(statuses.split_whitespace().count())?,
                None => i64::from(request.tcp.is_empty()),
            };
            if request.shares {
                compare::count_share(&mut shares, &facts);
            } else {
                requests.push((shown(&request, n), facts));
            }
        }
        if request.shares {
            requests.push((shown(&request, 0), shares));
        }
    }
    // Below HTTP no request of the client's ends; those that open tunnels end when connections do, which is after the comparison.
    if case.requests.iter().all(|spec| !spec.full().tcp.is_empty()) {
        let tally = Tally::new();
        return Ok(Run { requests, tally });
    }
    // What the proxies say of a request may come a moment after its answer.
    let began = Instant::now();
    let tally = loop {
        let now = proxy.tally().await?;
        let tally = compare::grown(&before, &now);
        if tally.values().sum::<i64>() >= sent * case.hops.max(1)
            || began.elapsed() > Duration::from_secs(2)
        {
            break tally;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    Ok(Run { requests, tally })
}

async fn one(proxy: &Proxy, i: usize, request: &Request, id: &str, upstream: &Upstream) -> Facts {
    let mut facts = client::send(proxy.listener(i), request, id).await;
    if let Some(expected) = request.reaches {
        let began = Instant::now();
        while upstream.log.count(id) < expected && began.elapsed() < Duration::from_millis(600) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // One too many is to be seen, too.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut received = upstream.log.take(id);
    if request.reaches.is_some() {
        received.sort();
    }
    if request.tcp.is_empty() {
        client::note_received(&mut facts, &received);
    }
    facts
}

/// The beginning and the end of a long text, as tokens are.
fn shortened(text: &str) -> String {
    let all: Vec<char> = text.chars().collect();
    if all.len() <= 120 {
        return text.to_owned();
    }
    let (begin, end) = (&all[..60], &all[all.len() - 24..]);
    format!("{}...{}", String::from_iter(begin), String::from_iter(end))
}

fn shown(request: &Request, n: u32) -> String {
    let mut text = match (request.raw.first(), request.tcp.first()) {
        (Some(raw), _) => format!("raw {raw:?}"),
        (_, Some(tcp)) => format!("tcp {tcp:?}"),
        _ => shortened(&request.send),
    };
    if let Some(host) = &request.host {
        text.push_str(&format!(" host {host}"));
    }
    for header in &request.headers {
        text.push_str(&format!(" [{}]", shortened(header)));
    }
    if !request.upstream.is_empty() {
        text.push_str(&format!(" upstream {:?}", request.upstream));
    }
    if request.version == case::Version::Http2 {
        text.push_str(" over HTTP/2");
    }
    if n > 0 {
        text.push_str(&format!(" (number {})", n + 1));
    }
    text
}
