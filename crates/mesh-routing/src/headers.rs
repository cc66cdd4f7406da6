//! Header mutations that routes, virtual hosts, route tables and weighted entries ask for.

use envoy_types::pb::envoy::config::core::v3::HeaderValueOption;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use http::header::Entry;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::error::{CompileError, Result, Within};

/// A list of mutations in the order in which they are made.
#[derive(Debug, Clone, Default)]
pub struct HeaderOps(Vec<Op>);

#[derive(Debug, Clone)]
enum Op {
    Remove(HeaderName),
    Append(HeaderName, HeaderValue),
    AddIfAbsent(HeaderName, HeaderValue),
    Set(HeaderName, HeaderValue),
    SetIfPresent(HeaderName, HeaderValue),
}

impl HeaderOps {
    /// Removals come before additions, as in Envoy's header parser.
    pub(crate) fn compile(add: &[HeaderValueOption], remove: &[String]) -> Result<Self> {
        let mut ops = Vec::with_capacity(add.len() + remove.len());
        for name in remove {
            ops.push(Op::Remove(header_name(name).within("headers_to_remove")?));
        }
        for (i, option) in add.iter().enumerate() {
            ops.push(Op::compile(option).within(format_args!("headers_to_add[{i}]"))?);
        }
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

    /// Makes the mutations in place.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for op in &self.0 {
            match op {
                Op::Remove(name) => {
                    headers.remove(name);
                }
                Op::Append(name, value) => {
                    headers.append(name, value.clone());
                }
                Op::AddIfAbsent(name, value) => {
                    headers.entry(name).or_insert_with(|| value.clone());
                }
                Op::Set(name, value) => {
                    headers.insert(name, value.clone());
                }
                Op::SetIfPresent(name, value) => {
                    if let Entry::Occupied(mut entry) = headers.entry(name) {
                        entry.insert(value.clone());
                    }
                }
            }
        }
    }
}

impl Op {
    fn compile(option: &HeaderValueOption) -> Result<Self> {
        // `keep_empty_value` only matters for values made from variables, which are refused below.
        let header = option
            .header
            .as_ref()
            .ok_or_else(|| CompileError::new("header", "is missing"))?;
        let name = header_name(&header.key).within("key")?;
        let value = if header.raw_value.is_empty() {
            HeaderValue::from_str(&literal(&header.value)?)
        } else {
            HeaderValue::from_bytes(&header.raw_value)
        };
        let value = value.map_err(|_| {
            CompileError::new("value", "contains bytes that a header value must not have")
        })?;
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

/// `%%` stands for one percent sign; any other `%...%` is a variable of Envoy's format language.
fn literal(text: &str) -> Result<String> {
    let unescaped = text.replace("%%", "\u{0}");
    match unescaped.contains('%') {
        true => Err(CompileError::new(
            "value",
            format!("{text:?} uses a variable (%...%), which is not implemented"),
        )),
        false => Ok(unescaped.replace('\u{0}', "%")),
    }
}
