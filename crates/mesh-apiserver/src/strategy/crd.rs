//! CustomResourceDefinitions: names, versions, the conditions that say "served".

use serde_json::{Value, json};

use crate::errors::{FieldError, FieldErrorKind};
use crate::rules;
use crate::write::now;

/// Fills in names and status. A definition is served as soon as it is stored, so the conditions are true at once.
pub fn prepare(old: Option<&Value>, object: &mut Value) {
    let spec = &mut object["spec"];
    let kind = spec["names"]["kind"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    for (field, default) in [
        ("singular", kind.to_lowercase()),
        ("listKind", format!("{kind}List")),
    ] {
        if spec["names"][field].as_str().unwrap_or_default().is_empty() && !kind.is_empty() {
            spec["names"][field] = default.into();
        }
    }
    let names = spec["names"].clone();
    let storage = spec["versions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|v| v["storage"] == Value::Bool(true));
    let storage = storage.map(|v| v["name"].clone()).unwrap_or_default();
    let mut stored = old
        .and_then(|o| o["status"]["storedVersions"].as_array().cloned())
        .unwrap_or_default();
    if !stored.contains(&storage) {
        stored.push(storage);
    }
    let condition = |kind: &str, reason: &str, message: &str| {
        let before = old.and_then(|o| {
            o["status"]["conditions"]
                .as_array()?
                .iter()
                .find(|c| c["type"] == kind)
                .cloned()
        });
        let since = before.map_or_else(|| json!(now()), |c| c["lastTransitionTime"].clone());
        json!({ "type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": since })
    };
    let mut conditions = vec![
        condition("NamesAccepted", "NoConflicts", "no conflicts found"),
        condition(
            "Established",
            "InitialNamesAccepted",
            "the initial names have been accepted",
        ),
    ];
    let known = old.and_then(|old| old["status"]["conditions"].as_array());
    let ending = known
        .into_iter()
        .flatten()
        .filter(|c| c["type"] == "Terminating");
    conditions.extend(ending.cloned());
    object["status"] = json!({
        "acceptedNames": names,
        "conditions": conditions,
        "storedVersions": stored,
    });
}

/// Names, exactly one storage version, schemas, no conversion webhook.
pub fn validate(object: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    let expected = format!("{plural}.{group}");
    let name = text(&object["metadata"]["name"]);
    if name != expected {
        let detail = "must be spec.names.plural+\".\"+spec.group";
        errors.push(FieldError::invalid("metadata.name", name, detail));
    }
    if !group.contains('.') {
        errors.push(FieldError::invalid(
            "spec.group",
            group.as_str(),
            "should be a domain with at least one dot",
        ));
    }
    if plural.is_empty() || plural != plural.to_lowercase() {
        errors.push(FieldError::invalid(
            "spec.names.plural",
            plural.as_str(),
            "must be a lower case DNS label",
        ));
    }
    if spec["conversion"]["strategy"] == "Webhook" {
        let field = "spec.conversion.strategy";
        let detail =
            "supported values: \"None\" (conversion webhooks are not supported by this server)";
        errors.push(FieldError::make(
            field,
            FieldErrorKind::NotSupported,
            "Webhook".into(),
            detail,
        ));
    }
    let versions = spec["versions"].as_array().cloned().unwrap_or_default();
    if versions
        .iter()
        .filter(|v| v["storage"] == Value::Bool(true))
        .count()
        != 1
    {
        let names: Vec<Value> = versions.iter().map(|v| v["name"].clone()).collect();
        let detail = "must have exactly one version marked as storage version";
        errors.push(FieldError::invalid("spec.versions", names, detail));
    }
    for (index, version) in versions.iter().enumerate() {
        let at = format!("spec.versions[{index}]");
        let schema = &version["schema"]["openAPIV3Schema"];
        if !schema.is_object() {
            errors.push(FieldError::required(
                format!("{at}.schema.openAPIV3Schema"),
                "schemas are required",
            ));
        } else if schema["type"] != "object" {
            errors.push(FieldError::invalid(
                format!("{at}.schema.openAPIV3Schema.type"),
                schema["type"].clone(),
                "must be object at the root",
            ));
        }
        let compared = format!("{at}.schema.openAPIV3Schema");
        rules::validate_definition(schema, &compared, true, errors);
        if versions[..index]
            .iter()
            .any(|v| v["name"] == version["name"])
        {
            let field = format!("{at}.name");
            errors.push(FieldError::make(
                field,
                FieldErrorKind::Duplicate,
                version["name"].clone(),
                "",
            ));
        }
    }
    let Some(old) = old else { return };
    for field in ["group", "scope"] {
        if old["spec"][field] != spec[field] {
            errors.push(FieldError::invalid(
                format!("spec.{field}"),
                spec[field].clone(),
                "field is immutable",
            ));
        }
    }
}
