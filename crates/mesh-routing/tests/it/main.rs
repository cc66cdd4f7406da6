//! From xDS messages to decisions.

// Control planes still send some of Envoy's deprecated fields.
#![allow(deprecated)]

mod access;
mod balancing;
mod chains;
mod clusters;
mod filters;
mod routes;
mod snapshots;
