//! Settings and secrets joined to rustls configurations. Made when a connection first needs one, and again when a secret in it has changed.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use mesh_identity::tls::{TlsError, certified_key, provider, roots};
use mesh_identity::verify::{CertificateNames, NameCheck, Trust, any_server, hashes};
use mesh_routing::tls::{
    Authorities, Certificate, ClientTls, Common, Group, Params, Presented, Revoked, SecretName,
    ServerTls, Suite, Validation, Version, dns_matches,
};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::aws_lc_rs::{cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::server::{ClientHello, NoServerSessionStorage, ProducesTickets, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CipherSuite, ClientConfig, RootCertStore, ServerConfig, SignatureScheme, SupportedCipherSuite,
    SupportedProtocolVersion,
};
use rustls_pki_types::CertificateRevocationListDer;
use rustls_pki_types::pem::PemObject;

use super::HandshakeError;
use super::tickets::Limited;
use crate::secrets::{Held, Material, Secrets};

/// Configurations that are kept at most; beyond, all are made anew as they are needed.
const MOST: usize = 4096;
/// TLS 1.3 tickets sent to a client (one connection needs one).
const TICKETS: usize = 1;

type Map<V> = HashMap<Box<[u8]>, Arc<V>, foldhash::fast::RandomState>;

/// What our own certificate says.
#[derive(Debug, Default)]
pub struct Local {
    /// URI names.
    pub uri_sans: Vec<Box<str>>,
    /// DNS names.
    pub dns_sans: Vec<Box<str>>,
    /// Subject, RFC 2253.
    pub subject: Box<str>,
}

/// A server's side.
#[derive(Debug)]
pub struct ServerContext {
    /// With its application protocols.
    pub config: Arc<ServerConfig>,
    /// Without: for clients that share none of them, whom Envoy lets in, too.
    pub no_protocols: Arc<ServerConfig>,
    /// Of the first certificate.
    pub local: Local,
    tickets: Option<Arc<dyn ProducesTickets>>,
    made_of: MadeOf,
}

/// A client's side.
#[derive(Debug)]
pub struct ClientContext {
    /// The configuration.
    pub config: Arc<ClientConfig>,
    /// Of the certificate that is presented where the server asks.
    pub local: Local,
    made_of: MadeOf,
}

/// The secrets in a configuration.
#[derive(Debug)]
struct MadeOf {
    own: Vec<(SecretName, u64)>,
    trust: Vec<(SecretName, u64)>,
    /// Version of the store for which this was found to be up to date.
    checked: AtomicU64,
}

impl MadeOf {
    fn of(common: &Common, secrets: &Secrets, now: u64) -> Self {
        let version = |name: &SecretName| {
            let held = secrets.held(&name.name);
            (name.clone(), held.map_or(0, |held| held.version))
        };
        let own = common.certificates.iter().filter_map(|c| match c {
            Certificate::Secret(name) => Some(version(name)),
            Certificate::Inline { .. } => None,
        });
        let trusted = common.validation.iter().flat_map(Validation::secrets);
        Self {
            own: own.collect(),
            trust: trusted.map(version).collect(),
            checked: AtomicU64::new(now),
        }
    }

    fn is_current(&self, secrets: &Secrets) -> bool {
        let now = secrets.version();
        if self.checked.load(Ordering::Acquire) == now {
            return true;
        }
        let same = |(name, version): &(SecretName, u64)| {
            secrets.held(&name.name).map_or(0, |held| held.version) == *version
        };
        let current = self.own.iter().all(same) && self.trust.iter().all(same);
        if current {
            self.checked.store(now, Ordering::Release);
        }
        current
    }
}

/// All configurations of a proxy.
#[derive(Debug, Default)]
pub struct Contexts {
    servers: ArcSwap<Map<ServerContext>>,
    clients: ArcSwap<Map<ClientContext>>,
    /// Held by who makes one, never by who finds one.
    making: Mutex<()>,
}

impl Contexts {
    /// A server's side for these settings.
    pub fn server(
        &self,
        settings: &Arc<ServerTls>,
        secrets: &Secrets,
    ) -> Result<Arc<ServerContext>, HandshakeError> {
        let key = settings.common.key();
        if let Some(found) = self.servers.load().get(key)
            && found.made_of.is_current(secrets)
        {
            return Ok(found.clone());
        }
        let _making = self.making.lock().unwrap_or_else(|e| e.into_inner());
        let old = self.servers.load().get(key).cloned();
        if let Some(found) = old.as_ref().filter(|c| c.made_of.is_current(secrets)) {
            return Ok(found.clone());
        }
        let made = Arc::new(make_server(settings, secrets, old.as_deref())?);
        keep(&self.servers, key, &made);
        Ok(made)
    }

    /// A client's side for these settings. `validate_name`: the server's certificate must be for the name that is asked for.
    pub fn client(
        &self,
        settings: &Arc<ClientTls>,
        validate_name: bool,
        secrets: &Secrets,
    ) -> Result<Arc<ClientContext>, HandshakeError> {
        let validated;
        let key = match validate_name {
            false => settings.common.key(),
            true => {
                validated = [settings.common.key(), b"validated"].concat();
                &validated
            }
        };
        if let Some(found) = self.clients.load().get(key)
            && found.made_of.is_current(secrets)
        {
            return Ok(found.clone());
        }
        let _making = self.making.lock().unwrap_or_else(|e| e.into_inner());
        let old = self.clients.load().get(key).cloned();
        if let Some(found) = old.filter(|c| c.made_of.is_current(secrets)) {
            return Ok(found);
        }
        let made = Arc::new(make_client(settings, validate_name, secrets)?);
        keep(&self.clients, key, &made);
        Ok(made)
    }
}

fn keep<V>(all: &ArcSwap<Map<V>>, key: &[u8], made: &Arc<V>) {
    let mut map = Map::clone(&all.load());
    if map.len() >= MOST {
        map.clear();
    }
    map.insert(key.into(), made.clone());
    all.store(Arc::new(map));
}

fn make_server(
    settings: &Arc<ServerTls>,
    secrets: &Secrets,
    old: Option<&ServerContext>,
) -> Result<ServerContext, HandshakeError> {
    let common = &settings.common;
    // Before the secrets are read: what changes meanwhile is seen the next time.
    let made_of = MadeOf::of(common, secrets, secrets.version());
    let provider = with_params(&common.params);
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions(&common.params))
        .map_err(TlsError::from)?;
    let builder = match &common.validation {
        Some(validation) if validation.authorities.is_some() => {
            let owner = settings.clone();
            let trust = trust(validation, secrets, move |names, der| {
                accepts(owner.common.validation.as_ref(), names, der)
            })?;
            let only_leaf = validation.only_leaf_revoked;
            builder.with_client_cert_verifier(trust.of_clients(
                &provider,
                settings.require_client_certificate,
                only_leaf,
            )?)
        }
        _ => builder.with_no_client_auth(),
    };
    let chooser = Chooser::of(common, secrets)?;
    let local = chooser.local();
    let mut config = builder.with_cert_resolver(Arc::new(chooser));
    config.ignore_client_order = !settings.prefer_client_ciphers;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    let kept = old.filter(|old| old.made_of.trust == made_of.trust);
    let tickets = match (kept, settings.session_timeout) {
        (_, None) => None,
        (Some(old), _) if old.tickets.is_some() => old.tickets.clone(),
        (_, Some(lifetime)) => Some(Limited::lasting(lifetime).map_err(TlsError::from)?),
    };
    config.send_tls13_tickets = 0;
    if let Some(tickets) = &tickets {
        config.ticketer = tickets.clone();
        config.send_tls13_tickets = TICKETS;
    }
    let no_protocols = Arc::new(config.clone());
    config.alpn_protocols = common.alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    Ok(ServerContext {
        config: Arc::new(config),
        no_protocols,
        local,
        tickets,
        made_of,
    })
}

fn make_client(
    settings: &Arc<ClientTls>,
    validate_name: bool,
    secrets: &Secrets,
) -> Result<ClientContext, HandshakeError> {
    let common = &settings.common;
    let made_of = MadeOf::of(common, secrets, secrets.version());
    let provider = with_params(&common.params);
    let owner = settings.clone();
    let check = move |names: &CertificateNames, der: &[u8]| {
        accepts(owner.common.validation.as_ref(), names, der)
    };
    let verifier = match &common.validation {
        Some(validation) if validation.authorities.is_some() => {
            let trust = trust(validation, secrets, check)?;
            trust.of_servers(&provider, validate_name, validation.only_leaf_revoked)?
        }
        Some(_) => any_server(&provider, Some(Arc::new(check))),
        None => any_server(&provider, None),
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions(&common.params))
        .map_err(TlsError::from)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let (mut config, local) = match common.certificates.is_empty() {
        true => (builder.with_no_client_auth(), Local::default()),
        false => {
            let chooser = Chooser::of(common, secrets)?;
            let local = chooser.local();
            (builder.with_client_cert_resolver(Arc::new(chooser)), local)
        }
    };
    config.alpn_protocols = common.alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    config.resumption = match settings.max_sessions {
        0 => Resumption::disabled(),
        // By server name; a cluster has one, or those of its requests.
        some => Resumption::in_memory_sessions(some.clamp(1, 256) as usize),
    };
    Ok(ClientContext {
        config: Arc::new(config),
        local,
        made_of,
    })
}

/// Does the certificate have a name that is wanted, and is it one that is pinned?
fn accepts(validation: Option<&Validation>, names: &CertificateNames, der: &[u8]) -> bool {
    let Some(validation) = validation else {
        return true;
    };
    let presented = Presented {
        uri: &names.uri,
        dns: &names.dns,
        ip: &names.ip,
        email: &names.email,
    };
    if !validation.pins.is_empty() {
        let pinned = hashes(der).is_some_and(|(spki, whole)| validation.pins.hold(&spki, &whole));
        if !pinned {
            return false;
        }
    }
    validation.accepts(&presented)
}

fn trust(
    validation: &Validation,
    secrets: &Secrets,
    check: impl Fn(&CertificateNames, &[u8]) -> bool + Send + Sync + 'static,
) -> Result<Trust, HandshakeError> {
    let (roots, mut revoked): (Arc<RootCertStore>, _) = match &validation.authorities {
        None => (Arc::new(RootCertStore::empty()), Vec::new()),
        Some(Authorities::Inline(pem)) => (roots(pem)?, Vec::new()),
        Some(Authorities::Secret(name)) => match &held(secrets, name)?.material {
            Material::Trust(roots, revoked) => (roots.clone(), revoked.clone()),
            _ => return Err(HandshakeError::NotReady(name.name.to_string())),
        },
    };
    match &validation.revoked {
        None => {}
        Some(Revoked::Inline(pem)) => {
            let lists = CertificateRevocationListDer::pem_slice_iter(pem.as_bytes());
            for list in lists {
                revoked.push(list.map_err(|error| TlsError::Pem {
                    what: "revocation lists",
                    reason: error.to_string(),
                })?);
            }
        }
        Some(Revoked::Secret(name)) => match &held(secrets, name)?.material {
            Material::Revoked(lists) => revoked.extend(lists.iter().cloned()),
            _ => return Err(HandshakeError::NotReady(name.name.to_string())),
        },
    }
    let wants_names = !validation.names.is_empty() || !validation.pins.is_empty();
    let check: NameCheck = Arc::new(check);
    Ok(Trust {
        roots,
        revoked,
        names: wants_names.then_some(check),
    })
}

fn held(secrets: &Secrets, name: &SecretName) -> Result<Arc<Held>, HandshakeError> {
    let missing = || HandshakeError::NotReady(name.name.to_string());
    secrets.held(&name.name).ok_or_else(missing)
}

const ONLY_13: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
const ONLY_12: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12];
const BOTH: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

fn versions(params: &Params) -> &'static [&'static SupportedProtocolVersion] {
    match (params.min, params.max) {
        (Version::Tls13, _) => ONLY_13,
        (_, Version::Tls12) => ONLY_12,
        _ => BOTH,
    }
}

/// The order of suites where none is configured.
fn rank(suite: &SupportedCipherSuite) -> u8 {
    match suite.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => 0,
        CipherSuite::TLS13_AES_256_GCM_SHA384
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
        | CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => 1,
        _ => 2,
    }
}

fn with_params(params: &Params) -> Arc<CryptoProvider> {
    let mut provider = CryptoProvider::clone(&provider());
    // As BoringSSL with AES in hardware: 128 bits are enough, and cheaper.
    provider.cipher_suites.sort_by_key(rank);
    if !params.suites.is_empty() {
        let is_13 = |suite: &SupportedCipherSuite| suite.tls13().is_some();
        provider.cipher_suites.retain(is_13);
        let wanted = params.suites.iter().map(|suite| match suite {
            Suite::EcdheEcdsaAes128 => cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            Suite::EcdheEcdsaAes256 => cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
            Suite::EcdheEcdsaChacha20 => {
                cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
            }
            Suite::EcdheRsaAes128 => cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
            Suite::EcdheRsaAes256 => cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
            Suite::EcdheRsaChacha20 => cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        });
        provider.cipher_suites.extend(wanted);
    }
    let group = |group: &Group| -> &'static dyn SupportedKxGroup {
        match group {
            Group::X25519 => kx_group::X25519,
            Group::P256 => kx_group::SECP256R1,
            Group::P384 => kx_group::SECP384R1,
            Group::X25519MlKem768 => kx_group::X25519MLKEM768,
        }
    };
    provider.kx_groups = match params.groups.as_slice() {
        [] => vec![kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1],
        some => some.iter().map(group).collect(),
    };
    Arc::new(provider)
}

/// Chooses among certificates by the name that is asked for and the signatures that the other side understands.
struct Chooser(Vec<(Arc<CertifiedKey>, CertificateNames)>);

impl fmt::Debug for Chooser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Chooser").field(&self.0.len()).finish()
    }
}

impl Chooser {
    fn of(common: &Common, secrets: &Secrets) -> Result<Self, HandshakeError> {
        let mut all = Vec::with_capacity(common.certificates.len());
        for certificate in &common.certificates {
            let key = match certificate {
                Certificate::Inline { chain, key } => Arc::new(certified_key(chain, key)?),
                Certificate::Secret(name) => match &held(secrets, name)?.material {
                    Material::Certificate(key) => key.clone(),
                    _ => return Err(HandshakeError::NotReady(name.name.to_string())),
                },
            };
            let leaf = key.cert.first();
            let names = leaf.map(|der| CertificateNames::of(der)).transpose()?;
            all.push((key, names.unwrap_or_default()));
        }
        Ok(Self(all))
    }

    fn local(&self) -> Local {
        let boxed = |names: &[String]| names.iter().map(|n| n.as_str().into()).collect();
        self.0
            .first()
            .map_or_else(Local::default, |(_, names)| Local {
                uri_sans: boxed(&names.uri),
                dns_sans: boxed(&names.dns),
                subject: names.subject.as_str().into(),
            })
    }

    fn choose(&self, name: Option<&str>, schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let fits = |key: &CertifiedKey| key.key.choose_scheme(schemes).is_some();
        // An exact name, then a wildcard, then whatever comes first.
        let rank = |names: &CertificateNames| match name {
            Some(name) if names.dns.iter().any(|n| n.eq_ignore_ascii_case(name)) => 0,
            Some(name) if names.dns.iter().any(|n| dns_matches(name, n)) => 1,
            _ => 2,
        };
        let best = self
            .0
            .iter()
            .filter(|(key, _)| fits(key))
            .min_by_key(|(_, names)| rank(names));
        best.map(|(key, _)| key.clone())
    }
}

impl ResolvesServerCert for Chooser {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.choose(hello.server_name(), hello.signature_schemes())
    }
}

impl ResolvesClientCert for Chooser {
    fn resolve(&self, _: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.choose(None, schemes)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configured_suites_keep_their_order_below_those_of_tls_13() {
        let names = |params: &Params| -> Vec<CipherSuite> {
            let provider = with_params(params);
            provider.cipher_suites.iter().map(|s| s.suite()).collect()
        };
        let all = names(&Params::default());
        assert_eq!(all[0], CipherSuite::TLS13_AES_128_GCM_SHA256);
        let istio = Params {
            suites: vec![Suite::EcdheEcdsaAes256, Suite::EcdheEcdsaAes128],
            ..Params::default()
        };
        assert_eq!(
            names(&istio)[..],
            [
                CipherSuite::TLS13_AES_128_GCM_SHA256,
                CipherSuite::TLS13_AES_256_GCM_SHA384,
                CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
                CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
                CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            ]
        );
    }
}
