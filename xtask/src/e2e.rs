//! `cargo xtask e2e`: the walk through a running mesh, as a user would take it, on a cluster that the driver provides.
//!
//! The local driver starts `mesh all-in-one` on free ports and a state directory of its own, and in the end looks for leftovers; the others
//! (`driver.rs`) install the mesh on a Kubernetes.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;

use crate::run;

mod cluster;
pub use cluster::{Cluster, family};
mod collect;
mod driver;
pub(crate) mod http;
mod objects;
pub use objects::Objects;
mod scenarios;

/// What to run, and on what.
#[derive(clap::Args)]
pub struct Args {
    /// Where the walk happens.
    #[arg(long, value_enum, default_value = "local")]
    driver: driver::Driver,
    #[command(flatten)]
    options: driver::Options,
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
    let mut passed = 0;
    let mut left_out = 0;
    let walk = |cluster: &mut Cluster| {
        for (name, scenario) in chosen {
            print!("{name} ... ");
            std::io::Write::flush(&mut std::io::stdout())?;
            if let Some(reason) = driver::left_out(args.driver, &args.options, name) {
                println!("left out: {reason}");
                left_out += 1;
                continue;
            }
            let began = Instant::now();
            if let Err(error) = scenario(cluster) {
                println!("FAILED");
                return Err(error.context(format!("scenario {name:?}")));
            }
            println!("ok ({} ms)", began.elapsed().as_millis());
            passed += 1;
        }
        Ok(())
    };
    let kubectl = args.kubectl.as_deref();
    driver::run(args.driver, &binary, kubectl, &args.options, walk)?;
    let left_out = match left_out {
        0 => String::new(),
        count => format!(", {count} left out"),
    };
    println!(
        "{passed} passed, 0 failed{left_out}; {} s",
        started.elapsed().as_secs()
    );
    Ok(())
}
