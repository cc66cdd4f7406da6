//! How an endpoint is spoken to: HTTP versions, limits of connections.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{Http2ProtocolOptions, HttpProtocolOptions, TcpKeepalive};
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as http_options;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::UpstreamProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
use envoy_types::pb::google::protobuf::Any;
use prost::Message;

use crate::cluster::{ClusterConfig, NamesFromRequests};
use crate::error::{CompileError, Result, Within, every_field, nonzero_duration, timeout};

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
/// Envoy's idle timeout of upstream connections.
pub(crate) const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// HTTP version toward the endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// The version of the request.
    AsDownstream,
}

/// HTTP/2 settings; `None` leaves the default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Http2Limits {
    /// Concurrent streams.
    pub max_concurrent_streams: Option<u32>,
    /// Window of a stream, in bytes.
    pub stream_window: Option<u32>,
    /// Window of a connection, in bytes.
    pub connection_window: Option<u32>,
    /// PING after so long without anything from the other side, and the wait for its answer.
    pub keepalive: Option<(Duration, Duration)>,
    /// Clients may use CONNECT with a protocol (RFC 8441).
    pub allow_connect: bool,
}

impl Http2Limits {
    pub(crate) fn compile(m: &Http2ProtocolOptions) -> Result<Self> {
        every_field!(m, Http2ProtocolOptions,
            used { max_concurrent_streams, initial_stream_window_size, initial_connection_window_size, connection_keepalive, allow_connect }
            // Budgets against floods and codec internals: the library's own limits hold.
            irrelevant {
                hpack_table_size, max_outbound_frames, max_outbound_control_frames, max_consecutive_inbound_frames_with_empty_payload,
                max_inbound_priority_frames_per_stream, max_inbound_window_update_frames_per_data_frame_sent,
                stream_error_on_invalid_http_messaging, override_stream_error_on_invalid_http_message,
                use_oghttp2_codec, max_metadata_size, enable_huffman_encoding, max_header_field_size_kb, disallow_obs_text,
                stream_reset_burst, stream_reset_rate,
            }
            refused { allow_metadata, custom_settings_parameters });
        let keepalive = match &m.connection_keepalive {
            // connection_idle_interval, interval_jitter: finer points of when to ask.
            Some(keepalive) => {
                let interval = nonzero_duration("interval", keepalive.interval.as_ref())
                    .within("connection_keepalive")?;
                let wait = nonzero_duration("timeout", keepalive.timeout.as_ref())
                    .within("connection_keepalive")?;
                interval.zip(wait)
            }
            None => None,
        };
        Ok(Self {
            max_concurrent_streams: m.max_concurrent_streams.map(|v| v.value),
            stream_window: m.initial_stream_window_size.map(|v| v.value),
            connection_window: m.initial_connection_window_size.map(|v| v.value),
            keepalive,
            allow_connect: m.allow_connect,
        })
    }
}

/// TCP keep-alive; `None` leaves the kernel's setting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// Unanswered probes until the connection is given up.
    pub probes: Option<u32>,
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
}

impl Keepalive {
    pub(crate) fn compile(m: &TcpKeepalive) -> Self {
        let seconds = |v: u32| Duration::from_secs(v.into());
        Self {
            probes: m.keepalive_probes.map(|v| v.value),
            time: m.keepalive_time.map(|v| seconds(v.value)),
            interval: m.keepalive_interval.map(|v| seconds(v.value)),
        }
    }
}

impl ClusterConfig {
    /// Takes one entry of `typed_extension_protocol_options`.
    pub(crate) fn apply_options(&mut self, key: &str, any: &Any) -> Result<()> {
        if !any.type_url.ends_with(HTTP_OPTIONS) {
            return Err(CompileError::unsupported(key));
        }
        let m = http_options::HttpProtocolOptions::decode(any.value.as_slice())
            .map_err(|error| CompileError::new("value", error.to_string()))?;
        every_field!(&m, http_options::HttpProtocolOptions,
            used { common_http_protocol_options, upstream_protocol_options, http_filters, upstream_http_protocol_options }
            irrelevant {}
            refused { header_validation_config, outlier_detection, request_mirror_policies, hash_policy, retry_policy });
        if m.http_filters
            .iter()
            .any(|f| f.name != "envoy.filters.http.upstream_codec")
        {
            return Err(CompileError::unsupported("http_filters"));
        }
        if let Some(common) = &m.common_http_protocol_options {
            self.apply_common(common)
                .within("common_http_protocol_options")?;
        }
        if let Some(names) = &m.upstream_http_protocol_options {
            self.transports.names =
                NamesFromRequests::compile(names).within("upstream_http_protocol_options")?;
        }
        match &m.upstream_protocol_options {
            Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => {
                match &explicit.protocol_config {
                    Some(ProtocolConfig::Http2ProtocolOptions(options)) => {
                        self.protocol = UpstreamProtocol::Http2;
                        self.tunnels_in_http2 = true;
                        self.http2 = Http2Limits::compile(options)?;
                    }
                    Some(ProtocolConfig::Http3ProtocolOptions(_)) => {
                        return Err(CompileError::unsupported("http3_protocol_options"));
                    }
                    Some(ProtocolConfig::HttpProtocolOptions(_)) | None => {
                        self.protocol = UpstreamProtocol::Http1;
                        self.tunnels_in_http2 = false;
                    }
                }
            }
            Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(options)) => {
                self.protocol = UpstreamProtocol::AsDownstream;
                self.tunnels_in_http2 = options.http2_protocol_options.is_some();
                if let Some(options) = &options.http2_protocol_options {
                    self.http2 = Http2Limits::compile(options)?;
                }
            }
            Some(UpstreamProtocolOptions::AutoConfig(_)) => {
                return Err(CompileError::unsupported("auto_config"));
            }
            None => {}
        }
        Ok(())
    }

    fn apply_common(&mut self, m: &HttpProtocolOptions) -> Result<()> {
        every_field!(m, HttpProtocolOptions,
            used { idle_timeout, max_connection_duration, max_requests_per_connection }
            // headers_with_underscores_action concerns requests that come in, not those that go out. The jitter of a duration that is
            // looked at once a second.
            irrelevant { headers_with_underscores_action, max_connection_duration_jitter }
            refused { max_headers_count, max_response_headers_kb, max_stream_duration });
        self.idle_timeout = timeout(
            "idle_timeout",
            m.idle_timeout.as_ref(),
            DEFAULT_IDLE_TIMEOUT,
        )?;
        self.max_connection_duration = nonzero_duration(
            "max_connection_duration",
            m.max_connection_duration.as_ref(),
        )?;
        self.max_requests_per_connection = m
            .max_requests_per_connection
            .map(|v| v.value)
            .filter(|v| *v > 0)
            .or(self.max_requests_per_connection);
        Ok(())
    }
}
