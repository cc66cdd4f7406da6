//! Writing YAML in kubectl's form: block style, lists not indented, quotes wherever Go would read something other than a text.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::resolve::needs_quotes;

/// Writes one document, ending in a line break.
pub fn to_string(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(fields) if !fields.is_empty() => mapping(&mut out, fields, 0, true),
        Value::Array(items) if !items.is_empty() => sequence(&mut out, items, 0),
        scalar => {
            flow(&mut out, scalar, 0);
            out.push('\n');
        }
    }
    out
}

/// Writes several documents, separated by `---`.
pub fn to_string_all<'a>(values: impl IntoIterator<Item = &'a Value>) -> String {
    values
        .into_iter()
        .map(to_string)
        .collect::<Vec<_>>()
        .join("---\n")
}

fn mapping(out: &mut String, fields: &Map<String, Value>, indent: usize, mut indented: bool) {
    for (key, value) in fields {
        if indented {
            out.extend(std::iter::repeat_n(' ', indent));
        }
        indented = true;
        text(out, key);
        out.push(':');
        match value {
            Value::Object(fields) if !fields.is_empty() => {
                out.push('\n');
                mapping(out, fields, indent + 2, true);
            }
            Value::Array(items) if !items.is_empty() => {
                out.push('\n');
                sequence(out, items, indent);
            }
            scalar => {
                out.push(' ');
                flow(out, scalar, indent + 2);
                out.push('\n');
            }
        }
    }
}

fn sequence(out: &mut String, items: &[Value], indent: usize) {
    for item in items {
        out.extend(std::iter::repeat_n(' ', indent));
        out.push_str("- ");
        match item {
            Value::Object(fields) if !fields.is_empty() => mapping(out, fields, indent + 2, false),
            Value::Array(items) if !items.is_empty() => {
                let mut inner = String::new();
                sequence(&mut inner, items, indent + 2);
                out.push_str(inner.trim_start());
            }
            scalar => {
                flow(out, scalar, indent + 2);
                out.push('\n');
            }
        }
    }
}

/// Writes what fits behind a key or a dash; block texts go on in the next lines.
fn flow(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(bool) => out.push_str(if *bool { "true" } else { "false" }),
        Value::Number(number) => {
            let _ = write!(out, "{number}");
        }
        Value::String(value) if is_block(value) => block(out, value, indent),
        Value::String(value) => text(out, value),
        Value::Array(_) => out.push_str("[]"),
        Value::Object(_) => out.push_str("{}"),
    }
}

/// Several lines that a literal block can hold without loss.
fn is_block(value: &str) -> bool {
    value.trim_end_matches('\n').contains('\n')
        && !value.starts_with([' ', '\n', '\t'])
        && value
            .chars()
            .all(|c| c == '\n' || c == '\t' || !c.is_control())
        && value.lines().all(|line| !line.ends_with([' ', '\t']))
}

fn block(out: &mut String, value: &str, indent: usize) {
    let body = value.trim_end_matches('\n');
    out.push_str(match value.len() - body.len() {
        0 => "|-",
        1 => "|",
        _ => "|+",
    });
    for line in body.split('\n').chain(std::iter::repeat_n(
        "",
        (value.len() - body.len()).saturating_sub(1),
    )) {
        out.push('\n');
        if !line.is_empty() {
            out.extend(std::iter::repeat_n(' ', indent));
            out.push_str(line);
        }
    }
}

/// Writes a text in Go's choice of quotes: none, double ones for what would be another type, single ones for what would be syntax.
fn text(out: &mut String, value: &str) {
    if is_plain(value) {
        out.push_str(value);
    } else if needs_quotes(value) || value.chars().any(is_odd) {
        // A JSON string is a YAML double-quoted one.
        out.push_str(&Value::String(value.to_owned()).to_string());
    } else {
        let _ = write!(out, "'{}'", value.replace('\'', "''"));
    }
}

/// Characters that only double quotes can hold.
fn is_odd(c: char) -> bool {
    c.is_control() || matches!(c, '\u{feff}' | '\u{2028}' | '\u{2029}')
}

fn is_plain(value: &str) -> bool {
    const FIRST: &[char] = &[
        '-', '?', ':', ',', '[', ']', '{', '}', '#', '&', '*', '!', '|', '>', '\'', '"', '%', '@',
        '`',
    ];
    let dash = value.starts_with('-')
        && value.len() > 1
        && !value.starts_with("- ")
        && !value.starts_with("---");
    !needs_quotes(value)
        && (dash || !value.starts_with(FIRST))
        && !value.contains(": ")
        && !value.contains(" #")
        && !value.ends_with(':')
        && value.trim() == value
        && !value.chars().any(is_odd)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let value = json!({
            "yes": "on", "n": "yes", "mode": "0644", "date": "2026-11-21", "empty": "", "null": null, "list": [], "map": {},
            "lines": "a\nb\n", "more": "a\n\nb", "kept": "a\nb\n\n", "odd": "a \nb", "lead": " x", "colon": "a: b", "hash": "a #b",
            "nested": [[1, 2], [{ "a": [{ "b": 1 }], "c": "- x" }], [], {}], "dash": "-x", "tab": "a\tb", "uni": "ü\u{85}", "star": "*",
            "merge": "<<", "float": 1.5, "big": 18446744073709551615u64, "neg": -3, "time": "12:30", "arr": ["a\nb", "~"],
        });
        let text = to_string(&value);
        let back = super::super::documents(&text, "written").expect(&text);
        assert_eq!(back, [value], "{text}");
    }

    #[test]
    fn looks_like_kubectl() {
        let value = json!({ "kind": "A", "spec": { "hosts": ["*", "a.b"], "on": "yes", "http": [{ "route": [{ "weight": 1 }] }] } });
        assert_eq!(
            to_string(&value),
            "kind: A\nspec:\n  hosts:\n  - '*'\n  - a.b\n  \"on\": \"yes\"\n  http:\n  - route:\n    - weight: 1\n"
        );
    }
}
