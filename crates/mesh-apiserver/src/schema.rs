//! The shape of a kind: what its fields are, how lists merge, what is required and defaulted.
//!
//! Built-in kinds come from the table in `schema/builtin.txt` (`schema/builtin.rs` reads it), custom ones from the OpenAPI schema of
//! their CRD (`schema/crd.rs`). Validation, pruning and defaulting (`schema/check.rs`), strategic merge, server-side apply and the
//! OpenAPI documents all read this one form.

pub mod builtin;
pub mod check;
pub mod crd;

use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value};

use crate::rules::Rule;

/// JSON type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchemaKind {
    /// Known fields (`props`), or a map (`additional`).
    Object,
    /// `items` says of what.
    Array,
    /// Text.
    String,
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// True or false.
    Boolean,
    /// A whole number or text (ports, percentages).
    IntOrString,
    /// Anything at all, kept as it is.
    Any,
}

/// How a list is merged (`x-kubernetes-list-type`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ListType {
    /// Replaced whole.
    #[default]
    Atomic,
    /// Unique scalars.
    Set,
    /// Objects that these fields identify; the first one is the key of strategic merge patches.
    Map(Vec<String>),
}

/// One node of a schema.
#[derive(Debug, Clone)]
pub struct Schema {
    /// Fully qualified type name for OpenAPI, for example `io.k8s.api.core.v1.Container`; `None` for an inline type.
    pub name: Option<String>,
    /// For `kubectl explain`.
    pub description: String,
    /// JSON type.
    pub kind: SchemaKind,
    /// OpenAPI format, for example `int32`; may be empty.
    pub format: String,
    /// Known fields in order.
    pub props: Vec<(String, Arc<Schema>)>,
    /// Names of required fields.
    pub required: Vec<String>,
    /// Type of the values of a map.
    pub additional: Option<Arc<Schema>>,
    /// Type of list items.
    pub items: Option<Arc<Schema>>,
    /// How the list merges.
    pub list_type: ListType,
    /// The object is replaced whole (`x-kubernetes-map-type: atomic`).
    pub atomic: bool,
    /// Strategic merge clears the fields that the patch does not name (`patchStrategy: retainKeys`).
    pub retain_keys: bool,
    /// Put in where the field is missing.
    pub default: Option<Value>,
    /// Allowed values; empty means any.
    pub allowed: Vec<Value>,
    /// `null` is a value.
    pub nullable: bool,
    /// Unknown fields are kept.
    pub preserve_unknown: bool,
    /// The value is a Kubernetes object with `apiVersion`, `kind`, `metadata`.
    pub embedded: bool,
    /// The remaining OpenAPI constraints of a custom resource: lengths, bounds, patterns, `oneOf` and its kin.
    pub rules: Map<String, Value>,
    /// The CEL rules of a custom resource's value.
    pub validations: Vec<Arc<Rule>>,
    /// This node or one below it has such rules.
    pub has_validations: bool,
    /// The compiled `pattern` of `rules`; `Err` carries what is wrong with it.
    pub pattern: OnceLock<Result<regex::Regex, String>>,
}

impl Schema {
    /// A schema of this JSON type with nothing else said.
    pub fn of(kind: SchemaKind) -> Schema {
        Schema {
            name: None,
            description: String::new(),
            kind,
            format: String::new(),
            props: Vec::new(),
            required: Vec::new(),
            additional: None,
            items: None,
            list_type: ListType::Atomic,
            atomic: false,
            retain_keys: false,
            default: None,
            allowed: Vec::new(),
            nullable: false,
            preserve_unknown: kind == SchemaKind::Any,
            embedded: false,
            rules: Map::new(),
            validations: Vec::new(),
            has_validations: false,
            pattern: OnceLock::new(),
        }
    }

    /// A schema that accepts and keeps everything; objects merge field by field, lists are atomic.
    pub fn any() -> Arc<Schema> {
        static ANY: OnceLock<Arc<Schema>> = OnceLock::new();
        ANY.get_or_init(|| Arc::new(Schema::of(SchemaKind::Any)))
            .clone()
    }

    /// The schema of a field: a known one, or that of a map's values.
    pub fn field(&self, name: &str) -> Option<&Arc<Schema>> {
        self.known(name).or(self.additional.as_ref())
    }

    /// The schema of a known field.
    pub fn known(&self, name: &str) -> Option<&Arc<Schema>> {
        self.props
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, schema)| schema)
    }

    /// [`Schema::field`], with "anything" where nothing is known.
    pub fn field_or_any(&self, name: &str) -> Arc<Schema> {
        self.field(name).cloned().unwrap_or_else(Schema::any)
    }

    /// The schema of list items.
    pub fn items_or_any(&self) -> Arc<Schema> {
        self.items.clone().unwrap_or_else(Schema::any)
    }
}
