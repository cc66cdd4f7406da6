//! Tests of mesh-api from outside.

mod kinds;
mod structural;
mod validation;
mod validation_rules;
mod yaml_properties;
