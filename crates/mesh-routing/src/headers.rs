//! Header mutations that routes, virtual hosts, route tables and weighted entries ask for.

use envoy_types::pb::envoy::config::core::v3::HeaderValueOption;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::error::{CompileError, Result, Within};
use crate::format::{Facts, Format};

/// Lists of mutations, one for each level that asks for some, in the order in which they are made.
#[derive(Debug, Clone, Default)]
pub struct HeaderOps(Vec<Level>);

/// What one level asks for. All its conditions and values look at the headers as its removals leave them, not at what its other mutations
/// have made of them (Envoy: `HeaderParser::evaluateHeaders`).
#[derive(Debug, Clone)]
struct Level {
    removals: Vec<HeaderName>,
    /// What overwrites first, then what adds.
    ops: Vec<Op>,
    /// One of them looks at a header that one before it writes, so that all values have to be made before the first is put down.
    at_once: bool,
}

#[derive(Debug, Clone)]
struct Op {
    name: HeaderName,
    how: How,
    value: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Append,
    AddIfAbsent,
    Set,
    SetIfPresent,
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
        let removal = |name: &String| header_name(name).within("headers_to_remove");
        let removals = remove.iter().map(removal).collect::<Result<Vec<_>>>()?;
        let (mut ops, mut adding) = (Vec::with_capacity(add.len()), Vec::new());
        for (i, option) in add.iter().enumerate() {
            let op = Op::compile(option).within(format_args!("headers_to_add[{i}]"))?;
            match op.how {
                // An empty value is no value, unless it is to be kept.
                _ if op.adds_nothing() && !option.keep_empty_value => {}
                How::Append | How::AddIfAbsent => adding.push(op),
                How::Set | How::SetIfPresent => ops.push(op),
            }
        }
        ops.append(&mut adding);
        if removals.is_empty() && ops.is_empty() {
            return Ok(Self::default());
        }
        Ok(Self(vec![Level {
            at_once: looks_back(&ops),
            removals,
            ops,
        }]))
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
        let reads = |op: &Op| matches!(&op.value, Value::Made(format, _) if format.reads_request());
        self.0.iter().flat_map(|level| &level.ops).any(reads)
    }

    /// Makes the mutations of a request in place; the facts' request headers are those that are changed.
    pub fn apply_to_request(&self, headers: &mut HeaderMap, facts: &Facts<'_>) {
        self.apply(headers, |headers, value| {
            value.make(&Facts {
                request: Some(headers),
                ..*facts
            })
        });
    }

    /// Makes the mutations of a response in place; the facts' response headers are those that are changed.
    pub fn apply_to_response(&self, headers: &mut HeaderMap, facts: &Facts<'_>) {
        self.apply(headers, |headers, value| {
            value.make(&Facts {
                response: Some(headers),
                ..*facts
            })
        });
    }

    fn apply(
        &self,
        headers: &mut HeaderMap,
        make: impl Fn(&HeaderMap, &Value) -> Option<HeaderValue>,
    ) {
        for level in &self.0 {
            for name in &level.removals {
                headers.remove(name);
            }
            if level.at_once {
                let value = |op: &Op| op.value(headers, &make);
                let values: Vec<_> = level.ops.iter().map(value).collect();
                for (op, value) in level.ops.iter().zip(values) {
                    op.put(headers, value);
                }
                continue;
            }
            for op in &level.ops {
                let value = op.value(headers, &make);
                op.put(headers, value);
            }
        }
    }
}

/// Does an operation look at what one before it writes?
fn looks_back(ops: &[Op]) -> bool {
    ops.iter().enumerate().any(|(i, op)| {
        let before = ops.get(..i).unwrap_or_default();
        before.iter().any(|writer| op.looks_at(&writer.name))
    })
}

impl Op {
    fn adds_nothing(&self) -> bool {
        matches!(&self.value, Value::Fixed(fixed) if fixed.is_empty())
    }

    /// Does its condition or its value depend on a header?
    fn looks_at(&self, name: &HeaderName) -> bool {
        let conditional = matches!(self.how, How::AddIfAbsent | How::SetIfPresent);
        (conditional && self.name == *name)
            || matches!(&self.value, Value::Made(format, _) if format.reads_header(name))
    }

    /// The value, where the headers have the condition fulfilled.
    fn value(
        &self,
        headers: &HeaderMap,
        make: &impl Fn(&HeaderMap, &Value) -> Option<HeaderValue>,
    ) -> Option<HeaderValue> {
        let wanted = match self.how {
            How::Append | How::Set => true,
            How::AddIfAbsent => !headers.contains_key(&self.name),
            How::SetIfPresent => headers.contains_key(&self.name),
        };
        wanted.then(|| make(headers, &self.value)).flatten()
    }

    fn put(&self, headers: &mut HeaderMap, value: Option<HeaderValue>) {
        let Some(value) = value else {
            return;
        };
        match self.how {
            How::Append | How::AddIfAbsent => {
                headers.append(&self.name, value);
            }
            How::Set | How::SetIfPresent => {
                headers.insert(&self.name, value);
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
        let how = match &option.append {
            // The older field: true (its default) appends, false overwrites.
            Some(append) if append.value => How::Append,
            Some(_) => How::Set,
            None => match HeaderAppendAction::try_from(option.append_action) {
                Ok(HeaderAppendAction::AppendIfExistsOrAdd) => How::Append,
                Ok(HeaderAppendAction::AddIfAbsent) => How::AddIfAbsent,
                Ok(HeaderAppendAction::OverwriteIfExistsOrAdd) => How::Set,
                Ok(HeaderAppendAction::OverwriteIfExists) => How::SetIfPresent,
                Err(_) => return Err(CompileError::new("append_action", "is unknown")),
            },
        };
        Ok(Self { name, how, value })
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
