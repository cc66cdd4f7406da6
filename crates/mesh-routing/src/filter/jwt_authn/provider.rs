//! Who issues tokens, where requests carry them, and what is made of good ones.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::jwt_provider::JwksSourceSpecifier;
use http::HeaderName;
use http::header::AUTHORIZATION;

use crate::error::{CompileError, Result, Within, duration, every_field};
use crate::filter::service::HttpService;
use crate::matcher::StringMatch;

/// Envoy's allowance for clocks that differ.
const CLOCK_SKEW: u64 = 60;
/// Envoy's time to keep fetched keys.
const KEEP_KEYS: Duration = Duration::from_secs(600);
/// Where tokens are looked for, unless the provider says otherwise.
const BEARER: &str = "Bearer ";
const ACCESS_TOKEN: &str = "access_token";

/// Who issues tokens.
#[derive(Debug)]
pub struct Provider {
    /// Its name in the configuration.
    pub name: Box<str>,
    /// Tells providers of the process apart, also those of older configurations.
    pub id: u64,
    /// The `iss` claim; `None` takes any.
    pub issuer: Option<Box<str>>,
    /// Of the `aud` claim one must be among these; empty takes any.
    pub audiences: Arc<[String]>,
    /// The `sub` claim.
    pub subjects: Option<StringMatch>,
    /// Tokens without `exp` are refused.
    pub require_expiration: bool,
    /// Longest time from issue (or now) to the end that a token may have.
    pub max_lifetime: Option<Duration>,
    /// Good tokens stay in the request.
    pub forward: bool,
    /// Headers that carry tokens, with what stands before them.
    pub headers: Vec<FromHeader>,
    /// Query parameters that carry tokens.
    pub params: Vec<Box<str>>,
    /// Cookies that carry tokens.
    pub cookies: Vec<Box<str>>,
    /// The payload of good tokens goes into this header.
    pub payload_header: Option<HeaderName>,
    /// It gets the padding of base64.
    pub padded: bool,
    /// It goes into the metadata under this name.
    pub payload_metadata: Option<Box<str>>,
    /// Claims of it that are lists of words there.
    pub word_lists: Vec<Box<str>>,
    /// The header of good tokens goes into the metadata under this name.
    pub header_metadata: Option<Box<str>>,
    /// Why a token was refused goes into the metadata under this name.
    pub failure_metadata: Option<Box<str>>,
    /// Seconds that clocks may differ.
    pub clock_skew: u64,
    /// Claims of good tokens that go into headers.
    pub claim_headers: Vec<ClaimHeader>,
    /// The route is looked for again.
    pub clear_route: bool,
    /// Where the keys come from.
    pub keys: KeySource,
}

/// A header that may carry a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FromHeader {
    /// The header.
    pub name: HeaderName,
    /// What stands before the token.
    pub prefix: Box<str>,
}

/// A claim that goes into a header.
#[derive(Debug)]
pub struct ClaimHeader {
    /// The header.
    pub name: HeaderName,
    /// The names that lead to the claim.
    pub claim: Vec<Box<str>>,
}

/// Where keys come from.
#[derive(Debug)]
pub enum KeySource {
    /// They stand in the configuration.
    Inline(Box<str>),
    /// In a file, which is read again when it changes.
    File(PathBuf),
    /// They are fetched.
    Remote(RemoteKeys),
}

/// Keys that are fetched.
#[derive(Debug)]
pub struct RemoteKeys {
    /// From where.
    pub service: HttpService,
    /// How long they are good.
    pub keep: Duration,
    /// Further tries when a fetch fails.
    pub retries: u32,
    /// First wait before such a try.
    pub back_off: Duration,
    /// They are fetched before a request asks for them.
    pub ahead: bool,
}

impl Provider {
    pub(super) fn compile(name: &str, m: &pb::JwtProvider) -> Result<Self> {
        every_field!(m, pb::JwtProvider,
            used {
                issuer, audiences, subjects, require_expiration, max_lifetime, forward, from_headers, from_params, from_cookies,
                forward_payload_header, pad_forward_payload_header, payload_in_metadata, normalize_payload_in_metadata,
                header_in_metadata, failed_status_in_metadata, clock_skew_seconds, claim_to_headers, clear_route_cache,
                jwks_source_specifier,
            }
            // Verified tokens are always remembered.
            irrelevant { jwt_cache_config }
            refused {});
        let text = |text: &String| (!text.is_empty()).then(|| text.as_str().into());
        let mut provider = Self {
            name: name.into(),
            id: next_id(),
            issuer: text(&m.issuer),
            audiences: m.audiences.clone().into(),
            subjects: m
                .subjects
                .as_ref()
                .map(StringMatch::compile)
                .transpose()
                .within("subjects")?,
            require_expiration: m.require_expiration,
            max_lifetime: duration("max_lifetime", m.max_lifetime.as_ref())?,
            forward: m.forward,
            headers: Vec::with_capacity(m.from_headers.len()),
            params: boxed(&m.from_params),
            cookies: boxed(&m.from_cookies),
            payload_header: match m.forward_payload_header.as_str() {
                "" => None,
                name => Some(header_name("forward_payload_header", name)?),
            },
            padded: m.pad_forward_payload_header,
            payload_metadata: text(&m.payload_in_metadata),
            word_lists: m
                .normalize_payload_in_metadata
                .as_ref()
                .map_or_else(Vec::new, |n| boxed(&n.space_delimited_claims)),
            header_metadata: text(&m.header_in_metadata),
            failure_metadata: text(&m.failed_status_in_metadata),
            clock_skew: match m.clock_skew_seconds {
                0 => CLOCK_SKEW,
                seconds => seconds.into(),
            },
            claim_headers: Vec::with_capacity(m.claim_to_headers.len()),
            clear_route: m.clear_route_cache,
            keys: KeySource::compile(m.jwks_source_specifier.as_ref())?,
        };
        for header in &m.from_headers {
            every_field!(header, pb::JwtHeader, used { name, value_prefix } irrelevant {} refused {});
            provider.headers.push(FromHeader {
                name: header_name("from_headers.name", &header.name)?,
                prefix: header.value_prefix.as_str().into(),
            });
        }
        for (i, m) in m.claim_to_headers.iter().enumerate() {
            let claim = ClaimHeader::compile(m).within(format_args!("claim_to_headers[{i}]"))?;
            provider.claim_headers.push(claim);
        }
        if provider.headers.is_empty() && provider.params.is_empty() && provider.cookies.is_empty()
        {
            provider.headers.push(FromHeader {
                name: AUTHORIZATION,
                prefix: BEARER.into(),
            });
            provider.params.push(ACCESS_TOKEN.into());
        }
        Ok(provider)
    }
}

/// Numbers for providers; which one gets which means nothing.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn boxed(list: &[String]) -> Vec<Box<str>> {
    list.iter().map(|text| text.as_str().into()).collect()
}

fn header_name(field: &str, name: &str) -> Result<HeaderName> {
    let broken = |_| CompileError::new(field, format!("{name:?} is not a header name"));
    name.parse().map_err(broken)
}

impl ClaimHeader {
    fn compile(m: &pb::JwtClaimToHeader) -> Result<Self> {
        every_field!(m, pb::JwtClaimToHeader, used { header_name, claim_name, claim_path } irrelevant {} refused {});
        let claim = match m.claim_path.is_empty() {
            // Dots lead into objects (jwt_verify_lib's StructUtils).
            true => m.claim_name.split('.').map(Into::into).collect(),
            false => m
                .claim_path
                .iter()
                .map(|segment| segment.key.as_str().into())
                .collect(),
        };
        Ok(Self {
            name: header_name("header_name", &m.header_name)?,
            claim,
        })
    }
}

impl KeySource {
    fn compile(m: Option<&JwksSourceSpecifier>) -> Result<Self> {
        match m {
            None => Err(CompileError::new(
                "jwks_source_specifier",
                "neither remote_jwks nor local_jwks is set",
            )),
            Some(JwksSourceSpecifier::LocalJwks(m)) => Self::local(m).within("local_jwks"),
            Some(JwksSourceSpecifier::RemoteJwks(m)) => RemoteKeys::compile(m)
                .within("remote_jwks")
                .map(Self::Remote),
        }
    }

    fn local(m: &DataSource) -> Result<Self> {
        every_field!(m, DataSource,
            used { specifier }
            // Files are watched by themselves.
            irrelevant { watched_directory }
            refused {});
        match &m.specifier {
            Some(Specifier::Filename(path)) => Ok(Self::File(path.into())),
            Some(Specifier::InlineString(text)) => Ok(Self::Inline(text.as_str().into())),
            Some(Specifier::InlineBytes(bytes)) => match std::str::from_utf8(bytes) {
                Ok(text) => Ok(Self::Inline(text.into())),
                Err(_) => Err(CompileError::new("inline_bytes", "is not UTF-8")),
            },
            Some(Specifier::EnvironmentVariable(_)) => {
                Err(CompileError::unsupported("environment_variable"))
            }
            None => Err(CompileError::new("specifier", "is missing")),
        }
    }
}

impl RemoteKeys {
    fn compile(m: &pb::RemoteJwks) -> Result<Self> {
        every_field!(m, pb::RemoteJwks,
            used { http_uri, cache_duration, async_fetch, retry_policy }
            irrelevant {}
            refused {});
        let retries = m.retry_policy.as_ref();
        let back_off = retries.and_then(|retries| retries.retry_back_off.as_ref());
        let back_off = back_off.and_then(|back_off| back_off.base_interval.as_ref());
        let back_off = duration("retry_policy.retry_back_off.base_interval", back_off)?;
        Ok(Self {
            service: HttpService::compile(m.http_uri.as_ref()).within("http_uri")?,
            keep: duration("cache_duration", m.cache_duration.as_ref())?.unwrap_or(KEEP_KEYS),
            retries: retries.map_or(0, |r| r.num_retries.as_ref().map_or(1, |n| n.value)),
            back_off: back_off.unwrap_or(Duration::from_secs(1)),
            ahead: m.async_fetch.is_some(),
        })
    }
}
