//! `mesh describe`: an object and its events for people.

use std::process::ExitCode;

use anyhow::bail;
use serde_json::{Map, Value};

use crate::Global;
use crate::cluster::{Cluster, query};
use crate::out::Out;
use crate::resources::{Resource, Resources};

/// Show an object in full, with its events
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// TYPE, for instance pods, deploy or vs; or TYPE/NAME
    #[arg(value_name = "TYPE")]
    pub kind: String,
    /// Names of objects; all of the type without any
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Objects with these labels only
    #[arg(short = 'l', long, value_name = "LABELS", conflicts_with = "names")]
    pub selector: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// No such type or object.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    run_with(args, global, &Out::default()).await
}

/// [`run`] with the result written to `out`.
///
/// # Errors
/// As [`run`].
pub async fn run_with(args: Args, global: &Global, out: &Out) -> anyhow::Result<ExitCode> {
    let cluster = global.cluster().await?;
    let resources = Resources::discover(&cluster).await?;
    let (kind, mut names) = match args.kind.split_once('/') {
        Some((kind, name)) => (kind.to_owned(), vec![name.to_owned()]),
        None => (args.kind.clone(), Vec::new()),
    };
    names.extend(args.names);
    let mut first = true;
    for resource in resources.named(&kind)? {
        for object in objects(&cluster, resource, &names, args.selector.as_deref()).await? {
            if !std::mem::take(&mut first) {
                out.print("\n\n")?;
            }
            let events = events(&cluster, &object).await?;
            out.print(&describe(&object, &events))?;
        }
    }
    if first {
        eprintln!("No resources found in {} namespace.", cluster.namespace);
    }
    Ok(ExitCode::SUCCESS)
}

async fn objects(
    cluster: &Cluster,
    resource: &Resource,
    names: &[String],
    selector: Option<&str>,
) -> anyhow::Result<Vec<Value>> {
    if names.is_empty() {
        let mut path = resource.path(Some(&cluster.namespace));
        if let Some(selector) = selector {
            path.push_str(&format!("?labelSelector={}", query(selector)));
        }
        let list = cluster.read(&path).await?;
        let mut items = list["items"].as_array().cloned().unwrap_or_default();
        for item in &mut items {
            // Items of a list don't say what they are.
            item["kind"] = resource.kind.clone().into();
        }
        return Ok(items);
    }
    let mut found = Vec::new();
    for name in names {
        let path = resource.object(&cluster.namespace, name);
        match cluster.read_optional(&path).await? {
            Some(object) => found.push(object),
            None => bail!(
                "{} {name:?} not found in namespace {}",
                resource.singular_label(),
                cluster.namespace
            ),
        }
    }
    Ok(found)
}

/// The events about an object, oldest first.
async fn events(cluster: &Cluster, object: &Value) -> anyhow::Result<Vec<Value>> {
    let metadata = &object["metadata"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let namespace = match text(&metadata["namespace"]) {
        none if none.is_empty() => "default".to_owned(),
        namespace => namespace,
    };
    let selector = format!("involvedObject.uid={}", text(&metadata["uid"]));
    let path = format!(
        "/api/v1/namespaces/{namespace}/events?fieldSelector={}",
        query(&selector)
    );
    let list = cluster.read(&path).await?;
    let mut events = list["items"].as_array().cloned().unwrap_or_default();
    events.sort_by_key(|event| text(&event["lastTimestamp"]));
    Ok(events)
}

/// The text about an object.
fn describe(object: &Value, events: &[Value]) -> String {
    let metadata = &object["metadata"];
    let mut page = Page::default();
    page.row("Name", plain(&metadata["name"]));
    if !metadata["namespace"].is_null() {
        page.row("Namespace", plain(&metadata["namespace"]));
    }
    for (title, field) in [("Labels", "labels"), ("Annotations", "annotations")] {
        page.pairs(title, &metadata[field]);
    }
    for owner in metadata["ownerReferences"].as_array().into_iter().flatten() {
        if owner["controller"] == true {
            let by = format!("{}/{}", plain(&owner["kind"]), plain(&owner["name"]));
            page.row("Controlled By", by);
        }
    }
    if !metadata["deletionTimestamp"].is_null() {
        page.row("Terminating Since", plain(&metadata["deletionTimestamp"]));
    }
    match object["kind"].as_str() {
        Some("Pod") => pod(&mut page, object),
        Some("Service") => service(&mut page, &object["spec"]),
        Some("Deployment" | "StatefulSet" | "ReplicaSet" | "DaemonSet") => {
            workload(&mut page, object)
        }
        // A secret's values are not for the screen.
        Some("Secret") => {
            page.row("Type", plain(&object["type"]));
            for (key, value) in object["data"].as_object().into_iter().flatten() {
                let size = value.as_str().map_or(0, |text| text.len() / 4 * 3);
                page.row(key, format!("about {size} bytes"));
            }
        }
        _ => {
            for (key, value) in object.as_object().into_iter().flatten() {
                if !matches!(key.as_str(), "metadata" | "kind" | "apiVersion") {
                    page.tree(&title(key), value, 0);
                }
            }
        }
    }
    page.conditions(&object["status"]["conditions"]);
    page.events(events);
    page.0
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn row(&mut self, title: &str, value: impl AsRef<str>) {
        let label = format!("{title}:");
        self.0
            .push_str(&format!("{label:<17} {}\n", value.as_ref()));
    }

    fn pairs(&mut self, title: &str, map: &Value) {
        let hidden = "kubectl.kubernetes.io/last-applied-configuration";
        let pairs = map.as_object().into_iter().flatten();
        let pairs: Vec<_> = pairs.filter(|(key, _)| *key != hidden).collect();
        if pairs.is_empty() {
            return self.row(title, "<none>");
        }
        for (index, (key, value)) in pairs.into_iter().enumerate() {
            let text = format!("{key}={}", plain(value));
            if index == 0 {
                self.row(title, text);
            } else {
                self.0.push_str(&format!("{:<17} {text}\n", ""));
            }
        }
    }

    /// Any value, indented by its depth.
    fn tree(&mut self, title: &str, value: &Value, depth: usize) {
        let indent = "  ".repeat(depth);
        match value {
            Value::Object(map) if !map.is_empty() => {
                self.0.push_str(&format!("{indent}{title}:\n"));
                self.fields(map, depth + 1);
            }
            Value::Array(list) if !list.is_empty() => {
                self.0.push_str(&format!("{indent}{title}:\n"));
                for item in list {
                    match item {
                        Value::Object(map) => {
                            self.fields(map, depth + 1);
                            self.0.push('\n');
                        }
                        scalar => {
                            let text = plain(scalar);
                            self.0.push_str(&format!("{indent}  {text}\n"));
                        }
                    }
                }
            }
            Value::Object(_) | Value::Array(_) => {}
            scalar => self
                .0
                .push_str(&format!("{indent}{title}:  {}\n", plain(scalar))),
        }
    }

    fn fields(&mut self, map: &Map<String, Value>, depth: usize) {
        for (key, value) in map {
            self.tree(&title(key), value, depth);
        }
    }

    fn table(&mut self, title: &str, heads: &[&str], rows: &[Vec<String>]) {
        if rows.is_empty() {
            return self.row(title, "<none>");
        }
        self.0.push_str(&format!("{title}:\n"));
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells
                .chain([heads[column].chars().count()])
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..heads.len()).map(width).collect();
        let heads = heads.iter().map(|head| (*head).to_owned()).collect();
        for row in [&heads].into_iter().chain(rows) {
            let cells = row.iter().zip(&widths);
            let line: Vec<_> = cells
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            self.0
                .push_str(&format!("  {}\n", line.join("  ").trim_end()));
        }
    }

    fn conditions(&mut self, conditions: &Value) {
        let rows: Vec<_> = conditions
            .as_array()
            .into_iter()
            .flatten()
            .map(|c| {
                ["type", "status", "reason", "message"]
                    .map(|field| plain(&c[field]))
                    .to_vec()
            })
            .collect();
        if !rows.is_empty() {
            self.table(
                "Conditions",
                &["Type", "Status", "Reason", "Message"],
                &rows,
            );
        }
    }

    fn events(&mut self, events: &[Value]) {
        let rows: Vec<_> = events
            .iter()
            .map(|event| {
                let count = event["count"].as_i64().unwrap_or(1);
                let last = plain(&event["lastTimestamp"]);
                let last = if count > 1 {
                    format!("{last} (x{count})")
                } else {
                    last
                };
                vec![
                    plain(&event["type"]),
                    plain(&event["reason"]),
                    last,
                    plain(&event["source"]["component"]),
                    plain(&event["message"]),
                ]
            })
            .collect();
        self.table(
            "Events",
            &["Type", "Reason", "Last Seen", "From", "Message"],
            &rows,
        );
    }
}

fn pod(page: &mut Page, pod: &Value) {
    let (spec, status) = (&pod["spec"], &pod["status"]);
    page.row("Service Account", plain(&spec["serviceAccountName"]));
    page.row("Node", plain(&spec["nodeName"]));
    page.row("Start Time", plain(&status["startTime"]));
    page.row("Status", plain(&status["phase"]));
    for (title, field) in [("Reason", "reason"), ("Message", "message")] {
        if !status[field].is_null() {
            page.row(title, plain(&status[field]));
        }
    }
    page.row("IP", plain(&status["podIP"]));
    for (title, list, states) in [
        ("Init Containers", "initContainers", "initContainerStatuses"),
        ("Containers", "containers", "containerStatuses"),
    ] {
        let containers = spec[list].as_array().into_iter().flatten();
        let rows: Vec<_> = containers
            .map(|container| {
                let all = status[states].as_array().into_iter().flatten();
                let state = all
                    .into_iter()
                    .find(|state| state["name"] == container["name"])
                    .cloned()
                    .unwrap_or_default();
                vec![
                    plain(&container["name"]),
                    plain(&container["image"]),
                    container_state(&state["state"]),
                    plain(&state["ready"]),
                    plain(&state["restartCount"]),
                    container_ports(container),
                ]
            })
            .collect();
        if !rows.is_empty() {
            let heads = ["Name", "Image", "State", "Ready", "Restarts", "Ports"];
            page.table(title, &heads, &rows);
        }
    }
}

/// `running since …`, `waiting: ImagePullBackOff`, `ended with 1: Error`.
fn container_state(state: &Value) -> String {
    if let Some(running) = state.get("running") {
        return format!("running since {}", plain(&running["startedAt"]));
    }
    if let Some(ended) = state.get("terminated") {
        return format!(
            "ended with {}: {}",
            plain(&ended["exitCode"]),
            plain(&ended["reason"])
        );
    }
    match state.get("waiting") {
        Some(waiting) => format!("waiting: {}", plain(&waiting["reason"])),
        None => "<unknown>".to_owned(),
    }
}

fn container_ports(container: &Value) -> String {
    let ports = container["ports"].as_array().into_iter().flatten();
    let texts: Vec<_> = ports
        .map(|port| {
            format!(
                "{}/{}",
                plain(&port["containerPort"]),
                plain(&port["protocol"])
            )
        })
        .collect();
    if texts.is_empty() {
        "<none>".to_owned()
    } else {
        texts.join(",")
    }
}

fn service(page: &mut Page, spec: &Value) {
    page.pairs("Selector", &spec["selector"]);
    page.row("Type", plain(&spec["type"]));
    page.row("IP", plain(&spec["clusterIP"]));
    if !spec["externalName"].is_null() {
        page.row("External Name", plain(&spec["externalName"]));
    }
    let rows: Vec<_> = spec["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| {
            ["name", "port", "targetPort", "nodePort", "protocol"]
                .map(|field| plain(&port[field]))
                .to_vec()
        })
        .collect();
    let heads = ["Name", "Port", "Target Port", "Node Port", "Protocol"];
    page.table("Ports", &heads, &rows);
    page.row("Session Affinity", plain(&spec["sessionAffinity"]));
}

fn workload(page: &mut Page, object: &Value) {
    let (spec, status) = (&object["spec"], &object["status"]);
    page.pairs("Selector", &spec["selector"]["matchLabels"]);
    let numbers = status.as_object().into_iter().flatten();
    let numbers: Vec<_> = numbers
        .filter(|(key, value)| value.is_number() && *key != "observedGeneration")
        .map(|(key, value)| format!("{value} {}", title(key).to_lowercase()))
        .collect();
    if !spec["replicas"].is_null() {
        page.row("Desired", plain(&spec["replicas"]));
    }
    page.row("Status", numbers.join(", "));
    for field in ["strategy", "updateStrategy"] {
        if !spec[field].is_null() {
            page.row("Strategy", plain(&spec[field]["type"]));
        }
    }
    let template = &spec["template"];
    page.pairs("Template Labels", &template["metadata"]["labels"]);
    let containers = template["spec"]["containers"].as_array();
    let rows: Vec<_> = containers
        .into_iter()
        .flatten()
        .map(|container| {
            vec![
                plain(&container["name"]),
                plain(&container["image"]),
                container_ports(container),
            ]
        })
        .collect();
    page.table("Containers", &["Name", "Image", "Ports"], &rows);
}

/// A scalar as people read it.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => "<none>".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// `readyReplicas` as `Ready Replicas`.
fn title(field: &str) -> String {
    let mut title = String::new();
    let mut before_lower = false;
    for (index, letter) in field.chars().enumerate() {
        if index == 0 {
            title.extend(letter.to_uppercase());
        } else if letter.is_uppercase() && before_lower {
            title.push(' ');
            title.push(letter);
        } else {
            title.push(letter);
        }
        before_lower = letter.is_lowercase() || letter.is_ascii_digit();
    }
    title
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_shows_its_containers_conditions_and_events() {
        let pod = json!({
            "kind": "Pod",
            "metadata": { "name": "web-1", "namespace": "a", "labels": { "app": "web" },
                "ownerReferences": [{ "kind": "ReplicaSet", "name": "web", "controller": true }] },
            "spec": { "nodeName": "mesh-node", "serviceAccountName": "default", "containers": [
                { "name": "c", "image": "i", "ports": [{ "containerPort": 80, "protocol": "TCP" }] }] },
            "status": { "phase": "Running", "podIP": "10.244.0.7",
                "conditions": [{ "type": "Ready", "status": "False", "reason": "ContainersNotReady" }],
                "containerStatuses": [{ "name": "c", "ready": false, "restartCount": 3,
                    "state": { "waiting": { "reason": "CrashLoopBackOff" } } }] },
        });
        let event = json!({ "type": "Warning", "reason": "BackOff", "count": 4, "message": "restarting",
            "lastTimestamp": "2026-01-01T00:00:00Z", "source": { "component": "kubelet" } });
        let text = describe(&pod, &[event]);
        for part in [
            "Name:             web-1\n",
            "Labels:           app=web\n",
            "Controlled By:    ReplicaSet/web\n",
            "waiting: CrashLoopBackOff  false  3         80/TCP",
            "Ready  False   ContainersNotReady",
            "Warning  BackOff  2026-01-01T00:00:00Z (x4)  kubelet  restarting",
        ] {
            assert!(text.contains(part), "{part:?} is missing in:\n{text}");
        }
    }

    #[test]
    fn any_kind_is_shown_as_a_tree_and_secrets_keep_theirs() {
        let custom = json!({ "kind": "VirtualService", "metadata": { "name": "v" },
            "spec": { "hosts": ["reviews"], "http": [{ "route": [{ "destination": { "host": "reviews" } }] }] } });
        let text = describe(&custom, &[]);
        assert!(text.contains("Spec:\n  Hosts:\n    reviews\n  Http:\n    Route:\n      Destination:\n        Host:  reviews\n"), "{text}");
        assert!(text.contains("Events:           <none>"), "{text}");
        let secret = json!({ "kind": "Secret", "metadata": { "name": "s" }, "type": "Opaque", "data": { "key": "c2VjcmV0" } });
        let text = describe(&secret, &[]);
        assert!(
            text.contains("about 6 bytes") && !text.contains("c2VjcmV0"),
            "{text}"
        );
        assert_eq!(title("podIP"), "Pod IP");
    }
}
