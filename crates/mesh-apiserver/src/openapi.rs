//! OpenAPI documents made from the schemas of the served kinds: v3 for today's kubectl, v2 (JSON, and the gnostic protobuf form that
//! kubectl up to 1.2x asks for) for older ones.
//!
//! `kubectl explain` reads descriptions here, `kubectl apply` reads merge keys and which query parameters a patch takes, and clients
//! that validate by themselves read the fields. A document has no more than that.

mod gnostic;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::schema::{ListType, Schema, SchemaKind, builtin};

/// A served kind.
pub(crate) struct Kind {
    /// API group; empty for the core group.
    pub(crate) group: String,
    /// API version.
    pub(crate) version: String,
    /// `Pod`.
    pub(crate) kind: String,
    /// `pods`.
    pub(crate) plural: String,
    /// Whether objects lie in namespaces.
    pub(crate) namespaced: bool,
    /// The whole object.
    pub(crate) schema: Arc<Schema>,
}

impl Kind {
    /// `api/v1` or `apis/GROUP/VERSION`.
    fn prefix(&self) -> String {
        if self.group.is_empty() {
            format!("api/{}", self.version)
        } else {
            format!("apis/{}/{}", self.group, self.version)
        }
    }

    /// The name of its definition: that of its type, or for custom resources the group turned round, as Kubernetes names them.
    fn definition(&self) -> String {
        let reversed = || {
            let mut parts: Vec<&str> = self.group.split('.').collect();
            parts.reverse();
            format!("{}.{}.{}", parts.join("."), self.version, self.kind)
        };
        self.schema.name.clone().unwrap_or_else(reversed)
    }

    fn group_version_kind(&self) -> Value {
        json!({"group": self.group, "version": self.version, "kind": self.kind})
    }
}

/// `/openapi/v3`: where the document of each group and version is.
pub(crate) fn v3_index(kinds: &[Kind], revision: u64) -> Value {
    let paths: Map<String, Value> = kinds
        .iter()
        .map(|kind| {
            let prefix = kind.prefix();
            let url = format!("/openapi/v3/{prefix}?hash={revision:x}");
            (prefix, json!({"serverRelativeURL": url}))
        })
        .collect();
    json!({"paths": paths})
}

/// `/openapi/v3/PREFIX`, for example `apis/apps/v1`; `None` when nothing of that prefix is served.
pub(crate) fn v3(kinds: &[Kind], prefix: &str) -> Option<Value> {
    let kinds: Vec<&Kind> = kinds
        .iter()
        .filter(|kind| kind.prefix() == prefix)
        .collect();
    if kinds.is_empty() {
        return None;
    }
    let (paths, definitions) = document(&kinds, Flavor::V3);
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.36.0"},
        "paths": paths,
        "components": {"schemas": definitions},
    }))
}

/// `/openapi/v2` as JSON.
pub(crate) fn v2(kinds: &[Kind]) -> Value {
    let kinds: Vec<&Kind> = kinds.iter().collect();
    let (paths, definitions) = document(&kinds, Flavor::V2);
    json!({
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": "v1.36.0"},
        "paths": paths,
        "definitions": definitions,
    })
}

/// `/openapi/v2` as protobuf.
pub(crate) fn v2_protobuf(kinds: &[Kind]) -> Vec<u8> {
    gnostic::encode(&v2(kinds))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Flavor {
    V2,
    V3,
}

fn document(kinds: &[&Kind], flavor: Flavor) -> (Map<String, Value>, BTreeMap<String, Value>) {
    let mut paths = Map::new();
    let mut writer = Writer {
        flavor,
        definitions: BTreeMap::new(),
    };
    for kind in kinds {
        add_paths(&mut paths, kind, flavor);
        let name = kind.definition();
        writer.define(&name, &kind.schema);
        if let Some(Value::Object(definition)) = writer.definitions.get_mut(&name) {
            let kinds = definition
                .entry("x-kubernetes-group-version-kind")
                .or_insert_with(|| json!([]));
            if let Some(kinds) = kinds.as_array_mut() {
                kinds.push(kind.group_version_kind());
            }
        }
    }
    (paths, writer.definitions)
}

fn add_paths(paths: &mut Map<String, Value>, kind: &Kind, flavor: Flavor) {
    let scope = if kind.namespaced {
        "/namespaces/{namespace}"
    } else {
        ""
    };
    let list = format!("/{}{scope}/{}", kind.prefix(), kind.plural);
    let operation = |action: &str, query: &[&str]| {
        let parameters: Vec<Value> = query.iter().map(|name| parameter(name, flavor)).collect();
        json!({
            "parameters": parameters,
            "responses": {"200": {"description": "OK"}},
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": kind.group_version_kind(),
        })
    };
    const WRITE: &[&str] = &["dryRun", "fieldManager", "fieldValidation"];
    let one = json!({
        "get": operation("get", &[]),
        "put": operation("put", WRITE),
        "patch": operation("patch", &["dryRun", "fieldManager", "fieldValidation", "force"]),
        "delete": operation("delete", &["dryRun", "gracePeriodSeconds", "propagationPolicy"]),
    });
    paths.insert(format!("{list}/{{name}}"), one);
    let many = json!({
        "get": operation("list", &["labelSelector", "fieldSelector", "limit", "continue", "watch", "resourceVersion"]),
        "post": operation("post", WRITE),
    });
    paths.insert(list, many);
}

fn parameter(name: &str, flavor: Flavor) -> Value {
    match flavor {
        Flavor::V2 => json!({"name": name, "in": "query", "type": "string", "uniqueItems": true}),
        Flavor::V3 => {
            json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}})
        }
    }
}

struct Writer {
    flavor: Flavor,
    definitions: BTreeMap<String, Value>,
}

impl Writer {
    /// Adds a named type and those that it uses. A type that uses itself is found in the table already.
    fn define(&mut self, name: &str, schema: &Schema) {
        if self.definitions.contains_key(name) {
            return;
        }
        self.definitions.insert(name.to_owned(), Value::Null);
        let body = self.body(schema);
        self.definitions.insert(name.to_owned(), body);
    }

    /// A field's, item's or value's schema: a reference where the type has a name.
    fn used(&mut self, schema: &Schema) -> Value {
        let Some(name) = &schema.name else {
            return self.body(schema);
        };
        // The type says what it is, the field what it is for.
        let own = name.rsplit('.').next().and_then(builtin::lookup);
        let own = own.filter(|own| own.name.as_ref() == Some(name));
        self.define(name, own.as_deref().unwrap_or(schema));
        let is_new = |text: &str| {
            !text.is_empty() && self.definitions[name]["description"].as_str() != Some(text)
        };
        let description = Some(schema.description.as_str()).filter(|text| is_new(text));
        let place = match self.flavor {
            Flavor::V2 => "#/definitions/",
            Flavor::V3 => "#/components/schemas/",
        };
        let reference = json!({"$ref": format!("{place}{name}")});
        match self.flavor {
            // Beside a `$ref` nothing else counts in v3.
            Flavor::V3 => {
                let mut field = Map::new();
                if let Some(description) = description {
                    field.insert("description".into(), description.into());
                }
                field.insert("allOf".into(), json!([reference]));
                Value::Object(field)
            }
            Flavor::V2 => {
                let mut field = Map::new();
                if let Some(description) = description {
                    field.insert("description".into(), description.into());
                }
                field.insert("$ref".into(), reference["$ref"].clone());
                Value::Object(field)
            }
        }
    }

    fn body(&mut self, schema: &Schema) -> Value {
        let mut out = Map::new();
        if !schema.description.is_empty() {
            out.insert("description".into(), schema.description.clone().into());
        }
        self.kind(schema, &mut out);
        if !schema.props.is_empty() {
            let props: Map<String, Value> = schema
                .props
                .iter()
                .map(|(name, field)| (name.clone(), self.used(field)))
                .collect();
            out.insert("properties".into(), props.into());
        }
        if let Some(values) = &schema.additional {
            out.insert("additionalProperties".into(), self.used(values));
        }
        if schema.kind == SchemaKind::Array {
            let items = self.used(&schema.items_or_any());
            out.insert("items".into(), items);
            list_extensions(schema, &mut out);
        }
        if !schema.required.is_empty() {
            out.insert("required".into(), json!(schema.required));
        }
        if let Some(default) = &schema.default {
            out.insert("default".into(), default.clone());
        }
        if !schema.allowed.is_empty() {
            out.insert("enum".into(), json!(schema.allowed));
        }
        if schema.nullable && self.flavor == Flavor::V3 {
            out.insert("nullable".into(), true.into());
        }
        if schema.atomic {
            out.insert("x-kubernetes-map-type".into(), "atomic".into());
        }
        if schema.retain_keys {
            out.insert("x-kubernetes-patch-strategy".into(), "retainKeys".into());
        }
        if schema.preserve_unknown && schema.kind == SchemaKind::Object {
            out.insert("x-kubernetes-preserve-unknown-fields".into(), true.into());
        }
        if self.flavor == Flavor::V3 {
            // Bounds, patterns and alternatives of custom resources; v2 can't say all of them, so it says none.
            out.extend(schema.rules.clone());
        }
        Value::Object(out)
    }

    fn kind(&self, schema: &Schema, out: &mut Map<String, Value>) {
        let name = match schema.kind {
            SchemaKind::Object => "object",
            SchemaKind::Array => "array",
            SchemaKind::String => "string",
            SchemaKind::Integer => "integer",
            SchemaKind::Number => "number",
            SchemaKind::Boolean => "boolean",
            SchemaKind::Any => {
                out.insert("x-kubernetes-preserve-unknown-fields".into(), true.into());
                return;
            }
            SchemaKind::IntOrString => {
                out.insert("format".into(), "int-or-string".into());
                match self.flavor {
                    Flavor::V2 => out.insert("type".into(), "string".into()),
                    Flavor::V3 => out.insert(
                        "oneOf".into(),
                        json!([{"type": "integer"}, {"type": "string"}]),
                    ),
                };
                return;
            }
        };
        out.insert("type".into(), name.into());
        if !schema.format.is_empty() {
            out.insert("format".into(), schema.format.clone().into());
        }
    }
}

/// What server-side apply (`list-type`) and strategic merge patch (`patch-*`) read.
fn list_extensions(schema: &Schema, out: &mut Map<String, Value>) {
    match &schema.list_type {
        ListType::Atomic => {
            out.insert("x-kubernetes-list-type".into(), "atomic".into());
        }
        ListType::Set => {
            out.insert("x-kubernetes-list-type".into(), "set".into());
            out.insert("x-kubernetes-patch-strategy".into(), "merge".into());
        }
        ListType::Map(keys) => {
            out.insert("x-kubernetes-list-type".into(), "map".into());
            out.insert("x-kubernetes-list-map-keys".into(), json!(keys));
            if let Some(key) = keys.first() {
                out.insert("x-kubernetes-patch-merge-key".into(), key.clone().into());
            }
            let strategy = if schema.retain_keys {
                "merge,retainKeys"
            } else {
                "merge"
            };
            out.insert("x-kubernetes-patch-strategy".into(), strategy.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::builtin;

    fn kinds() -> Vec<Kind> {
        let kind = |group: &str, kind: &str, plural: &str| Kind {
            group: group.into(),
            version: "v1".into(),
            kind: kind.into(),
            plural: plural.into(),
            namespaced: true,
            schema: builtin::lookup(kind).unwrap(),
        };
        vec![
            kind("", "Pod", "pods"),
            kind("apps", "Deployment", "deployments"),
        ]
    }

    #[test]
    fn v3_has_what_explain_and_apply_look_for() {
        let document = v3(&kinds(), "apis/apps/v1").unwrap();
        let path = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"];
        assert_eq!(
            path["get"]["x-kubernetes-group-version-kind"]["kind"],
            "Deployment"
        );
        let patch = path["patch"]["parameters"].as_array().unwrap();
        assert!(
            patch
                .iter()
                .any(|p| p["name"] == "dryRun" && p["in"] == "query")
        );
        let schemas = &document["components"]["schemas"];
        assert_eq!(
            schemas["io.k8s.api.apps.v1.Deployment"]["x-kubernetes-group-version-kind"][0]["group"],
            "apps"
        );
        let containers = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert!(v3(&kinds(), "apis/none/v1").is_none());
        assert_eq!(
            v3_index(&kinds(), 7)["paths"]["api/v1"]["serverRelativeURL"],
            "/openapi/v3/api/v1?hash=7"
        );
    }

    #[test]
    fn every_reference_of_v2_has_its_definition() {
        let document = v2(&kinds());
        let text = document.to_string();
        let references = text
            .split("\"#/definitions/")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap());
        let mut count = 0;
        for name in references {
            assert!(
                document["definitions"][name].is_object(),
                "{name} is not defined"
            );
            count += 1;
        }
        assert!(count > 50);
        assert!(v2_protobuf(&kinds()).len() > 10_000);
    }
}
