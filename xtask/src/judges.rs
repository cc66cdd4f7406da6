//! `cargo xtask judges`: what other programs say about us. Installs them where that is possible (Debian packages as root, PyPI
//! packages always) and fails by name where one is missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use nix::unistd::Uid;

use crate::e2e::Cluster;
use crate::{differential, run};

mod attached;
mod envoy;
mod goldens;
mod helm;
pub(crate) mod install;
mod kubectl;
mod secrets;

/// Which judges to hear.
#[derive(clap::Args)]
pub struct Args {
    /// Only the judges whose name contains this text.
    #[arg(long)]
    only: Option<String>,
    /// The binary under test; `cargo build --release` makes it when it is not given.
    #[arg(long)]
    binary: Option<PathBuf>,
}

type Judge = fn(&Path) -> anyhow::Result<()>;

const JUDGES: &[(&str, Judge)] = &[
    // The walk with the oldest and the newest; what those two agree on, the one between them does. The newest one's cluster begins empty:
    // the mesh is installed there by our own command, and leaves nothing behind.
    ("kubectl-1.20", |mesh| {
        kubectl_walk(mesh, &debian_kubectl()?, &[])
    }),
    ("kubectl-1.32", |mesh| {
        kubectl_commands(mesh, &install::kubectl("v32")?)
    }),
    ("kubectl-1.36", |mesh| {
        kubectl_walk(mesh, &install::kubectl("v36")?, &["--install"])
    }),
    ("all-in-one-in-a-pod", attached::run),
    ("helm", helm::run),
    ("stock-envoy", envoy::run),
    ("stock-envoy-goldens", goldens::run),
    ("differential", differential::judge_all),
];

/// Hears the judges one after the other; every one must agree.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if !Uid::effective().is_root() {
        bail!(
            "the judges run as root: they install Debian packages and run the local cluster with mapped uids"
        );
    }
    let mesh = match &args.binary {
        Some(binary) => binary.clone(),
        None => {
            run::check(run::cargo().args(["build", "--release", "--quiet", "--package", "mesh"]))?;
            run::target().join("release/mesh")
        }
    };
    let mut heard = 0;
    for (name, judge) in JUDGES {
        if args
            .only
            .as_ref()
            .is_some_and(|only| !name.contains(only.as_str()))
        {
            continue;
        }
        println!("judge {name}");
        judge(&mesh).with_context(|| format!("judge {name}"))?;
        heard += 1;
    }
    if heard == 0 {
        let names: Vec<_> = JUDGES.iter().map(|(name, _)| name).collect();
        bail!(
            "no judge's name contains {:?}; there are {names:?}",
            args.only
        );
    }
    println!("{heard} passed, 0 failed");
    Ok(())
}

/// Every command that users of the mesh need, one by one.
fn kubectl_commands(mesh: &Path, kubectl: &Path) -> anyhow::Result<()> {
    let cluster = Cluster::start(mesh, Some(kubectl))?;
    let verdict = kubectl::commands(kubectl, &cluster);
    if verdict.is_err() {
        cluster.show_state();
    }
    verdict.and(cluster.stop())
}

/// Its commands, then the whole walk with this kubectl in place of our own commands.
fn kubectl_walk(mesh: &Path, kubectl: &Path, flags: &[&str]) -> anyhow::Result<()> {
    kubectl_commands(mesh, kubectl)?;
    run::check(
        Command::new(std::env::current_exe()?)
            .args(["e2e", "--driver", "local", "--binary"])
            .arg(mesh)
            .arg("--kubectl")
            .arg(kubectl)
            .args(flags),
    )
}

/// Debian's own kubectl, 1.20; another one on the PATH, as cloud vendors' tools bring it, is not what this judge is about.
fn debian_kubectl() -> anyhow::Result<PathBuf> {
    let place = run::target().join("judges/kubectl-debian");
    let program = place.join("usr/bin/kubectl");
    if program.exists() {
        return Ok(program);
    }
    std::fs::create_dir_all(&place).with_context(|| format!("making {}", place.display()))?;
    let download = || {
        run::check(
            Command::new("apt-get")
                .args(["download", "-qq", "kubernetes-client"])
                .current_dir(&place),
        )
    };
    if download().is_err() {
        run::check(Command::new("apt-get").args(["update", "-qq"]))?;
        download()?;
    }
    for entry in std::fs::read_dir(&place)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            run::check(Command::new("dpkg").arg("-x").arg(&path).arg(&place))?;
        }
    }
    if !program.exists() {
        bail!(
            "the Debian package kubernetes-client brought no usr/bin/kubectl into {}",
            place.display()
        );
    }
    Ok(program)
}
