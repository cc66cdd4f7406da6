//! CertificateSigningRequests (`certificates.k8s.io/v1`): the server says who asks; nothing that was asked changes afterwards; whoever
//! approves or signs needs the verb `approve` or `sign` for the signer, beside the right to write the subresource.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use mesh_identity::{csr, trust};
use serde_json::{Map, Value, json};

use crate::ApiServer;
use crate::access::{Action, Object};
use crate::errors::{ApiError, FieldError, FieldErrorKind};
use crate::request::Request;
use crate::write::now;

/// Storage key.
pub const REQUESTS: &str = "certificates.k8s.io/certificatesigningrequests";
const GROUP: &str = "certificates.k8s.io";
/// The shortest validity that may be asked for, in seconds (as in Kubernetes).
const MIN_SECONDS: i64 = 600;
/// The longest name of a signer: a domain of 253 characters, a slash, and a namespace and name.
const MAX_SIGNER: usize = 571;
/// The signer of users of the API: nobody gets the group that may do everything from it.
const API_CLIENTS: &str = "kubernetes.io/kube-apiserver-client";
const MASTERS: &str = "system:masters";
/// Conditions that stay once they are there.
const FINAL: [&str; 3] = ["Approved", "Denied", "Failed"];
const USAGES: [&str; 23] = [
    "signing",
    "digital signature",
    "content commitment",
    "key encipherment",
    "key agreement",
    "data encipherment",
    "cert sign",
    "crl sign",
    "encipher only",
    "decipher only",
    "any",
    "server auth",
    "client auth",
    "code signing",
    "email protection",
    "s/mime",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "timestamping",
    "ocsp signing",
    "microsoft sgc",
    "netscape sgc",
];

/// Says who asks, whatever the object says.
///
/// # Errors
/// 403 for a request to become an administrator.
pub fn admit_create(request: &Request, object: &mut Value) -> Result<(), ApiError> {
    let resource = &request.target.resource;
    if resource.storage != REQUESTS {
        return Ok(());
    }
    let identity = &request.identity;
    if let Some(map) = object.as_object_mut() {
        map.shift_remove("status");
    }
    let spec = &mut object["spec"];
    if let Some(spec) = spec.as_object_mut() {
        for field in ["username", "uid", "groups", "extra"] {
            spec.shift_remove(field);
        }
        spec.insert("username".to_owned(), identity.username.as_str().into());
        spec.insert("groups".to_owned(), json!(identity.groups));
        if !identity.uid.is_empty() {
            spec.insert("uid".to_owned(), identity.uid.as_str().into());
        }
        if !identity.extra.is_empty() {
            let extra = identity.extra.iter();
            let extra: Map<String, Value> = extra.map(|(k, v)| (k.clone(), json!(v))).collect();
            spec.insert("extra".to_owned(), extra.into());
        }
    }
    let organizations = decoded(&spec["request"])
        .ok()
        .and_then(|pem| csr::organizations(&pem).ok());
    let masters = organizations.is_some_and(|all| all.iter().any(|name| name == MASTERS));
    if spec["signerName"] == API_CLIENTS && masters {
        let why = format!("use of {API_CLIENTS} signer with {MASTERS} group is not allowed");
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        return Err(ApiError::forbidden(resource, name, &why));
    }
    Ok(())
}

/// Keeps what this write may not change, and asks whether its author may approve or sign.
///
/// # Errors
/// 403 without the verb for the signer.
pub fn admit_update(
    api: &ApiServer,
    request: &Request,
    old: &Value,
    new: &mut Value,
) -> Result<(), ApiError> {
    if request.target.resource.storage != REQUESTS {
        return Ok(());
    }
    new["spec"] = old["spec"].clone();
    match request.target.subresource.as_deref() {
        Some("approval") => {
            let conditions = new["status"]["conditions"].clone();
            keep_status(old, new);
            set_conditions(old, new, conditions);
            confirm(api, request, "approve", old)
        }
        Some("status") => {
            let conditions = decided_elsewhere(old, &new["status"]["conditions"]);
            set_conditions(old, new, conditions);
            let failed = |object: &Value| has(object, "Failed");
            let signs = old["status"]["certificate"] != new["status"]["certificate"]
                || failed(old) != failed(new);
            match signs {
                true => confirm(api, request, "sign", old),
                false => Ok(()),
            }
        }
        _ => {
            keep_status(old, new);
            Ok(())
        }
    }
}

fn keep_status(old: &Value, new: &mut Value) {
    let Some(map) = new.as_object_mut() else {
        return;
    };
    match old.get("status") {
        Some(status) => map.insert("status".to_owned(), status.clone()),
        None => map.shift_remove("status"),
    };
}

/// The given conditions, with the decision as it was: a signer does not approve.
fn decided_elsewhere(old: &Value, given: &Value) -> Value {
    let decides =
        |condition: &&Value| matches!(condition["type"].as_str(), Some("Approved" | "Denied"));
    let kept = list(&old["status"]["conditions"]).filter(decides);
    let others = list(given).filter(|condition| !decides(condition));
    kept.chain(others).cloned().collect()
}

/// Puts conditions in place, with the times that the server knows.
fn set_conditions(old: &Value, new: &mut Value, mut conditions: Value) {
    let before: Vec<Value> = list(&old["status"]["conditions"]).cloned().collect();
    for condition in conditions.as_array_mut().into_iter().flatten() {
        let same = before
            .iter()
            .find(|known| known["type"] == condition["type"]);
        let absent = |value: &Value| value.as_str().is_none_or(str::is_empty);
        if absent(&condition["lastUpdateTime"]) {
            condition["lastUpdateTime"] = now().into();
        }
        match same.filter(|same| same["status"] == condition["status"]) {
            Some(same) => condition["lastTransitionTime"] = same["lastTransitionTime"].clone(),
            None if absent(&condition["lastTransitionTime"]) => {
                condition["lastTransitionTime"] = now().into();
            }
            None => {}
        }
    }
    if list(&conditions).next().is_some() {
        if !new["status"].is_object() {
            new["status"] = json!({});
        }
        new["status"]["conditions"] = conditions;
    } else if let Some(status) = new.get_mut("status").and_then(Value::as_object_mut) {
        status.shift_remove("conditions");
    }
}

/// The author needs the verb for the signer, by its name or for all of its domain.
fn confirm(api: &ApiServer, request: &Request, verb: &str, object: &Value) -> Result<(), ApiError> {
    if request.identity.is_master() {
        return Ok(());
    }
    let signer = object["spec"]["signerName"].as_str().unwrap_or_default();
    let domain = signer.split_once('/').map_or(signer, |(domain, _)| domain);
    let all = format!("{domain}/*");
    let policy = api.policy();
    let allowed = [signer, &all].into_iter().any(|name| {
        let signers = Object {
            group: GROUP.into(),
            resource: "signers".into(),
            name: name.into(),
            ..Object::default()
        };
        let action = Action::on_object(verb, signers);
        policy.allows(&request.identity, &action).is_some()
    });
    if allowed {
        return Ok(());
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let why = format!("user not permitted to {verb} requests with signerName {signer:?}");
    Err(ApiError::forbidden(&request.target.resource, name, &why))
}

/// Adds what is wrong with a request to `errors`.
pub fn validate(object: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    if old.is_none() {
        validate_spec(&object["spec"], errors);
    }
    let conditions = &object["status"]["conditions"];
    let at = "status.conditions";
    if has(object, "Approved") && has(object, "Denied") {
        let detail = "Approved and Denied conditions are mutually exclusive";
        errors.push(FieldError::invalid(at, conditions.clone(), detail));
    }
    for (index, condition) in list(conditions).enumerate() {
        let kind = condition["type"].as_str().unwrap_or_default();
        if kind.is_empty() {
            errors.push(FieldError::required(format!("{at}[{index}].type"), ""));
        }
        if FINAL.contains(&kind) && condition["status"] != "True" {
            let detail = format!("supported values: \"True\" for {kind}");
            let field = format!("{at}[{index}].status");
            let found = condition["status"].clone();
            let kind = FieldErrorKind::NotSupported;
            errors.push(FieldError::make(field, kind, found, &detail));
        }
    }
    let Some(old) = old else { return };
    for kind in FINAL {
        if has(old, kind) && !has(object, kind) {
            let detail = format!("updates may not remove a condition of type {kind:?}");
            errors.push(FieldError::forbidden(at, &detail));
        }
    }
    validate_certificate(object, old, errors);
}

fn validate_certificate(object: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let at = "status.certificate";
    let (before, after) = (
        &old["status"]["certificate"],
        &object["status"]["certificate"],
    );
    if before == after {
        return;
    }
    let mut invalid = |detail: &str| {
        errors.push(FieldError::invalid(at, after.clone(), detail));
    };
    if before.as_str().is_some_and(|text| !text.is_empty()) {
        return invalid("updates may not change the certificate once it is set");
    }
    match decoded(after).map(|pem| trust::describe(&pem)) {
        Ok(Ok(all)) if !all.is_empty() => {}
        Ok(Ok(_)) => invalid("must contain at least one PEM CERTIFICATE block"),
        Ok(Err(error)) => invalid(&error.to_string()),
        Err(error) => invalid(&error),
    }
}

fn validate_spec(spec: &Value, errors: &mut Vec<FieldError>) {
    let request = decoded(&spec["request"]);
    if let Err(error) =
        request.and_then(|pem| csr::organizations(&pem).map_err(|error| error.to_string()))
    {
        let shown = spec["request"].clone();
        errors.push(FieldError::invalid("spec.request", shown, &error));
    }
    let signer = spec["signerName"].as_str().unwrap_or_default();
    if let Some(detail) = signer_error(signer) {
        errors.push(FieldError::invalid("spec.signerName", signer, detail));
    }
    if let Some(seconds) = spec["expirationSeconds"].as_i64()
        && seconds < MIN_SECONDS
    {
        let detail = "may not specify a duration less than 600 seconds (10 minutes)";
        errors.push(FieldError::invalid(
            "spec.expirationSeconds",
            seconds,
            detail,
        ));
    }
    let usages: Vec<&str> = list(&spec["usages"]).filter_map(Value::as_str).collect();
    if usages.is_empty() {
        let detail = "at least one usage is required, such as \"client auth\"";
        errors.push(FieldError::required("spec.usages", detail));
    }
    for (index, usage) in usages.iter().enumerate() {
        let field = format!("spec.usages[{index}]");
        if !USAGES.contains(usage) {
            let detail = "this is not a usage that Kubernetes knows";
            let kind = FieldErrorKind::NotSupported;
            errors.push(FieldError::make(field, kind, json!(usage), detail));
        } else if usages[..index].contains(usage) {
            errors.push(FieldError::invalid(field, *usage, "it is there twice"));
        }
    }
}

/// What is wrong with a signer's name: it is a domain with a dot, a slash, and a path without another one.
fn signer_error(name: &str) -> Option<&'static str> {
    let good = |text: &str| !text.is_empty() && text.split('.').all(crate::names::is_dns_label);
    let Some((domain, path)) = name.split_once('/') else {
        return Some(
            "must be a fully qualified domain and path of the form 'example.com/signer-name'",
        );
    };
    if name.len() > MAX_SIGNER {
        return Some("must be no more than 571 characters");
    }
    if !good(domain) || !domain.contains('.') {
        return Some("should be a domain with at least two segments separated by dots");
    }
    if !good(path) {
        return Some(
            "the path after the slash must consist of lower case alphanumeric characters, '-' or '.'",
        );
    }
    None
}

/// `Approved,Issued`, as `kubectl get` shows it.
pub fn state(object: &Value) -> String {
    let mut words = Vec::new();
    words.extend(
        ["Approved", "Denied"]
            .into_iter()
            .filter(|kind| has(object, kind)),
    );
    if words.is_empty() {
        words.push("Pending");
    }
    if has(object, "Failed") {
        words.push("Failed");
    }
    let certificate = object["status"]["certificate"].as_str();
    if certificate.is_some_and(|text| !text.is_empty()) {
        words.push("Issued");
    }
    words.join(",")
}

fn has(object: &Value, kind: &str) -> bool {
    list(&object["status"]["conditions"]).any(|condition| condition["type"] == kind)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn decoded(value: &Value) -> Result<String, String> {
    let bytes = BASE64
        .decode(value.as_str().unwrap_or_default())
        .map_err(|error| format!("it is not base64: {error}"))?;
    String::from_utf8(bytes).map_err(|_| "it is not PEM".to_owned())
}
