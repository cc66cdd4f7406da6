//! `mesh offline`: manifests of samples for a cluster that pulls nothing.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;

/// Flags of `mesh offline`.
#[derive(clap::Args)]
pub struct Args {
    /// File with manifests; - is standard input (may be repeated)
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    filename: Vec<PathBuf>,
    /// The mesh's image, as it was loaded into the cluster
    #[arg(long, value_name = "IMAGE", default_value = concat!("mesh:", env!("CARGO_PKG_VERSION")))]
    image: String,
}

/// Prints the manifests with the built-in images replaced.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut documents = Vec::new();
    for path in &args.filename {
        documents.extend(read(path)?);
    }
    let changed: usize = documents
        .iter_mut()
        .map(|document| mesh_samples::offline::rewrite(document, &args.image))
        .sum();
    if changed == 0 {
        eprintln!("warning: no container has one of the built-in images; nothing was changed");
    }
    crate::print(mesh_api::yaml::to_string_all(&documents).as_bytes())
}

fn read(path: &Path) -> anyhow::Result<Vec<Value>> {
    let (name, text) = if path == Path::new("-") {
        let mut text = String::new();
        let read = std::io::stdin().read_to_string(&mut text);
        read.context("reading standard input")?;
        ("stdin".to_owned(), text)
    } else {
        let read = std::fs::read_to_string(path);
        let name = path.display().to_string();
        (
            name.clone(),
            read.with_context(|| format!("reading {name}"))?,
        )
    };
    let documents = mesh_api::yaml::documents(&text, &name)?;
    if documents.is_empty() {
        bail!("no objects in {name}");
    }
    Ok(documents)
}
