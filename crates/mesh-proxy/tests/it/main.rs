//! The proxy in this process, on loopback, with resources made here and no control plane.

// Control planes still send some of Envoy's deprecated fields.
#![allow(deprecated)]

mod config;
mod control;
mod http;
mod http2;
mod process;
mod stage;
mod tcp;
