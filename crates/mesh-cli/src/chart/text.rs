//! From marked objects to templates.

use serde_json::{Value, json};

use super::{REVISION, TAG};
use crate::install::NAMESPACE;

/// Marks and what they stand for.
#[derive(Default)]
pub(super) struct Text {
    lines: Vec<String>,
    values: Vec<String>,
}

impl Text {
    /// A text that stands for `template` inside a line.
    pub(super) fn value(&mut self, template: &str) -> String {
        self.values.push(template.to_owned());
        format!("zzv{}zz", self.values.len() - 1)
    }

    /// Puts lines at the end of a map or list. They are indented as it is; `%N` is that indentation, `%M` one step more.
    pub(super) fn put(&mut self, place: &mut Value, lines: &str) {
        self.lines.push(lines.to_owned());
        let mark = format!("zzl{}zz", self.lines.len() - 1);
        match place {
            Value::Array(items) => items.push(json!(mark)),
            place => place[mark] = json!(""),
        }
    }

    /// Puts a field that there is if `expression` is not empty, in place of the one that is there.
    pub(super) fn field(&mut self, place: &mut Value, name: &str, expression: &str) {
        remove(place, name);
        self.put(
            place,
            &format!(
                "{{{{- with {expression} }}}}\n{name}:\n  {{{{- toYaml . | nindent %M }}}}\n{{{{- end }}}}"
            ),
        );
    }

    /// Puts all fields of a map.
    pub(super) fn fields(&mut self, place: &mut Value, expression: &str) {
        self.put(
            place,
            &format!(
                "{{{{- with {expression} }}}}\n{{{{- toYaml . | nindent %N }}}}\n{{{{- end }}}}"
            ),
        );
    }

    /// An object as a document, under a condition if there is one.
    pub(super) fn document(&self, object: &Value, condition: &str) -> String {
        let text = format!("---\n{}", self.render(object));
        match condition {
            "" => text,
            condition => format!("{{{{- if {condition} }}}}\n{text}{{{{- end }}}}\n"),
        }
    }

    /// The text of a tree, with the marks replaced.
    pub(super) fn render(&self, tree: &Value) -> String {
        let mut out = String::new();
        for line in mesh_api::yaml::to_string(tree).lines() {
            let content = line.trim_start();
            let indent = line.len() - content.len();
            let mark = content.strip_prefix("- ").unwrap_or(content);
            let number = mark
                .strip_prefix("zzl")
                .and_then(|rest| rest.split("zz").next());
            match number.and_then(|number| self.lines.get(number.parse::<usize>().ok()?)) {
                Some(lines) => lines.lines().for_each(|line| {
                    let line = line
                        .replace("%N", &indent.to_string())
                        .replace("%M", &(indent + 2).to_string());
                    out.push_str(&format!("{:indent$}{line}\n", ""));
                }),
                None => out.push_str(&format!("{line}\n")),
            }
        }
        for (index, value) in self.values.iter().enumerate() {
            out = out.replace(&format!("zzv{index}zz"), value);
        }
        out.replace(&format!("-{REVISION}"), "{{ $suffix }}")
            .replace(REVISION, "{{ $rev }}")
            .replace(TAG, "{{ $tag }}")
            .replace(NAMESPACE, "{{ $ns }}")
            // Our own conditions name it.
            .replace("@usual@", NAMESPACE)
    }
}

/// Removes a field of a map.
pub(super) fn remove(place: &mut Value, name: &str) {
    if let Some(map) = place.as_object_mut() {
        map.shift_remove(name);
    }
}

/// Gives a Deployment, its autoscaler and its budget what `values` (a variable of the template) says; its container is the first.
pub(super) fn tune(text: &mut Text, object: &mut Value, values: &str) {
    match object["kind"].as_str() {
        Some("Deployment") => deployment(text, object, values),
        Some("HorizontalPodAutoscaler") => {
            let least = format!("(coalesce {values}.replicaCount {values}.autoscaleMin 1 | int)");
            let most = format!("max {least} ({values}.autoscaleMax | default 5 | int)");
            let spec = &mut object["spec"];
            spec["minReplicas"] = json!(text.value(&format!("{{{{ {least} }}}}")));
            spec["maxReplicas"] = json!(text.value(&format!("{{{{ {most} }}}}")));
            let share = format!(
                "{{{{ ({values}.cpu | default dict).targetAverageUtilization | default 80 | int }}}}"
            );
            spec["metrics"][0]["resource"]["target"]["averageUtilization"] =
                json!(text.value(&share));
        }
        _ => {}
    }
}

fn deployment(text: &mut Text, object: &mut Value, values: &str) {
    let of = |field: &str| format!("{values}.{field}");
    let spec = &mut object["spec"];
    remove(spec, "strategy");
    text.put(
        spec,
        &format!(
            "{{{{- if not {values}.autoscaleEnabled }}}}\nreplicas: {{{{ {values}.replicaCount | default 1 | int }}}}\n{{{{- end }}}}\n\
             {{{{- if or {values}.rollingMaxSurge {values}.rollingMaxUnavailable }}}}\nstrategy:\n  rollingUpdate:\n\
             \x20   {{{{- with {values}.rollingMaxSurge }}}}\n    maxSurge: {{{{ . }}}}\n    {{{{- end }}}}\n\
             \x20   {{{{- with {values}.rollingMaxUnavailable }}}}\n    maxUnavailable: {{{{ . }}}}\n    {{{{- end }}}}\n{{{{- end }}}}"
        ),
    );
    let template = &mut spec["template"];
    text.fields(
        &mut template["metadata"]["annotations"],
        &of("podAnnotations"),
    );
    text.fields(&mut template["metadata"]["labels"], &of("podLabels"));
    let pod = &mut template["spec"];
    for name in [
        "nodeSelector",
        "affinity",
        "tolerations",
        "topologySpreadConstraints",
    ] {
        text.field(pod, name, &of(name));
    }
    text.field(pod, "priorityClassName", "$v.global.priorityClassName");
    let container = &mut pod["containers"][0];
    text.field(container, "resources", &of("resources"));
    user(text, &mut container["securityContext"]);
    container["imagePullPolicy"] =
        json!(text.value("{{ $v.global.imagePullPolicy | default \"IfNotPresent\" }}"));
}

/// User and group, but for a platform that chooses them.
fn user(text: &mut Text, context: &mut Value) {
    let mut lines = String::new();
    for name in ["runAsUser", "runAsGroup"] {
        if !context[name].is_null() {
            lines.push_str(&format!("{name}: {}\n", context[name]));
            remove(context, name);
        }
    }
    if !lines.is_empty() {
        text.put(
            context,
            &format!("{{{{- if ne (toString $v.global.platform) \"openshift\" }}}}\n{lines}{{{{- end }}}}"),
        );
    }
}

/// Secrets for pulling images, by name.
pub(super) fn pull_secrets(text: &mut Text, place: &mut Value) {
    text.put(
        place,
        "{{- with $v.global.imagePullSecrets }}\nimagePullSecrets:\n{{- range . }}\n- name: {{ . }}\n{{- end }}\n{{- end }}",
    );
}
