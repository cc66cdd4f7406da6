//! Key sets (RFC 7517, RFC 7518 section 6, RFC 8037) and the check of signatures.

use aws_lc_rs::hmac;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, ED25519,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, RsaParameters,
    RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde_json::{Map, Value};

use super::{Jwt, JwtError, decode, json};

/// Keys of one set that are looked at; more are left out, so that a token without a key id costs a bounded number of checks.
const MOST_KEYS: usize = 128;
/// Bytes of an Ed25519 signature.
const ED25519_SIGNATURE: usize = 64;

/// A set of keys.
#[derive(Debug)]
pub struct Jwks {
    keys: Vec<Key>,
}

#[derive(Debug)]
struct Key {
    /// Empty where it has none.
    id: String,
    /// Empty where any that fits the kind may be used.
    alg: String,
    kind: Kind,
}

enum Kind {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// The uncompressed point (SEC 1, section 2.3.3).
    Ec(Curve, Vec<u8>),
    Ed25519(Vec<u8>),
    Secret(Vec<u8>),
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Rsa { .. } => "RSA",
            Self::Ec(..) => "EC",
            Self::Ed25519(_) => "OKP",
            Self::Secret(_) => "oct",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Curve {
    P256,
    P384,
    P521,
}

impl Curve {
    /// Name, algorithm, bytes of a coordinate.
    const ALL: [(Self, &'static str, &'static str, usize); 3] = [
        (Self::P256, "P-256", "ES256", 32),
        (Self::P384, "P-384", "ES384", 48),
        (Self::P521, "P-521", "ES512", 66),
    ];
}

impl Jwks {
    /// Reads a key set. Keys that cannot be used are left out, as RFC 7517 section 5 wants it; a set without any other is refused.
    pub fn parse(text: &str) -> Result<Self, JwtError> {
        let set = json::object(text.as_bytes()).ok_or(JwtError::JwksJson)?;
        let keys = match set.get("keys") {
            None => return Err(JwtError::JwksNoKeys),
            Some(Value::Array(keys)) => keys,
            Some(_) => return Err(JwtError::JwksBadKeys),
        };
        let keys: Vec<Key> = keys
            .iter()
            .filter_map(|key| Key::read(key.as_object()?))
            .take(MOST_KEYS)
            .collect();
        match keys.is_empty() {
            true => Err(JwtError::JwksNoValidKeys),
            false => Ok(Self { keys }),
        }
    }

    /// Checks a token's signature with the keys that fit its id and algorithm.
    pub fn verify(&self, jwt: &Jwt) -> Result<(), JwtError> {
        let mut fits = false;
        for key in &self.keys {
            let other_id = !jwt.kid.is_empty() && !key.id.is_empty() && jwt.kid != key.id;
            let other_alg = !key.alg.is_empty() && key.alg != jwt.alg;
            if other_id || other_alg {
                continue;
            }
            fits = true;
            if matches!(key.kind, Kind::Ed25519(_)) && jwt.signature.len() != ED25519_SIGNATURE {
                return Err(JwtError::Ed25519Length);
            }
            if key
                .kind
                .verifies(&jwt.alg, jwt.signed.as_bytes(), &jwt.signature)
            {
                return Ok(());
            }
        }
        Err(match fits {
            true => JwtError::VerificationFail,
            false => JwtError::KidAlgMismatch,
        })
    }
}

impl Key {
    fn read(m: &Map<String, Value>) -> Option<Self> {
        let text = |name: &str| m.get(name).and_then(Value::as_str);
        let bytes = |name: &str| text(name).and_then(decode);
        let (id, alg) = (text("kid").unwrap_or(""), text("alg").unwrap_or(""));
        let fits = |beginnings: &[&str]| {
            alg.is_empty() || beginnings.iter().any(|begin| alg.starts_with(begin))
        };
        let (kind, alg) = match text("kty")? {
            "RSA" if fits(&["RS", "PS"]) => {
                let kind = Kind::Rsa {
                    n: trimmed(bytes("n")?)?,
                    e: trimmed(bytes("e")?)?,
                };
                (kind, alg)
            }
            "EC" if fits(&["ES"]) => {
                let crv = text("crv");
                let (curve, _, fixed, size) =
                    Curve::ALL.into_iter().find(|(_, name, its, _)| {
                        crv.map_or(alg == *its, |crv| crv == *name)
                            && (alg.is_empty() || alg == *its)
                    })?;
                let (x, y) = (bytes("x")?, bytes("y")?);
                (Kind::Ec(curve, point(&x, &y, size)?), fixed)
            }
            "OKP" if fits(&["EdDSA"]) && text("crv") == Some("Ed25519") => {
                let key = bytes("x").filter(|key| key.len() == 32)?;
                (Kind::Ed25519(key), "EdDSA")
            }
            "oct" if fits(&["HS"]) => {
                let key = bytes("k").filter(|key| !key.is_empty())?;
                (Kind::Secret(key), alg)
            }
            _ => return None,
        };
        Some(Self {
            id: id.to_owned(),
            alg: alg.to_owned(),
            kind,
        })
    }
}

/// A big number without leading zeros, which aws-lc-rs wants and some issuers send.
fn trimmed(bytes: Vec<u8>) -> Option<Vec<u8>> {
    let first = bytes.iter().position(|byte| *byte != 0)?;
    bytes.get(first..).map(<[u8]>::to_vec)
}

/// Both coordinates in full length behind a 4.
fn point(x: &[u8], y: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut point = vec![0; 1 + 2 * size];
    *point.first_mut()? = 4;
    let places = [(x, 1), (y, 1 + size)];
    for (coordinate, place) in places {
        let missing = size.checked_sub(coordinate.len())?;
        point
            .get_mut(place + missing..place + size)?
            .copy_from_slice(coordinate);
    }
    Some(point)
}

impl Kind {
    fn verifies(&self, alg: &str, signed: &[u8], signature: &[u8]) -> bool {
        match self {
            Self::Rsa { n, e } => rsa(alg).is_some_and(|parameters| {
                let key = RsaPublicKeyComponents { n, e };
                key.verify(parameters, signed, signature).is_ok()
            }),
            Self::Ec(curve, point) => {
                let algorithm = match (curve, alg) {
                    (Curve::P256, "ES256") => &ECDSA_P256_SHA256_FIXED,
                    (Curve::P384, "ES384") => &ECDSA_P384_SHA384_FIXED,
                    (Curve::P521, "ES512") => &ECDSA_P521_SHA512_FIXED,
                    _ => return false,
                };
                let key = UnparsedPublicKey::new(algorithm, point);
                key.verify(signed, signature).is_ok()
            }
            Self::Ed25519(key) if alg == "EdDSA" => {
                let key = UnparsedPublicKey::new(&ED25519, key);
                key.verify(signed, signature).is_ok()
            }
            Self::Secret(secret) => hash(alg).is_some_and(|algorithm| {
                let key = hmac::Key::new(algorithm, secret);
                hmac::verify(&key, signed, signature).is_ok()
            }),
            Self::Ed25519(_) => false,
        }
    }
}

fn rsa(alg: &str) -> Option<&'static RsaParameters> {
    Some(match alg {
        "RS256" => &RSA_PKCS1_2048_8192_SHA256,
        "RS384" => &RSA_PKCS1_2048_8192_SHA384,
        "RS512" => &RSA_PKCS1_2048_8192_SHA512,
        "PS256" => &RSA_PSS_2048_8192_SHA256,
        "PS384" => &RSA_PSS_2048_8192_SHA384,
        "PS512" => &RSA_PSS_2048_8192_SHA512,
        _ => return None,
    })
}

fn hash(alg: &str) -> Option<hmac::Algorithm> {
    Some(match alg {
        "HS256" => hmac::HMAC_SHA256,
        "HS384" => hmac::HMAC_SHA384,
        "HS512" => hmac::HMAC_SHA512,
        _ => return None,
    })
}
