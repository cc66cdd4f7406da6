//! Secrets that come over the discovery stream (SDS over ADS): a gateway's certificates. They are held in memory and never kept.

use std::collections::BTreeSet;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use mesh_routing::tls::Source;
use mesh_xds::client::Named;
use prost::Message;
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::secrets::{MESH_ROOTS, Secret, WORKLOAD};
use crate::shared::Shared;

/// `envoy.extensions.transport_sockets.tls.v3.Secret` (SDS).
pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// The names that are subscribed to: those that the snapshot in force takes from the control plane.
pub struct Subscription {
    names: watch::Sender<Arc<BTreeSet<String>>>,
}

impl Default for Subscription {
    fn default() -> Self {
        Self {
            names: watch::Sender::new(Arc::default()),
        }
    }
}

impl Subscription {
    /// For the discovery client.
    pub fn named(&self) -> Named {
        Named {
            type_url: SECRET.to_owned(),
            names: self.names.subscribe(),
        }
    }

    /// Follows a new snapshot; forgets what it does not name any more.
    pub fn follow(&self, shared: &Shared) {
        let wanted: BTreeSet<String> = shared
            .snapshot()
            .secrets()
            .into_iter()
            .filter(|secret| secret.source == Source::Ads)
            .map(|secret| secret.name.to_string())
            .collect();
        let before = Arc::clone(&self.names.borrow());
        if *before == wanted {
            return;
        }
        for gone in before.difference(&wanted) {
            shared.secrets.remove(gone);
        }
        self.names.send_replace(Arc::new(wanted));
    }

    /// Forgets a secret that the control plane has no more.
    pub fn remove(&self, shared: &Shared, name: &str) {
        if self.is_ours(name) {
            shared.secrets.remove(name);
        }
    }

    /// Whether a name was asked for; the agent's own secrets are never touched from outside.
    fn is_ours(&self, name: &str) -> bool {
        !matches!(name, WORKLOAD | MESH_ROOTS) && self.names.borrow().contains(name)
    }

    /// Takes a secret that was sent.
    ///
    /// # Errors
    /// One that was not asked for, can't be read, or is of a kind that is not held.
    pub fn take(&self, shared: &Shared, name: &str, bytes: &[u8]) -> Result<(), String> {
        if !self.is_ours(name) {
            return Err("it was not asked for".to_owned());
        }
        let message =
            pb::Secret::decode(bytes).map_err(|error| format!("does not decode: {error}"))?;
        let secret = secret(message)?;
        shared
            .secrets
            .set(name, secret)
            .map_err(|error| error.to_string())
    }
}

fn secret(message: pb::Secret) -> Result<Secret, String> {
    match message.r#type {
        Some(Type::TlsCertificate(certificate)) => Ok(Secret::Certificate {
            chain_pem: text("certificate_chain", certificate.certificate_chain)?,
            key_pem: Zeroizing::new(text("private_key", certificate.private_key)?),
        }),
        Some(Type::ValidationContext(context)) => {
            let crl_pem = match context.crl {
                Some(crl) => text("crl", Some(crl))?,
                None => String::new(),
            };
            Ok(Secret::Trust {
                roots_pem: text("trusted_ca", context.trusted_ca)?,
                crl_pem,
            })
        }
        Some(Type::SessionTicketKeys(_)) => {
            Err("session ticket keys are not supported: a proxy makes its own".to_owned())
        }
        Some(Type::GenericSecret(_)) => Err("generic secrets are not supported".to_owned()),
        None => Err("it is empty".to_owned()),
    }
}

fn text(field: &str, source: Option<DataSource>) -> Result<String, String> {
    let bytes = match source.and_then(|source| source.specifier) {
        Some(Specifier::InlineBytes(bytes)) => bytes,
        Some(Specifier::InlineString(text)) => return Ok(text),
        Some(_) => {
            return Err(format!(
                "{field}: only inline text is taken from the control plane"
            ));
        }
        None => return Err(format!("{field} is missing")),
    };
    String::from_utf8(bytes).map_err(|_| format!("{field} is not text (PEM)"))
}
