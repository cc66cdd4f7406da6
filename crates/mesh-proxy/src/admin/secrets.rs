//! Certificates in Envoy's forms: the section of the configuration dump, and `/certs`. Private keys are in neither.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use mesh_identity::trust::{Described, describe};
use serde_json::{Value, json};

use super::time::rfc3339;
use crate::secrets::{Held, Material};
use crate::shared::Shared;

const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// What Envoy writes where a key would be.
const REDACTED: &str = "[redacted]";

/// `envoy.admin.v3.SecretsConfigDump`'s `dynamic_active_secrets`.
pub(super) fn dump(shared: &Shared) -> Vec<Value> {
    let secrets = shared.secrets.describe().into_iter();
    secrets
        .map(|(name, held)| {
            let mut secret = json!({ "@type": SECRET, "name": name });
            let inline = |text: &str| json!({ "inline_bytes": BASE64.encode(text) });
            match &held.material {
                Material::Certificate(_) => {
                    secret["tls_certificate"] = json!({
                        "certificate_chain": inline(&held.certificates_pem),
                        "private_key": inline(REDACTED),
                    });
                }
                _ => {
                    secret["validation_context"] =
                        json!({ "trusted_ca": inline(&held.certificates_pem) });
                }
            }
            json!({
                "name": name,
                "version_info": held.version.to_string(),
                "last_updated": rfc3339(held.updated),
                "secret": secret,
            })
        })
        .collect()
}

/// `/certs` (`envoy.admin.v3.Certificates`).
pub(super) fn certificates(shared: &Shared) -> Value {
    let all: Vec<Value> = shared
        .secrets
        .describe()
        .into_iter()
        .map(|(name, held)| {
            let kind = match held.material {
                Material::Certificate(_) => "cert_chain",
                _ => "ca_cert",
            };
            json!({ kind: details(&name, &held) })
        })
        .collect();
    json!({ "certificates": all })
}

fn details(name: &str, held: &Held) -> Vec<Value> {
    let now = SystemTime::now();
    let described = describe(&held.certificates_pem).unwrap_or_default();
    described.iter().map(|one| detail(name, one, now)).collect()
}

fn detail(name: &str, described: &Described, now: SystemTime) -> Value {
    let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
    let left = at(described.not_after)
        .duration_since(now)
        .unwrap_or_default();
    let uris = described.uris.iter().map(|uri| json!({ "uri": uri }));
    let names = described.dns_names.iter().map(|dns| json!({ "dns": dns }));
    json!({
        "path": format!("<inline> {name}"),
        "serial_number": described.serial,
        "subject_alt_names": uris.chain(names).collect::<Vec<_>>(),
        "days_until_expiration": (left.as_secs() / 86_400).to_string(),
        "valid_from": rfc3339(at(described.not_before)),
        "expiration_time": rfc3339(at(described.not_after)),
    })
}
