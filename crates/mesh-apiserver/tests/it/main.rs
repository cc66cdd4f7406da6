//! The API server through its router: raw requests and the `kube` client, hermetic and without namespaces.
#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

mod access;
mod auth;
mod certificates;
mod crds;
mod kinds;
mod patches;
mod proxy;
mod rules;
mod support;
mod verbs;
mod watches;
mod webhooks;
mod workloads;
