//! The Helm chart: what `mesh install` applies, as templates.
//!
//! Its templates are made from the objects of an installation, so that the two can't drift apart: in the objects of a plan single values are
//! replaced by marks, and in their text the marks by template actions. Which values there are says `chart/values.schema.json`.

mod gateway;
mod pilot;
mod remote;
mod text;

use serde_json::{Value, json};

use crate::install::{InstallError, MANAGED_BY, OWNER, Plan, profile};
use crate::installer::build;
use crate::version::VERSION;

/// A revision and a tag by which their places in the text are found.
const REVISION: &str = "zz-rev";
const TAG: &str = "zz-tag";

/// Profiles that the chart has: all but `empty`, which is nothing.
const PROFILES: [&str; 6] = [
    "default",
    "demo",
    "minimal",
    "openshift",
    "preview",
    "remote",
];

/// The first lines of each template.
const HEAD: &str = r#"{{- $v := include "mesh.values" . | fromJson }}
{{- $version := "@VERSION@" }}
{{- $ns := .Release.Namespace }}
{{- $rev := $v.revision | default "default" }}
{{- $suffix := eq $rev "default" | ternary "" (printf "-%s" $rev) }}
{{- $elsewhere := eq $ns "istio-system" | ternary "" (printf "-%s" $ns) }}
{{- $mesh := include "mesh.config" (dict "values" $v "suffix" $suffix "namespace" $ns) | fromJson }}
{{- $hook := $v.sidecarInjectorWebhook | default dict }}
{{- $proxy := $v.global.proxy | default dict }}
{{- $logging := $v.global.logging | default dict }}
{{- $remote := ($v.istiodRemote | default dict).enabled }}
{{- $cluster := ($v.global.multiCluster | default dict).clusterName | default "Kubernetes" }}
"#;

/// The files of the chart, by their paths in its folder.
///
/// # Errors
/// None but for a bug: the settings are our own.
pub fn files() -> anyhow::Result<Vec<(String, String)>> {
    let named = plan("default", REVISION)?;
    let default = plan("default", "default")?;
    let mut all = vec![
        file("Chart.yaml", &about()),
        (
            "values.yaml".to_owned(),
            include_str!("chart/values.yaml").to_owned(),
        ),
        (
            "values.schema.json".to_owned(),
            include_str!("chart/values.schema.json").to_owned(),
        ),
        (
            "templates/_helpers.tpl".to_owned(),
            include_str!("chart/helpers.tpl").to_owned(),
        ),
    ];
    for name in PROFILES {
        all.push(file(
            &format!("files/profile-{name}.yaml"),
            &defaults(name)?,
        ));
    }
    let kinds = named.objects().filter(|object| is_kind(object));
    let kinds: Vec<Value> = kinds.cloned().map(kept).collect();
    let text = mesh_api::yaml::to_string_all(&kinds);
    all.push(("files/kinds.yaml".to_owned(), text));
    // The texts of kinds may hold what looks like an action. They belong to one release of a cluster.
    let kinds = "{{- $v := include \"mesh.values\" . | fromJson }}\n{{- if $v.base.enabled }}\n{{ .Files.Get \"files/kinds.yaml\" }}\n{{- end }}\n".to_owned();
    all.push(("templates/kinds.yaml".to_owned(), kinds));
    let head = HEAD.replace("@VERSION@", VERSION);
    let part = |plan: &Plan, name: &str| {
        let all = plan.components.iter().filter(|part| part.name == name);
        all.flat_map(|part| part.objects.clone())
            .collect::<Vec<_>>()
    };
    let pilot = pilot::template(part(&named, "Pilot"), &part(&default, "Pilot"));
    all.push((
        "templates/control-plane.yaml".to_owned(),
        format!("{head}{{{{- if not $remote }}}}\n{pilot}{{{{- end }}}}\n"),
    ));
    let parts = |revision: &str| {
        let plan = plan("remote", revision)?;
        anyhow::Ok(part(&plan, "IstiodRemote"))
    };
    let remote = remote::template(parts(REVISION)?, parts("default")?);
    all.push((
        "templates/remote.yaml".to_owned(),
        format!("{head}{remote}"),
    ));
    for (component, name) in [
        ("IngressGateways", "istio-ingressgateway"),
        ("EgressGateways", "istio-egressgateway"),
    ] {
        let gateway = gateway::template(part(&named, component), name);
        all.push((format!("templates/{name}.yaml"), format!("{head}{gateway}")));
    }
    Ok(all)
}

fn file(path: &str, tree: &Value) -> (String, String) {
    (path.to_owned(), mesh_api::yaml::to_string(tree))
}

fn about() -> Value {
    json!({
        "apiVersion": "v2", "name": "mesh", "type": "application",
        "description": "A service mesh with Istio's resources: control plane, gateways, resource kinds.",
        "version": VERSION, "appVersion": VERSION, "kubeVersion": ">=1.28.0-0",
    })
}

/// Everything that the chart can have of a profile.
fn plan(name: &str, revision: &str) -> anyhow::Result<Plan> {
    let mut spec = profile(name)?;
    spec["revision"] = json!(revision);
    spec["values"]["revisionTags"] = json!([TAG]);
    spec["values"]["sidecarInjectorWebhook"]["enableNamespacesByDefault"] = json!(true);
    if spec["components"]["istiodRemote"]["enabled"] == true {
        spec["values"]["global"]["remotePilotAddress"] = json!(remote::ADDRESS);
    } else {
        spec["components"]["egressGateways"][0]["enabled"] = json!(true);
    }
    let mut plan = Plan::new(&spec).map_err(|error: InstallError| anyhow::anyhow!("{error}"))?;
    build::mark(&mut plan);
    for component in &mut plan.components {
        for object in &mut component.objects {
            // Helm marks what it owns in its own way.
            if let Some(labels) = object["metadata"]["labels"].as_object_mut() {
                labels.shift_remove(OWNER);
                labels.shift_remove(MANAGED_BY.0);
            }
        }
    }
    Ok(plan)
}

fn is_kind(object: &Value) -> bool {
    object["kind"] == "CustomResourceDefinition"
}

/// Kinds stay when the release goes: with them all objects of these kinds would.
fn kept(mut kind: Value) -> Value {
    kind["metadata"]["annotations"]["helm.sh/resource-policy"] = json!("keep");
    kind
}

/// The values of a profile as the chart has them.
fn defaults(name: &str) -> anyhow::Result<Value> {
    let spec = profile(name)?;
    let mut values = spec["values"].clone();
    if let Some(global) = values["global"].as_object_mut() {
        // That is the release's namespace.
        global.shift_remove("istioNamespace");
    }
    for list in ["ingressGateways", "egressGateways"] {
        for gateway in spec["components"][list].as_array().into_iter().flatten() {
            let name = gateway["name"].as_str().unwrap_or_default();
            values["gateways"][name]["enabled"] = gateway["enabled"].clone();
        }
    }
    if spec["components"]["istiodRemote"]["enabled"] == true {
        values["istiodRemote"]["enabled"] = json!(true);
    }
    values["base"]["enabled"] = spec["components"]["base"]["enabled"].clone();
    values["meshConfig"] = spec["meshConfig"].clone();
    Ok(values)
}
