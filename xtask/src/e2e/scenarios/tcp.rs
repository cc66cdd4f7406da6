//! TCP traffic: by weight through a port of the gateway, and through a forward proxy to where nothing else leads.

use anyhow::{Context, ensure};

use super::counted::rolled_out;
use super::samples::{sample, with};
use crate::e2e::cluster::Cluster;

const SERVERS: &str = sample!("tcp-echo/tcp-echo-services.yaml");
const ALL_V1: &str = sample!("tcp-echo/tcp-echo-all-v1.yaml");
const SOME_V2: &str = sample!("tcp-echo/tcp-echo-20-v2.yaml");

/// So many connections, each with one line; gives how many were answered by "one" and by "two".
fn asked(cluster: &Cluster, address: &str, count: usize) -> anyhow::Result<(usize, usize)> {
    let pods = cluster.pods("app=curl")?;
    let pod = pods.first().context("no pod of curl")?;
    let script = format!(
        "for i in $(seq {count}); do exec 3<>/dev/tcp/{address}/31400 && echo world >&3 && read -r -t 5 line <&3; echo \"$line\"; exec 3>&-; done"
    );
    let printed = cluster.exec(pod, "curl", &["bash", "-c", &script])?;
    let of = |word: &str| {
        printed
            .lines()
            .filter(|line| *line == format!("{word} world"))
            .count()
    };
    let (one, two) = (of("one"), of("two"));
    ensure!(
        one + two == count,
        "{count} connections brought {one} + {two} answers: {printed}"
    );
    Ok((one, two))
}

/// All to the first version, then one connection in five to the second.
pub(super) fn shifting(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(cluster, &[SERVERS, ALL_V1], |cluster| {
        rolled_out(cluster, "tcp-echo-v1")?;
        rolled_out(cluster, "tcp-echo-v2")?;
        let gateways = cluster.get(&[
            "pods",
            "-n",
            "istio-system",
            "-l",
            "app=istio-ingressgateway",
        ])?;
        let address = gateways["items"][0]["status"]["podIP"]
            .as_str()
            .context("the gateway has no address")?
            .to_owned();
        cluster.wait("the gateway's port", || {
            let (one, two) = asked(cluster, &address, 20)?;
            Ok((one == 20 && two == 0).then_some(()))
        })?;
        cluster.apply(SOME_V2)?;
        cluster.wait("the second version", || {
            Ok((asked(cluster, &address, 20)?.1 > 0).then_some(()))
        })?;
        let (one, two) = asked(cluster, &address, 300)?;
        // Five standard deviations of 300 draws at a fifth.
        ensure!(
            (26..=94).contains(&two),
            "the second version got {two} of 300, the first {one}"
        );
        Ok(())
    })
}

/// A service without endpoints, the gateway as forward proxy, and the rules that send the one's connections through a tunnel of the other.
const FORWARD_PROXY: &str = r#"
apiVersion: v1
kind: Service
metadata: { name: outside, namespace: default }
spec: { ports: [{ name: tcp, port: 9000 }] }
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: { name: forward-proxy, namespace: istio-system }
spec:
  selector: { istio: ingressgateway }
  servers: [{ port: { number: 80, name: http, protocol: HTTP }, hosts: [outside.example.com] }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: forward-proxy, namespace: istio-system }
spec:
  hosts: [outside.example.com]
  gateways: [forward-proxy]
  http: [{ directResponse: { status: 404 } }]
---
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: { name: forward-proxy, namespace: istio-system }
spec:
  workloadSelector: { labels: { istio: ingressgateway } }
  configPatches:
    - applyTo: HTTP_ROUTE
      match: { context: GATEWAY, routeConfiguration: { vhost: { name: "outside.example.com:80" } } }
      patch:
        operation: INSERT_FIRST
        value:
          match: { connect_matcher: {} }
          route:
            cluster: outbound|9000||tcp-echo.default.svc.cluster.local
            upgrade_configs: [{ upgrade_type: CONNECT, connect_config: {} }]
"#;
const THROUGH: &str = r#"
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: forward-proxy, namespace: default }
spec:
  host: istio-ingressgateway.istio-system.svc.cluster.local
  trafficPolicy: { tunnel: { protocol: CONNECT, targetHost: outside.example.com, targetPort: 80 } }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: outside, namespace: default }
spec:
  hosts: [outside]
  tcp: [{ route: [{ destination: { host: istio-ingressgateway.istio-system.svc.cluster.local, port: { number: 80 } } }] }]
"#;

/// A service outside that only a forward proxy reaches.
pub(super) fn tunnelled(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(cluster, &[SERVERS, FORWARD_PROXY], |cluster| {
        rolled_out(cluster, "tcp-echo-v1")?;
        rolled_out(cluster, "tcp-echo-v2")?;
        let pods = cluster.pods("app=curl")?;
        let pod = pods.first().context("no pod of curl")?;
        let script = "exec 3<>/dev/tcp/outside.default/9000 && echo world >&3 && read -r -t 2 line <&3; echo \"$line\"";
        let answered = || -> anyhow::Result<bool> {
            // The command fails where the connection is refused.
            let printed = cluster.exec(pod, "curl", &["bash", "-c", script]);
            Ok(printed.is_ok_and(|printed| printed.trim().ends_with(" world")))
        };
        ensure!(
            !answered()?,
            "a service without endpoints answers without the tunnel"
        );
        with(cluster, &[THROUGH], |cluster| {
            cluster.wait("an answer through the tunnel", || {
                Ok(answered()?.then_some(()))
            })
        })
    })
}
