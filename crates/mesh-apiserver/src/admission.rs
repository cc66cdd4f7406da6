//! Admission webhooks (`AdmissionReview` v1): which ones a request concerns, in which order they are called, what their answers mean.
//! The call itself is in `admission/call.rs`.

mod call;

use std::collections::HashSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::errors::ApiError;
use crate::registry::Resource;
use crate::request::Request;
use crate::selector::LabelSelector;
use crate::{ApiServer, convert, patch, rules};

/// What is being done to the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// It is new.
    Create,
    /// It changes.
    Update,
    /// It goes.
    Delete,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Operation::Create => "CREATE",
            Operation::Update => "UPDATE",
            Operation::Delete => "DELETE",
        }
    }
}

/// One webhook that a request concerns.
struct Hook {
    config: Value,
    /// The version of the kind in which the webhook wants the object.
    resource: Resource,
}

impl Hook {
    fn name(&self) -> &str {
        self.config["name"].as_str().unwrap_or_default()
    }
}

/// Facts of the request that all its reviews share.
struct Subject<'a> {
    request: &'a Request,
    operation: Operation,
    old: Option<&'a Value>,
    dry_run: bool,
}

/// Calls the mutating webhooks in order; returns the object as they want it.
///
/// # Errors
/// What a webhook says, or 500 when one with failure policy `Fail` can't be asked.
pub async fn mutate(
    api: &ApiServer,
    request: &Request,
    operation: Operation,
    mut object: Value,
    old: Option<&Value>,
    dry_run: bool,
    warnings: &mut Vec<String>,
) -> Result<Value, ApiError> {
    let subject = Subject {
        request,
        operation,
        old,
        dry_run,
    };
    let hooks = configured(api, request, "mutatingwebhookconfigurations");
    let mut called: HashSet<usize> = HashSet::new();
    let mut last_change = None;
    for (index, config) in hooks.iter().enumerate() {
        let Some(hook) = concerned(api, &subject, config, Some(&object)).await? else {
            continue;
        };
        called.insert(index);
        let changed = ask(api, &subject, &hook, Some(&object), warnings).await?;
        if let Some(changed) = changed.filter(|c| *c != object) {
            object = changed;
            last_change = Some(index);
        }
    }
    // A webhook that asked for it sees what later ones have changed, once.
    let Some(last_change) = last_change else {
        return Ok(object);
    };
    for (index, config) in hooks.iter().enumerate().take(last_change) {
        if config["reinvocationPolicy"] != "IfNeeded" || !called.contains(&index) {
            continue;
        }
        if let Some(hook) = concerned(api, &subject, config, Some(&object)).await?
            && let Some(changed) = ask(api, &subject, &hook, Some(&object), warnings).await?
        {
            object = changed;
        }
    }
    Ok(object)
}

/// Calls the validating webhooks (for a deletion the mutating ones have nothing to change and are asked the same way).
///
/// # Errors
/// As [`mutate`].
pub async fn validate(
    api: &ApiServer,
    request: &Request,
    operation: Operation,
    object: Option<&Value>,
    old: Option<&Value>,
    dry_run: bool,
    warnings: &mut Vec<String>,
) -> Result<(), ApiError> {
    let subject = Subject {
        request,
        operation,
        old,
        dry_run,
    };
    let mut hooks = Vec::new();
    if operation == Operation::Delete {
        hooks.extend(configured(api, request, "mutatingwebhookconfigurations"));
    }
    hooks.extend(configured(api, request, "validatingwebhookconfigurations"));
    for config in &hooks {
        if let Some(hook) = concerned(api, &subject, config, object).await? {
            ask(api, &subject, &hook, object, warnings).await?;
        }
    }
    Ok(())
}

/// All webhooks in order of their configuration's name. Webhook configurations themselves are exempt, so that a broken one can be
/// repaired.
fn configured(api: &ApiServer, request: &Request, plural: &str) -> Vec<Value> {
    if request.target.resource.group == "admissionregistration.k8s.io" {
        return Vec::new();
    }
    let all = api
        .storage()
        .list(&format!("admissionregistration.k8s.io/{plural}"), None)
        .items;
    all.iter()
        .flat_map(|(_, c)| {
            c.value["webhooks"]
                .as_array()
                .into_iter()
                .flatten()
                .cloned()
        })
        .collect()
}

async fn concerned(
    api: &ApiServer,
    subject: &Subject<'_>,
    config: &Value,
    object: Option<&Value>,
) -> Result<Option<Hook>, ApiError> {
    let Some(resource) = matched_version(api, subject, config) else {
        return Ok(None);
    };
    let selector = |field: &str| LabelSelector::from_object(&config[field]);
    let by_object = selector("objectSelector")?;
    if !by_object.is_empty()
        && ![object, subject.old]
            .into_iter()
            .flatten()
            .any(|o| by_object.matches(o))
    {
        return Ok(None);
    }
    let by_namespace = selector("namespaceSelector")?;
    if !by_namespace.is_empty() {
        let target = &subject.request.target;
        let matches = if target.resource.storage == "core/namespaces" {
            object
                .or(subject.old)
                .is_some_and(|o| by_namespace.matches(o))
        } else if let Some(namespace) = &target.namespace {
            let found = api
                .storage()
                .get("core/namespaces", &format!("/{namespace}"));
            found.is_some_and(|n| by_namespace.matches(&n.value))
        } else {
            true
        };
        if !matches {
            return Ok(None);
        }
    }
    let hook = Hook {
        config: config.clone(),
        resource,
    };
    let wanted = conditions_hold(subject, &hook, object).await?;
    Ok(wanted.then_some(hook))
}

/// Whether all of the webhook's match conditions hold. One that can't be evaluated counts as the failure policy says: the request is
/// refused, or the webhook left out.
async fn conditions_hold(
    subject: &Subject<'_>,
    hook: &Hook,
    object: Option<&Value>,
) -> Result<bool, ApiError> {
    let Some(conditions) = hook.config["matchConditions"]
        .as_array()
        .filter(|list| !list.is_empty())
    else {
        return Ok(true);
    };
    let shown = |object: Option<&Value>| {
        object.map_or(Value::Null, |o| {
            convert::to_version(&hook.resource, o.clone())
        })
    };
    let (object, old) = (shown(object), shown(subject.old));
    let facts = condition_facts(subject, hook);
    let conditions = conditions.clone();
    let evaluate = move || {
        let mut failure = None;
        for condition in &conditions {
            let source = condition["expression"].as_str().unwrap_or_default();
            match rules::condition(source, [&object, &old, &facts]) {
                Ok(true) => {}
                // One that does not hold decides, whatever the others came to.
                Ok(false) => return Ok(false),
                Err(reason) => {
                    let name = condition["name"].as_str().unwrap_or_default().to_owned();
                    failure = Some((name, reason));
                }
            }
        }
        failure.map_or(Ok(true), Err)
    };
    let failure = match rules::aside(evaluate).await? {
        Ok(wanted) => return Ok(wanted),
        Err(failure) => failure,
    };
    if hook.config["failurePolicy"] == "Ignore" {
        return Ok(false);
    }
    let (name, reason) = failure;
    Err(ApiError::forbidden(
        &subject.request.target.resource,
        subject.request.target.name.as_deref().unwrap_or_default(),
        &format!(
            "evaluating the match condition {name:?} of webhook {:?}: {reason}",
            hook.name()
        ),
    ))
}

/// The variable `request` of a match condition: the AdmissionRequest without its objects.
fn condition_facts(subject: &Subject<'_>, hook: &Hook) -> Value {
    let target = &subject.request.target;
    let identity = &subject.request.identity;
    let (asked, shown) = (&target.resource, &hook.resource);
    json!({
        "kind": { "group": shown.group, "version": shown.version, "kind": shown.kind },
        "resource": { "group": shown.group, "version": shown.version, "resource": shown.plural },
        "requestKind": { "group": asked.group, "version": asked.version, "kind": asked.kind },
        "requestResource": { "group": asked.group, "version": asked.version, "resource": asked.plural },
        "subResource": target.subresource.as_deref().unwrap_or_default(),
        "name": target.name.as_deref().unwrap_or_default(),
        "namespace": target.namespace.as_deref().unwrap_or_default(),
        "operation": subject.operation.name(),
        "userInfo": { "username": identity.username, "groups": identity.groups },
        "dryRun": subject.dry_run,
    })
}

/// The version of the request's resource that the rules name; with `Equivalent` another version of the same objects counts.
fn matched_version(api: &ApiServer, subject: &Subject<'_>, config: &Value) -> Option<Resource> {
    let target = &subject.request.target;
    let subresource = target.subresource.as_deref().unwrap_or_default();
    let rules = config["rules"].as_array()?;
    let matches = |resource: &Resource| {
        rules.iter().any(|rule| {
            rule_matches(
                rule,
                subject.operation,
                resource,
                subresource,
                target.namespace.is_some(),
            )
        })
    };
    if matches(&target.resource) {
        return Some((*target.resource).clone());
    }
    if config["matchPolicy"] == "Exact" {
        return None;
    }
    let registry = api.registry();
    let same = |r: &&std::sync::Arc<Resource>| {
        r.storage == target.resource.storage && r.group == target.resource.group
    };
    registry
        .all()
        .iter()
        .filter(same)
        .find(|r| matches(r))
        .map(|r| (**r).clone())
}

fn rule_matches(
    rule: &Value,
    operation: Operation,
    resource: &Resource,
    subresource: &str,
    namespaced: bool,
) -> bool {
    let any = |field: &str, wanted: &str| {
        rule[field]
            .as_array()
            .is_some_and(|list| list.iter().any(|v| v == "*" || v == wanted))
    };
    let scope = match rule["scope"].as_str() {
        Some("Namespaced") => namespaced,
        Some("Cluster") => !namespaced,
        _ => true,
    };
    let by_resource = rule["resources"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .any(|pattern| {
            let (plural, sub) = pattern.split_once('/').unwrap_or((pattern, ""));
            let sub_matches = if pattern.contains('/') {
                sub == "*" || sub == subresource
            } else {
                subresource.is_empty()
            };
            (plural == "*" || plural == resource.plural) && sub_matches
        });
    scope
        && by_resource
        && any("operations", operation.name())
        && any("apiGroups", &resource.group)
        && any("apiVersions", &resource.version)
}

/// Asks one webhook; returns the changed object when it changed it.
async fn ask(
    api: &ApiServer,
    subject: &Subject<'_>,
    hook: &Hook,
    object: Option<&Value>,
    warnings: &mut Vec<String>,
) -> Result<Option<Value>, ApiError> {
    let effects = hook.config["sideEffects"].as_str().unwrap_or_default();
    if subject.dry_run && !matches!(effects, "None" | "NoneOnDryRun") {
        return Err(ApiError::bad_request(format!(
            "admission webhook \"{}\" does not support dry run",
            hook.name()
        )));
    }
    let uid = uuid::Uuid::new_v4().to_string();
    let review = review(subject, hook, object, &uid);
    let answer = match call::post(api, &hook.config, &review)
        .await
        .and_then(|a| check_answer(a, &uid))
    {
        Ok(answer) => answer,
        Err(reason) if hook.config["failurePolicy"] == "Ignore" => {
            tracing::warn!(webhook = hook.name(), %reason, "webhook failed, its failure policy ignores that");
            return Ok(None);
        }
        Err(reason) => {
            return Err(ApiError::internal(format!(
                "failed calling webhook \"{}\": failed to call webhook: {reason}",
                hook.name()
            )));
        }
    };
    for warning in answer["warnings"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        warnings.push(warning.to_owned());
    }
    if answer["allowed"] != Value::Bool(true) {
        return Err(denied(hook.name(), &answer["status"]));
    }
    match (answer["patch"].as_str(), object) {
        (Some(patch), Some(object)) if !patch.is_empty() => {
            apply_patch(subject, hook, object, patch).map(Some)
        }
        _ => Ok(None),
    }
}

fn check_answer(answer: Value, uid: &str) -> Result<Value, String> {
    let response = &answer["response"];
    if response["uid"] != uid {
        return Err(format!(
            "expected response.uid=\"{uid}\", got {}",
            response["uid"]
        ));
    }
    if response["patch"].is_string() && response["patchType"] != "JSONPatch" {
        return Err(format!(
            "the answer has a patch of type {}, only JSONPatch is known",
            response["patchType"]
        ));
    }
    Ok(response.clone())
}

fn denied(name: &str, status: &Value) -> ApiError {
    let code = status["code"]
        .as_u64()
        .and_then(|c| u16::try_from(c).ok())
        .filter(|c| *c >= 400)
        .unwrap_or(403);
    let reason = status["reason"].as_str().unwrap_or_default();
    let text = status["message"]
        .as_str()
        .filter(|m| !m.is_empty())
        .unwrap_or(reason);
    let message = if text.is_empty() {
        format!("admission webhook \"{name}\" denied the request without explanation")
    } else {
        format!("admission webhook \"{name}\" denied the request: {text}")
    };
    let reason = match reason {
        "BadRequest" => "BadRequest",
        "Invalid" => "Invalid",
        "Conflict" => "Conflict",
        _ if code == 403 => "Forbidden",
        _ => "",
    };
    let mut error = ApiError::new(code, reason, message);
    error.details = status.get("details").filter(|d| d.is_object()).cloned();
    error
}

fn apply_patch(
    subject: &Subject<'_>,
    hook: &Hook,
    object: &Value,
    encoded: &str,
) -> Result<Value, ApiError> {
    let failed = |reason: String| {
        ApiError::internal(format!(
            "failed calling webhook \"{}\": its patch can't be applied: {reason}",
            hook.name()
        ))
    };
    let bytes = STANDARD
        .decode(encoded)
        .map_err(|e| failed(e.to_string()))?;
    let mut changed = convert::to_version(&hook.resource, object.clone());
    patch::json::apply(&mut changed, &bytes).map_err(|e| failed(e.to_string()))?;
    if !changed["metadata"].is_object() {
        return Err(failed("it removes the metadata".to_owned()));
    }
    Ok(convert::to_version(
        &subject.request.target.resource,
        changed,
    ))
}

fn review(subject: &Subject<'_>, hook: &Hook, object: Option<&Value>, uid: &str) -> Value {
    let target = &subject.request.target;
    let kind = |r: &Resource| json!({ "group": r.group, "version": r.version, "kind": r.kind });
    let resource =
        |r: &Resource| json!({ "group": r.group, "version": r.version, "resource": r.plural });
    let in_version = |o: &Value| convert::to_version(&hook.resource, o.clone());
    let shown = object.or(subject.old);
    let name = target
        .name
        .clone()
        .or_else(|| shown.and_then(|o| o["metadata"]["name"].as_str().map(str::to_owned)));
    let identity = &subject.request.identity;
    let extra: serde_json::Map<String, Value> = identity
        .extra
        .iter()
        .map(|(key, values)| (key.clone(), json!(values)))
        .collect();
    let mut request = json!({
        "uid": uid,
        "kind": kind(&hook.resource), "resource": resource(&hook.resource),
        "requestKind": kind(&target.resource), "requestResource": resource(&target.resource),
        "name": name.unwrap_or_default(), "operation": subject.operation.name(),
        "userInfo": { "username": identity.username, "uid": identity.uid, "groups": identity.groups, "extra": extra },
        "object": object.map_or(Value::Null, in_version), "oldObject": subject.old.map_or(Value::Null, in_version),
        "dryRun": subject.dry_run,
        "options": { "kind": options_kind(subject.operation), "apiVersion": "meta.k8s.io/v1" },
    });
    if let Some(namespace) = &target.namespace {
        request["namespace"] = namespace.as_str().into();
    } else if target.resource.storage == "core/namespaces" {
        request["namespace"] = request["name"].clone();
    }
    if let Some(subresource) = &target.subresource {
        request["subResource"] = subresource.as_str().into();
        request["requestSubResource"] = subresource.as_str().into();
    }
    json!({ "kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": request })
}

fn options_kind(operation: Operation) -> &'static str {
    match operation {
        Operation::Create => "CreateOptions",
        Operation::Update => "UpdateOptions",
        Operation::Delete => "DeleteOptions",
    }
}
