//! get and list.

use std::sync::Arc;

use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::ApiServer;
use crate::errors::ApiError;
use crate::request::Request;
use crate::respond;
use crate::selector::{FieldSelector, LabelSelector};
use crate::storage::Stored;

/// Serves one object.
///
/// # Errors
/// 404 when there is none.
pub fn get(api: &ApiServer, request: &Request, name: &str) -> Result<Response, ApiError> {
    let stored = find(api, request, name)?;
    respond::object(request, 200, &stored.value, &[])
}

/// The stored object with this name.
///
/// # Errors
/// 404 when there is none.
pub fn find(api: &ApiServer, request: &Request, name: &str) -> Result<Arc<Stored>, ApiError> {
    let target = &request.target;
    let stored = api
        .storage()
        .get(&target.resource.storage, &target.key(name));
    stored.ok_or_else(|| ApiError::not_found(&target.resource, name))
}

/// What a list or watch is limited to.
#[derive(Debug, Clone)]
pub struct Filter {
    /// Conditions on labels.
    pub labels: LabelSelector,
    /// Conditions on fields.
    pub fields: FieldSelector,
}

impl Filter {
    /// From the query.
    ///
    /// # Errors
    /// 400 for selectors that don't parse.
    pub fn of(request: &Request) -> Result<Filter, ApiError> {
        let resource = &request.target.resource;
        let query = |name| request.query.get(name).unwrap_or_default();
        Ok(Filter {
            labels: LabelSelector::parse(query("labelSelector"))?,
            fields: FieldSelector::parse(
                query("fieldSelector"),
                &resource.storage,
                &resource.selectable,
            )?,
        })
    }

    /// Whether an object passes.
    pub fn matches(&self, object: &Value) -> bool {
        self.labels.matches(object) && self.fields.matches(object)
    }
}

/// Serves a list, in pages when `limit` is given.
///
/// # Errors
/// 400 for bad parameters, 410 for a page token that is too old.
pub fn list(api: &ApiServer, request: &Request) -> Result<Response, ApiError> {
    let (items, metadata) = page(api, request)?;
    respond::list(request, items, metadata)
}

fn page(api: &ApiServer, request: &Request) -> Result<(Vec<Value>, Value), ApiError> {
    let target = &request.target;
    let filter = Filter::of(request)?;
    let limit = request
        .query
        .number("limit")?
        .filter(|n| *n > 0)
        .map_or(usize::MAX, |n| n as usize);
    let token = request.query.get("continue").map(parse_token).transpose()?;
    check_revision(api, request)?;
    let snapshot = api
        .storage()
        .list(&target.resource.storage, target.namespace.as_deref());
    let (revision, start) = match token {
        None => (snapshot.revision, None),
        // The rest of the list is as of now, under the revision of the first page: a watch from there replays what the pages missed.
        Some((revision, start)) if api.storage().remembers(&target.resource.storage, revision) => {
            (revision, Some(start))
        }
        Some(_) => {
            return Err(ApiError::expired(
                "The provided continue parameter is too old to display a consistent list result. You can start a new list \
                 without the continue parameter.",
            ));
        }
    };
    let from = start
        .as_ref()
        .map_or(0, |s| snapshot.items.partition_point(|(key, _)| key <= s));
    let mut matching = snapshot.items[from..]
        .iter()
        .filter(|(_, stored)| filter.matches(&stored.value));
    let (mut items, mut last) = (Vec::new(), "");
    for (key, stored) in matching.by_ref().take(limit) {
        items.push(stored.value.clone());
        last = key;
    }
    let remaining = matching.count();
    let mut metadata = json!({ "resourceVersion": revision.to_string() });
    if remaining > 0 {
        metadata["continue"] = make_token(revision, last).into();
        if filter.labels.is_empty() && filter.fields.is_empty() {
            metadata["remainingItemCount"] = remaining.into();
        }
    }
    Ok((items, metadata))
}

fn check_revision(api: &ApiServer, request: &Request) -> Result<(), ApiError> {
    let Some(asked) = request.query.number("resourceVersion")? else {
        return Ok(());
    };
    let current = api.storage().revision();
    if asked > current {
        return Err(too_large(asked, current));
    }
    if request.query.get("resourceVersionMatch") == Some("Exact") && asked != current {
        return Err(ApiError::expired(format!(
            "The resourceVersion for the provided list is too old: {asked}"
        )));
    }
    Ok(())
}

/// 504 for a revision that has not happened yet.
pub fn too_large(asked: u64, current: u64) -> ApiError {
    let mut error = ApiError::new(
        504,
        "Timeout",
        format!("Timeout: Too large resource version: {asked}, current: {current}"),
    );
    error.details = Some(json!({
        "causes": [{ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" }],
        "retryAfterSeconds": 1,
    }));
    error
}

fn make_token(revision: u64, last: &str) -> String {
    URL_SAFE_NO_PAD
        .encode(json!({ "v": "meta.k8s.io/v1", "rv": revision, "start": last }).to_string())
}

fn parse_token(text: &str) -> Result<(u64, String), ApiError> {
    let bad = || ApiError::bad_request("continue key is not valid");
    let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| bad())?;
    let token: Value = serde_json::from_slice(&bytes).map_err(|_| bad())?;
    match (token["rv"].as_u64(), token["start"].as_str()) {
        (Some(revision), Some(start)) => Ok((revision, start.to_owned())),
        _ => Err(bad()),
    }
}
