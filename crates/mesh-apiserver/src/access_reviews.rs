//! The reviews of `authorization.k8s.io`: may somebody do something, and what may I do.

use serde_json::{Value, json};

use crate::ApiServer;
use crate::access::{Action, Object, On};
use crate::auth::Identity;
use crate::errors::{ApiError, FieldError};
use crate::rbac::Rule;
use crate::request::Request;

/// The status of a SubjectAccessReview, LocalSubjectAccessReview, SelfSubjectAccessReview or SelfSubjectRulesReview.
///
/// # Errors
/// 422 for a question that makes no sense, 400 for one about another namespace than its own.
pub fn status(api: &ApiServer, request: &Request, object: &Value) -> Result<Value, ApiError> {
    let spec = &object["spec"];
    match request.target.resource.kind.as_str() {
        "SelfSubjectRulesReview" => rules(api, request, spec),
        "SelfSubjectAccessReview" => {
            check(request, spec, false)?;
            Ok(answer(api, &request.identity, spec))
        }
        kind => {
            check(request, spec, true)?;
            if kind == "LocalSubjectAccessReview" {
                let own = request.target.namespace.as_deref().unwrap_or_default();
                if spec["resourceAttributes"]["namespace"] != own {
                    let message =
                        format!("spec.resourceAttributes.namespace must match namespace: {own}");
                    return Err(ApiError::bad_request(message));
                }
            }
            Ok(answer(api, &subject(spec), spec))
        }
    }
}

/// Exactly one thing is asked about, and somebody.
fn check(request: &Request, spec: &Value, others: bool) -> Result<(), ApiError> {
    let mut errors = Vec::new();
    let local = request.target.resource.kind == "LocalSubjectAccessReview";
    let (resource, path) = (
        spec["resourceAttributes"].is_object(),
        spec["nonResourceAttributes"].is_object(),
    );
    if resource && path {
        let detail = "cannot be specified in combination with resourceAttributes";
        let value = spec["nonResourceAttributes"].clone();
        errors.push(FieldError::invalid(
            "spec.nonResourceAttributes",
            value,
            detail,
        ));
    }
    if !resource && !path {
        let detail = "exactly one of nonResourceAttributes or resourceAttributes must be specified";
        let value = spec["resourceAttributes"].clone();
        errors.push(FieldError::invalid(
            "spec.resourceAttributes",
            value,
            detail,
        ));
    }
    if local && path {
        let value = spec["nonResourceAttributes"].clone();
        let detail = "disallowed on this kind of request";
        errors.push(FieldError::invalid(
            "spec.nonResourceAttributes",
            value,
            detail,
        ));
    }
    let nobody = spec["user"].as_str().is_none_or(str::is_empty)
        && spec["groups"].as_array().is_none_or(Vec::is_empty);
    if others && nobody {
        let detail = "at least one of user or group must be specified";
        errors.push(FieldError::invalid("spec.user", "", detail));
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(ApiError::invalid(&request.target.resource, "", &errors))
}

fn subject(spec: &Value) -> Identity {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().map(text).collect()
    };
    let extra = spec["extra"].as_object().into_iter().flatten();
    Identity {
        username: text(&spec["user"]),
        uid: text(&spec["uid"]),
        groups: list(&spec["groups"]),
        extra: extra.map(|(k, v)| (k.clone(), list(v))).collect(),
    }
}

fn answer(api: &ApiServer, identity: &Identity, spec: &Value) -> Value {
    let action = action(spec);
    let policy = api.policy();
    let (allowed, reason) = match policy.allows(identity, &action) {
        Some(allowed) => (true, allowed.to_string()),
        None => (false, policy.broken(identity, &action)),
    };
    let mut status = json!({ "allowed": allowed });
    if !reason.is_empty() {
        status["reason"] = reason.into();
    }
    status
}

fn action(spec: &Value) -> Action<'_> {
    fn text<'v>(from: &'v Value, field: &str) -> &'v str {
        from[field].as_str().unwrap_or_default()
    }
    let resource = &spec["resourceAttributes"];
    if resource.is_object() {
        return Action::on_object(
            text(resource, "verb"),
            Object {
                group: text(resource, "group").into(),
                resource: text(resource, "resource").into(),
                subresource: text(resource, "subresource").into(),
                namespace: text(resource, "namespace").into(),
                name: text(resource, "name").into(),
            },
        );
    }
    let path = &spec["nonResourceAttributes"];
    Action {
        verb: text(path, "verb").into(),
        on: On::Path(text(path, "path").into()),
    }
}

/// What the caller may do in a namespace.
fn rules(api: &ApiServer, request: &Request, spec: &Value) -> Result<Value, ApiError> {
    let namespace = spec["namespace"].as_str().unwrap_or_default();
    if namespace.is_empty() {
        return Err(ApiError::bad_request("no namespace on request"));
    }
    let identity = &request.identity;
    let mut rules = api.policy().rules(identity, namespace);
    if identity.is_master() && rules.is_empty() {
        // Somebody took the binding away; the group has its rights all the same.
        let all = || vec!["*".to_owned()];
        rules.push(Rule {
            verbs: all(),
            groups: all(),
            resources: all(),
            ..Rule::default()
        });
        rules.push(Rule {
            verbs: all(),
            urls: all(),
            ..Rule::default()
        });
    }
    let (paths, resources): (Vec<&Rule>, Vec<&Rule>) =
        rules.iter().partition(|rule| !rule.urls.is_empty());
    let shown = |rules: Vec<&Rule>| rules.into_iter().map(Rule::to_json).collect::<Vec<Value>>();
    Ok(json!({
        "incomplete": false, "resourceRules": shown(resources), "nonResourceRules": shown(paths),
    }))
}
