//! Tests of mesh-api from outside.

mod kinds;
mod structural;
mod validation;
mod yaml_properties;
