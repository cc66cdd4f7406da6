//! Steering `reviews`: thirds, in turn, weights, by header, and changes under load.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::load::Load;
use crate::e2e::cluster::Cluster;
use crate::e2e::http::{self, Client};

pub(super) const REVIEWS: &str = "/api/v1/products/0/reviews";

/// The version of reviews that answered: its pod's name is in the answer.
pub(super) async fn reviews_version(
    client: &Client,
    headers: &[(&str, &str)],
) -> anyhow::Result<String> {
    let answer = client.get(REVIEWS, headers).await?;
    ensure!(
        answer.status == 200,
        "reviews answered {}: {}",
        answer.status,
        answer.body
    );
    version_named(&answer.body).map(str::to_owned)
}

/// The version of reviews whose pod's name stands in a page or an answer.
pub(super) fn version_named(text: &str) -> anyhow::Result<&'static str> {
    ["v1", "v2", "v3"]
        .into_iter()
        .find(|version| text.contains(&format!("reviews-{version}-")))
        .with_context(|| format!("no version of reviews is named in {text}"))
}

pub(super) async fn tally(
    client: &Client,
    calls: usize,
) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for _ in 0..calls {
        *counts
            .entry(reviews_version(client, &[]).await?)
            .or_insert(0) += 1;
    }
    Ok(counts)
}

pub(super) fn thirds(cluster: &mut Cluster) -> anyhow::Result<()> {
    let client = Client::new(&cluster.gateway);
    http::runtime()?.block_on(async {
        let page = client.get("/productpage", &[]).await?;
        ensure!(
            page.status == 200 && page.body.contains("Simple Bookstore App"),
            "not the product page: {}",
            page.body
        );
        // Least request picks between two at random (Envoy's power of two choices): a third within five standard deviations.
        let counts = tally(&client, 600).await?;
        for version in ["v1", "v2", "v3"] {
            let got = counts.get(version).copied().unwrap_or(0);
            ensure!(
                (142..=258).contains(&got),
                "{version} answered {got} of 600: {counts:?}"
            );
        }
        Ok(())
    })
}

pub(super) const SUBSETS: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata:
  name: reviews
spec:
  host: reviews
  trafficPolicy:
    loadBalancer:
      simple: ROUND_ROBIN
  subsets:
  - name: v1
    labels: {version: v1}
  - name: v2
    labels: {version: v2}
  - name: v3
    labels: {version: v3}
";

pub(super) fn routes(http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: reviews\nspec:\n  hosts: [reviews]\n  http:\n{http}"
    )
}

pub(super) fn weighted(parts: &[(&str, u32)]) -> String {
    let mut http = String::from("  - route:\n");
    for (subset, weight) in parts {
        http.push_str(&format!(
            "    - destination: {{host: reviews, subset: {subset}}}\n      weight: {weight}\n"
        ));
    }
    routes(&http)
}

/// Waits until a change that `apply` has just made is seen by requests; gives the time since `apply` returned.
pub(super) fn live(
    cluster: &Cluster,
    what: &str,
    expected: impl Fn(&BTreeMap<String, usize>) -> bool,
) -> anyhow::Result<Duration> {
    let runtime = http::runtime()?;
    let client = Client::new(&cluster.gateway);
    let began = Instant::now();
    cluster.wait(what, || {
        let counts = runtime.block_on(tally(&client, 6))?;
        Ok(expected(&counts).then(|| began.elapsed()))
    })
}

pub(super) fn only(version: &'static str) -> impl Fn(&BTreeMap<String, usize>) -> bool {
    move |counts| counts.len() == 1 && counts.contains_key(version)
}

pub(super) fn in_turn(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(SUBSETS)?;
    let runtime = http::runtime()?;
    let client = Client::new(&cluster.gateway);
    let order = cluster.wait("calls strictly in turn", || {
        runtime.block_on(async {
            let mut order = Vec::new();
            for _ in 0..30 {
                order.push(reviews_version(&client, &[]).await?);
            }
            Ok((3..order.len())
                .all(|i| order[i] == order[i - 3])
                .then_some(order))
        })
    })?;
    let mut first: Vec<_> = order[..3].to_vec();
    first.sort();
    ensure!(
        first == ["v1", "v2", "v3"],
        "the turn leaves a version out: {order:?}"
    );
    cluster.delete("destinationrule", "reviews")
}

pub(super) fn weights(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(SUBSETS)?;
    cluster.apply(&weighted(&[("v1", 80), ("v3", 20)]))?;
    let taken = live(cluster, "v2 to be left out", |counts| {
        !counts.contains_key("v2")
    })?;
    let client = Client::new(&cluster.gateway);
    let counts = http::runtime()?.block_on(tally(&client, 2000))?;
    let share = counts.get("v1").copied().unwrap_or(0) as f64 / 20.0;
    ensure!(
        (75.5..=84.5).contains(&share),
        "v1 got {share} % of 2,000 requests: {counts:?}"
    );
    print!("v1 {share:.1} %, live after {} ms; ", taken.as_millis());
    cleanup_reviews(cluster)
}

pub(super) fn cleanup_reviews(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.delete("virtualservice", "reviews")?;
    cluster.delete("destinationrule", "reviews")
}

/// The session cookie of a user.
pub(super) async fn logged_in(client: &Client, user: &str) -> anyhow::Result<String> {
    let form = [("content-type", "application/x-www-form-urlencoded")];
    let login = client
        .send("POST", "/login", &form, &format!("username={user}&passwd="))
        .await?;
    let cookie = login
        .headers
        .get("set-cookie")
        .context("logging in set no cookie")?;
    Ok(cookie.split(';').next().unwrap_or_default().to_owned())
}

pub(super) fn jason(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(SUBSETS)?;
    cluster.apply(&routes(
        "  - match:\n    - headers:\n        end-user: {exact: jason}\n    route:\n    - destination: {host: reviews, subset: v2}\n  - route:\n    - destination: {host: reviews, subset: v1}\n",
    ))?;
    live(cluster, "everybody else to reach v1", only("v1"))?;
    let client = Client::new(&cluster.gateway);
    http::runtime()?.block_on(async {
        let cookie = logged_in(&client, "jason").await?;
        for _ in 0..20 {
            let page = client.get("/productpage", &[("cookie", &cookie)]).await?;
            ensure!(
                page.body.contains("reviews-v2-"),
                "jason's page is not by v2: {}",
                page.body
            );
            let page = client.get("/productpage", &[]).await?;
            ensure!(
                page.body.contains("reviews-v1-"),
                "a stranger's page is not by v1: {}",
                page.body
            );
        }
        Ok(())
    })?;
    cleanup_reviews(cluster)
}

pub(super) fn changes_under_load(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(SUBSETS)?;
    cluster.apply(&weighted(&[("v1", 100)]))?;
    live(cluster, "v1 alone", only("v1"))?;
    let load = Load::start(&cluster.gateway, 8, 200)?;
    let mut slowest = Duration::ZERO;
    for round in 0..20 {
        let version = ["v3", "v2", "v1"][round % 3];
        cluster.apply(&weighted(&[(version, 100)]))?;
        slowest = slowest.max(live(cluster, "the new route", only(version))?);
    }
    let (sent, failures) = load.stop()?;
    ensure!(
        failures.is_empty(),
        "{} of {sent} requests failed, the first: {}",
        failures.len(),
        failures[0]
    );
    print!(
        "{sent} requests, slowest change live after {} ms; ",
        slowest.as_millis()
    );
    cleanup_reviews(cluster)
}
