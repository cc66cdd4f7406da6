//! How a gateway ends TLS; what can't be had is reported and taken out.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mesh_api::mesh_config::{MinTlsVersion, TlsConfig};
use mesh_api::networking::gateway::{ServerTlsMode, ServerTlsSettings, TlsProtocol};

use crate::Severity;
use crate::problem::Reporter;

/// Cipher suites of TLS 1.2 that are served: those with forward secrecy and authenticated encryption. Those of TLS 1.3 are always all served.
const CIPHER_SUITES: &[&str] = &[
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-RSA-CHACHA20-POLY1305",
];
/// Groups for key exchange that are served.
const CURVES: &[&str] = &["X25519", "P-256", "P-384", "X25519MLKEM768"];

/// The settings without what is not served; `None` where nothing useful would be left, so that the server has to be left out.
///
/// What comes through here the proxy has to take: it takes a listener as a whole or not at all, with the servers of everybody on the port.
pub(super) fn applied(
    given: &ServerTlsSettings,
    defaults: &TlsConfig,
    field: &str,
    report: &mut Reporter<'_>,
) -> Option<ServerTlsSettings> {
    let mut tls = given.clone();
    if !has_certificate(&tls) {
        report.report(
            Severity::Error,
            Some("IST0106"),
            field,
            format!(
                "mode {:?} needs credentialName, or serverCertificate and privateKey; the server is left out",
                tls.mode
            ),
        );
        return None;
    }
    if matches!(
        tls.max_protocol_version,
        TlsProtocol::Tlsv1_0 | TlsProtocol::Tlsv1_1
    ) {
        report.report(
            Severity::Error,
            None,
            format!("{field}.maxProtocolVersion"),
            "TLS 1.0 and 1.1 are not served (RFC 8996); the server is left out",
        );
        return None;
    }
    if matches!(
        tls.min_protocol_version,
        TlsProtocol::Tlsv1_0 | TlsProtocol::Tlsv1_1
    ) {
        report.report(
            Severity::Warning,
            None,
            format!("{field}.minProtocolVersion"),
            "TLS 1.0 and 1.1 are not served (RFC 8996); the lowest version is 1.2",
        );
        tls.min_protocol_version = TlsProtocol::Tlsv1_2;
    }
    if let Some((part, message)) = refused(&tls, defaults) {
        report.report(
            Severity::Error,
            Some("IST0106"),
            format!("{field}.{part}"),
            format!("{message}; the server is left out"),
        );
        return None;
    }
    retain_known(
        &mut tls.cipher_suites,
        CIPHER_SUITES,
        &format!("{field}.cipherSuites"),
        report,
    )?;
    retain_known(
        &mut tls.ecdh_curves,
        CURVES,
        &format!("{field}.ecdhCurves"),
        report,
    )?;
    Some(tls)
}

/// The first field that the proxy would not take, and why.
fn refused(tls: &ServerTlsSettings, defaults: &TlsConfig) -> Option<(String, String)> {
    // Where the server says nothing, the lowest version is the mesh's; the highest is 1.3.
    let at_least_1_3 = match tls.min_protocol_version {
        TlsProtocol::TlsAuto => defaults.min_protocol_version == MinTlsVersion::V1_3,
        lowest => lowest == TlsProtocol::Tlsv1_3,
    };
    if at_least_1_3 && tls.max_protocol_version == TlsProtocol::Tlsv1_2 {
        let whose = match tls.min_protocol_version {
            TlsProtocol::TlsAuto => "lowest version of the mesh (tlsDefaults)",
            _ => "minProtocolVersion",
        };
        let message = format!("TLSV1_2 is below TLSV1_3, the {whose}");
        return Some(("maxProtocolVersion".to_owned(), message));
    }
    let unverified = tls.insecure_skip_verify == Some(true);
    if unverified && matches!(tls.mode, ServerTlsMode::Mutual | ServerTlsMode::IstioMutual) {
        let message = "a client certificate that is asked for and not checked proves nothing and is not served; take insecureSkipVerify out, or use mode SIMPLE";
        return Some(("insecureSkipVerify".to_owned(), message.to_owned()));
    }
    // The other modes don't look at these.
    let pinned = matches!(
        tls.mode,
        ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual
    );
    if unverified || !pinned {
        return None;
    }
    let wrong = |list: &[String], right: fn(&str) -> bool| {
        let found = list.iter().enumerate().find(|(_, text)| !right(text));
        found.map(|(index, text)| (index, text.clone()))
    };
    if let Some((index, text)) = wrong(&tls.verify_certificate_spki, is_spki) {
        return Some((
            format!("verifyCertificateSpki[{index}]"),
            format!("{text:?} is not the base64 form of a SHA-256 (32 bytes)"),
        ));
    }
    let (index, text) = wrong(&tls.verify_certificate_hash, is_hash)?;
    Some((
        format!("verifyCertificateHash[{index}]"),
        format!("{text:?} is not a SHA-256 in 64 hexadecimal digits, with or without colons"),
    ))
}

fn is_spki(text: &str) -> bool {
    STANDARD.decode(text).is_ok_and(|bytes| bytes.len() == 32)
}

fn is_hash(text: &str) -> bool {
    let digits = || text.chars().filter(|letter| *letter != ':');
    digits().count() == 64 && digits().all(|digit| digit.is_ascii_hexdigit())
}

/// Where the server's own certificate comes from.
fn has_certificate(tls: &ServerTlsSettings) -> bool {
    tls.mode == ServerTlsMode::IstioMutual
        || !tls.credential_name.is_empty()
        || !tls.credential_names.is_empty()
        || !tls.tls_certificates.is_empty()
        || !(tls.server_certificate.is_empty() || tls.private_key.is_empty())
}

/// The mesh's limits without what is not served.
pub(crate) fn mesh_limits(config: &mut TlsConfig, field: &str, report: &mut Reporter<'_>) {
    // Where nothing is left, the default holds.
    let _ = retain_known(
        &mut config.cipher_suites,
        CIPHER_SUITES,
        &format!("{field}.cipherSuites"),
        report,
    );
    let _ = retain_known(
        &mut config.ecdh_curves,
        CURVES,
        &format!("{field}.ecdhCurves"),
        report,
    );
}

/// Takes out and reports what is not among `known`; `None` if nothing is left of a list that had something.
fn retain_known(
    list: &mut Vec<String>,
    known: &[&str],
    field: &str,
    report: &mut Reporter<'_>,
) -> Option<()> {
    let given = std::mem::take(list);
    for (index, name) in given.iter().enumerate() {
        if known.contains(&name.as_str()) {
            list.push(name.clone());
        } else {
            let message = format!(
                "{name:?} is not served and left out; served are {}",
                known.join(", ")
            );
            report.report(
                Severity::Warning,
                None,
                format!("{field}[{index}]"),
                message,
            );
        }
    }
    if list.is_empty() && !given.is_empty() {
        report.report(
            Severity::Error,
            None,
            field,
            "nothing of the list is served; a server is left out, the mesh has its default",
        );
        return None;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ObjectKey;

    const HASH: &str = "6fbbb3e7eb1eb9b5a9a2b8e8b1a6a0b3c4d5e6f708192a3b4c5d6e7f8090a1b2";

    fn settings(mode: ServerTlsMode) -> ServerTlsSettings {
        ServerTlsSettings {
            mode,
            credential_name: "a".to_owned(),
            ..ServerTlsSettings::default()
        }
    }

    /// The field that is reported with the server left out; `None` if it is served.
    fn left_out(tls: &ServerTlsSettings, defaults: &TlsConfig) -> Option<String> {
        let key = ObjectKey::new("Gateway", "default", "a");
        let mut problems = Vec::new();
        let report = &mut Reporter::new(&key, &mut problems);
        let served = applied(tls, defaults, "tls", report).is_some();
        let error = problems.pop().filter(|it| it.severity == Severity::Error);
        assert_eq!(served, error.is_none(), "{error:?}");
        error.map(|problem| problem.field)
    }

    #[test]
    fn a_server_whose_lowest_version_is_above_its_highest_is_left_out() {
        let versions = |lowest, highest, default| {
            let tls = ServerTlsSettings {
                min_protocol_version: lowest,
                max_protocol_version: highest,
                ..settings(ServerTlsMode::Simple)
            };
            let defaults = TlsConfig {
                min_protocol_version: default,
                ..TlsConfig::default()
            };
            left_out(&tls, &defaults).is_some_and(|field| field == "tls.maxProtocolVersion")
        };
        use TlsProtocol::{TlsAuto, Tlsv1_0, Tlsv1_2, Tlsv1_3};
        assert!(versions(Tlsv1_3, Tlsv1_2, MinTlsVersion::Auto));
        // What the server does not say the mesh says.
        assert!(versions(TlsAuto, Tlsv1_2, MinTlsVersion::V1_3));
        assert!(!versions(Tlsv1_2, Tlsv1_2, MinTlsVersion::V1_3));
        assert!(!versions(TlsAuto, Tlsv1_2, MinTlsVersion::V1_2));
        assert!(!versions(Tlsv1_3, TlsAuto, MinTlsVersion::Auto));
        assert!(!versions(Tlsv1_3, Tlsv1_3, MinTlsVersion::Auto));
        assert!(!versions(TlsAuto, TlsAuto, MinTlsVersion::V1_3));
        assert!(!versions(Tlsv1_0, Tlsv1_2, MinTlsVersion::V1_3));
    }

    #[test]
    fn a_server_that_asks_for_certificates_and_checks_none_is_left_out() {
        use ServerTlsMode::{IstioMutual, Mutual, OptionalMutual, Simple};
        for (mode, refused) in [
            (Mutual, true),
            (IstioMutual, true),
            (OptionalMutual, false),
            (Simple, false),
        ] {
            let tls = ServerTlsSettings {
                insecure_skip_verify: Some(true),
                ..settings(mode)
            };
            let found = left_out(&tls, &TlsConfig::default());
            let expected = refused.then(|| "tls.insecureSkipVerify".to_owned());
            assert_eq!(found, expected, "{mode:?}");
        }
    }

    #[test]
    fn a_server_with_a_malformed_pin_is_left_out() {
        let spki = STANDARD.encode([7; 32]);
        let short = STANDARD.encode([7; 31]);
        let mut tls = settings(ServerTlsMode::Mutual);
        tls.verify_certificate_spki = vec![spki.clone()];
        assert_eq!(left_out(&tls, &TlsConfig::default()), None);
        for wrong in ["", "x", &short, &HASH[1..]] {
            let mut tls = settings(ServerTlsMode::Mutual);
            tls.verify_certificate_spki = vec![spki.clone(), wrong.to_owned()];
            let found = left_out(&tls, &TlsConfig::default());
            assert_eq!(found.as_deref(), Some("tls.verifyCertificateSpki[1]"));
            // Nobody looks at them in this mode.
            tls.mode = ServerTlsMode::Simple;
            assert_eq!(left_out(&tls, &TlsConfig::default()), None);
        }
        let pairs: Vec<&str> = (0..32).map(|i| &HASH[2 * i..2 * i + 2]).collect();
        let colons = pairs.join(":").to_uppercase();
        let mut tls = settings(ServerTlsMode::OptionalMutual);
        tls.verify_certificate_hash = vec![HASH.to_owned(), colons];
        assert_eq!(left_out(&tls, &TlsConfig::default()), None);
        let signed = format!("+{}", &HASH[1..]);
        for wrong in ["", "é", &HASH[1..], &signed] {
            tls.verify_certificate_hash = vec![wrong.to_owned()];
            let found = left_out(&tls, &TlsConfig::default());
            assert_eq!(found.as_deref(), Some("tls.verifyCertificateHash[0]"));
        }
    }
}
