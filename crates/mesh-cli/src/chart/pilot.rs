//! The control plane's template.

use serde_json::{Value, json};

use super::text::{Text, pull_secrets, remove, tune};
use crate::install::webhooks;
use crate::installer::tags::label_of;

const BUDGET: &str = "($v.global.defaultPodDisruptionBudget | default dict).enabled";
const VALIDATION: &str = "ne (toString $v.global.configValidation) \"false\"";

/// Its objects by a named revision, and by the default one, which has more webhooks.
pub(super) fn template(objects: Vec<Value>, of_default: &[Value]) -> String {
    let mut out = String::new();
    let more = more_webhooks(of_default);
    for mut object in objects {
        let mut text = Text::default();
        tune(&mut text, &mut object, "$v.pilot");
        let tagged = !label_of(&object, webhooks::TAG).is_empty();
        let condition = match object["kind"].as_str().unwrap_or_default() {
            "HorizontalPodAutoscaler" => "$v.pilot.autoscaleEnabled",
            "PodDisruptionBudget" => BUDGET,
            "ValidatingWebhookConfiguration" => {
                validating(&mut text, &mut object);
                VALIDATION
            }
            kind => {
                match kind {
                    "ServiceAccount" => pull_secrets(&mut text, &mut object),
                    "ConfigMap" => config_map(&mut text, &mut object),
                    "Service" => {
                        let metadata = &mut object["metadata"];
                        text.field(metadata, "annotations", "$v.pilot.serviceAnnotations");
                    }
                    "Deployment" => deployment(&mut text, &mut object),
                    "MutatingWebhookConfiguration" => {
                        mutating(&mut text, &mut object, (!tagged).then_some(&more))
                    }
                    _ => {}
                }
                ""
            }
        };
        let document = text.document(&object, condition);
        if tagged {
            out.push_str(&format!(
                "{{{{- range $tag := $v.revisionTags }}}}\n{document}{{{{- end }}}}\n"
            ));
        } else {
            out.push_str(&document);
        }
    }
    out
}

fn config_map(text: &mut Text, object: &mut Value) {
    let data = &mut object["data"];
    if data["mesh"].is_string() {
        remove(data, "mesh");
        text.put(data, "mesh: |-\n  {{- $mesh | toYaml | nindent %M }}");
        return;
    }
    let given = "(dict \"values\" $v \"version\" $version)";
    *data = json!({});
    text.put(
        data,
        &format!(
            "config: |-\n  {{{{- include \"mesh.injector.config\" {given} | fromJson | toYaml | nindent %M }}}}\nvalues: {{{{ include \"mesh.injector.values\" {given} | quote }}}}"
        ),
    );
}

fn deployment(text: &mut Text, object: &mut Value) {
    let container = &mut object["spec"]["template"]["spec"]["containers"][0];
    container["image"] = json!(text.value(
        "{{ include \"mesh.image\" (dict \"name\" $v.pilot.image \"hub\" $v.pilot.hub \"tag\" $v.pilot.tag \"global\" $v.global \"version\" $version) }}"
    ));
    text.put(
        &mut container["args"],
        "{{- if ne $ns \"@usual@\" }}\n- --istioNamespace={{ $ns }}\n{{- end }}\n{{- with $logging.level }}\n- --log={{ include \"mesh.level\" . }}\n{{- end }}",
    );
    for variable in container["env"].as_array_mut().into_iter().flatten() {
        if variable["name"] == "CLUSTER_ID" {
            variable["value"] = json!(text.value("{{ $cluster }}"));
        }
    }
    text.put(
        &mut container["env"],
        "{{- range $name, $value := $v.pilot.env }}\n- name: {{ $name }}\n  value: {{ $value | quote }}\n{{- end }}",
    );
}

/// The entries that only the default revision has: for who names none, and at the end for who says nothing at all.
pub(super) fn more_webhooks(of_default: &[Value]) -> [Value; 2] {
    let own = of_default.iter().find(|object| {
        object["kind"] == "MutatingWebhookConfiguration"
            && label_of(object, webhooks::TAG).is_empty()
    });
    let entries = own.and_then(|own| own["webhooks"].as_array().cloned());
    let mut more: Vec<Value> = entries.unwrap_or_default().into_iter().skip(2).collect();
    let last: Vec<Value> = more.pop().into_iter().collect();
    [more.into(), last.into()]
}

pub(super) fn mutating(text: &mut Text, object: &mut Value, more: Option<&[Value; 2]>) {
    in_namespace(text, object);
    let again = "{{ $hook.reinvocationPolicy | default \"Never\" }}";
    for webhook in object["webhooks"].as_array_mut().into_iter().flatten() {
        webhook["reinvocationPolicy"] = json!(text.value(again));
    }
    let Some([default, auto]) = more else {
        return;
    };
    let entries = |entries: &Value| {
        let mut entries = entries.clone();
        let mut text = Text::default();
        for webhook in entries.as_array_mut().into_iter().flatten() {
            webhook["reinvocationPolicy"] = json!(text.value(again));
        }
        text.render(&entries)
    };
    let lines = format!(
        "{{{{- if eq $rev \"default\" }}}}\n{}{{{{- if $hook.enableNamespacesByDefault }}}}\n{}{{{{- end }}}}\n{{{{- end }}}}",
        entries(default),
        entries(auto)
    );
    text.put(&mut object["webhooks"], &lines);
}

pub(super) fn validating(text: &mut Text, object: &mut Value) {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let name = name.to_owned();
    let webhook = &mut object["webhooks"][0];
    remove(webhook, "objectSelector");
    text.put(
        webhook,
        "{{- if eq $rev \"default\" }}\nobjectSelector: {}\n{{- else }}\nobjectSelector:\n  matchExpressions:\n  - key: istio.io/rev\n    operator: In\n    values:\n    - {{ $rev }}\n{{- end }}",
    );
    // The control plane makes it binding; from then on the field is its own.
    remove(webhook, "failurePolicy");
    let group = "admissionregistration.k8s.io/v1";
    text.put(
        webhook,
        &format!(
            "{{{{- if not (lookup \"{group}\" \"ValidatingWebhookConfiguration\" \"\" (printf \"{}%s-%s\" $suffix $ns)) }}}}\nfailurePolicy: Ignore\n{{{{- end }}}}",
            name.split("-zz").next().unwrap_or_default()
        ),
    );
}

/// Configurations of webhooks belong to no namespace: in an unusual one their names carry it.
fn in_namespace(text: &mut Text, object: &mut Value) {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let name = format!("{name}{}", text.value("{{ $elsewhere }}"));
    object["metadata"]["name"] = json!(name);
}
