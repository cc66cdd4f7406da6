//! External authorization: the `envoy.filters.http.ext_authz` and `envoy.filters.network.ext_authz` filters. What is asked of which
//! service, and what its answers may do.

mod http_service;

use std::collections::HashMap;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{ApiVersion, GrpcService, RuntimeFeatureFlag};
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::ext_authz::Services;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::ext_authz_per_route::Override;
use envoy_types::pb::envoy::extensions::filters::network::ext_authz::v3 as network;
use envoy_types::pb::envoy::r#type::matcher::v3::ListStringMatcher;
use http::StatusCode;

use super::Percent;
use super::local_rate_limit::status;
use super::rate_limit::Service;
use crate::dynamic::{Dynamic, MetadataMatch};
use crate::error::{CompileError, Result, Within, duration, every_field, flag};
use crate::matcher::StringMatch;

pub use http_service::{AuthorizationHttp, HeadersOut};

/// Where what the service has found out is kept for later filters.
pub const HTTP_SECTION: &str = "envoy.filters.http.ext_authz";
/// Envoy's limit for the service's answer.
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(200);

/// A compiled `ExtAuthz` filter.
#[derive(Debug)]
pub struct ExtAuthz {
    /// Whom to ask.
    pub service: Authorizer,
    /// Longest wait for the answer; `None` waits.
    pub timeout: Option<Duration>,
    /// A failing service lets requests pass.
    pub fail_open: bool,
    /// Requests that passed for that reason are marked by `x-envoy-auth-failure-mode-allowed`.
    pub mark_fail_open: bool,
    /// The answer where the service fails and that means no.
    pub status_on_error: StatusCode,
    /// The request's body goes along, up to this.
    pub body: Option<BodyPart>,
    /// The route is looked for again after the service has changed the request.
    pub clear_route: bool,
    /// Metadata that goes along.
    pub metadata: Vec<Box<str>>,
    /// Metadata in the answer is kept.
    pub takes_metadata: bool,
    /// The client's certificate goes along.
    pub with_certificate: bool,
    /// So does the server name that the client asked for.
    pub with_tls_session: bool,
    /// Headers go along as a list, repeated ones each by itself.
    pub raw_headers: bool,
    /// Longer bodies of refusals are cut; `None` does not.
    pub longest_refusal: Option<usize>,
    /// Statistics, as `http.PREFIX.ext_authz.`.
    pub stats: Box<str>,
    allowed: Option<Vec<StringMatch>>,
    disallowed: Vec<StringMatch>,
    enabled: Percent,
    enabled_if: Option<MetadataMatch>,
    deny_at_disable: bool,
}

/// Whom to ask.
#[derive(Debug)]
pub enum Authorizer {
    /// `envoy.service.auth.v3.Authorization/Check`.
    Grpc(Service),
    /// A request like the client's.
    Http(Box<AuthorizationHttp>),
}

/// How much of a body goes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyPart {
    /// Bytes at most.
    pub most: usize,
    /// Of longer bodies the beginning; else they are refused (413).
    pub partial: bool,
    /// As bytes, not as text.
    pub as_bytes: bool,
}

/// What a route says.
#[derive(Debug, Default)]
pub struct ExtAuthzPerRoute {
    /// Nothing is asked.
    pub off: bool,
    /// Goes along with the question.
    pub context: HashMap<String, String>,
    /// In the place of the filter's; `Some(None)` sends no body.
    body: Option<Option<BodyPart>>,
}

/// What to do with a request before anything is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Ask.
    Ask,
    /// The filter is off for it.
    Pass,
    /// The filter is off for it, and that means no.
    Refuse,
}

impl ExtAuthz {
    pub(crate) fn compile(m: &pb::ExtAuthz) -> Result<Self> {
        check(m)?;
        let version = |version| check_version(version).within("transport_api_version");
        let (service, timeout) = match &m.services {
            Some(Services::GrpcService(service)) => {
                version(m.transport_api_version)?;
                let compiled = Service::compile(service).within("grpc_service")?;
                (Authorizer::Grpc(compiled), grpc_timeout(service)?)
            }
            Some(Services::HttpService(service)) => {
                let compiled = AuthorizationHttp::compile(service).within("http_service")?;
                let timeout = Some(compiled.service.timeout);
                (Authorizer::Http(Box::new(compiled)), timeout)
            }
            None => return Err(CompileError::new("services", "no service is given")),
        };
        let http = matches!(service, Authorizer::Http(_));
        let of_service = match &service {
            Authorizer::Http(http) => http.allowed.clone(),
            Authorizer::Grpc(_) => None,
        };
        let allowed = m.allowed_headers.as_ref().map(list);
        let allowed = allowed.transpose().within("allowed_headers")?;
        if allowed.is_some() && of_service.is_some() {
            return Err(CompileError::new(
                "allowed_headers",
                "stands here and in authorization_request",
            ));
        }
        Ok(Self {
            service,
            timeout,
            fail_open: m.failure_mode_allow,
            mark_fail_open: m.failure_mode_allow_header_add,
            status_on_error: status(m.status_on_error.as_ref(), StatusCode::FORBIDDEN),
            body: m
                .with_request_body
                .as_ref()
                .map(BodyPart::compile)
                .transpose()
                .within("with_request_body")?,
            clear_route: m.clear_route_cache,
            metadata: m
                .metadata_context_namespaces
                .iter()
                .map(|n| n.as_str().into())
                .collect(),
            takes_metadata: flag(m.enable_dynamic_metadata_ingestion.as_ref(), true),
            with_certificate: m.include_peer_certificate,
            with_tls_session: m.include_tls_session,
            raw_headers: m.encode_raw_headers,
            longest_refusal: (m.max_denied_response_body_bytes > 0)
                .then_some(m.max_denied_response_body_bytes as usize),
            stats: m.stat_prefix.as_str().into(),
            // An HTTP service gets no headers but a few, unless they are named.
            allowed: allowed.or(of_service).or(http.then(Vec::new)),
            disallowed: m
                .disallowed_headers
                .as_ref()
                .map(list)
                .transpose()
                .within("disallowed_headers")?
                .unwrap_or_default(),
            enabled: Percent::of_runtime(m.filter_enabled.as_ref(), Percent::ALL)
                .within("filter_enabled")?,
            enabled_if: m
                .filter_enabled_metadata
                .as_ref()
                .map(MetadataMatch::compile)
                .transpose()
                .within("filter_enabled_metadata")?,
            deny_at_disable: default_of(m.deny_at_disable.as_ref()),
        })
    }

    /// Is anything to be asked about a request with these findings?
    pub fn turn(&self, random: u64, metadata: Option<&Dynamic>) -> Turn {
        let enabled = self.enabled.covers(random)
            && self.enabled_if.as_ref().is_none_or(|m| m.matches(metadata));
        match (enabled, self.deny_at_disable) {
            (true, _) => Turn::Ask,
            (false, true) => Turn::Refuse,
            (false, false) => Turn::Pass,
        }
    }

    /// Does this header of the client (in lower case) go along?
    pub fn sends(&self, header: &str) -> bool {
        let in_list = |list: &[StringMatch]| list.iter().any(|m| m.matches(header));
        let always = matches!(self.service, Authorizer::Http(_)) && header == "authorization";
        (always || self.allowed.as_deref().is_none_or(in_list)) && !in_list(&self.disallowed)
    }

    /// How much of the body goes along.
    pub fn body_for(&self, route: Option<&ExtAuthzPerRoute>) -> Option<BodyPart> {
        route.and_then(|route| route.body).unwrap_or(self.body)
    }
}

/// `envoy.extensions.filters.http.ext_authz.v3.ExtAuthz`, field by field.
fn check(m: &pb::ExtAuthz) -> Result<()> {
    every_field!(m, pb::ExtAuthz,
    used {
        transport_api_version, failure_mode_allow, failure_mode_allow_header_add, with_request_body, clear_route_cache,
        status_on_error, metadata_context_namespaces, filter_enabled, filter_enabled_metadata, deny_at_disable,
        include_peer_certificate, stat_prefix, allowed_headers, disallowed_headers, include_tls_session, encode_raw_headers,
        enable_dynamic_metadata_ingestion, max_denied_response_body_bytes, services,
    }
    // What is no header in the service's answer is never taken over (validate_mutations); statistics and spans of the call itself;
    // filter_metadata and filter state are for logs that are refused.
    irrelevant {
        validate_mutations, charge_cluster_response_stats, emit_filter_state_stats, filter_metadata, emit_client_span,
    }
    refused {
        typed_metadata_context_namespaces, route_metadata_context_namespaces, route_typed_metadata_context_namespaces,
        bootstrap_metadata_labels_key, decoder_header_mutation_rules, enforce_response_header_limits, shadow_mode,
    });
    Ok(())
}

fn check_version(version: i32) -> Result<()> {
    match ApiVersion::try_from(version) {
        // Envoy's default means the newest one.
        Ok(ApiVersion::V3 | ApiVersion::Auto) => Ok(()),
        _ => Err(CompileError::new(
            "version",
            "is not V3, the only one there is",
        )),
    }
}

fn grpc_timeout(m: &GrpcService) -> Result<Option<Duration>> {
    let timeout = duration("grpc_service.timeout", m.timeout.as_ref())?;
    Ok(Some(timeout.unwrap_or(DEFAULT_TIMEOUT)).filter(|timeout| !timeout.is_zero()))
}

pub(super) fn list(m: &ListStringMatcher) -> Result<Vec<StringMatch>> {
    m.patterns.iter().map(StringMatch::compile).collect()
}

/// Runtime keys name overrides from files that do not exist here.
fn default_of(m: Option<&RuntimeFeatureFlag>) -> bool {
    m.is_some_and(|m| flag(m.default_value.as_ref(), false))
}

impl BodyPart {
    fn compile(m: &pb::BufferSettings) -> Result<Self> {
        every_field!(m, pb::BufferSettings, used { max_request_bytes, allow_partial_message, pack_as_bytes } irrelevant {} refused {});
        if m.max_request_bytes == 0 {
            return Err(CompileError::new("max_request_bytes", "must be above zero"));
        }
        Ok(Self {
            most: m.max_request_bytes as usize,
            partial: m.allow_partial_message,
            as_bytes: m.pack_as_bytes,
        })
    }
}

impl ExtAuthzPerRoute {
    pub(crate) fn compile(m: &pb::ExtAuthzPerRoute) -> Result<Self> {
        every_field!(m, pb::ExtAuthzPerRoute, used { r#override } irrelevant {} refused {});
        match &m.r#override {
            Some(Override::Disabled(true)) => Ok(Self {
                off: true,
                ..Self::default()
            }),
            Some(Override::Disabled(false)) => Err(CompileError::new(
                "disabled",
                "must be true where it is set",
            )),
            Some(Override::CheckSettings(m)) => Self::settings(m).within("check_settings"),
            None => Err(CompileError::new("override", "is missing")),
        }
    }

    fn settings(m: &pb::CheckSettings) -> Result<Self> {
        every_field!(m, pb::CheckSettings,
            used { context_extensions, disable_request_body_buffering, with_request_body }
            irrelevant { emit_client_span }
            refused { service_override });
        let body = m.with_request_body.as_ref().map(BodyPart::compile);
        let body = body.transpose().within("with_request_body")?;
        Ok(Self {
            off: false,
            context: m.context_extensions.clone(),
            body: match m.disable_request_body_buffering {
                true => Some(None),
                false => body.map(Some),
            },
        })
    }

    /// With what outer levels say of the context; the inner word counts.
    pub(super) fn within(&self, outer: &Self) -> Self {
        let mut context = outer.context.clone();
        context.extend(self.context.clone());
        Self {
            off: self.off,
            context,
            body: self.body,
        }
    }
}

/// A compiled network `ExtAuthz` filter.
#[derive(Debug)]
pub struct ConnectionExtAuthz {
    /// Whom to ask.
    pub service: Service,
    /// Longest wait for the answer; `None` waits.
    pub timeout: Option<Duration>,
    /// A failing service lets connections pass.
    pub fail_open: bool,
    /// The client's certificate goes along.
    pub with_certificate: bool,
    /// So does the server name that the client asked for.
    pub with_tls_session: bool,
    /// Metadata that goes along.
    pub metadata: Vec<Box<str>>,
    /// Statistics, as `ext_authz.PREFIX.`.
    pub stats: Box<str>,
    enabled_if: Option<MetadataMatch>,
}

impl ConnectionExtAuthz {
    pub(crate) fn compile(m: &network::ExtAuthz) -> Result<Self> {
        every_field!(m, network::ExtAuthz,
        used {
            stat_prefix, grpc_service, failure_mode_allow, include_peer_certificate, transport_api_version,
            filter_enabled_metadata, include_tls_session, metadata_context_namespaces,
        }
        irrelevant {}
        refused {
            bootstrap_metadata_labels_key, send_tls_alert_on_denial, typed_metadata_context_namespaces, shadow_mode,
        });
        check_version(m.transport_api_version).within("transport_api_version")?;
        let service = m.grpc_service.as_ref();
        let service = service.ok_or_else(|| CompileError::new("grpc_service", "is missing"))?;
        Ok(Self {
            service: Service::compile(service).within("grpc_service")?,
            timeout: grpc_timeout(service)?,
            fail_open: m.failure_mode_allow,
            with_certificate: m.include_peer_certificate,
            with_tls_session: m.include_tls_session,
            metadata: m
                .metadata_context_namespaces
                .iter()
                .map(|n| n.as_str().into())
                .collect(),
            stats: m.stat_prefix.as_str().into(),
            enabled_if: m
                .filter_enabled_metadata
                .as_ref()
                .map(MetadataMatch::compile)
                .transpose()
                .within("filter_enabled_metadata")?,
        })
    }

    /// Is anything to be asked about a connection with these findings?
    pub fn asks(&self, metadata: Option<&Dynamic>) -> bool {
        self.enabled_if.as_ref().is_none_or(|m| m.matches(metadata))
    }
}
