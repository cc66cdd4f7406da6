//! Whether a pod gets a sidecar.

use std::collections::BTreeMap;

use crate::annotations::parse_bool;
use crate::{InjectContext, InjectError, PodView, STATUS_ANNOTATION, Skip};

const INJECT: &str = "sidecar.istio.io/inject";
const SYSTEM_NAMESPACES: &[&str] = &[
    "kube-system",
    "kube-public",
    "kube-node-lease",
    "local-path-storage",
];

/// The reason not to inject, if there is one; the first rule that says something decides.
pub(crate) fn skip(
    pod: &PodView<'_>,
    context: &InjectContext<'_>,
) -> Result<Option<Skip>, InjectError> {
    if pod
        .spec
        .get("hostNetwork")
        .and_then(serde_json::Value::as_bool)
        == Some(true)
    {
        return Ok(Some(Skip::HostNetwork));
    }
    if is_windows(pod) {
        return Ok(Some(Skip::Windows));
    }
    if SYSTEM_NAMESPACES.contains(&context.namespace) {
        return Ok(Some(Skip::SystemNamespace));
    }
    if is_injected(pod) {
        return Ok(Some(Skip::AlreadyInjected));
    }
    if let Some(asked) = pod
        .label(INJECT)
        .or_else(|| pod.annotation(INJECT))
        .filter(|value| !value.is_empty())
    {
        let asked = parse_bool(INJECT, asked)?;
        return Ok(if asked { None } else { Some(Skip::AskedNotTo) });
    }
    let labels = pod.labels();
    if context
        .config
        .never_inject
        .iter()
        .any(|selector| selector.matches(&labels))
    {
        return Ok(Some(Skip::NeverSelected));
    }
    if context
        .config
        .always_inject
        .iter()
        .any(|selector| selector.matches(&labels))
    {
        return Ok(None);
    }
    Ok(if context.config.enabled {
        None
    } else {
        Some(Skip::PolicyDisabled)
    })
}

/// Whether all that an earlier injection says that it added is there.
fn is_injected(pod: &PodView<'_>) -> bool {
    let status: Option<serde_json::Value> = pod
        .annotation(STATUS_ANNOTATION)
        .and_then(|text| serde_json::from_str(text).ok());
    let Some(status) = status else {
        return false;
    };
    let names: Vec<&serde_json::Value> = ["initContainers", "containers"]
        .iter()
        .filter_map(|list| status.get(*list)?.as_array())
        .flatten()
        .collect();
    let there = |name: &&serde_json::Value| {
        name.as_str()
            .is_some_and(|name| pod.container(name).is_some())
    };
    // A template of users may add no container at all; then the revision tells.
    (!names.is_empty() || status.get("revision").is_some()) && names.iter().all(there)
}

/// Whether a pod can only run on Windows: by its declared system, or by the nodes that it wants.
fn is_windows(pod: &PodView<'_>) -> bool {
    let named = |value: Option<&serde_json::Value>| value.is_some_and(|value| value == "windows");
    let selected = |label: &str| named(pod.spec.get("nodeSelector").and_then(|s| s.get(label)));
    named(pod.spec.get("os").and_then(|os| os.get("name")))
        || selected("kubernetes.io/os")
        || selected("beta.kubernetes.io/os")
}

/// The revision whose webhook is called for a pod, by the labels of its namespace and its own; `None` for no webhook.
pub fn webhook_revision(
    namespace_labels: &BTreeMap<String, String>,
    pod_labels: &BTreeMap<String, String>,
) -> Option<String> {
    let pod = |name: &str| pod_labels.get(name).map(String::as_str);
    let refused = pod(INJECT) == Some("false");
    match (
        namespace_labels.get("istio-injection").map(String::as_str),
        namespace_labels.get("istio.io/rev"),
    ) {
        (Some("enabled"), _) => (!refused).then(|| "default".to_owned()),
        (Some(_), _) => None,
        (None, Some(revision)) => (!refused).then(|| revision.clone()),
        (None, None) => match (pod(INJECT), pod("istio.io/rev")) {
            (Some("false"), _) => None,
            (_, Some(revision)) => Some(revision.to_owned()),
            (Some("true"), None) => Some("default".to_owned()),
            _ => None,
        },
    }
}
