//! Header mutations that routes, virtual hosts, route tables and weighted entries ask for.

use envoy_types::pb::envoy::config::core::v3::HeaderValueOption;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::error::{CompileError, Result, Within};
use crate::format::{Facts, Format};

/// A list of mutations in the order in which they are made.
#[derive(Debug, Clone, Default)]
pub struct HeaderOps(Vec<Op>);

#[derive(Debug, Clone)]
enum Op {
    Remove(HeaderName),
    Append(HeaderName, Value),
    AddIfAbsent(HeaderName, Value),
    Set(HeaderName, Value),
    SetIfPresent(HeaderName, Value),
}

#[derive(Debug, Clone)]
enum Value {
    Fixed(HeaderValue),
    /// Made for every message; a header without a value is left out unless it is to be kept.
    Made(Format, bool),
}

impl Value {
    fn make(&self, facts: &Facts<'_>) -> Option<HeaderValue> {
        match self {
            Self::Fixed(value) => Some(value.clone()),
            Self::Made(format, keep_empty) => {
                let text = format.render(facts, "");
                // What a peer has sent can hold bytes that a header must not have.
                (*keep_empty || !text.is_empty())
                    .then(|| HeaderValue::try_from(text).ok())
                    .flatten()
            }
        }
    }
}

impl HeaderOps {
    /// Removals come first, then what overwrites, then what adds, as in Envoy's header parser.
    pub(crate) fn compile(add: &[HeaderValueOption], remove: &[String]) -> Result<Self> {
        let mut ops = Vec::with_capacity(add.len() + remove.len());
        for name in remove {
            ops.push(Op::Remove(header_name(name).within("headers_to_remove")?));
        }
        let mut adding = Vec::new();
        for (i, option) in add.iter().enumerate() {
            let op = Op::compile(option).within(format_args!("headers_to_add[{i}]"))?;
            match op {
                // An empty value is no value, unless it is to be kept.
                op if op.adds_nothing() && !option.keep_empty_value => {}
                Op::Append(..) | Op::AddIfAbsent(..) => adding.push(op),
                op => ops.push(op),
            }
        }
        ops.append(&mut adding);
        Ok(Self(ops))
    }

    /// This list followed by `outer`: Envoy evaluates the most specific level first.
    pub(crate) fn then(mut self, outer: &HeaderOps) -> Self {
        self.0.extend(outer.0.iter().cloned());
        self
    }

    /// Nothing to do?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Do values look at the request's headers? (Mutations of a response that do need a copy of them.)
    pub fn reads_request(&self) -> bool {
        self.0.iter().any(|op| match op {
            Op::Remove(_) => false,
            Op::Append(_, value)
            | Op::AddIfAbsent(_, value)
            | Op::Set(_, value)
            | Op::SetIfPresent(_, value) => {
                matches!(value, Value::Made(format, _) if format.reads_request())
            }
        })
    }

    /// Makes the mutations of a request in place; the facts' request headers are those that are changed.
    pub fn apply_to_request(&self, headers: &mut HeaderMap, facts: &Facts<'_>) {
        for op in &self.0 {
            let value = |headers: &HeaderMap, value: &Value| {
                value.make(&Facts {
                    request: Some(headers),
                    ..*facts
                })
            };
            op.apply(headers, value);
        }
    }

    /// Makes the mutations of a response in place; the facts' response headers are those that are changed.
    pub fn apply_to_response(&self, headers: &mut HeaderMap, facts: &Facts<'_>) {
        for op in &self.0 {
            let value = |headers: &HeaderMap, value: &Value| {
                value.make(&Facts {
                    response: Some(headers),
                    ..*facts
                })
            };
            op.apply(headers, value);
        }
    }
}

impl Op {
    fn adds_nothing(&self) -> bool {
        match self {
            Self::Remove(_) => false,
            Self::Append(_, value)
            | Self::AddIfAbsent(_, value)
            | Self::Set(_, value)
            | Self::SetIfPresent(_, value) => {
                matches!(value, Value::Fixed(fixed) if fixed.is_empty())
            }
        }
    }

    fn apply(
        &self,
        headers: &mut HeaderMap,
        make: impl Fn(&HeaderMap, &Value) -> Option<HeaderValue>,
    ) {
        match self {
            Self::Remove(name) => {
                headers.remove(name);
            }
            Self::Append(name, value) => {
                if let Some(value) = make(headers, value) {
                    headers.append(name, value);
                }
            }
            Self::AddIfAbsent(name, value) => {
                if !headers.contains_key(name)
                    && let Some(value) = make(headers, value)
                {
                    headers.insert(name, value);
                }
            }
            Self::Set(name, value) => {
                if let Some(value) = make(headers, value) {
                    headers.insert(name, value);
                }
            }
            Self::SetIfPresent(name, value) => {
                if headers.contains_key(name)
                    && let Some(value) = make(headers, value)
                {
                    headers.insert(name, value);
                }
            }
        }
    }

    fn compile(option: &HeaderValueOption) -> Result<Self> {
        let header = option
            .header
            .as_ref()
            .ok_or_else(|| CompileError::new("header", "is missing"))?;
        let name = header_name(&header.key).within("key")?;
        let fixed = if header.raw_value.is_empty() {
            let format = Format::compile(&header.value).within("value")?;
            match format.literal() {
                Some(text) => Ok(HeaderValue::from_str(text)),
                None => Err(Value::Made(format, option.keep_empty_value)),
            }
        } else {
            Ok(HeaderValue::from_bytes(&header.raw_value))
        };
        let value = match fixed {
            Err(made) => made,
            Ok(value) => Value::Fixed(value.map_err(|_| {
                CompileError::new("value", "contains bytes that a header value must not have")
            })?),
        };
        if let Some(append) = &option.append {
            // The older field: true (its default) appends, false overwrites.
            return Ok(if append.value {
                Op::Append(name, value)
            } else {
                Op::Set(name, value)
            });
        }
        Ok(match HeaderAppendAction::try_from(option.append_action) {
            Ok(HeaderAppendAction::AppendIfExistsOrAdd) => Op::Append(name, value),
            Ok(HeaderAppendAction::AddIfAbsent) => Op::AddIfAbsent(name, value),
            Ok(HeaderAppendAction::OverwriteIfExistsOrAdd) => Op::Set(name, value),
            Ok(HeaderAppendAction::OverwriteIfExists) => Op::SetIfPresent(name, value),
            Err(_) => return Err(CompileError::new("append_action", "is unknown")),
        })
    }
}

fn header_name(name: &str) -> Result<HeaderName> {
    if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
        return Err(CompileError::new(
            name,
            "pseudo headers and host cannot be changed this way (Envoy refuses them too)",
        ));
    }
    name.parse()
        .map_err(|_| CompileError::new(name, "is not a header name"))
}
