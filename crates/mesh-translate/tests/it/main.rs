//! Objects in, resources out: golden folders, properties, and the proxy's own compiler as the first reader of what we write.

// Helpers of tests may fail like the tests themselves.
#![allow(clippy::unwrap_used)]

mod case;
mod envoy_filters;
mod generated;
mod golden;
mod policies;
mod properties;
mod requests;
