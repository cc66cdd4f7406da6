//! Findings about Istio objects, written to their status: so that `kubectl describe` shows what has no effect, and why.

use std::collections::BTreeMap;

use kube::Api;
use kube::api::{Patch, PatchParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use mesh_model::{ObjectKey, Problem, Severity};
use serde_json::{Value, json};

use crate::publish::Wishes;

/// What an object's status should tell.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) key: ObjectKey,
    pub(crate) api_version: String,
    pub(crate) generation: i64,
    /// The status as last seen.
    pub(crate) current: Value,
    pub(crate) problems: Vec<Problem>,
}

/// Writes what differs, for ever. A status that can't be written is logged; the next mesh tries again.
pub(crate) async fn run(client: kube::Client, mut wishes: Wishes) {
    // What we wrote, by object: the view of the watch may lag behind it.
    let mut written: BTreeMap<ObjectKey, (i64, Vec<Problem>)> = BTreeMap::new();
    while wishes.changed().await.is_ok() {
        let wanted = std::sync::Arc::clone(&wishes.borrow_and_update());
        written.retain(|key, _| wanted.iter().any(|wish| wish.key == *key));
        for wish in wanted.iter() {
            let mark = (wish.generation, wish.problems.clone());
            if written.get(&wish.key) == Some(&mark) {
                continue;
            }
            if let Some(status) = desired(wish, &jiff::Timestamp::now().to_string()) {
                match write(&client, wish, status).await {
                    Ok(()) => {}
                    // It went away meanwhile.
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    Err(error) => {
                        tracing::warn!(object = %wish.key, %error, "writing the status");
                        continue;
                    }
                }
            }
            written.insert(wish.key.clone(), mark);
        }
    }
}

async fn write(client: &kube::Client, wish: &Wish, status: Value) -> Result<(), kube::Error> {
    let Some(info) = mesh_api::KINDS
        .iter()
        .find(|info| info.kind == wish.key.kind)
    else {
        return Ok(());
    };
    let version = wish.api_version.rsplit('/').next().unwrap_or_default();
    let gvk = GroupVersionKind::gvk(info.group, version, info.kind);
    let resource = ApiResource::from_gvk_with_plural(&gvk, info.plural);
    let api: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), &wish.key.namespace, &resource);
    let patch = Patch::Merge(json!({ "status": status }));
    api.patch_status(&wish.key.name, &PatchParams::default(), &patch)
        .await
        .map(|_| ())
}

/// The status to be written, or nothing if the present one says it already. An object without problems is left alone unless
/// its status tells of some.
fn desired(wish: &Wish, now: &str) -> Option<Value> {
    let condition = reconciled(&wish.current);
    let messages: Vec<Value> = wish.problems.iter().map(message).collect();
    let had_messages = wish.current["validationMessages"]
        .as_array()
        .is_some_and(|list| !list.is_empty());
    if messages.is_empty() && !had_messages && condition.is_none_or(|c| c["status"] == "True") {
        return None;
    }
    let worst = wish.problems.iter().map(|problem| problem.severity).max();
    let (status, reason) = match worst {
        Some(Severity::Error) => ("False", "ErrorsFound"),
        Some(Severity::Warning) => ("True", "WarningsFound"),
        _ => ("True", "Reconciled"),
    };
    let text = wish
        .problems
        .iter()
        .map(describe)
        .collect::<Vec<_>>()
        .join("; ");
    let same = condition.is_some_and(|condition| {
        condition["status"] == status && condition["message"] == text.as_str()
    });
    if same && number(&wish.current["observedGeneration"]) == wish.generation.to_string() {
        return None;
    }
    let since = condition
        .filter(|condition| condition["status"] == status)
        .and_then(|condition| condition["lastTransitionTime"].as_str())
        .unwrap_or(now);
    let mut conditions: Vec<Value> = wish.current["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|condition| condition["type"] != "Reconciled")
        .cloned()
        .collect();
    conditions.push(json!({
        "type": "Reconciled",
        "status": status,
        "reason": reason,
        "message": text,
        "lastTransitionTime": since,
        "lastProbeTime": now,
    }));
    Some(json!({
        "observedGeneration": wish.generation,
        "conditions": conditions,
        "validationMessages": messages,
    }))
}

fn reconciled(status: &Value) -> Option<&Value> {
    status["conditions"]
        .as_array()?
        .iter()
        .find(|condition| condition["type"] == "Reconciled")
}

/// A generation as text: Istio's own control plane writes it as a string, since it is a 64-bit number in protobuf.
fn number(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn describe(problem: &Problem) -> String {
    match problem.field.as_str() {
        "" => problem.message.clone(),
        field => format!("{field}: {}", problem.message),
    }
}

/// A message in the form of Istio's `AnalysisMessageBase`.
fn message(problem: &Problem) -> Value {
    let code = problem.code.unwrap_or("IST0106");
    json!({
        "type": { "code": code },
        "level": problem.severity.to_string().to_uppercase(),
        "documentationUrl": format!("https://istio.io/latest/docs/reference/config/analysis/{}/", code.to_lowercase()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(problems: Vec<Problem>, current: Value) -> Wish {
        Wish {
            key: ObjectKey::new("VirtualService", "default", "v"),
            api_version: "networking.istio.io/v1".to_owned(),
            generation: 3,
            current,
            problems,
        }
    }

    fn problem(severity: Severity) -> Problem {
        Problem {
            object: ObjectKey::new("VirtualService", "default", "v"),
            field: "spec.hosts[0]".to_owned(),
            severity,
            message: "no such host".to_owned(),
            code: Some("IST0101"),
        }
    }

    #[test]
    fn an_object_without_problems_is_left_alone() {
        assert_eq!(desired(&wish(Vec::new(), Value::Null), "now"), None);
    }

    #[test]
    fn written_once_and_cleared_later() {
        let broken = vec![problem(Severity::Error)];
        let status = desired(&wish(broken.clone(), Value::Null), "t1").unwrap();
        assert_eq!(status["conditions"][0]["status"], "False");
        assert_eq!(
            status["conditions"][0]["message"],
            "spec.hosts[0]: no such host"
        );
        assert_eq!(status["validationMessages"][0]["type"]["code"], "IST0101");
        assert_eq!(desired(&wish(broken, status.clone()), "t2"), None);
        let cleared = desired(&wish(Vec::new(), status), "t3").unwrap();
        assert_eq!(cleared["conditions"][0]["status"], "True");
        assert_eq!(cleared["validationMessages"], json!([]));
        assert_eq!(desired(&wish(Vec::new(), cleared), "t4"), None);
    }

    #[test]
    fn conditions_of_others_stay() {
        let current = json!({"conditions": [{"type": "Other", "status": "True"}]});
        let status = desired(&wish(vec![problem(Severity::Warning)], current), "t").unwrap();
        assert_eq!(status["conditions"][0]["type"], "Other");
        assert_eq!(status["conditions"][1]["status"], "True");
        assert_eq!(status["conditions"][1]["reason"], "WarningsFound");
    }
}
