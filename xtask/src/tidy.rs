//! `cargo xtask tidy`: the house rules that no compiler checks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::{run, rust_source};

/// Which of our crates each of our crates may use. An edge that is not here is not allowed; the layers are in `crates/README.md`.
const EDGES: &[(&str, &[&str])] = &[
    ("mesh-api", &[]),
    ("mesh-net", &[]),
    ("mesh-telemetry", &[]),
    ("mesh-store", &[]),
    ("mesh-identity", &[]),
    ("mesh-envoy-json", &[]),
    ("mesh-model", &["mesh-api", "mesh-envoy-json"]),
    ("mesh-inject", &["mesh-api"]),
    ("mesh-xds", &["mesh-envoy-json"]),
    ("mesh-routing", &[]),
    ("mesh-apiserver", &["mesh-store", "mesh-identity"]),
    (
        "mesh-translate",
        &["mesh-api", "mesh-model", "mesh-envoy-json"],
    ),
    (
        "mesh-proxy",
        &[
            "mesh-net",
            "mesh-telemetry",
            "mesh-store",
            "mesh-identity",
            "mesh-xds",
            "mesh-routing",
        ],
    ),
    (
        "mesh-control",
        &[
            "mesh-api",
            "mesh-model",
            "mesh-inject",
            "mesh-translate",
            "mesh-xds",
            "mesh-identity",
            "mesh-telemetry",
        ],
    ),
    (
        "mesh-local",
        &[
            "mesh-net",
            "mesh-store",
            "mesh-identity",
            "mesh-apiserver",
            "mesh-samples",
        ],
    ),
    (
        "mesh-cli",
        &["mesh-api", "mesh-identity", "mesh-inject", "mesh-store"],
    ),
    ("mesh-samples", &[]),
    (
        "mesh",
        &[
            "mesh-proxy",
            "mesh-control",
            "mesh-local",
            "mesh-cli",
            "mesh-api",
            "mesh-net",
            "mesh-samples",
            "mesh-telemetry",
        ],
    ),
    ("xtask", &["mesh-xds"]),
];

/// Crates that must stay pure: none of these may be anywhere below them (model, translate, inject, routing, identity; invariant 2).
const PURE: &[&str] = &[
    "mesh-model",
    "mesh-translate",
    "mesh-inject",
    "mesh-routing",
    "mesh-identity",
];
const IMPURE: &[&str] = &[
    "mesh-net",
    "mesh-store",
    "mesh-xds",
    "mesh-apiserver",
    "mesh-proxy",
    "kube",
    "sled",
    "socket2",
];

const MAX_FILE_LINES: usize = 800;
const MAX_FUNCTION_LINES: usize = 120;
const MAX_MAP_LINES: usize = 200;
const MAX_MAIN_LINES: usize = 400;

/// Checks everything and lists every finding.
pub fn run() -> anyhow::Result<()> {
    let root = run::root();
    let metadata = metadata()?;
    let mut findings = Vec::new();
    edges(&metadata, &mut findings);
    code_map(&root, &metadata, &mut findings)?;
    for package in packages(&metadata) {
        crate_files(&root, package, &mut findings)?;
    }
    if findings.is_empty() {
        println!("tidy: nothing found");
        return Ok(());
    }
    for finding in &findings {
        eprintln!("{finding}");
    }
    bail!("tidy found {} problem(s)", findings.len())
}

fn metadata() -> anyhow::Result<Value> {
    let text = run::output(run::cargo().args([
        "metadata",
        "--format-version=1",
        "--no-deps",
        "--offline",
    ]))?;
    serde_json::from_str(&text).context("reading the output of cargo metadata")
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().into_iter().flatten()
}

fn name(package: &Value) -> &str {
    package["name"].as_str().unwrap_or_default()
}

fn edges(metadata: &Value, findings: &mut Vec<String>) {
    let ours: BTreeSet<&str> = packages(metadata).map(name).collect();
    for package in packages(metadata) {
        let name = name(package);
        let Some((_, allowed)) = EDGES.iter().find(|(n, _)| *n == name) else {
            findings.push(format!(
                "{name}: not in tidy's table of crate edges (xtask/src/tidy.rs)"
            ));
            continue;
        };
        let used = package["dependencies"].as_array().into_iter().flatten();
        for dependency in used.filter(|d| d["kind"].is_null()) {
            let dependency = dependency["name"].as_str().unwrap_or_default();
            if ours.contains(dependency) && !allowed.contains(&dependency) {
                findings.push(format!("{name}: uses {dependency}, which its layer may not (xtask/src/tidy.rs has the table)"));
            }
            if PURE.contains(&name) && (IMPURE.contains(&dependency) || dependency == "tokio") {
                findings.push(format!("{name}: uses {dependency}, but has to stay without IO (crates/README.md, invariant 2)"));
            }
        }
    }
}

fn code_map(root: &Path, metadata: &Value, findings: &mut Vec<String>) -> anyhow::Result<()> {
    let map = std::fs::read_to_string(root.join("crates/README.md"))
        .context("reading crates/README.md")?;
    let lines = map.lines().count();
    if lines > MAX_MAP_LINES {
        findings.push(format!(
            "crates/README.md: {lines} lines, at most {MAX_MAP_LINES}"
        ));
    }
    for package in packages(metadata) {
        let name = name(package);
        let mention = match name {
            "mesh" => "`bin/mesh`".to_owned(),
            "xtask" => "`xtask/`".to_owned(),
            name => format!("`{name}`"),
        };
        if !map.contains(&mention) {
            findings.push(format!("crates/README.md: does not name {mention}"));
        }
    }
    // Files that the map walks through must exist.
    for word in map.split('`').skip(1).step_by(2) {
        let path = word
            .strip_prefix("mesh-")
            .map(|_| root.join("crates").join(word));
        if let Some(path) = path.filter(|_| word.contains("/src/"))
            && !path.exists()
        {
            findings.push(format!(
                "crates/README.md: names {word}, which does not exist"
            ));
        }
    }
    Ok(())
}

fn crate_files(root: &Path, package: &Value, findings: &mut Vec<String>) -> anyhow::Result<()> {
    let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
    let dir = manifest.parent().unwrap_or(root);
    let mut files = Vec::new();
    rust_files(dir, &mut files)?;
    for file in &files {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        let shown = file
            .strip_prefix(root)
            .unwrap_or(file)
            .display()
            .to_string();
        one_file(&shown, &text, findings);
    }
    for entry in ["src/lib.rs", "src/main.rs"] {
        let path = dir.join(entry);
        if path.exists() {
            let text = std::fs::read_to_string(&path)?;
            let docs = text.lines().take_while(|l| l.starts_with("//!")).count();
            if docs < 2 {
                findings.push(format!(
                    "{}: {entry} has no crate documentation (what, in, out, never, start here)",
                    name(package)
                ));
            }
        }
    }
    golden(dir, &files, name(package), findings)
}

fn one_file(shown: &str, text: &str, findings: &mut Vec<String>) {
    let in_tests = shown.contains("/tests/");
    let code = text
        .find("#[cfg(test)]\nmod tests")
        .map_or(text, |at| &text[..at]);
    let lines = code.lines().count();
    let limit = if shown == "bin/mesh/src/main.rs" {
        MAX_MAIN_LINES
    } else {
        MAX_FILE_LINES
    };
    if lines > limit && !in_tests {
        findings.push(format!(
            "{shown}: {lines} lines, at most {limit} (tests not counted)"
        ));
    }
    if shown.ends_with("/mod.rs") {
        findings.push(format!(
            "{shown}: no mod.rs; use a file named like the module"
        ));
    }
    let bare = rust_source::blank_literals(code);
    for function in rust_source::functions(&bare) {
        if function.lines > MAX_FUNCTION_LINES && !in_tests {
            findings.push(format!(
                "{shown}:{}: fn {} has {} lines, at most {MAX_FUNCTION_LINES}",
                function.line, function.name, function.lines
            ));
        }
    }
    for (at, line) in bare.lines().enumerate() {
        let line = line.trim();
        let glob = line.starts_with("pub use ") && line.ends_with("::*;");
        let upward = line == "use super::*;" && !in_tests;
        let stub = line.contains("todo!(")
            || line.contains("unimplemented!(")
            || line.starts_with("#[ignore");
        if glob || upward || stub {
            findings.push(format!(
                "{shown}:{}: {line:?} is not done here (glob re-export, upward glob or stub)",
                at + 1
            ));
        }
    }
}

/// A golden folder must be read by a test of its crate.
fn golden(
    dir: &Path,
    files: &[PathBuf],
    name: &str,
    findings: &mut Vec<String>,
) -> anyhow::Result<()> {
    let folder = dir.join("tests/golden");
    if !folder.exists() {
        return Ok(());
    }
    let mut read = false;
    for file in files
        .iter()
        .filter(|f| f.components().any(|c| c.as_os_str() == "tests"))
    {
        let text = std::fs::read_to_string(file)?;
        read |= text.contains("golden") && text.contains("UPDATE_GOLDEN");
    }
    if !read {
        findings.push(format!(
            "{name}: tests/golden is read by no test that honours UPDATE_GOLDEN"
        ));
    }
    Ok(())
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}
