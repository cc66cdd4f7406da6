//! Columns and cells of the built-in kinds, as `kubectl` has them.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Column, age, duration};
use crate::rbac::{CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, ROLE_BINDINGS, ROLES};
use crate::scale::selector_text;
use crate::strategy::certificates::{self, REQUESTS as SIGNING_REQUESTS};

const NAME: Column = ("Name", "string", 0);
const AGE: Column = ("Age", "string", 0);
const SIGNING_COLUMNS: [Column; 6] = [
    NAME,
    AGE,
    ("SignerName", "string", 0),
    ("Requestor", "string", 0),
    ("RequestedDuration", "string", 0),
    ("Condition", "string", 0),
];

/// The columns of a resource by storage key.
pub fn columns(storage: &str) -> Vec<Column> {
    let inner: &[Column] = match storage {
        "core/pods" => {
            return [
                &[
                    NAME,
                    ("Ready", "string", 0),
                    ("Status", "string", 0),
                    ("Restarts", "string", 0),
                    AGE,
                ][..],
                &[
                    ("IP", "string", 1),
                    ("Node", "string", 1),
                    ("Nominated Node", "string", 1),
                    ("Readiness Gates", "string", 1),
                ],
            ]
            .concat();
        }
        "core/services" => {
            return vec![
                NAME,
                ("Type", "string", 0),
                ("Cluster-IP", "string", 0),
                ("External-IP", "string", 0),
                ("Port(s)", "string", 0),
                AGE,
                ("Selector", "string", 1),
            ];
        }
        "core/nodes" => {
            return vec![
                NAME,
                ("Status", "string", 0),
                ("Roles", "string", 0),
                AGE,
                ("Version", "string", 0),
                ("Internal-IP", "string", 1),
                ("External-IP", "string", 1),
                ("OS-Image", "string", 1),
                ("Kernel-Version", "string", 1),
                ("Container-Runtime", "string", 1),
            ];
        }
        "core/events" => {
            return vec![
                ("Last Seen", "string", 0),
                ("Type", "string", 0),
                ("Reason", "string", 0),
                ("Object", "string", 0),
                ("Subobject", "string", 1),
                ("Source", "string", 1),
                ("Message", "string", 0),
                ("First Seen", "string", 1),
                ("Count", "string", 1),
                ("Name", "string", 1),
            ];
        }
        "apps/deployments" => {
            return vec![
                NAME,
                ("Ready", "string", 0),
                ("Up-to-date", "string", 0),
                ("Available", "string", 0),
                AGE,
                ("Containers", "string", 1),
                ("Images", "string", 1),
                ("Selector", "string", 1),
            ];
        }
        "apps/replicasets" => {
            return vec![
                NAME,
                ("Desired", "integer", 0),
                ("Current", "integer", 0),
                ("Ready", "integer", 0),
                AGE,
                ("Containers", "string", 1),
                ("Images", "string", 1),
                ("Selector", "string", 1),
            ];
        }
        ROLE_BINDINGS | CLUSTER_ROLE_BINDINGS => {
            return vec![
                NAME,
                ("Role", "string", 0),
                AGE,
                ("Users", "string", 1),
                ("Groups", "string", 1),
                ("ServiceAccounts", "string", 1),
            ];
        }
        SIGNING_REQUESTS => return SIGNING_COLUMNS.to_vec(),
        ROLES | CLUSTER_ROLES => return vec![NAME, ("Created At", "date", 0)],
        "core/namespaces" => &[("Status", "string", 0)],
        "core/configmaps" => &[("Data", "integer", 0)],
        "core/secrets" => &[("Type", "string", 0), ("Data", "integer", 0)],
        "core/serviceaccounts" => &[("Secrets", "integer", 0)],
        "core/endpoints" => &[("Endpoints", "string", 0)],
        "discovery.k8s.io/endpointslices" => &[
            ("AddressType", "string", 0),
            ("Ports", "string", 0),
            ("Endpoints", "string", 0),
        ],
        "coordination.k8s.io/leases" => &[("Holder", "string", 0)],
        "apiextensions.k8s.io/customresourcedefinitions" => &[("Created At", "date", 0)],
        _ if storage.starts_with("admissionregistration.k8s.io/") => &[("Webhooks", "integer", 0)],
        _ => &[],
    };
    let mut all = vec![NAME];
    all.extend_from_slice(inner);
    if storage != "apiextensions.k8s.io/customresourcedefinitions" {
        all.push(AGE);
    }
    all
}

/// The cells of an object, in the order of [`columns`].
pub fn cells(storage: &str, object: &Value, now: Timestamp) -> Vec<Value> {
    let name = object["metadata"]["name"].clone();
    let created = age(&object["metadata"]["creationTimestamp"], now);
    let size = |field: &str| -> usize { object[field].as_object().map_or(0, serde_json::Map::len) };
    let length = |field: &str| -> usize { object[field].as_array().map_or(0, Vec::len) };
    match storage {
        "core/pods" => pod(object, now, name, created),
        "core/services" => service(object, name, created),
        "core/nodes" => node(object, name, created),
        "core/events" => event(object, now, name),
        "apps/deployments" => deployment(object, name, created),
        "apps/replicasets" => {
            let status = |field: &str| json!(object["status"][field].as_i64().unwrap_or_default());
            let desired = json!(object["spec"]["replicas"].as_i64().unwrap_or_default());
            let mut row = vec![
                name,
                desired,
                status("replicas"),
                status("readyReplicas"),
                created,
            ];
            row.extend(template(object));
            row
        }
        "core/namespaces" => vec![name, or_unknown(&object["status"]["phase"]), created],
        "core/configmaps" => vec![name, json!(size("data") + size("binaryData")), created],
        "core/secrets" => vec![name, object["type"].clone(), json!(size("data")), created],
        "core/serviceaccounts" => vec![name, json!(length("secrets")), created],
        "core/endpoints" => vec![name, endpoints(object), created],
        "discovery.k8s.io/endpointslices" => endpoint_slice(object, name, created),
        "coordination.k8s.io/leases" => {
            vec![name, object["spec"]["holderIdentity"].clone(), created]
        }
        SIGNING_REQUESTS => {
            let spec = &object["spec"];
            let asked = spec["expirationSeconds"].as_i64();
            let asked = asked.map_or_else(|| "<none>".to_owned(), duration);
            vec![
                name,
                created,
                spec["signerName"].clone(),
                spec["username"].clone(),
                json!(asked),
                json!(certificates::state(object)),
            ]
        }
        ROLE_BINDINGS | CLUSTER_ROLE_BINDINGS => role_binding(object, name, created),
        "apiextensions.k8s.io/customresourcedefinitions" | ROLES | CLUSTER_ROLES => {
            vec![name, object["metadata"]["creationTimestamp"].clone()]
        }
        _ if storage.starts_with("admissionregistration.k8s.io/") => {
            vec![name, json!(length("webhooks")), created]
        }
        _ => vec![name, created],
    }
}

fn role_binding(binding: &Value, name: Value, created: Value) -> Vec<Value> {
    let reference = &binding["roleRef"];
    let role = format!("{}/{}", text(&reference["kind"]), text(&reference["name"]));
    let of = |kind: &str| -> Value {
        let subjects = list(&binding["subjects"]).filter(|subject| subject["kind"] == kind);
        let names = subjects.map(|subject| match text(&subject["namespace"]) {
            "" => text(&subject["name"]).to_owned(),
            namespace => format!("{namespace}/{}", text(&subject["name"])),
        });
        names.collect::<Vec<_>>().join(", ").into()
    };
    let (users, groups) = (of("User"), of("Group"));
    vec![
        name,
        role.into(),
        created,
        users,
        groups,
        of("ServiceAccount"),
    ]
}

fn or_unknown(value: &Value) -> Value {
    if value.is_string() {
        value.clone()
    } else {
        "<unknown>".into()
    }
}

pub(super) fn list(value: &Value) -> impl DoubleEndedIterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Joined, or `<none>`.
fn joined(items: impl IntoIterator<Item = String>, separator: &str) -> Value {
    let all: Vec<String> = items.into_iter().collect();
    if all.is_empty() {
        "<none>".into()
    } else {
        all.join(separator).into()
    }
}

fn or_none(value: &Value) -> Value {
    if text(value).is_empty() {
        "<none>".into()
    } else {
        value.clone()
    }
}

fn pod(pod: &Value, now: Timestamp, name: Value, created: Value) -> Vec<Value> {
    let summary = PodSummary::of(pod);
    let restarts = match summary.last_restart {
        Some(at) if summary.restarts > 0 => {
            format!(
                "{} ({} ago)",
                summary.restarts,
                duration(now.as_second() - at.as_second())
            )
        }
        _ => summary.restarts.to_string(),
    };
    let gates = pod["spec"]["readinessGates"].as_array().map_or(0, Vec::len);
    let gate_true = list(&pod["spec"]["readinessGates"]).filter(|gate| {
        list(&pod["status"]["conditions"])
            .any(|c| c["type"] == gate["conditionType"] && c["status"] == "True")
    });
    let gate_text = if gates == 0 {
        "<none>".to_owned()
    } else {
        format!("{}/{gates}", gate_true.count())
    };
    vec![
        name,
        format!("{}/{}", summary.ready, summary.total).into(),
        summary.reason.into(),
        restarts.into(),
        created,
        or_none(&pod["status"]["podIP"]),
        or_none(&pod["spec"]["nodeName"]),
        or_none(&pod["status"]["nominatedNodeName"]),
        gate_text.into(),
    ]
}

/// READY, STATUS and RESTARTS of a pod.
struct PodSummary {
    ready: usize,
    total: usize,
    reason: String,
    restarts: i64,
    last_restart: Option<Timestamp>,
}

impl PodSummary {
    /// As `printPod` of Kubernetes does: native sidecars (init containers that restart always) count among the containers.
    fn of(pod: &Value) -> PodSummary {
        let (spec, status) = (&pod["spec"], &pod["status"]);
        let sidecars: Vec<&str> = list(&spec["initContainers"])
            .filter(|c| c["restartPolicy"] == "Always")
            .map(|c| text(&c["name"]))
            .collect();
        let reason = [&status["reason"], &status["phase"]]
            .into_iter()
            .map(text)
            .find(|r| !r.is_empty());
        let mut summary = PodSummary {
            ready: 0,
            total: list(&spec["containers"]).count() + sidecars.len(),
            reason: reason.unwrap_or("Unknown").to_owned(),
            restarts: 0,
            last_restart: None,
        };
        let initialising = summary.read_init(pod, &sidecars);
        if !initialising || initialized(status) {
            summary.read_containers(status);
        }
        let deleting = !pod["metadata"]["deletionTimestamp"].is_null();
        if deleting && status["reason"] == "NodeLost" {
            summary.reason = "Unknown".to_owned();
        } else if deleting && !matches!(text(&status["phase"]), "Succeeded" | "Failed") {
            summary.reason = "Terminating".to_owned();
        }
        summary
    }

    /// Reads the init containers; true when the pod is still busy with them.
    fn read_init(&mut self, pod: &Value, sidecars: &[&str]) -> bool {
        let total = list(&pod["spec"]["initContainers"]).count();
        let mut init_restarts = 0;
        let mut busy = false;
        for (index, container) in list(&pod["status"]["initContainerStatuses"]).enumerate() {
            let sidecar = sidecars.contains(&text(&container["name"]));
            let restarts = container["restartCount"].as_i64().unwrap_or_default();
            init_restarts += restarts;
            self.note_restart(container);
            if sidecar {
                self.restarts += restarts;
                if container["ready"] == true {
                    self.ready += 1;
                }
            }
            let state = &container["state"];
            let done = state["terminated"].is_object() && state["terminated"]["exitCode"] == 0;
            if busy || done || (sidecar && container["started"] == true) {
                continue;
            }
            self.reason = match (&state["terminated"], text(&state["waiting"]["reason"])) {
                (ended @ Value::Object(_), _) => format!("Init:{}", ended_text(ended)),
                (_, waiting) if !waiting.is_empty() && waiting != "PodInitializing" => {
                    format!("Init:{waiting}")
                }
                _ => format!("Init:{index}/{total}"),
            };
            busy = true;
        }
        if busy {
            self.restarts = init_restarts;
        }
        busy
    }

    fn read_containers(&mut self, status: &Value) {
        let mut running = false;
        for container in list(&status["containerStatuses"]).rev() {
            self.restarts += container["restartCount"].as_i64().unwrap_or_default();
            self.note_restart(container);
            let state = &container["state"];
            let waiting = text(&state["waiting"]["reason"]);
            if !waiting.is_empty() {
                self.reason = waiting.to_owned();
            } else if state["terminated"].is_object() {
                self.reason = ended_text(&state["terminated"]);
            } else if container["ready"] == true && state["running"].is_object() {
                running = true;
                self.ready += 1;
            }
        }
        if self.reason == "Completed" && running {
            let ready =
                list(&status["conditions"]).any(|c| c["type"] == "Ready" && c["status"] == "True");
            self.reason = if ready { "Running" } else { "NotReady" }.to_owned();
        }
    }

    fn note_restart(&mut self, container: &Value) {
        let finished = text(&container["lastState"]["terminated"]["finishedAt"])
            .parse()
            .ok();
        self.last_restart = self.last_restart.max(finished);
    }
}

fn initialized(status: &Value) -> bool {
    list(&status["conditions"]).any(|c| c["type"] == "Initialized" && c["status"] == "True")
}

fn ended_text(ended: &Value) -> String {
    match (
        text(&ended["reason"]),
        ended["signal"].as_i64().unwrap_or_default(),
    ) {
        ("", 0) => format!(
            "ExitCode:{}",
            ended["exitCode"].as_i64().unwrap_or_default()
        ),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

fn service(service: &Value, name: Value, created: Value) -> Vec<Value> {
    let spec = &service["spec"];
    let ingress = list(&service["status"]["loadBalancer"]["ingress"]);
    let mut external: Vec<String> = ingress
        .map(|i| {
            if text(&i["ip"]).is_empty() {
                text(&i["hostname"])
            } else {
                text(&i["ip"])
            }
            .to_owned()
        })
        .collect();
    external.extend(list(&spec["externalIPs"]).map(|ip| text(ip).to_owned()));
    let external = match text(&spec["type"]) {
        "ExternalName" => spec["externalName"].clone(),
        "LoadBalancer" if external.is_empty() => "<pending>".into(),
        _ => joined(external, ","),
    };
    let ports =
        list(&spec["ports"]).map(|port| match port["nodePort"].as_u64().unwrap_or_default() {
            0 => format!("{}/{}", port["port"], text(&port["protocol"])),
            node => format!("{}:{node}/{}", port["port"], text(&port["protocol"])),
        });
    let selector = spec["selector"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", text(v)));
    vec![
        name,
        spec["type"].clone(),
        or_none(&spec["clusterIP"]),
        external,
        joined(ports, ","),
        created,
        joined(selector, ","),
    ]
}

fn node(node: &Value, name: Value, created: Value) -> Vec<Value> {
    let status = &node["status"];
    let ready = list(&status["conditions"]).find(|c| c["type"] == "Ready");
    let mut state = match ready.map(|c| text(&c["status"])) {
        Some("True") => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
        None => "Unknown".to_owned(),
    };
    if node["spec"]["unschedulable"] == true {
        state.push_str(",SchedulingDisabled");
    }
    let labels = node["metadata"]["labels"].as_object().into_iter().flatten();
    let roles = labels.filter_map(|(key, _)| {
        key.strip_prefix("node-role.kubernetes.io/")
            .map(str::to_owned)
    });
    let address = |kind: &str| {
        list(&status["addresses"])
            .find(|a| a["type"] == kind)
            .map(|a| a["address"].clone())
    };
    let info = |field: &str| or_unknown(&status["nodeInfo"][field]);
    vec![
        name,
        state.into(),
        joined(roles, ","),
        created,
        info("kubeletVersion"),
        address("InternalIP").unwrap_or_else(|| "<none>".into()),
        address("ExternalIP").unwrap_or_else(|| "<none>".into()),
        info("osImage"),
        info("kernelVersion"),
        info("containerRuntimeVersion"),
    ]
}

fn event(event: &Value, now: Timestamp, name: Value) -> Vec<Value> {
    // Rows may be of either events API; the fields of one are missing in the other.
    let pick = |core: &str, new: &str| {
        if event[core].is_null() {
            event[new].clone()
        } else {
            event[core].clone()
        }
    };
    let about = pick("involvedObject", "regarding");
    let source = pick("source", "deprecatedSource");
    let object = format!(
        "{}/{}",
        text(&about["kind"]).to_lowercase(),
        text(&about["name"])
    );
    let first = [
        pick("firstTimestamp", "deprecatedFirstTimestamp"),
        event["eventTime"].clone(),
    ];
    let first = first
        .into_iter()
        .find(|t| t.is_string())
        .unwrap_or_default();
    let last = [
        event["series"]["lastObservedTime"].clone(),
        pick("lastTimestamp", "deprecatedLastTimestamp"),
    ];
    let last = last
        .into_iter()
        .find(|t| t.is_string())
        .unwrap_or_else(|| first.clone());
    let component = [
        source["component"].clone(),
        pick("reportingComponent", "reportingController"),
    ];
    let component = component
        .iter()
        .map(text)
        .find(|c| !c.is_empty())
        .unwrap_or_default()
        .to_owned();
    let host = text(&source["host"]);
    let from = if host.is_empty() {
        component
    } else {
        format!("{component}, {host}")
    };
    let count = event["series"]["count"]
        .as_i64()
        .or(pick("count", "deprecatedCount").as_i64())
        .unwrap_or(1);
    vec![
        age(&last, now),
        event["type"].clone(),
        event["reason"].clone(),
        object.into(),
        about["fieldPath"].clone(),
        from.into(),
        text(&pick("message", "note")).trim().into(),
        age(&first, now),
        count.to_string().into(),
        name,
    ]
}

fn deployment(deployment: &Value, name: Value, created: Value) -> Vec<Value> {
    let status = |field: &str| deployment["status"][field].as_i64().unwrap_or_default();
    let desired = deployment["spec"]["replicas"].as_i64().unwrap_or_default();
    let mut row = vec![
        name,
        format!("{}/{desired}", status("readyReplicas")).into(),
        status("updatedReplicas").to_string().into(),
        status("availableReplicas").to_string().into(),
        created,
    ];
    row.extend(template(deployment));
    row
}

/// Containers, images, selector of a workload.
pub(super) fn template(workload: &Value) -> [Value; 3] {
    let containers = &workload["spec"]["template"]["spec"]["containers"];
    let column = |field: &str| joined(list(containers).map(|c| text(&c[field]).to_owned()), ",");
    [
        column("name"),
        column("image"),
        selector_text(&workload["spec"]["selector"]).into(),
    ]
}

fn endpoints(endpoints: &Value) -> Value {
    let all = list(&endpoints["subsets"]).flat_map(|subset| {
        list(&subset["addresses"]).flat_map(move |address| {
            let ip = text(&address["ip"]).to_owned();
            let mut all: Vec<String> = list(&subset["ports"])
                .map(|port| format!("{ip}:{}", port["port"]))
                .collect();
            if all.is_empty() {
                all.push(ip);
            }
            all
        })
    });
    shortened(all.collect())
}

fn endpoint_slice(slice: &Value, name: Value, created: Value) -> Vec<Value> {
    let ports = list(&slice["ports"])
        .map(|p| p["port"].to_string())
        .collect();
    let addresses = list(&slice["endpoints"])
        .flat_map(|e| list(&e["addresses"]))
        .map(|a| text(a).to_owned())
        .collect();
    let unset = |value: Value| {
        if value == "<none>" {
            "<unset>".into()
        } else {
            value
        }
    };
    vec![
        name,
        slice["addressType"].clone(),
        unset(shortened(ports)),
        unset(shortened(addresses)),
        created,
    ]
}

/// At most three, then how many more.
fn shortened(all: Vec<String>) -> Value {
    let more = all.len().saturating_sub(3);
    let shown = all.into_iter().take(3).collect::<Vec<_>>();
    match joined(shown, ",") {
        Value::String(text) if more > 0 => format!("{text} + {more} more...").into(),
        other => other,
    }
}
