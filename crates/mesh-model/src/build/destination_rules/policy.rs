//! What of a traffic policy is applied; the rest is reported and taken out.

use mesh_api::networking::destination_rule::{
    ClientTlsMode, ClientTlsSettings, LoadBalancerSettings, OutlierDetection, TrafficPolicy,
};

use crate::Severity;
use crate::problem::Reporter;

/// The policy without what has no effect in this version.
pub(super) fn applied(
    policy: &TrafficPolicy,
    field: &str,
    report: &mut Reporter<'_>,
) -> TrafficPolicy {
    let mut policy = policy.clone();
    Parts {
        load_balancer: &mut policy.load_balancer,
        outlier_detection: &mut policy.outlier_detection,
        tls: &mut policy.tls,
    }
    .check(field, report);
    let given = std::mem::take(&mut policy.port_level_settings);
    for (index, mut settings) in given.into_iter().enumerate() {
        let field = format!("{field}.portLevelSettings[{index}]");
        let number = settings.port.as_ref().map_or(0, |port| port.number);
        if number == 0 || number > u32::from(u16::MAX) {
            report.report(
                Severity::Error,
                Some("IST0106"),
                format!("{field}.port"),
                "the settings name no port and have no effect",
            );
            continue;
        }
        Parts {
            load_balancer: &mut settings.load_balancer,
            outlier_detection: &mut settings.outlier_detection,
            tls: &mut settings.tls,
        }
        .check(&field, report);
        policy.port_level_settings.push(settings);
    }
    policy
}

/// What policies of hosts and of ports have in common.
struct Parts<'a> {
    load_balancer: &'a mut Option<LoadBalancerSettings>,
    outlier_detection: &'a mut Option<OutlierDetection>,
    tls: &'a mut Option<ClientTlsSettings>,
}

impl Parts<'_> {
    fn check(self, field: &str, report: &mut Reporter<'_>) {
        if let Some(settings) = self.load_balancer {
            load_balancer(settings, &format!("{field}.loadBalancer"), report);
        }
        if let Some(outlier) = self.outlier_detection {
            outlier_detection(outlier, &format!("{field}.outlierDetection"), report);
        }
        if let Some(tls) = self.tls {
            client_tls(tls, &format!("{field}.tls"), report);
        }
    }
}

/// Settings that Istio does not apply either are said to have no effect.
fn client_tls(tls: &mut ClientTlsSettings, field: &str, report: &mut Reporter<'_>) {
    let files = !tls.client_certificate.is_empty() && !tls.private_key.is_empty();
    if tls.mode == ClientTlsMode::Mutual && tls.credential_name.is_empty() && !files {
        report.report(
            Severity::Error,
            Some("IST0106"),
            field,
            "mode MUTUAL needs credentialName, or clientCertificate and privateKey; connections are refused",
        );
    }
    if tls.mode == ClientTlsMode::IstioMutual {
        for (name, given) in [
            ("clientCertificate", &tls.client_certificate),
            ("privateKey", &tls.private_key),
            ("caCertificates", &tls.ca_certificates),
            ("credentialName", &tls.credential_name),
        ] {
            if !given.is_empty() {
                report.report(
                    Severity::Warning,
                    None,
                    format!("{field}.{name}"),
                    "mode ISTIO_MUTUAL uses the mesh's own certificates; this has no effect",
                );
            }
        }
    }
}

fn load_balancer(settings: &mut LoadBalancerSettings, field: &str, report: &mut Reporter<'_>) {
    for (name, given) in [
        (
            "backendUtilization",
            settings.backend_utilization.take().is_some(),
        ),
        (
            "zoneAwareLbSetting",
            settings.zone_aware_lb_setting.take().is_some(),
        ),
    ] {
        if given {
            report.not_applied(format!("{field}.{name}"));
        }
    }
}

fn outlier_detection(settings: &mut OutlierDetection, field: &str, report: &mut Reporter<'_>) {
    if !std::mem::take(&mut settings.outlier_detection_http_error_codes).is_empty() {
        report.not_applied(format!("{field}.outlierDetectionHttpErrorCodes"));
    }
}
