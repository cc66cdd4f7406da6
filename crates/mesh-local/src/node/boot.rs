//! Applies the first manifests in waves, waits for what each wave must bring up, and tells people how far it is.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Event;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind, TypeMeta};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use serde_json::Value;

use crate::{BootWave, WaitFor};

/// The field manager of the first manifests.
const MANAGER: &str = "mesh-boot";
/// A kind whose definition was applied a moment ago may not be served yet; this is how often and how long it is tried.
const NEW_KIND_PAUSE: Duration = Duration::from_millis(10);
const NEW_KIND_LIMIT: Duration = Duration::from_secs(10);

/// Applies all waves; `limit` is for each of them.
pub(super) async fn run(
    client: &kube::Client,
    waves: &[BootWave],
    limit: Duration,
) -> anyhow::Result<()> {
    for wave in waves {
        let started = Instant::now();
        say(&format!("  {} ...", wave.title));
        tokio::time::timeout(limit, one(client, wave))
            .await
            .unwrap_or_else(|_| Err(anyhow::anyhow!("not ready after {} s", limit.as_secs())))
            .with_context(|| format!("starting the {}", wave.title))?;
        say(&format!(
            "  {} \u{2713} {:.2} s",
            wave.title,
            started.elapsed().as_secs_f32()
        ));
    }
    Ok(())
}

/// One line for people, at once.
pub(super) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

async fn one(client: &kube::Client, wave: &BootWave) -> anyhow::Result<()> {
    for document in &wave.documents {
        apply(client, document).await?;
    }
    for wait in &wave.wait {
        available(client, wait).await?;
    }
    Ok(())
}

async fn apply(client: &kube::Client, document: &Value) -> anyhow::Result<()> {
    let types: TypeMeta =
        serde_json::from_value(document.clone()).context("a manifest lacks apiVersion or kind")?;
    let name = document["metadata"]["name"]
        .as_str()
        .with_context(|| format!("a {} has no name", types.kind))?;
    let what = format!("applying {} \"{name}\"", types.kind);
    let gvk = GroupVersionKind::try_from(&types).with_context(|| what.clone())?;
    let resource = ApiResource::from_gvk_with_plural(&gvk, &plural(&gvk.kind));
    let api: Api<DynamicObject> = match namespace(&gvk, document) {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let params = PatchParams::apply(MANAGER).force();
    let began = Instant::now();
    loop {
        match api.patch(name, &params, &Patch::Apply(document)).await {
            Ok(_) => return Ok(()),
            Err(kube::Error::Api(status))
                if status.code == 404 && began.elapsed() < NEW_KIND_LIMIT && custom(&gvk) =>
            {
                tokio::time::sleep(NEW_KIND_PAUSE).await;
            }
            Err(error) => return Err(error).context(what),
        }
    }
}

fn custom(gvk: &GroupVersionKind) -> bool {
    gvk.group.contains("istio.io")
}

fn namespace<'a>(gvk: &GroupVersionKind, document: &'a Value) -> Option<&'a str> {
    const CLUSTER_WIDE: [&str; 9] = [
        "Namespace",
        "Node",
        "CustomResourceDefinition",
        "MutatingWebhookConfiguration",
        "ValidatingWebhookConfiguration",
        "ClusterRole",
        "ClusterRoleBinding",
        "PriorityClass",
        "GatewayClass",
    ];
    (!CLUSTER_WIDE.contains(&gvk.kind.as_str())).then(|| {
        document["metadata"]["namespace"]
            .as_str()
            .unwrap_or("default")
    })
}

/// Kubernetes' plural of a kind: regular English, and Endpoints.
fn plural(kind: &str) -> String {
    let lower = kind.to_lowercase();
    if lower.ends_with("endpoints") {
        return lower;
    }
    if let Some(stem) = lower
        .strip_suffix('y')
        .filter(|s| !s.ends_with(['a', 'e', 'i', 'o', 'u']))
    {
        return format!("{stem}ies");
    }
    if ["s", "x", "ch", "sh"]
        .iter()
        .any(|end| lower.ends_with(end))
    {
        return format!("{lower}es");
    }
    format!("{lower}s")
}

async fn available(client: &kube::Client, wait: &WaitFor) -> anyhow::Result<()> {
    let api: Api<Deployment> = Api::namespaced(client.clone(), &wait.namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", wait.deployment));
    let mut stream = watcher(api, config)
        .default_backoff()
        .applied_objects()
        .boxed();
    let mut hint = tokio::time::interval_at(
        tokio::time::Instant::now() + Duration::from_secs(5),
        Duration::from_secs(5),
    );
    let mut told = String::new();
    loop {
        tokio::select! {
            event = stream.next() => match event {
                Some(Ok(deployment)) if is_available(&deployment) => return Ok(()),
                Some(_) => {}
                None => bail!("the API closed the watch of deployment {}", wait.deployment),
            },
            _ = hint.tick() => {
                let reason = last_warning(client, &wait.namespace).await;
                if !reason.is_empty() && reason != told {
                    say(&format!("    waiting for deployment {}/{}: {reason}", wait.namespace, wait.deployment));
                    told = reason;
                }
            }
        }
    }
}

fn is_available(deployment: &Deployment) -> bool {
    let wanted = deployment.spec.replicas.unwrap_or(1);
    let Some(status) = &deployment.status else {
        return false;
    };
    status.observed_generation == deployment.metadata.generation
        && status.updated_replicas.unwrap_or(0) >= wanted
        && status.available_replicas.unwrap_or(0) >= wanted
}

async fn last_warning(client: &kube::Client, namespace: &str) -> String {
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    let Ok(events) = api.list(&Default::default()).await else {
        return String::new();
    };
    let warning = events.items.into_iter().filter(|e| {
        e.type_.as_deref() == Some("Warning") && e.reason.as_deref() != Some("NotSupported")
    });
    let last = warning.max_by_key(|e| e.last_timestamp.as_ref().map(|t| t.0));
    last.map(|e| {
        format!(
            "{}: {}",
            e.involved_object.name.unwrap_or_default(),
            e.message.unwrap_or_default()
        )
    })
    .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn plurals() {
        for (kind, expected) in [
            ("Gateway", "gateways"),
            ("NetworkPolicy", "networkpolicies"),
            ("Endpoints", "endpoints"),
            ("Ingress", "ingresses"),
            ("Service", "services"),
        ] {
            assert_eq!(plural(kind), expected);
        }
    }

    #[test]
    fn a_deployment_is_available_when_its_newest_generation_is() {
        let deployment = |observed: i64, available: i32| -> Deployment {
            serde_json::from_value(json!({"metadata": {"generation": 2}, "spec": {"replicas": 2, "selector": {}, "template": {}},
                "status": {"observedGeneration": observed, "updatedReplicas": 2, "availableReplicas": available}}))
            .unwrap()
        };
        assert!(is_available(&deployment(2, 2)));
        assert!(!is_available(&deployment(1, 2)));
        assert!(!is_available(&deployment(2, 1)));
    }
}
