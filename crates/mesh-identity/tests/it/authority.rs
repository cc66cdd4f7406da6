//! The authority: what it certifies, and what it refuses to.

use mesh_identity::ca::{Authority, BACKDATE_SECONDS, CaError, Parts};
use mesh_identity::csr::{self, CsrError};
use mesh_identity::spiffe::SpiffeId;
use mesh_identity::trust::{self, TrustBundle, TrustError};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};

const NOW: u64 = 1_800_000_000;
const DAY: u64 = 86_400;

fn identity() -> SpiffeId {
    "spiffe://cluster.local/ns/default/sa/reviews"
        .parse()
        .unwrap()
}

/// A request as a workload makes it, changed by a test.
fn request(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity().to_string().try_into().unwrap())];
    change(&mut params);
    params.serialize_request(key).unwrap().pem().unwrap()
}

fn p256() -> KeyPair {
    KeyPair::generate().unwrap()
}

fn checked(pem: &str) -> Result<(), CsrError> {
    csr::check(pem, &[identity()]).map(drop)
}

#[test]
fn a_workload_gets_its_identity_and_nothing_else() {
    let root = Authority::generate("cluster.local", "Root CA", NOW, 3650 * DAY).unwrap();
    let key = p256();
    let good = csr::check(&request(&key, |_| ()), &[identity()]).unwrap();
    let chain = root.issue_workload(&good, &identity(), NOW, DAY).unwrap();
    let [leaf] = &trust::describe(&chain).unwrap()[..] else {
        panic!("the chain of a root is the leaf alone");
    };
    assert_eq!(leaf.uris, [identity().to_string()]);
    assert!(leaf.dns_names.is_empty() && !leaf.is_ca && leaf.subject.is_empty());
    assert_eq!(leaf.not_before, NOW - BACKDATE_SECONDS);
    assert_eq!(leaf.not_after, NOW + DAY);
    assert_eq!(root.roots().root_of(&chain).as_deref(), Some(root.root()));

    let (_, pem) = x509_parser::pem::parse_x509_pem(chain.as_bytes()).unwrap();
    let parsed = pem.parse_x509().unwrap();
    assert!(parsed.subject_alternative_name().unwrap().unwrap().critical);
    let usage = parsed.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && usage.key_encipherment() && !usage.key_cert_sign());
    let extended = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any);
    assert_eq!(parsed.public_key().raw, key.subject_public_key_info());

    // The same key again gets another serial number.
    let again = root.issue_workload(&good, &identity(), NOW, DAY).unwrap();
    assert_ne!(trust::describe(&again).unwrap()[0].serial, leaf.serial);
}

#[test]
fn a_request_without_names_is_good_and_every_abuse_is_refused() {
    let key = p256();
    assert_eq!(
        checked(&request(&key, |params| params.subject_alt_names.clear())),
        Ok(())
    );
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let names = [
        (
            "another account",
            uri("spiffe://cluster.local/ns/default/sa/admin"),
        ),
        (
            "another namespace",
            uri("spiffe://cluster.local/ns/kube-system/sa/reviews"),
        ),
        (
            "another trust domain",
            uri("spiffe://elsewhere/ns/default/sa/reviews"),
        ),
        ("a wildcard", uri("spiffe://cluster.local/ns/default/sa/*")),
        (
            "a DNS name",
            SanType::DnsName("istiod.istio-system.svc".try_into().unwrap()),
        ),
        (
            "a wildcard DNS name",
            SanType::DnsName("*.svc".try_into().unwrap()),
        ),
        ("an address", SanType::IpAddress([127, 0, 0, 1].into())),
        (
            "a mail address",
            SanType::Rfc822Name("a@b".try_into().unwrap()),
        ),
    ];
    for (what, name) in names {
        // Beside the caller's own name, too.
        let pem = request(&key, |params| params.subject_alt_names.push(name));
        assert!(
            matches!(checked(&pem), Err(CsrError::Name { .. })),
            "{what} was accepted"
        );
    }
    let ca = request(&key, |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)
    });
    assert_eq!(checked(&ca), Err(CsrError::Authority));
    let signer = request(&key, |params| {
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign]
    });
    assert_eq!(checked(&signer), Err(CsrError::Authority));
    let code = request(&key, |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
    });
    assert!(matches!(checked(&code), Err(CsrError::Extension(_))));
    let tls = request(&key, |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    });
    assert_eq!(checked(&tls), Ok(()));
}

#[test]
fn weak_unknown_and_unproven_keys_are_refused() {
    let key = |alg| KeyPair::generate_for(alg).unwrap();
    assert_eq!(
        checked(&request(&key(&rcgen::PKCS_ECDSA_P384_SHA384), |_| ())),
        Ok(())
    );
    let ed = request(&key(&rcgen::PKCS_ED25519), |_| ());
    assert!(matches!(checked(&ed), Err(CsrError::Key(_))));
    let p521 = request(&key(&rcgen::PKCS_ECDSA_P521_SHA512), |_| ());
    assert!(matches!(checked(&p521), Err(CsrError::Key(_))));
    // Made with `openssl req -new -newkey rsa:1024`.
    let error = checked(RSA_1024).unwrap_err();
    assert!(error.to_string().contains("RSA with 1024 bits"), "{error}");

    // The signature of another request below the same names: the sender does not have the key.
    let der = |pem: &str| {
        x509_parser::pem::parse_x509_pem(pem.as_bytes())
            .unwrap()
            .1
            .contents
    };
    let mut forged = der(&request(&p256(), |_| ()));
    let last = forged.len() - 1;
    forged[last] ^= 1;
    let forged = pem(&forged);
    assert_eq!(checked(&forged), Err(CsrError::Signature));
}

fn pem(der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n")
}

#[test]
fn what_is_no_request_is_refused_whatever_it_is() {
    let good = request(&p256(), |_| ());
    let large = "A".repeat(csr::MAX_REQUEST_BYTES + 1);
    assert_eq!(checked(&large), Err(CsrError::TooLarge(large.len())));
    let key = p256().serialize_pem();
    for bad in [
        "",
        "nonsense",
        &key,
        &format!("{good}{good}"),
        &good[..good.len() / 2],
        &pem(&[]),
        &pem(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]),
    ] {
        let error = checked(bad).unwrap_err();
        assert!(error.is_unreadable(), "{bad:?}: {error}");
    }
    // Cut anywhere, it is refused and nothing worse happens.
    let der = x509_parser::pem::parse_x509_pem(good.as_bytes())
        .unwrap()
        .1
        .contents;
    for length in 0..der.len() {
        assert!(checked(&pem(&der[..length])).is_err());
    }
}

#[test]
fn an_intermediate_issues_below_its_root_and_never_beyond_its_own_end() {
    let root = Authority::generate("cluster.local", "Root CA", NOW, 3650 * DAY).unwrap();
    let middle = root
        .intermediate("cluster.local", "Intermediate CA", NOW, 10 * DAY)
        .unwrap();
    assert_eq!(middle.root(), root.root());
    let good = csr::check(&request(&p256(), |_| ()), &[identity()]).unwrap();
    let chain = middle
        .issue_workload(&good, &identity(), NOW, 90 * DAY)
        .unwrap();
    let described = trust::describe(&chain).unwrap();
    assert_eq!(
        described.len(),
        2,
        "the leaf and the intermediate, not the root"
    );
    assert_eq!(described[0].not_after, NOW + 10 * DAY);
    assert_eq!(middle.roots().root_of(&chain).as_deref(), Some(root.root()));
    assert!(matches!(
        middle.issue_workload(&good, &identity(), NOW + 10 * DAY, DAY),
        Err(CaError::Expired(_))
    ));

    // As Istio's Makefile writes it: the chain with the root at its end. And without a chain.
    for chain in [
        format!("{}{}", middle.certificate_pem(), root.certificate_pem()),
        String::new(),
    ] {
        let again = Authority::load(Parts {
            certificate: middle.certificate_pem(),
            key: middle.key_pem(),
            chain: &chain,
            roots: root.certificate_pem(),
        })
        .unwrap();
        assert_eq!(again.chain_pem(), middle.chain_pem());
    }
}

#[test]
fn parts_that_dont_belong_together_are_named() {
    let root = Authority::generate("cluster.local", "Root CA", NOW, DAY).unwrap();
    let other = Authority::generate("cluster.local", "Root CA", NOW, DAY).unwrap();
    let error = |parts| Authority::load(parts).unwrap_err().to_string();
    let foreign_key = error(Parts {
        certificate: root.certificate_pem(),
        key: other.key_pem(),
        ..Parts::default()
    });
    assert!(foreign_key.contains("key does not belong"), "{foreign_key}");
    let no_root = error(Parts {
        certificate: root.certificate_pem(),
        key: root.key_pem(),
        chain: "",
        roots: other.certificate_pem(),
    });
    assert!(no_root.contains("don't lead to any"), "{no_root}");
    let leaf = root.issue_server(&["a.example"], &[], NOW, 3600).unwrap();
    let no_ca = error(Parts {
        certificate: &leaf.chain_pem,
        key: &leaf.key_pem,
        ..Parts::default()
    });
    assert!(no_ca.contains("CA:TRUE"), "{no_ca}");
}

#[test]
fn a_bundle_holds_each_root_once_and_says_whose_a_chain_is() {
    let old = Authority::generate("cluster.local", "Root CA", NOW, DAY).unwrap();
    let new = Authority::generate("cluster.local", "Root CA", NOW, DAY).unwrap();
    let both = TrustBundle::from_pem(&format!(
        "{}{}{}",
        old.certificate_pem(),
        new.certificate_pem(),
        old.certificate_pem()
    ))
    .unwrap();
    assert_eq!(both.fingerprints(), [old.root(), new.root()]);
    assert_eq!(old.roots().and(new.roots()).unwrap(), both);
    assert_eq!(TrustBundle::from_pem(both.pem()).unwrap(), both);
    let leaf = new.issue_server(&["a.example"], &[], NOW, 3600).unwrap();
    // Both have the same name: only the signature tells them apart.
    assert_eq!(both.root_of(&leaf.chain_pem).as_deref(), Some(new.root()));
    assert_eq!(old.roots().root_of(&leaf.chain_pem), None);
    assert_eq!(TrustBundle::from_pem(""), Err(TrustError::Empty));
    assert_eq!(both.fingerprints()[0].len(), 64);
}

const RSA_1024: &str = "-----BEGIN CERTIFICATE REQUEST-----
MIIBPzCBqQIBADAAMIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDIgkAu6IyC
UFq/9bmMrKoQxxjiV0557w08vNte+YM0CPOCdj/8lxG70nuK3Xuwh6ZzTf2DNsAL
Abv8It+pMRipqFHGh2wnYo9RtcUvlTuVfsrScvdxm2qu3Amlh3McEe5xRny4WYZh
O08eOyCvQ/WaF6tXeIe9HXDggF9ub+BiGQIDAQABoAAwDQYJKoZIhvcNAQELBQAD
gYEAaFK1bn9h+ujAe39NOWzH/EdBOUPd0piQbV/tRx68HkNV208bKpFKqwpmxwWf
3LaSLDCsMxZJFaYJXxGAYb2ZjnOJAzfpnA0J2VvdM4pACpPh7uFyr+kvvItkPrOu
Jz5YG4QvDJq831lyK1yN5a50jj366cJXdgpEp6w7kDQdvLU=
-----END CERTIFICATE REQUEST-----
";
