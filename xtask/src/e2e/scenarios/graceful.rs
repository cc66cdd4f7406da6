//! Nothing is lost while pods come and go: rolling restarts, scaling down and up, and changes of configuration under load.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::counted::rolled_out;
use super::limits::codes;
use super::pods::wait_running;
use super::samples::with;
use crate::e2e::cluster::Cluster;

/// Requests a second over all loads together. A machine that does not manage as many sends as many as it manages.
const RATE: usize = 1000;

/// The service, and two clients: one with a sidecar, and one that comes from outside, through the ingress gateway.
const PLACE: &str = "
apiVersion: v1
kind: Service
metadata: {name: steady, labels: {app: steady}}
spec:
  selector: {app: steady}
  ports:
  - {name: http, port: 8080}
  - {name: http2-echo, port: 8081, targetPort: 8080}
  - {name: grpc-ping, port: 8079}
---
apiVersion: v1
kind: Pod
metadata: {name: steady-client, labels: {app: steady-client}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: fortio, image: 'fortio/fortio:latest_release', command: [sleep, infinity]}]
---
apiVersion: v1
kind: Pod
metadata: {name: steady-outside, labels: {app: steady-outside, sidecar.istio.io/inject: 'false'}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: fortio, image: 'fortio/fortio:latest_release', command: [sleep, infinity]}]
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: steady}
spec:
  selector: {istio: ingressgateway}
  servers:
  - port: {number: 8080, name: http, protocol: HTTP}
    hosts: [istio-ingressgateway.istio-system]
";

/// Where the loads go: from which pod, with which options of fortio.
const LOADS: [(&str, &str, &str); 6] = [
    (
        "HTTP/1.1 to the sidecar",
        "steady-client",
        "http://steady:8080/",
    ),
    (
        "HTTP/2 to the sidecar",
        "steady-client",
        "-h2 http://steady:8081/",
    ),
    (
        "gRPC to the sidecar",
        "steady-client",
        "-grpc -ping steady:8079",
    ),
    (
        "HTTP/1.1 to the gateway",
        "steady-outside",
        "http://istio-ingressgateway.istio-system/",
    ),
    (
        "HTTP/2 to the gateway",
        "steady-outside",
        "-h2 http://istio-ingressgateway.istio-system/",
    ),
    (
        "gRPC to the gateway",
        "steady-outside",
        "-grpc -ping istio-ingressgateway.istio-system:80",
    ),
];

/// The servers; another `round` is another template, so that they are all replaced (what `kubectl rollout restart` does).
fn server(replicas: u32, round: u32) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: steady}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: steady}}}}
  template:
    metadata: {{labels: {{app: steady, version: v1}}, annotations: {{kubectl.kubernetes.io/restartedAt: \"{round}\"}}}}
    spec:
      containers:
      - name: fortio
        image: fortio/fortio:latest_release
        ports: [{{containerPort: 8080}}, {{containerPort: 8079}}]
        readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
"
    )
}

/// Rules for both ways in; another timeout is another configuration of every proxy's routes.
fn rules(seconds: u32) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: steady}}
spec:
  hosts: [steady, istio-ingressgateway.istio-system]
  gateways: [mesh, steady]
  http:
  - match: [{{gateways: [steady], uri: {{prefix: /fgrpc}}}}, {{port: 8079}}]
    route: [{{destination: {{host: steady, port: {{number: 8079}}}}}}]
    timeout: {seconds}s
  - route: [{{destination: {{host: steady, port: {{number: 8080}}}}}}]
    timeout: {seconds}s
"
    )
}

/// A load that runs beside the scenario until it is told to stop.
struct Load {
    name: &'static str,
    pod: &'static str,
    number: usize,
    child: Child,
}

impl Load {
    fn start(cluster: &Cluster, number: usize) -> anyhow::Result<Self> {
        let (name, pod, options) = LOADS[number];
        let rate = RATE / LOADS.len();
        let script = format!(
            "echo $$ > /tmp/load-{number}; exec fortio load -c 4 -timeout 10s -qps {rate} -t 2m {options}"
        );
        let child = cluster
            .tool(&["exec", pod, "-c", "fortio", "--", "bash", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Self {
            name,
            pod,
            number,
            child,
        })
    }

    /// Ends the load. Every call must have been answered well; gives their number.
    fn stop(self, cluster: &Cluster) -> anyhow::Result<u64> {
        let kill = format!("kill -INT $(cat /tmp/load-{})", self.number);
        let told = cluster.exec(self.pod, "fortio", &["bash", "-c", &kill]);
        let out = self.child.wait_with_output()?;
        let report = String::from_utf8_lossy(&out.stdout).into_owned();
        ensure!(
            out.status.success(),
            "{}: {report}{}",
            self.name,
            String::from_utf8_lossy(&out.stderr)
        );
        told.with_context(|| format!("{} ended before it was told to:\n{report}", self.name))?;
        let found = codes(&report);
        let is_good = |name: &str| name == "Code 200" || name == "Ping SERVING";
        let good: u64 = found
            .iter()
            .filter(|(name, _)| is_good(name))
            .map(|(_, count)| count)
            .sum();
        let all: u64 = found.iter().map(|(_, count)| count).sum();
        ensure!(
            all > 0 && good == all,
            "{}: {} of {all} calls failed:\n{report}",
            self.name,
            all - good
        );
        Ok(good)
    }
}

/// What the proxies on the way say of calls that failed.
fn told(cluster: &Cluster) -> String {
    let mut text = String::from("requests that failed, as the proxies counted them:\n");
    let servers = cluster.pods("app=steady").unwrap_or_default();
    let pods = servers
        .iter()
        .map(|pod| (pod.as_str(), "fortio"))
        .chain([("steady-client", "fortio")]);
    for (pod, container) in pods {
        let metrics = cluster.curl(pod, container, &["http://127.0.0.1:15090/stats/prometheus"]);
        let metrics = match metrics {
            Ok(metrics) => metrics,
            Err(error) => {
                text.push_str(&format!("{pod}: {error:#}\n"));
                continue;
            }
        };
        let failed = metrics.lines().filter(|line| {
            line.starts_with("istio_requests_total{") && !line.contains("response_code=\"200\"")
        });
        text.extend(failed.map(|line| format!("{pod}: {line}\n")));
    }
    text
}

/// Every pod of the service is replaced; then from four pods to one and back; then twenty changes of routes. All of it under a load by every
/// way, which loses nothing.
pub(super) fn nothing_is_lost(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(cluster, &[PLACE, &server(4, 0), &rules(20)], |cluster| {
        patiently(cluster)?;
        for pod in ["steady-client", "steady-outside"] {
            wait_running(cluster, "default", pod)?;
        }
        for (name, pod, options) in LOADS {
            let call = format!("fortio load -c 1 -n 5 -qps 0 {options}");
            cluster.wait(&format!("{name} to be there"), || {
                let page = cluster.exec(pod, "fortio", &["bash", "-c", &call])?;
                Ok(page.contains(" : 5 (100.0 %)").then_some(()))
            })?;
        }
        let began = Instant::now();
        let loads = (0..LOADS.len())
            .map(|number| Load::start(cluster, number))
            .collect::<anyhow::Result<Vec<_>>>()?;
        std::thread::sleep(Duration::from_secs(1));
        let done = changes(cluster);
        // Pods that were told to go are still going.
        std::thread::sleep(Duration::from_secs(1));
        let seconds = began.elapsed().as_secs_f64();
        let mut calls = 0;
        let mut lost = Vec::new();
        for load in loads {
            match load.stop(cluster) {
                Ok(good) => calls += good,
                Err(error) => lost.push(format!("{error:#}")),
            }
        }
        print!("{calls} calls, {:.0}/s; ", calls as f64 / seconds);
        ensure!(lost.is_empty(), "{}\n{}", lost.join("\n"), told(cluster));
        done
    })
}

/// Slow machines get three times the usual patience.
fn patiently(cluster: &Cluster) -> anyhow::Result<()> {
    let once = |_| rolled_out(cluster, "steady");
    once(()).or_else(|_| once(())).or_else(|_| once(()))
}

fn changes(cluster: &Cluster) -> anyhow::Result<()> {
    let began = Instant::now();
    cluster.apply(&server(4, 1))?;
    patiently(cluster).context("the rolling restart")?;
    let restarted = began.elapsed();
    for replicas in [1, 4] {
        cluster.apply(&server(replicas, 1))?;
        patiently(cluster).context("scaling")?;
    }
    let scaled = began.elapsed();
    for round in 0..20 {
        cluster.apply(&rules(10 + round % 7))?;
    }
    print!(
        "restarted in {:.1} s, scaled in {:.1} s, changed in {:.1} s; ",
        restarted.as_secs_f64(),
        (scaled - restarted).as_secs_f64(),
        (began.elapsed() - scaled).as_secs_f64()
    );
    Ok(())
}
