//! What an API server and a kubelet would say of the injected pods: fields that they don't know, names that don't fit.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use mesh_inject::Outcome;
use serde_json::Value;

use crate::{Settings, cases, read};

/// Every injected pod of the golden cases, with the name of its case.
fn injected() -> Vec<(String, Value)> {
    let pods = cases().into_iter().filter_map(|folder| {
        let pod = read(&folder.join("pod.yaml"));
        match Settings::read(&folder).inject(&pod) {
            Ok(Outcome::Patched(patched)) => Some((folder.display().to_string(), patched.pod)),
            _ => None,
        }
    });
    pods.collect()
}

/// Fields of `ours` that are missing or different in `theirs`. What is empty may be left out.
fn lost(path: &str, ours: &Value, theirs: &Value, found: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(ours), _) => {
            for (name, value) in ours {
                lost(&format!("{path}.{name}"), value, &theirs[name], found);
            }
        }
        (Value::Array(ours), _) => {
            for (index, value) in ours.iter().enumerate() {
                lost(&format!("{path}[{index}]"), value, &theirs[index], found);
            }
        }
        (ours, theirs) if ours == theirs => {}
        (ours, theirs) => found.push(format!("{path}: {ours} became {theirs}")),
    }
}

#[test]
fn every_field_is_one_of_a_pod() {
    let pods = injected();
    assert!(pods.len() >= 40);
    for (case, pod) in pods {
        let typed: Pod =
            serde_json::from_value(pod.clone()).unwrap_or_else(|error| panic!("{case}: {error}"));
        let again = serde_json::to_value(typed).expect("JSON");
        let mut found = Vec::new();
        lost("", &pod, &again, &mut found);
        assert_eq!(found, Vec::<String>::new(), "{case}");
    }
}

fn names<'a>(items: &'a Value, key: &str) -> Vec<&'a str> {
    let items = items.as_array().into_iter().flatten();
    items.filter_map(|item| item[key].as_str()).collect()
}

fn assert_unique(names: &[&str], place: &str) {
    let set: BTreeSet<_> = names.iter().collect();
    assert_eq!(set.len(), names.len(), "{place}: {names:?}");
}

/// Paths of the downward API in variables, of any Kubernetes from 1.28 on ("Expose Pod Information to Containers Through Environment Variables").
const FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.podIP",
];

#[test]
fn names_and_references_are_right() {
    for (case, pod) in injected() {
        let spec = &pod["spec"];
        let volumes = names(&spec["volumes"], "name");
        assert_unique(&volumes, &case);
        let mut all = names(&spec["containers"], "name");
        all.extend(names(&spec["initContainers"], "name"));
        assert_unique(&all, &case);
        for list in ["containers", "initContainers"] {
            for container in spec[list].as_array().into_iter().flatten() {
                let place = format!("{case}: {}", container["name"]);
                let env = names(&container["env"], "name");
                assert_unique(&env, &place);
                assert_unique(&names(&container["volumeMounts"], "mountPath"), &place);
                for mount in names(&container["volumeMounts"], "name") {
                    // Cases that mount something of their own say its volume, too.
                    assert!(volumes.contains(&mount), "{place}: {mount}");
                }
                for port in names(&container["ports"], "name") {
                    assert!(port.len() <= 15, "{place}: {port}");
                }
                for variable in container["env"].as_array().into_iter().flatten() {
                    let field = variable["valueFrom"]["fieldRef"]["fieldPath"].as_str();
                    assert!(
                        field.is_none_or(|field| FIELDS.contains(&field)),
                        "{place}: {field:?}"
                    );
                }
                assert_only_sidecars_have_probes(container, list, &place);
            }
        }
        for (name, value) in pod["metadata"]["labels"].as_object().into_iter().flatten() {
            assert!(
                value.as_str().is_some_and(|value| value.len() <= 63),
                "{case}: {name}"
            );
        }
    }
}

/// An init container that ends can't have probes or hooks (Kubernetes, "Sidecar Containers").
fn assert_only_sidecars_have_probes(container: &Value, list: &str, place: &str) {
    let ends = list == "initContainers" && container["restartPolicy"] != "Always";
    let probes = [
        "startupProbe",
        "readinessProbe",
        "livenessProbe",
        "lifecycle",
    ];
    let found = probes.iter().find(|name| container.get(**name).is_some());
    assert!(!ends || found.is_none(), "{place}: {found:?}");
}

/// What the pod security standard "restricted" asks of a container, all of which the proxy keeps to once it has a seccomp profile.
#[test]
fn the_proxy_is_restricted() {
    for (case, pod) in injected() {
        let of_case = |name: &str| case.ends_with(name);
        if of_case("privileged") || of_case("own-user") {
            continue;
        }
        for list in ["containers", "initContainers"] {
            for container in pod["spec"][list].as_array().into_iter().flatten() {
                let security = &container["securityContext"];
                if container["name"] == "istio-proxy" && !security.is_null() {
                    assert_eq!(security["allowPrivilegeEscalation"], false, "{case}");
                    // TPROXY needs one capability, and root for it; nothing else changes.
                    let transparent = of_case("interception-tproxy");
                    let added = transparent.then(|| serde_json::json!(["NET_ADMIN"]));
                    assert_eq!(security["runAsNonRoot"], !transparent, "{case}");
                    assert_eq!(security["readOnlyRootFilesystem"], true, "{case}");
                    assert_eq!(security["capabilities"]["drop"][0], "ALL", "{case}");
                    assert_eq!(
                        security["capabilities"].get("add"),
                        added.as_ref(),
                        "{case}"
                    );
                }
            }
        }
    }
}
