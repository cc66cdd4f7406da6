//! `cargo xtask test`: everything that Rust and namespaces suffice for.

use std::os::unix::process::CommandExt;
use std::path::Path;

use anyhow::Context;
use nix::unistd::Uid;

use crate::run;

/// What to leave out.
#[derive(clap::Args)]
pub struct Args {
    /// Only the unit and integration tests, not the end-to-end walk.
    #[arg(long)]
    no_e2e: bool,
}

/// The uid and gid of the ordinary user that the second end-to-end run takes on: `nobody` on every Linux.
pub const NOBODY: u32 = 65534;

/// Runs the tests.
pub fn run(args: &Args) -> anyhow::Result<()> {
    run::check(run::cargo().args(["test", "--workspace", "--quiet"]))?;
    if args.no_e2e {
        return Ok(());
    }
    run::check(run::cargo().args(["build", "--release", "--quiet", "--package", "mesh"]))?;
    let binary = run::target().join("release/mesh");
    if Uid::effective().is_root() {
        e2e(&binary, None)?;
        e2e(&binary, Some(NOBODY))?;
    } else {
        e2e(&binary, None)?;
        println!(
            "the end-to-end walk ran as this user only; run the tests as root to have it run as root too"
        );
    }
    Ok(())
}

/// One end-to-end run; with `user`, as that user and without capabilities.
fn e2e(binary: &Path, user: Option<u32>) -> anyhow::Result<()> {
    // The work tree may lie in a folder that the other user can't enter: everything it needs is copied.
    let place = tempfile::Builder::new().prefix("mesh-e2e-").tempdir()?;
    let copy = place.path().join("mesh");
    let myself = place.path().join("xtask");
    std::fs::copy(binary, &copy).with_context(|| format!("copying {}", binary.display()))?;
    std::fs::copy(std::env::current_exe()?, &myself)?;
    if let Some(uid) = user {
        for path in [place.path(), copy.as_path(), myself.as_path()] {
            std::os::unix::fs::chown(path, Some(uid), Some(uid))?;
        }
    }
    let mut command = std::process::Command::new(&myself);
    command
        .args(["e2e", "--driver", "local", "--binary"])
        .arg(&copy)
        .current_dir(place.path())
        .env("HOME", place.path())
        .env("TMPDIR", place.path());
    if let Some(uid) = user {
        // Leaving uid 0 takes every capability along, permitted and ambient (capabilities(7)); the groups go too.
        command.uid(uid).gid(uid);
        println!("end-to-end walk as uid {uid}, without capabilities");
    } else {
        println!("end-to-end walk as uid {}", Uid::effective());
    }
    run::check(&mut command)
}
