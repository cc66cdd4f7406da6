//! Durations as Istio's YAML writes them: Go's syntax (`1.5s`, `2m30s`, `500ms`).

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// A length of time, never negative. Istio's kinds allow steps of one millisecond; [`Duration::is_whole_millis`] tells.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Duration(pub std::time::Duration);

/// Why a text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    /// The text has no number, no unit, or something else in it.
    #[error(
        "{0:?} is not a duration; write numbers with units, such as \"1.5s\", \"2m30s\" or \"500ms\""
    )]
    Syntax(String),
    /// Negative durations have no meaning in any field.
    #[error("duration {0:?} is negative")]
    Negative(String),
    /// More than a signed 64-bit count of nanoseconds, Go's limit (292 years).
    #[error("duration {0:?} is too long")]
    TooLong(String),
}

impl Duration {
    /// Makes a duration of whole milliseconds.
    pub const fn from_millis(millis: u64) -> Self {
        Self(std::time::Duration::from_millis(millis))
    }

    /// Makes a duration of whole seconds.
    pub const fn from_secs(secs: u64) -> Self {
        Self(std::time::Duration::from_secs(secs))
    }

    /// True if the duration has no part finer than a millisecond.
    pub fn is_whole_millis(self) -> bool {
        self.0.subsec_nanos().is_multiple_of(1_000_000)
    }

    /// True if the duration has no part finer than a second.
    pub fn is_whole_secs(self) -> bool {
        self.0.subsec_nanos() == 0
    }

    /// True for a length of zero.
    pub fn is_zero(self) -> bool {
        self.0.is_zero()
    }
}

/// Nanoseconds per unit, longest name first so that `ms` is not read as `m`.
const UNITS: [(&str, u128); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

impl FromStr for Duration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, DurationError> {
        let syntax = || DurationError::Syntax(text.to_owned());
        if let Some(rest) = text.strip_prefix('-') {
            let positive: Self = rest.parse().map_err(|_| syntax())?;
            return if positive.is_zero() {
                Ok(positive)
            } else {
                Err(DurationError::Negative(text.to_owned()))
            };
        }
        let mut rest = text.strip_prefix('+').unwrap_or(text);
        if rest == "0" {
            return Ok(Self::default());
        }
        if rest.is_empty() {
            return Err(syntax());
        }
        let mut nanos: u128 = 0;
        while !rest.is_empty() {
            let (part, tail) = element(rest).ok_or_else(syntax)?;
            nanos = nanos
                .checked_add(part)
                .filter(|n| *n <= i64::MAX as u128)
                .ok_or_else(|| DurationError::TooLong(text.to_owned()))?;
            rest = tail;
        }
        Ok(Self(std::time::Duration::new(
            (nanos / 1_000_000_000) as u64,
            (nanos % 1_000_000_000) as u32,
        )))
    }
}

/// Reads one number with its unit; the rest of the text comes back.
fn element(text: &str) -> Option<(u128, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, tail) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || whole.len() > 20 {
        return None;
    }
    let (name, unit) = UNITS.iter().find(|(name, _)| tail.starts_with(name))?;
    let whole: u128 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let mut nanos = whole.checked_mul(*unit)?;
    let mut scale = *unit;
    for digit in fraction.bytes() {
        scale /= 10;
        nanos += u128::from(digit - b'0') * scale;
    }
    Some((nanos, &tail[name.len()..]))
}

impl fmt::Display for Duration {
    /// Writes whole seconds or milliseconds where possible: `2s`, `1500ms`, `1000001ns`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        match nanos {
            n if n % 1_000_000_000 == 0 => write!(f, "{}s", n / 1_000_000_000),
            n if n % 1_000_000 == 0 => write!(f, "{}ms", n / 1_000_000),
            n => write!(f, "{n}ns"),
        }
    }
}

impl fmt::Debug for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

impl JsonSchema for Duration {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_go_syntax() {
        for (text, millis) in [
            ("5s", 5_000),
            ("1.5s", 1_500),
            ("2m30s", 150_000),
            ("500ms", 500),
            ("1h", 3_600_000),
            ("0", 0),
            ("0s", 0),
            (".5s", 500),
            ("1m0.25s", 60_250),
        ] {
            assert_eq!(
                text.parse::<Duration>(),
                Ok(Duration::from_millis(millis)),
                "{text}"
            );
        }
        assert_eq!(
            "1us".parse::<Duration>().map(Duration::is_whole_millis),
            Ok(false)
        );
    }

    #[test]
    fn refuses_what_go_refuses() {
        for text in ["", "5", "s", "1.2.3s", "5 s", "1d", "five", "1s2"] {
            assert!(
                matches!(text.parse::<Duration>(), Err(DurationError::Syntax(_))),
                "{text}"
            );
        }
        assert!(matches!(
            "-1s".parse::<Duration>(),
            Err(DurationError::Negative(_))
        ));
        assert!(matches!(
            "9999999999h".parse::<Duration>(),
            Err(DurationError::TooLong(_))
        ));
    }

    #[test]
    fn writes_what_it_reads() {
        for text in ["5s", "1500ms", "1000001ns"] {
            assert_eq!(
                text.parse::<Duration>().map(|d| d.to_string()),
                Ok(text.to_owned())
            );
        }
    }
}
