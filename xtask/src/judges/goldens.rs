//! Stock Envoy reads every golden folder of `mesh-translate`: all resources of a case as one static bootstrap, `envoy --mode validate`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};

use super::install;
use crate::run;

/// Where the cases are, below the root of the work tree.
const CASES: &str = "crates/mesh-translate/tests/golden";

/// Runs the judge; the binary under test has no part in it, the resources come from the test that knows the cases.
pub fn run(_mesh: &Path) -> anyhow::Result<()> {
    let envoy = install::envoy()?;
    let place = tempfile::Builder::new().prefix("mesh-goldens-").tempdir()?;
    run::check(
        run::cargo()
            .args(["test", "--quiet", "--locked", "--package", "mesh-translate"])
            .args(["--test", "it", "golden::bootstraps_for_stock_envoy"])
            .env("ENVOY_BOOTSTRAPS", place.path()),
    )?;
    let mut refused = Vec::new();
    let cases = cases()?;
    for case in &cases {
        let bootstrap = place.path().join(format!("{case}.json"));
        ensure!(
            bootstrap.exists(),
            "the test bootstraps_for_stock_envoy wrote nothing for the case {case}"
        );
        if let Err(error) = validate(&envoy, &bootstrap) {
            refused.push(format!("{case}: {error:#}"));
        }
    }
    if !refused.is_empty() {
        bail!(
            "stock Envoy refuses {} of {} goldens:\n{}",
            refused.len(),
            cases.len(),
            refused.join("\n")
        );
    }
    println!("stock Envoy accepts all {} goldens", cases.len());
    Ok(())
}

fn cases() -> anyhow::Result<Vec<String>> {
    let folder: PathBuf = run::root().join(CASES);
    let entries =
        std::fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    ensure!(!names.is_empty(), "{} has no cases", folder.display());
    Ok(names)
}

/// Envoy's own words are the error: they name the field.
fn validate(envoy: &Path, bootstrap: &Path) -> anyhow::Result<()> {
    let output = Command::new(envoy)
        .args(["--mode", "validate", "-l", "error", "--log-format", "%v"])
        .arg("-c")
        .arg(bootstrap)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", envoy.display()))?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
