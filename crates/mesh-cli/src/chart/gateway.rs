//! A gateway's template.

use serde_json::{Value, json};

use super::text::{Text, pull_secrets, remove, tune};

/// The fields of a Service that values may name.
const SERVICE: [&str; 4] = [
    "externalIPs",
    "externalTrafficPolicy",
    "loadBalancerClass",
    "loadBalancerSourceRanges",
];

/// Ports of the container: those that the Service leads to, beside its own, each once.
const PORTS: &str = r#"{{- $seen := list "15021/TCP" }}
{{- range $g.ports }}
{{- $target := .targetPort | default .port }}
{{- $protocol := .protocol | default "TCP" }}
{{- $port := printf "%v/%s" $target $protocol }}
{{- if not (or (kindIs "string" $target) (has $port $seen)) }}
{{- $seen = append $seen $port }}
- containerPort: {{ $target }}
  protocol: {{ $protocol }}
{{- end }}
{{- end }}"#;

/// The objects of the gateway of a name.
pub(super) fn template(objects: Vec<Value>, name: &str) -> String {
    let mut out =
        format!("{{{{- $g := index $v.gateways \"{name}\" }}}}\n{{{{- if $g.enabled }}}}\n");
    for mut object in objects {
        let mut text = Text::default();
        tune(&mut text, &mut object, "$g");
        let condition = match object["kind"].as_str().unwrap_or_default() {
            "HorizontalPodAutoscaler" => "$g.autoscaleEnabled",
            "PodDisruptionBudget" => {
                "($v.global.defaultPodDisruptionBudget | default dict).enabled"
            }
            "ServiceAccount" => {
                pull_secrets(&mut text, &mut object);
                ""
            }
            "Service" => {
                service(&mut text, &mut object);
                ""
            }
            "Deployment" => {
                deployment(&mut text, &mut object);
                ""
            }
            _ => "",
        };
        out.push_str(&text.document(&object, condition));
    }
    out.push_str("{{- end }}\n");
    out
}

fn service(text: &mut Text, object: &mut Value) {
    text.field(
        &mut object["metadata"],
        "annotations",
        "$g.serviceAnnotations",
    );
    let spec = &mut object["spec"];
    text.field(spec, "ports", "$g.ports");
    spec["type"] = json!(text.value("{{ $g.type }}"));
    for field in SERVICE {
        text.field(spec, field, &format!("$g.{field}"));
    }
    text.field(spec, "loadBalancerIP", "$g.loadBalancerIP");
}

fn deployment(text: &mut Text, object: &mut Value) {
    let template = &mut object["spec"]["template"];
    let annotations = &mut template["metadata"]["annotations"];
    let status = annotations["sidecar.istio.io/status"]
        .as_str()
        .unwrap_or_default();
    let secrets = text.value("{{ $v.global.imagePullSecrets | default nil | toJson }}");
    let status = status.replace(
        "\"imagePullSecrets\":null",
        &format!("\"imagePullSecrets\":{secrets}"),
    );
    annotations["sidecar.istio.io/status"] = json!(status);
    text.fields(annotations, "$hook.injectedAnnotations");
    let pod = &mut template["spec"];
    remove(pod, "imagePullSecrets");
    pull_secrets(text, pod);
    let container = &mut pod["containers"][0];
    container["image"] = json!(text.value(
        "{{ include \"mesh.image\" (dict \"name\" $proxy.image \"global\" $v.global \"version\" $version) }}"
    ));
    for arg in container["args"].as_array_mut().into_iter().flatten() {
        for (flag, value) in [
            ("--proxyLogLevel=", "$proxy.logLevel"),
            ("--proxyComponentLogLevel=", "$proxy.componentLogLevel"),
            ("--log_output_level=", "$logging.level"),
        ] {
            let given = arg.as_str().and_then(|arg| arg.strip_prefix(flag));
            if let Some(default) = given.map(str::to_owned) {
                let mark = text.value(&format!("{{{{ {value} | default \"{default}\" }}}}"));
                *arg = json!(format!("{flag}{mark}"));
            }
        }
    }
    for variable in container["env"].as_array_mut().into_iter().flatten() {
        let value = match variable["name"].as_str() {
            Some("PROXY_CONFIG") => "{{ $mesh.defaultConfig | toJson | squote }}",
            Some("TRUST_DOMAIN" | "ISTIO_META_MESH_ID") => "{{ $mesh.trustDomain | quote }}",
            Some("ISTIO_META_CLUSTER_ID") => "{{ $cluster }}",
            _ => continue,
        };
        variable["value"] = json!(text.value(value));
    }
    text.put(
        &mut container["env"],
        "{{- range $name, $value := ($mesh.defaultConfig.proxyMetadata | default dict) }}\n- name: {{ $name }}\n  value: {{ $value | quote }}\n{{- end }}",
    );
    let mut own = container["ports"].as_array().cloned().unwrap_or_default();
    // The metrics' and the health check's; the others are the Service's.
    own.retain(|port| port["containerPort"] == 15090 || port["containerPort"] == 15021);
    container["ports"] = own.into();
    text.put(&mut container["ports"], PORTS);
}
