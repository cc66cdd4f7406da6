//! Authorization services that are asked by a request like the client's.

use envoy_types::pb::envoy::config::core::v3::HeaderValue as PbHeader;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3::ListStringMatcher;
use http::{HeaderName, HeaderValue};

use super::list;
use crate::error::{CompileError, Result, Within, every_field};
use crate::filter::service::HttpService;
use crate::matcher::StringMatch;

/// A compiled `HttpService` of external authorization.
#[derive(Debug)]
pub struct AuthorizationHttp {
    /// Where it is; of its address only cluster and timeout count, as the question is addressed like the client's request.
    pub service: HttpService,
    /// Stands before the request's path.
    pub path_prefix: Box<str>,
    /// Stands in the place of the request's path.
    pub path_override: Option<Box<str>>,
    /// Added to the question.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// What becomes of the answer's headers.
    pub out: HeadersOut,
    pub(super) allowed: Option<Vec<StringMatch>>,
}

/// What becomes of the headers of the service's answer.
#[derive(Debug, Default)]
pub struct HeadersOut {
    to_upstream: Vec<StringMatch>,
    append_upstream: Vec<StringMatch>,
    /// `None`: all but `host` (and what belongs to the connection) go to a refused client.
    to_refused: Option<Vec<StringMatch>>,
    to_client: Vec<StringMatch>,
    to_metadata: Vec<StringMatch>,
}

impl AuthorizationHttp {
    pub(super) fn compile(m: &pb::HttpService) -> Result<Self> {
        every_field!(m, pb::HttpService,
            used { server_uri, path_prefix, path_override, authorization_request, authorization_response }
            irrelevant {}
            refused { retry_policy });
        if !m.path_prefix.is_empty() && !m.path_prefix.starts_with('/') {
            return Err(CompileError::new("path_prefix", "must begin with a slash"));
        }
        let mut http = Self {
            service: HttpService::compile(m.server_uri.as_ref()).within("server_uri")?,
            path_prefix: m.path_prefix.as_str().into(),
            path_override: (!m.path_override.is_empty()).then(|| m.path_override.as_str().into()),
            headers: Vec::new(),
            out: HeadersOut::default(),
            allowed: None,
        };
        if let Some(m) = &m.authorization_request {
            http.request(m).within("authorization_request")?;
        }
        if let Some(m) = &m.authorization_response {
            http.out = HeadersOut::compile(m).within("authorization_response")?;
        }
        Ok(http)
    }

    fn request(&mut self, m: &pb::AuthorizationRequest) -> Result<()> {
        every_field!(m, pb::AuthorizationRequest, used { allowed_headers, headers_to_add } irrelevant {} refused {});
        self.allowed = m
            .allowed_headers
            .as_ref()
            .map(list)
            .transpose()
            .within("allowed_headers")?;
        for (i, header) in m.headers_to_add.iter().enumerate() {
            let pair = pair(header);
            self.headers.push(pair.ok_or_else(|| {
                CompileError::new(format!("headers_to_add[{i}]"), "is not a header")
            })?);
        }
        Ok(())
    }
}

fn pair(header: &PbHeader) -> Option<(HeaderName, HeaderValue)> {
    let value = match header.raw_value.is_empty() {
        true => HeaderValue::from_str(&header.value),
        false => HeaderValue::from_bytes(&header.raw_value),
    };
    header.key.parse().ok().zip(value.ok())
}

impl HeadersOut {
    fn compile(m: &pb::AuthorizationResponse) -> Result<Self> {
        every_field!(m, pb::AuthorizationResponse,
            used {
                allowed_upstream_headers, allowed_upstream_headers_to_append, allowed_client_headers,
                allowed_client_headers_on_success, dynamic_metadata_from_headers,
            }
            irrelevant {}
            refused {});
        let all =
            |field: &str, m: Option<&ListStringMatcher>| m.map(list).transpose().within(field);
        let some = |field: &str, m| all(field, m).map(Option::unwrap_or_default);
        Ok(Self {
            to_upstream: some(
                "allowed_upstream_headers",
                m.allowed_upstream_headers.as_ref(),
            )?,
            append_upstream: some(
                "allowed_upstream_headers_to_append",
                m.allowed_upstream_headers_to_append.as_ref(),
            )?,
            to_refused: all("allowed_client_headers", m.allowed_client_headers.as_ref())?
                .filter(|list| !list.is_empty()),
            to_client: some(
                "allowed_client_headers_on_success",
                m.allowed_client_headers_on_success.as_ref(),
            )?,
            to_metadata: some(
                "dynamic_metadata_from_headers",
                m.dynamic_metadata_from_headers.as_ref(),
            )?,
        })
    }

    /// Does this header of a yes take the place of the request's?
    pub fn to_upstream(&self, name: &str) -> bool {
        any(&self.to_upstream, name)
    }

    /// Is this header of a yes appended to the request's?
    pub fn append_upstream(&self, name: &str) -> bool {
        any(&self.append_upstream, name)
    }

    /// Does this header of a no go to the client?
    pub fn to_refused(&self, name: &str) -> bool {
        match &self.to_refused {
            // Where they are named, a few more go in any case (Envoy: `toClientMatchers`).
            Some(list) => any(list, name) || matches!(name, "location" | "www-authenticate"),
            None => name != "host",
        }
    }

    /// Does this header of a yes go to the client?
    pub fn to_client(&self, name: &str) -> bool {
        any(&self.to_client, name)
    }

    /// Does this header of any answer go into the metadata?
    pub fn to_metadata(&self, name: &str) -> bool {
        any(&self.to_metadata, name)
    }
}

fn any(list: &[StringMatch], name: &str) -> bool {
    list.iter().any(|m| m.matches(name))
}
