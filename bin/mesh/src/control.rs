//! `mesh control`: the control plane.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use mesh_cli::global::Global;
use mesh_control::{Control, External, Lifetimes, Options, Range};

/// Flags of `mesh control`, named as those of Istio's `pilot-discovery discovery`.
#[derive(clap::Args)]
pub struct Args {
    /// Discovery in plain text, without authentication and secrets, for few clients at a time; empty switches it off
    #[arg(
        long = "grpcAddr",
        value_name = "ADDR",
        default_value = "0.0.0.0:15010"
    )]
    grpc: String,
    /// Discovery and certificates over TLS
    #[arg(
        long = "secureGRPCAddr",
        value_name = "ADDR",
        default_value = "0.0.0.0:15012"
    )]
    secure_grpc: SocketAddr,
    /// Webhooks for injection and validation
    #[arg(
        long = "httpsAddr",
        value_name = "ADDR",
        default_value = "0.0.0.0:15017"
    )]
    https: SocketAddr,
    /// Metrics
    #[arg(
        long = "monitoringAddr",
        value_name = "ADDR",
        default_value = "0.0.0.0:15014"
    )]
    monitoring: SocketAddr,
    /// Readiness, and debug pages for the loopback address
    #[arg(long = "httpAddr", value_name = "ADDR", default_value = "0.0.0.0:8080")]
    http: SocketAddr,
    /// Revision of this installation, where several run in one cluster
    #[arg(long, value_name = "NAME", env = "REVISION", default_value = "default")]
    revision: String,
    #[command(flatten)]
    security: Security,
    /// Log filter, such as info or mesh_control=debug
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,
}

/// What Istio's control plane takes from its environment alone.
#[derive(clap::Args)]
struct Security {
    /// Audiences of service account tokens that are accepted, separated by commas
    #[arg(
        long = "token-audiences",
        value_name = "NAMES",
        env = "TOKEN_AUDIENCES",
        default_value = "istio-ca",
        value_delimiter = ','
    )]
    token_audiences: Vec<String>,
    /// Ranges of addresses that keys of token issuers are never fetched from, separated by commas, such as 10.0.0.0/8
    #[arg(
        long = "blocked-jwks-cidrs",
        value_name = "RANGES",
        env = "BLOCKED_CIDRS_IN_JWKS_URIS",
        default_value = ""
    )]
    blocked_key_ranges: String,
    /// Whether proxies must authenticate for discovery on the secure port
    #[arg(long = "xds-auth", value_name = "BOOL", env = "XDS_AUTH", default_value_t = true, action = clap::ArgAction::Set)]
    xds_auth: bool,
    /// Whether a proxy must be what its credentials say
    #[arg(long = "xds-identity-check", value_name = "BOOL", env = "PILOT_ENABLE_XDS_IDENTITY_CHECK", default_value_t = true, action = clap::ArgAction::Set)]
    xds_identity_check: bool,
    /// Validity of workloads' certificates where they don't ask for one, such as 24h
    #[arg(long = "workload-cert-ttl", value_name = "TIME", env = "DEFAULT_WORKLOAD_CERT_TTL", default_value = "24h", value_parser = duration)]
    workload_ttl: Duration,
    /// Longest validity of workloads' certificates
    #[arg(long = "max-workload-cert-ttl", value_name = "TIME", env = "MAX_WORKLOAD_CERT_TTL", default_value = "2160h", value_parser = duration)]
    max_workload_ttl: Duration,
    /// An authority elsewhere in place of the mesh's own: ISTIOD_RA_KUBERNETES_API, a signer of the cluster (CertificateSigningRequests)
    #[arg(
        long = "external-ca",
        value_name = "NAME",
        env = "EXTERNAL_CA",
        default_value = ""
    )]
    external_ca: String,
    /// The signer, DOMAIN/NAME, for workloads that name none
    #[arg(
        long = "k8s-signer",
        value_name = "SIGNER",
        env = "K8S_SIGNER",
        default_value = ""
    )]
    signer: String,
    /// Domain of the signers that workloads may name (ISTIO_META_CERT_SIGNER)
    #[arg(
        long = "cert-signer-domain",
        value_name = "DOMAIN",
        env = "CERT_SIGNER_DOMAIN",
        default_value = ""
    )]
    signer_domain: String,
    /// Who certifies the control plane itself: istiod, or with an authority elsewhere k8s.io/SIGNER
    #[arg(
        long = "pilot-cert-provider",
        value_name = "NAME",
        env = "PILOT_CERT_PROVIDER",
        default_value = "istiod"
    )]
    provider: String,
}

/// Ranges of addresses, separated by commas.
fn ranges(text: &str) -> Result<Vec<Range>, mesh_control::RangeError> {
    let parts = text.split(',').map(str::trim);
    let given = parts.filter(|part| !part.is_empty());
    given.map(str::parse).collect()
}

/// A duration as Go writes it: `24h`, `1h30m`, `90s`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration, such as 24h or 1h30m");
    let mut rest = text;
    let mut total = 0_u64;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = rest.split_at(digits);
        let (factor, after) = match unit.chars().next() {
            Some('h') => (3600, &unit[1..]),
            Some('m') => (60, &unit[1..]),
            Some('s') => (1, &unit[1..]),
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        total = number
            .checked_mul(factor)
            .and_then(|seconds| total.checked_add(seconds))
            .ok_or_else(wrong)?;
        rest = after;
    }
    match total {
        0 => Err(wrong()),
        seconds => Ok(Duration::from_secs(seconds)),
    }
}

/// Runs the control plane until SIGTERM or SIGINT.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    mesh_telemetry::log::init(&args.log, false)?;
    crate::proxy::open_files();
    let client =
        mesh_control::client(global.kubeconfig.as_deref(), global.context.as_deref()).await?;
    let grpc = match args.grpc.as_str() {
        "" => None,
        address => Some(
            address
                .parse()
                .with_context(|| format!("--grpcAddr {address}: not an address with a port"))?,
        ),
    };
    let security = args.security;
    let external = External::read(
        &security.external_ca,
        &security.signer,
        &security.signer_domain,
        &security.provider,
    )?;
    let options = Options {
        grpc,
        secure_grpc: args.secure_grpc,
        lifetimes: Lifetimes {
            default: security.workload_ttl,
            max: security.max_workload_ttl,
        },
        external,
        token_audiences: security.token_audiences,
        blocked_key_ranges: ranges(&security.blocked_key_ranges)
            .context("reading --blocked-jwks-cidrs (BLOCKED_CIDRS_IN_JWKS_URIS)")?,
        xds_auth: security.xds_auth,
        xds_identity_check: security.xds_identity_check,
        webhook: args.https,
        monitoring: args.monitoring,
        http: args.http,
        namespace: global.istio_namespace.clone(),
        ..Options::new(client, env!("CARGO_PKG_VERSION")).of_revision(&args.revision)
    };
    Control::bind(options).await?.run(stopped()).await?;
    Ok(ExitCode::SUCCESS)
}

/// SIGTERM or SIGINT.
pub(crate) async fn stopped() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(duration("1h30m5s"), Ok(Duration::from_secs(5405)));
        for bad in ["", "24", "h", "1d", "-1h", "0s", "99999999999999999999h"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }
}
