//! The control plane against a Kubernetes API of a few hundred lines in this process, with our own discovery client.

#![allow(clippy::unwrap_used)]

mod api;
mod authority;
mod control;
mod discovery;
mod external;
mod real;
mod roots;
mod secrets;
mod skew;
mod world;
