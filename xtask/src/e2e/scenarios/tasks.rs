//! The field's tasks with Bookinfo: everything to v1, jason to v2, faults for jason, timeouts, shifting to v3.

use std::time::{Duration, Instant};

use anyhow::ensure;

use super::reviews::{live, logged_in, only, tally};
use super::samples::{sample, with};
use crate::e2e::cluster::Cluster;
use crate::e2e::http::{self, Client};

const SUBSETS: &str = sample!("bookinfo/networking/destination-rule-all.yaml");
const ALL_V1: &str = sample!("bookinfo/networking/virtual-service-all-v1.yaml");
const JASON_V2: &str = sample!("bookinfo/networking/virtual-service-reviews-test-v2.yaml");
const HALF_V3: &str = sample!("bookinfo/networking/virtual-service-reviews-50-v3.yaml");
const V3: &str = sample!("bookinfo/networking/virtual-service-reviews-v3.yaml");
const DELAY: &str = sample!("bookinfo/networking/virtual-service-ratings-test-delay.yaml");
const ABORT: &str = sample!("bookinfo/networking/virtual-service-ratings-test-abort.yaml");
const DETAILS: &str = sample!("bookinfo/networking/fault-injection-details-v1.yaml");

const NO_REVIEWS: &str = "Sorry, product reviews are currently unavailable for this book.";
const NO_RATINGS: &str = "Ratings service is currently unavailable";
const NO_DETAILS: &str = "Sorry, product details are currently unavailable for this book.";

/// The page as a user sees it, and how long it took.
fn page(client: &Client, cookie: Option<&str>) -> anyhow::Result<(String, Duration)> {
    let headers: Vec<(&str, &str)> = cookie
        .map(|cookie| ("cookie", cookie))
        .into_iter()
        .collect();
    let began = Instant::now();
    let page = http::runtime()?.block_on(client.get("/productpage", &headers))?;
    ensure!(
        page.status == 200,
        "the page answered {}: {}",
        page.status,
        page.body
    );
    Ok((page.body, began.elapsed()))
}

/// Waits until a user's page shows a text.
fn shows(
    cluster: &Cluster,
    client: &Client,
    cookie: Option<&str>,
    text: &str,
) -> anyhow::Result<()> {
    cluster.wait(&format!("the page to show {text:?}"), || {
        Ok(page(client, cookie)?.0.contains(text).then_some(()))
    })
}

/// Faults for jason: seven seconds show the bug that reviews waits longer than the page does; an abort shows the text instead of stars.
pub(super) fn faults(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(cluster, &[SUBSETS, ALL_V1, JASON_V2], |cluster| {
        live(cluster, "everybody else on v1", only("v1"))?;
        let client = Client::new(&cluster.gateway);
        let jason = http::runtime()?.block_on(logged_in(&client, "jason"))?;
        shows(cluster, &client, Some(&jason), "reviews-v2-")?;
        cluster.apply(DELAY)?;
        cluster.wait("the delay to be there", || {
            Ok((page(&client, Some(&jason))?.1 > Duration::from_secs(2)).then_some(()))
        })?;
        let (text, took) = page(&client, Some(&jason))?;
        ensure!(
            text.contains(NO_REVIEWS),
            "with a delay of 7 s jason's page shows: {text}"
        );
        // Twice the three seconds that the page waits for reviews.
        ensure!(
            (5900..7000).contains(&took.as_millis()),
            "jason's page took {took:?}, not about 6 s"
        );
        let (text, took) = page(&client, None)?;
        ensure!(
            !text.contains(NO_REVIEWS) && took < Duration::from_secs(3),
            "a stranger's page took {took:?}: {text}"
        );
        cluster.apply(ABORT)?;
        shows(cluster, &client, Some(&jason), NO_RATINGS)?;
        let (text, _) = page(&client, None)?;
        ensure!(
            !text.contains(NO_RATINGS),
            "a stranger's page shows jason's fault: {text}"
        );
        cluster.apply(DETAILS)?;
        shows(cluster, &client, None, NO_DETAILS)
    })
}

/// From v1 to half v3, then v3 alone.
pub(super) fn shifting(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(cluster, &[SUBSETS, ALL_V1], |cluster| {
        live(cluster, "v1 alone", only("v1"))?;
        cluster.apply(HALF_V3)?;
        live(cluster, "v3 to appear", |counts| counts.contains_key("v3"))?;
        let client = Client::new(&cluster.gateway);
        let counts = http::runtime()?.block_on(tally(&client, 400))?;
        let half = counts.get("v3").copied().unwrap_or(0);
        // Five standard deviations of 400 draws at a half.
        ensure!(
            (150..=250).contains(&half) && counts.len() == 2,
            "v3 got {half} of 400: {counts:?}"
        );
        cluster.apply(V3)?;
        live(cluster, "v3 alone", only("v3")).map(drop)
    })
}

const SLOW_RATINGS: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: ratings}
spec:
  hosts: [ratings]
  http:
  - fault: {delay: {percentage: {value: 100}, fixedDelay: 2s}}
    route: [{destination: {host: ratings, subset: v1}}]
";
const IMPATIENT_REVIEWS: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - route: [{destination: {host: reviews, subset: v2}}]
    timeout: 0.5s
";

/// A timeout of half a second against ratings that take two: the page gives up after one second, as it asks twice.
pub(super) fn timeouts(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(
        cluster,
        &[SUBSETS, ALL_V1, SLOW_RATINGS, IMPATIENT_REVIEWS],
        |cluster| {
            let client = Client::new(&cluster.gateway);
            shows(cluster, &client, None, NO_REVIEWS)?;
            let (_, took) = page(&client, None)?;
            ensure!(
                (950..1900).contains(&took.as_millis()),
                "the page took {took:?}, not about one second"
            );
            Ok(())
        },
    )
}
