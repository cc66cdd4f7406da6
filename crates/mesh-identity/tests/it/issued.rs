//! What a signer elsewhere issues, and what it may be sent.

use mesh_identity::ca::Authority;
use mesh_identity::csr::{self, CsrError};
use mesh_identity::issued::{self, IssuedError};
use mesh_identity::spiffe::SpiffeId;
use rcgen::{
    Attribute, BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};

const NOW: u64 = 1_800_000_000;
const DAY: u64 = 86_400;
/// `extensionRequest` (RFC 2985 section 5.4.2) and `challengePassword`.
const EXTENSIONS: &[u64] = &[1, 2, 840, 113_549, 1, 9, 14];
const PASSWORD: &[u64] = &[1, 2, 840, 113_549, 1, 9, 7];

fn id(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
        .parse()
        .unwrap()
}

fn uri(id: &SpiffeId) -> SanType {
    SanType::URI(id.to_string().as_str().try_into().unwrap())
}

fn at(seconds: u64) -> time::OffsetDateTime {
    time::OffsetDateTime::from_unix_timestamp(seconds.cast_signed()).unwrap()
}

/// What a workload asks for.
fn asked() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(&id("reviews"))];
    params
}

/// What a good signer makes of it.
fn params() -> CertificateParams {
    let mut params = asked();
    params.not_before = at(NOW - 60);
    params.not_after = at(NOW + DAY);
    params.is_ca = IsCa::ExplicitNoCa;
    params
}

fn issuer(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_before = at(NOW - DAY);
    params.not_after = at(NOW + 1000 * DAY);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

#[test]
fn a_certificate_is_what_was_asked_for_or_nothing() {
    let root = issuer("Root");
    let trusted = mesh_identity::trust::TrustBundle::from_pem(&root.pem()).unwrap();
    let key = KeyPair::generate().unwrap();
    let pem = asked().serialize_request(&key).unwrap().pem().unwrap();
    let names = [id("reviews")];
    let checked = csr::check_for_signer(&pem, &names).unwrap();
    let judged = |answer: &str| {
        issued::workload(answer, &checked, &names, &trusted, NOW, DAY).map(|issued| issued.root)
    };
    let with = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = params();
        change(&mut params);
        judged(&params.signed_by(&key, &root).unwrap().pem())
    };
    assert_eq!(with(&|_| {}).as_ref(), Ok(&trusted.fingerprints()[0]));
    // Fine too: the root behind it, and no usage at all.
    let good = params().signed_by(&key, &root).unwrap().pem();
    assert!(judged(&format!("{good}{}", root.pem())).is_ok());

    let other = KeyPair::generate().unwrap();
    let wrong = params().signed_by(&other, &root).unwrap().pem();
    assert_eq!(judged(&wrong), Err(IssuedError::Key));
    let names_of = |found: &dyn Fn(&mut CertificateParams)| match with(found) {
        Err(IssuedError::Names { found, .. }) => found,
        other => panic!("{other:?}"),
    };
    let two = names_of(&|params| params.subject_alt_names.push(uri(&id("admin"))));
    assert!(two.ends_with("/sa/admin"), "{two}");
    names_of(&|params| params.subject_alt_names = vec![uri(&id("admin"))]);
    names_of(&|params| params.subject_alt_names.clear());
    names_of(&|params| {
        let name = "reviews.default.svc".try_into().unwrap();
        params.subject_alt_names.push(SanType::DnsName(name));
    });
    assert_eq!(
        with(&|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
        Err(IssuedError::Authority)
    );
    let usage = |usage: ExtendedKeyUsagePurpose| {
        with(&|params| params.extended_key_usages = vec![usage.clone()])
    };
    assert!(matches!(
        usage(ExtendedKeyUsagePurpose::ClientAuth),
        Err(IssuedError::Usage(_))
    ));
    assert!(matches!(
        usage(ExtendedKeyUsagePurpose::ServerAuth),
        Err(IssuedError::Usage(_))
    ));
    for (from, to) in [
        (NOW - 60, NOW + 2 * DAY),
        (NOW - 60, NOW - 1),
        (NOW + 3600, NOW + DAY),
    ] {
        let dated = with(&|params| {
            params.not_before = at(from);
            params.not_after = at(to);
        });
        assert!(
            matches!(dated, Err(IssuedError::Validity { .. })),
            "{dated:?}"
        );
    }
    let elsewhere = params().signed_by(&key, &issuer("Root")).unwrap().pem();
    assert!(matches!(judged(&elsewhere), Err(IssuedError::Chain(_))));
    for text in ["", "no PEM", &root.pem().repeat(20)] {
        assert!(judged(text).is_err(), "{text}");
    }
    assert!(judged(&root.pem()).is_err());
}

#[test]
fn an_intermediate_is_handed_on_and_the_root_is_not() {
    let root = Authority::generate("o", "Root", NOW - DAY, 1000 * DAY).unwrap();
    let middle = root
        .intermediate("o", "Middle", NOW - DAY, 100 * DAY)
        .unwrap();
    let (pem, _) = csr::make(&id("reviews")).unwrap();
    let names = [id("reviews")];
    let checked = csr::check_for_signer(&pem, &names).unwrap();
    let answer = middle
        .issue_workload(&checked, &names[0], NOW, DAY)
        .unwrap();
    // In the wrong order, with the root among them.
    let mut blocks: Vec<String> = answer
        .split_inclusive("-----END CERTIFICATE-----\n")
        .map(str::to_owned)
        .collect();
    blocks.push(root.certificate_pem().to_owned());
    blocks[1..].reverse();
    let roots = root.roots();
    let issued = issued::workload(&blocks.concat(), &checked, &names, roots, NOW, DAY).unwrap();
    assert_eq!(issued.chain_pem, answer);
    assert_eq!(issued.root, root.root());
    // Once the one in between is over, so is what it signed.
    let late = NOW + 100 * DAY;
    assert!(issued::workload(&answer, &checked, &names, roots, late, DAY).is_err());
}

#[test]
fn a_signer_is_not_sent_what_it_could_read_in_another_way() {
    let names = [id("reviews")];
    let key = KeyPair::generate().unwrap();
    let made = |change: &dyn Fn(&mut CertificateParams), more: Vec<Attribute>| {
        let mut params = asked();
        change(&mut params);
        let request = params.serialize_request_with_attributes(&key, more);
        request.unwrap().pem().unwrap()
    };
    let check = |pem: &str| csr::check_for_signer(pem, &names).map(drop);
    assert_eq!(check(&made(&|_| {}, Vec::new())), Ok(()));
    // Istio's agents send an organization without a name.
    let empty = made(
        &|params| params.distinguished_name.push(DnType::OrganizationName, ""),
        Vec::new(),
    );
    assert_eq!(check(&empty), Ok(()));
    let masters = made(
        &|params| {
            let name = DnType::OrganizationName;
            params.distinguished_name.push(name, "system:masters");
        },
        Vec::new(),
    );
    assert!(matches!(check(&masters), Err(CsrError::Subject(_))));
    assert_eq!(csr::organizations(&masters).unwrap(), ["system:masters"]);
    let nameless = made(&|params| params.subject_alt_names.clear(), Vec::new());
    assert!(matches!(check(&nameless), Err(CsrError::Name { .. })));
    // A second request for extensions, which some signers read instead of the first: basicConstraints CA:TRUE.
    let second = Attribute {
        oid: EXTENSIONS,
        values: vec![
            0x31, 0x13, 0x30, 0x11, 0x30, 0x0f, 0x06, 0x03, 0x55, 0x1d, 0x13, 0x01, 0x01, 0xff,
            0x04, 0x05, 0x30, 0x03, 0x01, 0x01, 0xff,
        ],
    };
    let twice = made(&|_| {}, vec![second]);
    assert!(check(&twice).is_err(), "{twice}");
    // An attribute that is about something else.
    let password = Attribute {
        oid: PASSWORD,
        values: vec![0x31, 0x03, 0x0c, 0x01, b'x'],
    };
    let password = made(&|_| {}, vec![password]);
    assert!(matches!(check(&password), Err(CsrError::Extension(_))));
}
