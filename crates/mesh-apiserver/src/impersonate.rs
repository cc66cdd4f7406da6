//! Acting as somebody else: the `Impersonate-*` headers of `kubectl --as`.
//!
//! Whoever asks needs the verb `impersonate` on each thing that he claims: users, groups, service accounts, uids and extra facts, as in
//! Kubernetes.

use http::HeaderMap;

use crate::ApiServer;
use crate::access::{Action, Object};
use crate::auth::Identity;
use crate::errors::ApiError;

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";

/// Who a request of `identity` is made as: somebody else when the headers say so.
///
/// # Errors
/// 403 when `identity` may not, 400 for headers that make no sense.
pub fn impersonated(
    api: &ApiServer,
    identity: Identity,
    headers: &HeaderMap,
) -> Result<Identity, ApiError> {
    let asked = headers
        .keys()
        .any(|name| name.as_str().starts_with("impersonate-"));
    if !asked {
        return Ok(identity);
    }
    let wanted = read(headers)?;
    let may = |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| {
        let object = Object {
            group: group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            namespace: namespace.into(),
            name: name.into(),
        };
        api.authorize(&identity, &Action::on_object("impersonate", object))
    };
    let account = service_account(&wanted.username);
    match account {
        Some((namespace, name)) => may("", "serviceaccounts", "", namespace, name)?,
        None => may("", "users", "", "", &wanted.username)?,
    }
    for group in &wanted.groups {
        may("", "groups", "", "", group)?;
    }
    if !wanted.uid.is_empty() {
        may("authentication.k8s.io", "uids", "", "", &wanted.uid)?;
    }
    for (key, values) in &wanted.extra {
        for value in values {
            may("authentication.k8s.io", "userextras", key, "", value)?;
        }
    }
    let mut result = wanted.clone();
    if wanted.groups.is_empty()
        && let Some((namespace, name)) = account
    {
        result.groups = Identity::service_account(namespace, name, "").groups;
    }
    let standing = if result.is_anonymous() {
        "system:unauthenticated"
    } else {
        "system:authenticated"
    };
    let known = ["system:unauthenticated", "system:authenticated"];
    if !result.groups.iter().any(|g| known.contains(&g.as_str())) {
        result.groups.push(standing.to_owned());
    }
    Ok(result)
}

/// Namespace and name in `system:serviceaccount:NAMESPACE:NAME`.
fn service_account(username: &str) -> Option<(&str, &str)> {
    let (namespace, name) = username
        .strip_prefix("system:serviceaccount:")?
        .split_once(':')?;
    (!namespace.is_empty() && !name.is_empty() && !name.contains(':')).then_some((namespace, name))
}

fn read(headers: &HeaderMap) -> Result<Identity, ApiError> {
    let mut wanted = Identity {
        username: String::new(),
        uid: String::new(),
        groups: Vec::new(),
        extra: Vec::new(),
    };
    for (name, value) in headers {
        let name = name.as_str();
        if !name.starts_with("impersonate-") {
            continue;
        }
        let Ok(value) = value.to_str() else {
            let message = format!("the header {name} is not readable text");
            return Err(ApiError::bad_request(message));
        };
        let value = value.to_owned();
        match (name, name.strip_prefix(EXTRA)) {
            (USER, _) if wanted.username.is_empty() => wanted.username = value,
            (UID, _) if wanted.uid.is_empty() => wanted.uid = value,
            (GROUP, _) => wanted.groups.push(value),
            (_, Some(key)) if !key.is_empty() => {
                // Header names carry keys percent-encoded.
                let key = crate::request::decode(key, false);
                match wanted.extra.iter_mut().find(|(known, _)| *known == key) {
                    Some((_, values)) => values.push(value),
                    None => wanted.extra.push((key, vec![value])),
                }
            }
            _ => {
                let message = format!("the header {name} is unknown, or there more than once");
                return Err(ApiError::bad_request(message));
            }
        }
    }
    if wanted.username.is_empty() {
        // The code and words of Kubernetes for groups and the like without a user.
        return Err(ApiError::internal(
            "requested impersonation of groups, a uid or extra without impersonating a user",
        ));
    }
    Ok(wanted)
}
