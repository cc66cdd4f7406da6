//! The Helm chart as an archive: what the packed binary writes, in the form of `helm package`, the same bytes for the same files.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::image::{self, Entry};
use crate::run;

/// Packs the chart of a binary into a folder, as `mesh-VERSION.tgz`. None where this machine can't run the binary.
pub(crate) fn pack(
    binary: &Path,
    architecture: &str,
    folder: &Path,
) -> anyhow::Result<Option<PathBuf>> {
    let own = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    if architecture != own {
        return Ok(None);
    }
    let place = tempfile::tempdir()?;
    let chart = place.path().join("mesh");
    // Without a folder it would be looked for on the path.
    let binary = std::path::absolute(binary)?;
    run::output(
        Command::new(binary)
            .args(["manifest", "chart", "-o"])
            .arg(&chart),
    )
    .context("having the binary write its chart")?;
    let about = std::fs::read_to_string(chart.join("Chart.yaml"))
        .context("reading the Chart.yaml that the binary wrote")?;
    let version = about.lines().find_map(|line| line.strip_prefix("version:"));
    let version = version.context("Chart.yaml names no version")?;
    let version = version.trim().trim_matches(['"', '\'']);
    if version.is_empty() || version.contains('/') {
        bail!("Chart.yaml: version {version:?} can't be the name of a file");
    }
    let output = folder.join(format!("mesh-{version}.tgz"));
    std::fs::write(&output, archive(&chart)?)
        .with_context(|| format!("writing {}", output.display()))?;
    Ok(Some(output))
}

/// The archive of a chart's folder. Its name is the first part of all paths, and Chart.yaml comes first, as `helm package` has it.
pub(crate) fn archive(chart: &Path) -> anyhow::Result<Vec<u8>> {
    let mut files = Vec::new();
    below(chart, "mesh", &mut files)?;
    files.sort_by_key(|(path, _)| (path != "mesh/Chart.yaml", path.clone()));
    let entries: Vec<Entry<'_>> = files
        .iter()
        .map(|(path, content)| Entry::file(path, content))
        .collect();
    let mut packed = GzEncoder::new(Vec::new(), Compression::best());
    packed.write_all(&image::pack(&entries)?)?;
    Ok(packed.finish()?)
}

fn below(folder: &Path, prefix: &str, found: &mut Vec<(String, Vec<u8>)>) -> anyhow::Result<()> {
    let reading = || format!("reading {}", folder.display());
    for entry in std::fs::read_dir(folder).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        let path = format!("{prefix}/{}", entry.file_name().to_string_lossy());
        match entry.file_type()?.is_dir() {
            true => below(&entry.path(), &path, found)?,
            false => found.push((path, std::fs::read(entry.path())?)),
        }
    }
    Ok(())
}
