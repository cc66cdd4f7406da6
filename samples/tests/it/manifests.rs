use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize as _;
use serde_json::Value;

fn documents(text: &str) -> Vec<Value> {
    serde_yaml::Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).unwrap())
        .collect()
}

/// All YAML files below `folder`.
fn files(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            found.push((
                path.display().to_string(),
                std::fs::read_to_string(&path).unwrap(),
            ));
        }
    }
    found
}

#[test]
fn every_manifest_parses_and_runs_a_built_in_image() {
    let mut images = BTreeSet::new();
    let all = files(Path::new(env!("CARGO_MANIFEST_DIR")));
    assert!(all.len() > 15, "{} files", all.len());
    for (path, text) in all {
        for document in documents(&text) {
            assert!(
                document["kind"].is_string() && document["metadata"]["name"].is_string(),
                "{path}: {document}"
            );
            if document["kind"] == "Deployment" {
                let template = &document["spec"]["template"];
                let selector = document["spec"]["selector"]["matchLabels"]
                    .as_object()
                    .unwrap();
                for (key, value) in selector {
                    assert_eq!(&template["metadata"]["labels"][key], value, "{path}");
                }
                for container in template["spec"]["containers"].as_array().unwrap() {
                    images.insert(container["image"].as_str().unwrap().to_owned());
                }
            }
        }
    }
    for image in &images {
        assert!(
            mesh_samples::images::lookup(image).is_some(),
            "{image} is not built in"
        );
    }
    assert!(images.contains("istio/examples-bookinfo-reviews-v3:1.20.3"));
}

#[test]
fn embedded_manifests_are_complete() {
    for name in mesh_samples::manifest_names() {
        let files = mesh_samples::manifests(name).unwrap();
        assert!(!files.is_empty());
        for (path, text) in files {
            let on_disk = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
            assert_eq!(std::fs::read_to_string(on_disk).unwrap(), text, "{path}");
        }
    }
    let bookinfo = mesh_samples::manifests("bookinfo").unwrap();
    let kinds: Vec<_> = bookinfo
        .iter()
        .flat_map(|(_, text)| documents(text))
        .map(|d| d["kind"].as_str().unwrap().to_owned())
        .collect();
    let count = |kind: &str| kinds.iter().filter(|found| *found == kind).count();
    assert_eq!(
        (
            count("Deployment"),
            count("Service"),
            count("ServiceAccount")
        ),
        (6, 4, 4)
    );
    assert_eq!((count("Gateway"), count("VirtualService")), (1, 1));
    assert_eq!(mesh_samples::manifests("nonsense"), None);
}
