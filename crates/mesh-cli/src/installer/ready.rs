//! Waiting for what was applied, and saying what it waits for.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::objects::{Session, label};
use super::{How, answer, title};
use crate::cluster::query;
use crate::install::{Component, Plan};

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(250);
/// Longest wait for the webhooks to be reached, once the control plane is ready.
const ANSWER: Duration = Duration::from_secs(60);
/// Longest wait for kinds to be served.
const SOON: Duration = Duration::from_secs(30);

/// Reasons for which a container waits that mean trouble.
const TROUBLE: [&str; 9] = [
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "ImageInspectError",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
];

/// Waits until a component is there: kinds are served, Deployments are available, webhooks are called.
///
/// # Errors
/// It is not when the time is over; the message says why, as far as the cluster tells.
pub(super) async fn wait(
    session: &Session<'_>,
    plan: &Plan,
    component: &Component,
    how: &How,
) -> anyhow::Result<()> {
    let of_kind = |kind: &'static str| {
        component
            .objects
            .iter()
            .filter(move |object| object["kind"] == kind)
    };
    for kind in of_kind("CustomResourceDefinition") {
        established(session, kind).await?;
    }
    let deadline = Instant::now() + how.readiness_timeout;
    let mut told = BTreeSet::new();
    for deployment in of_kind("Deployment") {
        available(session, component, deployment, deadline, &mut told).await?;
    }
    if component.name == "Pilot" {
        let deadline = Instant::now() + how.readiness_timeout.min(ANSWER);
        webhooks(session, plan, component, deadline).await?;
    }
    Ok(())
}

async fn established(session: &Session<'_>, kind: &Value) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let live = session.live(kind).await?.unwrap_or_default();
        let condition = |name: &str| {
            let mut all = live["status"]["conditions"]
                .as_array()
                .into_iter()
                .flatten();
            all.find(|condition| condition["type"] == name).cloned()
        };
        if condition("Established").is_some_and(|condition| condition["status"] == "True") {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let why = condition("NamesAccepted").unwrap_or_default();
            bail!(
                "{} is not served after {} s: {}",
                label(kind),
                SOON.as_secs(),
                why["message"]
                    .as_str()
                    .unwrap_or("the server does not say why")
            );
        }
        sleep(PAUSE).await;
    }
}

async fn available(
    session: &Session<'_>,
    component: &Component,
    deployment: &Value,
    deadline: Instant,
    told: &mut BTreeSet<String>,
) -> anyhow::Result<()> {
    loop {
        let live = session.live(deployment).await?.unwrap_or_default();
        if is_available(&live) {
            return Ok(());
        }
        let trouble = trouble(session, &live).await?;
        for text in &trouble {
            if told.insert(text.clone()) {
                eprintln!("  {}: {text}", title(component.name));
            }
        }
        if Instant::now() >= deadline {
            let why = match trouble.as_slice() {
                [] => state(&live),
                some => some.join("; "),
            };
            bail!("{} is not ready in time: {why}", label(deployment));
        }
        sleep(PAUSE).await;
    }
}

/// All replicas are of the newest template and available.
pub(crate) fn is_available(live: &Value) -> bool {
    let status = &live["status"];
    let number = |field: &str| status[field].as_i64().unwrap_or(0);
    let wanted = live["spec"]["replicas"].as_i64().unwrap_or(1);
    number("observedGeneration") >= live["metadata"]["generation"].as_i64().unwrap_or(1)
        && number("updatedReplicas") >= wanted
        && number("availableReplicas") >= wanted
        && number("replicas") <= number("updatedReplicas")
}

fn state(live: &Value) -> String {
    let status = &live["status"];
    let number = |field: &str| status[field].as_i64().unwrap_or(0);
    format!(
        "{} of {} replicas available, {} of the newest template; its pods' events say more (`mesh describe pod`)",
        number("availableReplicas"),
        live["spec"]["replicas"].as_i64().unwrap_or(1),
        number("updatedReplicas")
    )
}

/// What stands in the way of a Deployment, in words.
pub(crate) async fn trouble(session: &Session<'_>, live: &Value) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for condition in live["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
    {
        if condition["type"] == "ReplicaFailure" && condition["status"] == "True" {
            let message = condition["message"].as_str().unwrap_or_default();
            found.push(format!("its pods can't be created: {message}"));
        }
    }
    let labels = live["spec"]["selector"]["matchLabels"].as_object();
    let selector: Vec<String> = labels
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some(format!("{key}={}", value.as_str()?)))
        .collect();
    let Some(namespace) = live["metadata"]["namespace"].as_str() else {
        return Ok(found);
    };
    let pods = session
        .cluster
        .read(&format!(
            "/api/v1/namespaces/{namespace}/pods?labelSelector={}",
            query(&selector.join(","))
        ))
        .await
        .context("looking at its pods")?;
    for pod in pods["items"].as_array().into_iter().flatten() {
        found.extend(pod_trouble(pod));
    }
    Ok(found)
}

fn pod_trouble(pod: &Value) -> Vec<String> {
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let mut found = Vec::new();
    for condition in pod["status"]["conditions"].as_array().into_iter().flatten() {
        if condition["type"] == "PodScheduled" && condition["status"] == "False" {
            let message = condition["message"].as_str().unwrap_or_default();
            let advice = match message.contains("taint") {
                true => {
                    "; let it run there with tolerations (components.pilot.k8s.tolerations, or those of the gateway), or take the taint off"
                }
                false => "",
            };
            found.push(format!("pod {name} finds no node: {message}{advice}"));
        }
    }
    for list in ["initContainerStatuses", "containerStatuses"] {
        for status in pod["status"][list].as_array().into_iter().flatten() {
            found.extend(container_trouble(name, status));
        }
    }
    found
}

fn container_trouble(pod: &str, status: &Value) -> Option<String> {
    let waiting = &status["state"]["waiting"];
    let reason = waiting["reason"]
        .as_str()
        .filter(|reason| TROUBLE.contains(reason))?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (container, image) = (text(&status["name"]), text(&status["image"]));
    let message = text(&waiting["message"]);
    let advice = if reason.contains("Image") {
        format!(
            "; the node has no image {image}: load it (`kind load image-archive`, `minikube image load`, `ctr -n k8s.io images import`), or name a registry that has it with --set hub=REGISTRY"
        )
    } else if reason == "CrashLoopBackOff" {
        let ended = &status["lastState"]["terminated"];
        format!(
            "; it ended with code {} {}: `mesh logs {pod} -c {container} --previous` shows why",
            ended["exitCode"].as_i64().unwrap_or(-1),
            text(&ended["message"])
        )
    } else {
        String::new()
    };
    let message = match message.as_str() {
        "" => String::new(),
        message => format!(" ({message})"),
    };
    Some(format!(
        "pod {pod}, container {container}: {reason}{message}{advice}"
    ))
}

/// Waits until the control plane has taken its webhooks over and the API server reaches them.
async fn webhooks(
    session: &Session<'_>,
    plan: &Plan,
    component: &Component,
    deadline: Instant,
) -> anyhow::Result<()> {
    loop {
        let trouble = match without_bundle(session, component).await? {
            Some(trouble) => trouble,
            None => match answer::missing(session, plan, component).await? {
                Some(trouble) => trouble,
                None => return Ok(()),
            },
        };
        if Instant::now() >= deadline {
            bail!("{trouble}");
        }
        sleep(PAUSE).await;
    }
}

/// A webhook whose certificate nobody could check.
pub(crate) async fn without_bundle(
    session: &Session<'_>,
    component: &Component,
) -> anyhow::Result<Option<String>> {
    let configurations = component
        .objects
        .iter()
        .filter(|object| object["webhooks"].is_array());
    for configuration in configurations {
        let live = session.live(configuration).await?.unwrap_or_default();
        let mut all = live["webhooks"].as_array().into_iter().flatten();
        let empty = |webhook: &&Value| {
            let bundle = &webhook["clientConfig"]["caBundle"];
            bundle.as_str().is_none_or(str::is_empty)
        };
        if all.find(empty).is_some() {
            return Ok(Some(format!(
                "{} has no caBundle: the control plane should have written it; its log says why it did not",
                label(configuration)
            )));
        }
    }
    Ok(None)
}

/// What is not an error, but will be missed: gateways without an address.
pub(super) async fn pending(session: &Session<'_>, plan: &Plan) -> anyhow::Result<Vec<String>> {
    let mut notes = Vec::new();
    for service in plan
        .objects()
        .filter(|object| object["spec"]["type"] == "LoadBalancer")
    {
        let live = session.live(service).await?.unwrap_or_default();
        let addresses = live["status"]["loadBalancer"]["ingress"].as_array();
        if addresses.is_none_or(Vec::is_empty) {
            notes.push(format!(
                "{} has no address yet: where the cluster has no load balancer it never gets one; use its node ports, or type NodePort (--set values.gateways.istio-ingressgateway.type=NodePort)",
                label(service)
            ));
        }
    }
    Ok(notes)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn troubles_are_named() {
        let pod = |status: Value| json!({ "metadata": { "name": "p" }, "status": status });
        let waiting = |reason: &str| json!({ "containerStatuses": [{ "name": "c", "image": "mesh:1", "state": { "waiting": { "reason": reason, "message": "m" } }, "lastState": { "terminated": { "exitCode": 3 } } }] });
        let of = |status: Value| pod_trouble(&pod(status)).join("\n");
        let image = of(waiting("ImagePullBackOff"));
        assert!(
            image.starts_with(
                "pod p, container c: ImagePullBackOff (m); the node has no image mesh:1: load it"
            ),
            "{image}"
        );
        let crash = of(waiting("CrashLoopBackOff"));
        assert!(crash.contains("it ended with code 3"), "{crash}");
        assert_eq!(of(waiting("ContainerCreating")), "");
        let unscheduled = json!({ "conditions": [{ "type": "PodScheduled", "status": "False", "message": "0/1 nodes" }] });
        assert_eq!(of(unscheduled), "pod p finds no node: 0/1 nodes");
        let tainted = json!({ "conditions": [{ "type": "PodScheduled", "status": "False", "message": "0/1 nodes are available: 1 node(s) had untolerated taint" }] });
        assert!(of(tainted).contains("components.pilot.k8s.tolerations"));
    }

    #[test]
    fn available_means_the_newest_template() {
        let live = |generation: i64, replicas: i64, updated: i64, available: i64| {
            is_available(&json!({
                "metadata": { "generation": generation }, "spec": { "replicas": 2 },
                "status": { "observedGeneration": 3, "replicas": replicas, "updatedReplicas": updated, "availableReplicas": available },
            }))
        };
        assert!(live(3, 2, 2, 2));
        assert!(!live(4, 2, 2, 2), "the controller has not seen it");
        assert!(!live(3, 3, 2, 3), "an old pod is left");
        assert!(!live(3, 2, 1, 2), "an old pod is left");
        assert!(!live(3, 2, 2, 1), "one is not ready");
    }
}
