//! What holds for every pod: injecting twice is injecting once, and what was added can be told from what was there.

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::{Map, Value, json};

use mesh_inject::{Outcome, STATUS_ANNOTATION, Skip};

use crate::{Settings, golden};

fn action() -> impl Strategy<Value = Value> {
    let port = 1u16..15000;
    prop_oneof![
        (port.clone(), "/[a-z]{0,5}").prop_map(|(port, path)| json!({ "httpGet": { "path": path, "port": port } })),
        port.clone().prop_map(|port| json!({ "httpGet": { "port": port, "scheme": "HTTPS", "host": "h", "httpHeaders": [{ "name": "a", "value": "b" }] } })),
        port.clone().prop_map(|port| json!({ "tcpSocket": { "port": port } })),
        port.prop_map(|port| json!({ "grpc": { "port": port, "service": "s" } })),
        Just(json!({ "exec": { "command": ["x"] } })),
    ]
}

fn probe() -> impl Strategy<Value = Value> {
    (action(), option::of(1u8..9)).prop_map(|(mut probe, timeout)| {
        if let Some(timeout) = timeout {
            probe["timeoutSeconds"] = json!(timeout);
        }
        probe
    })
}

fn container() -> impl Strategy<Value = Value> {
    let probes = btree_map(
        select(vec!["livenessProbe", "readinessProbe", "startupProbe"]),
        probe(),
        0..3,
    );
    let hooks = btree_map(select(vec!["preStop", "postStart"]), action(), 0..2);
    (
        probes,
        hooks,
        option::of(1u16..15000),
        option::of(0u32..5000),
    )
        .prop_map(|(probes, hooks, port, user)| {
            let mut container = json!({ "image": "x" });
            for (name, probe) in probes {
                container[name] = probe;
            }
            if !hooks.is_empty() {
                container["lifecycle"] = json!(hooks);
            }
            if let Some(port) = port {
                container["ports"] = json!([{ "containerPort": port }]);
            }
            if let Some(user) = user {
                container["securityContext"] = json!({ "runAsUser": user });
            }
            container
        })
}

const ANNOTATIONS: &[(&str, &str)] = &[
    ("inject.istio.io/templates", "sidecar"),
    ("prometheus.io/port", "9090"),
    ("prometheus.io/path", "/m"),
    ("prometheus.io/scrape", "true"),
    (
        "proxy.istio.io/config",
        "holdApplicationUntilProxyStarts: true",
    ),
    ("sidecar.istio.io/nativeSidecar", "false"),
    ("sidecar.istio.io/rewriteAppHTTPProbers", "false"),
    ("sidecar.istio.io/interceptionMode", "NONE"),
    ("sidecar.istio.io/userVolume", r#"{"u":{"emptyDir":{}}}"#),
    ("kubectl.kubernetes.io/default-container", "a"),
    ("other", "kept"),
];

const LABELS: &[(&str, &str)] = &[
    ("app", "a"),
    ("version", "v1"),
    ("security.istio.io/tlsMode", "disabled"),
    ("service.istio.io/canonical-name", "c"),
];

fn named(items: Vec<Value>, prefix: &str) -> Vec<Value> {
    let name = |(index, mut item): (usize, Value)| {
        item["name"] = json!(format!("{prefix}{index}"));
        item
    };
    items.into_iter().enumerate().map(name).collect()
}

fn pod() -> impl Strategy<Value = Value> {
    (
        vec(container(), 1..4),
        vec((container(), any::<bool>()), 0..3),
        option::of(vec(Just(json!({ "emptyDir": {} })), 0..3)),
        subsequence(ANNOTATIONS, 0..ANNOTATIONS.len()),
        subsequence(LABELS, 0..LABELS.len()),
        option::of(container()),
    )
        .prop_map(|(containers, inits, volumes, annotations, labels, own)| {
            let mut containers = named(containers, "c");
            if let Some(mut own) = own {
                own["name"] = json!("istio-proxy");
                containers.push(own);
            }
            let inits = inits.into_iter().map(|(mut init, native)| {
                if native {
                    init["restartPolicy"] = json!("Always");
                }
                init
            });
            let inits = named(inits.collect(), "i");
            let mut pod = json!({ "metadata": { "name": "p" }, "spec": { "containers": containers, "future": [1] } });
            if !inits.is_empty() {
                pod["spec"]["initContainers"] = json!(inits);
            }
            if let Some(volumes) = volumes {
                pod["spec"]["volumes"] = json!(named(volumes, "v"));
            }
            let map = |pairs: &[(&str, &str)]| -> Map<String, Value> {
                pairs.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect()
            };
            for (field, pairs) in [("annotations", map(&annotations)), ("labels", map(&labels))] {
                if !pairs.is_empty() {
                    pod["metadata"][field] = pairs.into();
                }
            }
            pod
        })
}

fn json_of(text: &Value) -> Value {
    serde_json::from_str(text.as_str().unwrap_or("null")).unwrap_or_default()
}

/// The pod before injection, from the injected one alone; of the pod's own proxy the container's place is not known, so it is left out.
fn without_what_was_added(injected: &Value) -> Value {
    let mut pod = injected.clone();
    let annotations = pod["metadata"]["annotations"].clone();
    let status = json_of(&annotations[STATUS_ANNOTATION]);
    let spec = pod["spec"].clone();
    let mut all = ["containers", "initContainers"]
        .iter()
        .filter_map(|list| spec[*list].as_array())
        .flatten();
    let proxy = all.find(|c| c["name"] == "istio-proxy").expect("a proxy");
    let variable = |name: &str| {
        let env = proxy["env"].as_array().into_iter().flatten();
        let found = env.clone().find(|v| v["name"] == name);
        json_of(&found.map_or(Value::Null, |v| v["value"].clone()))
    };
    for list in ["containers", "initContainers", "volumes"] {
        let added = status[list].as_array().cloned().unwrap_or_default();
        if let Some(items) = pod["spec"][list].as_array_mut() {
            items.retain(|item| !added.contains(&item["name"]));
        }
    }
    restore_probes(&mut pod, &variable("ISTIO_KUBE_APP_PROBERS"));
    let own = variable("ISTIO_PROMETHEUS_ANNOTATIONS");
    for field in ["scrape", "path", "port"] {
        pod["metadata"]["annotations"][format!("prometheus.io/{field}")] = own[field].clone();
    }
    pod
}

fn restore_probes(pod: &mut Value, probes: &Value) {
    for (path, original) in probes.as_object().into_iter().flatten() {
        let parts: Vec<&str> = path.split('/').collect();
        for list in ["containers", "initContainers"] {
            let items = pod["spec"][list].as_array_mut();
            let Some(container) = items.into_iter().flatten().find(|c| c["name"] == parts[2])
            else {
                continue;
            };
            let probe = match parts[3] {
                "livez" => &mut container["livenessProbe"],
                "readyz" => &mut container["readinessProbe"],
                "startupz" => &mut container["startupProbe"],
                "prestopz" => &mut container["lifecycle"]["preStop"],
                _ => &mut container["lifecycle"]["postStart"],
            };
            assert_eq!(probe["httpGet"]["path"], path.as_str());
            assert_eq!(probe["httpGet"]["port"], 15020);
            let probe = probe.as_object_mut().expect("a probe");
            probe.shift_remove("httpGet");
            let action = original.as_object().expect("an object").iter();
            probe.extend(
                action
                    .filter(|(k, _)| *k != "timeoutSeconds")
                    .map(|(k, v)| (k.clone(), v.clone())),
            );
        }
    }
}

/// Makes a pod comparable: lists and maps that are empty, our container, and what injection sets where nobody has.
fn comparable(pod: &Value, before: &Value) -> Value {
    let mut pod = pod.clone();
    for list in ["containers", "initContainers", "volumes"] {
        let items = pod["spec"][list].as_array().cloned().unwrap_or_default();
        let items = items
            .into_iter()
            .filter(|item| item["name"] != "istio-proxy");
        pod["spec"][list] = items.collect();
    }
    for field in ["annotations", "labels"] {
        let was = before["metadata"][field].as_object();
        let is = pod["metadata"][field]
            .as_object()
            .cloned()
            .unwrap_or_default();
        let stays = |(name, value): &(String, Value)| {
            let ours = ["istio.io/", "kubectl.kubernetes.io/"]
                .iter()
                .any(|part| name.contains(part));
            !value.is_null()
                && name != "prometheus.io/scrape"
                && (!ours || was.is_some_and(|was| was.contains_key(name)))
        };
        pod["metadata"][field] = Value::Object(is.into_iter().filter(stays).collect());
    }
    pod
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn twice_is_once_and_what_was_added_can_be_taken_away(pod in pod(), native in any::<bool>()) {
        let settings = Settings { native, ..Settings::read(&golden().join("native")) };
        let Ok(Outcome::Patched(patched)) = settings.inject(&pod) else {
            panic!("not injected: {pod}");
        };
        prop_assert_eq!(settings.inject(&patched.pod), Ok(Outcome::Skipped(Skip::AlreadyInjected)));
        let names = ["containers", "initContainers"].iter().filter_map(|list| patched.pod["spec"][*list].as_array());
        let mut names: Vec<_> = names.flatten().map(|c| c["name"].as_str()).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        prop_assert_eq!(names.len(), count, "names of containers must differ");
        prop_assert_eq!(comparable(&without_what_was_added(&patched.pod), &pod), comparable(&pod, &pod));
    }
}
