//! From objects to intent.
//!
//! **What**: [`Objects`], the table of all parsed objects, and [`Mesh`], the immutable, indexed intent that is made from it: services with
//! their endpoints, VirtualServices, DestinationRules and Gateways with every name made absolute, who sees what, and the list of
//! what is wrong or not applied ([`Problem`]).
//! **In**: objects of `mesh-api`, one by one, in any order.
//! **Out**: a [`Mesh`]; building never fails, since one bad object must not stop the others.
//! **Never**: no IO, no clock, no xDS (that is `mesh-translate`), no dependence on the order in which objects arrived.
//! **Start here**: [`Mesh::build`], then [`Objects::upsert`] and [`Node::from_xds_id`].

mod build;
pub mod hostname;
mod mesh;
mod node;
mod objects;
mod problem;
mod protocol;
mod rules;
mod service;
mod visibility;

pub use build::{unreadable_patches, without_effect};
pub use mesh::Mesh;
pub use node::{Node, NodeError, NodeKind};
pub use objects::{Item, ObjectKey, Objects};
pub use problem::{Problem, Severity};
pub use protocol::Protocol;
pub use rules::{
    AuthorizationPolicy, DestinationRule, EnvoyFilter, EnvoyPatch, Gateway, GatewayServer,
    KeySource, MESH_GATEWAY, MtlsMode, Policy, RequestAuthentication, Scope, ServerMode, Subset,
    VirtualService,
};
pub use service::{Endpoint, Health, Service, ServicePort, TargetPort, Workload};
pub use visibility::Visibility;
