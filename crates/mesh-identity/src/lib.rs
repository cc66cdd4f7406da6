//! Who is who: SPIFFE ids, certificate issuing, service account tokens and the rustls configurations made from them.
//!
//! In: keys and certificates as PEM text, identities, and the current time as an argument. Out: certificates, tokens, verdicts,
//! `rustls` configurations. Never: IO, a clock, the environment, a thread; keys are never written anywhere from here.
//!
//! Start here: [`ca::Authority`] issues certificates for what [`csr::check`] found good, [`issued`] judges those of authorities elsewhere, [`trust::TrustBundle`] holds roots, [`token::TokenKeys`] issues and checks service account tokens,
//! [`spiffe::SpiffeId`] names a workload, [`tls`] turns PEM into rustls configurations.

pub mod ca;
pub mod channel;
pub mod csr;
pub mod issued;
pub mod jwt;
pub mod spiffe;
pub mod tls;
pub mod token;
pub mod trust;
pub mod verify;

/// Seconds since the Unix epoch; the only form of time that this crate takes or gives.
pub type UnixSeconds = u64;
