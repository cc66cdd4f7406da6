//! RequestAuthentication: which tokens are checked and how.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{Duration, LabelSelector, PolicyTargetReference};

/// Which tokens are checked and how.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RequestAuthentication {
    /// Workloads; none is all of the namespace.
    pub selector: Option<LabelSelector>,
    /// Target instead of workloads, older form.
    pub target_ref: Option<PolicyTargetReference>,
    /// Targets instead of workloads.
    pub target_refs: Vec<PolicyTargetReference>,
    /// Rules; a token has to match that of its issuer.
    pub jwt_rules: Vec<JwtRule>,
}

/// How tokens of one issuer are checked.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct JwtRule {
    /// Issuer.
    pub issuer: String,
    /// Audiences, of which one has to match; default is the service's name.
    pub audiences: Vec<String>,
    /// Where the keys are.
    #[serde(alias = "jwks_uri")]
    pub jwks_uri: String,
    /// The keys themselves.
    pub jwks: String,
    /// Headers with a token; default `Authorization: Bearer`.
    pub from_headers: Vec<JwtHeader>,
    /// Query parameters with a token; default `access_token`.
    pub from_params: Vec<String>,
    /// Cookies with a token.
    pub from_cookies: Vec<String>,
    /// Header that gets the payload, base64url.
    pub output_payload_to_header: String,
    /// Headers that get claims.
    pub output_claim_to_headers: Vec<ClaimToHeader>,
    /// Keep the token in the request.
    pub forward_original_token: bool,
    /// Limit for fetching keys; default 5s.
    pub timeout: Option<Duration>,
    /// Claims whose values are lists separated by spaces.
    pub space_delimited_claims: Vec<String>,
    /// Whether a token has to be there.
    pub presence: Presence,
}

/// A header with a token.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["name"]))]
pub struct JwtHeader {
    /// Name.
    pub name: String,
    /// Text before the token.
    pub prefix: String,
}

/// A header that gets a claim.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["header", "claim"]))]
pub struct ClaimToHeader {
    /// Header.
    pub header: String,
    /// Claim; `a.b` is nested.
    pub claim: String,
}

/// Whether a token has to be there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Presence {
    /// A request without a token passes.
    #[default]
    Optional,
    /// A request without a token is refused.
    Required,
}
