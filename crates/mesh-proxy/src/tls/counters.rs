//! What is counted about handshakes, by Envoy's names.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use rustls::CertificateError;

use super::HandshakeError;

/// Values of a listener.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    /// Connections that no filter chain took.
    pub no_filter_chain_match: AtomicU64,
    /// Handshakes that were finished.
    pub handshakes: AtomicU64,
    /// Of them on an earlier session.
    pub reused: AtomicU64,
    /// Of them without a certificate of the client.
    pub no_certificate: AtomicU64,
    /// Handshakes that failed for another reason than the certificate.
    pub errors: AtomicU64,
    /// The client's certificate was missing.
    pub fail_no_certificate: AtomicU64,
    /// The client's certificate does not lead to an authority that is trusted, has expired, or was called back.
    pub fail_verify: AtomicU64,
    /// The client's certificate is for another name.
    pub fail_name: AtomicU64,
    /// Handshakes that took too long.
    pub timeouts: AtomicU64,
    /// Connections closed since a secret was not there.
    pub not_ready: AtomicU64,
    /// Connections closed since too many handshakes were under way.
    pub overload: AtomicU64,
}

impl ListenerCounters {
    /// A handshake has failed.
    pub fn count(&self, error: &HandshakeError) {
        let counter = match error {
            HandshakeError::NotReady(_) | HandshakeError::Config(_) => &self.not_ready,
            HandshakeError::Timeout => &self.timeouts,
            HandshakeError::Overload => &self.overload,
            HandshakeError::Expired => &self.fail_verify,
            HandshakeError::NoServerName => &self.errors,
            HandshakeError::Failed(_) => match error.tls() {
                Some(rustls::Error::NoCertificatesPresented) => &self.fail_no_certificate,
                Some(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName
                    | CertificateError::NotValidForNameContext { .. },
                )) => &self.fail_name,
                Some(
                    rustls::Error::InvalidCertificate(_)
                    | rustls::Error::InvalidCertRevocationList(_),
                ) => &self.fail_verify,
                _ => &self.errors,
            },
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn values(&self) -> [(&'static str, u64); 11] {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("no_filter_chain_match", load(&self.no_filter_chain_match)),
            ("ssl.handshake", load(&self.handshakes)),
            ("ssl.session_reused", load(&self.reused)),
            ("ssl.no_certificate", load(&self.no_certificate)),
            ("ssl.connection_error", load(&self.errors)),
            ("ssl.fail_verify_no_cert", load(&self.fail_no_certificate)),
            ("ssl.fail_verify_error", load(&self.fail_verify)),
            ("ssl.fail_verify_san", load(&self.fail_name)),
            (
                "downstream_cx_transport_socket_connect_timeout",
                load(&self.timeouts),
            ),
            (
                "server_ssl_socket_factory.downstream_context_secrets_not_ready",
                load(&self.not_ready),
            ),
            ("downstream_cx_overload_reject", load(&self.overload)),
        ]
    }
}

type Table = BTreeMap<Arc<str>, Arc<ListenerCounters>>;

/// Values of all listeners.
#[derive(Debug, Default)]
pub struct Counters {
    table: ArcSwap<Table>,
    /// Held by who adds a listener, never by who counts.
    adding: Mutex<()>,
}

impl Counters {
    /// Those of a listener.
    pub fn listener(&self, name: &Arc<str>) -> Arc<ListenerCounters> {
        if let Some(found) = self.table.load().get(name) {
            return found.clone();
        }
        let _adding = self.adding.lock().unwrap_or_else(|e| e.into_inner());
        let mut table = Table::clone(&self.table.load());
        let counters = table.entry(name.clone()).or_default().clone();
        self.table.store(Arc::new(table));
        counters
    }

    /// All values with their names.
    pub fn values(&self) -> Vec<(String, u64)> {
        let table = self.table.load();
        let of = |(name, counters): (&Arc<str>, &Arc<ListenerCounters>)| {
            let name = name.clone();
            counters
                .values()
                .map(|(what, value)| (format!("listener.{name}.{what}"), value))
        };
        table.iter().flat_map(of).collect()
    }
}
