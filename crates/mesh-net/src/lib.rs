//! Sockets and Linux networking: what the proxy, the capture tool and the local cluster need below HTTP.
//!
//! * What: what these need of the kernel and can't get from the standard library or tokio: marks, original destinations, splice, links,
//!   nftables, and the capture rules made with them.
//! * In: addresses, namespaces as file descriptors, flags of the capture tool, tables of rules as values.
//! * Out: sockets, links, routes, rules in the kernel; the same rules as text; errors that say which step the kernel refused.
//! * Never: knows pods, services or xDS; keeps state of its own (the kernel has it); runs another program, but for `iptables-restore`
//!   where that backend is asked for.
//! * Start here: [`sockets`] for what a proxy does, [`capture`] for traffic capture (what `mesh init` sets up), [`nft`] for the
//!   nftables encoder beneath it, [`link`] for bridges and veth pairs, [`splice`] for copying between sockets.
//!
//! This is the only crate of the project that contains `unsafe`.

pub mod capture;
pub mod link;
mod netlink;
pub mod nft;
pub mod ns;
pub mod sockets;
pub mod splice;

pub use netlink::NetlinkError;
