//! `Table`: what `kubectl get` prints. The columns of the built-in kinds are in `table/builtin.rs` and
//! `table/workloads.rs`, those of custom kinds in their CRD.

mod builtin;
mod jsonpath;
mod workloads;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::registry::Resource;
use crate::respond::partial;

/// A column: name, type, priority (1 = only with `-o wide`).
type Column = (&'static str, &'static str, u8);

/// A table of objects of one resource; `include` is `None`, `Metadata` or `Object`.
pub fn table(resource: &Resource, objects: &[Value], include: &str, metadata: Value) -> Value {
    let now = Timestamp::now();
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = json!({ "cells": cells(resource, object, now) });
            match include {
                "None" => {}
                "Object" => row["object"] = object.clone(),
                _ => row["object"] = partial(object),
            }
            row
        })
        .collect();
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": definitions(resource), "rows": rows,
    })
}

fn definitions(resource: &Resource) -> Vec<Value> {
    let definition = |(name, kind, priority): &Column| {
        let format = if *name == "Name" { "name" } else { "" };
        json!({ "name": name, "type": kind, "format": format, "description": "", "priority": priority })
    };
    match &resource.columns {
        None => workloads::columns(&resource.storage)
            .unwrap_or_else(|| builtin::columns(&resource.storage))
            .iter()
            .map(definition)
            .collect(),
        Some(custom) => {
            let mut all = vec![definition(&("Name", "string", 0))];
            all.extend(custom.iter().map(|c| c.definition.clone()));
            if custom.is_empty() {
                all.push(definition(&("Age", "date", 0)));
            }
            all
        }
    }
}

fn cells(resource: &Resource, object: &Value, now: Timestamp) -> Vec<Value> {
    let name = object["metadata"]["name"].clone();
    match &resource.columns {
        None => workloads::cells(&resource.storage, object, now)
            .unwrap_or_else(|| builtin::cells(&resource.storage, object, now)),
        Some(custom) if custom.is_empty() => {
            vec![name, age(&object["metadata"]["creationTimestamp"], now)]
        }
        Some(custom) => {
            let mut all = vec![name];
            all.extend(custom.iter().map(|column| {
                let value = jsonpath::first(object, &column.json_path);
                custom_cell(&column.definition["type"], value, now)
            }));
            all
        }
    }
}

fn custom_cell(kind: &Value, value: Option<&Value>, now: Timestamp) -> Value {
    let Some(value) = value else {
        return Value::Null;
    };
    match kind.as_str() {
        Some("date") => age(value, now),
        Some("string") => match value {
            Value::String(_) | Value::Null => value.clone(),
            other => other.to_string().into(),
        },
        Some("integer") => value.as_i64().map_or(Value::Null, Value::from),
        Some("number") => value.as_f64().map_or(Value::Null, Value::from),
        Some("boolean") => value.as_bool().map_or(Value::Null, Value::from),
        _ => value.clone(),
    }
}

/// Time since a timestamp as `kubectl` writes it: `12s`, `3m4s`, `5h`, `2d3h`, `9d`.
fn age(since: &Value, now: Timestamp) -> Value {
    let parsed = since
        .as_str()
        .and_then(|text| text.parse::<Timestamp>().ok());
    parsed.map_or_else(
        || "<unknown>".into(),
        |time| duration(now.as_second() - time.as_second()).into(),
    )
}

/// Kubernetes' `duration.HumanDuration`.
fn duration(seconds: i64) -> String {
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    let s = seconds.max(0);
    let (m, h, d) = (s / 60, s / 3600, s / 86400);
    let pair = |big: i64, unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{big}{unit}"),
        _ => format!("{big}{unit}{small}{small_unit}"),
    };
    match () {
        () if s < 120 => format!("{s}s"),
        () if m < 10 => pair(m, "m", s % 60, "s"),
        () if m < 180 => format!("{m}m"),
        () if h < 8 => pair(h, "h", m % 60, "m"),
        () if h < 48 => format!("{h}h"),
        () if h < 192 => pair(d, "d", h % 24, "h"),
        () if d < 730 => format!("{d}d"),
        () if d < 2920 => pair(d / 365, "y", d % 365, "d"),
        () => format!("{}y", d / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_in_kubectl() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (185, "3m5s"),
            (3600, "60m"),
            (10800, "3h"),
            (12000, "3h20m"),
            (100_000, "27h"),
            (200_000, "2d7h"),
            (864_000, "10d"),
            (-5, "<invalid>"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }
}
