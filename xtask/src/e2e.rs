//! `cargo xtask e2e`: the walk through a running mesh, as a user would take it, against a cluster that the driver provides.
//!
//! The local driver starts `mesh all-in-one` on free ports and a state directory of its own, and in the end looks for leftovers.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::ValueEnum;

use crate::run;

mod cluster;
pub use cluster::{Cluster, family};
pub(crate) mod http;
mod scenarios;

/// Where the walk happens.
#[derive(Clone, Copy, ValueEnum)]
enum Driver {
    /// A local cluster: no Kubernetes, no Docker, root or user namespaces.
    Local,
}

/// What to run, and on what.
#[derive(clap::Args)]
pub struct Args {
    /// Where the walk happens.
    #[arg(long, value_enum, default_value = "local")]
    driver: Driver,
    /// The binary under test; built with `cargo build --release` when it is not given.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Use this kubectl in place of `mesh apply|get|delete|exec`.
    #[arg(long)]
    kubectl: Option<PathBuf>,
    /// Run only the scenarios whose name contains this text.
    #[arg(long)]
    only: Option<String>,
    /// List the scenarios and end.
    #[arg(long)]
    list: bool,
    /// What the walk starts itself as: writes what passes in the network of this process.
    #[arg(long, hide = true)]
    capture: Option<u32>,
}

/// Runs every scenario; the first failure ends the walk, after the cluster's logs were shown.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(pid) = args.capture {
        return scenarios::wire::capture(pid);
    }
    if args.list {
        for (name, _) in scenarios::ALL {
            println!("{name}");
        }
        return Ok(());
    }
    let Driver::Local = args.driver;
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => {
            run::check(run::cargo().args(["build", "--release", "--package", "mesh"]))?;
            run::target().join("release/mesh")
        }
    };
    let chosen: Vec<_> = scenarios::ALL
        .iter()
        .filter(|(name, _)| {
            args.only
                .as_ref()
                .is_none_or(|only| name.contains(only.as_str()))
        })
        .collect();
    if chosen.is_empty() {
        bail!(
            "no scenario's name contains {:?}; `cargo xtask e2e --list` shows them",
            args.only
        );
    }
    let started = Instant::now();
    let mut cluster = cluster::Cluster::start(&binary, args.kubectl.as_deref())?;
    println!("first page after {} ms", cluster.first_page.as_millis());
    let mut passed = 0;
    for (name, scenario) in chosen {
        let began = Instant::now();
        print!("{name} ... ");
        std::io::Write::flush(&mut std::io::stdout())?;
        if let Err(error) = scenario(&mut cluster) {
            println!("FAILED");
            cluster.show_state();
            return Err(error.context(format!("scenario {name:?}")));
        }
        println!("ok ({} ms)", began.elapsed().as_millis());
        passed += 1;
    }
    cluster.stop().context("stopping the cluster")?;
    println!(
        "{passed} passed, 0 failed; {} s",
        started.elapsed().as_secs()
    );
    Ok(())
}
