//! Paths into a tree of settings, as `--set` and the patches of overlays write them, and how one tree is laid over another.

use serde_json::{Map, Value, json};

/// A step of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// A field.
    Key(String),
    /// An item of a list by its position.
    Index(usize),
    /// The item of a list whose field has a value: `[name:istio-ingressgateway]`.
    Item(String, String),
}

/// Longest list that a position may ask for.
const MAX_INDEX: usize = 1000;

/// Reads `a.b[0].c` and `a.[name:x].c`; a point that belongs to a name is written `\.`.
pub(super) fn parse(text: &str) -> Result<Vec<Step>, String> {
    let mut steps = Vec::new();
    let mut key = String::new();
    let mut rest = text.chars();
    let end = |key: &mut String, steps: &mut Vec<Step>| {
        if !key.is_empty() {
            steps.push(Step::Key(std::mem::take(key)));
        }
    };
    while let Some(character) = rest.next() {
        match character {
            '\\' => key.extend(rest.next()),
            '.' => end(&mut key, &mut steps),
            '[' => {
                end(&mut key, &mut steps);
                let inside: String = rest.by_ref().take_while(|c| *c != ']').collect();
                steps.push(bracket(&inside)?);
            }
            other => key.push(other),
        }
    }
    end(&mut key, &mut steps);
    match steps.first() {
        Some(Step::Key(_)) => Ok(steps),
        _ => Err(format!("{text:?} is not a path such as values.global.hub")),
    }
}

fn bracket(inside: &str) -> Result<Step, String> {
    if let Ok(index) = inside.parse::<usize>() {
        return match index {
            0..MAX_INDEX => Ok(Step::Index(index)),
            _ => Err(format!("[{index}]: no list is that long")),
        };
    }
    match inside.split_once(':') {
        Some((field, value)) if !field.is_empty() && !value.is_empty() => {
            Ok(Step::Item(field.to_owned(), value.to_owned()))
        }
        _ => Err(format!(
            "[{inside}]: write the position of an item, such as [0], or one of its fields, such as [name:istio-ingressgateway]"
        )),
    }
}

/// A path as the table of settings names it: `a[].b`.
pub(super) fn pattern(steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        match step {
            Step::Key(key) => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(key);
            }
            Step::Index(_) | Step::Item(..) => text.push_str("[]"),
        }
    }
    text
}

/// Sets what is at a path; what is missing on the way is made.
pub(super) fn set(root: &mut Value, steps: &[Step], value: Value) -> Result<(), String> {
    match at(root, steps, true)? {
        Some(place) => {
            *place = value;
            Ok(())
        }
        None => Err(format!("{} is not there", pattern(steps))),
    }
}

/// Removes what is at a path; false if there is nothing.
pub(super) fn remove(root: &mut Value, steps: &[Step]) -> Result<bool, String> {
    let Some((last, before)) = steps.split_last() else {
        return Ok(false);
    };
    let Some(parent) = at(root, before, false)? else {
        return Ok(false);
    };
    Ok(match (last, parent) {
        (Step::Key(key), Value::Object(map)) => map.shift_remove(key).is_some(),
        (Step::Index(index), Value::Array(items)) if *index < items.len() => {
            items.remove(*index);
            true
        }
        (Step::Item(field, value), Value::Array(items)) => {
            let before = items.len();
            items.retain(|item| item[field] != value.as_str());
            items.len() < before
        }
        _ => false,
    })
}

/// The place of a path.
fn at<'a>(
    root: &'a mut Value,
    steps: &[Step],
    make: bool,
) -> Result<Option<&'a mut Value>, String> {
    let mut place = root;
    for (depth, step) in steps.iter().enumerate() {
        let here = || pattern(&steps[..depth]);
        if place.is_null() {
            if !make {
                return Ok(None);
            }
            *place = match step {
                Step::Key(_) => json!({}),
                _ => json!([]),
            };
        }
        let next = match (step, place) {
            (Step::Key(key), Value::Object(map)) => match make {
                true => Some(map.entry(key).or_insert(Value::Null)),
                false => map.get_mut(key),
            },
            (Step::Key(_), _) => return Err(format!("{} is not a map", here())),
            (Step::Index(index), Value::Array(items)) => {
                if make && *index == items.len() {
                    items.push(Value::Null);
                }
                items.get_mut(*index)
            }
            (Step::Item(field, value), Value::Array(items)) => item(items, field, value, make),
            _ => return Err(format!("{} is not a list", here())),
        };
        match next {
            Some(next) => place = next,
            None if make => {
                return Err(format!("{} has no such item", pattern(&steps[..=depth])));
            }
            None => return Ok(None),
        }
    }
    Ok(Some(place))
}

fn item<'a>(
    items: &'a mut Vec<Value>,
    field: &str,
    value: &str,
    make: bool,
) -> Option<&'a mut Value> {
    let found = items.iter().position(|item| item[field] == value);
    let index = match found {
        Some(index) => index,
        None if make => {
            items.push(json!({ field: value }));
            items.len() - 1
        }
        None => return None,
    };
    items.get_mut(index)
}

/// Lists whose items are laid over each other by name; others are replaced.
const BY_NAME: [&str; 4] = ["ingressGateways", "egressGateways", "env", "webhooks"];

/// Lays a tree over another: maps key by key, `null` removes, everything else is replaced.
pub(super) fn merge(base: &mut Value, over: Value) {
    merge_field("", base, over);
}

fn merge_field(field: &str, base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge_key(base, key, value);
            }
        }
        (Value::Array(base), Value::Array(over)) if BY_NAME.contains(&field) => {
            for value in over {
                let name = value["name"].clone();
                let known = base
                    .iter_mut()
                    .find(|item| name.is_string() && item["name"] == name);
                match known {
                    // An environment variable is a value or a reference, never both.
                    Some(item) if field == "env" => *item = value,
                    Some(item) => merge_field("", item, value),
                    None => base.push(value),
                }
            }
        }
        (base, over) => *base = over,
    }
}

fn merge_key(base: &mut Map<String, Value>, key: String, value: Value) {
    if value.is_null() {
        base.shift_remove(&key);
        return;
    }
    match base.get_mut(&key) {
        Some(present) => merge_field(&key, present, value),
        None => {
            base.insert(key, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set_text(root: &mut Value, path: &str, value: Value) -> Result<(), String> {
        set(root, &parse(path)?, value)
    }

    #[test]
    fn paths_lead_to_fields_and_items() {
        let mut root = json!({ "g": [{ "name": "a" }] });
        set_text(&mut root, "x.y", json!(1)).expect("made");
        set_text(&mut root, "g[0].k", json!(2)).expect("by position");
        set_text(&mut root, "g[name:b].k", json!(3)).expect("by name");
        set_text(&mut root, "g.[name:a].m", json!(4)).expect("with a point");
        set_text(&mut root, r"n.kubernetes\.io/os", json!("linux")).expect("escaped");
        let expected = json!({
            "g": [{ "name": "a", "k": 2, "m": 4 }, { "name": "b", "k": 3 }],
            "x": { "y": 1 }, "n": { "kubernetes.io/os": "linux" },
        });
        assert_eq!(root, expected);
        assert!(remove(&mut root, &parse("g[name:a].k").expect("path")).expect("removed"));
        assert!(!remove(&mut root, &parse("q.r").expect("path")).expect("nothing"));
        assert!(remove(&mut root, &parse("g[1]").expect("path")).expect("removed"));
        assert_eq!(root["g"], json!([{ "name": "a", "m": 4 }]));
    }

    #[test]
    fn wrong_paths_say_why() {
        let mut root = json!({ "a": 1, "l": [] });
        for (path, part) in [
            ("a.b", "a is not a map"),
            ("l[3].x", "no such item"),
            ("a[0]", "a is not a list"),
            ("[0].x", "not a path"),
            ("", "not a path"),
            ("l[x]", "position"),
            ("l[99999]", "that long"),
        ] {
            let error = set_text(&mut root, path, json!(1)).expect_err(path);
            assert!(error.contains(part), "{path}: {error}");
        }
    }

    #[test]
    fn trees_are_laid_over_each_other() {
        let mut base = json!({
            "a": { "b": 1, "c": 2 }, "l": [1, 2],
            "ingressGateways": [{ "name": "x", "enabled": true, "k8s": { "env": [{ "name": "E", "value": "1" }] } }],
        });
        let over = json!({
            "a": { "b": null, "d": 3 }, "l": [3],
            "ingressGateways": [
                { "name": "x", "k8s": { "env": [{ "name": "E", "value": "2" }, { "name": "F", "value": "3" }] } },
                { "name": "y" },
            ],
        });
        merge(&mut base, over);
        let expected = json!({
            "a": { "c": 2, "d": 3 }, "l": [3],
            "ingressGateways": [
                { "name": "x", "enabled": true, "k8s": { "env": [{ "name": "E", "value": "2" }, { "name": "F", "value": "3" }] } },
                { "name": "y" },
            ],
        });
        assert_eq!(base, expected);
    }
}
