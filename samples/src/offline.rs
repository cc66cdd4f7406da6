//! Manifests for a cluster without a registry: what the built-in images would run is run by one image, the mesh's own.

use serde_json::{Map, Value, json};

use crate::images::{self, Image};

/// Replaces in every pod of `document` the images of the built-in table by `image`, and gives how many containers were changed.
///
/// What the replaced image's configuration said is put into the container, where the container does not say it itself: `command` from the
/// entrypoint, `args`, `env`, `workingDir` and `securityContext.runAsUser`; the pull policy becomes `IfNotPresent`, since the image is
/// loaded, not pulled. A container with another image, and with one of the mesh's own, stays as it is.
///
/// ```
/// let mut pod = serde_json::json!({"kind": "Pod", "spec": {"containers": [
///     {"name": "ratings", "image": "registry.example/istio/examples-bookinfo-ratings-v1:1.20.3"},
/// ]}});
/// assert_eq!(mesh_samples::offline::rewrite(&mut pod, "mesh:1.0.0"), 1);
/// let container = &pod["spec"]["containers"][0];
/// assert_eq!(container["image"], "mesh:1.0.0");
/// assert_eq!(container["command"], serde_json::json!(["/usr/local/bin/mesh", "sample", "ratings"]));
/// ```
pub fn rewrite(document: &mut Value, image: &str) -> usize {
    let spec = match document["kind"].as_str() {
        Some("Pod") => "/spec",
        Some("CronJob") => "/spec/jobTemplate/spec/template/spec",
        _ => "/spec/template/spec",
    };
    let Some(spec) = document.pointer_mut(spec) else {
        return 0;
    };
    let mut changed = 0;
    for list in ["initContainers", "containers"] {
        let containers = spec.get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            let Some(container) = container.as_object_mut() else {
                continue;
            };
            let reference = container.get("image").and_then(Value::as_str);
            if let Some(built_in) = reference.and_then(images::lookup).filter(|i| !is_mesh(i)) {
                replace(container, built_in, image);
                changed += 1;
            }
        }
    }
    changed
}

/// The mesh's own image under its own name or the field's: the one that is there already.
fn is_mesh(image: &Image) -> bool {
    image.entrypoint.len() == 1
}

fn replace(container: &mut Map<String, Value>, built_in: &Image, image: &str) {
    container.insert("image".to_owned(), json!(image));
    container.insert("imagePullPolicy".to_owned(), json!("IfNotPresent"));
    // As for an image: a command drops the image's own arguments.
    if !container.contains_key("command") {
        let (mut command, mut arguments) = (built_in.entrypoint.to_vec(), built_in.cmd.to_vec());
        if command.is_empty() {
            command = std::mem::take(&mut arguments);
        }
        container.insert("command".to_owned(), json!(command));
        if !container.contains_key("args") && !arguments.is_empty() {
            container.insert("args".to_owned(), json!(arguments));
        }
    }
    let own = container.get("env").and_then(Value::as_array).cloned();
    let own = own.unwrap_or_default();
    let said = |name: &str| own.iter().any(|variable| variable["name"] == name);
    let of_image = built_in.env.iter().filter(|(name, _)| !said(name));
    let mut env: Vec<Value> = of_image
        .map(|(name, value)| json!({"name": name, "value": value}))
        .collect();
    env.extend(own.iter().cloned());
    if !env.is_empty() {
        container.insert("env".to_owned(), Value::Array(env));
    }
    if built_in.workdir != "/" && !container.contains_key("workingDir") {
        container.insert("workingDir".to_owned(), json!(built_in.workdir));
    }
    // The mesh's image is the proxy's, and capture leaves out what runs as the proxy's user.
    let user = built_in.user.unwrap_or(DEFAULT_USER);
    let context = container
        .entry("securityContext")
        .or_insert_with(|| json!({}));
    if let Some(context) = context.as_object_mut() {
        context.entry("runAsUser").or_insert(json!(user));
    }
}

/// `nobody`, for images that leave the user open.
const DEFAULT_USER: u32 = 65534;

#[cfg(test)]
mod tests {
    use super::*;

    fn container(mut container: Value) -> Value {
        container["name"] = json!("c");
        let mut pod = json!({"kind": "Pod", "spec": {"containers": [container]}});
        assert_eq!(rewrite(&mut pod, "mesh:9"), 1);
        pod["spec"]["containers"][0].clone()
    }

    #[test]
    fn the_container_says_what_the_image_would_have_said() {
        let changed = container(json!({
            "image": "registry.example/istio/examples-bookinfo-reviews-v3:1.20.3",
            "imagePullPolicy": "Always",
            "env": [{"name": "STAR_COLOR", "value": "blue"}, {"name": "LOG_DIR", "value": "/tmp"}],
        }));
        assert_eq!(
            changed,
            json!({
                "name": "c",
                "image": "mesh:9",
                "imagePullPolicy": "IfNotPresent",
                "command": ["/usr/local/bin/mesh", "sample", "reviews"],
                "env": [
                    {"name": "SERVICE_VERSION", "value": "v3"},
                    {"name": "ENABLE_RATINGS", "value": "true"},
                    {"name": "STAR_COLOR", "value": "blue"},
                    {"name": "LOG_DIR", "value": "/tmp"},
                ],
                "securityContext": {"runAsUser": 1000},
            })
        );
    }

    #[test]
    fn what_the_container_says_itself_stays() {
        let own = json!({
            "image": "curlimages/curl", "command": ["/bin/sleep", "1"], "securityContext": {"runAsUser": 5},
        });
        let changed = container(own);
        assert_eq!(changed["command"], json!(["/bin/sleep", "1"]));
        assert_eq!(changed.get("args"), None);
        assert_eq!(changed["securityContext"]["runAsUser"], 5);
        let with_arguments =
            container(json!({"image": "istio/tcp-echo-server:1.3", "args": ["9000", "one"]}));
        assert_eq!(with_arguments["command"][2], "tcp-echo");
        assert_eq!(with_arguments["args"], json!(["9000", "one"]));
        let without = container(json!({"image": "curlimages/curl"}));
        assert_eq!(without["command"], json!(["sleep", "infinity"]));
        assert_eq!(without["securityContext"]["runAsUser"], 100);
    }

    #[test]
    fn every_kind_with_pods_is_reached_and_nothing_else_is_touched() {
        let pods = json!({"spec": {"containers": [{"image": "httpd"}], "initContainers": [{"image": "busybox"}]}});
        for mut document in [
            json!({"kind": "Deployment", "spec": {"template": pods}}),
            json!({"kind": "CronJob", "spec": {"jobTemplate": {"spec": {"template": pods}}}}),
        ] {
            assert_eq!(rewrite(&mut document, "mesh:9"), 2, "{document}");
        }
        for untouched in [
            json!({"kind": "Service", "spec": {"ports": [{"port": 80}]}}),
            json!({"kind": "Pod", "spec": {"containers": [{"image": "example.com/own:1"}, {"image": "mesh:8"}, {"image": "istio/proxyv2:1.30"}, {"image": "auto"}]}}),
        ] {
            let mut document = untouched.clone();
            assert_eq!(rewrite(&mut document, "mesh:9"), 0);
            assert_eq!(document, untouched);
        }
    }
}
