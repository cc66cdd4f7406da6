//! A request's URL and headers as what Kubernetes means by them.

use std::sync::Arc;

use http::HeaderMap;
use http::header::{ACCEPT, CONTENT_TYPE, USER_AGENT};

use crate::access::{Action, Object};
use crate::auth::Identity;
use crate::errors::ApiError;
use crate::registry::{Registry, Resource};

/// The object or collection that a URL names.
#[derive(Debug, Clone)]
pub struct Target {
    /// Which resource.
    pub resource: Arc<Resource>,
    /// Namespace; `None` for cluster-wide resources and for lists over all namespaces.
    pub namespace: Option<String>,
    /// Name of the object; `None` for the collection.
    pub name: Option<String>,
    /// Subresource.
    pub subresource: Option<String>,
}

impl Target {
    /// Key in the storage; the name must be known.
    pub fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.namespace.as_deref().unwrap_or_default())
    }
}

/// Decoded query parameters, in order.
#[derive(Debug, Clone, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Parses `a=b&c=d`.
    pub fn parse(text: &str) -> Query {
        let pairs = text.split('&').filter(|p| !p.is_empty());
        Query(
            pairs
                .map(|pair| {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (decode(key, true), decode(value, true))
                })
                .collect(),
        )
    }

    /// The first value of a parameter, when it is not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, value)| key == name && !value.is_empty())
            .map(|(_, value)| value.as_str())
    }

    /// All values of a parameter.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// A switch: present as `true`, `1` or without a value.
    pub fn flag(&self, name: &str) -> bool {
        self.all(name)
            .any(|value| matches!(value, "" | "true" | "1" | "True" | "TRUE"))
    }

    /// A whole number.
    ///
    /// # Errors
    /// 400 when it is something else.
    pub fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let parse = |text: &str| {
            text.parse().map_err(|_| {
                ApiError::bad_request(format!("parameter {name}: {text:?} is not a whole number"))
            })
        };
        self.get(name).map(parse).transpose()
    }
}

/// The form in which the client wants objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The objects themselves.
    Object,
    /// A `Table`.
    Table,
    /// `PartialObjectMetadata`.
    Partial,
}

/// Everything about a request but its body.
#[derive(Debug, Clone)]
pub struct Request {
    /// Who asks.
    pub identity: Identity,
    /// What about.
    pub target: Target,
    /// Parameters.
    pub query: Query,
    /// Form of the answer.
    pub form: Form,
    /// Answer as YAML.
    pub yaml: bool,
    /// Media type of the body without parameters.
    pub content_type: String,
    /// First word of the user agent before `/`, else the name of who asks: the default field manager.
    pub agent: String,
}

impl Request {
    /// The manager that owns the fields of this write.
    pub fn manager(&self) -> String {
        self.query
            .get("fieldManager")
            .unwrap_or(&self.agent)
            .to_owned()
    }

    /// The creation of the object `name`, for who asked to patch it and found it absent.
    pub fn creation<'a>(&'a self, name: &'a str) -> Action<'a> {
        let object = Object {
            group: self.target.resource.group.as_str().into(),
            resource: self.target.resource.plural.as_str().into(),
            namespace: self.target.namespace.as_deref().unwrap_or_default().into(),
            name: name.into(),
            ..Object::default()
        };
        Action::on_object("create", object)
    }

    /// `dryRun=All`.
    ///
    /// # Errors
    /// 400 for another value.
    pub fn dry_run(&self) -> Result<bool, ApiError> {
        match self.query.get("dryRun") {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => Err(ApiError::bad_request(format!(
                "invalid dryRun value {other:?}: the only one is \"All\""
            ))),
        }
    }
}

/// Reads the headers that matter.
///
/// # Errors
/// 406 when the client accepts nothing that we have.
pub fn read_headers(headers: &HeaderMap) -> Result<(Form, bool, String, String), ApiError> {
    let text = |name| {
        headers
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
    };
    let (form, yaml) = negotiate(text(ACCEPT))?;
    let content_type = text(CONTENT_TYPE)
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    let agent = text(USER_AGENT)
        .split(['/', ' '])
        .next()
        .unwrap_or_default();
    Ok((form, yaml, content_type, agent.to_owned()))
}

fn negotiate(accept: &str) -> Result<(Form, bool), ApiError> {
    if accept.trim().is_empty() {
        return Ok((Form::Object, false));
    }
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let yaml = match parts.next().unwrap_or_default() {
            "application/json" | "*/*" | "application/*" => false,
            "application/yaml" => true,
            _ => continue,
        };
        let form = parts.find_map(|p| p.strip_prefix("as="));
        match form {
            None => return Ok((Form::Object, yaml)),
            Some("Table") => return Ok((Form::Table, yaml)),
            Some("PartialObjectMetadata" | "PartialObjectMetadataList") => {
                return Ok((Form::Partial, yaml));
            }
            Some(_) => {}
        }
    }
    Err(ApiError::new(
        406,
        "NotAcceptable",
        "only the following media types are accepted: application/json, application/yaml",
    ))
}

/// Finds the target of a path below `/api` or `/apis`; `None` when nothing is served there.
///
/// # Errors
/// 400 for a segment that can't be a name.
pub fn target(path: &str, registry: &Registry) -> Result<Option<Target>, ApiError> {
    let segments: Vec<String> = path
        .trim_matches('/')
        .split('/')
        .map(|s| decode(s, false))
        .collect();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let (group, version, rest) = match segments.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return Ok(None),
    };
    if let Some(bad) = rest
        .iter()
        .find(|s| s.is_empty() || **s == "." || **s == ".." || s.contains(['/', '%', '\0']))
    {
        return Err(ApiError::bad_request(format!(
            "invalid path segment {bad:?}"
        )));
    }
    let (namespace, rest) = match rest {
        ["namespaces", namespace, plural, after @ ..]
            if !matches!(*plural, "status" | "finalize") =>
        {
            (Some(*namespace), [&[*plural], after].concat())
        }
        other => (None, other.to_vec()),
    };
    let (plural, name, subresource) = match rest.as_slice() {
        [plural] => (*plural, None, None),
        [plural, name] => (*plural, Some(*name), None),
        [plural, name, subresource] => (*plural, Some(*name), Some(*subresource)),
        _ => return Ok(None),
    };
    let Some(resource) = registry.find(group, version, plural) else {
        return Ok(None);
    };
    // A namespaced object needs its namespace, a cluster-wide one has none.
    if resource.namespaced && namespace.is_none() && name.is_some()
        || !resource.namespaced && namespace.is_some()
    {
        return Ok(None);
    }
    Ok(Some(Target {
        resource: resource.clone(),
        namespace: namespace.map(str::to_owned),
        name: name.map(str::to_owned),
        subresource: subresource.map(str::to_owned),
    }))
}

/// Percent-decodes; bytes that are not UTF-8 are replaced.
pub fn decode(text: &str, plus_is_space: bool) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .and_then(|h| std::str::from_utf8(h).ok());
        match (bytes[at], hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
                continue;
            }
            (b'+', _) if plus_is_space => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}
