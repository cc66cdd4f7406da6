//! Columns and cells of the workload kinds beside Deployment, and of budgets and autoscalers, as `kubectl` has them.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::builtin::{list, template, text};
use super::{Column, age, duration};

const NAME: Column = ("Name", "string", 0);
const AGE: Column = ("Age", "string", 0);
const CONTAINERS: Column = ("Containers", "string", 1);
const IMAGES: Column = ("Images", "string", 1);
const SELECTOR: Column = ("Selector", "string", 1);

/// The columns of a resource by storage key; `None` for kinds that are not in this file.
pub fn columns(storage: &str) -> Option<Vec<Column>> {
    let all: &[Column] = match storage {
        "apps/statefulsets" => &[NAME, ("Ready", "string", 0), AGE, CONTAINERS, IMAGES],
        "apps/daemonsets" => &[
            NAME,
            ("Desired", "integer", 0),
            ("Current", "integer", 0),
            ("Ready", "integer", 0),
            ("Up-to-date", "integer", 0),
            ("Available", "integer", 0),
            ("Node Selector", "string", 0),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        "apps/controllerrevisions" => &[
            NAME,
            ("Controller", "string", 0),
            ("Revision", "integer", 0),
            AGE,
        ],
        "batch/jobs" => &[
            NAME,
            ("Status", "string", 0),
            ("Completions", "string", 0),
            ("Duration", "string", 0),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        "batch/cronjobs" => &[
            NAME,
            ("Schedule", "string", 0),
            ("Timezone", "string", 0),
            ("Suspend", "boolean", 0),
            ("Active", "integer", 0),
            ("Last Schedule", "string", 0),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        "policy/poddisruptionbudgets" => &[
            NAME,
            ("Min Available", "string", 0),
            ("Max Unavailable", "string", 0),
            ("Allowed Disruptions", "integer", 0),
            AGE,
        ],
        "autoscaling/horizontalpodautoscalers" => &[
            NAME,
            ("Reference", "string", 0),
            ("Targets", "string", 0),
            ("MinPods", "string", 0),
            ("MaxPods", "integer", 0),
            ("Replicas", "integer", 0),
            AGE,
        ],
        _ => return None,
    };
    Some(all.to_vec())
}

/// The cells of an object, in the order of [`columns`].
pub fn cells(storage: &str, object: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let name = object["metadata"]["name"].clone();
    let created = age(&object["metadata"]["creationTimestamp"], now);
    let (spec, status) = (&object["spec"], &object["status"]);
    let count = |field: &str| json!(status[field].as_i64().unwrap_or_default());
    Some(match storage {
        "apps/statefulsets" => {
            let desired = spec["replicas"].as_i64().unwrap_or_default();
            let ready = format!("{}/{desired}", count("readyReplicas"));
            let [containers, images, _] = template(object);
            vec![name, ready.into(), created, containers, images]
        }
        "apps/daemonsets" => {
            let selector = &spec["template"]["spec"]["nodeSelector"];
            let mut row = vec![
                name,
                count("desiredNumberScheduled"),
                count("currentNumberScheduled"),
                count("numberReady"),
                count("updatedNumberScheduled"),
                count("numberAvailable"),
                pairs(selector),
                created,
            ];
            row.extend(template(object));
            row
        }
        "apps/controllerrevisions" => {
            vec![
                name,
                controller(object),
                object["revision"].clone(),
                created,
            ]
        }
        "batch/jobs" => {
            let mut row = vec![
                name,
                job_status(object).into(),
                completions(object).into(),
                job_duration(status, now),
                created,
            ];
            row.extend(template(object));
            row
        }
        "batch/cronjobs" => cron_job(object, now, name, created),
        "policy/poddisruptionbudgets" => vec![
            name,
            or_not_available(&spec["minAvailable"]),
            or_not_available(&spec["maxUnavailable"]),
            count("disruptionsAllowed"),
            created,
        ],
        "autoscaling/horizontalpodautoscalers" => {
            let target = &spec["scaleTargetRef"];
            vec![
                name,
                format!("{}/{}", text(&target["kind"]), text(&target["name"])).into(),
                targets(spec).into(),
                spec["minReplicas"].as_i64().unwrap_or(1).to_string().into(),
                spec["maxReplicas"].clone(),
                count("currentReplicas"),
                created,
            ]
        }
        _ => return None,
    })
}

fn pairs(map: &Value) -> Value {
    let pairs = map.as_object().into_iter().flatten();
    let all: Vec<String> = pairs.map(|(k, v)| format!("{k}={}", text(v))).collect();
    if all.is_empty() {
        "<none>".into()
    } else {
        all.join(",").into()
    }
}

fn or_not_available(value: &Value) -> Value {
    match value {
        Value::Null => "N/A".into(),
        Value::String(_) => value.clone(),
        number => number.to_string().into(),
    }
}

/// `statefulset.apps/web`.
fn controller(object: &Value) -> Value {
    let owners = list(&object["metadata"]["ownerReferences"]);
    let Some(owner) = owners.into_iter().find(|owner| owner["controller"] == true) else {
        return "<none>".into();
    };
    let group = text(&owner["apiVersion"]).split_once('/');
    let kind = text(&owner["kind"]).to_lowercase();
    match group {
        Some((group, _)) => format!("{kind}.{group}/{}", text(&owner["name"])).into(),
        None => format!("{kind}/{}", text(&owner["name"])).into(),
    }
}

fn job_status(job: &Value) -> &'static str {
    let is = |kind: &str| {
        list(&job["status"]["conditions"]).any(|c| c["type"] == kind && c["status"] == "True")
    };
    match () {
        () if is("Complete") => "Complete",
        () if is("Failed") => "Failed",
        () if !job["metadata"]["deletionTimestamp"].is_null() => "Terminating",
        () if is("Suspended") => "Suspended",
        () if is("FailureTarget") => "FailureTarget",
        () if is("SuccessCriteriaMet") => "SuccessCriteriaMet",
        () => "Running",
    }
}

fn completions(job: &Value) -> String {
    let succeeded = job["status"]["succeeded"].as_i64().unwrap_or_default();
    match (
        job["spec"]["completions"].as_i64(),
        job["spec"]["parallelism"].as_i64().unwrap_or_default(),
    ) {
        (Some(wanted), _) => format!("{succeeded}/{wanted}"),
        (None, parallel) if parallel > 1 => format!("{succeeded}/1 of {parallel}"),
        (None, _) => format!("{succeeded}/1"),
    }
}

fn job_duration(status: &Value, now: Timestamp) -> Value {
    let time = |value: &Value| text(value).parse::<Timestamp>().ok();
    let Some(start) = time(&status["startTime"]) else {
        return "".into();
    };
    let end = time(&status["completionTime"]).unwrap_or(now);
    duration(end.as_second() - start.as_second()).into()
}

fn cron_job(object: &Value, now: Timestamp, name: Value, created: Value) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let last = &status["lastScheduleTime"];
    let zone = text(&spec["timeZone"]);
    let mut row = vec![
        name,
        spec["schedule"].clone(),
        if zone.is_empty() { "<none>" } else { zone }.into(),
        if spec["suspend"] == true {
            "True"
        } else {
            "False"
        }
        .into(),
        json!(list(&status["active"]).count()),
        if last.is_null() {
            "<none>".into()
        } else {
            age(last, now)
        },
        created,
    ];
    row.extend(template(&spec["jobTemplate"]));
    row
}

/// The metrics of an autoscaler with their present values, which this cluster does not know.
fn targets(spec: &Value) -> String {
    let one = |metric: &Value| {
        let kind = text(&metric["type"]);
        let mut letters = kind.chars();
        let first = letters.next().unwrap_or_default().to_ascii_lowercase();
        let body = &metric[format!("{first}{}", letters.as_str()).as_str()];
        let name = body["name"]
            .as_str()
            .or(body["metric"]["name"].as_str())
            .unwrap_or_default();
        let target = &body["target"];
        let wanted = match target["averageUtilization"].as_i64() {
            Some(percent) => format!("{percent}%"),
            None => ["averageValue", "value"]
                .into_iter()
                .find_map(|field| match &target[field] {
                    Value::String(text) => Some(text.clone()),
                    Value::Null => None,
                    other => Some(other.to_string()),
                })
                .unwrap_or_else(|| "<auto>".to_owned()),
        };
        let prefix = if kind == "Resource" {
            format!("{name}: ")
        } else {
            String::new()
        };
        format!("{prefix}<unknown>/{wanted}")
    };
    let all: Vec<String> = list(&spec["metrics"]).map(one).collect();
    if all.is_empty() {
        "<none>".to_owned()
    } else {
        all.join(", ")
    }
}
