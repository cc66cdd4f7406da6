//! Additions to ordered lists (filters, routes), all by the same rules.

use mesh_api::networking::envoy_filter::PatchOperation;
use prost::Message;

use super::{Changes, Patch};

/// Carries out an addition, replacement or removal. `named` says whether the patch has a condition on the list's entries, `matches` whether an entry
/// meets it; without a condition INSERT_BEFORE means the beginning and INSERT_AFTER the end. `end` is where additions to the end go.
pub(super) fn apply<T: Message + Default>(
    list: &mut Vec<T>,
    patch: Patch<'_>,
    named: bool,
    matches: impl Fn(&T) -> bool,
    end: impl Fn(&[T]) -> usize,
    changes: &mut Changes,
) {
    let first = list.iter().position(&matches);
    let place = match patch.patch.operation {
        PatchOperation::Add => Some(end(list)),
        PatchOperation::InsertFirst => Some(0),
        PatchOperation::InsertBefore if !named => Some(0),
        PatchOperation::InsertBefore => first,
        PatchOperation::InsertAfter if !named => Some(end(list)),
        PatchOperation::InsertAfter => first.map(|index| index + 1),
        PatchOperation::Replace if named => {
            if let Some(index) = first
                && let Some(value) = patch.value(changes)
            {
                list[index] = value;
                changes.done(patch);
            }
            return;
        }
        PatchOperation::Remove if named => {
            let before = list.len();
            list.retain(|entry| !matches(entry));
            if list.len() != before {
                changes.done(patch);
            }
            return;
        }
        _ => return,
    };
    if let Some(index) = place
        && let Some(value) = patch.value(changes)
    {
        list.insert(index, value);
        changes.done(patch);
    }
}
