//! Endpoints by name: looked up again and again; the last good answer stays.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use mesh_routing::cluster::{Dns, Families};

use crate::upstream::common::Common;
use crate::upstream::counters::Counter;

/// A lookup that takes longer has failed.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Addresses of one name that are used.
const MOST_ADDRESSES: usize = 256;

/// Keeps a cluster's endpoints up to date for as long as it is in use.
pub(crate) async fn keep_resolved(common: Weak<Common>, cluster: Arc<str>) {
    let mut answers: HashMap<String, Vec<IpAddr>> = HashMap::new();
    let mut failures = 0;
    loop {
        let Some(dns) = common.upgrade().and_then(|common| common.dns()) else {
            return;
        };
        let failed = look_up_all(&common, &dns, &cluster, &mut answers).await;
        failures = if failed { failures + 1 } else { 0 };
        let wait = wait(&dns, failures);
        let Some(common) = common.upgrade() else {
            return;
        };
        // Not woken by the end of the cluster: the next lookup finds it gone.
        let changed = common.dns_changed.notified();
        let _ = tokio::time::timeout(wait, changed).await;
        if common.dns().is_none() {
            common.resolving.store(false, Ordering::Release);
            return;
        }
    }
}

fn wait(dns: &Dns, failures: u32) -> Duration {
    let (first, longest) = dns.retry;
    let base = match failures {
        0 => dns.refresh,
        n => (first * 2_u32.saturating_pow((n - 1).min(16))).min(longest),
    };
    base + dns.jitter.mul_f64(rand::random::<f64>())
}

/// True if one of the names could not be looked up.
async fn look_up_all(
    common: &Weak<Common>,
    dns: &Dns,
    cluster: &str,
    answers: &mut HashMap<String, Vec<IpAddr>>,
) -> bool {
    let (mut failed, mut changed) = (false, false);
    let names = dns.endpoints.names();
    answers.retain(|name, _| names.contains(&name.as_str()));
    for name in names {
        let Some(common) = common.upgrade() else {
            return false;
        };
        common.own.inc_shared(Counter::DnsAttempt);
        match look_up(name, dns.families).await {
            Ok(found) => {
                common.own.inc_shared(Counter::DnsSuccess);
                changed |= answers.get(name) != Some(&found);
                answers.insert(name.to_owned(), found);
            }
            Err(error) => {
                common.own.inc_shared(Counter::DnsFailure);
                tracing::warn!(cluster, name, %error, "looking up; the last good answer stays");
                failed = true;
            }
        }
    }
    if (changed || !failed)
        && let Some(common) = common.upgrade()
    {
        let addresses = |name: &str| answers.get(name).cloned().unwrap_or_default();
        common.set_resolved(dns.endpoints.resolve(addresses, dns.logical));
    }
    failed
}

/// Asks the system's resolver; sorted, so that another order is no change.
async fn look_up(name: &str, families: Families) -> std::io::Result<Vec<IpAddr>> {
    let lookup = tokio::net::lookup_host((name, 0));
    let found = tokio::time::timeout(LOOKUP_TIMEOUT, lookup).await??;
    let (mut v4, mut v6): (Vec<IpAddr>, Vec<IpAddr>) =
        found.map(|address| address.ip()).partition(IpAddr::is_ipv4);
    let mut all = match families {
        Families::V4 => v4,
        Families::V6 => v6,
        Families::PreferV4 if v4.is_empty() => v6,
        Families::PreferV4 => v4,
        Families::PreferV6 if v6.is_empty() => v4,
        Families::PreferV6 => v6,
        Families::All => {
            v4.append(&mut v6);
            v4
        }
    };
    all.sort_unstable();
    all.dedup();
    all.truncate(MOST_ADDRESSES);
    Ok(all)
}
