//! JSON Web Tokens of other issuers (RFC 7519) and the keys that they are verified with (RFC 7517).
//!
//! Reading comes first, then the claims, then the signature, and the words for what is wrong are Envoy's, as clients see them. The
//! algorithm is taken from the token but must fit the key (RFC 8725 section 3.1): `none` does not exist, and an RSA key never becomes the
//! secret of an HMAC. Signatures are checked by aws-lc-rs itself: `jsonwebtoken` has no ES512 and does not say which key was missing.

mod json;
mod jwks;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

use crate::UnixSeconds;
pub use jwks::Jwks;

/// Longest token that is looked at, in bytes.
pub const MAX_JWT_BYTES: usize = 64 * 1024;
/// Numbers from here on are no 64-bit integers.
const TWO_TO_64: f64 = 18_446_744_073_709_551_616.0;

/// Why a token, or a key set, is no good. The texts are those of Envoy's answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    /// There is no token.
    #[error("Jwt is missing")]
    Missing,
    /// Its time has not come.
    #[error("Jwt not yet valid")]
    NotYetValid,
    /// Its time is over.
    #[error("Jwt is expired")]
    Expired,
    /// Not three sections, or longer than [`MAX_JWT_BYTES`].
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    BadFormat,
    /// The header is no base64url.
    #[error("Jwt header is an invalid Base64url encoded")]
    HeaderBase64,
    /// The header is no JSON object, or says something twice.
    #[error("Jwt header is an invalid JSON")]
    HeaderJson,
    /// No algorithm.
    #[error("Jwt header [alg] field is required and must be a string")]
    HeaderAlg,
    /// An algorithm that is not taken, as `none`.
    #[error("Jwt header [alg] is not supported")]
    UnknownAlg,
    /// The key id is no text.
    #[error("Jwt header [kid] field is not a string")]
    HeaderKid,
    /// The payload is no base64url.
    #[error("Jwt payload is an invalid Base64url encoded")]
    PayloadBase64,
    /// The payload is no JSON object, or says something twice.
    #[error("Jwt payload is an invalid JSON")]
    PayloadJson,
    /// A claim that must be text is none.
    #[error("Jwt payload [{0}] field is not a string")]
    NotText(&'static str),
    /// A claim that must be a time is no number.
    #[error("Jwt payload [{0}] field is not an integer")]
    NotNumber(&'static str),
    /// A claim that must be a time is negative or too large.
    #[error("Jwt payload [{0}] field is not a positive 64 bit integer")]
    OutOfRange(&'static str),
    /// The audience is neither text nor a list of texts.
    #[error("Jwt payload [aud] field is not a string or string list")]
    Audiences,
    /// The signature is no base64url.
    #[error("Jwt signature is an invalid Base64url encoded")]
    SignatureBase64,
    /// Wrong length for Ed25519.
    #[error("Jwt ED25519 signature is wrong length")]
    Ed25519Length,
    /// Nobody takes tokens of this issuer.
    #[error("Jwt issuer is not configured")]
    UnknownIssuer,
    /// It is meant for others.
    #[error("Audiences in Jwt are not allowed")]
    AudienceNotAllowed,
    /// The signature is not that of a key.
    #[error("Jwt verification fails")]
    VerificationFail,
    /// The key set is no JSON.
    #[error("Jwks is an invalid JSON")]
    JwksJson,
    /// The key set has no keys.
    #[error("Jwks does not have [keys] field")]
    JwksNoKeys,
    /// Its keys are no list.
    #[error("[keys] in Jwks is not an array")]
    JwksBadKeys,
    /// None of its keys can be used.
    #[error("Jwks doesn't have any valid public key")]
    JwksNoValidKeys,
    /// No key has the token's id and algorithm.
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    KidAlgMismatch,
    /// The keys could not be fetched.
    #[error("Jwks remote fetch is failed")]
    FetchFail,
}

/// A token that was read; nothing of it is to be believed before [`Jwks::verify`].
#[derive(Debug, Clone)]
pub struct Jwt {
    header: Map<String, Value>,
    payload: Map<String, Value>,
    alg: String,
    kid: String,
    issuer: String,
    subject: String,
    audiences: Vec<String>,
    issued: UnixSeconds,
    not_before: UnixSeconds,
    expires: UnixSeconds,
    /// Header and payload as they were signed.
    signed: String,
    header_len: usize,
    signature: Vec<u8>,
}

/// What is taken: RFC 7518 section 3.1 without `none`, and RFC 8037.
const ALGORITHMS: &[&str] = &[
    "ES256", "ES384", "ES512", "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256",
    "PS384", "PS512", "EdDSA",
];

impl Jwt {
    /// Reads a token in compact form.
    pub fn parse(token: &str) -> Result<Self, JwtError> {
        if token.len() > MAX_JWT_BYTES {
            return Err(JwtError::BadFormat);
        }
        let mut sections = token.split('.');
        let (Some(head), Some(body), Some(signature), None) = (
            sections.next(),
            sections.next(),
            sections.next(),
            sections.next(),
        ) else {
            return Err(JwtError::BadFormat);
        };
        if head.is_empty() || body.is_empty() || signature.is_empty() {
            return Err(JwtError::BadFormat);
        }
        let header = decode(head).ok_or(JwtError::HeaderBase64)?;
        let header = json::object(&header).ok_or(JwtError::HeaderJson)?;
        let alg = match header.get("alg") {
            Some(Value::String(alg)) => alg.clone(),
            _ => return Err(JwtError::HeaderAlg),
        };
        if !ALGORITHMS.contains(&alg.as_str()) {
            return Err(JwtError::UnknownAlg);
        }
        let kid = match header.get("kid") {
            None => String::new(),
            Some(Value::String(kid)) => kid.clone(),
            Some(_) => return Err(JwtError::HeaderKid),
        };
        let payload = decode(body).ok_or(JwtError::PayloadBase64)?;
        let payload = json::object(&payload).ok_or(JwtError::PayloadJson)?;
        let signed = head.len() + 1 + body.len();
        text(&payload, "jti")?;
        Ok(Self {
            alg,
            kid,
            issuer: text(&payload, "iss")?,
            subject: text(&payload, "sub")?,
            issued: time(&payload, "iat")?,
            not_before: time(&payload, "nbf")?,
            expires: time(&payload, "exp")?,
            audiences: audiences(&payload)?,
            signature: decode(signature).ok_or(JwtError::SignatureBase64)?,
            signed: token.get(..signed).unwrap_or_default().to_owned(),
            header_len: head.len(),
            header,
            payload,
        })
    }

    /// The `iss` claim, empty where there is none.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The `sub` claim, empty where there is none.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The `aud` claim.
    pub fn audiences(&self) -> &[String] {
        &self.audiences
    }

    /// The `iat` claim, 0 where there is none.
    pub fn issued(&self) -> UnixSeconds {
        self.issued
    }

    /// The `exp` claim, 0 where there is none.
    pub fn expires(&self) -> UnixSeconds {
        self.expires
    }

    /// All claims.
    pub fn payload(&self) -> &Map<String, Value> {
        &self.payload
    }

    /// The header.
    pub fn header(&self) -> &Map<String, Value> {
        &self.header
    }

    /// The payload as it stands in the token.
    pub fn payload_base64(&self) -> &str {
        self.signed.get(self.header_len + 1..).unwrap_or_default()
    }

    /// Is now its time? Clocks may differ by `skew` seconds.
    pub fn check_time(&self, now: UnixSeconds, skew: u64) -> Result<(), JwtError> {
        if now.saturating_add(skew) < self.not_before {
            return Err(JwtError::NotYetValid);
        }
        if self.expires > 0 && now > self.expires.saturating_add(skew) {
            return Err(JwtError::Expired);
        }
        Ok(())
    }

    /// Is it meant for one of `wanted`? None wanted takes any. A scheme and a final slash do not count (jwt_verify_lib,
    /// `CheckAudience`).
    pub fn check_audience(&self, wanted: &[String]) -> Result<(), JwtError> {
        let has = |wanted: &String| {
            let wanted = bare(wanted);
            self.audiences.iter().any(|have| bare(have) == wanted)
        };
        match wanted.is_empty() || wanted.iter().any(has) {
            true => Ok(()),
            false => Err(JwtError::AudienceNotAllowed),
        }
    }
}

fn bare(audience: &str) -> &str {
    let without = audience.strip_prefix("https://");
    let without = without.or_else(|| audience.strip_prefix("http://"));
    let without = without.unwrap_or(audience);
    without.strip_suffix('/').unwrap_or(without)
}

fn decode(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

fn text(payload: &Map<String, Value>, claim: &'static str) -> Result<String, JwtError> {
    match payload.get(claim) {
        None => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(JwtError::NotText(claim)),
    }
}

/// NumericDate (RFC 7519 section 2); fractions are cut off.
fn time(payload: &Map<String, Value>, claim: &'static str) -> Result<UnixSeconds, JwtError> {
    match payload.get(claim) {
        None => Ok(0),
        Some(Value::Number(number)) => match (number.as_u64(), number.as_f64()) {
            (Some(seconds), _) => Ok(seconds),
            // In range, so that nothing but the fraction is lost.
            (None, Some(seconds)) if (0.0..TWO_TO_64).contains(&seconds) => Ok(seconds as u64),
            _ => Err(JwtError::OutOfRange(claim)),
        },
        Some(_) => Err(JwtError::NotNumber(claim)),
    }
}

fn audiences(payload: &Map<String, Value>) -> Result<Vec<String>, JwtError> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        _ => Err(JwtError::Audiences),
    };
    match payload.get("aud") {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(one).collect(),
        Some(value) => one(value).map(|audience| vec![audience]),
    }
}
