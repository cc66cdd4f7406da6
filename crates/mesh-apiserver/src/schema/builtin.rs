//! Reads the table of built-in types.
//!
//! A line `package P` names the OpenAPI package of the types after it, `@Type words` starts a type, and a field is
//! `name[!] type [=default] [|allowed|allowed] [flags] [# words]`: `!` = required; types `string int32 int64 bool number time quantity
//! intstr bytes any`, `{}T` = map, `[]T` = atomic list, `[]T(k,l)` = list keyed by fields, `[set]T` = list of unique scalars; flags
//! `atomic`, `retain`. The table holds what Kubernetes 1.36 calls the fields; nothing else in the server knows their names twice.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use super::{ListType, Schema, SchemaKind};

const TABLE: &str = include_str!("builtin.txt");

/// The schema of a built-in type by its short name, for example `Deployment`.
pub fn lookup(name: &str) -> Option<Arc<Schema>> {
    types().get(name).cloned()
}

/// All built-in types by short name.
pub fn types() -> &'static HashMap<String, Arc<Schema>> {
    static TYPES: OnceLock<HashMap<String, Arc<Schema>>> = OnceLock::new();
    TYPES.get_or_init(|| Builder::read(TABLE).build())
}

struct RawType<'a> {
    package: &'a str,
    description: &'a str,
    fields: Vec<&'a str>,
}

struct Builder<'a> {
    raw: HashMap<&'a str, RawType<'a>>,
    order: Vec<&'a str>,
    done: HashMap<String, Arc<Schema>>,
}

impl<'a> Builder<'a> {
    fn read(text: &'a str) -> Builder<'a> {
        let mut builder = Builder {
            raw: HashMap::new(),
            order: Vec::new(),
            done: HashMap::new(),
        };
        let mut package = "";
        for line in text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty() && !l.starts_with('#'))
        {
            if let Some(name) = line.strip_prefix("package ") {
                package = name;
            } else if let Some(head) = line.strip_prefix('@') {
                let (name, description) = head.split_once(' ').unwrap_or((head, ""));
                builder.order.push(name);
                builder.raw.insert(
                    name,
                    RawType {
                        package,
                        description,
                        fields: Vec::new(),
                    },
                );
            } else if let Some(raw) = builder
                .order
                .last()
                .and_then(|name| builder.raw.get_mut(name))
            {
                raw.fields.push(line);
            }
        }
        builder
    }

    fn build(mut self) -> HashMap<String, Arc<Schema>> {
        for name in self.order.clone() {
            self.resolve(name);
        }
        self.done
    }

    fn resolve(&mut self, name: &str) -> Arc<Schema> {
        if let Some(done) = self.done.get(name) {
            return done.clone();
        }
        let Some(raw) = self.raw.remove(name) else {
            // Only a mistake in the table leads here; the test below finds it.
            return Schema::any();
        };
        let mut schema = Schema::of(SchemaKind::Object);
        schema.name = Some(format!("{}.{name}", raw.package));
        schema.description = raw.description.to_owned();
        for line in raw.fields {
            let (field, required, typ) = self.field(line);
            if required {
                schema.required.push(field.clone());
            }
            schema.props.push((field, Arc::new(typ)));
        }
        let schema = Arc::new(schema);
        self.done.insert(name.to_owned(), schema.clone());
        schema
    }

    fn field(&mut self, line: &str) -> (String, bool, Schema) {
        let (line, description) = line.split_once(" # ").unwrap_or((line, ""));
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let required = name.ends_with('!');
        let mut schema = self.typ(words.next().unwrap_or("any"));
        if !description.is_empty() {
            schema.description = description.to_owned();
        }
        for word in words {
            if let Some(default) = word.strip_prefix('=') {
                let parsed = serde_json::from_str(default);
                schema.default = Some(parsed.unwrap_or_else(|_| Value::from(default)));
            } else if let Some(allowed) = word.strip_prefix('|') {
                schema.allowed = allowed.split('|').map(Value::from).collect();
            } else if word == "atomic" {
                schema.atomic = true;
            } else if word == "retain" {
                schema.retain_keys = true;
            }
        }
        (name.trim_end_matches('!').to_owned(), required, schema)
    }

    fn typ(&mut self, text: &str) -> Schema {
        if let Some(inner) = text.strip_prefix("{}") {
            let mut schema = Schema::of(SchemaKind::Object);
            schema.additional = Some(Arc::new(self.typ(inner)));
            return schema;
        }
        if let Some(inner) = text.strip_prefix("[set]") {
            return self.list(inner, ListType::Set);
        }
        if let Some(inner) = text.strip_prefix("[]") {
            return match inner.split_once('(') {
                None => self.list(inner, ListType::Atomic),
                Some((item, keys)) => {
                    let keys = keys
                        .trim_end_matches(')')
                        .split(',')
                        .map(str::to_owned)
                        .collect();
                    self.list(item, ListType::Map(keys))
                }
            };
        }
        let (kind, format) = match text {
            "string" => (SchemaKind::String, ""),
            "time" => (SchemaKind::String, "date-time"),
            "bytes" => (SchemaKind::String, "byte"),
            "int32" => (SchemaKind::Integer, "int32"),
            "int64" => (SchemaKind::Integer, "int64"),
            "bool" => (SchemaKind::Boolean, ""),
            "number" => (SchemaKind::Number, "double"),
            "intstr" => (SchemaKind::IntOrString, "int-or-string"),
            "quantity" => (SchemaKind::IntOrString, "quantity"),
            "any" => (SchemaKind::Any, ""),
            named => return (*self.resolve(named)).clone(),
        };
        let mut schema = Schema::of(kind);
        schema.format = format.to_owned();
        schema
    }

    fn list(&mut self, item: &str, list_type: ListType) -> Schema {
        let mut schema = Schema::of(SchemaKind::Array);
        schema.items = Some(Arc::new(self.typ(item)));
        schema.list_type = list_type;
        schema
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_in_the_table_resolves() {
        let text = TABLE
            .lines()
            .filter(|l| !l.starts_with('@') && !l.starts_with("package") && !l.starts_with('#'));
        for line in text.filter(|l| !l.trim().is_empty()) {
            let typ = line
                .split_whitespace()
                .nth(1)
                .unwrap_or_else(|| panic!("no type: {line}"));
            let base = typ
                .trim_start_matches("{}")
                .trim_start_matches("[set]")
                .trim_start_matches("[]");
            let base = base.trim_start_matches("[]").split('(').next().unwrap();
            let scalar = [
                "string", "time", "bytes", "int32", "int64", "bool", "number", "intstr",
                "quantity", "any",
            ];
            assert!(
                scalar.contains(&base) || lookup(base).is_some(),
                "unknown type {base} in: {line}"
            );
        }
        let pod = lookup("Pod").unwrap();
        let containers = pod.known("spec").unwrap().known("containers").unwrap();
        assert_eq!(containers.list_type, ListType::Map(vec!["name".to_owned()]));
    }
}
