//! The differences on purpose: `xtask/differential/differences.yaml`, each with its reason.

use std::cell::Cell;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

/// The file's name without its ending; it lies among the cases.
pub(super) const FILE: &str = "differences";

/// One fact that the proxies disagree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) case: String,
    /// What was sent, for people.
    pub(super) request: String,
    pub(super) field: String,
    /// Empty where there is no such fact.
    pub(super) envoy: String,
    pub(super) mesh: String,
}

/// An entry of the file. Texts may hold `*` for anything.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    #[serde(default = "anything")]
    case: String,
    field: String,
    #[serde(default = "anything")]
    envoy: String,
    #[serde(default = "anything")]
    mesh: String,
    reason: String,
    #[serde(skip)]
    used: Cell<u32>,
}

fn anything() -> String {
    "*".to_owned()
}

/// The whole file.
pub(super) struct Known(Vec<Entry>);

impl Known {
    pub(super) fn load(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(format!("{FILE}.yaml"));
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        let entries: Vec<Entry> =
            serde_yaml::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
        if let Some(entry) = entries.iter().find(|entry| entry.reason.len() < 10) {
            anyhow::bail!("the entry for {} gives no reason", entry.field);
        }
        Ok(Self(entries))
    }

    /// Whether the difference is on purpose; the entry that says so is needed then.
    pub(super) fn covers(&self, difference: &Difference) -> bool {
        let entry = self.0.iter().find(|entry| {
            like(&entry.case, &difference.case)
                && like(&entry.field, &difference.field)
                && like(&entry.envoy, &difference.envoy)
                && like(&entry.mesh, &difference.mesh)
        });
        if let Some(entry) = entry {
            entry.used.set(entry.used.get() + 1);
        }
        entry.is_some()
    }

    /// Entries that nothing needed.
    pub(super) fn unneeded(&self) -> Vec<String> {
        let unused = self.0.iter().filter(|entry| entry.used.get() == 0);
        unused
            .map(|e| {
                format!(
                    "case {}, field {}, envoy {:?}, mesh {:?}: {}",
                    e.case, e.field, e.envoy, e.mesh, e.reason
                )
            })
            .collect()
    }
}

/// Whether `text` fits `pattern`, in which `*` stands for any run of characters.
fn like(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(mut text) = text.strip_prefix(start) else {
        return false;
    };
    loop {
        if like(rest, text) {
            return true;
        }
        let mut chars = text.chars();
        if chars.next().is_none() {
            return false;
        }
        text = chars.as_str();
    }
}

#[cfg(test)]
mod tests {
    use super::like;

    #[test]
    fn patterns_stand_for_what_they_say() {
        for (pattern, text, fits) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("*", "", true),
            ("upstream.*.header.host", "upstream.0.header.host", true),
            ("upstream.*.header.host", "upstream.0.header.hosts", false),
            ("*a*b", "xxaxxb", true),
            ("", "x", false),
        ] {
            assert_eq!(like(pattern, text), fits, "{pattern} {text}");
        }
    }
}
