//! Golden tests: each folder of `tests/golden` has a pod, perhaps settings, and what comes out. `UPDATE_GOLDEN=1` rewrites the latter.

mod annotations;
mod kubernetes;
mod manifests;
mod properties;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mesh_api::mesh_config::MeshConfig;
use mesh_api::yaml;
use mesh_inject::{InjectContext, InjectorConfig, Outcome, Skip, inject, webhook_revision};
use serde_json::{Value, json};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn read(path: &Path) -> Value {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    yaml::documents(&text, &path.display().to_string())
        .expect("YAML")
        .into_iter()
        .next()
        .unwrap_or_default()
}

/// Settings of a case, with the defaults of the tests.
struct Settings {
    mesh: MeshConfig,
    config: InjectorConfig,
    namespace: String,
    native: bool,
}

impl Settings {
    fn read(folder: &Path) -> Self {
        let path = folder.join("context.yaml");
        let settings = if path.exists() {
            read(&path)
        } else {
            json!({})
        };
        let text = |key: &str| settings.get(key).map(Value::to_string).unwrap_or_default();
        let mut config = InjectorConfig::from_config_map(&text("config"), &text("values"))
            .expect("injector settings");
        // The version must not change golden files.
        config.image = config.image.replace(env!("CARGO_PKG_VERSION"), "VERSION");
        Self {
            mesh: MeshConfig::from_value(settings.get("mesh").unwrap_or(&json!({})))
                .expect("mesh settings"),
            config,
            namespace: settings["namespace"]
                .as_str()
                .unwrap_or("default")
                .to_owned(),
            native: settings["native"].as_bool().unwrap_or(true),
        }
    }

    fn context<'a>(&'a self, labels: &'a BTreeMap<String, String>) -> InjectContext<'a> {
        InjectContext {
            namespace: &self.namespace,
            namespace_labels: labels,
            mesh: &self.mesh,
            config: &self.config,
            revision: "default",
            native_sidecars: self.native,
            workload: None,
        }
    }

    fn inject(&self, pod: &Value) -> Result<Outcome, mesh_inject::InjectError> {
        inject(pod, &self.context(&BTreeMap::new()))
    }
}

fn cases() -> Vec<PathBuf> {
    let mut folders: Vec<_> = fs::read_dir(golden())
        .expect("golden folder")
        .map(|entry| entry.expect("entry").path())
        .collect();
    folders.sort();
    assert!(folders.len() >= 60, "golden cases are missing");
    folders
}

#[test]
fn golden_files() {
    let mut different = Vec::new();
    for folder in cases() {
        let settings = Settings::read(&folder);
        let pod = read(&folder.join("pod.yaml"));
        let out = match settings.inject(&pod) {
            Ok(Outcome::Patched(patched)) => {
                let mut text = yaml::to_string(&patched.pod);
                for warning in &patched.warnings {
                    text.insert_str(0, &format!("# warning: {warning}\n"));
                }
                text
            }
            Ok(Outcome::Skipped(skip)) => format!("# skipped: {skip}\n"),
            Err(error) => format!("# error: {error}\n"),
        };
        let path = folder.join("out.yaml");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, &out).expect("writing the golden file");
        } else if fs::read_to_string(&path).unwrap_or_default() != out {
            different.push(format!("{}:\n{out}", path.display()));
        }
    }
    assert!(
        different.is_empty(),
        "differs from the golden file (UPDATE_GOLDEN=1 rewrites it):\n{}",
        different.join("\n")
    );
}

#[test]
fn the_patch_makes_the_injected_pod_which_is_left_alone_the_next_time() {
    let mut injected = 0;
    for folder in cases() {
        let settings = Settings::read(&folder);
        let mut pod = read(&folder.join("pod.yaml"));
        let Ok(Outcome::Patched(patched)) = settings.inject(&pod) else {
            continue;
        };
        // As it goes over the wire.
        let patch: json_patch::Patch =
            serde_json::from_value(serde_json::to_value(&patched.patch).expect("JSON"))
                .expect("patch");
        json_patch::patch(&mut pod, &patch)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        assert_eq!(pod, patched.pod, "{}", folder.display());
        assert_eq!(
            settings.inject(&pod),
            Ok(Outcome::Skipped(Skip::AlreadyInjected)),
            "{}",
            folder.display()
        );
        injected += 1;
    }
    assert!(injected >= 40);
}

#[test]
fn fields_that_nobody_knows_survive() {
    let settings = Settings::read(&golden().join("native"));
    let pod = json!({ "future": 1, "metadata": { "name": "a", "future": [1] }, "spec": { "future": { "a": null }, "containers": [{ "name": "a", "future": true }] } });
    let Ok(Outcome::Patched(patched)) = settings.inject(&pod) else {
        panic!("injected")
    };
    assert_eq!(patched.pod["future"], 1);
    assert_eq!(patched.pod["metadata"]["future"], json!([1]));
    assert_eq!(patched.pod["spec"]["future"], json!({ "a": null }));
    assert_eq!(patched.pod["spec"]["containers"][0]["future"], true);
}

#[test]
fn odd_pods_are_errors_not_panics() {
    let settings = Settings::read(&golden().join("native"));
    for pod in [
        json!(null),
        json!({}),
        json!({ "spec": 1 }),
        json!({ "spec": { "containers": {} } }),
    ] {
        assert!(settings.inject(&pod).is_err(), "{pod}");
    }
    for pod in [
        json!({ "metadata": { "labels": 1, "annotations": [] }, "spec": { "containers": [] } }),
        json!({ "metadata": [], "spec": { "containers": [1, null, { "name": 1, "ports": [1] }], "volumes": 1, "initContainers": "x" } }),
        json!({ "metadata": { "name": "ä".repeat(200) }, "spec": { "containers": [{ "name": "istio-proxy", "env": 1 }] } }),
    ] {
        let _ = settings.inject(&pod);
    }
}

#[test]
fn webhooks_by_labels() {
    let labels = |text: &str| -> BTreeMap<String, String> {
        text.split_whitespace()
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    };
    for (namespace, pod, revision) in [
        ("istio-injection=enabled", "", Some("default")),
        (
            "istio-injection=enabled",
            "sidecar.istio.io/inject=false",
            None,
        ),
        (
            "istio-injection=disabled",
            "sidecar.istio.io/inject=true",
            None,
        ),
        ("istio.io/rev=canary", "", Some("canary")),
        (
            "istio-injection=enabled istio.io/rev=canary",
            "",
            Some("default"),
        ),
        ("", "sidecar.istio.io/inject=true", Some("default")),
        (
            "",
            "sidecar.istio.io/inject=true istio.io/rev=canary",
            Some("canary"),
        ),
        ("", "", None),
    ] {
        assert_eq!(
            webhook_revision(&labels(namespace), &labels(pod)).as_deref(),
            revision,
            "{namespace} / {pod}"
        );
    }
}
