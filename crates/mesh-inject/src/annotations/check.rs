//! Forms that values of annotations must have.

use serde_json::{Value, json};

use super::wrong;
use crate::{InjectError, PodView};

/// Lists of ports and ranges that say what is captured.
pub(super) struct Lists<'a, 'b>(pub(super) &'a PodView<'b>);

impl Lists<'_, '_> {
    /// A list of ports, without blanks.
    pub(super) fn ports(
        &self,
        name: &str,
        default: &str,
        star: bool,
    ) -> Result<String, InjectError> {
        let port = |port: &str| port.parse::<u16>().is_ok();
        self.list(
            name,
            default,
            star,
            port,
            "a list of ports separated by commas",
        )
    }

    /// A list of ranges, without blanks.
    pub(super) fn ranges(
        &self,
        name: &str,
        default: &str,
        star: bool,
    ) -> Result<String, InjectError> {
        let expected = "a list of ranges such as 10.0.0.0/8 separated by commas";
        self.list(name, default, star, is_cidr, expected)
    }

    fn list(
        &self,
        name: &str,
        default: &str,
        star: bool,
        right: impl Fn(&str) -> bool,
        expected: &str,
    ) -> Result<String, InjectError> {
        let name = format!("traffic.sidecar.istio.io/{name}");
        let value = self.0.annotation(&name).unwrap_or(default);
        let list = compact(value);
        // "Everything" makes sense of what is captured, not of what is left out.
        if (star && list == "*") || list.is_empty() || list.split(',').all(right) {
            return Ok(list);
        }
        let or = if star { ", or \"*\"" } else { "" };
        Err(wrong(&name, value, &format!("{expected}{or}")))
    }
}

/// The list without blanks and empty entries.
fn compact(list: &str) -> String {
    list.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .collect::<Vec<_>>()
        .join(",")
}

/// A list of network interfaces, each a name as Linux takes it.
pub(super) fn interfaces(pod: &PodView<'_>, name: &str) -> Result<String, InjectError> {
    let value = pod.annotation(name).unwrap_or_default();
    let list = compact(value);
    let odd = |c: char| c.is_whitespace() || c.is_control() || "/\"+*".contains(c);
    let right = |part: &str| part.len() <= 15 && !part.contains(odd);
    if list.is_empty() || list.split(',').all(right) {
        return Ok(list);
    }
    let expected = "a list of network interfaces such as net1,net2 (at most 15 bytes each)";
    Err(wrong(name, value, expected))
}

fn is_cidr(text: &str) -> bool {
    let Some((address, bits)) = text.split_once('/') else {
        return false;
    };
    let limit = match address.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(_)) => 32,
        Ok(std::net::IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    bits.parse::<u8>().is_ok_and(|bits| bits <= limit)
}

/// Checks an amount of a resource.
pub(super) fn quantity(name: &str, value: &str) -> Result<(), InjectError> {
    if is_quantity(value) {
        return Ok(());
    }
    Err(wrong(name, value, "an amount such as 100m or 128Mi"))
}

/// A Kubernetes quantity: a decimal number with a suffix.
fn is_quantity(text: &str) -> bool {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let suffix = &text[number.len()..];
    let exponent = number.contains(['e', 'E']);
    number
        .parse::<f64>()
        .is_ok_and(|value| value.is_finite() && value >= 0.0)
        && !exponent
        && matches!(
            suffix,
            "" | "n"
                | "u"
                | "m"
                | "k"
                | "M"
                | "G"
                | "T"
                | "P"
                | "E"
                | "Ki"
                | "Mi"
                | "Gi"
                | "Ti"
                | "Pi"
                | "Ei"
        )
}

/// A list of volumes or mounts as JSON: a list, or a map by name.
pub(super) fn named_list(pod: &PodView<'_>, name: &str) -> Result<Vec<Value>, InjectError> {
    let Some(text) = pod.annotation(name) else {
        return Ok(Vec::new());
    };
    let expected = "a JSON list of objects with a name, or a JSON map of them by name";
    match serde_json::from_str(text) {
        Ok(Value::Array(items))
            if items
                .iter()
                .all(|item| item.get("name").is_some_and(Value::is_string)) =>
        {
            Ok(items)
        }
        Ok(Value::Object(map)) if map.values().all(Value::is_object) => Ok(map
            .into_iter()
            .map(|(key, mut item)| {
                item["name"] = json!(key);
                item
            })
            .collect()),
        _ => Err(wrong(name, text, expected)),
    }
}
