//! The HTTP connection manager's settings.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::http_protocol_options::HeadersWithUnderscoresAction;
use envoy_types::pb::envoy::config::core::v3::{Http1ProtocolOptions, HttpProtocolOptions};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    CodecType, ForwardClientCertDetails, PathWithEscapedSlashesAction, RouteSpecifier, ServerHeaderTransformation, StripPortMode,
};
use http::HeaderValue;

use crate::chain::{Cidr, cidrs};
use crate::cluster::Http2Limits;
use crate::error::{CompileError, Result, Within, every_field, flag, nonzero_duration, timeout};
use crate::filter::HttpFilters;
use crate::filter::alpn::Alpn;
use crate::route::RouteTable;
use crate::upgrade::Upgrades;

/// Envoy's defaults.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
const DEFAULT_STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(300);
const DEFAULT_MAX_HEADERS_KB: u32 = 60;
const DEFAULT_MAX_HEADERS: u32 = 100;

/// A compiled `HttpConnectionManager`.
#[derive(Debug)]
pub struct HttpManager {
    /// The filters that act on requests.
    pub filters: HttpFilters,
    /// Where the routes come from.
    pub routes: RouteSource,
    /// Which HTTP versions are spoken.
    pub codec: Codec,
    /// `server` header of responses.
    pub server_name: HeaderValue,
    /// What happens to the upstream's `server` header.
    pub server_header: ServerHeader,
    /// Bytes of request headers, in KiB.
    pub max_headers_kb: u32,
    /// Number of request headers.
    pub max_headers: u32,
    /// Idle connections are closed after this.
    pub idle_timeout: Option<Duration>,
    /// Silent streams are ended after this.
    pub stream_idle_timeout: Option<Duration>,
    /// Limit for a whole exchange.
    pub max_stream_duration: Option<Duration>,
    /// Limit for a whole request to arrive.
    pub request_timeout: Option<Duration>,
    /// Limit for the request headers to arrive.
    pub headers_timeout: Option<Duration>,
    /// The peer's address is the client's (edge): `x-forwarded-for` gets it and internal headers are cut.
    pub use_remote_address: bool,
    /// Proxies before this one that are trusted at the edge: what they say of the scheme counts.
    pub trusted_hops: u32,
    /// Addresses of clients inside, where configured.
    pub internal: Option<Vec<Cidr>>,
    /// `expect: 100-continue` is passed on instead of answered.
    pub pass_continue: bool,
    /// Do not add to `x-forwarded-for`.
    pub skip_xff_append: bool,
    /// Make `x-request-id` where missing.
    pub generate_request_id: bool,
    /// Keep the one of an external client.
    pub preserve_request_id: bool,
    /// Echo it.
    pub request_id_in_response: bool,
    /// Normalise paths (RFC 3986 section 6).
    pub normalize_path: bool,
    /// Join slashes.
    pub merge_slashes: bool,
    /// What to do with `%2F` and `%5C`.
    pub escaped_slashes: EscapedSlashes,
    /// Cut the port off the authority.
    pub strip_port: bool,
    /// Cut the final dot off the authority.
    pub strip_dot: bool,
    /// Upgrades that may pass.
    pub upgrades: Upgrades,
    /// HTTP/1.0 is accepted.
    pub http10: bool,
    /// Header names with underscores.
    pub underscores: Underscores,
    /// HTTP/2 settings.
    pub http2: Http2Limits,
    /// Connections end after this many requests.
    pub max_requests_per_connection: Option<u32>,
    /// Application protocols of upstream TLS handshakes.
    pub alpn: Alpn,
    /// What is said of clients' certificates.
    pub client_cert: ClientCert,
}

/// What becomes of `x-forwarded-client-cert` (`forward_client_cert_details`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forward {
    /// The client's own is cut, and none is made.
    Sanitize,
    /// The client's own passes where it proved who it is.
    ForwardOnly,
    /// An element is added to it, where the client proved who it is.
    AppendForward,
    /// The client's own is cut, and one is made where the client proved who it is.
    SanitizeSet,
    /// It passes.
    AlwaysForwardOnly,
}

/// `x-forwarded-client-cert` (Envoy: HTTP connection manager, header manipulation).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientCert {
    /// What becomes of it.
    pub forward: Forward,
    /// `Subject`.
    pub subject: bool,
    /// `Cert`.
    pub cert: bool,
    /// `Chain`.
    pub chain: bool,
    /// `DNS`.
    pub dns: bool,
    /// `URI`.
    pub uri: bool,
}

impl ClientCert {
    fn compile(m: &pb::HttpConnectionManager) -> Self {
        let details = m.set_current_client_cert_details.unwrap_or_default();
        Self {
            forward: match ForwardClientCertDetails::try_from(m.forward_client_cert_details) {
                Ok(ForwardClientCertDetails::ForwardOnly) => Forward::ForwardOnly,
                Ok(ForwardClientCertDetails::AppendForward) => Forward::AppendForward,
                Ok(ForwardClientCertDetails::SanitizeSet) => Forward::SanitizeSet,
                Ok(ForwardClientCertDetails::AlwaysForwardOnly) => Forward::AlwaysForwardOnly,
                Ok(ForwardClientCertDetails::Sanitize) | Err(_) => Forward::Sanitize,
            },
            subject: flag(details.subject.as_ref(), false),
            cert: details.cert,
            chain: details.chain,
            dns: details.dns,
            uri: details.uri,
        }
    }
}

/// Where the routes come from.
#[derive(Debug)]
pub enum RouteSource {
    /// The table of this name.
    Rds(Arc<str>),
    /// This table.
    Inline(Arc<RouteTable>),
}

/// Which HTTP versions are spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Told by the first bytes.
    Auto,
    /// HTTP/1 only.
    Http1,
    /// HTTP/2 only.
    Http2,
}

/// What happens to the upstream's `server` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerHeader {
    /// Ours replaces it.
    Overwrite,
    /// Ours where there is none.
    AppendIfAbsent,
    /// Left alone.
    PassThrough,
}

/// What to do with escaped slashes in a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EscapedSlashes {
    /// Nothing.
    Keep,
    /// 400.
    Reject,
    /// Unescape, then redirect to the result.
    Redirect,
    /// Unescape and go on.
    Forward,
}

/// What to do with header names that contain underscores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underscores {
    /// Nothing.
    Allow,
    /// 400.
    Reject,
    /// The header is dropped.
    Drop,
}

impl HttpManager {
    /// What is fixed when a connection begins, as a text to compare: changes of it do not reach connections that are open.
    pub(crate) fn agreed(&self) -> String {
        let headers = (self.max_headers_kb, self.max_headers, self.headers_timeout);
        format!("{:?}", (self.codec, self.http2, headers, self.idle_timeout))
    }

    pub(crate) fn compile(m: &pb::HttpConnectionManager) -> Result<Self> {
        refuse_others(m)?;
        let common = m.common_http_protocol_options.unwrap_or_default();
        check_common(&common).within("common_http_protocol_options")?;
        let upgrades = Upgrades::of_manager(&m.upgrade_configs)?;
        Ok(Self {
            filters: HttpFilters::compile(&m.http_filters, &m.stat_prefix)?,
            routes: match &m.route_specifier {
                Some(RouteSpecifier::Rds(rds)) => {
                    RouteSource::Rds(rds.route_config_name.as_str().into())
                }
                Some(RouteSpecifier::RouteConfig(table)) => RouteSource::Inline(Arc::new(
                    RouteTable::compile(table).within("route_config")?,
                )),
                Some(RouteSpecifier::ScopedRoutes(_)) => {
                    return Err(CompileError::unsupported("scoped_routes"));
                }
                None => return Err(CompileError::new("route_specifier", "is missing")),
            },
            codec: match CodecType::try_from(m.codec_type) {
                Ok(CodecType::Auto) => Codec::Auto,
                Ok(CodecType::Http1) => Codec::Http1,
                Ok(CodecType::Http2) => Codec::Http2,
                _ => return Err(CompileError::unsupported("codec_type HTTP3")),
            },
            server_name: match m.server_name.as_str() {
                "" => HeaderValue::from_static("envoy"),
                name => HeaderValue::from_str(name)
                    .map_err(|_| CompileError::new("server_name", "is not a header value"))?,
            },
            server_header: match ServerHeaderTransformation::try_from(
                m.server_header_transformation,
            ) {
                Ok(ServerHeaderTransformation::AppendIfAbsent) => ServerHeader::AppendIfAbsent,
                Ok(ServerHeaderTransformation::PassThrough) => ServerHeader::PassThrough,
                _ => ServerHeader::Overwrite,
            },
            max_headers_kb: m
                .max_request_headers_kb
                .map_or(DEFAULT_MAX_HEADERS_KB, |v| v.value),
            max_headers: common
                .max_headers_count
                .map_or(DEFAULT_MAX_HEADERS, |v| v.value),
            idle_timeout: timeout(
                "idle_timeout",
                common.idle_timeout.as_ref(),
                DEFAULT_IDLE_TIMEOUT,
            )?,
            stream_idle_timeout: timeout(
                "stream_idle_timeout",
                m.stream_idle_timeout.as_ref(),
                DEFAULT_STREAM_IDLE_TIMEOUT,
            )?,
            max_stream_duration: nonzero_duration(
                "max_stream_duration",
                common.max_stream_duration.as_ref(),
            )?,
            request_timeout: nonzero_duration("request_timeout", m.request_timeout.as_ref())?,
            headers_timeout: nonzero_duration(
                "request_headers_timeout",
                m.request_headers_timeout.as_ref(),
            )?,
            use_remote_address: flag(m.use_remote_address.as_ref(), false),
            trusted_hops: m.xff_num_trusted_hops,
            internal: m
                .internal_address_config
                .as_ref()
                .map(|m| cidrs("cidr_ranges", &m.cidr_ranges))
                .transpose()
                .within("internal_address_config")?,
            pass_continue: m.proxy_100_continue,
            skip_xff_append: m.skip_xff_append,
            generate_request_id: flag(m.generate_request_id.as_ref(), true),
            preserve_request_id: m.preserve_external_request_id,
            request_id_in_response: m.always_set_request_id_in_response,
            normalize_path: flag(m.normalize_path.as_ref(), false),
            merge_slashes: m.merge_slashes,
            escaped_slashes: match PathWithEscapedSlashesAction::try_from(
                m.path_with_escaped_slashes_action,
            ) {
                Ok(PathWithEscapedSlashesAction::RejectRequest) => EscapedSlashes::Reject,
                Ok(PathWithEscapedSlashesAction::UnescapeAndRedirect) => EscapedSlashes::Redirect,
                Ok(PathWithEscapedSlashesAction::UnescapeAndForward) => EscapedSlashes::Forward,
                _ => EscapedSlashes::Keep,
            },
            strip_port: matches!(
                m.strip_port_mode,
                Some(StripPortMode::StripAnyHostPort(true))
            ) || m.strip_matching_host_port,
            strip_dot: m.strip_trailing_host_dot,
            upgrades,
            http10: m
                .http_protocol_options
                .as_ref()
                .is_some_and(|o| o.accept_http_10),
            underscores: match HeadersWithUnderscoresAction::try_from(
                common.headers_with_underscores_action,
            ) {
                Ok(HeadersWithUnderscoresAction::RejectRequest) => Underscores::Reject,
                Ok(HeadersWithUnderscoresAction::DropHeader) => Underscores::Drop,
                _ => Underscores::Allow,
            },
            http2: m
                .http2_protocol_options
                .as_ref()
                .map(Http2Limits::compile)
                .transpose()
                .within("http2")?
                .unwrap_or_default(),
            max_requests_per_connection: common
                .max_requests_per_connection
                .map(|v| v.value)
                .filter(|v| *v > 0),
            alpn: Alpn::of_filters(&m.http_filters)?,
            client_cert: ClientCert::compile(m),
        })
    }
}

fn refuse_others(m: &pb::HttpConnectionManager) -> Result<()> {
    every_field!(m, pb::HttpConnectionManager,
    used {
        codec_type, http_filters, common_http_protocol_options, http_protocol_options, http2_protocol_options, server_name,
        server_header_transformation, max_request_headers_kb, stream_idle_timeout, request_timeout, request_headers_timeout,
        use_remote_address, skip_xff_append, generate_request_id, preserve_external_request_id, always_set_request_id_in_response,
        upgrade_configs, normalize_path, merge_slashes, path_with_escaped_slashes_action, strip_matching_host_port,
        strip_trailing_host_dot, route_specifier, strip_port_mode, forward_client_cert_details, xff_num_trusted_hops,
        proxy_100_continue, internal_address_config, set_current_client_cert_details,
    }
    // Statistics and log settings (access logs are refused); drain times: connections are closed as they fall idle; the request id's trace bits need tracing; http3 is not offered.
    irrelevant {
        stat_prefix, http1_safe_max_connection_duration, http3_protocol_options, stream_flush_timeout, drain_timeout,
        drain_timeout_jitter, delayed_close_timeout, access_log_flush_interval, flush_access_log_on_new_request, access_log_options,
        represent_ipv4_remote_address_as_ipv4_mapped_ipv6, request_id_extension, stream_error_on_invalid_http_message,
        path_normalization_options, append_local_overload, add_proxy_protocol_connection_state, proxy_status_config, tracing,
    }
    refused {
        add_user_agent, scheme_header_transformation, access_log, original_ip_detection_extensions,
        early_header_mutation_extensions, via, local_reply_config, typed_header_validation_config, append_x_forwarded_port,
        forward_proto_config, forward_client_cert_matcher,
    });
    // A provider means spans are wanted; without one the settings do nothing.
    if m.tracing.as_ref().is_some_and(|t| t.provider.is_some()) {
        return Err(CompileError::unsupported("tracing.provider"));
    }
    if let Some(options) = &m.http_protocol_options {
        check_http1(options).within("http_protocol_options")?;
    }
    Ok(())
}

fn check_http1(m: &Http1ProtocolOptions) -> Result<()> {
    every_field!(m, Http1ProtocolOptions,
        used { accept_http_10 }
        // Absolute URLs are always accepted and trailers always passed; the rest are codec internals.
        irrelevant { allow_absolute_url, enable_trailers, override_stream_error_on_invalid_http_message, use_balsa_parser, allow_custom_methods }
        refused { default_host_for_http_10, header_key_format, allow_chunked_length, send_fully_qualified_url, ignore_http_11_upgrade });
    Ok(())
}

fn check_common(m: &HttpProtocolOptions) -> Result<()> {
    every_field!(m, HttpProtocolOptions,
        used { idle_timeout, max_headers_count, headers_with_underscores_action, max_requests_per_connection, max_stream_duration }
        irrelevant { max_connection_duration_jitter, max_response_headers_kb }
        refused { max_connection_duration });
    Ok(())
}
