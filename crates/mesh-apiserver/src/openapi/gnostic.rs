//! The protobuf form of an OpenAPI v2 document: the messages `openapi.v2.*` of gnostic, as far as our documents use them. The field
//! numbers are those of gnostic's public `OpenAPIv2.proto`.

use prost::Message;
use serde_json::{Map, Value};

#[derive(Clone, PartialEq, Message)]
struct Document {
    #[prost(string, tag = "1")]
    swagger: String,
    #[prost(message, optional, tag = "2")]
    info: Option<Info>,
    #[prost(message, optional, tag = "8")]
    paths: Option<Paths>,
    #[prost(message, optional, tag = "9")]
    definitions: Option<Schemas>,
}

#[derive(Clone, PartialEq, Message)]
struct Info {
    #[prost(string, tag = "1")]
    title: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Paths {
    #[prost(message, repeated, tag = "2")]
    path: Vec<NamedPathItem>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedPathItem {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<PathItem>,
}

#[derive(Clone, PartialEq, Message)]
struct PathItem {
    #[prost(message, optional, tag = "2")]
    get: Option<Operation>,
    #[prost(message, optional, tag = "3")]
    put: Option<Operation>,
    #[prost(message, optional, tag = "4")]
    post: Option<Operation>,
    #[prost(message, optional, tag = "5")]
    delete: Option<Operation>,
    #[prost(message, optional, tag = "8")]
    patch: Option<Operation>,
}

#[derive(Clone, PartialEq, Message)]
struct Operation {
    #[prost(message, repeated, tag = "8")]
    parameters: Vec<ParametersItem>,
    #[prost(message, repeated, tag = "13")]
    vendor_extension: Vec<NamedAny>,
}

/// `ParametersItem`, `Parameter` and `NonBodyParameter` are choices of which we take one each.
#[derive(Clone, PartialEq, Message)]
struct ParametersItem {
    #[prost(message, optional, tag = "1")]
    parameter: Option<Parameter>,
}

#[derive(Clone, PartialEq, Message)]
struct Parameter {
    #[prost(message, optional, tag = "2")]
    non_body_parameter: Option<NonBodyParameter>,
}

#[derive(Clone, PartialEq, Message)]
struct NonBodyParameter {
    #[prost(message, optional, tag = "3")]
    query_parameter_sub_schema: Option<QueryParameter>,
}

#[derive(Clone, PartialEq, Message)]
struct QueryParameter {
    #[prost(string, tag = "2")]
    place: String,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(string, tag = "6")]
    kind: String,
}

#[derive(Clone, PartialEq, Message)]
struct Schemas {
    #[prost(message, repeated, tag = "1")]
    additional_properties: Vec<NamedSchema>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedSchema {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Schema>,
}

#[derive(Clone, PartialEq, Message)]
struct Schema {
    #[prost(string, tag = "1")]
    reference: String,
    #[prost(string, tag = "2")]
    format: String,
    #[prost(string, tag = "4")]
    description: String,
    #[prost(message, optional, tag = "5")]
    default: Option<Any>,
    #[prost(string, repeated, tag = "19")]
    required: Vec<String>,
    #[prost(message, repeated, tag = "20")]
    allowed: Vec<Any>,
    #[prost(message, optional, boxed, tag = "21")]
    additional_properties: Option<Box<AdditionalProperties>>,
    #[prost(message, optional, tag = "22")]
    kind: Option<TypeItem>,
    #[prost(message, optional, boxed, tag = "23")]
    items: Option<Box<Items>>,
    #[prost(message, optional, tag = "25")]
    properties: Option<Schemas>,
    #[prost(message, repeated, tag = "31")]
    vendor_extension: Vec<NamedAny>,
}

#[derive(Clone, PartialEq, Message)]
struct AdditionalProperties {
    #[prost(message, optional, boxed, tag = "1")]
    schema: Option<Box<Schema>>,
}

#[derive(Clone, PartialEq, Message)]
struct TypeItem {
    #[prost(string, repeated, tag = "1")]
    value: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Items {
    #[prost(message, repeated, tag = "1")]
    schema: Vec<Schema>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedAny {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "2")]
    yaml: String,
}

/// Encodes a document that [`super::v2`] made.
pub(super) fn encode(document: &Value) -> Vec<u8> {
    let paths = members(&document["paths"]).map(|(name, value)| NamedPathItem {
        name: name.clone(),
        value: Some(path(value)),
    });
    let definitions = members(&document["definitions"]).map(|(name, value)| named(name, value));
    let message = Document {
        swagger: text(&document["swagger"]),
        info: Some(Info {
            title: text(&document["info"]["title"]),
            version: text(&document["info"]["version"]),
        }),
        paths: Some(Paths {
            path: paths.collect(),
        }),
        definitions: Some(Schemas {
            additional_properties: definitions.collect(),
        }),
    };
    message.encode_to_vec()
}

fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A value as YAML, of which JSON is a part.
fn any(value: &Value) -> Any {
    Any {
        yaml: value.to_string(),
    }
}

fn path(value: &Value) -> PathItem {
    let one = |verb: &str| value.get(verb).map(operation);
    PathItem {
        get: one("get"),
        put: one("put"),
        post: one("post"),
        delete: one("delete"),
        patch: one("patch"),
    }
}

fn operation(value: &Value) -> Operation {
    let parameters = value["parameters"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|parameter| {
            let query = QueryParameter {
                place: "query".to_owned(),
                name: text(&parameter["name"]),
                kind: "string".to_owned(),
            };
            let inner = NonBodyParameter {
                query_parameter_sub_schema: Some(query),
            };
            ParametersItem {
                parameter: Some(Parameter {
                    non_body_parameter: Some(inner),
                }),
            }
        });
    Operation {
        parameters: parameters.collect(),
        vendor_extension: extensions(value),
    }
}

fn extensions(value: &Value) -> Vec<NamedAny> {
    let found = members(value).filter(|(name, _)| name.starts_with("x-"));
    found
        .map(|(name, value)| NamedAny {
            name: name.clone(),
            value: Some(any(value)),
        })
        .collect()
}

fn named(name: &str, value: &Value) -> NamedSchema {
    NamedSchema {
        name: name.to_owned(),
        value: Some(schema(value)),
    }
}

fn schema(value: &Value) -> Schema {
    let kind = value["type"].as_str().map(|kind| TypeItem {
        value: vec![kind.to_owned()],
    });
    let values = value.get("additionalProperties").map(|v| {
        Box::new(AdditionalProperties {
            schema: Some(Box::new(schema(v))),
        })
    });
    let properties = value.get("properties").map(|v| Schemas {
        additional_properties: members(v).map(|(n, v)| named(n, v)).collect(),
    });
    Schema {
        reference: text(&value["$ref"]),
        format: text(&value["format"]),
        description: text(&value["description"]),
        default: value.get("default").map(any),
        required: value["required"]
            .as_array()
            .into_iter()
            .flatten()
            .map(text)
            .collect(),
        allowed: value["enum"]
            .as_array()
            .into_iter()
            .flatten()
            .map(any)
            .collect(),
        additional_properties: values,
        kind,
        items: value.get("items").map(|v| {
            Box::new(Items {
                schema: vec![schema(v)],
            })
        }),
        properties,
        vendor_extension: extensions(value),
    }
}
