//! Tags as the cluster has them, and who answers where no revision is named.
//!
//! That is the revision `default`, unless there is a tag of this name: then the webhooks of the revision `default` stand back.

use serde_json::{Value, json};

use super::objects::is_ours;
use crate::cluster::{Cluster, query};
use crate::install::webhooks::{Injector, TAG, Tag, never, of_revision, ways};
use crate::install::{COMPONENT, DEFAULT_REVISION, MANAGED_BY, Plan};

const MUTATING: &str = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations";
const VALIDATING: &str = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";
/// Where Istio's kinds of webhook configurations are.
const PLACES: [(&str, &str); 2] = [
    (MUTATING, "MutatingWebhookConfiguration"),
    (VALIDATING, "ValidatingWebhookConfiguration"),
];

/// A webhook configuration of a tag, with its path.
pub(crate) struct Live {
    pub(crate) tag: String,
    pub(crate) revision: String,
    pub(crate) path: String,
    pub(crate) object: Value,
}

impl Live {
    /// Whether pods are injected by it; else it validates.
    pub(crate) fn injects(&self) -> bool {
        self.path.starts_with(MUTATING)
    }
}

/// All configurations of tags, those that inject first.
pub(crate) async fn list(cluster: &Cluster) -> anyhow::Result<Vec<Live>> {
    let mut found = Vec::new();
    for (place, kind) in PLACES {
        for object in configurations(cluster, place, kind, TAG).await? {
            let text = |label: &str| label_of(&object, label).to_owned();
            found.push(Live {
                tag: text(TAG),
                revision: text("istio.io/rev"),
                path: path(place, &object),
                object,
            });
        }
    }
    Ok(found)
}

/// The injectors' configurations of revisions.
pub(crate) async fn injectors(cluster: &Cluster) -> anyhow::Result<Vec<Value>> {
    let selector = format!("app=sidecar-injector,istio.io/rev,!{TAG}");
    configurations(cluster, MUTATING, PLACES[0].1, &selector).await
}

async fn configurations(
    cluster: &Cluster,
    place: &str,
    kind: &str,
    selector: &str,
) -> anyhow::Result<Vec<Value>> {
    let path = format!("{place}?labelSelector={}", query(selector));
    let mut list = cluster.read(&path).await?;
    let items = list["items"].as_array_mut().map(std::mem::take);
    let typed = |mut item: Value| {
        // Items of a list don't say what they are.
        item["kind"] = json!(kind);
        item
    };
    Ok(items.unwrap_or_default().into_iter().map(typed).collect())
}

fn path(place: &str, object: &Value) -> String {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    format!("{place}/{name}")
}

pub(crate) fn label_of<'a>(object: &'a Value, label: &str) -> &'a str {
    object["metadata"]["labels"][label]
        .as_str()
        .unwrap_or_default()
}

/// The injector that a configuration calls, as it is in the cluster or in a plan.
pub(crate) fn injector(configuration: &Value) -> Option<Injector> {
    let first = configuration["webhooks"].as_array()?.first()?;
    let mut client_config = first["clientConfig"].clone();
    // Of a Service's certificate the control plane takes care, here and there.
    if client_config["service"].is_object() {
        client_config
            .as_object_mut()
            .and_then(|config| config.remove("caBundle"));
    }
    let mut all = configuration["webhooks"].as_array()?.iter();
    Some(Injector {
        client_config,
        reinvocation: first["reinvocationPolicy"]
            .as_str()
            .unwrap_or("Never")
            .to_owned(),
        auto: all.any(|webhook| way_of(webhook) == "auto"),
    })
}

/// The configurations of a tag that no installation owns: those of `mesh tag`.
pub(crate) fn made_by_hand(tag: &Tag<'_>, injector: &Injector) -> Vec<Value> {
    let mut all = vec![tag.injection(injector)];
    all.extend(tag.validation(&injector.client_config));
    for object in &mut all {
        object["metadata"]["labels"][MANAGED_BY.0] = json!(MANAGED_BY.1);
        object["metadata"]["labels"][COMPONENT] = json!("Pilot");
    }
    all
}

/// Makes the first control plane of a cluster, whatever its revision, the one that answers where none is named (as Istio does).
pub(crate) async fn first_is_default(cluster: &Cluster, plan: &mut Plan) -> anyhow::Result<bool> {
    let is_default = |object: &Value| label_of(object, TAG) == DEFAULT_REVISION;
    if plan.revision == DEFAULT_REVISION || plan.objects().any(is_default) {
        return Ok(false);
    }
    let of_default = |object: &Value| label_of(object, "istio.io/rev") == DEFAULT_REVISION;
    let taken = list(cluster)
        .await?
        .iter()
        .any(|live| live.tag == DEFAULT_REVISION)
        || injectors(cluster).await?.iter().any(of_default);
    let (namespace, revision) = (plan.namespace.clone(), plan.revision.clone());
    let part = plan
        .components
        .iter_mut()
        .find(|component| component.name == "Pilot");
    let Some(part) = part.filter(|_| !taken) else {
        return Ok(false);
    };
    let own = part.objects.iter().find(|object| {
        object["kind"] == "MutatingWebhookConfiguration" && label_of(object, TAG).is_empty()
    });
    let Some(injector) = own.and_then(injector) else {
        return Ok(false);
    };
    let tag = Tag {
        name: DEFAULT_REVISION,
        revision: &revision,
        namespace: &namespace,
    };
    part.objects.extend(made_by_hand(&tag, &injector));
    Ok(true)
}

/// The revision that the tag `default` leads to, if there is one.
pub(crate) async fn default_revision(cluster: &Cluster) -> anyhow::Result<Option<String>> {
    let mut all = list(cluster).await?.into_iter();
    Ok(all
        .find(|live| live.injects() && live.tag == DEFAULT_REVISION)
        .map(|live| live.revision))
}

/// The beginning of a webhook's name, such as `rev.namespace`.
fn way_of(webhook: &Value) -> &str {
    let name = webhook["name"].as_str().unwrap_or_default();
    name.strip_suffix(".sidecar-injector.istio.io")
        .unwrap_or_default()
}

/// Whether a configuration is one of those of the revision `default` that a tag of this name stands in for.
fn is_of_default(object: &Value) -> bool {
    let kind = object["kind"].as_str().unwrap_or_default();
    PLACES.iter().any(|(_, known)| *known == kind)
        && label_of(object, "istio.io/rev") == DEFAULT_REVISION
        && label_of(object, TAG).is_empty()
}

/// Makes a configuration of the revision `default` stand back, before it is applied.
pub(crate) fn stand_back(object: &mut Value) {
    if !is_of_default(object) {
        return;
    }
    let injects = object["kind"] == "MutatingWebhookConfiguration";
    for webhook in object["webhooks"].as_array_mut().into_iter().flatten() {
        if injects {
            webhook["namespaceSelector"] = never();
            webhook["objectSelector"] = never();
        } else {
            webhook["objectSelector"] = of_revision(DEFAULT_REVISION);
        }
    }
}

/// Makes the configurations of the revision `default` that are in the cluster answer again, or stand back.
pub(crate) async fn switch_default(cluster: &Cluster, active: bool) -> anyhow::Result<()> {
    for (place, kind) in PLACES {
        let selector = format!("istio.io/rev={DEFAULT_REVISION},!{TAG}");
        for live in configurations(cluster, place, kind, &selector).await? {
            // What another mesh validates is selected in its own way.
            let known = match place {
                MUTATING => label_of(&live, "app") == "sidecar-injector",
                _ => is_ours(&live),
            };
            if !known {
                continue;
            }
            let operations = operations(&live, active);
            if operations.is_empty() {
                continue;
            }
            let url = format!(
                "{}?fieldManager={}",
                path(place, &live),
                super::objects::FIELD_MANAGER
            );
            let headers = [("content-type", "application/json-patch+json")];
            let body = serde_json::to_vec(&operations)?;
            cluster.request("PATCH", &url, &headers, body).await?;
        }
    }
    Ok(())
}

/// The JSON patch that gives the webhooks of a configuration their selectors.
fn operations(live: &Value, active: bool) -> Vec<Value> {
    let mut away = live.clone();
    stand_back(&mut away);
    let injects = live["kind"] == "MutatingWebhookConfiguration";
    let ways = ways(DEFAULT_REVISION, true);
    let mut operations = Vec::new();
    let present = live["webhooks"].as_array().into_iter().flatten();
    for (index, webhook) in present.enumerate() {
        let back = &away["webhooks"][index];
        let known = ways.iter().find(|(way, _)| *way == way_of(webhook));
        let (namespaces, objects) = match (active, injects, known) {
            (false, ..) => (
                back["namespaceSelector"].clone(),
                back["objectSelector"].clone(),
            ),
            (true, true, Some((_, of))) => (of.namespace.clone(), of.object.clone()),
            (true, false, _) => (Value::Null, json!({})),
            (true, true, None) => continue,
        };
        let mut put = |field: &str, value: Value| {
            if !value.is_null() && webhook[field] != value {
                operations.push(json!({ "op": "test", "path": format!("/webhooks/{index}/name"), "value": webhook["name"] }));
                operations.push(json!({ "op": "add", "path": format!("/webhooks/{index}/{field}"), "value": value }));
            }
        };
        put("namespaceSelector", namespaces);
        put("objectSelector", objects);
    }
    operations
}

/// The namespaces that ask for a tag.
pub(crate) async fn users(cluster: &Cluster, tag: &str) -> anyhow::Result<Vec<String>> {
    let list = cluster.read("/api/v1/namespaces").await?;
    let asks = |namespace: &&Value| match label_of(namespace, "istio-injection") {
        "" => label_of(namespace, "istio.io/rev") == tag,
        "enabled" => tag == DEFAULT_REVISION,
        _ => false,
    };
    let all = list["items"].as_array().into_iter().flatten();
    Ok(all
        .filter(asks)
        .filter_map(|namespace| namespace["metadata"]["name"].as_str())
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::Settings;

    fn own(sets: &[&str]) -> Value {
        let settings = Settings {
            set: sets.iter().map(|set| (*set).to_owned()).collect(),
            ..Settings::default()
        };
        let plan = Plan::new(&settings.spec(None).expect("settings")).expect("plan");
        let mut all = plan.objects();
        all.find(|object| object["kind"] == "MutatingWebhookConfiguration")
            .expect("webhooks")
            .clone()
    }

    /// What stood back and answers again is what it was.
    #[test]
    fn there_and_back() {
        for auto in ["true", "false"] {
            let set = format!("values.sidecarInjectorWebhook.enableNamespacesByDefault={auto}");
            let before = own(&[&set]);
            let mut away = before.clone();
            stand_back(&mut away);
            assert_ne!(before, away);
            assert_eq!(operations(&before, true), Vec::<Value>::new());
            assert_eq!(operations(&away, false), Vec::<Value>::new());
            let mut again = away.clone();
            for operation in operations(&away, true) {
                let path = operation["path"].as_str().expect("path");
                let place = again.pointer_mut(path).expect("there");
                match operation["op"].as_str() {
                    Some("test") => assert_eq!(*place, operation["value"]),
                    _ => *place = operation["value"].clone(),
                }
            }
            assert_eq!(again, before);
        }
    }

    #[test]
    fn other_revisions_never_stand_back() {
        let mut canary = own(&["revision=canary"]);
        let before = canary.clone();
        stand_back(&mut canary);
        assert_eq!(canary, before);
    }
}
