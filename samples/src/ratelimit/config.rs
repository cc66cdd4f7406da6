//! The configuration files: a domain each, with descriptors that nest.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;

/// All domains.
#[derive(Debug, Default)]
pub struct Config {
    domains: BTreeMap<String, Level>,
}

/// One level of descriptors, keyed by `key` or `key_value`.
#[derive(Debug, Default)]
struct Level {
    next: BTreeMap<String, Node>,
    /// Keys of [`Level::next`] that end in `*`, in the order of the file.
    wildcards: Vec<String>,
}

#[derive(Debug, Default)]
struct Node {
    rule: Option<Rule>,
    below: Level,
}

/// A limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Requests in one unit of time.
    pub requests: u32,
    /// The unit.
    pub unit: Unit,
    /// Its name, for the header that lists limits.
    pub name: String,
    /// No limit at all.
    pub unlimited: bool,
    /// Counted, but nobody is refused.
    pub shadow: bool,
}

/// A unit of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// One second.
    Second,
    /// 60 seconds.
    Minute,
    /// 60 minutes.
    Hour,
    /// 24 hours.
    Day,
    /// 7 days.
    Week,
    /// 30 days.
    Month,
    /// 365 days.
    Year,
}

impl Unit {
    /// Its length.
    pub fn seconds(self) -> u64 {
        match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 3600,
            Self::Day => 86_400,
            Self::Week => 7 * 86_400,
            Self::Month => 30 * 86_400,
            Self::Year => 365 * 86_400,
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {reason}")]
pub struct ConfigError {
    file: String,
    reason: String,
}

impl ConfigError {
    fn new(file: &str, reason: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            reason: reason.into(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    domain: String,
    #[serde(default)]
    descriptors: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    key: String,
    #[serde(default)]
    value: String,
    rate_limit: Option<Limit>,
    #[serde(default)]
    descriptors: Vec<Entry>,
    #[serde(default)]
    shadow_mode: bool,
    /// Asks for statistics that are not kept here; they change no answer.
    #[serde(default, rename = "detailed_metric")]
    _detailed_metric: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Limit {
    #[serde(default)]
    name: String,
    unit: Option<Unit>,
    #[serde(default)]
    requests_per_unit: u32,
    #[serde(default)]
    unlimited: bool,
}

/// The `.yaml` files of a directory with their texts, by name. Names that begin with a dot are left out: ConfigMap volumes keep their
/// versions under such names.
pub(super) fn read(directory: &Path) -> std::io::Result<Vec<(String, String)>> {
    let mut texts = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let Some(name) = name.filter(|name| !name.starts_with('.')) else {
            continue;
        };
        if path.extension().is_some_and(|e| e == "yaml" || e == "yml") && path.is_file() {
            texts.push((name, std::fs::read_to_string(&path)?));
        }
    }
    texts.sort();
    Ok(texts)
}

impl Config {
    /// From pairs of file name and text.
    ///
    /// # Errors
    /// A text that is no such file, an unknown field, a domain or descriptor that is there twice.
    pub fn parse(texts: &[(String, String)]) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        for (name, text) in texts {
            let file: File = serde_yaml::from_str(text)
                .map_err(|error| ConfigError::new(name, error.to_string()))?;
            if file.domain.is_empty() {
                return Err(ConfigError::new(name, "domain is empty"));
            }
            let level = Level::of(file.descriptors, &file.domain)
                .map_err(|reason| ConfigError::new(name, reason))?;
            if config.domains.insert(file.domain.clone(), level).is_some() {
                let reason = format!("domain {:?} is in another file, too", file.domain);
                return Err(ConfigError::new(name, reason));
            }
        }
        Ok(config)
    }

    /// The limit for a descriptor, with the path of the rule that it comes from.
    pub fn rule<'a>(
        &self,
        domain: &str,
        entries: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Option<&Rule> {
        let mut level = self.domains.get(domain)?;
        let mut entries = entries.peekable();
        while let Some((key, value)) = entries.next() {
            let node = level.find(key, value)?;
            if entries.peek().is_none() {
                // A limit of a shorter descriptor does not apply to a longer one.
                return node.rule.as_ref();
            }
            level = &node.below;
        }
        None
    }

    /// Numbers of domains and of limits.
    pub fn size(&self) -> (usize, usize) {
        fn limits(level: &Level) -> usize {
            let of = |node: &Node| usize::from(node.rule.is_some()) + limits(&node.below);
            level.next.values().map(of).sum()
        }
        (self.domains.len(), self.domains.values().map(limits).sum())
    }
}

impl Level {
    fn of(entries: Vec<Entry>, path: &str) -> Result<Self, String> {
        let mut level = Self::default();
        for entry in entries {
            if entry.key.is_empty() {
                return Err(format!("a descriptor below {path} has no key"));
            }
            let name = match entry.value.as_str() {
                "" => entry.key.clone(),
                value => format!("{}_{value}", entry.key),
            };
            let path = format!("{path}.{name}");
            let node = Node {
                rule: entry
                    .rate_limit
                    .map(|limit| limit.rule(entry.shadow_mode, &path))
                    .transpose()?,
                below: Self::of(entry.descriptors, &path)?,
            };
            if name.ends_with('*') {
                level.wildcards.push(name.clone());
            }
            if level.next.insert(name, node).is_some() {
                return Err(format!("descriptor {path} is there twice"));
            }
        }
        Ok(level)
    }

    /// Key and value, then values with a wildcard, then the key alone.
    fn find(&self, key: &str, value: &str) -> Option<&Node> {
        let whole = format!("{key}_{value}");
        let wildcard = || {
            let fits = |name: &&String| {
                name.strip_suffix('*')
                    .is_some_and(|start| whole.starts_with(start))
            };
            self.next.get(self.wildcards.iter().find(fits)?)
        };
        self.next
            .get(&whole)
            .or_else(wildcard)
            .or_else(|| self.next.get(key))
    }
}

impl Limit {
    fn rule(self, shadow: bool, path: &str) -> Result<Rule, String> {
        let unit = match (self.unit, self.unlimited) {
            (Some(_), true) => {
                return Err(format!("the limit of {path} has a unit and is unlimited"));
            }
            (None, false) => return Err(format!("the limit of {path} has no unit")),
            (unit, _) => unit.unwrap_or(Unit::Second),
        };
        Ok(Rule {
            requests: self.requests_per_unit,
            unit,
            name: self.name,
            unlimited: self.unlimited,
            shadow,
        })
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn level(f: &mut fmt::Formatter<'_>, path: &str, at: &Level) -> fmt::Result {
            for (name, node) in &at.next {
                let path = format!("{path}.{name}");
                if let Some(rule) = &node.rule {
                    writeln!(
                        f,
                        "{path}: unit={:?} requests_per_unit={}, shadow_mode: {}",
                        rule.unit, rule.requests, rule.shadow
                    )?;
                }
                level(f, &path, &node.below)?;
            }
            Ok(())
        }
        for (domain, descriptors) in &self.domains {
            level(f, domain, descriptors)?;
        }
        Ok(())
    }
}
