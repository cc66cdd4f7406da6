//! The local cluster: a Kubernetes node made of processes and namespaces.
//!
//! * What: `mesh all-in-one` without a cluster. A small parent keeps the host's side (ports, state directory, signals); a node process in
//!   namespaces of its own serves the embedded Kubernetes API, runs the controllers and the node agent, and applies the first manifests.
//! * In: [`ClusterOptions`] from the command line; afterwards only Kubernetes objects.
//! * Out: pods as processes with their own network, mount and PID namespaces; object status, Events and logs; sockets on the host.
//! * Never: knows anything about Istio or the proxy (the mesh's parts are pods like any other); changes the host's network, mounts or
//!   files outside the state directory.
//! * Start here: [`all_in_one`] (`parent.rs`), then `stage.rs` (how the namespaces are entered), `node.rs` (what runs in them) and
//!   `agent.rs` (how a pod runs).

pub mod agent;
pub mod controllers;
pub mod dns;
pub mod edge;
pub mod network;
pub mod node;
mod options;
mod parent;
mod pass;
pub mod services;
mod stage;
mod users;

pub use options::{BootWave, ClusterOptions, HostPort, StateDir, WaitFor};
pub use parent::all_in_one;
pub use stage::stage_main;
pub use users::{ClusterUser, UserFileError};
