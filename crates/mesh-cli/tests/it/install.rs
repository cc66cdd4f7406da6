//! The objects of an installation.

use std::collections::BTreeMap;

use mesh_cli::install::{InstallOptions, Profile, manifests};
use mesh_inject::config::Selector;
use serde_json::Value;

use super::world::World;

fn of(profile: Profile) -> Vec<Vec<Value>> {
    manifests(&InstallOptions {
        profile,
        concurrency: Some(1),
        ..InstallOptions::default()
    })
    .expect("manifests")
}

fn find<'a>(waves: &'a [Vec<Value>], kind: &str, name: &str) -> &'a Value {
    waves
        .iter()
        .flatten()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("{kind} {name}"))
}

#[test]
fn profiles_differ_in_their_gateways() {
    assert_eq!(of(Profile::Empty).len(), 0);
    assert_eq!(of(Profile::Minimal).len(), 2);
    assert_eq!(of(Profile::Default).len(), 3);
    find(&of(Profile::Demo), "Deployment", "istio-egressgateway");
    let waves = of(Profile::Default);
    assert_eq!(waves[0].len(), 16);
    assert!(
        !waves
            .iter()
            .flatten()
            .any(|object| object["metadata"]["name"] == "istio-egressgateway")
    );
}

#[test]
fn the_gateway_is_a_router_with_its_ports() {
    let waves = of(Profile::Default);
    let pod = &find(&waves, "Deployment", "istio-ingressgateway")["spec"]["template"]["spec"];
    let proxy = &pod["containers"][0];
    assert_eq!(proxy["image"], InstallOptions::default().image);
    assert_eq!(proxy["args"][1], "router");
    let env = |name: &str| {
        proxy["env"]
            .as_array()
            .expect("env")
            .iter()
            .find(|entry| entry["name"] == name)
            .unwrap_or_else(|| panic!("{name}"))["value"]
            .clone()
    };
    assert_eq!(
        env("PROXY_CONFIG"),
        "{\"discoveryAddress\":\"istiod.istio-system.svc:15012\",\"concurrency\":1}"
    );
    assert_eq!(
        env("ISTIO_META_OWNER"),
        "kubernetes://apis/apps/v1/namespaces/istio-system/deployments/istio-ingressgateway"
    );
    let service = &find(&waves, "Service", "istio-ingressgateway")["spec"];
    let ports: Vec<_> = service["ports"]
        .as_array()
        .expect("ports")
        .iter()
        .map(|port| (port["port"].as_u64(), port["targetPort"].as_u64()))
        .collect();
    assert_eq!(
        ports,
        [
            (Some(15021), Some(15021)),
            (Some(80), Some(8080)),
            (Some(443), Some(8443))
        ]
    );
    assert_eq!(service["type"], "LoadBalancer");
}

#[test]
fn configuration_is_read_by_those_who_read_it() {
    let waves = of(Profile::Demo);
    let mesh = find(&waves, "ConfigMap", "istio")["data"]["mesh"]
        .as_str()
        .expect("text")
        .to_owned();
    let config = mesh_api::mesh_config::MeshConfig::from_yaml(&mesh).expect("mesh configuration");
    assert_eq!(config.default_config.concurrency, Some(1));
    assert!(config.unsupported().is_empty());
    let data = &find(&waves, "ConfigMap", "istio-sidecar-injector")["data"];
    let injector = mesh_inject::InjectorConfig::from_config_map(
        data["config"].as_str().expect("text"),
        data["values"].as_str().expect("text"),
    )
    .expect("injector configuration");
    assert_eq!(injector.image, InstallOptions::default().image);
    assert_eq!(injector.resources["requests"]["cpu"], "10m");
}

/// The roles are Istio's by name, are bound to the accounts that the pods run as, and hold no wildcard but that of Istio's kinds.
#[test]
fn every_part_has_its_own_rights() {
    let waves = of(Profile::Demo);
    for (kind, name, account) in [
        ("ClusterRole", "istiod-clusterrole-istio-system", "istiod"),
        ("Role", "istiod", "istiod"),
        (
            "Role",
            "istio-ingressgateway-sds",
            "istio-ingressgateway-service-account",
        ),
        (
            "Role",
            "istio-egressgateway-sds",
            "istio-egressgateway-service-account",
        ),
    ] {
        let role = find(&waves, kind, name);
        for rule in role["rules"].as_array().expect("rules") {
            let all = |field: &str| {
                let mut list = rule[field].as_array().expect(field).iter();
                list.any(|item| item == "*")
            };
            let groups = rule["apiGroups"].as_array().expect("apiGroups");
            let istio = groups
                .iter()
                .all(|group| group.as_str().is_some_and(|g| g.ends_with("istio.io")));
            assert!(!all("verbs") && !all("apiGroups"), "{rule}");
            assert!(!all("resources") || istio, "{rule}");
        }
        let binding = find(&waves, &format!("{kind}Binding"), name);
        assert_eq!(binding["roleRef"]["kind"], kind);
        assert_eq!(binding["roleRef"]["name"], name);
        assert_eq!(binding["subjects"][0]["name"], account);
        find(&waves, "ServiceAccount", account);
    }
    let role = find(&waves, "ClusterRole", "istiod-clusterrole-istio-system");
    let may = |resource: &str, verb: &str| {
        role["rules"].as_array().expect("rules").iter().any(|rule| {
            let has = |field: &str, text: &str| {
                let list = rule[field].as_array().expect(field);
                list.iter().any(|item| item == text)
            };
            has("resources", resource) && has("verbs", verb)
        })
    };
    assert!(may("virtualservices/status", "patch") && may("tokenreviews", "create"));
    assert!(!may("secrets", "create") && !may("pods", "delete"));
}

#[test]
fn a_revision_marks_every_name() {
    let options = InstallOptions {
        profile: Profile::Minimal,
        revision: "canary".to_owned(),
        ..InstallOptions::default()
    };
    let waves = manifests(&options).expect("manifests");
    assert!(waves[1].iter().all(|object| {
        object["metadata"]["name"]
            .as_str()
            .expect("name")
            .contains("canary")
    }));
    let webhooks = find(
        &waves,
        "MutatingWebhookConfiguration",
        "istio-sidecar-injector-canary",
    )["webhooks"]
        .as_array()
        .expect("webhooks")
        .len();
    assert_eq!(webhooks, 2);
}

/// The selectors of the webhook mean the same as the rule that the injector knows.
#[test]
fn webhook_selectors_follow_the_rule() {
    let waves = of(Profile::Minimal);
    let webhooks = find(
        &waves,
        "MutatingWebhookConfiguration",
        "istio-sidecar-injector",
    )["webhooks"]
        .as_array()
        .expect("webhooks");
    let selector =
        |value: &Value| serde_json::from_value::<Selector>(value.clone()).expect("selector");
    let all = |key: &str, values: &[Option<&str>]| {
        values
            .iter()
            .map(|value| value.map(|value| (key.to_owned(), value.to_owned())))
            .collect::<Vec<_>>()
    };
    let mut checked = 0;
    for injection in all(
        "istio-injection",
        &[None, Some("enabled"), Some("disabled")],
    ) {
        for rev in all("istio.io/rev", &[None, Some("default"), Some("canary")]) {
            for inject in all(
                "sidecar.istio.io/inject",
                &[None, Some("true"), Some("false")],
            ) {
                for pod_rev in all("istio.io/rev", &[None, Some("default"), Some("canary")]) {
                    let namespace: BTreeMap<_, _> = injection.iter().chain(&rev).cloned().collect();
                    let pod: BTreeMap<_, _> = inject.iter().chain(&pod_rev).cloned().collect();
                    let called = webhooks
                        .iter()
                        .filter(|webhook| {
                            selector(&webhook["namespaceSelector"]).matches(&namespace)
                                && selector(&webhook["objectSelector"]).matches(&pod)
                        })
                        .count();
                    let expected = mesh_inject::webhook_revision(&namespace, &pod).as_deref()
                        == Some("default");
                    assert_eq!(
                        called,
                        usize::from(expected),
                        "namespace {namespace:?}, pod {pod:?}"
                    );
                    checked += 1;
                }
            }
        }
    }
    assert_eq!(checked, 81);
}

/// The API server takes every object, strictly.
#[tokio::test]
async fn everything_can_be_applied() {
    let world = World::start().await;
    for (index, wave) in of(Profile::Demo).iter().enumerate() {
        let name = format!("wave{index}.yaml");
        world.file(&name, &mesh_api::yaml::to_string_all(wave));
        let out = world.mesh(&format!("apply -f @{name}")).await.ok();
        assert_eq!(out.lines().count(), wave.len(), "{out}");
        let again = world.mesh(&format!("apply -f @{name}")).await.ok();
        assert!(
            again.lines().all(|line| line.ends_with(" unchanged")),
            "{again}"
        );
    }
}
