//! The template for a cluster whose control plane is elsewhere: webhooks, and a Service that stands for the control plane.

use serde_json::{Value, json};

use super::pilot::{more_webhooks, mutating, validating};
use super::text::{Text, remove};
use crate::install::webhooks;
use crate::installer::tags::label_of;

/// An address that stands for the one that is given, in the objects that the template is made of.
pub(super) const ADDRESS: &str = "192.0.2.254";
/// What stands for the caller's configuration of a webhook.
const CLIENT: &str = "zz-client";

/// What is looked at first. A name becomes an alias, an address an endpoint.
const HEAD: &str = r#"{{- if $remote }}
{{- $address := $v.global.remotePilotAddress }}
{{- $plane := $v.istiodRemote | default dict }}
{{- if not (or $address $plane.injectionURL) }}
{{- fail "profile remote: set global.remotePilotAddress or istiodRemote.injectionURL, where the control plane is" }}
{{- end }}
{{- $isIP := regexMatch "^([0-9]{1,3}([.][0-9]{1,3}){3}|[0-9a-fA-F.]*:[0-9a-fA-F:.]*)$" ($address | default "") }}
"#;

/// Who is called for validation.
const VALIDATION: &str = "service:\n  name: istiod{{ $suffix }}\n  namespace: {{ $ns }}\n  path: /validate\n  port: 443\n{{- with $plane.injectionCABundle }}\ncaBundle: {{ . | quote }}\n{{- end }}";

/// Who is called for injection.
const INJECTION: &str = "{{- if $plane.injectionURL }}\nurl: {{ $plane.injectionURL | quote }}\n{{- else }}\nservice:\n  name: istiod{{ $suffix }}\n  namespace: {{ $ns }}\n  path: /inject\n  port: 443\n{{- end }}\n{{- with $plane.injectionCABundle }}\ncaBundle: {{ . | quote }}\n{{- end }}";

/// Its objects by a named revision, and by the default one, which has more webhooks.
pub(super) fn template(objects: Vec<Value>, of_default: Vec<Value>) -> String {
    let of_default: Vec<Value> = of_default.into_iter().map(without_client).collect();
    let more = more_webhooks(&of_default);
    let mut out = HEAD.to_owned();
    for object in objects {
        let mut object = without_client(object);
        let mut text = Text::default();
        let tagged = !label_of(&object, webhooks::TAG).is_empty();
        let (condition, client) = match object["kind"].as_str().unwrap_or_default() {
            "Service" => {
                service(&mut text, &mut object);
                ("$address", "")
            }
            "EndpointSlice" => {
                slice(&mut text, &mut object);
                ("$isIP", "")
            }
            "ValidatingWebhookConfiguration" => {
                validating(&mut text, &mut object);
                ("$address", VALIDATION)
            }
            "MutatingWebhookConfiguration" => {
                mutating(&mut text, &mut object, (!tagged).then_some(&more));
                ("", INJECTION)
            }
            _ => ("", ""),
        };
        let document = with_client(&text.document(&object, condition), client);
        match tagged {
            true => out.push_str(&format!(
                "{{{{- range $tag := $v.revisionTags }}}}\n{document}{{{{- end }}}}\n"
            )),
            false => out.push_str(&document),
        }
    }
    out.push_str("{{- end }}\n");
    out
}

fn without_client(mut object: Value) -> Value {
    for webhook in object["webhooks"].as_array_mut().into_iter().flatten() {
        webhook["clientConfig"] = json!(CLIENT);
    }
    if object["webhooks"].is_null() {
        remove(&mut object, "webhooks");
    }
    object
}

/// Puts lines where a webhook's caller is configured.
fn with_client(document: &str, lines: &str) -> String {
    let mut out = String::new();
    for line in document.lines() {
        let content = line.trim_start().trim_start_matches("- ");
        if content != format!("clientConfig: {CLIENT}") {
            out.push_str(&format!("{line}\n"));
            continue;
        }
        let indent = line.len() - content.len() + 2;
        out.push_str(&line.replace(&format!(" {CLIENT}"), ""));
        for line in lines.lines() {
            out.push_str(&format!("\n{:indent$}{line}", ""));
        }
        out.push('\n');
    }
    out
}

fn service(text: &mut Text, object: &mut Value) {
    text.put(
        &mut object["spec"],
        "{{- if not $isIP }}\ntype: ExternalName\nexternalName: {{ $address | quote }}\n{{- end }}",
    );
}

fn slice(text: &mut Text, object: &mut Value) {
    let family = "{{ contains \":\" $address | ternary \"IPv6\" \"IPv4\" }}";
    object["addressType"] = json!(text.value(family));
    object["endpoints"][0]["addresses"][0] = json!(text.value("{{ $address | quote }}"));
}
