//! Istio's StringMatch.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// How a string is matched. `{}` is accepted where presence is meant (headers); validation refuses it elsewhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum StringMatch {
    /// The whole string, byte by byte.
    Exact(String),
    /// The beginning of the string.
    Prefix(String),
    /// RE2 syntax, matched against the whole string.
    Regex(String),
    /// No condition on the value: it has to be there.
    #[default]
    Present,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    exact: Option<String>,
    prefix: Option<String>,
    regex: Option<String>,
}

impl<'de> Deserialize<'de> for StringMatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = Fields::deserialize(deserializer)?;
        match (fields.exact, fields.prefix, fields.regex) {
            (Some(exact), None, None) => Ok(Self::Exact(exact)),
            (None, Some(prefix), None) => Ok(Self::Prefix(prefix)),
            (None, None, Some(regex)) => Ok(Self::Regex(regex)),
            (None, None, None) => Ok(Self::Present),
            _ => Err(D::Error::custom(
                "only one of exact, prefix and regex may be given",
            )),
        }
    }
}

impl JsonSchema for StringMatch {
    fn schema_name() -> Cow<'static, str> {
        "StringMatch".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "maxProperties": 1,
            "properties": {
                "exact": { "type": "string", "description": "The whole string." },
                "prefix": { "type": "string", "description": "The beginning of the string." },
                "regex": { "type": "string", "description": "RE2 syntax, matched against the whole string." },
            },
        })
    }
}
