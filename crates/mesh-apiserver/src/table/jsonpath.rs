//! The part of JSONPath that printer columns use: fields, indexes, `[*]`, and filters `[?(@.a=="b")]`.

use serde_json::Value;

/// The first value at a path such as `.status.conditions[?(@.type=="Ready")].status`.
pub fn first<'a>(root: &'a Value, path: &str) -> Option<&'a Value> {
    let mut found = vec![root];
    let mut rest = path.trim();
    while !rest.is_empty() {
        let (step, after) = next_step(rest)?;
        found = found
            .into_iter()
            .flat_map(|value| apply(value, &step))
            .collect();
        rest = after;
    }
    found.into_iter().next()
}

enum Step {
    Field(String),
    Index(i64),
    Every,
    Filter(Vec<String>, Option<(bool, String)>),
}

fn next_step(text: &str) -> Option<(Step, &str)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (inner, after) = bracket(rest)?;
        return Some((bracket_step(inner)?, after));
    }
    let text = text.trim_start_matches('.');
    if text.starts_with('[') {
        return next_step(text);
    }
    // A dot behind a backslash belongs to the name, as in `.metadata.annotations.example\.com/name`.
    let mut name = String::new();
    let mut chars = text.char_indices();
    while let Some((index, c)) = chars.next() {
        match c {
            '\\' => name.extend(chars.next().map(|(_, c)| c)),
            '.' | '[' => return Some((field(name), &text[index..])),
            c => name.push(c),
        }
    }
    (!name.is_empty()).then(|| (field(name), ""))
}

fn field(name: String) -> Step {
    if name == "*" {
        Step::Every
    } else {
        Step::Field(name)
    }
}

/// Splits at the bracket that closes, past quoted text.
fn bracket(text: &str) -> Option<(&str, &str)> {
    let mut quote = None;
    for (index, c) in text.char_indices() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(q), c) if q == c => quote = None,
            (None, ']') => return Some((&text[..index], &text[index + 1..])),
            _ => {}
        }
    }
    None
}

fn bracket_step(inner: &str) -> Option<Step> {
    let inner = inner.trim();
    if inner == "*" {
        return Some(Step::Every);
    }
    if let Ok(index) = inner.parse() {
        return Some(Step::Index(index));
    }
    let unquote = |text: &str| text.trim().trim_matches(['\'', '"']).to_owned();
    if inner.starts_with(['\'', '"']) {
        return Some(Step::Field(unquote(inner)));
    }
    let filter = inner.strip_prefix("?(")?.strip_suffix(')')?.trim();
    let (path, condition) = match (filter.split_once("=="), filter.split_once("!=")) {
        (Some((path, value)), _) => (path, Some((true, unquote(value)))),
        (None, Some((path, value))) => (path, Some((false, unquote(value)))),
        (None, None) => (filter, None),
    };
    let names = path
        .trim()
        .strip_prefix('@')?
        .split('.')
        .filter(|p| !p.is_empty())
        .map(str::to_owned)
        .collect();
    Some(Step::Filter(names, condition))
}

fn apply<'a>(value: &'a Value, step: &Step) -> Vec<&'a Value> {
    match step {
        Step::Field(name) => value.get(name).into_iter().collect(),
        Step::Index(index) => {
            let Some(list) = value.as_array() else {
                return Vec::new();
            };
            let length = i64::try_from(list.len()).unwrap_or(i64::MAX);
            let index = if *index < 0 { length + index } else { *index };
            usize::try_from(index)
                .ok()
                .and_then(|i| list.get(i))
                .into_iter()
                .collect()
        }
        Step::Every => match value {
            Value::Array(list) => list.iter().collect(),
            Value::Object(map) => map.values().collect(),
            _ => Vec::new(),
        },
        Step::Filter(path, condition) => {
            let items = value.as_array().into_iter().flatten();
            items
                .filter(|item| passes(path.iter().try_fold(*item, |v, key| v.get(key)), condition))
                .collect()
        }
    }
}

fn passes(found: Option<&Value>, condition: &Option<(bool, String)>) -> bool {
    match (condition, found) {
        (None, found) => found.is_some(),
        (Some((equal, wanted)), Some(value)) => {
            let same = value.as_str().map_or_else(
                || serde_json::from_str::<Value>(wanted).is_ok_and(|w| w == *value),
                |text| text == wanted,
            );
            same == *equal
        }
        (Some((equal, _)), None) => !equal,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn printer_column_paths() {
        let object = json!({
            "metadata": { "annotations": { "a.b/c": "x" } },
            "status": { "conditions": [{ "type": "A", "status": "False" }, { "type": "Ready", "status": "True" }] },
        });
        for (path, expected) in [
            (
                ".status.conditions[?(@.type==\"Ready\")].status",
                Some("True"),
            ),
            (".status.conditions[0].type", Some("A")),
            (".status.conditions[-1].type", Some("Ready")),
            (".status.conditions[*].type", Some("A")),
            (".metadata.annotations.a\\.b/c", Some("x")),
            (".metadata.annotations['a.b/c']", Some("x")),
            (".status.nothing", None),
            (".status.conditions[", None),
        ] {
            assert_eq!(
                first(&object, path).and_then(Value::as_str),
                expected,
                "{path}"
            );
        }
    }
}
