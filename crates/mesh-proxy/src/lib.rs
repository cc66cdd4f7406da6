//! The data plane: one proxy for sidecars and gateways.
//!
//! * **What**: takes connections on the listeners that the control plane sends, decides with `mesh-routing`, forwards HTTP/1.1, HTTP/2 and
//!   TCP, counts what happened, serves its own health, metrics and admin ports.
//! * **In**: [`ProxyOptions`], xDS resources.
//! * **Out**: traffic, metrics, answers of the admin interface.
//! * **Never**: knows Kubernetes or Istio objects; waits for a lock, boxes a future or formats strings on the way of a request that goes well.
//! * **Start here**: [`http::handle`] for a request, [`run`] for the process, `worker.rs` for what a thread owns.

pub mod admin;
pub mod agent;
pub mod attempt;
pub mod body;
pub mod clock;
pub mod control;
pub mod dns;
pub mod exec;
pub mod filter;
mod framing;
pub mod http;
pub mod identity;
pub mod listener;
pub mod message;
pub mod mirror;
pub mod node;
pub mod options;
pub mod pool;
pub mod reply;
pub mod report;
pub mod run;
pub mod sds;
pub mod secrets;
pub mod serve;
pub mod shared;
pub mod sniff;
pub mod tcp;
pub mod tls;
pub mod upgrade;
pub mod upstream;
pub mod worker;

pub use options::{OptionsError, Ports, ProxyOptions, Role};
pub use run::{RunError, run};
