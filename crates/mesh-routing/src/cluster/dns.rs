//! Clusters whose endpoints are names: STRICT_DNS and LOGICAL_DNS.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::DnsLookupFamily;

use crate::endpoint::NamedEndpoints;
use crate::error::{CompileError, Result, Within, nonzero_duration};

/// Envoy's interval between lookups.
const DEFAULT_REFRESH: Duration = Duration::from_secs(5);

/// How to look up, and what to make of the answers.
#[derive(Debug)]
pub struct Dns {
    /// The endpoints by name.
    pub endpoints: NamedEndpoints,
    /// Only the first address of a name counts (LOGICAL_DNS).
    pub logical: bool,
    /// Families of addresses to ask for.
    pub families: Families,
    /// Time between lookups, where the answer's own time to live does not say otherwise.
    pub refresh: Duration,
    /// After a failure: first and longest wait.
    pub retry: (Duration, Duration),
    /// The answer's time to live counts.
    pub respect_ttl: bool,
    /// Up to this is added by chance.
    pub jitter: Duration,
}

/// Families of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Families {
    /// IPv6, and IPv4 where there is no IPv6 address (Envoy's default).
    PreferV6,
    /// IPv4, and IPv6 where there is no IPv4 address.
    PreferV4,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    All,
}

impl Dns {
    pub(crate) fn compile(m: &pb::Cluster, logical: bool) -> Result<Self> {
        let custom = !m.dns_resolvers.is_empty()
            || m.dns_resolution_config.is_some()
            || m.typed_dns_resolver_config.is_some()
            || m.use_tcp_for_dns_lookups;
        if custom {
            return Err(CompileError::new(
                "dns_resolvers",
                "resolvers other than the system's are not implemented (nor is use_tcp_for_dns_lookups)",
            ));
        }
        let Some(assignment) = &m.load_assignment else {
            return Err(CompileError::new("load_assignment", "is missing"));
        };
        let endpoints = NamedEndpoints::compile(assignment).within("load_assignment")?;
        let refresh = nonzero_duration("dns_refresh_rate", m.dns_refresh_rate.as_ref())?
            .unwrap_or(DEFAULT_REFRESH);
        let retry = match &m.dns_failure_refresh_rate {
            Some(rate) => {
                let base = nonzero_duration("base_interval", rate.base_interval.as_ref())
                    .within("dns_failure_refresh_rate")?
                    .unwrap_or(refresh);
                let most = nonzero_duration("max_interval", rate.max_interval.as_ref())
                    .within("dns_failure_refresh_rate")?;
                (base, most.unwrap_or(base * 10).max(base))
            }
            None => (refresh, refresh),
        };
        Ok(Self {
            endpoints,
            logical,
            families: match DnsLookupFamily::try_from(m.dns_lookup_family) {
                Ok(DnsLookupFamily::Auto) => Families::PreferV6,
                Ok(DnsLookupFamily::V4Preferred) => Families::PreferV4,
                Ok(DnsLookupFamily::V4Only) => Families::V4,
                Ok(DnsLookupFamily::V6Only) => Families::V6,
                Ok(DnsLookupFamily::All) => Families::All,
                Err(_) => return Err(CompileError::new("dns_lookup_family", "is unknown")),
            },
            refresh,
            retry,
            respect_ttl: m.respect_dns_ttl,
            jitter: nonzero_duration("dns_jitter", m.dns_jitter.as_ref())?.unwrap_or_default(),
        })
    }
}
