//! Tables in kubectl's form, from what the server prints.

use serde_json::Value;

/// Rows of text under headings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Table {
    headings: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// Which columns are shown.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Columns {
    /// Columns of low priority too.
    pub(crate) wide: bool,
    /// The namespace first.
    pub(crate) namespace: bool,
    /// The labels last.
    pub(crate) labels: bool,
}

impl Table {
    /// Makes a table from its cells.
    pub(crate) fn new(headings: &[&str], rows: Vec<Vec<String>>) -> Self {
        let shown = |cell: String| text(&Value::String(cell));
        Self {
            headings: headings.iter().map(|h| (*h).to_owned()).collect(),
            rows: rows
                .into_iter()
                .map(|row| row.into_iter().map(shown).collect())
                .collect(),
        }
    }

    /// Makes a table from a server's `Table` object. Names get `prefix` (a kind with a slash).
    pub(crate) fn from_server(table: &Value, columns: Columns, prefix: &str) -> Self {
        let definitions: Vec<&Value> = table["columnDefinitions"]
            .as_array()
            .into_iter()
            .flatten()
            .collect();
        let shown =
            |definition: &Value| columns.wide || definition["priority"].as_i64().unwrap_or(0) == 0;
        let mut headings: Vec<String> = definitions
            .iter()
            .filter(|d| shown(d))
            .map(|d| d["name"].as_str().unwrap_or_default().to_uppercase())
            .collect();
        if columns.namespace {
            headings.insert(0, "NAMESPACE".to_owned());
        }
        if columns.labels {
            headings.push("LABELS".to_owned());
        }
        let rows = table["rows"].as_array().into_iter().flatten().map(|row| {
            let mut cells = Vec::new();
            if columns.namespace {
                cells.push(text(&row["object"]["metadata"]["namespace"]));
            }
            for (definition, cell) in definitions
                .iter()
                .zip(row["cells"].as_array().into_iter().flatten())
                .filter(|(d, _)| shown(d))
            {
                let name = definition["format"] == "name"
                    || definition["name"]
                        .as_str()
                        .is_some_and(|name| name.eq_ignore_ascii_case("name"));
                cells.push(if name {
                    format!("{prefix}{}", text(cell))
                } else {
                    text(cell)
                });
            }
            if columns.labels {
                cells.push(labels(&row["object"]["metadata"]["labels"]));
            }
            cells
        });
        Self {
            rows: rows.collect(),
            headings,
        }
    }

    /// True if there is no row.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Width of each column.
    pub(crate) fn widths(&self) -> Vec<usize> {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells
                .chain(self.headings.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        (0..self.headings.len()).map(width).collect()
    }

    /// The table as text, with columns at least as wide as given; each line ends without blanks.
    pub(crate) fn render(&self, widths: &[usize], headings: bool) -> String {
        let mut out = String::new();
        let headings = headings.then_some(&self.headings);
        for row in headings.into_iter().chain(&self.rows) {
            let mut line = String::new();
            for (index, cell) in row.iter().enumerate() {
                line.push_str(cell);
                let width = widths.get(index).copied().unwrap_or(0) + 3;
                line.extend(std::iter::repeat_n(
                    ' ',
                    width.saturating_sub(cell.chars().count()),
                ));
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// One cell. Control characters could make a terminal do things, and a cell is one line.
fn text(cell: &Value) -> String {
    let raw = match cell {
        Value::Null => "<none>".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    raw.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn labels(labels: &Value) -> String {
    match labels.as_object() {
        Some(map) if !map.is_empty() => map
            .iter()
            .map(|(key, value)| format!("{key}={}", text(value)))
            .collect::<Vec<_>>()
            .join(","),
        _ => "<none>".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn table() -> Value {
        json!({
            "columnDefinitions": [{ "name": "Name", "format": "name" }, { "name": "Ready", "priority": 0 }, { "name": "IP", "priority": 1 }],
            "rows": [
                { "cells": ["reviews-v1", "2/2", "10.244.0.3"], "object": { "metadata": { "namespace": "default", "labels": { "app": "reviews" } } } },
                { "cells": ["x\u{1b}[2J", 1, null], "object": { "metadata": { "namespace": "b" } } },
            ],
        })
    }

    #[test]
    fn looks_like_kubectl() {
        let narrow = Table::from_server(&table(), Columns::default(), "");
        assert_eq!(
            narrow.render(&narrow.widths(), true),
            "NAME         READY\nreviews-v1   2/2\nx\u{fffd}[2J        1\n"
        );
        let all = Table::from_server(
            &table(),
            Columns {
                wide: true,
                namespace: true,
                labels: true,
            },
            "pod/",
        );
        let text = all.render(&all.widths(), true);
        assert!(text.starts_with("NAMESPACE   NAME             READY   IP           LABELS\ndefault     pod/reviews-v1   2/2     10.244.0.3   app=reviews\n"), "{text}");
        assert!(text.contains("<none>"), "{text}");
    }
}
