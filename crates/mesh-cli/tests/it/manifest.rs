//! What is installed, profile by profile: golden files, and the API server's opinion of every object.
//! `UPDATE_GOLDEN=1` rewrites the files of `tests/golden/install`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use mesh_cli::install::{PROFILES, Plan, Settings};
use serde_json::{Value, json};

use super::world::World;

fn plan(sets: &[&str]) -> anyhow::Result<Plan> {
    let settings = Settings {
        set: sets.iter().map(|set| (*set).to_owned()).collect(),
        ..Settings::default()
    };
    Ok(Plan::new(&settings.spec(None)?)?)
}

/// A profile with what it can't do without.
pub fn of_profile(name: &str) -> Plan {
    let profile = format!("profile={name}");
    let mut sets = vec![profile.as_str()];
    if name == "remote" {
        sets.push("values.global.remotePilotAddress=192.0.2.7");
    }
    plan(&sets).expect(name)
}

fn find<'a>(plan: &'a Plan, kind: &str, name: &str) -> &'a Value {
    plan.objects()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("{kind} {name}"))
}

/// The text of a golden file: kinds by name alone, no version.
fn golden(plan: &Plan) -> String {
    let objects: Vec<Value> = plan
        .objects()
        .map(|object| match object["kind"].as_str() {
            Some("CustomResourceDefinition") => {
                json!({ "kind": object["kind"], "metadata": object["metadata"] })
            }
            _ => object.clone(),
        })
        .collect();
    mesh_api::yaml::to_string_all(&objects).replace(env!("CARGO_PKG_VERSION"), "VERSION")
}

fn compare(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/install")
        .join(format!("{name}.yaml"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().expect("folder")).expect("folder");
        fs::write(&path, text).expect("golden file");
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        expected == text,
        "{name}: not what the golden file says; look at the difference after UPDATE_GOLDEN=1"
    );
}

#[test]
fn profiles_are_as_recorded() {
    let mut names = BTreeSet::new();
    for (name, _) in PROFILES {
        compare(name, &golden(&of_profile(name)));
        names.insert(format!("{name}.yaml"));
    }
    let settings = [
        "profile=demo",
        "revision=canary",
        "namespace=mesh-system",
        "hub=registry.example/team",
        "tag=1.2.3",
        "meshConfig.outboundTrafficPolicy.mode=REGISTRY_ONLY",
        "values.global.imagePullSecrets={regcred}",
        "values.global.logging.level=default:debug",
        "values.global.proxy.autoInject=disabled",
        "values.pilot.env.XDS_AUTH=false",
        "values.sidecarInjectorWebhook.enableNamespacesByDefault=true",
        "components.pilot.k8s.replicaCount=2",
        "components.pilot.k8s.nodeSelector.kubernetes\\.io/os=linux",
        "components.pilot.k8s.podDisruptionBudget.maxUnavailable=1",
        "components.ingressGateways[0].k8s.hpaSpec.maxReplicas=9",
        "components.ingressGateways[0].k8s.service.type=NodePort",
        "components.ingressGateways[0].k8s.serviceAnnotations.example=a",
        "components.ingressGateways[1].name=inner",
        "components.ingressGateways[1].enabled=true",
        "components.ingressGateways[1].namespace=edge",
        "components.ingressGateways[1].label.istio=inner",
        "components.egressGateways[0].k8s.overlays[0].kind=Deployment",
        "components.egressGateways[0].k8s.overlays[0].name=istio-egressgateway",
        "components.egressGateways[0].k8s.overlays[0].patches[0].path=spec.template.spec.containers.[name:istio-proxy].args",
    ];
    compare("settings", &golden(&plan(&settings).expect("settings")));
    names.insert("settings.yaml".to_owned());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/install");
    let there: BTreeSet<String> = fs::read_dir(folder)
        .expect("golden folder")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    assert_eq!(there, names, "golden files that nobody reads");
}

/// No object twice, everything marked, and nothing that depends on the run.
#[test]
fn manifests_are_regular() {
    for (name, _) in PROFILES {
        let plan = of_profile(name);
        assert_eq!(plan, of_profile(name), "{name}");
        let mut seen = BTreeSet::new();
        for object in plan.objects() {
            let text = |path: &str| object.pointer(path).map(Value::to_string);
            let id = [
                "/apiVersion",
                "/kind",
                "/metadata/namespace",
                "/metadata/name",
            ]
            .map(text);
            assert!(seen.insert(id.clone()), "{name}: {id:?} twice");
            let labels = &object["metadata"]["labels"];
            assert_eq!(labels["app.kubernetes.io/managed-by"], "mesh", "{id:?}");
            let shared = labels["operator.istio.io/component"] == "Base";
            let owner = &labels["install.operator.istio.io/owning-resource"];
            assert_eq!(owner.is_null(), shared, "{id:?}");
        }
    }
}

/// The profile preview is the default one, and has proxies that answer DNS.
#[test]
fn preview_has_what_is_new() {
    let mesh = |name: &str| {
        let plan = of_profile(name);
        let text = find(&plan, "ConfigMap", "istio")["data"]["mesh"].clone();
        mesh_api::mesh_config::MeshConfig::from_yaml(text.as_str().expect("text"))
            .expect("mesh configuration")
    };
    let metadata = |name: &str| mesh(name).default_config.proxy_metadata;
    let capture = "ISTIO_META_DNS_CAPTURE";
    assert_eq!(
        metadata("preview").get(capture).map(String::as_str),
        Some("true")
    );
    assert_eq!(metadata("default").get(capture), None);
    assert!(of_profile("preview").warnings.is_empty());
}

fn images(plan: &Plan) -> Vec<String> {
    fn collect(value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    match value {
                        Value::String(text) if key == "image" => into.push(text.clone()),
                        value => collect(value, into),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| collect(item, into)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    for object in plan
        .objects()
        .filter(|object| object["kind"] != "CustomResourceDefinition")
    {
        collect(object, &mut found);
        if let Some(values) = object["data"]["values"].as_str() {
            collect(&serde_json::from_str(values).expect("values"), &mut found);
        }
    }
    found
}

#[test]
fn every_image_can_be_chosen() {
    let all = images(&plan(&["profile=demo", "hub=h.example/x", "tag=t"]).expect("plan"));
    // Sidecars, control plane, two gateways.
    assert_eq!(all, ["h.example/x/mesh:t"; 4]);
    let each = plan(&[
        "profile=demo",
        "values.pilot.image=a:1",
        "values.global.proxy.image=other",
        "values.global.tag=2",
        "components.egressGateways[0].tag=3",
    ]);
    let all = images(&each.expect("plan"));
    assert_eq!(all, ["other:2", "a:1", "other:2", "other:3"]);
}

/// Older names are the newer ones' inferiors, whatever the profile says.
#[test]
fn both_names_of_a_setting_work() {
    let cpu = |sets: &[&str]| {
        let plan = plan(sets).expect("plan");
        let pod = &find(&plan, "Deployment", "istiod")["spec"]["template"]["spec"];
        pod["containers"][0]["resources"]["requests"]["cpu"].clone()
    };
    let older = "values.pilot.resources.requests.cpu=2";
    let newer = "components.pilot.k8s.resources.requests.cpu=3";
    for profile in ["profile=default", "profile=demo"] {
        assert_eq!(cpu(&[profile, older]), 2, "{profile}");
        assert_eq!(cpu(&[profile, newer, older]), 3, "{profile}");
    }
    let gateway = "values.gateways.istio-ingressgateway.type=NodePort";
    let plan = plan(&["profile=demo", gateway]).expect("plan");
    let service = find(&plan, "Service", "istio-ingressgateway");
    assert_eq!(service["spec"]["type"], "NodePort");
}

#[test]
fn wrong_settings_are_refused() {
    for (sets, part) in [
        (
            &["values.global.hubb=x"][..],
            "did you mean values.global.hub?",
        ),
        (
            &["components.cni.enabled=true"],
            "does not have this setting of Istio's",
        ),
        (
            &["profile=remote"],
            "values.global.remotePilotAddress: the control plane is elsewhere",
        ),
        (&["revision=Canary"], "revision: \"Canary\" is not a name"),
        (&["meshConfig.nothing=1"], "meshConfig"),
        (
            &[
                "values.global.proxy.logLevel=",
                "values.global.logging.level=ads:debug",
            ],
            "there are no other scopes",
        ),
        (
            &["components.ingressGateways[1].enabled=true"],
            "two gateways are called \"istio-ingressgateway\"",
        ),
        (
            &[
                "components.pilot.k8s.overlays[0].kind=Deployment",
                "components.pilot.k8s.overlays[0].name=x",
            ],
            "overlay of Deployment x: this component has no such object",
        ),
    ] {
        let error = format!("{:#}", plan(sets).expect_err("refused"));
        assert!(error.contains(part), "{sets:?}: {error}");
    }
    let quiet = plan(&[
        "meshConfig.accessLogFile=/dev/stdout",
        "values.pilot.env.PILOT_HTTP10=1",
    ]);
    let warnings = quiet.expect("plan").warnings.join("\n");
    assert!(
        warnings.contains("meshConfig.accessLogFile has no effect"),
        "{warnings}"
    );
    assert!(warnings.contains("PILOT_HTTP10"), "{warnings}");
}

/// The API server takes every object of every profile, strictly, and takes it again without a change.
#[tokio::test]
async fn every_object_is_valid() {
    for (name, _) in PROFILES {
        let world = World::start().await;
        // The kinds are the same in every profile.
        let once =
            |object: &&Value| name == "default" || object["kind"] != "CustomResourceDefinition";
        let plan = of_profile(name);
        let objects: Vec<Value> = plan.objects().filter(once).cloned().collect();
        if objects.is_empty() {
            assert_eq!(name, "empty");
            continue;
        }
        world.file("all.yaml", &mesh_api::yaml::to_string_all(&objects));
        let out = world.mesh("apply -f @all.yaml").await.ok();
        assert_eq!(out.lines().count(), objects.len(), "{name}: {out}");
        let again = world.mesh("apply -f @all.yaml").await.ok();
        let changed: Vec<&str> = again
            .lines()
            .filter(|line| !line.ends_with(" unchanged"))
            .collect();
        assert!(changed.is_empty(), "{name}: {changed:?}");
    }
}

#[tokio::test]
async fn commands_print_manifests_and_profiles() {
    let world = World::start().await;
    let text = world
        .mesh("manifest generate --set profile=minimal")
        .await
        .ok();
    let objects = mesh_api::yaml::documents(&text, "out").expect("YAML");
    assert_eq!(objects.len(), of_profile("minimal").objects().count());
    let list = world.mesh("profile list").await.ok();
    assert_eq!(list.lines().count(), 7, "{list}");
    let dump = world.mesh("profile dump demo").await.ok();
    world.file("demo.yaml", &dump);
    let same = world.mesh("manifest generate -f @demo.yaml").await.ok();
    let direct = world
        .mesh("manifest generate --set profile=demo")
        .await
        .ok();
    assert!(same == direct, "the dump of a profile is the profile");
    let part = world
        .mesh("profile dump -o json -p components.pilot")
        .await
        .ok();
    assert_eq!(part, "{\n  \"enabled\": true\n}\n");
    let diff = world.mesh("profile diff default demo").await;
    assert!(
        diff.out
            .contains("-      enabled: false\n+      enabled: true\n"),
        "{}",
        diff.out
    );
    let none = world.mesh("profile diff demo demo").await.ok();
    assert_eq!(none, "");
    let error = world
        .mesh("manifest generate --set profile=big")
        .await
        .error();
    assert!(error.contains("there is no profile \"big\""), "{error}");
}
