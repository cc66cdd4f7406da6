//! Whole manifests: each file of `tests/golden-manifests` and what comes out. `UPDATE_GOLDEN=1` rewrites the latter.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mesh_api::yaml;
use mesh_inject::inject_manifest;
use serde_json::{Value, json};

use crate::{Settings, golden};

fn injected(text: &str, name: &str) -> (Vec<Value>, Vec<String>) {
    let settings = Settings::read(&golden().join("native"));
    let labels = BTreeMap::new();
    let context = settings.context(&labels);
    let (mut objects, mut notes) = (Vec::new(), Vec::new());
    for document in yaml::documents(text, name).expect("YAML") {
        match inject_manifest(&document, &context) {
            Ok(injected) => {
                objects.push(injected.object);
                notes.extend(injected.notes);
            }
            Err((place, error)) => notes.push(format!("error: {place}: {error}")),
        }
    }
    (objects, notes)
}

#[test]
fn manifests_come_out_as_they_did() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden-manifests");
    let mut cases = 0;
    for entry in fs::read_dir(&folder).expect("golden folder") {
        let path = entry.expect("entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.ends_with(".in.yaml") {
            continue;
        }
        cases += 1;
        let text = fs::read_to_string(&path).expect("input");
        let (objects, notes) = injected(&text, &name);
        let notes: String = notes.iter().map(|note| format!("# {note}\n")).collect();
        let documents: Vec<String> = objects.iter().map(yaml::to_string).collect();
        let out = format!("{notes}{}", documents.join("---\n"));
        let out_path = folder.join(name.replace(".in.yaml", ".out.yaml"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&out_path, &out).expect("writing the golden file");
        }
        let expected = fs::read_to_string(&out_path).unwrap_or_default();
        assert_eq!(out, expected, "{name} (UPDATE_GOLDEN=1 rewrites it)");
    }
    assert!(cases >= 4, "golden cases are missing");
}

/// Each kind with a pod template, as its users write it.
const WORKLOADS: &[(&str, &str, &str)] = &[
    ("v1", "Pod", ""),
    ("v1", "ReplicationController", "/spec/template"),
    ("apps/v1", "ReplicaSet", "/spec/template"),
    ("apps/v1", "Deployment", "/spec/template"),
    ("extensions/v1beta1", "Deployment", "/spec/template"),
    ("apps/v1", "DaemonSet", "/spec/template"),
    ("apps/v1", "StatefulSet", "/spec/template"),
    ("batch/v1", "Job", "/spec/template"),
    ("batch/v1", "CronJob", "/spec/jobTemplate/spec/template"),
    (
        "batch/v1beta1",
        "CronJob",
        "/spec/jobTemplate/spec/template",
    ),
    ("apps.openshift.io/v1", "DeploymentConfig", "/spec/template"),
];

fn workload(api_version: &str, kind: &str) -> Value {
    let pod = json!({ "metadata": { "labels": { "app": "a" } }, "spec": { "containers": [{ "name": "a", "image": "a" }] } });
    let spec = match kind {
        "Pod" => pod["spec"].clone(),
        "CronJob" => {
            json!({ "schedule": "* * * * *", "jobTemplate": { "spec": { "template": pod } } })
        }
        _ => json!({ "replicas": 1, "template": pod }),
    };
    json!({ "apiVersion": api_version, "kind": kind, "metadata": { "name": "a" }, "spec": spec })
}

#[test]
fn each_kind_is_injected_once() {
    for (api_version, kind, path) in WORKLOADS {
        let object = workload(api_version, kind);
        let (once, notes) = injected(&object.to_string(), kind);
        assert_eq!(notes, Vec::<String>::new(), "{kind}");
        let pod = once[0].pointer(path).expect("a pod");
        assert_eq!(
            pod["spec"]["initContainers"][1]["name"], "istio-proxy",
            "{kind}"
        );
        let env = pod["spec"]["initContainers"][1]["env"]
            .as_array()
            .expect("variables");
        let owner = env
            .iter()
            .find(|v| v["name"] == "ISTIO_META_OWNER")
            .expect("an owner");
        let plural = format!("{}s/a", kind.to_ascii_lowercase());
        assert!(
            owner["value"]
                .as_str()
                .is_some_and(|o| o.ends_with(&plural)),
            "{owner}"
        );
        let (twice, notes) = injected(&once[0].to_string(), kind);
        assert_eq!(twice, once, "{kind}");
        assert_eq!(
            notes,
            [format!(
                "{kind} default/a: left as it is: the pod has a sidecar already"
            )]
        );
    }
}

#[test]
fn other_kinds_are_not_touched() {
    for object in [
        workload("example.org/v1", "Deployment"),
        json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "a" }, "spec": { "template": workload("v1", "Pod") } }),
        json!({ "kind": "Deployment" }),
        json!({ "apiVersion": "apps.openshift.io/v1", "kind": "DeploymentConfig", "spec": { "template": null } }),
        json!({ "apiVersion": "v1", "kind": "List", "items": {} }),
        json!([1]),
        json!("text"),
    ] {
        let settings = Settings::read(&golden().join("native"));
        let labels = BTreeMap::new();
        let result = inject_manifest(&object, &settings.context(&labels)).expect("no error");
        assert_eq!((result.object, result.notes), (object, Vec::new()));
    }
}
