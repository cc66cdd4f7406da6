//! How a gateway ends TLS; what can't be had is reported and taken out.

use mesh_api::mesh_config::TlsConfig;
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
pub(super) fn applied(
    given: &ServerTlsSettings,
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
