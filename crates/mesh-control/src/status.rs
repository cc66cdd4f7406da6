//! Findings about Istio objects, written to their status: so that `kubectl describe` shows what has no effect, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kube::Api;
use kube::api::{Patch, PatchParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use mesh_model::{ObjectKey, Problem, Severity};
use serde_json::{Value, json};

use crate::leader::Leader;
use crate::publish::Wishes;
use crate::refusals::{Board, Refusal};

/// Condition about the object itself.
const RECONCILED: &str = "Reconciled";
/// Condition about the proxies that were given what the object says; it appears once one of them refuses it.
const ACCEPTED: &str = "Accepted";
/// Proxies that a status names at most.
const MAX_REFUSALS: usize = 5;
/// Findings that a status tells at most, the worst first: an object may hold thousands of bad rules, and its status has to fit into the API.
const MAX_PROBLEMS: usize = 50;
/// Refusals are collected for so long before they are written: a bad object is refused by many proxies at once.
const COLLECT: Duration = Duration::from_millis(200);

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

/// What was written for an object.
#[derive(Clone, PartialEq)]
struct Mark {
    generation: i64,
    problems: Vec<Problem>,
    refusals: BTreeSet<Refusal>,
}

/// Writes what differs, for ever, while this control plane is the leader. A status that can't be written is logged; the next mesh tries again.
pub(crate) async fn run(
    client: kube::Client,
    mut wishes: Wishes,
    refusals: Board,
    mut leader: Leader,
) {
    // What we wrote, by object: the view of the watch may lag behind it.
    let mut written: BTreeMap<ObjectKey, Mark> = BTreeMap::new();
    let mut refused = refusals.changes();
    loop {
        let alive = tokio::select! {
            changed = wishes.changed() => changed,
            changed = leader.changed() => changed,
            changed = refused.changed() => {
                tokio::time::sleep(COLLECT).await;
                refused.mark_unchanged();
                changed
            }
        };
        if alive.is_err() {
            return;
        }
        if !*leader.borrow_and_update() {
            // Another one writes meanwhile.
            written.clear();
            continue;
        }
        let wanted = std::sync::Arc::clone(&wishes.borrow_and_update());
        let mut refusals = refusals.all();
        written.retain(|key, _| wanted.iter().any(|wish| wish.key == *key));
        for wish in wanted.iter() {
            let mark = Mark {
                generation: wish.generation,
                problems: wish.problems.clone(),
                refusals: refusals.remove(&wish.key).unwrap_or_default(),
            };
            if written.get(&wish.key) == Some(&mark) {
                continue;
            }
            // After a write of ours the view may still be the one before it.
            let current = match written.get(&wish.key) {
                Some(_) => read(&client, wish).await,
                None => wish.current.clone(),
            };
            let now = jiff::Timestamp::now().to_string();
            if let Some(status) = desired(wish, &current, &mark.refusals, &now) {
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

/// The status as it is now, or as last seen where it can't be read.
async fn read(client: &kube::Client, wish: &Wish) -> Value {
    let Some(api) = api(client, wish) else {
        return wish.current.clone();
    };
    match api.get(&wish.key.name).await {
        Ok(object) => object.data.get("status").cloned().unwrap_or_default(),
        Err(_) => wish.current.clone(),
    }
}

async fn write(client: &kube::Client, wish: &Wish, status: Value) -> Result<(), kube::Error> {
    let Some(api) = api(client, wish) else {
        return Ok(());
    };
    let patch = Patch::Merge(json!({ "status": status }));
    api.patch_status(&wish.key.name, &PatchParams::default(), &patch)
        .await
        .map(|_| ())
}

fn api(client: &kube::Client, wish: &Wish) -> Option<Api<DynamicObject>> {
    let info = mesh_api::KINDS
        .iter()
        .find(|info| info.kind == wish.key.kind)?;
    let version = wish.api_version.rsplit('/').next().unwrap_or_default();
    let gvk = GroupVersionKind::gvk(info.group, version, info.kind);
    let resource = ApiResource::from_gvk_with_plural(&gvk, info.plural);
    Some(Api::namespaced_with(
        client.clone(),
        &wish.key.namespace,
        &resource,
    ))
}

/// The status to be written, or nothing if the present one says it already. An object without problems is left alone unless
/// its status tells of some.
fn desired(wish: &Wish, current: &Value, refusals: &BTreeSet<Refusal>, now: &str) -> Option<Value> {
    let problems = worst_first(&wish.problems);
    let told = problems.iter().take(MAX_PROBLEMS);
    let messages: Vec<Value> = told.map(|problem| message(problem)).collect();
    let had_messages = current["validationMessages"]
        .as_array()
        .is_some_and(|list| !list.is_empty());
    let quiet = |kind: &str| condition(current, kind).is_none_or(|c| c["status"] == "True");
    let reconciled = !messages.is_empty() || had_messages || !quiet(RECONCILED);
    let accepted = !refusals.is_empty() || !quiet(ACCEPTED);
    if !reconciled && !accepted {
        return None;
    }
    let mut ours = Vec::new();
    // Once a condition is there it is kept up to date.
    if reconciled || condition(current, RECONCILED).is_some() {
        ours.push(of_problems(&problems));
    }
    if accepted || condition(current, ACCEPTED).is_some() {
        ours.push(of_refusals(refusals));
    }
    let same = ours.iter().all(|wanted| {
        condition(current, wanted.kind).is_some_and(|present| {
            present["status"] == wanted.status && present["message"] == wanted.message.as_str()
        })
    });
    if same && number(&current["observedGeneration"]) == wish.generation.to_string() {
        return None;
    }
    let mut conditions: Vec<Value> = current["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|present| ours.iter().all(|wanted| present["type"] != wanted.kind))
        .cloned()
        .collect();
    conditions.extend(ours.iter().map(|wanted| wanted.to_json(current, now)));
    Some(json!({
        "observedGeneration": wish.generation,
        "conditions": conditions,
        "validationMessages": messages,
    }))
}

/// A condition as it should be.
struct Condition {
    kind: &'static str,
    status: &'static str,
    reason: &'static str,
    message: String,
}

impl Condition {
    fn to_json(&self, current: &Value, now: &str) -> Value {
        let since = condition(current, self.kind)
            .filter(|condition| condition["status"] == self.status)
            .and_then(|condition| condition["lastTransitionTime"].as_str())
            .unwrap_or(now);
        json!({
            "type": self.kind,
            "status": self.status,
            "reason": self.reason,
            "message": self.message,
            "lastTransitionTime": since,
            "lastProbeTime": now,
        })
    }
}

fn worst_first(problems: &[Problem]) -> Vec<&Problem> {
    let mut sorted: Vec<&Problem> = problems.iter().collect();
    sorted.sort_by_key(|problem| std::cmp::Reverse(problem.severity));
    sorted
}

fn of_problems(problems: &[&Problem]) -> Condition {
    let worst = problems.first().map(|problem| problem.severity);
    let (status, reason) = match worst {
        Some(Severity::Error) => ("False", "ErrorsFound"),
        Some(Severity::Warning) => ("True", "WarningsFound"),
        _ => ("True", "Reconciled"),
    };
    let told = problems.iter().take(MAX_PROBLEMS);
    let mut texts: Vec<String> = told.map(|problem| describe(problem)).collect();
    if problems.len() > MAX_PROBLEMS {
        texts.push(format!("and {} more", problems.len() - MAX_PROBLEMS));
    }
    Condition {
        kind: RECONCILED,
        status,
        reason,
        message: texts.join("; "),
    }
}

fn of_refusals(refusals: &BTreeSet<Refusal>) -> Condition {
    if refusals.is_empty() {
        return Condition {
            kind: ACCEPTED,
            status: "True",
            reason: "Accepted",
            message: "no connected proxy refuses it any more".to_owned(),
        };
    }
    let mut texts: Vec<String> = refusals
        .iter()
        .take(MAX_REFUSALS)
        .map(|refusal| format!("{}: {}", refusal.node, refusal.message))
        .collect();
    if refusals.len() > MAX_REFUSALS {
        texts.push(format!("and {} more", refusals.len() - MAX_REFUSALS));
    }
    Condition {
        kind: ACCEPTED,
        status: "False",
        reason: "Rejected",
        message: texts.join("; "),
    }
}

fn condition<'a>(status: &'a Value, kind: &str) -> Option<&'a Value> {
    status["conditions"]
        .as_array()?
        .iter()
        .find(|condition| condition["type"] == kind)
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
    let code = problem.code.unwrap_or(match problem.severity {
        Severity::Error => "IST0106",
        Severity::Warning | Severity::Info => "IST0133",
    });
    json!({
        "type": { "code": code, "name": name_of(code) },
        "level": problem.severity.to_string().to_uppercase(),
        "documentationUrl": format!("https://istio.io/latest/docs/reference/config/analysis/{}/", code.to_lowercase()),
    })
}

/// Istio's name of a code that findings here have.
fn name_of(code: &str) -> &'static str {
    match code {
        "IST0101" => "ReferencedResourceNotFound",
        "IST0109" => "ConflictingMeshGatewayVirtualServiceHosts",
        "IST0112" => "VirtualServiceDestinationPortSelectorRequired",
        "IST0132" => "VirtualServiceHostNotFoundInGateway",
        "IST0133" => "SchemaWarning",
        "IST0145" => "ConflictingGateways",
        _ => "SchemaValidationError",
    }
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

    fn written(wish: &Wish, now: &str) -> Option<Value> {
        desired(wish, &wish.current, &BTreeSet::new(), now)
    }

    #[test]
    fn an_object_without_problems_is_left_alone() {
        assert_eq!(written(&wish(Vec::new(), Value::Null), "now"), None);
    }

    #[test]
    fn written_once_and_cleared_later() {
        let broken = vec![problem(Severity::Error)];
        let status = written(&wish(broken.clone(), Value::Null), "t1").unwrap();
        assert_eq!(status["conditions"][0]["status"], "False");
        assert_eq!(
            status["conditions"][0]["message"],
            "spec.hosts[0]: no such host"
        );
        assert_eq!(status["validationMessages"][0]["type"]["code"], "IST0101");
        assert_eq!(written(&wish(broken, status.clone()), "t2"), None);
        let cleared = written(&wish(Vec::new(), status), "t3").unwrap();
        assert_eq!(cleared["conditions"][0]["status"], "True");
        assert_eq!(cleared["validationMessages"], json!([]));
        assert_eq!(written(&wish(Vec::new(), cleared), "t4"), None);
    }

    #[test]
    fn a_status_tells_the_worst_and_counts_the_rest() {
        let mut problems: Vec<Problem> = (0..60).map(|_| problem(Severity::Warning)).collect();
        problems.push(Problem {
            message: "the worst".to_owned(),
            code: None,
            ..problem(Severity::Error)
        });
        let status = written(&wish(problems, Value::Null), "t").unwrap();
        let text = status["conditions"][0]["message"].as_str().unwrap();
        assert!(text.starts_with("spec.hosts[0]: the worst; "), "{text}");
        assert!(text.ends_with("; and 11 more"), "{text}");
        assert_eq!(status["conditions"][0]["status"], "False");
        let messages = status["validationMessages"].as_array().unwrap();
        assert_eq!(messages.len(), MAX_PROBLEMS);
        let kind = json!({"code": "IST0106", "name": "SchemaValidationError"});
        assert_eq!(messages[0]["type"], kind);
    }

    #[test]
    fn conditions_of_others_stay() {
        let current = json!({"conditions": [{"type": "Other", "status": "True"}]});
        let status = written(&wish(vec![problem(Severity::Warning)], current), "t").unwrap();
        assert_eq!(status["conditions"][0]["type"], "Other");
        assert_eq!(status["conditions"][1]["status"], "True");
        assert_eq!(status["conditions"][1]["reason"], "WarningsFound");
    }

    #[test]
    fn what_proxies_refuse_is_a_condition_of_its_own() {
        let refusals: BTreeSet<Refusal> = (0..7)
            .map(|number| Refusal {
                node: format!("sidecar p{number}.default"),
                message: "route table 80: no".to_owned(),
            })
            .collect();
        let of = |current: &Value, refusals: &BTreeSet<Refusal>, now: &str| {
            desired(&wish(Vec::new(), Value::Null), current, refusals, now)
        };
        let status = of(&Value::Null, &refusals, "t1").unwrap();
        let condition = &status["conditions"][0];
        assert_eq!(condition["type"], "Accepted");
        assert_eq!(condition["status"], "False");
        let text = condition["message"].as_str().unwrap();
        assert!(
            text.starts_with("sidecar p0.default: route table 80: no;"),
            "{text}"
        );
        assert!(text.ends_with("and 2 more"), "{text}");
        assert_eq!(of(&status, &refusals, "t2"), None);
        let mended = of(&status, &BTreeSet::new(), "t3").unwrap();
        assert_eq!(mended["conditions"][0]["status"], "True");
        assert_eq!(of(&mended, &BTreeSet::new(), "t4"), None);
    }
}
