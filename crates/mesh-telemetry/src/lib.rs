//! Names, labels and values of what the mesh reports about itself.
//!
//! * **What**: Istio's standard metrics with their labels, and the set-up of the log.
//! * **In**: label sets; numbers through handles that were resolved once.
//! * **Out**: Prometheus' text exposition; log lines on standard error.
//! * **Never**: looks up a label set per request (callers keep the handles); knows no request, no configuration.
//! * **Start here**: [`istio::IstioMetrics`]; [`log::init`].

pub mod istio;
pub mod log;

pub use istio::{IstioMetrics, Labels, Peer, RequestHandles, TcpHandles};
