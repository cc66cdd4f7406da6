//! Operator commands.
//!
//! **What**: one file per command, and the objects of an installation.
//! **In**: command-line arguments (each command has a `clap` struct), manifests, a Kubernetes API.
//! **Out**: text for people or JSON and YAML for programs, and an exit code.
//! **Never**: no knowledge whether the cluster is the local one or any other; no command tree (that is `bin/mesh`).
//! **Start here**: [`install::manifests`], [`global::Global`], then any command.

pub mod apply;
pub mod ca;
pub mod chart;
pub mod delete;
pub mod describe;
pub mod exec;
pub mod get;
pub mod global;
pub mod install;
pub mod installer;
pub mod kube_inject;
pub mod logs;
pub mod manifest;
pub mod out;
pub mod profile;
pub mod proxy_config;
pub mod proxy_status;
pub mod request;
pub mod state;
pub mod tag;
pub mod uninstall;
pub mod upgrade;
pub mod verify_install;
pub mod version;
pub mod wait;

mod cluster;
mod files;
mod pages;
mod pods;
mod resources;
mod table;

pub use global::Global;
