//! The proxy in this process, on loopback, with resources made here and no control plane.

// Control planes still send some of Envoy's deprecated fields.
#![allow(deprecated)]

mod access;
mod agent;
mod announcing;
mod balancing;
mod changes;
mod config;
mod control;
mod dns;
mod drain;
mod early;
mod filters;
mod floods;
mod hashing;
mod http;
mod http2;
mod limits;
mod local;
mod mirrors;
mod pki;
mod process;
mod retries;
mod servers;
mod smuggling;
mod stage;
mod tcp;
mod tls;
mod transparent;
mod tunnels;
mod upgrades;
