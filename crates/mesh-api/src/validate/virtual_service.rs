//! Rules for VirtualService.

use crate::networking::VirtualService;

use super::{Check, Validate, names};

impl Validate for VirtualService {
    fn validate(&self, check: &mut Check) {
        names::export_to(&self.export_to, false, check);
    }
}
