//! Sockets and Linux networking: what the proxy, the capture tool and the local cluster need below HTTP.
//!
//! * In: addresses, options of sockets, flags and tables of rules.
//! * Out: sockets and rules in the kernel; the same rules as text.
//! * Never: knows pods, services or xDS; keeps state of its own (the kernel has it).
//! * Start here: [`sockets`] for what a proxy does, [`capture`] for traffic capture (what `mesh init` sets up), [`nft`] for the
//!   nftables encoder beneath it, [`conntrack`] for what the kernel remembers of it, [`splice`] for copying between sockets.

pub mod capture;
pub mod conntrack;
pub mod copy;
pub mod nft;
pub mod ns;
pub mod sockets;
pub mod splice;
