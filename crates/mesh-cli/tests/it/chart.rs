//! The Helm chart: golden files (`UPDATE_GOLDEN=1` rewrites `tests/golden/chart`), and values that `mesh install` knows too.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use mesh_cli::install::Settings;
use serde_json::{Value, json};

use super::world::World;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chart")
}

/// Files below a folder, by their paths in it.
fn below(folder: &Path, prefix: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let entry = entry.expect("entry");
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.file_type().expect("type").is_dir() {
            true => below(&entry.path(), &format!("{name}/"), found),
            false => {
                found.insert(name);
            }
        }
    }
}

/// What differs from build to build, and from version to version, is left out.
fn stable(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        match line.split_once("install.mesh/build: ") {
            Some((indent, _)) => out.push_str(&format!("{indent}install.mesh/build: BUILD\n")),
            None => out.push_str(&format!("{line}\n")),
        }
    }
    out.replace(env!("CARGO_PKG_VERSION"), "VERSION")
}

#[test]
fn the_chart_is_as_recorded() {
    let mut names = BTreeSet::new();
    for (path, text) in mesh_cli::chart::files().expect("a chart") {
        if path == "files/kinds.yaml" {
            let kinds = mesh_api::yaml::documents(&text, "kinds").expect("YAML");
            assert_eq!(kinds.len(), mesh_api::crds().len());
            for kind in kinds {
                let policy = &kind["metadata"]["annotations"]["helm.sh/resource-policy"];
                assert_eq!(policy, "keep");
            }
            continue;
        }
        assert!(!text.contains("zz"), "{path}: a mark is left");
        let file = folder().join(&path);
        let text = stable(&text);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::create_dir_all(file.parent().expect("folder")).expect("folder");
            fs::write(&file, &text).expect("golden file");
        }
        let expected = fs::read_to_string(&file).unwrap_or_default();
        assert!(
            expected == text,
            "{path}: not what the golden file says; look at the difference after UPDATE_GOLDEN=1"
        );
        names.insert(path);
    }
    let mut there = BTreeSet::new();
    below(&folder(), "", &mut there);
    assert_eq!(there, names, "golden files that nobody reads");
}

/// The paths of a schema, each with a value that it takes.
fn leaves(path: &str, schema: &Value, found: &mut Vec<(String, Value)>) {
    if let Some(properties) = schema["properties"].as_object() {
        for (name, schema) in properties {
            let path = match path {
                "" => name.clone(),
                path => format!("{path}.{name}"),
            };
            leaves(&path, schema, found);
        }
        return;
    }
    let value = match (&schema["enum"][0], schema["type"].as_str()) {
        (Value::Null, Some("boolean")) => json!(true),
        (Value::Null, Some("integer")) => json!(3),
        (Value::Null, Some("object")) => json!({}),
        (Value::Null, Some("array")) => json!([]),
        (Value::Null, _) => json!("x"),
        (first, _) => first.clone(),
    };
    if schema != false {
        found.push((path.to_owned(), value));
    }
}

#[test]
fn values_are_settings() {
    let files = mesh_cli::chart::files().expect("a chart");
    let of = |name: &str| &files.iter().find(|(path, _)| path == name).expect(name).1;
    let schema: Value = serde_json::from_str(of("values.schema.json")).expect("JSON");
    let mut all = Vec::new();
    leaves("", &schema, &mut all);
    assert!(all.len() > 80, "{}", all.len());
    // Those are `components` for us.
    let unlike = |path: &str| {
        path == "base.enabled" || path.starts_with("gateways.") && path.ends_with("way.enabled")
    };
    for (path, value) in all.iter().filter(|(path, _)| !unlike(path)) {
        let top = ["profile", "revision", "meshConfig"];
        let path = match top.iter().any(|name| path.starts_with(name)) && path != "revisionTags" {
            true => path.clone(),
            false => format!("values.{path}"),
        };
        let text = match value {
            Value::String(text) => text.clone(),
            value => value.to_string(),
        };
        let settings = Settings {
            set: vec![format!("{path}={text}")],
            ..Settings::default()
        };
        let spec = settings.spec(None);
        spec.unwrap_or_else(|error| panic!("{path}: {error:#}"));
    }
}

#[tokio::test]
async fn the_command_writes_it() {
    let world = World::start().await;
    let out = world.mesh("manifest chart -o @chart").await.ok();
    assert!(out.contains("helm install mesh"), "{out}");
    // Again over itself, and never over something else.
    world.mesh("manifest chart -o @chart").await.ok();
    let about = world.file("chart/Chart.yaml", "name: other");
    let error = world.mesh("manifest chart -o @chart").await.error();
    assert!(error.contains("no chart of this program"), "{error}");
    assert_eq!(fs::read_to_string(about).expect("file"), "name: other");
}
