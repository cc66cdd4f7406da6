//! Envoy's aggregated discovery service (ADS) v3, both ends of it.
//!
//! * **What:** the protocol between control plane and proxy: a machine without IO for one stream
//!   ([`subscription`]), the gRPC server ([`server`]), the client ([`client`]), and the certificate service beside it ([`certificate`]), and the JSON form of every Envoy message (`json`, a crate of its own).
//! * **In:** on the server a [`ResourceSet`] per node, handed over in a watch channel; on the client a [`ClientConfig`].
//! * **Out:** on the server [`StreamEvent`]s (what was sent, acknowledged, refused); on the client one [`Update`] after the other.
//! * **Never:** knows what is inside a resource, except its name and content hash. Neither half of the mesh is visible here.
//! * **Start here:** [`resources`] for the nouns, then [`subscription`], where all rules of the protocol are.
//!
//! The protocol is described in Envoy's `api/xds_protocol`; the order of the types and the names of nodes are Istio's.

pub mod backoff;
pub mod certificate;
pub mod channel;
pub mod client;
pub mod nack;
pub mod resources;
pub mod server;
pub mod subscription;
pub mod types;

pub use mesh_envoy_json as json;

pub use client::{AdsClient, ClientConfig, ConnectionState, Handler, Update};
pub use nack::Rejection;
pub use resources::{Resource, ResourceSet};
pub use server::{AdsServer, Caller, Connection, Limits, NodeSource, Report, StreamEvent};

/// `envoy.config.core.v3.Node`: who a proxy says it is.
pub use envoy_types::pb::envoy::config::core::v3::Node;
