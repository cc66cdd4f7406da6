//! Dynamic metadata: what filters have found out about a request or connection, and the conditions on it
//! (`envoy.type.matcher.v3.MetadataMatcher`).

use std::sync::Arc;

use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::path_segment::Segment;
use envoy_types::pb::envoy::r#type::matcher::v3::value_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{double_matcher, list_matcher};
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value};

use crate::error::{CompileError, Result, Within, every_field};
use crate::matcher::StringMatch;

/// Levels of conditions within conditions; deeper ones are refused.
const DEEPEST: usize = 32;

/// What filters have found out, by the filter's name.
#[derive(Debug, Clone, Default)]
pub struct Dynamic(Vec<(&'static str, Arc<Struct>)>);

impl Dynamic {
    /// What stands under a filter's name.
    pub fn section(&self, name: &str) -> Option<&Struct> {
        let found = self.0.iter().find(|(known, _)| *known == name);
        found.map(|(_, fields)| &**fields)
    }

    /// All sections in the order in which they came.
    pub fn sections(&self) -> impl Iterator<Item = (&str, &Struct)> {
        self.0.iter().map(|(name, fields)| (*name, &**fields))
    }

    /// Puts fields under a filter's name; those of the same name are replaced, others stay.
    pub fn add(&mut self, name: &'static str, fields: Arc<Struct>) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            None => self.0.push((name, fields)),
            Some((_, old)) => {
                let new = Arc::unwrap_or_clone(fields);
                Arc::make_mut(old).fields.extend(new.fields);
            }
        }
    }
}

/// A `MetadataMatcher`.
#[derive(Debug, Clone)]
pub struct MetadataMatch {
    section: Box<str>,
    path: Vec<Box<str>>,
    value: ValueMatch,
    invert: bool,
}

impl MetadataMatch {
    pub(crate) fn compile(m: &pb::MetadataMatcher) -> Result<Self> {
        every_field!(m, pb::MetadataMatcher, used { filter, path, value, invert } irrelevant {} refused {});
        let key = |segment: &pb::metadata_matcher::PathSegment| match &segment.segment {
            Some(Segment::Key(key)) => Ok(key.as_str().into()),
            None => Err(CompileError::new("path", "a segment is empty")),
        };
        let value = m.value.as_ref();
        let value = value.ok_or_else(|| CompileError::new("value", "is missing"))?;
        Ok(Self {
            section: m.filter.as_str().into(),
            path: m.path.iter().map(key).collect::<Result<_>>()?,
            value: ValueMatch::compile(value, 0).within("value")?,
            invert: m.invert,
        })
    }

    /// Does what filters have found out match?
    pub fn matches(&self, known: Option<&Dynamic>) -> bool {
        let section = known.and_then(|known| known.section(&self.section));
        let value = section.and_then(|section| find(section, &self.path));
        self.value.matches(value.and_then(|v| v.kind.as_ref())) != self.invert
    }
}

/// A value inside a struct by the names that lead to it.
pub fn find<'a, K: AsRef<str>>(fields: &'a Struct, path: &[K]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    let value = fields.fields.get(first.as_ref())?;
    match (rest.is_empty(), &value.kind) {
        (true, _) => Some(value),
        (false, Some(Kind::StructValue(inner))) => find(inner, rest),
        (false, _) => None,
    }
}

/// A `ValueMatcher`.
#[derive(Debug, Clone)]
enum ValueMatch {
    Null,
    Exact(f64),
    /// Half-open.
    Range(f64, f64),
    Text(StringMatch),
    Bool(bool),
    Present(bool),
    OneOf(Box<ValueMatch>),
    Any(Vec<ValueMatch>),
}

impl ValueMatch {
    fn compile(m: &pb::ValueMatcher, depth: usize) -> Result<Self> {
        if depth > DEEPEST {
            return Err(CompileError::new("value", "is nested too deeply"));
        }
        Ok(match &m.match_pattern {
            None => return Err(CompileError::new("match_pattern", "is missing")),
            Some(MatchPattern::NullMatch(_)) => Self::Null,
            Some(MatchPattern::DoubleMatch(m)) => match &m.match_pattern {
                Some(double_matcher::MatchPattern::Exact(value)) => Self::Exact(*value),
                Some(double_matcher::MatchPattern::Range(r)) => Self::Range(r.start, r.end),
                None => return Err(CompileError::new("double_match", "is empty")),
            },
            Some(MatchPattern::StringMatch(m)) => {
                Self::Text(StringMatch::compile(m).within("string_match")?)
            }
            Some(MatchPattern::BoolMatch(value)) => Self::Bool(*value),
            Some(MatchPattern::PresentMatch(wanted)) => Self::Present(*wanted),
            Some(MatchPattern::ListMatch(m)) => match &m.match_pattern {
                Some(list_matcher::MatchPattern::OneOf(one)) => {
                    Self::OneOf(Box::new(Self::compile(one, depth + 1).within("one_of")?))
                }
                None => return Err(CompileError::new("list_match", "is empty")),
            },
            Some(MatchPattern::OrMatch(m)) => Self::Any(
                m.value_matchers
                    .iter()
                    .map(|value| Self::compile(value, depth + 1).within("or_match"))
                    .collect::<Result<_>>()?,
            ),
        })
    }

    fn matches(&self, value: Option<&Kind>) -> bool {
        match (self, value) {
            (Self::Null, Some(Kind::NullValue(_))) => true,
            (Self::Exact(wanted), Some(Kind::NumberValue(n))) => wanted == n,
            (Self::Range(start, end), Some(Kind::NumberValue(n))) => start <= n && n < end,
            (Self::Text(text), Some(Kind::StringValue(s))) => text.matches(s),
            (Self::Bool(wanted), Some(Kind::BoolValue(b))) => wanted == b,
            (Self::Present(wanted), value) => *wanted && value.is_some(),
            (Self::OneOf(one), Some(Kind::ListValue(list))) => {
                list.values.iter().any(|v| one.matches(v.kind.as_ref()))
            }
            (Self::Any(all), value) => all.iter().any(|one| one.matches(value)),
            _ => false,
        }
    }
}
