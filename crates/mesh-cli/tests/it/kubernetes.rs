//! What a real API server and kubelet would refuse, or drop in silence: every object of every profile as Kubernetes' own types read it.

use std::collections::BTreeSet;

use k8s_openapi::api::admissionregistration::v1 as admission;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1 as rbac;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use mesh_cli::install::PROFILES;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::manifest::of_profile;

/// All objects of all profiles.
fn objects() -> Vec<Value> {
    let plans = PROFILES.iter().map(|(name, _)| of_profile(name));
    plans
        .flat_map(|plan| plan.objects().cloned().collect::<Vec<_>>())
        .collect()
}

/// Reads an object as its type and writes it again: a field that is gone is misspelt or misplaced.
fn again<T: Serialize + DeserializeOwned>(object: &Value) -> Value {
    let typed: T =
        serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{error}: {object}"));
    serde_json::to_value(typed).expect("JSON")
}

#[test]
fn no_field_is_lost() {
    for object in objects() {
        let kind = object["kind"].as_str().expect("kind");
        let back = match kind {
            "ClusterRole" => again::<rbac::ClusterRole>(&object),
            "ClusterRoleBinding" => again::<rbac::ClusterRoleBinding>(&object),
            "ConfigMap" => again::<ConfigMap>(&object),
            "CustomResourceDefinition" => again::<CustomResourceDefinition>(&object),
            "Deployment" => again::<Deployment>(&object),
            "EndpointSlice" => again::<EndpointSlice>(&object),
            "HorizontalPodAutoscaler" => again::<HorizontalPodAutoscaler>(&object),
            "MutatingWebhookConfiguration" => {
                again::<admission::MutatingWebhookConfiguration>(&object)
            }
            "Namespace" => again::<Namespace>(&object),
            "PodDisruptionBudget" => again::<PodDisruptionBudget>(&object),
            "Role" => again::<rbac::Role>(&object),
            "RoleBinding" => again::<rbac::RoleBinding>(&object),
            "Service" => again::<Service>(&object),
            "ServiceAccount" => again::<ServiceAccount>(&object),
            "ValidatingWebhookConfiguration" => {
                again::<admission::ValidatingWebhookConfiguration>(&object)
            }
            other => panic!("no type for {other}"),
        };
        let name = object["metadata"]["name"].as_str().expect("name");
        compare(&format!("{kind} {name}: "), &object, &back);
    }
}

/// Numbers may come back in another form.
fn compare(path: &str, before: &Value, after: &Value) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            for (key, value) in before {
                let there = after
                    .get(key)
                    .unwrap_or_else(|| panic!("{path}.{key} is lost"));
                compare(&format!("{path}.{key}"), value, there);
            }
        }
        (Value::Array(before), Value::Array(after)) => {
            assert_eq!(before.len(), after.len(), "{path}");
            for (index, (before, after)) in before.iter().zip(after).enumerate() {
                compare(&format!("{path}[{index}]"), before, after);
            }
        }
        (Value::Number(before), Value::Number(after)) => {
            assert_eq!(before.as_f64(), after.as_f64(), "{path}");
        }
        (before, after) => assert_eq!(before, after, "{path}"),
    }
}

fn list<'a>(value: &'a Value, path: &str) -> impl Iterator<Item = &'a Value> {
    value
        .pointer(path)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn names<'a>(value: &'a Value, path: &str) -> BTreeSet<&'a str> {
    list(value, path)
        .filter_map(|entry| entry["name"].as_str())
        .collect()
}

#[test]
fn labels_are_short_and_selectors_select() {
    for object in objects() {
        for (key, value) in object["metadata"]["labels"]
            .as_object()
            .into_iter()
            .flatten()
        {
            let value = value.as_str().expect("text");
            assert!(value.len() <= 63, "{key}: {value}");
        }
        if object["kind"] != "Deployment" {
            continue;
        }
        let selector = object["spec"]["selector"]["matchLabels"]
            .as_object()
            .expect("selector");
        let template = &object["spec"]["template"]["metadata"]["labels"];
        for (key, value) in selector {
            assert_eq!(&template[key], value, "{key}");
            // It can't be changed later, so it must be the same in every version.
            assert!(
                !key.contains("version") && value != env!("CARGO_PKG_VERSION"),
                "{key}"
            );
        }
    }
}

#[test]
fn pods_are_whole_and_restricted() {
    let mut seen = 0;
    for object in objects()
        .iter()
        .filter(|object| object["kind"] == "Deployment")
    {
        let pod = &object["spec"]["template"]["spec"];
        let volumes = names(pod, "/volumes");
        for container in list(pod, "/containers") {
            seen += 1;
            let mut ports = BTreeSet::new();
            let port_names = names(container, "/ports");
            assert!(
                port_names.iter().all(|name| name.len() <= 15),
                "{port_names:?}"
            );
            for port in list(container, "/ports") {
                assert!(
                    ports.insert(port["containerPort"].to_string()),
                    "{port} twice"
                );
            }
            for mount in list(container, "/volumeMounts") {
                let name = mount["name"].as_str().expect("name");
                assert!(volumes.contains(name), "no volume {name}");
            }
            for probe in ["readinessProbe", "livenessProbe", "startupProbe"] {
                if let Some(name) = container[probe]["httpGet"]["port"].as_str() {
                    assert!(port_names.contains(name), "{probe}: no port {name}");
                }
            }
            // Pod Security's level `restricted`.
            let security = &container["securityContext"];
            assert_eq!(security["allowPrivilegeEscalation"], false);
            assert_eq!(security["runAsNonRoot"], true);
            assert_eq!(security["capabilities"]["drop"][0], "ALL");
            assert!(security["capabilities"]["add"].is_null());
            assert_eq!(
                security["seccompProfile"]["type"], "RuntimeDefault",
                "{}",
                object["metadata"]["name"]
            );
            assert_eq!(security["readOnlyRootFilesystem"], true);
            assert_eq!(container["imagePullPolicy"], "IfNotPresent");
        }
        assert!(pod["initContainers"].is_null());
        for volume in list(pod, "/volumes") {
            assert!(volume["hostPath"].is_null(), "{volume}");
        }
    }
    assert!(seen > 8);
}

/// A role names what there is: groups, resources and verbs of Kubernetes, or our own.
#[test]
fn roles_are_spelt_right() {
    let verbs = [
        "create", "delete", "get", "list", "patch", "update", "watch",
    ];
    let core = [
        "configmaps",
        "namespaces",
        "nodes",
        "pods",
        "secrets",
        "serviceaccounts",
        "services",
    ];
    let others = [
        "admissionregistration.k8s.io mutatingwebhookconfigurations",
        "admissionregistration.k8s.io validatingwebhookconfigurations",
        "authentication.k8s.io tokenreviews",
        "authorization.k8s.io subjectaccessreviews",
        "coordination.k8s.io leases",
        "discovery.k8s.io endpointslices",
    ];
    for object in objects() {
        for rule in list(&object, "/rules") {
            for verb in list(rule, "/verbs") {
                assert!(verbs.contains(&verb.as_str().expect("verb")), "{verb}");
            }
            for group in list(rule, "/apiGroups").filter_map(Value::as_str) {
                for resource in list(rule, "/resources").filter_map(Value::as_str) {
                    let known = match group {
                        "" => core.contains(&resource),
                        group if group.ends_with(".istio.io") => true,
                        group => others.contains(&format!("{group} {resource}").as_str()),
                    };
                    assert!(known, "{group} {resource}");
                }
            }
        }
    }
}
