//! The one YAML module: reads what kubectl reads, and writes what Go reads back.
//!
//! kubectl reads YAML 1.1 as Go's library resolves it: `yes`, `on` and `y` are booleans, `0644` is octal, `<<` merges. A key that is there
//! twice is an error, as with kubectl's strict decoding. Nested aliases that would blow up to millions of nodes are refused.

mod resolve;
mod write;

use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle, Span, StrInput, Tag};
use serde_json::{Map, Value};

pub use write::{to_string, to_string_all};

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 100;
/// Most nodes that aliases may add to a text.
const MAX_ALIASED_NODES: usize = 200_000;

/// Why a YAML text was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{source_name}:{line}:{column}: document {}: {message}", document + 1)]
pub struct YamlError {
    /// Where the text came from, as a person would name it: a path, or `stdin`.
    pub source_name: String,
    /// Index of the document in the text, from 0.
    pub document: usize,
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
}

/// Reads all documents of a text. Empty documents are left out, and the items of `List` objects stand for themselves.
///
/// # Errors
/// A text that is not YAML, a key that is there twice, something that JSON can't hold, or an alias bomb; with its position.
pub fn documents(text: &str, source_name: &str) -> Result<Vec<Value>, YamlError> {
    let mut composer = Composer {
        parser: Parser::new_from_str(text),
        anchors: HashMap::new(),
        aliased: 0,
        document: 0,
    };
    let values = composer.stream().map_err(|error| YamlError {
        source_name: source_name.to_owned(),
        document: composer.document,
        line: error.line,
        column: error.column,
        message: error.message,
    })?;
    let mut flat = Vec::with_capacity(values.len());
    values
        .into_iter()
        .for_each(|value| flatten(value, &mut flat));
    Ok(flat)
}

/// Replaces a `List` object by its items.
fn flatten(mut value: Value, into: &mut Vec<Value>) {
    let is_list = value
        .get("kind")
        .and_then(Value::as_str)
        .is_some_and(|kind| kind.ends_with("List"));
    match value.get_mut("items") {
        Some(Value::Array(items)) if is_list => std::mem::take(items)
            .into_iter()
            .for_each(|item| flatten(item, into)),
        _ => into.push(value),
    }
}

/// What went wrong at a place of the text.
struct Trouble {
    line: usize,
    column: usize,
    message: String,
}

impl Trouble {
    fn at(span: Span, message: impl Into<String>) -> Self {
        Self {
            line: span.start.line(),
            column: span.start.col() + 1,
            message: message.into(),
        }
    }
}

/// Makes values from the parser's events.
struct Composer<'t> {
    parser: Parser<'t, StrInput<'t>>,
    /// Anchored values with their number of nodes, by anchor.
    anchors: HashMap<usize, (Value, usize)>,
    aliased: usize,
    document: usize,
}

impl<'t> Composer<'t> {
    fn next(&mut self) -> Result<(Event<'t>, Span), Trouble> {
        loop {
            match self.parser.next_event() {
                Some(Ok((Event::Comment(..), _))) => {}
                Some(Ok(event)) => return Ok(event),
                Some(Err(error)) => {
                    let mark = error.marker();
                    return Err(Trouble {
                        line: mark.line(),
                        column: mark.col() + 1,
                        message: error.info(),
                    });
                }
                None => return Ok((Event::StreamEnd, Span::default())),
            }
        }
    }

    fn stream(&mut self) -> Result<Vec<Value>, Trouble> {
        let mut values = Vec::new();
        loop {
            match self.next()? {
                (Event::StreamEnd, _) => return Ok(values),
                (Event::DocumentStart(..), _) => {
                    self.anchors.clear();
                    let first = self.next()?;
                    if matches!(first.0, Event::DocumentEnd) {
                        continue;
                    }
                    let value = self.node(first, 0)?.0;
                    if !value.is_null() {
                        values.push(value);
                    }
                }
                (Event::DocumentEnd, _) => self.document += 1,
                _ => {}
            }
        }
    }

    /// Makes one value, with its number of nodes.
    fn node(
        &mut self,
        (event, span): (Event<'t>, Span),
        depth: usize,
    ) -> Result<(Value, usize), Trouble> {
        if depth > MAX_DEPTH {
            return Err(Trouble::at(
                span,
                format!("nested more than {MAX_DEPTH} levels deep"),
            ));
        }
        let (anchor, (value, nodes)) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                (anchor, (scalar(&text, style, tag.as_deref(), span)?, 1))
            }
            Event::SequenceStart(_, anchor, tag) => {
                collection_tag(tag.as_deref(), "seq", span)?;
                (anchor, self.sequence(depth)?)
            }
            Event::MappingStart(_, anchor, tag) => {
                collection_tag(tag.as_deref(), "map", span)?;
                (anchor, self.mapping(depth)?)
            }
            Event::Alias(anchor) => return self.alias(anchor, span),
            _ => return Err(Trouble::at(span, "a value is missing here")),
        };
        if anchor != 0 {
            self.anchors.insert(anchor, (value.clone(), nodes));
        }
        Ok((value, nodes))
    }

    fn alias(&mut self, anchor: usize, span: Span) -> Result<(Value, usize), Trouble> {
        let Some((value, nodes)) = self.anchors.get(&anchor) else {
            return Err(Trouble::at(span, "this alias contains itself"));
        };
        self.aliased = self.aliased.saturating_add(*nodes);
        if self.aliased > MAX_ALIASED_NODES {
            return Err(Trouble::at(
                span,
                "the aliases of this text add up to far more than the text itself; write the values out",
            ));
        }
        Ok((value.clone(), *nodes))
    }

    fn sequence(&mut self, depth: usize) -> Result<(Value, usize), Trouble> {
        let mut items = Vec::new();
        let mut total = 1;
        loop {
            let event = self.next()?;
            if matches!(event.0, Event::SequenceEnd) {
                return Ok((Value::Array(items), total));
            }
            let (item, nodes) = self.node(event, depth + 1)?;
            total += nodes;
            items.push(item);
        }
    }

    fn mapping(&mut self, depth: usize) -> Result<(Value, usize), Trouble> {
        let mut fields = Map::new();
        let mut lines: HashMap<String, usize> = HashMap::new();
        let mut merges = Vec::new();
        let mut total = 1;
        loop {
            let (event, span) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                break;
            }
            let merge =
                matches!(&event, Event::Scalar(text, ScalarStyle::Plain, ..) if text == "<<");
            let key = self.node((event, span), depth + 1)?.0;
            let next = self.next()?;
            let (value, nodes) = self.node(next, depth + 1)?;
            total += nodes + 1;
            if merge {
                merges.push((value, span));
                continue;
            }
            let key = key_text(key, span)?;
            if let Some(first) = lines.insert(key.clone(), span.start.line()) {
                return Err(Trouble::at(
                    span,
                    format!("the key {key:?} is already on line {first}; keep one of them"),
                ));
            }
            fields.insert(key, value);
        }
        for (value, span) in merges {
            merge_into(&mut fields, value, span)?;
        }
        Ok((Value::Object(fields), total))
    }
}

/// Adds the fields of a merged mapping, or of a list of them, that are not there yet.
fn merge_into(fields: &mut Map<String, Value>, value: Value, span: Span) -> Result<(), Trouble> {
    match value {
        Value::Object(merged) => {
            for (key, value) in merged {
                fields.entry(key).or_insert(value);
            }
            Ok(())
        }
        Value::Array(list) => list.into_iter().try_for_each(|item| match item {
            Value::Object(_) => merge_into(fields, item, span),
            _ => Err(Trouble::at(
                span,
                "'<<' takes a mapping or a list of mappings",
            )),
        }),
        _ => Err(Trouble::at(
            span,
            "'<<' takes a mapping or a list of mappings",
        )),
    }
}

/// The text of a key; Go writes numbers and booleans out.
fn key_text(key: Value, span: Span) -> Result<String, Trouble> {
    match key {
        Value::String(text) => Ok(text),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(bool) => Ok(bool.to_string()),
        _ => Err(Trouble::at(
            span,
            "a key has to be a text, a number or a boolean",
        )),
    }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>, span: Span) -> Result<Value, Trouble> {
    let wrong = |message: String| Trouble::at(span, message);
    match tag {
        None if style == ScalarStyle::Plain => resolve::plain(text).map_err(wrong),
        None => Ok(Value::String(text.to_owned())),
        Some(tag) => resolve::tagged(text, tag.core_suffix().unwrap_or_default())
            .ok_or_else(|| wrong(format!("the tag of {text:?} is not supported"))),
    }
}

fn collection_tag(tag: Option<&Tag>, kind: &str, span: Span) -> Result<(), Trouble> {
    match tag {
        Some(tag) if tag.core_suffix() != Some(kind) => Err(Trouble::at(
            span,
            "tags other than !!map and !!seq are not supported here",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn one(text: &str) -> Value {
        documents(text, "test.yaml").expect(text).remove(0)
    }

    #[test]
    fn scalars_are_what_go_makes_of_them() {
        let text = "{a: 0644, b: 0o644, c: yes, d: off, e: 'yes', f: \"0644\", g: 1_000, h: 0x1F, i: 1.0, j: 1e3, k: ~, l: , m: 2026-11-21, v: 1.20.3, o: 08, p: -5, q: .5, r: Y, s: !!str 5, t: 10m}";
        assert_eq!(
            one(text),
            json!({ "a": 420, "b": 420, "c": true, "d": false, "e": "yes", "f": "0644", "g": 1000, "h": 31, "i": 1, "j": 1000, "k": null, "l": null,
                "m": "2026-11-21", "v": "1.20.3", "o": 8, "p": -5, "q": 0.5, "r": true, "s": "5", "t": "10m" })
        );
    }

    #[test]
    fn keys_become_texts() {
        assert_eq!(one("9080: {on: 1}"), json!({ "9080": { "true": 1 } }));
    }

    #[test]
    fn duplicate_keys_name_both_lines() {
        let error =
            documents("a: 1\n---\nb:\n  c: 1\n  d: 2\n  c: 3\n", "x.yaml").expect_err("duplicate");
        assert_eq!((error.document, error.line, error.column), (1, 6, 3));
        assert!(error.message.contains("line 4"), "{error}");
        assert!(
            error.to_string().starts_with("x.yaml:6:3: document 2: "),
            "{error}"
        );
    }

    #[test]
    fn merges_and_aliases() {
        assert_eq!(
            one("a: &a {x: 1, z: 2}\nb:\n  <<: *a\n  x: 3\n")["b"],
            json!({ "x": 3, "z": 2 })
        );
        assert_eq!(one("a: &a [1]\nb: *a")["b"], json!([1]));
    }

    #[test]
    fn alias_bombs_are_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let inner = vec![format!("*a{}", level - 1); 10].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{inner}]\n"));
        }
        let error = documents(&text, "bomb").expect_err("bomb");
        assert!(error.message.contains("aliases"), "{error}");
    }

    #[test]
    fn deep_nesting_is_refused() {
        assert!(documents(&"[".repeat(5_000), "deep").is_err());
        assert!(documents(&"- ".repeat(5_000), "deep").is_err());
    }

    #[test]
    fn lists_are_flattened_and_empty_documents_left_out() {
        let text = "---\n# nothing\n---\nkind: List\nitems:\n- {kind: A}\n- {kind: BList, items: [{kind: B}]}\n---\nkind: C\n---\n";
        assert_eq!(
            documents(text, "x").expect("valid"),
            [
                json!({ "kind": "A" }),
                json!({ "kind": "B" }),
                json!({ "kind": "C" })
            ]
        );
    }

    #[test]
    fn json_is_yaml() {
        assert_eq!(
            one("{\n\t\"a\": [1, \"b\", null, 1.5]\n}"),
            json!({ "a": [1, "b", null, 1.5] })
        );
    }

    #[test]
    fn syntax_errors_have_a_place() {
        let error = documents("a: 1\nb: [1, 2\nc: 3\n", "x.yaml").expect_err("broken");
        assert!(error.line >= 2, "{error}");
        assert!(documents("a: *nope", "x").is_err());
        assert!(documents("a: .nan", "x").is_err());
    }
}
