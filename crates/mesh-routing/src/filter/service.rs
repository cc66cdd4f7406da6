//! HTTP services that filters ask (`envoy.config.core.v3.HttpUri`).

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::HttpUri;
use envoy_types::pb::envoy::config::core::v3::http_uri::HttpUpstreamType;
use http::{HeaderValue, Uri};

use crate::error::{CompileError, Result, every_field, nonzero_duration};

/// A resource of a service of the mesh's own clusters.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HttpService {
    /// The cluster.
    pub cluster: Arc<str>,
    /// Host and port of the address, for the `host` header.
    pub authority: HeaderValue,
    /// Path and query of the address, at least `/`.
    pub path: Box<str>,
    /// Longest wait for the whole answer.
    pub timeout: Duration,
}

impl HttpService {
    pub(crate) fn compile(m: Option<&HttpUri>) -> Result<Self> {
        let m = m.ok_or_else(|| CompileError::new("uri", "is missing"))?;
        every_field!(m, HttpUri, used { uri, timeout, http_upstream_type } irrelevant {} refused {});
        let broken = |why: &str| CompileError::new("uri", format!("{:?} {why}", m.uri));
        // Envoy takes what stands there without a scheme, too.
        let text = match m.uri.contains("://") {
            true => m.uri.clone(),
            false => format!("http://{}", m.uri),
        };
        let uri: Uri = text.parse().map_err(|_| broken("is not an address"))?;
        let authority = uri.authority().ok_or_else(|| broken("names no host"))?;
        let cluster = match &m.http_upstream_type {
            Some(HttpUpstreamType::Cluster(name)) if !name.is_empty() => name.as_str().into(),
            _ => return Err(CompileError::new("cluster", "is missing")),
        };
        let timeout = nonzero_duration("timeout", m.timeout.as_ref())?;
        Ok(Self {
            cluster,
            authority: HeaderValue::from_str(authority.as_str())
                .map_err(|_| broken("names no host"))?,
            path: uri.path_and_query().map_or("/", |p| p.as_str()).into(),
            timeout: timeout.ok_or_else(|| CompileError::new("timeout", "is missing"))?,
        })
    }
}
