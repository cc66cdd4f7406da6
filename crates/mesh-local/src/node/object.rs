//! The Node object and its heartbeat.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node};
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::agent::{NODE_IP, NODE_NAME};

/// How often the lease is renewed, as the kubelet does.
const HEARTBEAT: Duration = Duration::from_secs(10);
const MANAGER: &str = "kubelet";
/// The version that the node reports; from 1.33 on native sidecars are stable.
pub(super) const KUBELET_VERSION: &str = "v1.36.0";

/// Writes the Node and marks it ready.
pub(super) async fn register(client: &kube::Client) -> Result<(), kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let params = PatchParams::apply(MANAGER).force();
    let labels = json!({
        "kubernetes.io/hostname": NODE_NAME, "kubernetes.io/os": "linux", "kubernetes.io/arch": arch(),
        "topology.kubernetes.io/region": "local", "topology.kubernetes.io/zone": "local",
        "node-role.kubernetes.io/control-plane": "",
    });
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE_NAME, "labels": labels}, "spec": {"podCIDR": "10.244.0.0/16"}});
    nodes
        .patch(NODE_NAME, &params, &Patch::Apply(&node))
        .await?;
    nodes
        .patch_status(
            NODE_NAME,
            &PatchParams::default(),
            &Patch::Merge(json!({"status": status()})),
        )
        .await?;
    Ok(())
}

/// Puts the root certificate where the namespace controller copies it from.
pub(super) async fn publish_root(client: &kube::Client, pem: &str) -> Result<(), kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-system");
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": pem}});
    maps.patch(
        "kube-root-ca.crt",
        &PatchParams::apply(MANAGER).force(),
        &Patch::Apply(&map),
    )
    .await
    .map(drop)
}

fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn status() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let memory = read("/proc/meminfo").lines().find_map(|l| {
        Some(
            l.strip_prefix("MemTotal:")?
                .trim()
                .trim_end_matches(" kB")
                .to_owned(),
        )
    });
    let memory = format!("{}Ki", memory.unwrap_or_else(|| "0".to_owned()));
    let cpus = std::thread::available_parallelism()
        .map_or(1, |n| n.get())
        .to_string();
    let resources = json!({"cpu": cpus, "memory": memory, "pods": "250", "ephemeral-storage": "0"});
    let os = read("/etc/os-release");
    let os = os
        .lines()
        .find_map(|l| l.strip_prefix("PRETTY_NAME="))
        .unwrap_or("Linux")
        .trim_matches('"');
    let now = format!("{:.0}", Timestamp::now());
    let condition = |kind: &str, holds: bool, reason: &str, message: &str| {
        json!({"type": kind, "status": if holds { "True" } else { "False" }, "reason": reason, "message": message,
            "lastHeartbeatTime": now, "lastTransitionTime": now})
    };
    json!({
        "capacity": resources, "allocatable": resources,
        "addresses": [{"type": "InternalIP", "address": NODE_IP.to_string()}, {"type": "Hostname", "address": NODE_NAME}],
        "conditions": [
            condition("MemoryPressure", false, "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
            condition("DiskPressure", false, "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
            condition("PIDPressure", false, "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
            condition("Ready", true, "KubeletReady", "kubelet is posting ready status"),
        ],
        "nodeInfo": {
            "architecture": arch(), "operatingSystem": "linux", "osImage": os,
            "kernelVersion": read("/proc/sys/kernel/osrelease").trim(), "kubeletVersion": KUBELET_VERSION, "kubeProxyVersion": "",
            "containerRuntimeVersion": concat!("mesh://", env!("CARGO_PKG_VERSION")),
            "machineID": "", "systemUUID": "", "bootID": read("/proc/sys/kernel/random/boot_id").trim(),
        },
    })
}

/// Renews the node's lease until `shutdown`.
pub(super) async fn heartbeat(client: kube::Client, shutdown: CancellationToken) {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-node-lease"}});
    let params = PatchParams::apply(MANAGER).force();
    let _ = namespaces
        .patch("kube-node-lease", &params, &Patch::Apply(&namespace))
        .await;
    let leases: Api<Lease> = Api::namespaced(client, "kube-node-lease");
    loop {
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": NODE_NAME, "namespace": "kube-node-lease"},
            "spec": {"holderIdentity": NODE_NAME, "leaseDurationSeconds": 40, "renewTime": format!("{:.6}", Timestamp::now())},
        });
        if let Err(error) = leases
            .patch(NODE_NAME, &params, &Patch::Apply(&lease))
            .await
        {
            tracing::warn!(%error, "the node's lease could not be renewed");
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(HEARTBEAT) => {}
        }
    }
}
