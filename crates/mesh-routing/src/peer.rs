//! What is known of the other side of a connection that speaks TLS.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// What the handshake of a connection has shown. Made once for each connection and shared by its requests.
///
/// Names are only those of a certificate that was verified: an unverified one leaves no trace here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerTls {
    /// URI names of the peer's certificate (`spiffe://...`), in its order.
    pub uri_sans: Vec<Box<str>>,
    /// DNS names of the peer's certificate, in its order.
    pub dns_sans: Vec<Box<str>>,
    /// Subject of the peer's certificate in the form of RFC 2253, empty where it has none.
    pub subject: Box<str>,
    /// Issuer in the same form.
    pub issuer: Box<str>,
    /// Serial number, lower-case hex.
    pub serial: Box<str>,
    /// SHA-256 of the peer's certificate, lower-case hex; empty where none was presented.
    pub sha256: Box<str>,
    /// The verified chain in DER, leaf first; empty where the peer presented none.
    pub chain: Vec<Box<[u8]>>,
    /// Server name that was asked for (SNI), lower case.
    pub sni: Option<Box<str>>,
    /// Application protocol that both sides agreed on.
    pub alpn: Option<Box<str>>,
    /// As Envoy writes it: `TLSv1.2`, `TLSv1.3`.
    pub version: &'static str,
    /// Name of the cipher suite as Envoy (OpenSSL) writes it.
    pub cipher: &'static str,
    /// URI names of our own certificate.
    pub local_uri_sans: Vec<Box<str>>,
    /// DNS names of our own certificate.
    pub local_dns_sans: Vec<Box<str>>,
    /// Subject of our own certificate.
    pub local_subject: Box<str>,
}

impl PeerTls {
    /// Did the peer prove who it is with a certificate that was verified?
    pub fn is_mutual(&self) -> bool {
        !self.chain.is_empty()
    }

    /// The peer's identity: the first URI name, as Istio takes it.
    pub fn principal(&self) -> Option<&str> {
        self.uri_sans.first().map(|uri| &**uri)
    }

    /// Our own identity: the first URI name of our certificate.
    pub fn local_principal(&self) -> Option<&str> {
        self.local_uri_sans.first().map(|uri| &**uri)
    }

    /// The peer's certificate as PEM, percent-encoded as `x-forwarded-client-cert` wants it; `None` where none was presented.
    pub fn certificate_encoded(&self) -> Option<String> {
        self.chain.first().map(|der| percent_encoded(&pem(der)))
    }

    /// The whole chain in the same form.
    pub fn chain_encoded(&self) -> Option<String> {
        let text: String = self.chain.iter().map(|der| pem(der)).collect();
        self.is_mutual().then(|| percent_encoded(&text))
    }
}

/// RFC 7468.
fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut out = String::with_capacity(text.len() + text.len() / 64 + 56);
    out.push_str("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        out.push_str(std::str::from_utf8(line).unwrap_or(""));
        out.push('\n');
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}

/// Envoy's encoding of PEM text (`absl::StrReplaceAll` in `UtilityImpl::getPeerCertificateInPemFormat`).
fn percent_encoded(pem: &str) -> String {
    let mut out = String::with_capacity(pem.len() + pem.len() / 8);
    for c in pem.chars() {
        match c {
            '\n' => out.push_str("%0A"),
            ' ' => out.push_str("%20"),
            '+' => out.push_str("%2B"),
            '/' => out.push_str("%2F"),
            '=' => out.push_str("%3D"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_encoded_as_envoy_does_it() {
        let peer = PeerTls {
            chain: vec![vec![0xfb; 50].into()],
            ..PeerTls::default()
        };
        let text = peer.certificate_encoded().unwrap();
        assert!(
            text.starts_with("-----BEGIN%20CERTIFICATE-----%0A%2B%2Fv7"),
            "{text}"
        );
        assert!(
            text.ends_with("%0A-----END%20CERTIFICATE-----%0A"),
            "{text}"
        );
        assert_eq!(
            text.matches("%0A").count(),
            4,
            "lines of 64 characters: {text}"
        );
    }
}
