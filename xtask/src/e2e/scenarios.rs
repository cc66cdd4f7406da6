//! What a user sees, step by step. Each scenario leaves the cluster as it found it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::cluster::{Cluster, family, gone};
use super::http::{self, Client};

type Scenario = fn(&mut Cluster) -> anyhow::Result<()>;

/// All scenarios, in the order of the walk.
pub const ALL: &[(&str, Scenario)] = &[
    (
        "the product page shows all versions of reviews, a third each",
        thirds,
    ),
    ("round robin is strictly in turn", in_turn),
    ("weights of 80 and 20 hold", weights),
    ("end-user jason goes to v2 only", jason),
    ("twenty changes under load lose nothing", changes_under_load),
    (
        "every hop goes through the proxies and is counted on both sides",
        counted,
    ),
    ("without the capture rules nothing is counted", flushed),
    ("a client outside the mesh gets plain round robin", outside),
    (
        "the proxy runs as uid 1337 where uids are mapped",
        proxy_uid,
    ),
    (
        "traffic runs on while the control plane is away",
        control_plane_away,
    ),
    (
        "a killed sidecar and a killed application come back",
        killed,
    ),
    (
        "bad input is refused with its reason and changes nothing",
        bad_input,
    ),
    ("state survives SIGKILL of the main process", survives),
];

const REVIEWS: &str = "/api/v1/products/0/reviews";

/// The version of reviews that answered: its pod's name is in the answer.
async fn reviews_version(client: &Client, headers: &[(&str, &str)]) -> anyhow::Result<String> {
    let answer = client.get(REVIEWS, headers).await?;
    ensure!(
        answer.status == 200,
        "reviews answered {}: {}",
        answer.status,
        answer.body
    );
    for version in ["v1", "v2", "v3"] {
        if answer.body.contains(&format!("reviews-{version}-")) {
            return Ok(version.to_owned());
        }
    }
    bail!("no version of reviews is named in {}", answer.body)
}

async fn tally(client: &Client, calls: usize) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for _ in 0..calls {
        *counts
            .entry(reviews_version(client, &[]).await?)
            .or_insert(0) += 1;
    }
    Ok(counts)
}

fn thirds(cluster: &mut Cluster) -> anyhow::Result<()> {
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

const SUBSETS: &str = "
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

fn routes(http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: reviews\nspec:\n  hosts: [reviews]\n  http:\n{http}"
    )
}

fn weighted(parts: &[(&str, u32)]) -> String {
    let mut http = String::from("  - route:\n");
    for (subset, weight) in parts {
        http.push_str(&format!(
            "    - destination: {{host: reviews, subset: {subset}}}\n      weight: {weight}\n"
        ));
    }
    routes(&http)
}

/// Waits until a change that `apply` has just made is seen by requests; gives the time since `apply` returned.
fn live(
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

fn only(version: &'static str) -> impl Fn(&BTreeMap<String, usize>) -> bool {
    move |counts| counts.len() == 1 && counts.contains_key(version)
}

fn in_turn(cluster: &mut Cluster) -> anyhow::Result<()> {
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

fn weights(cluster: &mut Cluster) -> anyhow::Result<()> {
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

fn cleanup_reviews(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.delete("virtualservice", "reviews")?;
    cluster.delete("destinationrule", "reviews")
}

fn jason(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(SUBSETS)?;
    cluster.apply(&routes(
        "  - match:\n    - headers:\n        end-user: {exact: jason}\n    route:\n    - destination: {host: reviews, subset: v2}\n  - route:\n    - destination: {host: reviews, subset: v1}\n",
    ))?;
    live(cluster, "everybody else to reach v1", only("v1"))?;
    let client = Client::new(&cluster.gateway);
    http::runtime()?.block_on(async {
        let login = client
            .send(
                "POST",
                "/login",
                &[("content-type", "application/x-www-form-urlencoded")],
                "username=jason&passwd=",
            )
            .await?;
        let cookie = login
            .headers
            .get("set-cookie")
            .context("logging in set no cookie")?;
        let cookie = cookie.split(';').next().unwrap_or_default().to_owned();
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

fn changes_under_load(cluster: &mut Cluster) -> anyhow::Result<()> {
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

/// Requests at a fixed rate on keep-alive connections, in a thread of their own.
struct Load {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<anyhow::Result<(u64, Vec<String>)>>,
}

impl Load {
    fn start(gateway: &str, connections: u32, rate: u32) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (gateway, flag) = (gateway.to_owned(), stop.clone());
        let thread = std::thread::Builder::new()
            .name("load".into())
            .spawn(move || {
                http::runtime()?.block_on(async {
                    let sent = AtomicU64::new(0);
                    let pause = Duration::from_secs(1) * connections / rate;
                    let workers = (0..connections).map(|_| async {
                        let client = Client::new(&gateway);
                        let mut failures = Vec::new();
                        while !flag.load(Ordering::Relaxed) {
                            match client.get(REVIEWS, &[]).await {
                                Ok(answer) if (200..300).contains(&answer.status) => {}
                                Ok(answer) => failures
                                    .push(format!("status {}: {}", answer.status, answer.body)),
                                Err(error) => failures.push(format!("{error:#}")),
                            }
                            sent.fetch_add(1, Ordering::Relaxed);
                            tokio::time::sleep(pause).await;
                        }
                        failures
                    });
                    let failures = futures::future::join_all(workers).await.concat();
                    Ok((sent.into_inner(), failures))
                })
            })?;
        Ok(Self { stop, thread })
    }

    fn stop(self) -> anyhow::Result<(u64, Vec<String>)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow::anyhow!("the load generator panicked"))?
    }
}

/// The sum of `istio_requests_total` over the lines that carry all of `labels`.
fn requests_total(metrics: &str, labels: &[(&str, &str)]) -> f64 {
    metrics
        .lines()
        .filter(|l| l.starts_with("istio_requests_total{"))
        .filter(|l| {
            labels
                .iter()
                .all(|(name, value)| l.contains(&format!("{name}=\"{value}\"")))
        })
        .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// The sum over all pods of an application.
fn counted_in(
    cluster: &Cluster,
    app: &str,
    container: &str,
    labels: &[(&str, &str)],
) -> anyhow::Result<f64> {
    let mut sum = 0.0;
    for pod in cluster.pods(&format!("app={app}"))? {
        let metrics = cluster.curl(
            &pod,
            container,
            &["http://127.0.0.1:15090/stats/prometheus"],
        )?;
        sum += requests_total(&metrics, labels);
    }
    Ok(sum)
}

/// The edges of Bookinfo that one call of the reviews API takes, with how often.
const EDGES: &[(&str, &str)] = &[("productpage", "reviews")];

fn counted(cluster: &mut Cluster) -> anyhow::Result<()> {
    const CALLS: usize = 60;
    let measure = |cluster: &Cluster| -> anyhow::Result<Vec<f64>> {
        let mut all = Vec::new();
        for (from, to) in EDGES {
            let service = format!("{to}.default.svc.cluster.local");
            let labels = |reporter| {
                [
                    ("reporter", reporter),
                    ("source_app", *from),
                    ("destination_service", service.as_str()),
                ]
            };
            all.push(counted_in(cluster, from, from, &labels("source"))?);
            all.push(counted_in(cluster, to, to, &labels("destination"))?);
        }
        Ok(all)
    };
    let before = measure(cluster)?;
    let client = Client::new(&cluster.gateway);
    http::runtime()?.block_on(tally(&client, CALLS))?;
    let after = measure(cluster)?;
    for (i, (before, after)) in before.iter().zip(&after).enumerate() {
        let grown = after - before;
        ensure!(
            grown == CALLS as f64,
            "measurement {i} of {EDGES:?} (source, destination) grew by {grown}, {CALLS} calls were made"
        );
    }
    Ok(())
}

const OPEN_CLIENT: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: open-client
  labels: {app: open-client}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: curl
    image: curlimages/curl:8.16.0
    command: [sleep, infinity]
    securityContext:
      runAsUser: 0
      capabilities: {add: [NET_ADMIN]}
";

fn wait_running(cluster: &Cluster, pod: &str) -> anyhow::Result<()> {
    cluster.wait(&format!("pod {pod} to be ready"), || {
        let pod = cluster.get(&["pod", pod])?;
        let conditions = pod["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        Ok(conditions
            .iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True")
            .then_some(()))
    })
}

fn flushed(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(OPEN_CLIENT)?;
    wait_running(cluster, "open-client")?;
    let labels = [
        ("reporter", "source"),
        ("destination_service", "httpbin.default.svc.cluster.local"),
    ];
    let call = |cluster: &Cluster| -> anyhow::Result<f64> {
        let before = counted_in(cluster, "open-client", "curl", &labels)?;
        for _ in 0..5 {
            let code = cluster.curl(
                "open-client",
                "curl",
                &[
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code}",
                    "http://httpbin:8000/status/200",
                ],
            )?;
            ensure!(code.trim() == "200", "httpbin answered {code}");
        }
        Ok(counted_in(cluster, "open-client", "curl", &labels)? - before)
    };
    let captured = call(cluster)?;
    ensure!(
        captured == 5.0,
        "5 calls were made, {captured} were counted with the capture in place"
    );
    cluster.exec("open-client", "curl", &["mesh", "init", "--cleanup-only"])?;
    let captured = call(cluster)?;
    ensure!(
        captured == 0.0,
        "{captured} calls were counted although the capture rules are gone"
    );
    cluster.delete("pod", "open-client")
}

const OUTSIDE: &str = "
apiVersion: v1
kind: Namespace
metadata:
  name: outside
---
apiVersion: v1
kind: Pod
metadata:
  name: client
  namespace: outside
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: curl
    image: curlimages/curl:8.16.0
    command: [sleep, infinity]
";

fn outside(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(SUBSETS)?;
    cluster.apply(&weighted(&[("v1", 100)]))?;
    live(cluster, "v1 alone", only("v1"))?;
    cluster.apply(OUTSIDE)?;
    cluster.wait("the client outside the mesh", || {
        let pod = cluster.get(&["pod", "client", "-n", "outside"])?;
        Ok((pod["status"]["phase"] == "Running").then_some(()))
    })?;
    let mut order = Vec::new();
    for _ in 0..12 {
        let args = [
            "exec",
            "client",
            "-n",
            "outside",
            "-c",
            "curl",
            "--",
            "curl",
            "-sS",
            "--max-time",
            "10",
            "http://reviews.default:9080/reviews/0",
        ];
        let body = cluster.call(&args)?;
        let version = ["v1", "v2", "v3"]
            .into_iter()
            .find(|v| body.contains(&format!("reviews-{v}-")));
        order.push(version.with_context(|| format!("no version in {body}"))?);
    }
    ensure!(
        (3..order.len()).all(|i| order[i] == order[i - 3]),
        "not in turn: {order:?}"
    );
    let kinds: std::collections::BTreeSet<_> = order.iter().collect();
    ensure!(
        kinds.len() == 3,
        "the mesh's rule reached a client outside the mesh: {order:?}"
    );
    cluster.call(&["delete", "pod", "client", "-n", "outside"])?;
    cluster.delete("namespace", "outside")?;
    cleanup_reviews(cluster)
}

fn proxy_uid(cluster: &mut Cluster) -> anyhow::Result<()> {
    let pods = cluster.pods("app=productpage")?;
    let pod = pods.first().context("no pod of productpage")?;
    let map = cluster.exec(pod, "istio-proxy", &["cat", "/proc/self/uid_map"])?;
    let status = cluster.exec(pod, "istio-proxy", &["cat", "/proc/self/status"])?;
    let line = |name: &str| {
        status
            .lines()
            .find(|l| l.starts_with(name))
            .unwrap_or_default()
            .to_owned()
    };
    if maps(&map, 1337) {
        ensure!(
            line("Uid:").split_whitespace().nth(1) == Some("1337"),
            "the proxy's container runs as {}",
            line("Uid:")
        );
    } else {
        print!("uid 1337 is not mapped: the mark is the exemption; ");
        let effective = line("CapEff:")
            .split_whitespace()
            .nth(1)
            .map(|c| u64::from_str_radix(c, 16))
            .context("no CapEff")??;
        ensure!(
            effective >> 12 & 1 == 1,
            "the proxy may not set the mark: {}",
            line("CapEff:")
        );
        let app = cluster.exec(pod, "productpage", &["cat", "/proc/self/status"])?;
        let app = app
            .lines()
            .find_map(|l| l.strip_prefix("CapEff:"))
            .context("no CapEff")?;
        let app = u64::from_str_radix(app.trim(), 16)?;
        ensure!(
            app >> 12 & 3 == 0,
            "the application could set the mark: {app:x}"
        );
    }
    Ok(())
}

fn maps(uid_map: &str, uid: u64) -> bool {
    uid_map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        matches!(numbers[..], [inside, _, count] if (inside..inside.saturating_add(count)).contains(&uid))
    })
}

fn control_plane_away(cluster: &mut Cluster) -> anyhow::Result<()> {
    let load = Load::start(&cluster.gateway, 8, 200)?;
    cluster.call(&["delete", "pod", "-n", "istio-system", "-l", "app=istiod"])?;
    std::thread::sleep(Duration::from_millis(500));
    cluster.wait("the control plane to be back", || {
        let deployment = cluster.get(&["deployment", "istiod", "-n", "istio-system"])?;
        Ok((deployment["status"]["availableReplicas"] == 1).then_some(()))
    })?;
    cluster.apply(SUBSETS)?;
    cluster.apply(&weighted(&[("v2", 100)]))?;
    live(
        cluster,
        "a change after the control plane's return",
        only("v2"),
    )?;
    let (sent, failures) = load.stop()?;
    ensure!(
        failures.is_empty(),
        "{} of {sent} requests failed, the first: {}",
        failures.len(),
        failures[0]
    );
    cleanup_reviews(cluster)
}

/// How often a container was started again.
fn restarts(cluster: &Cluster, pod: &str, container: &str) -> anyhow::Result<(u64, bool)> {
    let pod = cluster.get(&["pod", pod])?;
    for list in ["initContainerStatuses", "containerStatuses"] {
        for status in pod["status"][list].as_array().into_iter().flatten() {
            if status["name"] == container {
                let ready = status["ready"] == true;
                return Ok((status["restartCount"].as_u64().unwrap_or(0), ready));
            }
        }
    }
    bail!("no container {container} in the pod's status")
}

fn killed(cluster: &mut Cluster) -> anyhow::Result<()> {
    let pods = cluster.pods("app=httpbin")?;
    let pod = pods.first().context("no pod of httpbin")?.clone();
    let client_pods = cluster.pods("app=curl")?;
    let client = client_pods.first().context("no pod of curl")?;
    for (container, how) in [
        (
            "istio-proxy",
            &[
                "curl",
                "-sS",
                "-X",
                "POST",
                "http://127.0.0.1:15000/quitquitquit",
            ][..],
        ),
        (
            "httpbin",
            &["sh", "-c", "kill -9 $(pgrep -f 'sample httpbin' || echo 1)"][..],
        ),
    ] {
        let (before, _) = restarts(cluster, &pod, container)?;
        let began = Instant::now();
        // The command may be cut off together with what it kills.
        let _ = cluster.exec(&pod, container, how);
        cluster.wait(&format!("{container} to come back"), || {
            let (now, ready) = restarts(cluster, &pod, container)?;
            Ok((now > before && ready).then_some(()))
        })?;
        cluster.wait("httpbin to answer", || {
            let code = cluster.curl(
                client,
                "curl",
                &[
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code}",
                    "http://httpbin:8000/get",
                ],
            )?;
            Ok((code.trim() == "200").then_some(()))
        })?;
        print!(
            "{container} back and answering after {} ms; ",
            began.elapsed().as_millis()
        );
    }
    Ok(())
}

fn refused(cluster: &Cluster, yaml: &str, words: &[&str]) -> anyhow::Result<()> {
    match cluster.apply(yaml) {
        Ok(printed) => bail!("accepted, but must be refused: {printed}\n{yaml}"),
        Err(error) => {
            let text = format!("{error:#}");
            for word in words {
                ensure!(
                    text.contains(word),
                    "the refusal does not say {word:?}: {text}"
                );
            }
            Ok(())
        }
    }
}

fn bad_input(cluster: &mut Cluster) -> anyhow::Result<()> {
    refused(
        cluster,
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a\n",
        &["apply.yaml"],
    )?;
    refused(
        cluster,
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: bad}\nspec:\n  hosts: [reviews]\n  htpp: []\n",
        &["htpp"],
    )?;
    refused(
        cluster,
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: bad}\nspec:\n  hosts: [reviews]\n  http:\n  - route:\n    - destination: {host: reviews}\n      weight: -5\n",
        &["weight"],
    )?;
    let listed = cluster.get(&["virtualservices"])?;
    let names: Vec<_> = listed["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|v| v["metadata"]["name"] == "bad")
        .collect();
    ensure!(names.is_empty(), "a refused object was stored");
    cluster.apply("apiVersion: v1\nkind: Pod\nmetadata: {name: unknown-image}\nspec:\n  containers:\n  - {name: a, image: example/no-such-thing:1}\n")?;
    cluster.wait("the unknown image to be reported", || {
        let pod = cluster.get(&["pod", "unknown-image"])?;
        let reason = pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"]
            .as_str()
            .unwrap_or_default();
        Ok(["ErrImagePull", "ImagePullBackOff"]
            .contains(&reason)
            .then_some(()))
    })?;
    cluster.delete("pod", "unknown-image")?;
    port_in_use(cluster)
}

/// A second cluster on the first one's port is told so, with the flag to change, and starts nothing.
fn port_in_use(cluster: &Cluster) -> anyhow::Result<()> {
    let port = cluster
        .gateway
        .rsplit(':')
        .next()
        .context("the gateway has no port")?
        .to_owned();
    let output = cluster.second(&[
        "all-in-one",
        "--state-dir",
        "",
        "--api-port",
        "0",
        "--https-port",
        "0",
        "--http-port",
        &port,
    ])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success(),
        "a second cluster started on port {port}"
    );
    for word in [port.as_str(), "in use", "--http-port"] {
        ensure!(
            said.contains(word),
            "the refusal does not say {word:?}: {said}"
        );
    }
    Ok(())
}

fn survives(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: kept}\ndata: {answer: \"42\"}\n",
    )?;
    let before = family(cluster.pid());
    cluster.kill_and_restart()?;
    gone(&before)?;
    let kept = cluster.get(&["configmap", "kept"])?;
    ensure!(
        kept["data"]["answer"] == "42",
        "the object is not what it was: {kept}"
    );
    print!(
        "first page again after {} ms; ",
        cluster.first_page.as_millis()
    );
    cluster.delete("configmap", "kept")
}
