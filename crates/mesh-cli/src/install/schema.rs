//! Which settings there are: the table `paths.txt`, checks against it, and what somebody probably meant.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde_json::Value;

use super::path::{Step, pattern};

/// What a setting holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Text,
    Bool,
    Int,
    Percent,
    Texts,
    Map,
    Object,
    Objects,
    /// One of the texts between `|`.
    OneOf(&'static str),
    /// Istio has it and this mesh does not; what to do instead.
    No(&'static str),
}

/// A setting that can't be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// There is no such path.
    #[error("{path}: there is no such setting{}", meant(.nearest))]
    Unknown {
        /// The path.
        path: String,
        /// What was probably meant; empty if nothing is near.
        nearest: String,
    },
    /// A value of the wrong form.
    #[error("{path}: {given} is not what is wanted here: {wanted}")]
    Type {
        /// The path.
        path: String,
        /// The value.
        given: String,
        /// What it should be.
        wanted: String,
    },
    /// A setting of Istio's that this mesh does not have.
    #[error("{path}: this mesh does not have this setting of Istio's: {instead}")]
    Unsupported {
        /// The path.
        path: String,
        /// What to do instead.
        instead: &'static str,
    },
}

fn meant(nearest: &str) -> String {
    match nearest {
        "" => "; `mesh profile dump` shows those that are set".to_owned(),
        nearest => format!("; did you mean {nearest}?"),
    }
}

/// The table, by path.
static TABLE: LazyLock<BTreeMap<String, Type>> = LazyLock::new(|| read(include_str!("paths.txt")));

fn read(text: &'static str) -> BTreeMap<String, Type> {
    let lines = || {
        text.lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
    };
    let mut blocks: BTreeMap<&str, Vec<(&str, &'static str)>> = BTreeMap::new();
    for line in lines().filter(|line| line.starts_with('@')) {
        if let Some((block, (path, kind))) = line
            .split_once(' ')
            .and_then(|(block, rest)| Some((block, rest.split_once(' ')?)))
        {
            blocks.entry(block).or_default().push((path, kind));
        }
    }
    let mut table = BTreeMap::new();
    for line in lines().filter(|line| !line.starts_with('@')) {
        if let Some((path, kind)) = line.split_once(' ') {
            insert(&mut table, &blocks, path, kind);
        }
    }
    table
}

/// Blocks are two deep: a gateway has Kubernetes' settings.
fn insert(
    table: &mut BTreeMap<String, Type>,
    blocks: &BTreeMap<&str, Vec<(&str, &'static str)>>,
    path: &str,
    kind: &'static str,
) {
    if !kind.starts_with('@') {
        table.insert(path.to_owned(), kind_of(kind));
        return;
    }
    for (below, kind) in blocks.get(kind).into_iter().flatten() {
        insert(table, blocks, &format!("{path}.{below}"), kind);
    }
}

fn kind_of(text: &'static str) -> Type {
    match text {
        "text" => Type::Text,
        "bool" => Type::Bool,
        "int" => Type::Int,
        "percent" => Type::Percent,
        "texts" => Type::Texts,
        "map" => Type::Map,
        "object" => Type::Object,
        "objects" => Type::Objects,
        other => match other.strip_prefix("no ") {
            Some(instead) => Type::No(instead),
            None => Type::OneOf(other),
        },
    }
}

/// Settings with their types, for tests and for the value of `--set`.
pub(super) fn settings() -> impl Iterator<Item = (&'static str, Type)> {
    TABLE.iter().map(|(path, kind)| (path.as_str(), *kind))
}

/// The value that a text stands for in `--set PATH=TEXT`.
///
/// # Errors
/// A path that there is not, and a text that is not of the setting's type.
pub(super) fn value_of(steps: &[Step], text: &str) -> Result<Value, SettingError> {
    let path = pattern(steps);
    let wrong = |wanted: &str| SettingError::Type {
        path: path.clone(),
        given: format!("{text:?}"),
        wanted: wanted.to_owned(),
    };
    if text == "null" {
        return Ok(Value::Null);
    }
    match TABLE.get(&path) {
        Some(Type::Text | Type::OneOf(_) | Type::Percent) => Ok(Value::from(text)),
        Some(Type::Bool) => match text {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            _ => Err(wrong("true or false")),
        },
        Some(Type::Int) => text
            .parse::<i64>()
            .map(Value::from)
            .map_err(|_| wrong("a whole number")),
        Some(Type::Texts) => Ok(list(text).unwrap_or_else(|| vec![text.to_owned()]).into()),
        // Below a map of texts everything is a text, below an object what it looks like.
        None if steps_in_map(steps) => Ok(Value::from(text)),
        _ => Ok(looks_like(text)),
    }
}

fn steps_in_map(steps: &[Step]) -> bool {
    (1..steps.len()).any(|end| TABLE.get(&pattern(&steps[..end])) == Some(&Type::Map))
}

/// `{a,b}`, as Helm writes lists.
fn list(text: &str) -> Option<Vec<String>> {
    let inside = text.strip_prefix('{')?.strip_suffix('}')?;
    let items = inside.split(',').map(str::trim);
    Some(
        items
            .filter(|item| !item.is_empty())
            .map(str::to_owned)
            .collect(),
    )
}

fn looks_like(text: &str) -> Value {
    match text {
        "true" => return Value::Bool(true),
        "false" => return Value::Bool(false),
        "{}" => return serde_json::json!({}),
        "[]" => return serde_json::json!([]),
        _ => {}
    }
    if let Some(items) = list(text) {
        return items.iter().map(|item| looks_like(item)).collect();
    }
    let plain = text == "0" || !text.trim_start_matches('-').starts_with('0');
    match text.parse::<i64>() {
        Ok(number) if plain => Value::from(number),
        _ => Value::from(text),
    }
}

/// Checks a whole tree of settings.
///
/// # Errors
/// The first setting that there is not, that has a value of the wrong form, or that this mesh does not have.
pub(super) fn check(spec: &Value) -> Result<(), SettingError> {
    walk("", "", spec)
}

/// `pattern` is the path in the table, `path` as the person wrote it.
fn walk(pattern: &str, path: &str, value: &Value) -> Result<(), SettingError> {
    if let Some(kind) = TABLE.get(pattern) {
        return match value {
            Value::Null => Ok(()),
            value => typed(*kind, path, value),
        };
    }
    let wrong = |wanted: &str| SettingError::Type {
        path: path.to_owned(),
        given: shown(value),
        wanted: wanted.to_owned(),
    };
    let below = |mark: &str| {
        let start = format!("{pattern}{mark}");
        TABLE
            .range(start.clone()..)
            .next()
            .is_some_and(|(key, _)| key.starts_with(&start))
    };
    if !pattern.is_empty() && below("[]") {
        if value.is_null() {
            return Ok(());
        }
        let items = value.as_array().ok_or_else(|| wrong("a list"))?;
        for (index, item) in items.iter().enumerate() {
            walk(&format!("{pattern}[]"), &format!("{path}[{index}]"), item)?;
        }
        return Ok(());
    }
    if !pattern.is_empty() && !below(".") {
        return Err(unknown(pattern, path, value));
    }
    if value.is_null() {
        return Ok(());
    }
    let map = value
        .as_object()
        .ok_or_else(|| wrong("a map of settings"))?;
    let join = |left: &str, key: &str| match left {
        "" => key.to_owned(),
        left => format!("{left}.{key}"),
    };
    for (key, value) in map {
        walk(&join(pattern, key), &join(path, key), value)?;
    }
    Ok(())
}

/// Names the setting as a person wrote it, down to its value.
fn unknown(pattern: &str, path: &str, value: &Value) -> SettingError {
    let mut below = String::new();
    let mut place = value;
    while let Some((key, next)) = place.as_object().and_then(|map| map.iter().next()) {
        below.push('.');
        below.push_str(key);
        place = next;
    }
    let whole = nearest(&format!("{pattern}{below}"));
    SettingError::Unknown {
        path: format!("{path}{below}"),
        nearest: match whole.as_str() {
            "" => nearest(pattern),
            _ => whole,
        },
    }
}

fn typed(kind: Type, path: &str, value: &Value) -> Result<(), SettingError> {
    let texts = |value: &Value| {
        value
            .as_array()
            .is_some_and(|items| items.iter().all(Value::is_string))
    };
    let (fits, wanted) = match kind {
        Type::Text => (
            value.is_string(),
            "a text (in quotes where it looks like a number)".to_owned(),
        ),
        Type::Bool => (value.is_boolean(), "true or false".to_owned()),
        Type::Int => (value.is_i64(), "a whole number".to_owned()),
        Type::Percent => (
            value.is_i64() || value.is_string(),
            "a whole number or a percentage such as 25%".to_owned(),
        ),
        Type::Texts => (texts(value), "a list of texts".to_owned()),
        Type::Map => (
            value
                .as_object()
                .is_some_and(|map| map.values().all(Value::is_string)),
            "a map of texts (in quotes where they look like something else)".to_owned(),
        ),
        Type::Object => (value.is_object(), "a map".to_owned()),
        Type::Objects => (
            value
                .as_array()
                .is_some_and(|items| items.iter().all(Value::is_object)),
            "a list of maps".to_owned(),
        ),
        Type::OneOf(names) => (
            value
                .as_str()
                .is_some_and(|text| names.split('|').any(|name| name == text)),
            names.replace('|', ", "),
        ),
        Type::No(instead) => {
            // What is switched off is not missed.
            if is_off(value) {
                return Ok(());
            }
            return Err(SettingError::Unsupported {
                path: path.to_owned(),
                instead,
            });
        }
    };
    if fits {
        return Ok(());
    }
    Err(SettingError::Type {
        path: path.to_owned(),
        given: shown(value),
        wanted,
    })
}

/// False, empty, or made of nothing else.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.iter().all(is_off),
        Value::Object(map) => map.values().all(is_off),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// The setting that was probably meant: one that ends in these words, else the one with the fewest letters changed.
fn nearest(given: &str) -> String {
    let supported = || settings().filter(|(_, kind)| !matches!(kind, Type::No(_)));
    let tail = format!(".{given}");
    if let Some((path, _)) = supported().find(|(path, _)| path.ends_with(&tail)) {
        return path.to_owned();
    }
    let best = supported().map(|(path, _)| (distance(given, path), path));
    best.min()
        .filter(|(changes, _)| *changes <= given.len() / 3 + 1)
        .map(|(_, path)| path.to_owned())
        .unwrap_or_default()
}

/// Letters to insert, remove or replace.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.to_lowercase().chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.to_lowercase().chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::install::path;

    #[test]
    fn wrong_settings_are_refused_with_what_was_meant() {
        let of = |spec: Value| check(&spec).expect_err("refused").to_string();
        for (spec, expected) in [
            (
                json!({ "values": { "global": { "hubb": "x" } } }),
                "values.global.hubb: there is no such setting; did you mean values.global.hub?",
            ),
            (
                json!({ "pilot": { "autoscaleEnabled": true } }),
                "pilot.autoscaleEnabled: there is no such setting; did you mean values.pilot.autoscaleEnabled?",
            ),
            (
                json!({ "components": { "pilots": {} } }),
                "components.pilots: there is no such setting",
            ),
            (
                json!({ "zzz": 1 }),
                "zzz: there is no such setting; `mesh profile dump` shows those that are set",
            ),
            (
                json!({ "components": { "pilot": { "enabled": "yes" } } }),
                "components.pilot.enabled: \"yes\" is not what is wanted here: true or false",
            ),
            (
                json!({ "tag": 1.2 }),
                "tag: 1.2 is not what is wanted here: a text (in quotes where it looks like a number)",
            ),
            (
                json!({ "components": { "ingressGateways": [{ "k8s": { "replicas": 2 } }] } }),
                "components.ingressGateways[0].k8s.replicas: there is no such setting",
            ),
            (
                json!({ "components": { "ingressGateways": {} } }),
                "components.ingressGateways: {} is not what is wanted here: a list",
            ),
            (
                json!({ "values": { "gateways": { "istio-ingressgateway": { "type": "Nodeport" } } } }),
                "values.gateways.istio-ingressgateway.type: \"Nodeport\" is not what is wanted here: ClusterIP, LoadBalancer, NodePort",
            ),
            (
                json!({ "components": { "cni": { "enabled": true } } }),
                "components.cni: this mesh does not have this setting of Istio's: capture is set up",
            ),
            (
                json!({ "components": 5 }),
                "components: 5 is not what is wanted here: a map of settings",
            ),
        ] {
            let error = of(spec);
            assert!(error.contains(expected), "{error}");
        }
        let off = json!({ "components": { "cni": { "enabled": false } }, "values": { "global": { "variant": "" } } });
        assert_eq!(check(&off), Ok(()));
    }

    #[test]
    fn texts_become_what_the_setting_holds() {
        let of = |path: &str, text: &str| {
            value_of(&path::parse(path).expect("path"), text).map_err(|error| error.to_string())
        };
        assert_eq!(of("tag", "1.20"), Ok(json!("1.20")));
        assert_eq!(of("components.pilot.enabled", "true"), Ok(json!(true)));
        assert_eq!(of("components.pilot.k8s.replicaCount", "2"), Ok(json!(2)));
        assert_eq!(
            of("components.pilot.k8s.resources.requests.cpu", "500m"),
            Ok(json!("500m"))
        );
        assert_eq!(
            of("components.pilot.k8s.nodeSelector.disk", "1"),
            Ok(json!("1"))
        );
        assert_eq!(
            of("meshConfig.defaultConfig.concurrency", "2"),
            Ok(json!(2))
        );
        assert_eq!(
            of("values.global.imagePullSecrets", "{a,b}"),
            Ok(json!(["a", "b"]))
        );
        assert!(
            of("components.pilot.enabled", "yes")
                .is_err_and(|error| error.contains("true or false"))
        );
    }

    /// Every line of the table is one that the reader understood.
    #[test]
    fn the_table_is_whole() {
        assert!(settings().count() > 200);
        for (path, kind) in settings() {
            assert!(!path.contains('@'), "{path}");
            if let Type::OneOf(names) = kind {
                assert!(!names.contains(' '), "{path}: {names}");
            }
        }
    }
}
