//! Nobody gives what he does not have: checks of writes to roles and bindings, as Kubernetes' `policybased` storage makes them.
//!
//! The verbs `escalate` on a role and `bind` on a role that is referred to are the ways around.

use std::sync::Arc;

use serde_json::Value;

use super::{CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, GROUP, ROLE_BINDINGS, ROLES, Rule, missing};
use crate::ApiServer;
use crate::access::{Action, Object};
use crate::errors::ApiError;
use crate::request::Request;

/// Whether the author of this write of a role or binding may make it; other kinds pass.
///
/// # Errors
/// 403 with the permissions that he lacks, 404 for a binding to a role that does not exist.
pub fn check(
    api: &ApiServer,
    request: &Request,
    old: Option<&Value>,
    new: &Value,
) -> Result<(), ApiError> {
    let resource = &request.target.resource;
    if resource.group != GROUP || request.identity.is_master() {
        return Ok(());
    }
    match resource.storage.as_str() {
        ROLES | CLUSTER_ROLES => role(api, request, old, new),
        ROLE_BINDINGS | CLUSTER_ROLE_BINDINGS => binding(api, request, old, new),
        _ => Ok(()),
    }
}

fn role(
    api: &ApiServer,
    request: &Request,
    old: Option<&Value>,
    new: &Value,
) -> Result<(), ApiError> {
    let part = |field: &str| old.is_some_and(|old| old.get(field) == new.get(field));
    if part("rules") && part("aggregationRule") {
        return Ok(());
    }
    let name = new["metadata"]["name"].as_str().unwrap_or_default();
    let plural = request.target.resource.plural.as_str();
    if may(api, request, "escalate", plural, name) {
        return Ok(());
    }
    if new["aggregationRule"].is_object() && !part("aggregationRule") {
        let all = |field: &str| serde_json::json!({ "verbs": ["*"], field: ["*"] });
        let mut everything = Rule::of(&all("resources"));
        everything.groups = vec!["*".to_owned()];
        let wanted = [everything, Rule::of(&all("nonResourceURLs"))];
        if !missing(&held(api, request), &wanted).is_empty() {
            let why = "must have cluster-admin privileges to use an aggregationRule";
            return Err(ApiError::forbidden(&request.target.resource, name, why));
        }
    }
    confirm(api, request, name, &Rule::list(new))
}

fn binding(
    api: &ApiServer,
    request: &Request,
    old: Option<&Value>,
    new: &Value,
) -> Result<(), ApiError> {
    let part = |field: &str| old.is_some_and(|old| old.get(field) == new.get(field));
    if part("subjects") && part("roleRef") {
        return Ok(());
    }
    let name = new["metadata"]["name"].as_str().unwrap_or_default();
    let reference = &new["roleRef"];
    let role = reference["name"].as_str().unwrap_or_default();
    let plural = match reference["kind"].as_str() {
        Some("ClusterRole") => "clusterroles",
        _ => "roles",
    };
    if may(api, request, "bind", plural, role) {
        return Ok(());
    }
    let namespace = request.target.namespace.as_deref().unwrap_or_default();
    let rules: Option<Arc<[Rule]>> = api.policy().referenced(namespace, reference);
    match rules {
        Some(rules) => confirm(api, request, name, &rules),
        None => {
            let message = format!("{plural}.{GROUP} {role:?} not found");
            Err(ApiError::new(404, "NotFound", message))
        }
    }
}

/// Whether the author has the verb for a role, here or everywhere.
fn may(api: &ApiServer, request: &Request, verb: &str, plural: &str, name: &str) -> bool {
    let action = Action::on_object(
        verb,
        Object {
            group: GROUP.into(),
            resource: plural.into(),
            namespace: request
                .target
                .namespace
                .as_deref()
                .unwrap_or_default()
                .into(),
            name: name.into(),
            ..Object::default()
        },
    );
    api.policy().allows(&request.identity, &action).is_some()
}

fn held(api: &ApiServer, request: &Request) -> Vec<Rule> {
    let namespace = request.target.namespace.as_deref().unwrap_or_default();
    api.policy().rules(&request.identity, namespace)
}

fn confirm(
    api: &ApiServer,
    request: &Request,
    name: &str,
    wanted: &[Rule],
) -> Result<(), ApiError> {
    let lacking = missing(&held(api, request), wanted);
    if lacking.is_empty() {
        return Ok(());
    }
    let identity = &request.identity;
    let groups: Vec<String> = identity.groups.iter().map(|g| format!("{g:?}")).collect();
    let rules: Vec<String> = lacking.iter().map(Rule::to_string).collect();
    let why = format!(
        "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
        identity.username,
        groups.join(" "),
        rules.join("\n")
    );
    Err(ApiError::forbidden(&request.target.resource, name, &why))
}
