//! Whose certificates are good.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;

use super::{Data, SecretName, Source, data, secret_name};
use crate::error::{CompileError, Result, Within, every_field};
use crate::matcher::StringMatch;

/// Secret name of the authorities that the system trusts.
const SYSTEM: &str = "file-root:system";

/// Authorities to trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authorities {
    /// By name.
    Secret(SecretName),
    /// PEM in the message.
    Inline(Box<str>),
}

/// Revocation lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Revoked {
    /// By name.
    Secret(SecretName),
    /// PEM in the message.
    Inline(Box<str>),
}

/// A compiled `CertificateValidationContext`.
#[derive(Debug)]
pub struct Validation {
    /// Who must have signed; `None` takes any certificate.
    pub authorities: Option<Authorities>,
    /// What was called back.
    pub revoked: Option<Revoked>,
    /// Only the leaf is looked up in the lists.
    pub only_leaf_revoked: bool,
    /// Any of these must hold, where there are any.
    pub names: Vec<SanMatch>,
    /// SHA-256 of the certificates or of their public keys that are good, where there are any.
    pub pins: Pins,
}

/// What a certificate that is to be judged says.
#[derive(Debug, Clone, Copy)]
pub struct Presented<'a> {
    /// URI names.
    pub uri: &'a [String],
    /// DNS names.
    pub dns: &'a [String],
    /// Addresses.
    pub ip: &'a [String],
    /// Mail addresses.
    pub email: &'a [String],
}

/// Certificates by their hashes.
#[derive(Debug, Default)]
pub struct Pins {
    spki: Vec<[u8; 32]>,
    hashes: Vec<[u8; 32]>,
}

impl Pins {
    /// Are there any?
    pub fn is_empty(&self) -> bool {
        self.spki.is_empty() && self.hashes.is_empty()
    }

    /// Is it one of them? Both arguments are SHA-256, of the public key info and of the certificate in DER.
    pub fn hold(&self, spki: &[u8], certificate: &[u8]) -> bool {
        self.spki.iter().any(|pin| pin == spki) || self.hashes.iter().any(|pin| pin == certificate)
    }
}

impl Validation {
    /// Compiles the part of a context that says whom to trust.
    pub(super) fn compile(m: &ValidationContextType) -> Result<Option<Self>> {
        match m {
            ValidationContextType::ValidationContext(context) => {
                Self::of_context(context).within("validation_context")
            }
            ValidationContextType::ValidationContextSdsSecretConfig(config) => {
                let name = secret_name(config).within("validation_context_sds_secret_config")?;
                Ok(Some(Self::of_secret(name)))
            }
            ValidationContextType::CombinedValidationContext(both) => {
                Self::combined(both).within("combined_validation_context")
            }
            _ => Err(CompileError::unsupported(
                "validation_context_certificate_provider",
            )),
        }
    }

    fn of_secret(name: SecretName) -> Self {
        Self {
            authorities: Some(Authorities::Secret(name)),
            revoked: None,
            only_leaf_revoked: false,
            names: Vec::new(),
            pins: Pins::default(),
        }
    }

    fn combined(
        m: &pb::common_tls_context::CombinedCertificateValidationContext,
    ) -> Result<Option<Self>> {
        every_field!(m, pb::common_tls_context::CombinedCertificateValidationContext,
            used { default_validation_context, validation_context_sds_secret_config }
            irrelevant {}
            refused { validation_context_certificate_provider, validation_context_certificate_provider_instance });
        let secret = m
            .validation_context_sds_secret_config
            .as_ref()
            .map(secret_name)
            .transpose()
            .within("validation_context_sds_secret_config")?;
        let none = pb::CertificateValidationContext::default();
        let context = m.default_validation_context.as_ref().unwrap_or(&none);
        let written = Self::of_context(context).within("default_validation_context")?;
        Ok(match (written, secret) {
            // What comes by SDS is merged over what is written here: its authorities count.
            (Some(mut written), Some(name)) => {
                written.authorities = Some(Authorities::Secret(name));
                Some(written)
            }
            (None, Some(name)) => Some(Self::of_secret(name)),
            (written, None) => written,
        })
    }

    /// `None` for a context that asks for nothing.
    fn of_context(m: &pb::CertificateValidationContext) -> Result<Option<Self>> {
        every_field!(m, pb::CertificateValidationContext,
        used {
            trusted_ca, system_root_certs, verify_certificate_spki, verify_certificate_hash, match_typed_subject_alt_names,
            match_subject_alt_names, crl, only_verify_leaf_cert_crl,
        }
        // Files are looked at every now and then in any case. The list of authorities is a hint for clients.
        irrelevant { watched_directory, suppress_client_ca_list }
        refused {
            ca_certificate_provider_instance, require_signed_certificate_timestamp, allow_expired_certificate,
            trust_chain_verification, custom_validator_config, max_verify_depth,
        });
        let files = |name: String| SecretName {
            source: Source::Files,
            name: name.into(),
        };
        let authorities = match data("trusted_ca", m.trusted_ca.as_ref())? {
            Some(Data::Text(text)) => Some(Authorities::Inline(text)),
            Some(Data::File(path)) => Some(Authorities::Secret(files(format!("file-root:{path}")))),
            None if m.system_root_certs.is_some() => {
                Some(Authorities::Secret(files(SYSTEM.to_owned())))
            }
            None => None,
        };
        let revoked = data("crl", m.crl.as_ref())?.map(|data| match data {
            Data::Text(text) => Revoked::Inline(text),
            Data::File(path) => Revoked::Secret(files(format!("file-crl:{path}"))),
        });
        let mut names = Vec::new();
        for (i, matcher) in m.match_typed_subject_alt_names.iter().enumerate() {
            let at = format!("match_typed_subject_alt_names[{i}]");
            names.push(SanMatch::compile(matcher).within(at)?);
        }
        for (i, matcher) in m.match_subject_alt_names.iter().enumerate() {
            let at = format!("match_subject_alt_names[{i}]");
            names.push(SanMatch::new(None, matcher).within(at)?);
        }
        let pins = Pins {
            spki: m
                .verify_certificate_spki
                .iter()
                .map(|text| spki(text))
                .collect::<Result<_>>()?,
            hashes: m
                .verify_certificate_hash
                .iter()
                .map(|text| hash(text))
                .collect::<Result<_>>()?,
        };
        if authorities.is_none() && names.is_empty() && pins.is_empty() && revoked.is_none() {
            return Ok(None);
        }
        Ok(Some(Self {
            authorities,
            revoked,
            only_leaf_revoked: m.only_verify_leaf_cert_crl,
            names,
            pins,
        }))
    }

    /// The secrets that it names.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        let authorities = match &self.authorities {
            Some(Authorities::Secret(name)) => Some(name),
            _ => None,
        };
        let revoked = match &self.revoked {
            Some(Revoked::Secret(name)) => Some(name),
            _ => None,
        };
        authorities.into_iter().chain(revoked)
    }

    /// Does the certificate have one of the names that are wanted? (True where none is.)
    pub fn accepts(&self, presented: &Presented<'_>) -> bool {
        self.names.is_empty() || self.names.iter().any(|name| name.holds(presented))
    }
}

/// Base64 of SHA-256.
fn spki(text: &str) -> Result<[u8; 32]> {
    let bytes = STANDARD.decode(text).unwrap_or_default();
    bytes.try_into().map_err(|_| {
        CompileError::new(
            "verify_certificate_spki",
            format!("{text:?} is not the base64 form of a SHA-256"),
        )
    })
}

/// Hex of SHA-256, with or without colons.
fn hash(text: &str) -> Result<[u8; 32]> {
    let digits: String = text.chars().filter(|c| *c != ':').collect();
    let mut bytes = [0; 32];
    let whole = digits.len() == 64 && digits.is_ascii();
    for (i, byte) in bytes.iter_mut().enumerate().filter(|_| whole) {
        let pair = digits.get(2 * i..2 * i + 2).unwrap_or("");
        *byte = u8::from_str_radix(pair, 16).map_err(|_| not_a_hash(text))?;
    }
    match whole {
        true => Ok(bytes),
        false => Err(not_a_hash(text)),
    }
}

fn not_a_hash(text: &str) -> CompileError {
    let reason = format!("{text:?} is not a SHA-256 in hex");
    CompileError::new("verify_certificate_hash", reason)
}

/// A name that a certificate is to have.
#[derive(Debug)]
pub struct SanMatch {
    /// `None` looks at all kinds.
    kind: Option<Kind>,
    matcher: StringMatch,
    /// Of a DNS name that is to be there exactly: the certificate may have it as a wildcard.
    exact: Option<Box<str>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Email,
    Dns,
    Uri,
    Ip,
}

impl SanMatch {
    fn compile(m: &pb::SubjectAltNameMatcher) -> Result<Self> {
        every_field!(m, pb::SubjectAltNameMatcher, used { san_type, matcher } irrelevant {} refused { oid });
        let kind = match SanType::try_from(m.san_type) {
            Ok(SanType::Email) => Kind::Email,
            Ok(SanType::Dns) => Kind::Dns,
            Ok(SanType::Uri) => Kind::Uri,
            Ok(SanType::IpAddress) => Kind::Ip,
            Ok(other) => {
                return Err(CompileError::unsupported(format!(
                    "san_type {}",
                    other.as_str_name()
                )));
            }
            Err(_) => return Err(CompileError::new("san_type", "is unknown")),
        };
        match &m.matcher {
            Some(matcher) => Self::new(Some(kind), matcher).within("matcher"),
            None => Err(CompileError::new("matcher", "is missing")),
        }
    }

    fn new(kind: Option<Kind>, m: &StringMatcher) -> Result<Self> {
        Ok(Self {
            kind,
            matcher: StringMatch::compile(m)?,
            exact: match &m.match_pattern {
                Some(MatchPattern::Exact(name)) => Some(name.as_str().into()),
                _ => None,
            },
        })
    }

    fn holds(&self, presented: &Presented<'_>) -> bool {
        let looks = |kind| self.kind.is_none_or(|wanted| wanted == kind);
        let any = |names: &[String]| names.iter().any(|name| self.matcher.matches(name));
        let dns = |names: &[String]| match &self.exact {
            Some(exact) => names.iter().any(|name| dns_matches(exact, name)),
            None => any(names),
        };
        looks(Kind::Uri) && any(presented.uri)
            || looks(Kind::Dns) && dns(presented.dns)
            || looks(Kind::Ip) && any(presented.ip)
            || looks(Kind::Email) && any(presented.email)
    }
}

/// Does a certificate's DNS name, perhaps with a wildcard as its first label, stand for `name`? (RFC 6125 section 6.4.3.)
pub fn dns_matches(name: &str, pattern: &str) -> bool {
    if name.eq_ignore_ascii_case(pattern) {
        return true;
    }
    let (Some(rest), Some((first, tail))) = (pattern.strip_prefix("*."), name.split_once('.'))
    else {
        return false;
    };
    !first.is_empty() && tail.eq_ignore_ascii_case(rest) && rest.contains('.')
}
