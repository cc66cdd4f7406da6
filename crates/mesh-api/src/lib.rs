//! Typed objects of the mesh.
//!
//! **What**: the Istio kinds, the few Kubernetes core kinds that a mesh reads, and the mesh configuration, each as its own
//! plain type, with one registry table, field validation, CRD generation and the one YAML module of the project.
//! **In**: JSON values or YAML text, as people write them or as a Kubernetes API serves them.
//! **Out**: [`AnyObject`] and [`core`] types, [`validate::Finding`]s, CRD objects ([`registry::crds`]).
//! **Never**: no IO, no clock, no knowledge of other objects (whether a reference resolves is `mesh-model`'s question).
//! **Start here**: [`object::parse`], then [`registry::KINDS`], then any file of `networking/`.
//!
//! Fields follow protobuf's habit, since that is what Istio's kinds are made of: an empty string, an empty list and the number
//! zero mean "not set"; where "not set" and "zero" differ, the field is an `Option`. Parsing is strict: a field that the kind does
//! not have is an error with its path. Core kinds are lenient instead, because Kubernetes adds fields with every release.

pub mod core;
pub mod duration;
pub mod extensions;
pub mod mesh_config;
pub mod meta;
pub mod networking;
pub mod object;
pub mod registry;
pub mod schema;
pub mod security;
pub mod selector;
pub mod string_match;
pub mod telemetry;
pub mod validate;
pub mod yaml;

pub use duration::Duration;
pub use meta::{Meta, OwnerReference};
pub use object::{AnyObject, Object, ParseError, parse};
pub use registry::{KINDS, KindInfo, crds};
pub use selector::{LabelSelector, PolicyTargetReference, WorkloadSelector};
pub use string_match::StringMatch;
pub use validate::{Finding, Severity, validate};
