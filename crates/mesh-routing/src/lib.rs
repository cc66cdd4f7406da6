//! From xDS resources to routing decisions, without IO.
//!
//! * **What**: compiles Envoy's listener, route, cluster and endpoint messages into an immutable [`Snapshot`], and answers from it: which
//!   listener and filter chain takes a connection, which route a request, which endpoint gets it.
//! * **In**: decoded messages in an [`XdsState`]; for decisions, addresses, request heads and random numbers as arguments.
//! * **Out**: a [`Snapshot`], one [`Rejection`] for every resource that cannot be compiled (the last good version of it stays), and
//!   plain-data decisions.
//! * **Never**: sockets, clocks, environment, tokio. Never ignores a field that changes behaviour: what is not implemented is refused by
//!   name; what has no meaning here is listed with the reason beside the compiler of its message.
//! * **Start here**: [`compile`](compile::compile), then [`route::RouteTable::decide`].

// Envoy keeps deprecated fields working, and control planes still send some of them.
#![allow(deprecated)]

pub mod action;
pub mod chain;
pub mod cluster;
pub mod compile;
pub mod dynamic;
pub mod endpoint;
mod error;
pub mod filter;
pub mod format;
pub mod hash;
pub mod hcm;
pub mod headers;
pub mod lb;
pub mod listener;
pub mod matcher;
mod metadata;
pub mod mirror;
pub mod peer;
mod regex;
pub mod retry;
pub mod rewrite;
pub mod route;
pub mod tcp;
mod template;
pub mod tls;
pub mod upgrade;
pub mod xxhash;

pub use compile::{Rejection, Snapshot, XdsState, compile};
pub use error::CompileError;
