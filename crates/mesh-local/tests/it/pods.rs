//! The cases.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use mesh_apiserver::node::{ExecRequest, ExitStatus, LogRequest, NodeBackend};
use mesh_local::agent::backend::Backend;
use mesh_local::agent::registry::Registry;
use mesh_local::agent::worker::{self, Change};
use mesh_local::agent::{Shared, sandbox};
use nix::net::if_::InterfaceFlags;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::api::Api;

pub struct Running {
    pub api: Api,
    pub backend: Backend,
    pod: Pod,
    changes: mpsc::UnboundedSender<Change>,
    task: JoinHandle<()>,
}

pub fn start(run: &Path, api: Api, spec: Value) -> Running {
    let pod = json!({"metadata": {"name": "p", "namespace": "shop", "uid": uuid::Uuid::new_v4().to_string(), "labels": {"app": "web"}}, "spec": spec});
    let pod: Pod = serde_json::from_value(pod).unwrap();
    let registry = Arc::new(Registry::default());
    let shared = Arc::new(Shared::new(
        api.client(),
        run.to_owned(),
        registry.clone(),
        None,
    ));
    let (changes, receive) = mpsc::unbounded_channel();
    let task = tokio::spawn(worker::run(shared, pod.clone(), receive));
    Running {
        api,
        backend: Backend::new(registry),
        pod,
        changes,
        task,
    }
}

impl Running {
    pub async fn logs(&self, container: &str, previous: bool) -> String {
        let request = LogRequest {
            namespace: "shop".into(),
            pod: "p".into(),
            container: container.into(),
            previous,
            ..LogRequest::default()
        };
        let stream = self.backend.logs(request).await.unwrap();
        let parts: Vec<Bytes> = stream.collect().await;
        String::from_utf8(parts.concat()).unwrap()
    }

    pub async fn exec(&self, container: &str, command: &str, tty: bool) -> (String, ExitStatus) {
        let request = ExecRequest {
            namespace: "shop".into(),
            pod: "p".into(),
            container: container.into(),
            command: ["/bin/sh", "-c", command].map(str::to_owned).into(),
            stdout: true,
            tty,
            ..ExecRequest::default()
        };
        let mut session = self.backend.exec(request).await.unwrap();
        let mut out = String::new();
        session
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut out)
            .await
            .unwrap();
        (out.trim().to_owned(), session.exit.await)
    }

    pub async fn delete(self) -> Api {
        self.delete_within(5).await
    }

    /// `seconds`: the grace period.
    pub async fn delete_within(mut self, seconds: i64) -> Api {
        self.pod.metadata.deletion_timestamp =
            Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        self.pod.metadata.deletion_grace_period_seconds = Some(seconds);
        self.changes
            .send(Change::Pod(Box::new(self.pod.clone())))
            .unwrap();
        self.api.wait_deleted().await;
        self.task.await.unwrap();
        self.api
    }
}

pub fn ready(status: &Value) -> bool {
    status["conditions"].as_array().is_some_and(|c| {
        c.iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True")
    })
}

pub async fn all(run: &Path) {
    sandbox::prepare_node().await.unwrap();
    a_new_link_works_at_once().await;
    life_of_a_pod(run).await;
    pods_that_can_not_run(run).await;
    pods_without_a_program(run).await;
    a_pod_that_waits_for_its_configuration(run).await;
    a_finished_pod(run).await;
    crate::streams::all(run).await;
    crate::lifecycle::all(run).await;
    assert_eq!(
        other_processes(),
        BTreeSet::new(),
        "processes are left behind"
    );
    let left: Vec<_> = std::fs::read_dir(run.join("pods"))
        .unwrap()
        .flatten()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    // The kernel takes namespaces apart in the background.
    let links = || std::fs::read_to_string("/proc/net/dev").unwrap();
    for _ in 0..500 {
        if !links().contains("veth") {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("links are left behind: {}", links());
}

fn other_processes() -> BTreeSet<u32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != 1)
        .collect()
}

/// A link that is only "up" loses what is sent before the kernel has put it to work; and a bridge that takes its ports' hardware addresses
/// loses what pods send to the one that it had before.
async fn a_new_link_works_at_once() {
    let of_bridge = || {
        let addresses = nix::ifaddrs::getifaddrs().unwrap();
        addresses
            .filter(|a| a.interface_name == "cni0")
            .find_map(|a| a.address?.as_link_addr()?.addr())
            .unwrap()
    };
    let before = of_bridge();
    let mut pods = Vec::new();
    for number in 0..4 {
        let ip = std::net::Ipv4Addr::new(10, 244, 9, number);
        let index = 0xf00 + u64::from(number);
        let pod = sandbox::Sandbox::create(ip, "p".into(), index).await;
        pods.push(pod.unwrap());
        for name in ["cni0".to_owned(), format!("veth{index:x}")] {
            let found = nix::ifaddrs::getifaddrs().unwrap();
            let link = found.into_iter().find(|a| a.interface_name == name);
            // IFF_RUNNING is the operational state of RFC 2863 (netdevice(7)).
            let flags = link.unwrap().flags;
            assert!(
                flags.contains(InterfaceFlags::IFF_RUNNING),
                "{name} {flags:?}"
            );
        }
        assert_eq!(of_bridge(), before);
    }
}

async fn life_of_a_pod(run: &Path) {
    let api = Api::new();
    api.put("/api/v1/namespaces/shop/configmaps/settings", json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"color": "red"}}));
    let pod = start(
        run,
        api,
        json!({
            "volumes": [
                {"name": "shared", "emptyDir": {}},
                {"name": "settings", "configMap": {"name": "settings"}},
                {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
            ],
            "initContainers": [
                {"name": "setup", "image": "x", "command": ["/bin/sh", "-c", "echo $COLOR > /shared/init; ln -s /etc /shared/escape"],
                 "env": [{"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "color"}}}],
                 "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]},
                {"name": "side", "image": "x", "restartPolicy": "Always", "securityContext": {"runAsUser": 1337},
                 "command": ["/bin/sh", "-c", "echo side up; touch /tmp/ok; trap 'echo side down; exit 0' TERM; while :; do sleep 0.05; done"],
                 "startupProbe": {"exec": {"command": ["/bin/test", "-e", "/tmp/ok"]}}},
            ],
            "containers": [
                {"name": "app", "image": "x",
                 "command": ["/bin/sh", "-c", "cat /shared/init /settings/color; cat /run/token/token; echo; trap 'echo app down; exit 0' TERM; while :; do sleep 0.05; done"],
                 "volumeMounts": [
                    {"name": "shared", "mountPath": "/shared"}, {"name": "settings", "mountPath": "/settings"},
                    {"name": "settings", "mountPath": "/shared/escape/inside"}, {"name": "token", "mountPath": "/var/run/token"}]},
            ],
        }),
    );
    let status = pod.api.wait("the pod to be ready", ready).await;
    assert_eq!(status["phase"], "Running");
    assert_eq!(
        status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"],
        0
    );
    let wanted = "red\nreda-token\n";
    for _ in 0..500 {
        if pod.logs("app", false).await == wanted {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(pod.logs("app", false).await, wanted);
    assert!(
        !Path::new("/etc/inside").exists(),
        "a volume was mounted outside the container"
    );
    inside(&pod).await;
    restarts(&pod).await;
    let api = pod.delete().await;
    let last = api.last();
    assert_eq!(
        last["containerStatuses"][0]["state"]["terminated"]["exitCode"], 0,
        "SIGTERM reached the app: {last:#}"
    );
    for reason in ["Pulled: ", "Created: ", "Started: ", "Killing: "] {
        api.told(&[reason]).await;
    }
}

async fn inside(pod: &Running) {
    let ip = pod.api.wait("an address", |s| s["podIP"].is_string()).await["podIP"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(
        pod.exec("app", "exit 7", false).await.1,
        ExitStatus::Code(7)
    );
    assert_eq!(pod.exec("app", "hostname", false).await.0, "p");
    assert!(
        pod.exec("app", "cat /etc/hosts", false)
            .await
            .0
            .contains(&ip)
    );
    assert_eq!(
        pod.exec("app", "test -t 1 && echo terminal", true).await.0,
        "terminal"
    );
    assert_eq!(
        pod.exec("app", "touch /usr/x 2>/dev/null || echo refused", false)
            .await
            .0,
        "refused"
    );
    let mapped = mesh_local::agent::uids_mapped();
    assert_eq!(
        pod.exec("app", "id -u", false).await.0,
        if mapped { "1000" } else { "0" }
    );
    assert_eq!(
        pod.exec("side", "id -u", false).await.0,
        if mapped { "1337" } else { "0" }
    );
    let caps = |container| pod.exec(container, "grep CapEff /proc/self/status | cut -f2", false);
    let effective = |text: String| u64::from_str_radix(&text, 16).unwrap();
    let net_admin = 1 << 12;
    assert_eq!(effective(caps("app").await.0) & net_admin, 0);
    assert_eq!(
        effective(caps("side").await.0) & net_admin != 0,
        !mapped,
        "the proxy may set marks only where it needs them"
    );
    let (processes, _) = pod.exec("app", "echo /proc/[0-9]*", false).await;
    assert!(
        processes.starts_with("/proc/1 "),
        "the container has a PID namespace of its own: {processes}"
    );
    assert!(
        pod.exec("app", "cat /proc/net/route", false)
            .await
            .0
            .contains("eth0")
    );
}

async fn restarts(pod: &Running) {
    let (_, _) = pod.exec("side", "kill -9 2", false).await;
    let count = |s: &Value, list: &str| {
        s[list]
            .as_array()
            .and_then(|l| l.last().cloned())
            .map_or(-1, |c| c["restartCount"].as_i64().unwrap_or(-1))
    };
    let status = pod
        .api
        .wait("the sidecar to be back", |s| {
            ready(s) && count(s, "initContainerStatuses") == 1
        })
        .await;
    assert_eq!(
        count(&status, "containerStatuses"),
        0,
        "the app was not touched"
    );
    assert_eq!(
        status["initContainerStatuses"][1]["lastState"]["terminated"]["exitCode"],
        137
    );
    assert_eq!(pod.logs("side", true).await, "side up\n");
}

async fn pods_that_can_not_run(run: &Path) {
    let waiting = |reason: &'static str| {
        move |s: &Value| s["containerStatuses"][0]["state"]["waiting"]["reason"] == reason
    };
    let pod = start(
        run,
        Api::new(),
        json!({"containers": [{"name": "app", "image": "redis:7"}]}),
    );
    pod.api
        .wait("an unknown image to be refused", waiting("ErrImagePull"))
        .await;
    let api = pod.delete().await;
    api.told(&["redis:7", "Use one of"]).await;

    let pod = start(
        run,
        Api::new(),
        json!({"volumes": [{"name": "v", "hostPath": {"path": "/etc"}}], "containers": [{"name": "app", "image": "x", "command": ["/bin/sh"]}]}),
    );
    pod.api.told(&["FailedMount: ", "\"v\""]).await;
    pod.delete().await;
}

async fn pods_without_a_program(run: &Path) {
    let pod = start(
        run,
        Api::new(),
        json!({"containers": [{"name": "app", "image": "x", "command": ["/no/such/program"]}]}),
    );
    let status = pod
        .api
        .wait("a missing program to end the container", |s| {
            s["containerStatuses"][0]["lastState"]["terminated"].is_object()
                && s["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        })
        .await;
    let ended = &status["containerStatuses"][0]["lastState"]["terminated"];
    let message = "exec: \"/no/such/program\": no such file or directory";
    assert_eq!(
        (&ended["reason"], &ended["exitCode"]),
        (&json!("StartError"), &json!(128))
    );
    assert!(
        ended["message"].as_str().unwrap().contains(message),
        "{ended}"
    );
    let api = pod.delete().await;
    api.told(&[message]).await;

    let spec = json!({"restartPolicy": "Never", "containers": [{"name": "app", "image": "x", "command": ["no-such-program"]}]});
    let pod = start(run, Api::new(), spec);
    let status = pod
        .api
        .wait("the pod to fail", |s| s["phase"] == "Failed")
        .await;
    let ended = &status["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(
        (&ended["exitCode"], &ended["message"]),
        (
            &json!(128),
            &json!("exec: \"no-such-program\": executable file not found in $PATH")
        )
    );
    pod.delete().await;
}

async fn a_pod_that_waits_for_its_configuration(run: &Path) {
    let from = json!([{"configMapRef": {"name": "late"}}]);
    let pod = start(
        run,
        Api::new(),
        json!({"containers": [{"name": "app", "image": "x", "command": ["/bin/sh", "-c", "echo $COLOR; sleep 1000"], "envFrom": from}]}),
    );
    pod.api
        .wait("a missing ConfigMap to be waited for", |s| {
            s["containerStatuses"][0]["state"]["waiting"]["reason"] == "CreateContainerConfigError"
        })
        .await;
    pod.api.put("/api/v1/namespaces/shop/configmaps/late", json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "late"}, "data": {"COLOR": "blue"}}));
    pod.changes.send(Change::References).unwrap();
    let began = std::time::Instant::now();
    pod.api.wait("the container to start", ready).await;
    // It did not wait for the end of its back-off, which is ten seconds.
    assert!(began.elapsed().as_secs() < 9, "{:?}", began.elapsed());
    pod.delete().await;
}

async fn a_finished_pod(run: &Path) {
    let spec = json!({"restartPolicy": "Never",
        "initContainers": [{"name": "side", "image": "x", "restartPolicy": "Always", "command": ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done"]}],
        "containers": [{"name": "app", "image": "x", "command": ["/bin/sh", "-c", "echo done >&2; exit 3"], "terminationMessagePolicy": "FallbackToLogsOnError"}]});
    let pod = start(run, Api::new(), spec);
    let status = pod
        .api
        .wait("the pod to fail", |s| s["phase"] == "Failed")
        .await;
    let ended = &status["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(
        (ended["exitCode"].as_i64(), ended["message"].as_str()),
        (Some(3), Some("done\n"))
    );
    assert!(
        status["initContainerStatuses"][0]["state"]["terminated"].is_object(),
        "the sidecar ended with the app: {status:#}"
    );
    pod.delete().await;
}
