//! Endpoints by name: looked up again and again; the last good answer stays.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use mesh_routing::cluster::Dns;

use crate::upstream::common::Common;
use crate::upstream::counters::Counter;
use crate::upstream::resolver::{Answer, Resolver};

/// Keeps a cluster's endpoints up to date for as long as it is in use.
pub(crate) async fn keep_resolved(common: Weak<Common>, cluster: Arc<str>) {
    let mut answers: HashMap<String, Answer> = HashMap::new();
    let mut failures = 0;
    loop {
        let Some(dns) = wanted(&common) else {
            return;
        };
        let failed = look_up_all(&common, &dns, &cluster, &mut answers).await;
        failures = if failed { failures + 1 } else { 0 };
        let lives = answers.values().filter_map(|answer| answer.ttl);
        let wait = wait(&dns, failures, lives.min());
        let Some(common) = common.upgrade() else {
            return;
        };
        // Not woken by the end of the cluster: the next lookup finds it gone.
        let changed = common.dns_changed.notified();
        let _ = tokio::time::timeout(wait, changed).await;
    }
}

/// What there is to look up, as long as there is something.
fn wanted(common: &Weak<Common>) -> Option<Arc<Dns>> {
    let common = common.upgrade()?;
    let dns = common.dns();
    if dns.is_none() {
        // The cluster has got its endpoints elsewhere; should that change again, somebody else takes over.
        common.resolving.store(false, Ordering::Release);
    }
    dns
}

fn wait(dns: &Dns, failures: u32, ttl: Option<Duration>) -> Duration {
    let (first, longest) = dns.retry;
    let base = match (failures, ttl) {
        // Zero means "use once": the configured interval holds then, as in Envoy.
        (0, Some(ttl)) if dns.respect_ttl && !ttl.is_zero() => ttl,
        (0, _) => dns.refresh,
        (n, _) => (first * 2_u32.saturating_pow((n - 1).min(16))).min(longest),
    };
    base + dns.jitter.mul_f64(rand::random::<f64>())
}

/// True if one of the names could not be looked up.
async fn look_up_all(
    common: &Weak<Common>,
    dns: &Dns,
    cluster: &str,
    answers: &mut HashMap<String, Answer>,
) -> bool {
    let (mut failed, mut changed) = (false, false);
    let names = dns.endpoints.names();
    // Read each time: the pod's files may change.
    let resolver = Resolver::of_system();
    answers.retain(|name, _| names.contains(&name.as_str()));
    for name in names {
        let Some(common) = common.upgrade() else {
            return false;
        };
        common.own.inc_shared(Counter::DnsAttempt);
        match resolver.look_up(name, dns.families).await {
            Ok(found) => {
                common.own.inc_shared(Counter::DnsSuccess);
                changed |= answers.get(name).map(|old| &old.addresses) != Some(&found.addresses);
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
        let addresses = |name: &str| match answers.get(name) {
            Some(answer) => answer.addresses.clone(),
            None => Vec::new(),
        };
        common.set_resolved(dns.endpoints.resolve(addresses, dns.logical));
    }
    failed
}
