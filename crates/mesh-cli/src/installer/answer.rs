//! Whether the control plane answers when the API server asks its webhooks.
//!
//! Each is asked for something that only it refuses, and nothing of that is kept: so its refusal shows that it was reached, and any other end
//! that it was not.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::objects::Session;
use super::tags::label_of;
use crate::install::webhooks::TAG;
use crate::install::{Component, DEFAULT_REVISION, Plan};

/// Name of what is asked for.
const PROBE: &str = "mesh-install-probe";

/// What stands between the API server and the webhooks of a control plane; none if they answer.
pub(super) async fn missing(
    session: &Session<'_>,
    plan: &Plan,
    component: &Component,
) -> anyhow::Result<Option<String>> {
    let has = |kind: &str| {
        let mut all = component.objects.iter();
        all.any(|object| object["kind"] == kind && label_of(object, TAG).is_empty())
    };
    if has("ValidatingWebhookConfiguration")
        && let Some(trouble) = validation(session, plan).await?
    {
        return Ok(Some(trouble));
    }
    if has("MutatingWebhookConfiguration") {
        return injection(session, plan, component).await;
    }
    Ok(None)
}

/// A policy about an attribute that there is not.
async fn validation(session: &Session<'_>, plan: &Plan) -> anyhow::Result<Option<String>> {
    let namespace = &plan.namespace;
    for version in ["v1", "v1beta1"] {
        let group = format!("security.istio.io/{version}");
        let path = format!("/apis/{group}/namespaces/{namespace}/authorizationpolicies");
        // Another mesh's kinds, or none at all, may be here.
        if session.cluster.read_optional(&path).await?.is_none() {
            continue;
        }
        let policy = json!({
            "apiVersion": group, "kind": "AuthorizationPolicy",
            "metadata": { "name": PROBE, "namespace": namespace, "labels": { "istio.io/rev": plan.revision } },
            "spec": { "rules": [{ "when": [{ "key": PROBE, "values": ["x"] }] }] },
        });
        let refused = ask(session, &path, &policy).await?;
        return Ok(trouble("validation.istio.io", &refused));
    }
    Ok(None)
}

/// A pod that asks for a sidecar in a way that means nothing.
async fn injection(
    session: &Session<'_>,
    plan: &Plan,
    component: &Component,
) -> anyhow::Result<Option<String>> {
    if session.default_tag && plan.revision == DEFAULT_REVISION {
        // Its webhooks stand back.
        return Ok(None);
    }
    let namespace = &plan.namespace;
    let place = format!("/api/v1/namespaces/{namespace}");
    let labels = json!({ "istio.io/rev": plan.revision, "sidecar.istio.io/inject": PROBE });
    let found = session.cluster.read(&place).await?;
    let map = |labels: &Value| -> BTreeMap<String, String> {
        serde_json::from_value(labels.clone()).unwrap_or_default()
    };
    let called = mesh_inject::webhook_revision(&map(&found["metadata"]["labels"]), &map(&labels));
    if called.as_ref() != Some(&plan.revision) {
        // The namespace's own labels keep the injector out of it.
        return Ok(None);
    }
    let account = component
        .objects
        .iter()
        .find(|object| object["kind"] == "ServiceAccount")
        .map_or(Value::Null, |object| object["metadata"]["name"].clone());
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": PROBE, "namespace": namespace, "labels": labels },
        "spec": {
            "serviceAccountName": account,
            "automountServiceAccountToken": false,
            "containers": [{ "name": "probe", "image": PROBE }],
        },
    });
    let refused = ask(session, &format!("{place}/pods"), &pod).await?;
    Ok(trouble("sidecar-injector.istio.io", &refused))
}

/// Why the server does not take an object; empty if it would.
async fn ask(session: &Session<'_>, path: &str, object: &Value) -> anyhow::Result<String> {
    let url = format!("{path}?dryRun=All");
    let headers = [("content-type", "application/json")];
    let body = serde_json::to_vec(object)?;
    let answer = session.cluster.request("POST", &url, &headers, body).await;
    Ok(answer
        .err()
        .map_or_else(String::new, |error| format!("{error:#}")))
}

/// What is wrong with an end that is not a webhook's refusal.
fn trouble(webhook: &str, refused: &str) -> Option<String> {
    let by_webhook = refused
        .split("admission webhook \"")
        .skip(1)
        .filter_map(|rest| rest.split_once("\" denied the request"))
        .any(|(name, _)| name == webhook || name.ends_with(&format!(".{webhook}")));
    if by_webhook {
        return None;
    }
    if refused.is_empty() {
        return Some(format!(
            "the API server did not ask the control plane's webhook {webhook}: something that it refuses would have been taken; see that nobody else changes its configuration"
        ));
    }
    let advice = if !refused.contains("calling webhook") {
        "the API server itself refused it"
    } else if refused.contains("no endpoints available") {
        "no pod of the control plane is ready behind its Service: its log says why"
    } else if refused.contains("x509")
        || refused.contains("tls:")
        || refused.contains("certificate")
    {
        "the control plane's certificate is not the one that the webhook's caBundle trusts: it writes the bundle itself, its log says why it did not; delete whatever else writes there"
    } else if refused.contains("connection refused") {
        "nothing answers at port 15017 of the control plane's pods, or a firewall between refuses: let the API server connect to it"
    } else if refused.contains("deadline exceeded")
        || refused.contains("i/o timeout")
        || refused.contains("Timeout exceeded")
        || refused.contains("no route to host")
    {
        "nothing comes back from port 15017 of the control plane's pods: let the API server connect to it (firewall, NetworkPolicy)"
    } else {
        "let the API server connect to port 15017 of the control plane's pods; its log says more"
    };
    Some(format!(
        "the API server gets no answer from the control plane's webhook {webhook}, so that what the mesh is for can't be applied: {refused}; {advice}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_refusal_of_the_webhook_is_an_answer() {
        let calling = |why: &str| {
            format!(
                "Error from server (InternalError): Internal error occurred: failed calling webhook \"rev.validation.istio.io\": failed to call webhook: Post \"https://istiod.istio-system.svc:443/validate?timeout=10s\": {why}"
            )
        };
        for (refused, part) in [
            (String::new(), "did not ask"),
            (calling("dial tcp 10.96.7.7:443: connect: connection refused"), "a firewall between refuses"),
            (calling("no endpoints available for service \"istiod\""), "no pod of the control plane is ready"),
            (calling("tls: failed to verify certificate: x509: certificate signed by unknown authority"), "caBundle trusts"),
            (calling("context deadline exceeded"), "nothing comes back"),
            (calling("an error on the server (\"\") has prevented the request from succeeding"), "its log says more"),
            ("Error from server (ServiceUnavailable): etcd is away".to_owned(), "itself refused it"),
            ("Error from server (Forbidden): pods \"x\" is forbidden: exceeded quota".to_owned(), "itself refused it"),
            ("Error from server (Forbidden): admission webhook \"other.example\" denied the request: no".to_owned(), "itself refused it"),
        ] {
            let text = trouble("validation.istio.io", &refused).expect(&refused);
            assert!(text.contains(part), "{text}");
        }
        let denied = "Error from server (BadRequest): admission webhook \"rev.validation.istio.io\" denied the request: configuration is invalid";
        assert_eq!(trouble("validation.istio.io", denied), None);
        assert!(trouble("sidecar-injector.istio.io", denied).is_some());
    }

    /// What is asked for is what our control plane refuses.
    #[test]
    fn the_probe_is_refused() {
        let spec = json!({ "rules": [{ "when": [{ "key": PROBE, "values": ["x"] }] }] });
        let policy = json!({ "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": { "name": PROBE, "namespace": "x" }, "spec": spec });
        let parsed = mesh_api::parse(&policy).expect("an object");
        let errors = mesh_api::validate(&parsed);
        assert!(
            errors
                .iter()
                .any(|finding| finding.severity == mesh_api::Severity::Error)
        );
    }
}
