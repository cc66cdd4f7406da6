//! Checks of single objects, as Istio's validation webhook makes them.
//!
//! What a schema can't say: combinations of fields, forms of names, ranges. Whether a reference resolves is not asked here.

mod destination_rule;
mod envoy_filter;
mod gateway;
mod names;
mod other;
mod security;
mod sidecar;
mod telemetry;
mod virtual_service;

use std::fmt;

use crate::object::AnyObject;

pub use names::{claim_of_token, is_about_claims, is_matched_header};
pub use virtual_service::is_retry_condition;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object works, but probably not as meant, or in a form that will go away.
    Warning,
    /// The object is refused.
    Error,
}

/// One result of validation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Where, such as `spec.http[0].route[1].weight`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// Checks an object. Errors come before warnings; within each, in the order of the specification.
pub fn validate(object: &AnyObject) -> Vec<Finding> {
    let mut check = Check::default();
    names::metadata(object, &mut check);
    check.findings.extend((object.info().validate)(object));
    let mut findings = check.findings;
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    findings
}

/// Checks a specification alone.
pub(crate) fn spec<S: Validate>(spec: &S) -> Vec<Finding> {
    let mut check = Check::default();
    check.path.push_str("spec");
    spec.validate(&mut check);
    check.findings
}

/// A part of a specification that can be checked.
pub(crate) trait Validate {
    /// Adds what is wrong with this part to `check`, whose path points here.
    fn validate(&self, check: &mut Check);
}

impl<T: Validate> Validate for Option<T> {
    fn validate(&self, check: &mut Check) {
        if let Some(part) = self {
            part.validate(check);
        }
    }
}

/// Collects findings while the path of the current field is kept.
#[derive(Debug, Default)]
pub(crate) struct Check {
    path: String,
    findings: Vec<Finding>,
}

impl Check {
    /// Runs `body` with the path of a field of the current one.
    pub(crate) fn at(&mut self, field: &str, body: impl FnOnce(&mut Self)) {
        let before = self.path.len();
        if !self.path.is_empty() {
            self.path.push('.');
        }
        self.path.push_str(field);
        body(self);
        self.path.truncate(before);
    }

    /// Runs `body` for each element of a list, with its path.
    pub(crate) fn each<'a, T>(
        &mut self,
        field: &str,
        items: &'a [T],
        mut body: impl FnMut(&mut Self, &'a T),
    ) {
        for (index, item) in items.iter().enumerate() {
            self.at(&format!("{field}[{index}]"), |check| body(check, item));
        }
    }

    /// Checks a field that knows how to check itself.
    pub(crate) fn part(&mut self, field: &str, part: &impl Validate) {
        self.at(field, |check| part.validate(check));
    }

    /// Checks each element of a list that knows how to check itself.
    pub(crate) fn parts<T: Validate>(&mut self, field: &str, items: &[T]) {
        self.each(field, items, |check, item| item.validate(check));
    }

    /// An error at the current path.
    pub(crate) fn error(&mut self, message: impl Into<String>) {
        self.add(Severity::Error, message.into());
    }

    /// A warning at the current path.
    pub(crate) fn warn(&mut self, message: impl Into<String>) {
        self.add(Severity::Warning, message.into());
    }

    /// An error at a field of the current path.
    pub(crate) fn error_at(&mut self, field: &str, message: impl Into<String>) {
        self.at(field, |check| check.error(message));
    }

    /// A warning at a field of the current path.
    pub(crate) fn warn_at(&mut self, field: &str, message: impl Into<String>) {
        self.at(field, |check| check.warn(message));
    }

    /// An error at a field unless the condition holds.
    pub(crate) fn require(&mut self, condition: bool, field: &str, message: &str) {
        if !condition {
            self.error_at(field, message);
        }
    }

    fn add(&mut self, severity: Severity, message: String) {
        self.findings.push(Finding {
            severity,
            field: self.path.clone(),
            message,
        });
    }
}
