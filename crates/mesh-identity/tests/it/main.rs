//! What this crate promises, from outside.

// A panic is how a test fails, in its helpers too.
#![allow(clippy::unwrap_used)]

mod authority;
mod issued;
mod jwt;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use mesh_identity::ca::{self, Authority};
use mesh_identity::spiffe::SpiffeId;
use mesh_identity::tls;
use mesh_identity::token::{ObjectRef, TokenError, TokenKeys, TokenRequest};
use rustls_pki_types::ServerName;

const NOW: u64 = 1_800_000_000;
const YEAR: u64 = 365 * 24 * 3600;

fn wall_clock() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// Runs a TLS handshake in memory and says how it ended.
fn handshake(
    client: Arc<rustls::ClientConfig>,
    server: Arc<rustls::ServerConfig>,
    name: &str,
) -> Result<(), rustls::Error> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = rustls::ClientConnection::new(client, name).unwrap();
    let mut server = rustls::ServerConnection::new(server).unwrap();
    for _ in 0..8 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut read = &wire[..];
        while !read.is_empty() {
            server.read_tls(&mut read).unwrap();
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut read = &wire[..];
        while !read.is_empty() {
            client.read_tls(&mut read).unwrap();
            client.process_new_packets()?;
        }
    }
    assert!(!client.is_handshaking());
    Ok(())
}

#[test]
fn a_served_certificate_is_trusted_by_name_and_address_and_only_under_its_root() {
    let now = wall_clock();
    let authority = Authority::generate("mesh", "test root", now, YEAR).unwrap();
    let leaf = authority
        .issue_server(
            &["istiod.istio-system.svc"],
            &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
            now,
            3600,
        )
        .unwrap();
    let server = tls::server_config(&leaf, &["h2", "http/1.1"]).unwrap();
    let client = tls::client_config(authority.certificate_pem(), &["h2"]).unwrap();
    handshake(client.clone(), server.clone(), "istiod.istio-system.svc").unwrap();
    handshake(client.clone(), server.clone(), "127.0.0.1").unwrap();
    assert!(handshake(client, server.clone(), "other.istio-system.svc").is_err());
    let other = Authority::generate("mesh", "other root", now, YEAR).unwrap();
    let stranger = tls::client_config(other.certificate_pem(), &["h2"]).unwrap();
    assert!(handshake(stranger, server, "127.0.0.1").is_err());
}

#[test]
fn an_authority_survives_its_pem_form() {
    let now = wall_clock();
    let first = Authority::generate("mesh", "root", now, YEAR).unwrap();
    let again = Authority::from_pem(first.certificate_pem(), first.key_pem()).unwrap();
    let leaf = again.issue_server(&["a.example"], &[], now, 3600).unwrap();
    assert_eq!(ca::not_after(&leaf.chain_pem), Some(now + 3600));
    let server = tls::server_config(&leaf, &[]).unwrap();
    let client = tls::client_config(first.certificate_pem(), &[]).unwrap();
    handshake(client, server, "a.example").unwrap();
    assert!(Authority::from_pem("nonsense", first.key_pem()).is_err());
    assert!(tls::client_config("", &[]).is_err());
}

fn request(audiences: &[&str]) -> TokenRequest<'static> {
    TokenRequest {
        namespace: "default",
        service_account: ObjectRef {
            name: "bookinfo-reviews".into(),
            uid: "u-1".into(),
        },
        pod: Some(ObjectRef {
            name: "reviews-v1-abc".into(),
            uid: "u-2".into(),
        }),
        audiences: audiences.iter().map(|a| (*a).to_owned()).collect(),
        id: "t-1".into(),
        now: NOW,
        lifetime_seconds: 3600,
    }
}

#[test]
fn a_token_is_accepted_in_its_time_by_its_audience() {
    let keys = TokenKeys::generate("https://kubernetes.default.svc").unwrap();
    let token = keys.issue(request(&["istio-ca"])).unwrap();
    let istio = ["istio-ca".to_owned()];
    let claims = keys.check(&token, &istio, NOW + 10).unwrap();
    assert_eq!(claims.sub, "system:serviceaccount:default:bookinfo-reviews");
    assert_eq!(claims.kubernetes.pod.unwrap().uid, "u-2");
    assert!(matches!(
        keys.check(&token, &[], NOW + 10),
        Err(TokenError::Audience { .. })
    ));
    assert!(matches!(
        keys.check(&token, &istio, NOW + 3600),
        Err(TokenError::Expired)
    ));
    assert!(matches!(
        keys.check(&token, &istio, NOW - 1),
        Err(TokenError::NotYet)
    ));
    let own = keys.issue(request(&[])).unwrap();
    assert!(keys.check(&own, &[], NOW).is_ok());
}

#[test]
fn a_token_of_another_key_issuer_or_form_is_refused() {
    let keys = TokenKeys::generate("https://kubernetes.default.svc").unwrap();
    let other = TokenKeys::generate("https://kubernetes.default.svc").unwrap();
    let token = keys.issue(request(&[])).unwrap();
    assert!(matches!(
        other.check(&token, &[], NOW),
        Err(TokenError::Invalid(_))
    ));
    let elsewhere = TokenKeys::from_pem("https://elsewhere", keys.key_pem()).unwrap();
    assert!(matches!(
        elsewhere.check(&token, &[], NOW),
        Err(TokenError::Issuer(_))
    ));
    // {"alg":"none"} with the same claims.
    let claims = token.split('.').nth(1).unwrap();
    let unsigned = format!("eyJhbGciOiJub25lIn0.{claims}.");
    assert!(keys.check(&unsigned, &[], NOW).is_err());
    assert!(matches!(
        keys.check(&"a".repeat(1 << 20), &[], NOW),
        Err(TokenError::TooLong(_))
    ));
    assert!(keys.check("", &[], NOW).is_err());
}

#[test]
fn a_spiffe_id_reads_back_and_odd_ones_are_refused() {
    let text = "spiffe://cluster.local/ns/default/sa/bookinfo-reviews";
    let id: SpiffeId = text.parse().unwrap();
    assert_eq!(id.to_string(), text);
    for bad in [
        "",
        "spiffe://",
        "https://cluster.local/ns/a/sa/b",
        "spiffe://cluster.local/ns/a/sa/",
        "spiffe://cluster.local/ns/../sa/b",
        "spiffe://cluster.local/ns/a/sa/b/c",
        "spiffe://Cluster.local/ns/a/sa/b",
        "spiffe://cluster.local/ns/a%2e/sa/b",
        "spiffe://cluster.local/ns/a\0/sa/b",
    ] {
        assert!(bad.parse::<SpiffeId>().is_err(), "{bad:?} was accepted");
    }
}
