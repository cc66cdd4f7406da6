//! What is wrong with an object, or not applied yet.

use std::fmt;

use crate::ObjectKey;

/// How bad a problem is; the names of Istio's analysis levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// The object works in part, or probably not as meant.
    Warning,
    /// A part of the object has no effect.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Info => "Info",
            Self::Warning => "Warning",
            Self::Error => "Error",
        })
    }
}

/// One finding about one object, found while the mesh was built.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The object.
    pub object: ObjectKey,
    /// Where in it, such as `spec.http[0].route[1].destination.host`; empty for the object as a whole.
    pub field: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong and what to do.
    pub message: String,
    /// Istio's code, such as `IST0101`, where Istio has one for this finding.
    pub code: Option<&'static str>,
}

impl fmt::Display for Problem {
    /// `Warning [IST0101] (VirtualService default/reviews spec.hosts[0]) text`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.severity)?;
        if let Some(code) = self.code {
            write!(f, "[{code}] ")?;
        }
        write!(f, "({}", self.object)?;
        if !self.field.is_empty() {
            write!(f, " {}", self.field)?;
        }
        write!(f, ") {}", self.message)
    }
}

/// Collects the problems of one object.
pub(crate) struct Reporter<'a> {
    object: &'a ObjectKey,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Reporter<'a> {
    pub(crate) fn new(object: &'a ObjectKey, problems: &'a mut Vec<Problem>) -> Self {
        Self { object, problems }
    }

    pub(crate) fn report(
        &mut self,
        severity: Severity,
        code: Option<&'static str>,
        field: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.problems.push(Problem {
            object: self.object.clone(),
            field: field.into(),
            severity,
            message: message.into(),
            code,
        });
    }

    /// A field that is understood but has no effect in this version.
    pub(crate) fn not_applied(&mut self, field: impl Into<String>) {
        self.report(
            Severity::Warning,
            None,
            field,
            "not applied yet by this version of mesh; the rest of the object is",
        );
    }

    /// Something that the object names and that does not exist.
    pub(crate) fn not_found(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.report(Severity::Error, Some("IST0101"), field, message);
    }
}
