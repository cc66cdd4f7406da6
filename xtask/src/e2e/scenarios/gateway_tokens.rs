//! Tokens at the ingress gateway: without one nobody is let in, and claims lead to different places.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::samples::with;
use super::tokens::{ISSUER, Key, claims};
use crate::e2e::cluster::Cluster;
use crate::e2e::http::{self, Client};

const HOST: &str = "claims.example.com";

/// Who tests sees the details, who is of a blue team a text of its own, everybody else nothing.
const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: claims, namespace: default}
spec:
  hosts: [claims.example.com]
  gateways: [bookinfo-gateway]
  http:
  - match: [{headers: {'@request.auth.claims.groups': {exact: testers}}}]
    route: [{destination: {host: details, port: {number: 9080}}}]
  - match: [{headers: {'@request.auth.claims[walk.test/team][nickName]': {prefix: blue}}, withoutHeaders: {'@request.auth.claims.role': {exact: guest}}}]
    directResponse: {status: 200, body: {string: blue}}
  - directResponse: {status: 404, body: {string: nobody}}
";

fn authentication(keys: &str) -> String {
    format!(
        "
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: claims, namespace: istio-system}}
spec:
  selector: {{matchLabels: {{istio: ingressgateway}}}}
  jwtRules: [{{issuer: {ISSUER}, jwks: '{keys}'}}]
"
    )
}

/// Refuses requests for the host that have no token, at the proxies that `whom` says.
fn needed(whom: &str) -> String {
    format!(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: claims, namespace: istio-system}}
spec:
  {whom}
  action: DENY
  rules: [{{from: [{{source: {{notRequestPrincipals: ['*']}}}}], to: [{{operation: {{hosts: [{HOST}], ports: ['8080']}}}}]}}]
"
    )
}

/// Waits until these tokens (none where it is empty) are answered so.
fn answered(cluster: &Cluster, what: &str, rows: &[(&str, u16, &str)]) -> anyhow::Result<()> {
    let client = Client::new(&cluster.gateway);
    let runtime = http::runtime()?;
    cluster.wait(what, || {
        for (token, status, text) in rows {
            let value = format!("Bearer {token}");
            let mut headers = vec![("host", HOST)];
            if !token.is_empty() {
                headers.push(("authorization", value.as_str()));
            }
            let answer = runtime.block_on(client.get("/details/0", &headers))?;
            ensure!(
                answer.status == *status && answer.body.contains(text),
                "{token:?}: {status} with {text:?} was expected, {} came: {}",
                answer.status,
                answer.body
            );
        }
        Ok(Some(()))
    })
}

const DENIED: &str = "RBAC: access denied";
const DETAILS: &str = "William Shakespeare";

/// No token, no entrance; a bad one is refused; good ones lead to where their claims say. A policy with a target is for that Gateway's proxies.
pub(super) fn routed(cluster: &mut Cluster) -> anyhow::Result<()> {
    let key = Key::new()?;
    let token = |other: Value| key.token(&claims(&other)?);
    let tester = token(json!({"groups": "testers"}))?;
    let several = token(json!({"groups": ["a", "testers"]}))?;
    let other = token(json!({"groups": "tester", "GROUPS": "testers"}))?;
    let blue = token(json!({"walk.test/team": {"nickName": "blues"}}))?;
    let guest = token(json!({"walk.test/team": {"nickName": "blues"}, "role": "guest"}))?;
    let stranger = Key::new()?.token(&claims(&json!({"groups": "testers"}))?)?;
    let authentication = authentication(&key.set()?);
    with(cluster, &[&authentication, ROUTES], |cluster| {
        let open = [
            ("", 404, "nobody"),
            (&tester, 200, DETAILS),
            (&several, 200, DETAILS),
            (&other, 404, "nobody"),
            (&blue, 200, "blue"),
            (&guest, 404, "nobody"),
            (&stranger, 401, "Jwt verification fails"),
        ];
        answered(cluster, "claims to lead", &open)?;
        cluster.apply(&needed("selector: {matchLabels: {istio: ingressgateway}}"))?;
        let mut shut = open;
        shut[0] = ("", 403, DENIED);
        answered(cluster, "a token to be needed", &shut)?;
        cluster.pages(1).context("pages of another host")?;
        let target =
            needed("targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: walk}]");
        cluster.apply(&target)?;
        answered(cluster, "the policy to be for another Gateway", &open)?;
        named(
            cluster,
            &json!({"gateway.networking.k8s.io/gateway-name": "walk"}),
        )?;
        answered(cluster, "the policy to be for this Gateway", &shut)?;
        named(cluster, &json!({}))?;
        answered(cluster, "the policy to be for another Gateway again", &open)?;
        cluster.delete_all(&target)
    })
}

/// Gives labels to the gateway's pod; those of the call before that are not among them are taken away.
fn named(cluster: &Cluster, labels: &Value) -> anyhow::Result<()> {
    let pods = cluster.get(&[
        "pods",
        "-n",
        "istio-system",
        "-l",
        "app=istio-ingressgateway",
    ])?;
    let name = &pods["items"][0]["metadata"]["name"];
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "istio-system", "labels": labels},
    });
    cluster.apply(&pod.to_string()).map(drop)
}
