//! The workload to which a pod belongs.

use serde_json::Value;

use crate::PodView;

/// A workload, as the proxy reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Group and version, for instance `apps/v1`.
    pub api_version: String,
    /// Kind, for instance `Deployment`.
    pub kind: String,
    /// Name.
    pub name: String,
}

impl Workload {
    /// The workload of a pod: the Deployment behind its ReplicaSet, the CronJob behind its Job, its controller, or the pod itself.
    pub(crate) fn of(pod: &PodView<'_>) -> Self {
        let owners = pod
            .metadata
            .and_then(|metadata| metadata.get("ownerReferences"))
            .and_then(Value::as_array);
        let Some(owner) = owners
            .into_iter()
            .flatten()
            .find(|owner| owner["controller"] == true)
        else {
            let name = Some(pod.text("name"))
                .filter(|name| !name.is_empty())
                .unwrap_or(pod.text("generateName").trim_end_matches('-'));
            return Self {
                api_version: "v1".to_owned(),
                kind: "Pod".to_owned(),
                name: name.to_owned(),
            };
        };
        let text = |field: &str| owner[field].as_str().unwrap_or_default();
        let (kind, name) = (text("kind"), text("name"));
        if kind == "ReplicaSet"
            && let Some(deployment) = pod
                .label("pod-template-hash")
                .and_then(|hash| name.strip_suffix(hash))
                .and_then(|name| name.strip_suffix('-'))
        {
            return Self {
                api_version: "apps/v1".to_owned(),
                kind: "Deployment".to_owned(),
                name: deployment.to_owned(),
            };
        }
        // OpenShift: a controller of pods is made for each version of a DeploymentConfig.
        if kind == "ReplicationController"
            && let Some(config) = pod.label("deploymentconfig")
        {
            return Self {
                api_version: "apps.openshift.io/v1".to_owned(),
                kind: "DeploymentConfig".to_owned(),
                name: config.to_owned(),
            };
        }
        if kind == "Job"
            && let Some((cron, minute)) = name.rsplit_once('-')
            && (8..=10).contains(&minute.len())
            && minute.bytes().all(|b| b.is_ascii_digit())
        {
            return Self {
                api_version: text("apiVersion").to_owned(),
                kind: "CronJob".to_owned(),
                name: cron.to_owned(),
            };
        }
        Self {
            api_version: text("apiVersion").to_owned(),
            kind: kind.to_owned(),
            name: name.to_owned(),
        }
    }

    /// The workload as a reference, `kubernetes://apis/apps/v1/namespaces/NS/deployments/NAME`.
    pub(crate) fn reference(&self, namespace: &str) -> String {
        format!(
            "kubernetes://apis/{}/namespaces/{namespace}/{}s/{}",
            self.api_version,
            self.kind.to_ascii_lowercase(),
            self.name
        )
    }
}
