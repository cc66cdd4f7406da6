//! A stock Envoy as a sidecar of our control plane: it must accept everything it is sent, and route a request.

use std::path::Path;

use anyhow::{Context, ensure};
use base64::Engine;

use super::{install, secrets};
use crate::e2e::Cluster;

/// Where pods of the local cluster can see the program: the host's `/opt` is part of every pod's file system.
const PLACE: &str = "/opt/mesh-judges";

/// Envoy beside a curl in one pod, with the capture rules that a sidecar has; the node id is the one that Istio gives to a sidecar.
const POD: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: stock-envoy, namespace: judged}
data:
  bootstrap.yaml: |
    admin: {address: {socket_address: {address: 127.0.0.1, port_value: 15000}}}
    dynamic_resources:
      ads_config:
        api_type: DELTA_GRPC
        transport_api_version: V3
        grpc_services: [{envoy_grpc: {cluster_name: xds-grpc}}]
      cds_config: {ads: {}, resource_api_version: V3}
      lds_config: {ads: {}, resource_api_version: V3}
    static_resources:
      clusters:
      - name: xds-grpc
        type: STRICT_DNS
        connect_timeout: 1s
        typed_extension_protocol_options: &http2
          envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
            "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
            explicit_http_config: {http2_protocol_options: {}}
        load_assignment:
          cluster_name: xds-grpc
          endpoints:
          - lb_endpoints:
            - endpoint: {address: {socket_address: {address: istiod.istio-system.svc.cluster.local, port_value: 15010}}}
      - name: sds-grpc
        type: STATIC
        connect_timeout: 1s
        typed_extension_protocol_options: *http2
        load_assignment:
          cluster_name: sds-grpc
          endpoints:
          - lb_endpoints:
            - endpoint: {address: {pipe: {path: /opt/mesh-judges/secrets}}}
---
apiVersion: v1
kind: Pod
metadata:
  name: stock-envoy
  namespace: judged
  labels: {app: stock-envoy}
spec:
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: config, configMap: {name: stock-envoy}}
  initContainers:
  - name: capture
    image: mesh:VERSION
    args: [istio-iptables, -p, "15001", -z, "15006", -u, "1337", -m, REDIRECT, -i, "*", -b, ""]
    securityContext: {runAsUser: 0, runAsNonRoot: false, capabilities: {add: [NET_ADMIN, NET_RAW], drop: [ALL]}}
  containers:
  - name: envoy
    image: example/envoy:1
    command: [/opt/mesh-judges/envoy]
    args: [-c, /etc/envoy/bootstrap.yaml, --service-node, "sidecar~$(POD_IP)~stock-envoy.judged~judged.svc.cluster.local", --service-cluster, stock-envoy, --concurrency, "1", -l, warning]
    env:
    - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    securityContext: {runAsUser: 1337, runAsGroup: 1337}
    volumeMounts: [{name: config, mountPath: /etc/envoy}]
  - name: curl
    image: curlimages/curl:8.16.0
    command: [sleep, infinity]
"#;

/// Runs the judge.
pub fn run(mesh: &Path) -> anyhow::Result<()> {
    let envoy = install::envoy()?;
    std::fs::create_dir_all(PLACE)?;
    std::fs::copy(&envoy, format!("{PLACE}/envoy"))
        .context("copying Envoy to where pods see it")?;
    let cluster = Cluster::start(mesh, None)?;
    let verdict = judge(&cluster);
    if verdict.is_err() {
        cluster.show_state();
        let logs = cluster.call(&[
            "logs",
            "-n",
            "judged",
            "stock-envoy",
            "-c",
            "envoy",
            "--tail",
            "60",
        ]);
        eprintln!(
            "--- stock Envoy\n{}",
            logs.unwrap_or_else(|e| format!("{e:#}"))
        );
    }
    let stopped = cluster.stop();
    std::fs::remove_dir_all(PLACE)?;
    verdict.and(stopped)
}

fn judge(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: judged}\n")?;
    give_secrets(cluster)?;
    cluster.apply(&POD.replace("VERSION", env!("CARGO_PKG_VERSION")))?;
    let curl = |args: &[&str]| {
        let mut all = vec!["curl", "-sS", "--max-time", "5"];
        all.extend_from_slice(args);
        cluster.exec_in("judged", "stock-envoy", "curl", &all)
    };
    cluster.wait("Envoy to be ready with everything it was sent", || {
        Ok(curl(&["http://127.0.0.1:15000/ready"])?
            .contains("LIVE")
            .then_some(()))
    })?;
    cluster.wait("a request through stock Envoy", || {
        let answer = curl(&["-D", "-", "http://reviews.default:9080/health"])?;
        // Envoy's own header shows that it was Envoy that passed the answer on.
        Ok(
            (answer.contains("200") && answer.contains("x-envoy-upstream-service-time"))
                .then_some(()),
        )
    })?;
    let stats = curl(&["http://127.0.0.1:15000/stats"])?;
    for line in stats
        .lines()
        .filter(|l| l.contains("update_rejected") || l.contains("update_failure"))
    {
        ensure!(
            line.ends_with(": 0") || line.contains("update_failure"),
            "stock Envoy refused something: {line}"
        );
    }
    let handshakes = stats
        .lines()
        .find(|l| l.contains("|reviews.default.") && l.contains(".ssl.handshake: "))
        .context("no counter of handshakes with reviews")?;
    ensure!(
        !handshakes.ends_with(": 0"),
        "stock Envoy spoke plain text with a sidecar of ours: {handshakes}"
    );
    for counter in [
        "cluster_manager.cds.update_success",
        "listener_manager.lds.update_success",
    ] {
        let line = stats
            .lines()
            .find(|l| l.starts_with(counter))
            .with_context(|| format!("no {counter}"))?;
        ensure!(!line.ends_with(": 0"), "stock Envoy took nothing: {line}");
    }
    Ok(())
}

/// Gives Envoy, in the place of an agent, a certificate of the mesh's authority in the name of its pod's account.
fn give_secrets(cluster: &Cluster) -> anyhow::Result<()> {
    let secret = cluster.get(&["secret", "istio-ca-secret", "-n", "istio-system"])?;
    let part = |name: &str| -> anyhow::Result<String> {
        let encoded = secret["data"][name].as_str();
        let encoded = encoded.with_context(|| format!("istio-ca-secret has no {name}"))?;
        let decoded = base64::engine::general_purpose::STANDARD.decode(encoded)?;
        Ok(String::from_utf8(decoded)?)
    };
    let (root, key) = (part("ca-cert.pem")?, part("ca-key.pem")?);
    let identity = "spiffe://cluster.local/ns/judged/sa/default";
    let (chain, key) = crate::pki::workload(&root, &key, identity)?;
    let place = Path::new(PLACE).join("secrets");
    secrets::serve(&place, &chain, &key, &root)
}
