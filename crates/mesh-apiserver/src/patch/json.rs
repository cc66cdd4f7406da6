//! JSON patch (RFC 6902) within bounds: a short patch must not make a large or deep object.
//!
//! Operations are applied one by one to a copy that the caller throws away on failure, so nothing is ever undone.

use json_patch::PatchOperation;
use json_patch::jsonptr::Pointer;
use serde_json::Value;

use crate::errors::ApiError;
use crate::limits::{MAX_DEPTH, TooDeep, depth};

/// Operations in one patch (as in Kubernetes).
const MAX_OPERATIONS: usize = 10_000;
/// Bytes that all `copy` operations of one patch may make (as in Kubernetes); a `move` to a deeper place counts too, for the work of
/// measuring it.
const MAX_COPIED: usize = 3 << 20;

/// Why a patch can't be applied.
#[derive(Debug, thiserror::Error)]
pub enum PatchFailure {
    /// It is not a JSON patch.
    #[error("decoding the JSON patch: {0}")]
    Decode(serde_json::Error),
    /// It is a patch, but not for this object.
    #[error("{0}")]
    DoesNotFit(json_patch::PatchError),
    /// Too many operations.
    #[error("The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {0}")]
    TooMany(usize),
    /// Its copies are too large together.
    #[error(
        "operation {0} of the JSON patch copies too much: the accumulated size of all copies is limited to {MAX_COPIED} bytes"
    )]
    CopiesTooMuch(usize),
    /// It would nest the object too deeply.
    #[error("operation {0} of the JSON patch: {1}")]
    TooDeep(usize, TooDeep),
}

impl From<PatchFailure> for ApiError {
    fn from(failure: PatchFailure) -> ApiError {
        match &failure {
            PatchFailure::Decode(_) | PatchFailure::TooDeep(..) => {
                ApiError::bad_request(failure.to_string())
            }
            PatchFailure::DoesNotFit(error) => {
                let message = format!(
                    "the server rejected our request due to an error in our request: {error}"
                );
                ApiError::new(422, "Invalid", message)
            }
            PatchFailure::TooMany(_) | PatchFailure::CopiesTooMuch(_) => {
                ApiError::new(413, "RequestEntityTooLarge", failure.to_string())
            }
        }
    }
}

/// Applies the patch in `body` to `object`, which is half changed when that fails.
///
/// # Errors
/// [`PatchFailure`].
pub fn apply(object: &mut Value, body: &[u8]) -> Result<(), PatchFailure> {
    let patch: json_patch::Patch = serde_json::from_slice(body).map_err(PatchFailure::Decode)?;
    if patch.0.len() > MAX_OPERATIONS {
        return Err(PatchFailure::TooMany(patch.0.len()));
    }
    let mut copied = 0;
    for (index, operation) in patch.0.iter().enumerate() {
        admit(object, index, operation, &mut copied)?;
        json_patch::patch_unsafe(object, std::slice::from_ref(operation)).map_err(
            |mut error| {
                error.operation = index;
                PatchFailure::DoesNotFit(error)
            },
        )?;
    }
    Ok(())
}

/// Whether the operation keeps the object within bounds; `copied` is what the ones before have copied.
fn admit(
    object: &Value,
    index: usize,
    operation: &PatchOperation,
    copied: &mut usize,
) -> Result<(), PatchFailure> {
    let deep = |reason| PatchFailure::TooDeep(index, reason);
    let segments = |path: &Pointer| path.tokens().count();
    let at = segments(operation.path());
    if at > MAX_DEPTH {
        return Err(deep(TooDeep));
    }
    let (from, is_copy) = match operation {
        PatchOperation::Add(add) => return fits(at, &add.value).map_err(deep),
        PatchOperation::Replace(replace) => return fits(at, &replace.value).map_err(deep),
        PatchOperation::Remove(_) | PatchOperation::Test(_) => return Ok(()),
        PatchOperation::Copy(copy) => (&copy.from, true),
        PatchOperation::Move(moved) => (&moved.from, false),
    };
    let before = segments(from);
    if before > MAX_DEPTH {
        return Err(deep(TooDeep));
    }
    // What is not there is refused by the operation itself.
    let Some(value) = object
        .pointer(from.as_str())
        .filter(|_| is_copy || at > before)
    else {
        return Ok(());
    };
    *copied += written_size(value);
    if *copied > MAX_COPIED {
        return Err(PatchFailure::CopiesTooMuch(index));
    }
    fits(at, value).map_err(deep)
}

fn fits(at: usize, value: &Value) -> Result<(), TooDeep> {
    if at + depth(value) > MAX_DEPTH {
        return Err(TooDeep);
    }
    Ok(())
}

/// Bytes of the value as JSON, about: the punctuation of scalars is left out.
fn written_size(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 4,
        Value::String(text) => text.len() + 2,
        Value::Array(items) => {
            2 + items
                .iter()
                .map(|item| 1 + written_size(item))
                .sum::<usize>()
        }
        Value::Object(fields) => {
            let field = |(key, value): (&String, &Value)| key.len() + 4 + written_size(value);
            2 + fields.iter().map(field).sum::<usize>()
        }
    }
}
