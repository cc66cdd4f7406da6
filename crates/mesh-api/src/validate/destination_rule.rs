//! Rules for DestinationRule.

use crate::networking::DestinationRule;

use super::{Check, Validate, names};

impl Validate for DestinationRule {
    fn validate(&self, check: &mut Check) {
        names::export_to(&self.export_to, false, check);
    }
}
