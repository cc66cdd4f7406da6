//! Roles and bindings: defaults of their references, rules that make sense, role references that never change.

use serde_json::{Value, json};

use super::items_mut;
use crate::errors::{FieldError, FieldErrorKind};
use crate::names;
use crate::rbac::{CLUSTER_ROLE_BINDINGS, GROUP, ROLE_BINDINGS, ROLES};
use crate::selector::LabelSelector;

/// The API groups of references that leave them out.
pub fn defaults(object: &mut Value) {
    let empty = |value: &Value| value.as_str().is_none_or(str::is_empty);
    if object["roleRef"].is_object() && empty(&object["roleRef"]["apiGroup"]) {
        object["roleRef"]["apiGroup"] = GROUP.into();
    }
    for subject in items_mut(object, "subjects") {
        if matches!(subject["kind"].as_str(), Some("User" | "Group")) && empty(&subject["apiGroup"])
        {
            subject["apiGroup"] = GROUP.into();
        }
    }
}

/// A name in a URL: anything but what a path would take apart.
pub fn name_error(name: &str) -> Option<&'static str> {
    match name {
        "." => Some("may not be '.'"),
        ".." => Some("may not be '..'"),
        _ if name.contains('/') => Some("may not contain '/'"),
        _ if name.contains('%') => Some("may not contain '%'"),
        _ => None,
    }
}

/// Adds what is wrong with a role or binding to `errors`.
pub fn validate(storage: &str, object: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    if matches!(storage, ROLE_BINDINGS | CLUSTER_ROLE_BINDINGS) {
        role_ref(storage, object, old, errors);
        for (index, subject) in list(&object["subjects"]).enumerate() {
            subject_errors(storage, &format!("subjects[{index}]"), subject, errors);
        }
        return;
    }
    for (index, rule) in list(&object["rules"]).enumerate() {
        rule_errors(storage == ROLES, &format!("rules[{index}]"), rule, errors);
    }
    if object["aggregationRule"].is_object() {
        let selectors = &object["aggregationRule"]["clusterRoleSelectors"];
        let field = "aggregationRule.clusterRoleSelectors";
        if list(selectors).next().is_none() {
            let detail = "at least one clusterRoleSelector required if aggregationRule is non-nil";
            errors.push(FieldError::required(field, detail));
        }
        for (index, selector) in list(selectors).enumerate() {
            if let Err(error) = LabelSelector::from_object(selector) {
                let field = format!("{field}[{index}]");
                errors.push(FieldError::invalid(field, selector.clone(), &error.message));
            }
        }
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn rule_errors(namespaced: bool, at: &str, rule: &Value, errors: &mut Vec<FieldError>) {
    let none = |field: &str| list(&rule[field]).next().is_none();
    let mut required = |field: &str, detail: &str| {
        errors.push(FieldError::required(format!("{at}.{field}"), detail));
    };
    if none("verbs") {
        required("verbs", "verbs must contain at least one value");
    }
    if none("nonResourceURLs") {
        if none("apiGroups") {
            required(
                "apiGroups",
                "resource rules must supply at least one api group",
            );
        }
        if none("resources") {
            required(
                "resources",
                "resource rules must supply at least one resource",
            );
        }
        return;
    }
    let mut invalid = |detail: &str| {
        let field = format!("{at}.nonResourceURLs");
        errors.push(FieldError::invalid(
            field,
            rule["nonResourceURLs"].clone(),
            detail,
        ));
    };
    if namespaced {
        invalid("namespaced rules cannot apply to non-resource URLs");
    }
    if !none("apiGroups") || !none("resources") || !none("resourceNames") {
        invalid("rules cannot apply to both regular resources and non-resource URLs");
    }
}

fn role_ref(storage: &str, object: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    let reference = &object["roleRef"];
    if reference["apiGroup"] != GROUP {
        not_supported("roleRef.apiGroup", &reference["apiGroup"], &[GROUP], errors);
    }
    let kinds: &[&str] = if storage == ROLE_BINDINGS {
        &["Role", "ClusterRole"]
    } else {
        &["ClusterRole"]
    };
    if !kinds.iter().any(|kind| reference["kind"] == *kind) {
        not_supported("roleRef.kind", &reference["kind"], kinds, errors);
    }
    match reference["name"].as_str().unwrap_or_default() {
        "" => errors.push(FieldError::required("roleRef.name", "")),
        name => errors
            .extend(name_error(name).map(|why| FieldError::invalid("roleRef.name", name, why))),
    }
    if old.is_some_and(|old| old["roleRef"] != *reference) {
        let detail = "cannot change roleRef";
        errors.push(FieldError::invalid("roleRef", reference.clone(), detail));
    }
}

fn subject_errors(storage: &str, at: &str, subject: &Value, errors: &mut Vec<FieldError>) {
    let text = |field: &str| subject[field].as_str().unwrap_or_default();
    let field = |name: &str| format!("{at}.{name}");
    if text("name").is_empty() {
        errors.push(FieldError::required(field("name"), ""));
    }
    match text("kind") {
        "ServiceAccount" => {
            if !text("name").is_empty() && !names::is_dns_subdomain(text("name")) {
                let detail = "a lowercase RFC 1123 subdomain is the name of a service account";
                errors.push(FieldError::invalid(field("name"), text("name"), detail));
            }
            if !text("apiGroup").is_empty() {
                not_supported(&field("apiGroup"), &subject["apiGroup"], &[""], errors);
            }
            if text("namespace").is_empty() && storage == CLUSTER_ROLE_BINDINGS {
                errors.push(FieldError::required(field("namespace"), ""));
            }
        }
        "User" | "Group" => {
            if text("apiGroup") != GROUP {
                not_supported(&field("apiGroup"), &subject["apiGroup"], &[GROUP], errors);
            }
        }
        _ => {
            let kinds = ["ServiceAccount", "User", "Group"];
            not_supported(&field("kind"), &subject["kind"], &kinds, errors);
        }
    }
}

fn not_supported(field: &str, found: &Value, allowed: &[&str], errors: &mut Vec<FieldError>) {
    let allowed: Vec<String> = allowed.iter().map(|text| json!(text).to_string()).collect();
    let detail = format!("supported values: {}", allowed.join(", "));
    errors.push(FieldError::make(
        field,
        FieldErrorKind::NotSupported,
        found.clone(),
        &detail,
    ));
}
