//! Mutual TLS: automatic between workloads, demanded under STRICT, not asked of who is outside as long as it is not.

use anyhow::{Context, ensure};

use super::counted::{label, scrape};
use super::pods::OUTSIDE;
use crate::e2e::cluster::Cluster;

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: strict
  namespace: default
spec:
  mtls: {mode: STRICT}
";

/// One port of one workload goes on as before.
const EXCEPTION: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: details
  namespace: default
spec:
  selector: {matchLabels: {app: details}}
  portLevelMtls: {9080: {mode: PERMISSIVE}}
";

/// Requests from productpage to a service, by their security policy, as the service's proxies count them.
fn counted(metrics: &str, service: &str, policy: &str) -> u64 {
    let wanted = [
        ("reporter", "destination"),
        ("source_workload", "productpage-v1"),
        ("destination_service_name", service),
        ("connection_security_policy", policy),
    ];
    let fits = |line: &&str| {
        line.starts_with("istio_requests_total{")
            && wanted
                .iter()
                .all(|(name, value)| label(line, name) == Some(*value))
    };
    let value = |line: &str| line.rsplit(' ').next()?.parse::<f64>().ok();
    metrics.lines().filter(fits).filter_map(value).sum::<f64>() as u64
}

/// Every request between workloads goes in mutual TLS, with the identity of the caller's service account.
pub(super) fn automatic(cluster: &mut Cluster) -> anyhow::Result<()> {
    const PAGES: u64 = 10;
    let before = scrape(cluster)?;
    cluster.pages(PAGES as usize)?;
    let after = scrape(cluster)?;
    for service in ["details", "reviews"] {
        let grown = |policy| counted(&after, service, policy) - counted(&before, service, policy);
        ensure!(
            grown("mutual_tls") == PAGES && grown("none") == 0,
            "of {PAGES} requests to {service}, {} went in mutual TLS and {} in plain text",
            grown("mutual_tls"),
            grown("none")
        );
    }
    let caller = "spiffe://cluster.local/ns/default/sa/bookinfo-productpage";
    let named = after
        .lines()
        .any(|line| label(line, "source_principal") == Some(caller));
    ensure!(named, "no metric names {caller} as a source");
    Ok(())
}

/// The status that a client without a proxy gets; `None` where it gets no answer.
fn status_outside(cluster: &Cluster, url: &str) -> Option<String> {
    let args = [
        "curl",
        "-sS",
        "--max-time",
        "5",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        url,
    ];
    let printed = cluster.exec_in("outside", "client", "curl", &args).ok()?;
    let status = printed.trim();
    (!status.is_empty() && status != "000").then(|| status.to_owned())
}

/// Under STRICT a client without a proxy gets no answer, and that is counted; the product page does not notice. An exception for a port
/// holds for that port alone.
pub(super) fn strict(cluster: &mut Cluster) -> anyhow::Result<()> {
    const DETAILS: &str = "http://details.default:9080/details/0";
    const REVIEWS: &str = "http://reviews.default:9080/reviews/0";
    cluster.apply(OUTSIDE)?;
    let ok = || Some("200".to_owned());
    cluster.wait("the client outside the mesh", || {
        Ok((status_outside(cluster, DETAILS) == ok()).then_some(()))
    })?;
    cluster.apply(STRICT)?;
    cluster.wait("plain clients to be refused", || {
        let refused = [DETAILS, REVIEWS].map(|url| status_outside(cluster, url).is_none());
        Ok(refused.into_iter().all(|refused| refused).then_some(()))
    })?;
    cluster.pages(10).context("under STRICT")?;
    let pods = cluster.pods("app=details")?;
    let pod = pods.first().context("no pod of details")?;
    let stats = "http://127.0.0.1:15000/stats?filter=no_filter_chain_match&usedonly";
    let counted = cluster.exec(pod, "istio-proxy", &["curl", "-sS", stats])?;
    ensure!(
        counted.contains("no_filter_chain_match: "),
        "the refusals were not counted: {counted:?}"
    );
    cluster.apply(EXCEPTION)?;
    cluster.wait("the exception for details", || {
        Ok((status_outside(cluster, DETAILS) == ok()).then_some(()))
    })?;
    ensure!(
        status_outside(cluster, REVIEWS).is_none(),
        "the exception for details let a plain client reach reviews"
    );
    cluster.delete_all(EXCEPTION)?;
    cluster.delete_all(STRICT)?;
    cluster.wait("plain clients to be let in again", || {
        Ok((status_outside(cluster, REVIEWS) == ok()).then_some(()))
    })?;
    cluster.call(&["delete", "pod", "client", "-n", "outside"])?;
    cluster.delete("namespace", "outside")
}
