//! Resources that are questions: whose token is this, may they, give me a token.

use axum::response::Response;
use serde_json::{Map, Value, json};

use crate::auth::{Identity, now_seconds};
use crate::dispatch::{parse_body, parse_object};
use crate::errors::{ApiError, FieldError};
use crate::request::Request;
use crate::{ApiServer, access_reviews, read, respond};
use mesh_identity::token::{ObjectRef, TokenRequest};

/// Shortest lifetime of a token, as in Kubernetes.
const MIN_SECONDS: u64 = 600;
/// Longest; what asks for more gets this.
const MAX_SECONDS: u64 = 24 * 3600;

/// Answers a review.
///
/// # Errors
/// 400 when it does not parse.
pub fn review(api: &ApiServer, request: &Request, body: &[u8]) -> Result<Response, ApiError> {
    let mut object = parse_object(request, body)?;
    object["status"] = match request.target.resource.kind.as_str() {
        "TokenReview" => token_review(api, &object["spec"]),
        "SelfSubjectReview" => json!({ "userInfo": user_info(&request.identity) }),
        _ => access_reviews::status(api, request, &object)?,
    };
    respond::send(201, &object, request.yaml)
}

fn token_review(api: &ApiServer, spec: &Value) -> Value {
    let text = |v: &Value| v.as_str().map(str::to_owned);
    let audiences: Vec<String> = spec["audiences"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(text)
        .collect();
    let token = spec["token"].as_str().unwrap_or_default();
    match api.authenticate(token, &audiences) {
        Ok((identity, token_audiences)) => {
            let mut status = json!({ "authenticated": true, "user": user_info(&identity) });
            let own = vec![api.options().auth.tokens.issuer().to_owned()];
            let asked = if audiences.is_empty() {
                &own
            } else {
                &audiences
            };
            let common: Vec<&String> = match &token_audiences {
                Some(have) => asked.iter().filter(|a| have.contains(a)).collect(),
                None => asked.iter().collect(),
            };
            status["audiences"] = json!(common);
            status
        }
        Err(reason) => json!({ "authenticated": false, "error": reason, "user": {} }),
    }
}

fn user_info(identity: &Identity) -> Value {
    let mut user = json!({ "username": identity.username, "groups": identity.groups });
    if !identity.uid.is_empty() {
        user["uid"] = identity.uid.as_str().into();
    }
    if !identity.extra.is_empty() {
        let extra: Map<String, Value> = identity
            .extra
            .iter()
            .map(|(k, v)| (k.clone(), json!(v)))
            .collect();
        user["extra"] = extra.into();
    }
    user
}

/// `serviceaccounts/token`: issues a token, bound to a pod where asked.
///
/// # Errors
/// 404 when the account or the pod does not exist, 409 when the pod is another one.
pub fn token_request(
    api: &ApiServer,
    request: &Request,
    name: &str,
    body: &[u8],
) -> Result<Response, ApiError> {
    let resource = &request.target.resource;
    let account = read::find(api, request, name)?;
    let mut object = parse_body(&request.content_type, body)?;
    let spec = object["spec"].clone();
    let seconds = spec["expirationSeconds"].as_u64().unwrap_or(3600);
    if seconds < MIN_SECONDS {
        let detail = "may not specify a duration less than 10 minutes";
        let error = FieldError::invalid("spec.expirationSeconds", seconds, detail);
        return Err(ApiError::invalid(resource, name, &[error]));
    }
    let seconds = seconds.min(MAX_SECONDS);
    let namespace = request.target.namespace.clone().unwrap_or_default();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let pod = match &spec["boundObjectRef"] {
        Value::Null => None,
        bound if bound["kind"] == "Pod" => Some(bound_pod(api, request, name, &namespace, bound)?),
        bound => {
            let kind = bound["kind"].as_str().unwrap_or_default();
            let message = format!("cannot bind token to object of type {kind:?}; use \"Pod\"");
            return Err(ApiError::bad_request(message));
        }
    };
    let audiences: Vec<String> = spec["audiences"]
        .as_array()
        .into_iter()
        .flatten()
        .map(text)
        .collect();
    let now = now_seconds();
    let issuer = &api.options().auth.tokens;
    let shown = if audiences.is_empty() {
        vec![issuer.issuer().to_owned()]
    } else {
        audiences.clone()
    };
    let token = issuer
        .issue(TokenRequest {
            namespace: &namespace,
            service_account: ObjectRef {
                name: name.to_owned(),
                uid: text(&account.value["metadata"]["uid"]),
            },
            pod,
            audiences,
            id: uuid::Uuid::new_v4().to_string(),
            now,
            lifetime_seconds: seconds,
        })
        .map_err(ApiError::internal)?;
    let until = i64::try_from(now + seconds).unwrap_or(i64::MAX);
    let until = jiff::Timestamp::from_second(until).map_err(ApiError::internal)?;
    object["kind"] = "TokenRequest".into();
    object["apiVersion"] = "authentication.k8s.io/v1".into();
    object["metadata"] = json!({ "name": name, "namespace": namespace });
    object["spec"]["audiences"] = json!(shown);
    object["spec"]["expirationSeconds"] = seconds.into();
    let until = until.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    object["status"] = json!({ "token": token, "expirationTimestamp": until });
    respond::send(201, &object, request.yaml)
}

fn bound_pod(
    api: &ApiServer,
    request: &Request,
    account: &str,
    namespace: &str,
    bound: &Value,
) -> Result<ObjectRef, ApiError> {
    let resource = &request.target.resource;
    let name = bound["name"].as_str().unwrap_or_default();
    let registry = api.registry();
    let Some(pod) = api
        .storage()
        .get("core/pods", &format!("{namespace}/{name}"))
    else {
        let pods = registry.by_storage("core/pods").unwrap_or(resource);
        return Err(ApiError::not_found(pods, name));
    };
    let uid = pod.value["metadata"]["uid"].as_str().unwrap_or_default();
    let asked = bound["uid"].as_str().unwrap_or_default();
    if !asked.is_empty() && asked != uid {
        let why = format!(
            "the UID in the bound object reference ({asked}) does not match the UID in record ({uid})"
        );
        return Err(ApiError::conflict(resource, account, &why));
    }
    if pod.value["spec"]["serviceAccountName"] != account {
        let message = format!(
            "cannot bind token for serviceaccount \"{account}\" to pod running with different serviceaccount name."
        );
        return Err(ApiError::bad_request(message));
    }
    Ok(ObjectRef {
        name: name.to_owned(),
        uid: uid.to_owned(),
    })
}
