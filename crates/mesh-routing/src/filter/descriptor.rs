//! Descriptors: what a rate limit counts, made from a request by the `rate_limits` of routes and virtual hosts.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::config::route::v3::rate_limit::action::ActionSpecifier;
use envoy_types::pb::envoy::config::route::v3::rate_limit::r#override::OverrideSpecifier;
use envoy_types::pb::google::protobuf::UInt32Value;
use http::HeaderName;

use crate::error::{CompileError, Result, Within, every_field, flag};
use crate::matcher::{HeaderMatch, QueryMatch};
use crate::rewrite::split_query;
use crate::route::RequestView;

/// Envoy's highest stage.
pub(crate) const MOST_STAGES: u32 = 10;

/// The rate limits that apply to a route.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    pub(crate) route: RateLimits,
    pub(crate) host: RateLimits,
    pub(crate) include_host: bool,
}

/// When those of the virtual host count beside those of the route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostLimits {
    /// Where the route has none.
    #[default]
    Override,
    /// Always.
    Include,
    /// Never.
    Ignore,
}

/// A list of rate limits. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct RateLimits(Option<Arc<[RateLimitEntry]>>);

/// One `RateLimit`: the actions that make one descriptor.
#[derive(Debug)]
pub struct RateLimitEntry {
    stage: u32,
    /// Has a runtime key that can turn it off (the local filter leaves such entries out, as Envoy's does).
    has_key: bool,
    actions: Vec<Action>,
    limit: Option<LimitOverride>,
    hits: Option<u64>,
}

#[derive(Debug)]
enum Action {
    SourceCluster,
    DestinationCluster,
    Header {
        field: Field,
        key: String,
        optional: bool,
    },
    Query {
        name: String,
        key: String,
        optional: bool,
    },
    RemoteAddress,
    MaskedRemoteAddress {
        v4: u32,
        v6: u32,
    },
    Fixed {
        key: String,
        value: String,
    },
    HeaderValueMatch {
        key: String,
        value: String,
        expect: bool,
        headers: Vec<HeaderMatch>,
    },
    QueryValueMatch {
        key: String,
        value: String,
        expect: bool,
        parameters: Vec<QueryMatch>,
    },
}

/// A limit that goes to the service with the descriptor and takes the place of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitOverride {
    /// So many.
    pub requests: u32,
    /// `envoy.type.v3.RateLimitUnit`.
    pub unit: i32,
}

/// What a request is counted under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor<'a> {
    /// Keys and values in order.
    pub entries: Vec<(&'a str, Cow<'a, str>)>,
    /// Takes the place of the service's limit.
    pub limit: Option<LimitOverride>,
    /// How much the request counts; `None` is one.
    pub hits: Option<u64>,
}

/// What descriptors are made of beside the request.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The request.
    pub request: &'a RequestView<'a>,
    /// The client.
    pub remote: IpAddr,
    /// The proxy's own cluster name (`--service-cluster`).
    pub source_cluster: &'a str,
    /// The cluster that the route leads to.
    pub destination_cluster: &'a str,
}

impl RateLimits {
    pub(crate) fn compile(list: &[pb::RateLimit]) -> Result<Self> {
        if list.is_empty() {
            return Ok(Self::default());
        }
        let mut entries = Vec::with_capacity(list.len());
        for (i, entry) in list.iter().enumerate() {
            entries.push(RateLimitEntry::compile(entry).within(format_args!("[{i}]"))?);
        }
        Ok(Self(Some(entries.into())))
    }

    /// None at all?
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &RateLimitEntry> {
        self.0.as_deref().unwrap_or_default().iter()
    }
}

impl Limits {
    /// Those that apply to requests at this stage.
    pub fn of_stage(&self, stage: u32, host: HostLimits) -> impl Iterator<Item = &RateLimitEntry> {
        let with_host = match host {
            _ if self.include_host => true,
            HostLimits::Include => true,
            HostLimits::Ignore => false,
            HostLimits::Override => self.route.is_empty(),
        };
        let host = with_host.then(|| self.host.iter()).into_iter().flatten();
        let all = self.route.iter().chain(host);
        all.filter(move |entry| entry.stage == stage)
    }
}

impl RateLimitEntry {
    fn compile(m: &pb::RateLimit) -> Result<Self> {
        every_field!(m, pb::RateLimit,
            used { stage, disable_key, actions, limit, hits_addend }
            irrelevant {}
            refused { apply_on_stream_done, x_ratelimit_option });
        let stage = m.stage.map_or(0, |s| s.value);
        if stage > MOST_STAGES {
            return Err(CompileError::new(
                "stage",
                format!("{stage} is above {MOST_STAGES}"),
            ));
        }
        if m.actions.is_empty() {
            return Err(CompileError::new("actions", "is empty"));
        }
        let mut actions = Vec::with_capacity(m.actions.len());
        for (i, action) in m.actions.iter().enumerate() {
            actions.push(Action::compile(action).within(format_args!("actions[{i}]"))?);
        }
        Ok(Self {
            stage,
            has_key: !m.disable_key.is_empty(),
            actions,
            limit: m
                .limit
                .as_ref()
                .map(compile_override)
                .transpose()
                .within("limit")?,
            hits: m
                .hits_addend
                .as_ref()
                .map(compile_hits)
                .transpose()
                .within("hits_addend")?
                .flatten(),
        })
    }

    /// Has it a runtime key that could turn it off?
    pub(crate) fn has_key(&self) -> bool {
        self.has_key
    }

    /// The descriptor of a request; `None` where one of the actions finds nothing.
    pub fn descriptor<'a>(&'a self, facts: &Facts<'a>) -> Option<Descriptor<'a>> {
        let mut entries = Vec::with_capacity(self.actions.len());
        for action in &self.actions {
            match action.entry(facts) {
                Made::Entry(key, value) => entries.push((key, value)),
                Made::Skipped => {}
                Made::Missing => return None,
            }
        }
        Some(Descriptor {
            entries,
            limit: self.limit,
            hits: self.hits,
        })
    }
}

fn compile_override(m: &pb::rate_limit::Override) -> Result<LimitOverride> {
    match &m.override_specifier {
        Some(OverrideSpecifier::RateLimit(limit)) => Ok(LimitOverride {
            requests: limit.requests_per_unit,
            unit: limit.unit,
        }),
        Some(OverrideSpecifier::DynamicMetadata(_)) => {
            Err(CompileError::unsupported("dynamic_metadata"))
        }
        None => Err(CompileError::new("override_specifier", "is missing")),
    }
}

fn compile_hits(m: &pb::rate_limit::HitsAddend) -> Result<Option<u64>> {
    every_field!(m, pb::rate_limit::HitsAddend, used { number } irrelevant {} refused { format, is_negative_hits });
    Ok(m.number.map(|n| n.value))
}

impl Action {
    fn compile(m: &pb::rate_limit::Action) -> Result<Self> {
        let or = |text: &str, default: &str| match text {
            "" => default.to_owned(),
            text => text.to_owned(),
        };
        Ok(match &m.action_specifier {
            Some(ActionSpecifier::SourceCluster(_)) => Self::SourceCluster,
            Some(ActionSpecifier::DestinationCluster(_)) => Self::DestinationCluster,
            Some(ActionSpecifier::RemoteAddress(_)) => Self::RemoteAddress,
            Some(ActionSpecifier::MaskedRemoteAddress(m)) => Self::MaskedRemoteAddress {
                v4: mask("v4_prefix_mask_len", m.v4_prefix_mask_len, 32)?,
                v6: mask("v6_prefix_mask_len", m.v6_prefix_mask_len, 128)?,
            },
            Some(ActionSpecifier::RequestHeaders(m)) => Self::Header {
                field: Field::compile(&m.header_name).within("request_headers")?,
                key: m.descriptor_key.clone(),
                optional: m.skip_if_absent,
            },
            Some(ActionSpecifier::QueryParameters(m)) => Self::Query {
                name: m.query_parameter_name.clone(),
                key: m.descriptor_key.clone(),
                optional: m.skip_if_absent,
            },
            Some(ActionSpecifier::GenericKey(m)) => Self::Fixed {
                key: or(&m.descriptor_key, "generic_key"),
                value: literal(&m.descriptor_value).within("generic_key.descriptor_value")?,
            },
            Some(ActionSpecifier::HeaderValueMatch(m)) => Self::HeaderValueMatch {
                key: or(&m.descriptor_key, "header_match"),
                value: literal(&m.descriptor_value)
                    .within("header_value_match.descriptor_value")?,
                expect: flag(m.expect_match.as_ref(), true),
                headers: m
                    .headers
                    .iter()
                    .map(HeaderMatch::compile)
                    .collect::<Result<_>>()
                    .within("header_value_match.headers")?,
            },
            Some(ActionSpecifier::QueryParameterValueMatch(m)) => Self::QueryValueMatch {
                key: or(&m.descriptor_key, "query_match"),
                value: literal(&m.descriptor_value)
                    .within("query_parameter_value_match.descriptor_value")?,
                expect: flag(m.expect_match.as_ref(), true),
                parameters: m
                    .query_parameters
                    .iter()
                    .map(QueryMatch::compile)
                    .collect::<Result<_>>()
                    .within("query_parameter_value_match.query_parameters")?,
            },
            Some(ActionSpecifier::DynamicMetadata(_)) => {
                return Err(CompileError::unsupported("dynamic_metadata"));
            }
            Some(ActionSpecifier::Metadata(_)) => {
                return Err(CompileError::unsupported("metadata"));
            }
            Some(ActionSpecifier::Extension(_)) => {
                return Err(CompileError::unsupported("extension"));
            }
            Some(ActionSpecifier::RemoteAddressMatch(_)) => {
                return Err(CompileError::unsupported("remote_address_match"));
            }
            None => return Err(CompileError::new("action_specifier", "is missing")),
        })
    }

    fn entry<'a>(&'a self, facts: &Facts<'a>) -> Made<'a> {
        let borrowed = |key: &'a str, value: &'a str| Made::Entry(key, Cow::Borrowed(value));
        match self {
            Self::SourceCluster => borrowed("source_cluster", facts.source_cluster),
            Self::DestinationCluster => borrowed("destination_cluster", facts.destination_cluster),
            Self::Header {
                field,
                key,
                optional,
            } => Made::found(key, field.value(facts.request), *optional),
            Self::Query {
                name,
                key,
                optional,
            } => {
                let (_, query) = split_query(facts.request.path_and_query);
                let pairs = query.trim_start_matches('?').split('&');
                let value = pairs
                    .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                    .find(|(key, _)| key == name)
                    .map(|(_, value)| Cow::Borrowed(value));
                Made::found(key, value, *optional)
            }
            Self::RemoteAddress => {
                Made::Entry("remote_address", Cow::Owned(facts.remote.to_string()))
            }
            Self::MaskedRemoteAddress { v4, v6 } => Made::Entry(
                "masked_remote_address",
                Cow::Owned(masked(facts.remote, *v4, *v6)),
            ),
            Self::Fixed { key, value } => borrowed(key, value),
            Self::HeaderValueMatch {
                key,
                value,
                expect,
                headers,
            } => match headers.iter().all(|h| h.matches(facts.request)) == *expect {
                true => borrowed(key, value),
                false => Made::Missing,
            },
            Self::QueryValueMatch {
                key,
                value,
                expect,
                parameters,
            } => {
                let (_, query) = split_query(facts.request.path_and_query);
                let query = query.trim_start_matches('?');
                match parameters.iter().all(|p| p.matches(query)) == *expect {
                    true => borrowed(key, value),
                    false => Made::Missing,
                }
            }
        }
    }
}

enum Made<'a> {
    Entry(&'a str, Cow<'a, str>),
    /// The entry is left out, the descriptor stays.
    Skipped,
    /// There is no descriptor.
    Missing,
}

impl<'a> Made<'a> {
    fn found(key: &'a str, value: Option<Cow<'a, str>>, optional: bool) -> Self {
        match value {
            Some(value) => Self::Entry(key, value),
            None if optional => Self::Skipped,
            None => Self::Missing,
        }
    }
}

/// A header, or a part of the request that Envoy names like one.
#[derive(Debug)]
enum Field {
    Method,
    Path,
    Scheme,
    Authority,
    Named(HeaderName),
}

impl Field {
    fn compile(name: &str) -> Result<Self> {
        Ok(match name.to_ascii_lowercase().as_str() {
            ":method" => Self::Method,
            ":path" => Self::Path,
            ":scheme" => Self::Scheme,
            ":authority" | "host" => Self::Authority,
            name => Self::Named(
                name.parse()
                    .map_err(|_| CompileError::new("header_name", "is not a header name"))?,
            ),
        })
    }

    /// Its first value.
    fn value<'a>(&self, request: &RequestView<'a>) -> Option<Cow<'a, str>> {
        Some(match self {
            Self::Method => Cow::Borrowed(request.method),
            Self::Path => Cow::Borrowed(request.path_and_query),
            Self::Scheme => Cow::Borrowed(request.scheme),
            Self::Authority => Cow::Borrowed(request.host),
            Self::Named(name) => String::from_utf8_lossy(request.headers.get(name)?.as_bytes()),
        })
    }
}

/// Descriptor values may hold variables (`%REQ(..)%`) in Envoy.
fn literal(text: &str) -> Result<String> {
    match text.contains('%') {
        true => Err(CompileError::new(
            "value",
            format!("{text:?} uses a variable (%...%), which is not implemented here"),
        )),
        false => Ok(text.to_owned()),
    }
}

fn mask(field: &str, len: Option<UInt32Value>, most: u32) -> Result<u32> {
    let len = len.map_or(most, |len| len.value);
    if len > most {
        return Err(CompileError::new(
            field,
            format!("{len} is above {most}, the length of an address"),
        ));
    }
    Ok(len)
}

fn masked(ip: IpAddr, v4: u32, v6: u32) -> String {
    match ip {
        IpAddr::V4(ip) => {
            let bits = u32::MAX.checked_shl(32 - v4).unwrap_or(0);
            format!("{}/{v4}", Ipv4Addr::from(u32::from(ip) & bits))
        }
        IpAddr::V6(ip) => {
            let bits = u128::MAX.checked_shl(128 - v6).unwrap_or(0);
            format!("{}/{v6}", Ipv6Addr::from(u128::from(ip) & bits))
        }
    }
}
