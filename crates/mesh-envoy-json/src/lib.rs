//! Envoy's messages by their descriptors.
//!
//! * **What:** the JSON form of every message of Envoy's v3 API, both ways (and of Istio's [`NameTable`], one way); merging one message into another; and an encoding
//!   in which maps have a fixed order.
//! * **In:** type URLs and encoded messages, or JSON.
//! * **Out:** the same, the other way round.
//! * **Never:** no IO, and nothing of it on the way of a request: descriptors cost memory while somebody holds them
//!   ([`Descriptors`]).
//! * **Start here:** [`to_json`] and [`from_json`], then [`merge`].

mod descriptors;
mod json;
mod locate;
mod merge;
mod nds;
mod order;

pub use descriptors::Descriptors;
pub use json::{
    JsonError, Naming, any_from_json, any_to_json, from_json, resolve_typed_structs, to_json,
};
pub use merge::{Lists, merge};
pub use nds::{NAME_TABLE, NameInfo, NameTable};
pub use order::ordered;
