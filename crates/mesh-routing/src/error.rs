//! Why a resource was refused, and the check that no field is dropped in silence.

use std::time::Duration;

use envoy_types::pb::google::protobuf;

/// Why a message cannot be compiled, with the path of the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct CompileError {
    /// Field path inside the resource, as `virtual_hosts[0].routes[2].route.cors`.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
}

impl CompileError {
    /// An error at `path`.
    pub fn new(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            reason: reason.into(),
        }
    }

    /// A field that this proxy does not implement.
    pub(crate) fn unsupported(field: impl Into<String>) -> Self {
        Self::new(field, "is set, but this proxy does not implement it")
    }

    /// The same error one level further out.
    pub(crate) fn within(mut self, outer: impl std::fmt::Display) -> Self {
        self.path = format!("{outer}.{}", self.path);
        self
    }
}

pub(crate) type Result<T> = std::result::Result<T, CompileError>;

/// Adds the outer field's name to an error.
pub(crate) trait Within<T> {
    fn within(self, outer: impl std::fmt::Display) -> Result<T>;
}

impl<T> Within<T> for Result<T> {
    fn within(self, outer: impl std::fmt::Display) -> Result<T> {
        self.map_err(|error| error.within(outer))
    }
}

/// Goes through every field of a message: `used` ones are compiled by the caller, `irrelevant` ones mean nothing in this proxy (say why in
/// a comment), `refused` ones must have their default value. The pattern names all fields, so a new one in the message definition
/// stops the build instead of being ignored.
macro_rules! every_field {
    ($message:expr, $type:path, used { $($used:ident),* $(,)? } irrelevant { $($irrelevant:ident),* $(,)? } refused { $($refused:ident),* $(,)? }) => {{
        let $type { $($used: _,)* $($irrelevant: _,)* $($refused,)* } = $message;
        $( $crate::error::refuse_unless_default(stringify!($refused), $refused)?; )*
    }};
}
pub(crate) use every_field;

/// The check behind [`every_field`].
pub(crate) fn refuse_unless_default<T: Default + PartialEq>(field: &str, value: &T) -> Result<()> {
    if *value == T::default() {
        Ok(())
    } else {
        Err(CompileError::unsupported(field))
    }
}

/// A duration field; `None` where unset or zero (Envoy: zero turns a timeout off).
pub(crate) fn nonzero_duration(
    field: &str,
    value: Option<&protobuf::Duration>,
) -> Result<Option<Duration>> {
    Ok(duration(field, value)?.filter(|d| !d.is_zero()))
}

/// A duration field that may be zero.
pub(crate) fn duration(
    field: &str,
    value: Option<&protobuf::Duration>,
) -> Result<Option<Duration>> {
    let Some(value) = value else { return Ok(None) };
    match (u64::try_from(value.seconds), u32::try_from(value.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => {
            Ok(Some(Duration::new(seconds, nanos)))
        }
        _ => Err(CompileError::new(
            field,
            format!("{} s {} ns is not a duration", value.seconds, value.nanos),
        )),
    }
}

/// A timeout with a default for the unset field; zero turns it off.
pub(crate) fn timeout(
    field: &str,
    value: Option<&protobuf::Duration>,
    default: Duration,
) -> Result<Option<Duration>> {
    Ok(duration(field, value)?
        .or(Some(default))
        .filter(|d| !d.is_zero()))
}

/// A `BoolValue` with its default.
pub(crate) fn flag(value: Option<&protobuf::BoolValue>, default: bool) -> bool {
    value.map_or(default, |v| v.value)
}
