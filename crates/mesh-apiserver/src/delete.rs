//! delete, deletecollection and eviction: at once, or in the time that finalizers, pods and namespaces need.

use axum::response::Response;
use serde_json::{Value, json};

use crate::admission::{self, Operation};
use crate::dispatch::{parse_body, parse_object};
use crate::errors::ApiError;
use crate::read::Filter;
use crate::request::Request;
use crate::storage::{Expect, Stored, WriteError};
use crate::strategy::budget;
use crate::write::{is_finished, now};
use crate::{ApiServer, cleanup, convert, respond};

/// Rounds of a deletion that others keep overtaking.
const ATTEMPTS: usize = 16;

/// What a deletion came to.
enum Outcome {
    /// The object is gone; its last state.
    Gone(Value),
    /// It will be, once something lets go of it.
    Pending(Value),
}

/// `DeleteOptions`, from body and query.
#[derive(Debug, Default)]
struct Options {
    grace: Option<i64>,
    propagation: String,
    uid: Option<String>,
    revision: Option<String>,
    dry_run: bool,
    /// By the server itself: no webhook is asked.
    unasked: bool,
}

impl Options {
    fn read(request: &Request, body: &Value) -> Result<Options, ApiError> {
        let text = |v: &Value| v.as_str().map(str::to_owned);
        let propagation = text(&body["propagationPolicy"])
            .or_else(|| request.query.get("propagationPolicy").map(str::to_owned))
            .or_else(|| {
                (body["orphanDependents"] == Value::Bool(true)).then(|| "Orphan".to_owned())
            })
            .unwrap_or_default();
        if !matches!(
            propagation.as_str(),
            "" | "Background" | "Foreground" | "Orphan"
        ) {
            return Err(ApiError::bad_request(format!(
                "invalid propagationPolicy {propagation:?}"
            )));
        }
        let grace = body["gracePeriodSeconds"].as_i64();
        let from_query = request
            .query
            .number("gracePeriodSeconds")?
            .and_then(|n| i64::try_from(n).ok());
        Ok(Options {
            grace: grace.or(from_query),
            propagation,
            uid: text(&body["preconditions"]["uid"]),
            revision: text(&body["preconditions"]["resourceVersion"]),
            dry_run: request.dry_run()? || body["dryRun"] == json!(["All"]),
            unasked: false,
        })
    }
}

/// Deletes one object.
///
/// # Errors
/// 404, 409 for preconditions, what webhooks say.
pub async fn delete(
    api: &ApiServer,
    request: &Request,
    name: &str,
    body: &[u8],
) -> Result<Response, ApiError> {
    let options = Options::read(request, &options_body(request, body)?)?;
    let mut warnings = Vec::new();
    let outcome = remove(api, request, name, &options, &mut warnings).await?;
    let resource = &request.target.resource;
    match outcome {
        Outcome::Pending(object) => respond::object(request, 200, &object, &warnings),
        // Pods answer with themselves, all else with a Status that names what is gone.
        Outcome::Gone(object) if resource.storage == "core/pods" => {
            respond::object(request, 200, &object, &warnings)
        }
        Outcome::Gone(object) => {
            let mut details =
                json!({ "name": name, "kind": resource.plural, "uid": object["metadata"]["uid"] });
            if !resource.group.is_empty() {
                details["group"] = resource.group.clone().into();
            }
            let status = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details,
            });
            let mut response = respond::send(200, &status, request.yaml)?;
            warnings
                .iter()
                .for_each(|w| respond::add_warning(&mut response, w));
            Ok(response)
        }
    }
}

/// Deletes everything that the selectors match.
///
/// # Errors
/// As [`delete`].
pub async fn delete_collection(
    api: &ApiServer,
    request: &Request,
    body: &[u8],
) -> Result<Response, ApiError> {
    let options = Options::read(request, &options_body(request, body)?)?;
    let filter = Filter::of(request)?;
    let snapshot = api.storage().list(
        &request.target.resource.storage,
        request.target.namespace.as_deref(),
    );
    let mut deleted = Vec::new();
    for (key, stored) in snapshot.items {
        if !filter.matches(&stored.value) {
            continue;
        }
        // The collection may span namespaces; each object is deleted in its own.
        let mut one = request.clone();
        let (namespace, name) = key.split_once('/').unwrap_or(("", &key));
        one.target.namespace = request
            .target
            .resource
            .namespaced
            .then(|| namespace.to_owned());
        match remove(api, &one, name, &options, &mut Vec::new()).await {
            Ok(Outcome::Gone(object) | Outcome::Pending(object)) => deleted.push(object),
            Err(error) if error.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    let revision = api.storage().revision().to_string();
    respond::list(request, deleted, json!({ "resourceVersion": revision }))
}

/// `pods/eviction`: deletes the pod gracefully, when its disruption budget has one to give.
///
/// # Errors
/// As [`delete`]; 429 for the budget.
pub async fn evict(
    api: &ApiServer,
    request: &Request,
    name: &str,
    body: &[u8],
) -> Result<Response, ApiError> {
    let eviction = parse_body(&request.content_type, body)?;
    let options = Options::read(request, &eviction["deleteOptions"])?;
    let pod = crate::read::find(api, request, name)?;
    budget::take(api, request, &pod.value).await?;
    remove(api, request, name, &options, &mut Vec::new()).await?;
    let status = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201 });
    respond::send(201, &status, request.yaml)
}

/// Deletes one object for the server itself, without asking webhooks; finalizers are honoured.
///
/// # Errors
/// 404, 500 from the store.
pub async fn remove_unasked(
    api: &ApiServer,
    request: &Request,
    name: &str,
) -> Result<(), ApiError> {
    let options = Options {
        unasked: true,
        ..Options::default()
    };
    remove(api, request, name, &options, &mut Vec::new())
        .await
        .map(|_| ())
}

fn options_body(request: &Request, body: &[u8]) -> Result<Value, ApiError> {
    if body.is_empty() {
        return Ok(Value::Null);
    }
    let options = parse_body(&request.content_type, body)?;
    match options["kind"].as_str() {
        None | Some("DeleteOptions") => Ok(options),
        // Some clients send the object itself, which Kubernetes refuses too.
        Some(_) => parse_object(request, body).and(Err(ApiError::bad_request(
            "the body of a delete is DeleteOptions",
        ))),
    }
}

async fn remove(
    api: &ApiServer,
    request: &Request,
    name: &str,
    options: &Options,
    warnings: &mut Vec<String>,
) -> Result<Outcome, ApiError> {
    let target = &request.target;
    let resource = &target.resource;
    let key = target.key(name);
    for _ in 0..ATTEMPTS {
        let Some(current) = api.storage().get(&resource.storage, &key) else {
            return Err(ApiError::not_found(resource, name));
        };
        check_preconditions(request, name, options, &current)?;
        if !options.unasked {
            let shown = convert::to_version(resource, current.value.clone());
            admission::validate(
                api,
                request,
                Operation::Delete,
                None,
                Some(&shown),
                options.dry_run,
                warnings,
            )
            .await?;
        }
        let mut marked = mark(request, options, &current.value);
        if resource.storage == cleanup::CRDS {
            marked = cleanup::mark(api, &current.value, marked);
        }
        if options.dry_run {
            return Ok(
                marked.map_or_else(|| Outcome::Gone(current.value.clone()), Outcome::Pending)
            );
        }
        let written = match marked {
            None => api
                .storage()
                .delete(&resource.storage, &key, current.revision)
                .await
                .map(|s| Outcome::Gone(s.value.clone())),
            Some(marked) if marked == current.value => return Ok(Outcome::Pending(marked)),
            Some(marked) => api
                .storage()
                .put(
                    &resource.storage,
                    &key,
                    Expect::Revision(current.revision),
                    marked,
                )
                .await
                .map(|s| Outcome::Pending(s.value.clone())),
        };
        match written {
            Ok(outcome) => {
                let (Outcome::Gone(value) | Outcome::Pending(value)) = &outcome;
                api.wrote(resource, value);
                return Ok(outcome);
            }
            Err(WriteError::Changed) => {}
            Err(error) => return Err(ApiError::internal(error)),
        }
    }
    Err(ApiError::modified(resource, name))
}

fn check_preconditions(
    request: &Request,
    name: &str,
    options: &Options,
    current: &Stored,
) -> Result<(), ApiError> {
    let resource = &request.target.resource;
    let fail = |what: &str, asked: &str, found: &str| {
        let why = format!(
            "Precondition failed: {what} in precondition: {asked}, {what} in object meta: {found}"
        );
        Err(ApiError::conflict(resource, name, &why))
    };
    let found = current.value["metadata"]["uid"]
        .as_str()
        .unwrap_or_default();
    if let Some(uid) = options.uid.as_deref()
        && uid != found
    {
        return fail("UID", uid, found);
    }
    let found = current.revision.to_string();
    match options.revision.as_deref() {
        Some(revision) if revision != found => fail("ResourceVersion", revision, &found),
        _ => Ok(()),
    }
}

/// The object with the marks of a deletion that has to wait; `None` when it can go now.
fn mark(request: &Request, options: &Options, current: &Value) -> Option<Value> {
    let resource = &request.target.resource;
    let mut object = current.clone();
    let already = !object["metadata"]["deletionTimestamp"].is_null();
    let finalizer = match options.propagation.as_str() {
        "Foreground" => Some("foregroundDeletion"),
        "Orphan" => Some("orphan"),
        _ => None,
    };
    if let Some(finalizer) = finalizer
        && !already
    {
        add_finalizer(&mut object, finalizer);
    }
    let grace = if resource.storage == "core/pods" {
        pod_grace(options, &object)
    } else {
        0
    };
    let before = object["metadata"]["deletionGracePeriodSeconds"].as_i64();
    if !already || before.is_some_and(|b| grace < b) {
        object["metadata"]["deletionTimestamp"] = later(grace).into();
        object["metadata"]["deletionGracePeriodSeconds"] = grace.into();
        if !already && object["metadata"].get("generation").is_some() {
            let generation = object["metadata"]["generation"]
                .as_i64()
                .unwrap_or_default()
                + 1;
            object["metadata"]["generation"] = generation.into();
        }
    }
    if resource.storage == "core/namespaces" {
        object["status"]["phase"] = "Terminating".into();
    }
    (!is_finished(resource, &object)).then_some(object)
}

/// Seconds that a pod gets: none when it runs nowhere or has ended.
fn pod_grace(options: &Options, pod: &Value) -> i64 {
    let default = pod["spec"]["terminationGracePeriodSeconds"]
        .as_i64()
        .unwrap_or(30);
    let assigned = !pod["spec"]["nodeName"]
        .as_str()
        .unwrap_or_default()
        .is_empty();
    let ended = matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    );
    if !assigned || ended {
        0
    } else {
        options.grace.unwrap_or(default).max(0)
    }
}

fn add_finalizer(object: &mut Value, finalizer: &str) {
    let list = &mut object["metadata"]["finalizers"];
    if !list.is_array() {
        *list = json!([]);
    }
    if let Some(list) = list.as_array_mut()
        && !list.iter().any(|f| f == finalizer)
    {
        list.push(finalizer.into());
    }
}

fn later(seconds: i64) -> String {
    let span = jiff::SignedDuration::from_secs(seconds);
    let time = jiff::Timestamp::now().checked_add(span);
    time.map_or_else(|_| now(), |t| t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}
