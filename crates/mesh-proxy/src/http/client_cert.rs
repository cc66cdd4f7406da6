//! `x-forwarded-client-cert`: what is said of the client's certificate (Envoy: HTTP connection manager, header manipulation).

use std::fmt::Write as _;

use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_routing::hcm::{ClientCert, Forward, HttpManager};
use mesh_routing::peer::PeerTls;

use crate::listener::Downstream;

const FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// Cuts, keeps or sets the header.
pub(super) fn forward_client_cert(
    connection: &Downstream,
    manager: &HttpManager,
    headers: &mut HeaderMap,
) {
    let settings = &manager.client_cert;
    let peer = connection.tls.as_ref().filter(|peer| peer.is_mutual());
    let Some(peer) = peer else {
        // Without a verified certificate nobody may say what one holds.
        if settings.forward != Forward::AlwaysForwardOnly {
            headers.remove(FORWARDED_CLIENT_CERT);
        }
        return;
    };
    match settings.forward {
        Forward::Sanitize => {
            headers.remove(FORWARDED_CLIENT_CERT);
        }
        Forward::ForwardOnly | Forward::AlwaysForwardOnly => {}
        Forward::SanitizeSet => {
            let element = element(connection, settings, peer);
            headers.insert(FORWARDED_CLIENT_CERT, element);
        }
        Forward::AppendForward => {
            let ours = element(connection, settings, peer);
            let all = match joined(headers) {
                None => ours,
                Some(mut before) => {
                    before.push(b',');
                    before.extend_from_slice(ours.as_bytes());
                    HeaderValue::from_bytes(&before).unwrap_or(ours)
                }
            };
            headers.insert(FORWARDED_CLIENT_CERT, all);
        }
    }
}

/// What proxies before us have said, also in several lines.
fn joined(headers: &HeaderMap) -> Option<Vec<u8>> {
    let mut lines = headers.get_all(FORWARDED_CLIENT_CERT).iter();
    let mut all = lines.next()?.as_bytes().to_vec();
    for line in lines {
        all.push(b',');
        all.extend_from_slice(line.as_bytes());
    }
    Some(all)
}

/// The element for this connection; made once, and again when the settings change.
fn element(connection: &Downstream, settings: &ClientCert, peer: &PeerTls) -> HeaderValue {
    let mut known = connection.client_cert.borrow_mut();
    if let Some((made_for, value)) = &*known
        && made_for == settings
    {
        return value.clone();
    }
    let text = describe(settings, peer);
    let value = HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static(""));
    *known = Some((*settings, value.clone()));
    value
}

/// In Envoy's order (`ConnectionManagerUtility::mutateXfccRequestHeader`).
fn describe(settings: &ClientCert, peer: &PeerTls) -> String {
    let mut text = String::new();
    let mut put = |key: &str, value: &str, quoted: bool| {
        let separator = if text.is_empty() { "" } else { ";" };
        // A name must not look like another element (Envoy's document asks for quotes here; its code leaves them out).
        let unsafe_name = !quoted && value.contains([',', ';', '"']);
        // Writing to a String cannot fail.
        let _ = match (quoted, unsafe_name) {
            (false, false) => write!(text, "{separator}{key}={value}"),
            (true, _) => write!(text, "{separator}{key}=\"{value}\""),
            (false, true) => {
                let value = value.replace('"', "\\\"");
                write!(text, "{separator}{key}=\"{value}\"")
            }
        };
    };
    for uri in &peer.local_uri_sans {
        put("By", uri, false);
    }
    put("Hash", &peer.sha256, false);
    if let Some(certificate) = peer.certificate_encoded().filter(|_| settings.cert) {
        put("Cert", &certificate, true);
    }
    if let Some(chain) = peer.chain_encoded().filter(|_| settings.chain) {
        put("Chain", &chain, true);
    }
    if settings.subject {
        put("Subject", &peer.subject, true);
    }
    if settings.uri {
        match peer.uri_sans.as_slice() {
            [] => put("URI", "", false),
            uris => uris.iter().for_each(|uri| put("URI", uri, false)),
        }
    }
    if settings.dns {
        peer.dns_sans.iter().for_each(|dns| put("DNS", dns, false));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_envoys() {
        let settings = ClientCert {
            forward: Forward::SanitizeSet,
            subject: true,
            cert: false,
            chain: false,
            dns: true,
            uri: true,
        };
        let peer = PeerTls {
            uri_sans: vec!["spiffe://cluster.local/ns/a/sa/b".into()],
            dns_sans: vec!["a.example".into(), "b.example".into()],
            subject: "CN=x,O=y".into(),
            sha256: "ab".into(),
            chain: vec![vec![1].into()],
            local_uri_sans: vec!["spiffe://cluster.local/ns/c/sa/d".into()],
            ..PeerTls::default()
        };
        assert_eq!(
            describe(&settings, &peer),
            "By=spiffe://cluster.local/ns/c/sa/d;Hash=ab;Subject=\"CN=x,O=y\";\
             URI=spiffe://cluster.local/ns/a/sa/b;DNS=a.example;DNS=b.example"
        );
        let forger = PeerTls {
            uri_sans: vec!["spiffe://x/a,URI=spiffe://cluster.local/ns/a/sa/\"b".into()],
            dns_sans: Vec::new(),
            ..peer
        };
        let text = describe(&settings, &forger);
        assert!(
            text.ends_with(";URI=\"spiffe://x/a,URI=spiffe://cluster.local/ns/a/sa/\\\"b\""),
            "{text}"
        );
    }
}
