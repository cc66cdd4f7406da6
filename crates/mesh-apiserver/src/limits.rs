//! Bounds on what clients send, so that no body can exhaust the stack or the processor.

use std::collections::HashMap;

use granit_parser::{Event, Parser};
use serde_json::Value;

/// Levels of lists and objects in a body or a patched object. JSON readers (ours and those of most clients) stop at 128; the object is
/// read again inside lists, watch events, reviews and its own managed fields, which add up to some 20 levels.
pub const MAX_DEPTH: usize = 100;

/// More than [`MAX_DEPTH`] levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nested more than {MAX_DEPTH} levels deep")]
pub struct TooDeep;

/// Levels of lists and objects: 0 for a scalar.
pub fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or_default(),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or_default(),
        _ => 0,
    }
}

/// Bytes and nodes of a YAML body with its aliases written out: twice the largest body.
const MAX_EXPANDED: u64 = 6 << 20;

/// Why a YAML body is not read.
#[derive(Debug, thiserror::Error)]
pub enum YamlRefusal {
    /// It is not YAML, at least not to this parser.
    #[error("{0}")]
    Syntax(granit_parser::ScanError),
    /// Its structure is too deep.
    #[error("{0}")]
    TooDeep(#[from] TooDeep),
    /// An alias in an alias in an alias.
    #[error("its aliases make it larger than {MAX_EXPANDED} bytes")]
    Expands,
}

/// Looks through a YAML text, in time linear to its length, before it is parsed by a parser whose time is quadratic in the depth.
///
/// # Errors
/// What must not be parsed.
pub fn check_yaml(text: &str) -> Result<(), YamlRefusal> {
    // Open collections: their anchor (0 for none), and what was counted before them.
    let mut open: Vec<(usize, u64)> = Vec::new();
    let mut anchored: HashMap<usize, u64> = HashMap::new();
    let mut counted: u64 = 0;
    for event in Parser::new_from_str(text) {
        let (event, _) = event.map_err(YamlRefusal::Syntax)?;
        match event {
            Event::Alias(anchor) => {
                // An alias to the collection that it is in has no end; the parser proper says so.
                let expansion = anchored.get(&anchor).copied().unwrap_or(1);
                counted = counted.saturating_add(expansion);
            }
            Event::Scalar(text, _, anchor, _) => {
                let weight = 1 + text.len() as u64;
                counted += weight;
                anchored.insert(anchor, weight);
            }
            Event::SequenceStart(_, anchor, _) | Event::MappingStart(_, anchor, _) => {
                if open.len() == MAX_DEPTH {
                    return Err(TooDeep.into());
                }
                open.push((anchor, counted));
                counted += 1;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some((anchor, before)) = open.pop() {
                    anchored.insert(anchor, counted - before);
                }
            }
            _ => {}
        }
        if counted > MAX_EXPANDED {
            return Err(YamlRefusal::Expands);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_is_bounded_before_it_is_parsed() {
        check_yaml("a: &x [1, 2]\nb: *x\nc: |\n  [[[[\n").unwrap();
        let flow = "[".repeat(200_000);
        assert!(check_yaml(&flow).is_err());
        let block: String = (0..200).map(|n| format!("{}a:\n", " ".repeat(n))).collect();
        assert!(matches!(check_yaml(&block), Err(YamlRefusal::TooDeep(_))));
        let mut bomb = "a0: &a0 xxxxxxxxxx\n".to_owned();
        for n in 1..40 {
            let before = n - 1;
            bomb.push_str(&format!("a{n}: &a{n} [*a{before}, *a{before}]\n"));
        }
        assert!(matches!(check_yaml(&bomb), Err(YamlRefusal::Expands)));
        // One long text many times.
        let mut long = format!("a: &a {}\nb:\n", "x".repeat(1 << 20));
        long.push_str(&"- *a\n".repeat(100_000));
        assert!(matches!(check_yaml(&long), Err(YamlRefusal::Expands)));
    }

    #[test]
    fn depth_counts_collections() {
        for (text, levels) in [("1", 0), ("[]", 1), (r#"{"a":[1,{"b":2}]}"#, 3)] {
            assert_eq!(
                depth(&serde_json::from_str(text).unwrap()),
                levels,
                "{text}"
            );
        }
    }
}
