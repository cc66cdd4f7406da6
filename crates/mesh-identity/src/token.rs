//! Service account tokens as the API server issues them: JWTs signed with ES256, bound to audiences, a time, and optionally a pod.

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use rcgen::KeyPair;
use serde::{Deserialize, Serialize};

use crate::UnixSeconds;

/// Longest token that is looked at, in bytes; a longer one is refused before anything is parsed.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// Why a token was not issued or not accepted.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The signing key can't be used.
    #[error("loading the service account signing key: {0}; delete it to have a new one made")]
    Key(String),
    /// The token could not be signed.
    #[error("signing a service account token: {0}")]
    Sign(String),
    /// The token is longer than [`MAX_TOKEN_BYTES`].
    #[error("the token has {0} bytes, more than {MAX_TOKEN_BYTES}")]
    TooLong(usize),
    /// Signature, algorithm or form is wrong.
    #[error("the token is invalid: {0}")]
    Invalid(String),
    /// The token was issued by somebody else.
    #[error("the token's issuer {0:?} is not this server")]
    Issuer(String),
    /// The token's time is over.
    #[error("the token has expired")]
    Expired,
    /// The token's time has not come.
    #[error("the token is not valid yet")]
    NotYet,
    /// The token is meant for others.
    #[error("the token's audiences {have:?} have none of {want:?}")]
    Audience {
        /// What the token carries.
        have: Vec<String>,
        /// What was asked for.
        want: Vec<String>,
    },
}

/// An object that a token is bound to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectRef {
    /// The object's name.
    pub name: String,
    /// The object's uid; empty when it is not known.
    #[serde(default)]
    pub uid: String,
}

/// The `kubernetes.io` claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KubernetesClaim {
    /// The service account's namespace.
    pub namespace: String,
    /// The service account.
    pub serviceaccount: ObjectRef,
    /// The pod that the token is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<ObjectRef>,
}

/// The claims of a service account token (Kubernetes, "Managing Service Accounts", bound tokens).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// For whom the token is meant.
    pub aud: Vec<String>,
    /// End of validity, seconds since 1970.
    pub exp: UnixSeconds,
    /// Time of issue, seconds since 1970.
    pub iat: UnixSeconds,
    /// Start of validity, seconds since 1970.
    pub nbf: UnixSeconds,
    /// The issuer.
    pub iss: String,
    /// A unique id of the token.
    pub jti: String,
    /// What Kubernetes adds.
    #[serde(rename = "kubernetes.io")]
    pub kubernetes: KubernetesClaim,
    /// `system:serviceaccount:NAMESPACE:NAME`.
    pub sub: String,
}

/// What a token is asked for.
pub struct TokenRequest<'a> {
    /// The service account's namespace.
    pub namespace: &'a str,
    /// The service account's name and uid.
    pub service_account: ObjectRef,
    /// The pod to bind the token to.
    pub pod: Option<ObjectRef>,
    /// For whom the token is meant; empty means the issuer itself.
    pub audiences: Vec<String>,
    /// A unique id for the token.
    pub id: String,
    /// Time of issue.
    pub now: UnixSeconds,
    /// Validity in seconds.
    pub lifetime_seconds: u64,
}

/// The API server's key for service account tokens.
pub struct TokenKeys {
    issuer: String,
    key_pem: String,
    signing: EncodingKey,
    checking: DecodingKey,
}

impl TokenKeys {
    /// Makes a new ECDSA P-256 key. `issuer` becomes the `iss` claim and the default audience.
    pub fn generate(issuer: &str) -> Result<Self, TokenError> {
        let key = KeyPair::generate().map_err(|e| TokenError::Key(e.to_string()))?;
        Self::from_pem(issuer, &key.serialize_pem())
    }

    /// Loads a PKCS #8 PEM key.
    pub fn from_pem(issuer: &str, key_pem: &str) -> Result<Self, TokenError> {
        let key = KeyPair::from_pem(key_pem).map_err(|e| TokenError::Key(e.to_string()))?;
        let signing = EncodingKey::from_ec_pem(key_pem.as_bytes())
            .map_err(|e| TokenError::Key(e.to_string()))?;
        let checking = DecodingKey::from_ec_pem(key.public_key_pem().as_bytes())
            .map_err(|e| TokenError::Key(e.to_string()))?;
        Ok(Self {
            issuer: issuer.to_owned(),
            key_pem: key_pem.to_owned(),
            signing,
            checking,
        })
    }

    /// The private key, PEM.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The issuer, which is the default audience too.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// Issues a token.
    pub fn issue(&self, request: TokenRequest<'_>) -> Result<String, TokenError> {
        let aud = if request.audiences.is_empty() {
            vec![self.issuer.clone()]
        } else {
            request.audiences
        };
        let claims = Claims {
            aud,
            exp: request.now + request.lifetime_seconds,
            iat: request.now,
            nbf: request.now,
            iss: self.issuer.clone(),
            jti: request.id,
            sub: format!(
                "system:serviceaccount:{}:{}",
                request.namespace, request.service_account.name
            ),
            kubernetes: KubernetesClaim {
                namespace: request.namespace.to_owned(),
                serviceaccount: request.service_account,
                pod: request.pod,
            },
        };
        encode(&Header::new(Algorithm::ES256), &claims, &self.signing)
            .map_err(|e| TokenError::Sign(e.to_string()))
    }

    /// Checks signature, issuer, time and audience (any one of `audiences`; empty means the issuer's own).
    ///
    /// Whether the service account and the pod still exist is the caller's to check.
    pub fn check(
        &self,
        token: &str,
        audiences: &[String],
        now: UnixSeconds,
    ) -> Result<Claims, TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::TooLong(token.len()));
        }
        // The algorithm is ours, never the token's (RFC 8725 section 3.1); time and audience are judged below, with the time given.
        let mut validation = Validation::new(Algorithm::ES256);
        validation.required_spec_claims.clear();
        validation.validate_exp = false;
        validation.validate_aud = false;
        let claims = decode::<Claims>(token, &self.checking, &validation)
            .map_err(|e| TokenError::Invalid(e.to_string()))?
            .claims;
        if claims.iss != self.issuer {
            return Err(TokenError::Issuer(claims.iss));
        }
        if now >= claims.exp {
            return Err(TokenError::Expired);
        }
        if now < claims.nbf {
            return Err(TokenError::NotYet);
        }
        let own = [self.issuer.clone()];
        let want = if audiences.is_empty() {
            &own
        } else {
            audiences
        };
        if !claims.aud.iter().any(|a| want.contains(a)) {
            return Err(TokenError::Audience {
                have: claims.aud,
                want: want.to_vec(),
            });
        }
        Ok(claims)
    }
}
