//! Bounds on what clients send, so that no body can exhaust the stack or the processor.

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
