//! Rules for Gateway.

use crate::networking::Gateway;

use super::{Check, Validate};

impl Validate for Gateway {
    fn validate(&self, check: &mut Check) {
        check.require(
            !self.servers.is_empty(),
            "servers",
            "a gateway needs at least one server",
        );
    }
}
