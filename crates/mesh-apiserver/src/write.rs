//! create and update: from a client's object to a durable one.
//!
//! The order is Kubernetes': prune, default, mutating admission, prune and default again, kind-specific preparation, validation,
//! validating admission, managed fields, write. An update that finds the object changed meanwhile starts again when the client did not
//! insist on a revision.

use serde_json::{Map, Value, json};

use crate::admission::{self, Operation};
use crate::errors::{ApiError, FieldErrorKind};
use crate::managed::{self, Manager};
use crate::rbac::escalation;
use crate::request::Request;
use crate::schema::check;
use crate::storage::{Expect, WriteError};
use crate::strategy::{self, certificates};
use crate::{ApiServer, convert, duplicates, names, rules};

/// Rounds of an update that others keep overtaking.
const ATTEMPTS: usize = 16;

/// What happens with unknown fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

/// Held from the choice of an address to the write that takes it.
type Allocating<'a> = tokio::sync::MutexGuard<'a, ()>;

/// One write in progress.
pub struct Writer<'a> {
    api: &'a ApiServer,
    request: &'a Request,
    dry_run: bool,
    validation: FieldValidation,
    /// For `Warning` headers.
    pub warnings: Vec<String>,
    /// Managed fields are already right (server-side apply).
    pub applied: bool,
    /// Fields that the body has twice.
    duplicates: Vec<String>,
}

impl<'a> Writer<'a> {
    /// Reads the query.
    ///
    /// # Errors
    /// 400 for bad parameters.
    pub fn new(api: &'a ApiServer, request: &'a Request) -> Result<Writer<'a>, ApiError> {
        let validation = match request.query.get("fieldValidation") {
            Some("Strict") => FieldValidation::Strict,
            Some("Ignore") => FieldValidation::Ignore,
            None | Some("Warn") => FieldValidation::Warn,
            Some(other) => {
                return Err(ApiError::bad_request(format!(
                    "invalid fieldValidation value {other:?}: use Ignore, Warn or Strict"
                )));
            }
        };
        let dry_run = request.dry_run()?;
        Ok(Writer {
            api,
            request,
            dry_run,
            validation,
            warnings: Vec::new(),
            applied: false,
            duplicates: Vec::new(),
        })
    }

    /// Takes note of fields that the body has twice; the write warns of them or is refused, as of unknown fields.
    pub fn note_duplicates(&mut self, body: &[u8]) {
        if self.validation != FieldValidation::Ignore {
            self.duplicates = duplicates::find(body);
        }
    }

    /// Stores a new object; `name` is set when the URL names it. Returns it as stored.
    ///
    /// # Errors
    /// Whatever Kubernetes would say.
    pub async fn create(
        &mut self,
        mut object: Value,
        name: Option<&str>,
    ) -> Result<Value, ApiError> {
        let target = &self.request.target;
        let resource = &target.resource;
        self.place(&mut object, name)?;
        self.check_namespace(target.namespace.as_deref())?;
        if resource.terminating {
            let message = "create not allowed while custom resource definition is terminating";
            return Err(ApiError::new(405, "MethodNotAllowed", message));
        }
        self.clean(&mut object, None)?;
        strip_system_fields(&mut object);
        strategy::defaults(&resource.storage, &mut object);
        let named = object["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let key = target.key(&named);
        if self.api.storage().get(&resource.storage, &key).is_some() {
            return Err(ApiError::already_exists(resource, &named));
        }
        strategy::admit_create(self.api, resource, &mut object)?;
        object = self.admit(Operation::Create, object, None).await?;
        escalation::check(self.api, self.request, None, &object)?;
        certificates::admit_create(self.request, &mut object)?;
        let metadata = &mut object["metadata"];
        metadata["uid"] = uuid::Uuid::new_v4().to_string().into();
        metadata["creationTimestamp"] = now().into();
        if strategy::has_generation(resource) {
            metadata["generation"] = 1.into();
        }
        let _allocating = self.allocating().await;
        strategy::prepare_create(self.api, resource, &mut object)?;
        self.validate(&object, None).await?;
        self.review(Operation::Create, &object, None).await?;
        if !self.applied {
            managed::track(resource, None, &mut object, &self.manager());
        }
        object = convert::to_storage(resource, object);
        if self.dry_run {
            return Ok(object);
        }
        match self
            .api
            .storage()
            .put(&resource.storage, &key, Expect::Absent, object)
            .await
        {
            Ok(stored) => {
                self.api.wrote(resource, &stored.value);
                Ok(stored.value.clone())
            }
            Err(WriteError::Changed) => Err(ApiError::already_exists(resource, &named)),
            Err(error) => Err(ApiError::internal(error)),
        }
    }

    /// Keeps others from choosing an address until the guard is dropped, for kinds that get one.
    async fn allocating(&self) -> Option<Allocating<'a>> {
        if self.request.target.resource.storage == "core/services" {
            Some(self.api.allocation().await)
        } else {
            None
        }
    }

    /// Changes the object `name`; `change` makes the new object from the current one, in the version of the request, and may be called
    /// several times. Returns the object as stored.
    ///
    /// # Errors
    /// Whatever Kubernetes would say.
    pub async fn update(
        &mut self,
        name: &str,
        change: impl Fn(&Value) -> Result<Value, ApiError>,
    ) -> Result<Value, ApiError> {
        let target = &self.request.target;
        let resource = &target.resource;
        let key = target.key(name);
        for _ in 0..ATTEMPTS {
            let Some(current) = self.api.storage().get(&resource.storage, &key) else {
                return Err(ApiError::not_found(resource, name));
            };
            let old = convert::to_version(resource, current.value.clone());
            let mut new = change(&old)?;
            let asked = new["metadata"]["resourceVersion"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            if !asked.is_empty() && asked != current.revision.to_string() && asked != "0" {
                return Err(ApiError::modified(resource, name));
            }
            self.warnings.clear();
            let (prepared, _allocating) = self.prepare_update(name, &old, new).await?;
            new = prepared;
            if unchanged(&old, &new) {
                return Ok(current.value.clone());
            }
            let gone = is_finished(resource, &new);
            let new = convert::to_storage(resource, new);
            if self.dry_run {
                return Ok(new);
            }
            let written = if gone {
                // The object's last state is not stored first: its watchers see the deletion.
                self.api
                    .storage()
                    .delete(&resource.storage, &key, current.revision)
                    .await
            } else {
                let expect = Expect::Revision(current.revision);
                self.api
                    .storage()
                    .put(&resource.storage, &key, expect, new.clone())
                    .await
            };
            match written {
                Ok(stored) => {
                    self.api.wrote(resource, &stored.value);
                    return Ok(if gone { new } else { stored.value.clone() });
                }
                // The next round finds out whether the client insists on the revision that was.
                Err(WriteError::Changed) => {}
                Err(error) => return Err(ApiError::internal(error)),
            }
        }
        Err(ApiError::modified(resource, name))
    }

    async fn prepare_update(
        &mut self,
        name: &str,
        old: &Value,
        mut new: Value,
    ) -> Result<(Value, Option<Allocating<'a>>), ApiError> {
        let target = &self.request.target;
        let resource = &target.resource;
        self.place(&mut new, Some(name))?;
        let uid = new["metadata"]["uid"].as_str().unwrap_or_default();
        if !uid.is_empty() && old["metadata"]["uid"] != uid {
            let why = format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                old["metadata"]["uid"].as_str().unwrap_or_default()
            );
            return Err(ApiError::conflict(resource, name, &why));
        }
        let user_managed = new["metadata"]["managedFields"].clone();
        self.clean(&mut new, Some(old))?;
        keep_system_fields(old, &mut new);
        keep_other_half(resource, target.subresource.as_deref(), old, &mut new);
        strategy::defaults(&resource.storage, &mut new);
        new = self.admit(Operation::Update, new, Some(old)).await?;
        keep_system_fields(old, &mut new);
        escalation::check(self.api, self.request, Some(old), &new)?;
        certificates::admit_update(self.api, self.request, old, &mut new)?;
        let allocating = self.allocating().await;
        strategy::prepare_update(self.api, resource, old, &mut new)?;
        if strategy::has_generation(resource) && desired(resource, old) != desired(resource, &new) {
            let generation = old["metadata"]["generation"].as_i64().unwrap_or_default() + 1;
            new["metadata"]["generation"] = generation.into();
        }
        self.validate(&new, Some(old)).await?;
        self.review(Operation::Update, &new, Some(old)).await?;
        if self.applied {
            new["metadata"]["managedFields"] = user_managed;
        } else {
            // An empty entry is the documented way to drop all managers.
            let reset = user_managed == json!([{}]) || user_managed == json!([]);
            new["metadata"]["managedFields"] = if reset {
                json!([])
            } else {
                old["metadata"]["managedFields"].clone()
            };
            managed::track(resource, Some(old), &mut new, &self.manager());
        }
        if new["metadata"]["managedFields"]
            .as_array()
            .is_none_or(Vec::is_empty)
            && let Some(metadata) = new["metadata"].as_object_mut()
        {
            metadata.shift_remove("managedFields");
        }
        Ok((new, allocating))
    }

    fn manager(&self) -> Manager {
        Manager {
            name: self.request.manager(),
            operation: "Update",
            api_version: self.request.target.resource.api_version(),
            subresource: self.request.target.subresource.clone().unwrap_or_default(),
            time: now(),
        }
    }

    /// Gives the object the name and namespace of the URL.
    fn place(&self, object: &mut Value, name: Option<&str>) -> Result<(), ApiError> {
        let target = &self.request.target;
        let Some(metadata) = object["metadata"].as_object_mut() else {
            return Err(ApiError::bad_request("metadata must be an object"));
        };
        let found = metadata
            .get("namespace")
            .and_then(Value::as_str)
            .unwrap_or_default();
        match &target.namespace {
            Some(namespace) if !found.is_empty() && found != namespace => {
                return Err(ApiError::bad_request(format!(
                    "the namespace of the provided object does not match the namespace sent on the request: {found} is not {namespace}"
                )));
            }
            Some(namespace) => {
                metadata.insert("namespace".to_owned(), namespace.clone().into());
            }
            None if target.resource.namespaced => {
                return Err(ApiError::bad_request(
                    "an empty namespace may not be set when a resource name is provided",
                ));
            }
            None => {
                metadata.shift_remove("namespace");
            }
        }
        if let Some(name) = name {
            metadata.insert("name".to_owned(), name.into());
        } else if metadata
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .is_empty()
            && let Some(prefix) = metadata
                .get("generateName")
                .and_then(Value::as_str)
                .filter(|p| !p.is_empty())
        {
            let name = names::generate(prefix);
            metadata.insert("name".to_owned(), name.into());
        }
        Ok(())
    }

    fn check_namespace(&self, namespace: Option<&str>) -> Result<(), ApiError> {
        let Some(namespace) = namespace else {
            return Ok(());
        };
        let found = self
            .api
            .storage()
            .get("core/namespaces", &format!("/{namespace}"));
        let registry = self.api.registry();
        match (found, registry.by_storage("core/namespaces")) {
            (None, Some(resource)) => Err(ApiError::not_found(resource, namespace)),
            (Some(found), _) if !found.value["metadata"]["deletionTimestamp"].is_null() => {
                let why = format!(
                    "unable to create new content in namespace {namespace} because it is being terminated"
                );
                let mut error = ApiError::forbidden(&self.request.target.resource, "", &why);
                error.details = Some(json!({ "causes": [{
                    "reason": "NamespaceTerminating", "message": format!("namespace {namespace} is being terminated"),
                    "field": "metadata.namespace",
                }]}));
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// Prunes and defaults by schema; unknown fields are refused, warned of or dropped.
    fn clean(&mut self, object: &mut Value, old: Option<&Value>) -> Result<(), ApiError> {
        let resource = &self.request.target.resource;
        let mut unknown = Vec::new();
        check::prune(object, &resource.schema, "", &mut unknown);
        if let Some(old) = old {
            // What the stored object has from an older schema is not the client's fault.
            let mut copy = old.clone();
            let mut known_before = Vec::new();
            check::prune(&mut copy, &resource.schema, "", &mut known_before);
            unknown.retain(|path| !known_before.contains(path));
        }
        let twice = self
            .duplicates
            .iter()
            .map(|path| format!("duplicate field \"{path}\""));
        let unknown = unknown
            .iter()
            .map(|path| format!("unknown field \"{path}\""));
        let messages: Vec<String> = twice.chain(unknown).collect();
        match self.validation {
            FieldValidation::Strict if !messages.is_empty() => {
                let list = messages.join(", ");
                return Err(ApiError::bad_request(format!(
                    "{} in version \"{}\" cannot be handled as a {}: strict decoding error: {list}",
                    resource.kind, resource.version, resource.kind
                )));
            }
            FieldValidation::Warn => self.warnings.extend(messages),
            FieldValidation::Strict | FieldValidation::Ignore => {}
        }
        check_types(resource, object)?;
        check::fill_defaults(object, &resource.schema);
        Ok(())
    }

    async fn admit(
        &mut self,
        operation: Operation,
        object: Value,
        old: Option<&Value>,
    ) -> Result<Value, ApiError> {
        let mut object = admission::mutate(
            self.api,
            self.request,
            operation,
            object,
            old,
            self.dry_run,
            &mut self.warnings,
        )
        .await?;
        let resource = &self.request.target.resource;
        check::prune(&mut object, &resource.schema, "", &mut Vec::new());
        check_types(resource, &object)?;
        check::fill_defaults(&mut object, &resource.schema);
        strategy::defaults(&resource.storage, &mut object);
        Ok(object)
    }

    async fn review(
        &mut self,
        operation: Operation,
        object: &Value,
        old: Option<&Value>,
    ) -> Result<(), ApiError> {
        admission::validate(
            self.api,
            self.request,
            operation,
            Some(object),
            old,
            self.dry_run,
            &mut self.warnings,
        )
        .await
    }

    /// Checks the object; rules in CEL, and the definitions that bring such rules, on a thread of their own.
    async fn validate(&self, object: &Value, old: Option<&Value>) -> Result<(), ApiError> {
        let target = &self.request.target;
        let (resource, subresource) = (target.resource.clone(), target.subresource.clone());
        let has_rules = resource.schema.has_validations
            || matches!(
                resource.group.as_str(),
                "apiextensions.k8s.io" | "admissionregistration.k8s.io"
            );
        if !has_rules {
            return validate(&resource, subresource.as_deref(), object, old);
        }
        let (object, old) = (object.clone(), old.cloned());
        rules::aside(move || validate(&resource, subresource.as_deref(), &object, old.as_ref()))
            .await?
    }
}

fn validate(
    resource: &crate::registry::Resource,
    subresource: Option<&str>,
    object: &Value,
    old: Option<&Value>,
) -> Result<(), ApiError> {
    let mut errors = Vec::new();
    names::validate_metadata(resource, &object["metadata"], &mut errors);
    check::validate(object, &resource.schema, "", &mut errors);
    if errors.is_empty() {
        rules::validate(object, old, &resource.schema, &mut errors);
        strategy::validate(resource, subresource, object, old, &mut errors);
    }
    if errors.is_empty() {
        return Ok(());
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    Err(ApiError::invalid(resource, name, &errors))
}

/// A built-in object whose fields have the wrong JSON type can't be decoded: 400 rather than 422, as in Kubernetes.
fn check_types(resource: &crate::registry::Resource, object: &Value) -> Result<(), ApiError> {
    if resource.custom {
        return Ok(());
    }
    let mut errors = Vec::new();
    let mut copy = object.clone();
    check::fill_defaults(&mut copy, &resource.schema);
    check::validate(&copy, &resource.schema, "", &mut errors);
    match errors
        .iter()
        .find(|e| e.kind == FieldErrorKind::TypeInvalid)
    {
        None => Ok(()),
        Some(error) => Err(ApiError::bad_request(format!(
            "{} in version \"{}\" cannot be handled as a {}: {}: {}",
            resource.kind, resource.version, resource.kind, error.field, error.detail
        ))),
    }
}

/// The time as objects carry it.
pub fn now() -> String {
    jiff::Timestamp::now()
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        .to_string()
}

fn strip_system_fields(object: &mut Value) {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        for field in [
            "uid",
            "creationTimestamp",
            "resourceVersion",
            "generation",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "selfLink",
        ] {
            metadata.shift_remove(field);
        }
    }
}

/// Metadata that clients can't change.
fn keep_system_fields(old: &Value, new: &mut Value) {
    for field in [
        "name",
        "namespace",
        "generateName",
        "uid",
        "creationTimestamp",
        "resourceVersion",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ] {
        let value = old["metadata"].get(field).cloned();
        if let Some(metadata) = new["metadata"].as_object_mut() {
            match value {
                Some(value) => metadata.insert(field.to_owned(), value),
                None => metadata.shift_remove(field),
            };
        }
    }
}

/// A write to `status` changes only the status, one to the object everything else.
fn keep_other_half(
    resource: &crate::registry::Resource,
    subresource: Option<&str>,
    old: &Value,
    new: &mut Value,
) {
    match subresource {
        Some("status" | "approval") => {
            let mut merged = old.clone();
            set_or_remove(&mut merged, "status", new.get("status").cloned());
            // Controllers may set labels, annotations and finalizers along; Kubernetes allows it for built-in kinds.
            if !resource.custom {
                for field in ["labels", "annotations", "finalizers", "ownerReferences"] {
                    set_or_remove(
                        &mut merged["metadata"],
                        field,
                        new["metadata"].get(field).cloned(),
                    );
                }
            }
            *new = merged;
        }
        Some("finalize") => {
            let mut merged = old.clone();
            merged["spec"]["finalizers"] = new["spec"]["finalizers"].clone();
            *new = merged;
        }
        _ if resource.has("status") => set_or_remove(new, "status", old.get("status").cloned()),
        _ => {}
    }
}

fn set_or_remove(object: &mut Value, field: &str, value: Option<Value>) {
    let Some(map) = object.as_object_mut() else {
        return;
    };
    match value {
        Some(value) => map.insert(field.to_owned(), value),
        None => map.shift_remove(field),
    };
}

/// Everything whose change counts as a new generation.
fn desired(resource: &crate::registry::Resource, object: &Value) -> Map<String, Value> {
    let mut map = object.as_object().cloned().unwrap_or_default();
    map.shift_remove("metadata");
    if resource.has("status") {
        map.shift_remove("status");
    }
    map
}

/// Whether nothing changed but the bookkeeping of managers.
fn unchanged(old: &Value, new: &Value) -> bool {
    let same = |key: &String| key == "metadata" || old.get(key) == new.get(key);
    let (Some(a), Some(b)) = (old.as_object(), new.as_object()) else {
        return old == new;
    };
    if !a.keys().chain(b.keys()).all(same) {
        return false;
    }
    let (Some(a), Some(b)) = (old["metadata"].as_object(), new["metadata"].as_object()) else {
        return false;
    };
    let plain = |m: &Map<String, Value>, key: &str| m.get(key).cloned().unwrap_or_default();
    a.keys()
        .chain(b.keys())
        .filter(|k| *k != "managedFields")
        .all(|k| plain(a, k) == plain(b, k))
        && managed::same_owners(&plain(a, "managedFields"), &plain(b, "managedFields"))
}

/// A deleted object that nothing holds back any more.
pub fn is_finished(resource: &crate::registry::Resource, object: &Value) -> bool {
    let metadata = &object["metadata"];
    let empty = |list: &Value| list.as_array().is_none_or(Vec::is_empty);
    let waits = resource.storage == "core/pods"
        && metadata["deletionGracePeriodSeconds"]
            .as_i64()
            .unwrap_or_default()
            > 0;
    let namespace_full =
        resource.storage == "core/namespaces" && !empty(&object["spec"]["finalizers"]);
    !metadata["deletionTimestamp"].is_null()
        && empty(&metadata["finalizers"])
        && !waits
        && !namespace_full
}
