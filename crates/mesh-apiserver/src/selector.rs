//! Label and field selectors of lists, watches and objects.

use serde_json::Value;

use crate::errors::ApiError;

/// Longest selector text.
const MAX_BYTES: usize = 16 * 1024;
/// Most conditions in one selector.
const MAX_CONDITIONS: usize = 256;

/// One condition on a label.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Condition {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Missing(String),
    Greater(String, i64),
    Less(String, i64),
}

/// Conditions on labels, all of which must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector(Vec<Condition>);

impl LabelSelector {
    /// Parses the query form, for example `app=web,tier in (a,b),!canary`.
    ///
    /// # Errors
    /// 400 with what is wrong and where.
    pub fn parse(text: &str) -> Result<LabelSelector, ApiError> {
        if text.len() > MAX_BYTES {
            return Err(ApiError::bad_request(
                "unable to parse requirement: the label selector is too long",
            ));
        }
        let mut conditions = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if part.is_empty() {
                continue;
            }
            if conditions.len() == MAX_CONDITIONS {
                return Err(ApiError::bad_request(
                    "unable to parse requirement: too many conditions",
                ));
            }
            conditions.push(parse_condition(part)?);
        }
        Ok(LabelSelector(conditions))
    }

    /// From a `LabelSelector` object (`matchLabels`, `matchExpressions`).
    ///
    /// # Errors
    /// 400 for an unknown operator.
    pub fn from_object(object: &Value) -> Result<LabelSelector, ApiError> {
        let mut conditions = Vec::new();
        for (key, value) in object
            .get("matchLabels")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            conditions.push(Condition::In(
                key.clone(),
                vec![value.as_str().unwrap_or_default().to_owned()],
            ));
        }
        for expression in object
            .get("matchExpressions")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let key = expression["key"].as_str().unwrap_or_default().to_owned();
            let values = expression["values"].as_array().into_iter().flatten();
            let values = values
                .filter_map(|v| v.as_str().map(str::to_owned))
                .collect();
            conditions.push(match expression["operator"].as_str().unwrap_or_default() {
                "In" => Condition::In(key, values),
                "NotIn" => Condition::NotIn(key, values),
                "Exists" => Condition::Exists(key),
                "DoesNotExist" => Condition::Missing(key),
                other => {
                    return Err(ApiError::bad_request(format!(
                        "{other:?} is not a valid label selector operator"
                    )));
                }
            });
        }
        Ok(LabelSelector(conditions))
    }

    /// Whether everything matches.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the labels of `object` match.
    pub fn matches(&self, object: &Value) -> bool {
        self.matches_labels(&object["metadata"]["labels"])
    }

    /// Whether a map of labels (or null) matches.
    pub fn matches_labels(&self, labels: &Value) -> bool {
        let value = |key: &str| labels.get(key).and_then(Value::as_str);
        self.0.iter().all(|condition| match condition {
            Condition::In(key, values) => value(key).is_some_and(|v| values.iter().any(|w| w == v)),
            Condition::NotIn(key, values) => {
                value(key).is_none_or(|v| values.iter().all(|w| w != v))
            }
            Condition::Exists(key) => value(key).is_some(),
            Condition::Missing(key) => value(key).is_none(),
            Condition::Greater(key, n) => value(key)
                .and_then(|v| v.parse::<i64>().ok())
                .is_some_and(|v| v > *n),
            Condition::Less(key, n) => value(key)
                .and_then(|v| v.parse::<i64>().ok())
                .is_some_and(|v| v < *n),
        })
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0usize, 0, Vec::new());
    for (index, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn parse_condition(part: &str) -> Result<Condition, ApiError> {
    let bad =
        |why: &str| ApiError::bad_request(format!("unable to parse requirement: {why}: {part:?}"));
    if let Some(key) = part.strip_prefix('!') {
        return Ok(Condition::Missing(checked_key(key.trim(), part)?));
    }
    if let Some((head, values)) = part.split_once('(') {
        let values = values
            .strip_suffix(')')
            .ok_or_else(|| bad("found no closing parenthesis"))?;
        let values = values.split(',').map(|v| v.trim().to_owned()).collect();
        let mut words = head.split_whitespace();
        let key = checked_key(words.next().unwrap_or_default(), part)?;
        return match (words.next(), words.next()) {
            (Some("in"), None) => Ok(Condition::In(key, values)),
            (Some("notin"), None) => Ok(Condition::NotIn(key, values)),
            _ => Err(bad("expected 'in' or 'notin'")),
        };
    }
    for (operator, negative) in [("!=", true), ("==", false), ("=", false)] {
        if let Some((key, value)) = part.split_once(operator) {
            let key = checked_key(key.trim(), part)?;
            let value = value.trim();
            if value.contains(['=', '!', ' ']) {
                return Err(bad(
                    "a label value has only letters, digits, '-', '_' and '.'",
                ));
            }
            let values = vec![value.to_owned()];
            return Ok(if negative {
                Condition::NotIn(key, values)
            } else {
                Condition::In(key, values)
            });
        }
    }
    for (operator, greater) in [('>', true), ('<', false)] {
        if let Some((key, value)) = part.split_once(operator) {
            let key = checked_key(key.trim(), part)?;
            let number = value
                .trim()
                .parse()
                .map_err(|_| bad("for '>' and '<' the value must be a whole number"))?;
            return Ok(if greater {
                Condition::Greater(key, number)
            } else {
                Condition::Less(key, number)
            });
        }
    }
    Ok(Condition::Exists(checked_key(part, part)?))
}

fn checked_key(key: &str, part: &str) -> Result<String, ApiError> {
    let good = !key.is_empty()
        && key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
    if good {
        Ok(key.to_owned())
    } else {
        Err(ApiError::bad_request(format!(
            "unable to parse requirement: {key:?} is not a label key in {part:?}"
        )))
    }
}

/// Conditions on fields, all of which must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector(Vec<(Vec<String>, bool, String)>);

impl FieldSelector {
    /// Parses `path=value,path!=value`; only the fields that Kubernetes indexes for the kind (and `metadata.*`) may be asked.
    ///
    /// # Errors
    /// 400 for other fields or syntax.
    pub fn parse(
        text: &str,
        storage: &str,
        selectable: &[String],
    ) -> Result<FieldSelector, ApiError> {
        if text.len() > MAX_BYTES {
            return Err(ApiError::bad_request("the field selector is too long"));
        }
        let mut conditions = Vec::new();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let found = [("!=", false), ("==", true), ("=", true)]
                .into_iter()
                .find_map(|(op, equal)| {
                    part.split_once(op)
                        .map(|(path, value)| (path.trim(), equal, value.trim()))
                });
            let Some((path, equal, value)) = found else {
                return Err(ApiError::bad_request(format!(
                    "invalid field selector: {part:?} has neither '=', '==' nor '!='"
                )));
            };
            let path = if storage == "core/events" && path == "source" {
                "source.component"
            } else {
                path
            };
            if !selectable_field(storage, path) && !selectable.iter().any(|s| s == path) {
                return Err(ApiError::bad_request(format!(
                    "field label not supported: {path}"
                )));
            }
            conditions.push((
                path.split('.').map(str::to_owned).collect(),
                equal,
                value.to_owned(),
            ));
        }
        Ok(FieldSelector(conditions))
    }

    /// Whether everything matches.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `object` matches; a missing field counts as empty.
    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(path, equal, wanted)| {
            let mut value = object;
            for key in path {
                value = &value[key.as_str()];
            }
            let same = match value {
                Value::String(text) => text == wanted,
                Value::Null => wanted.is_empty() || wanted == "false",
                other => serde_json::from_str::<Value>(wanted).is_ok_and(|w| w == *other),
            };
            same == *equal
        })
    }
}

/// The name that a field selector insists on, if it does.
pub fn required_name(text: &str) -> Option<&str> {
    text.split(',').find_map(|part| {
        let (path, value) = part.split_once('=')?;
        let value = value.strip_prefix('=').unwrap_or(value).trim();
        (path.trim() == "metadata.name" && !value.is_empty()).then_some(value)
    })
}

fn selectable_field(storage: &str, path: &str) -> bool {
    let fields: &[&str] = match storage {
        "core/pods" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        "core/events" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source.component",
            "type",
        ],
        "core/secrets" => &["type"],
        "core/nodes" => &["spec.unschedulable"],
        "core/namespaces" => &["status.phase"],
        "core/services" => &["spec.clusterIP", "spec.type"],
        "apps/replicasets" => &["status.replicas"],
        _ => &[],
    };
    matches!(path, "metadata.name" | "metadata.namespace") || fields.contains(&path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn label_selectors() {
        let object = json!({ "metadata": { "labels": { "app": "web", "n": "5" } } });
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,n", true),
            ("app!=web", false),
            ("app in (a, web)", true),
            ("app notin (a,b),!x", true),
            ("x", false),
            ("n>4", true),
            ("n<4", false),
            ("x!=1", true),
        ] {
            assert_eq!(
                LabelSelector::parse(text).unwrap().matches(&object),
                expected,
                "{text}"
            );
        }
        for text in ["app in (a", "=x", "a b", "app in x", "n>x"] {
            assert_eq!(LabelSelector::parse(text).unwrap_err().code, 400, "{text}");
        }
    }

    #[test]
    fn field_selectors() {
        let pod =
            json!({ "metadata": { "name": "p" }, "spec": {}, "status": { "phase": "Running" } });
        let parse = |text| FieldSelector::parse(text, "core/pods", &[]);
        assert!(
            parse("spec.nodeName=,status.phase!=Failed")
                .unwrap()
                .matches(&pod)
        );
        assert!(!parse("metadata.name=q").unwrap().matches(&pod));
        assert_eq!(
            parse("spec.containers=x").unwrap_err().message,
            "field label not supported: spec.containers"
        );
    }
}
