//! Policies as nobody would write them, and what wins among several.

use mesh_model::{Mesh, MtlsMode, Node};
use mesh_translate::translate;
use serde_json::{Value, json};

use crate::case::{Case, item, objects};
use crate::golden::{bootstrap, snapshot};

const ODD: &[&str] = &[
    "",
    "*",
    "**",
    "(",
    "[",
    "]",
    "a*b",
    "*a*",
    "{*}",
    "/{**}/x",
    "/a{*}",
    "/x/{*}/{**}",
    "%",
    "a b",
    "é",
    "\\",
    "/",
    "//",
    "spiffe://",
    "a/b/c/d/e",
    "*/ns/a/sa/b",
    "10.0.0.0/8",
    "10.0.0.0/99",
    "::/0",
    "70000",
    "[a]",
];

fn policy(name: &str, action: &str, rule: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": name, "namespace": "default" }, "spec": { "action": action, "rules": [rule] },
    })
}

/// One rule per odd text, in every field.
fn rules() -> Vec<Value> {
    let mut rules = Vec::new();
    for odd in ODD {
        let one = json!([odd]);
        for field in [
            "principals",
            "requestPrincipals",
            "namespaces",
            "serviceAccounts",
            "trustDomains",
            "ipBlocks",
            "remoteIpBlocks",
            "notPrincipals",
            "notIpBlocks",
        ] {
            rules.push(json!({ "from": [{ "source": { field: one } }] }));
        }
        for field in ["hosts", "methods", "paths", "ports", "notPaths", "notPorts"] {
            rules.push(json!({ "to": [{ "operation": { field: one } }] }));
        }
        for key in [
            "request.headers[x]",
            "request.headers[]",
            "request.headers[foo bar]",
            "request.headers[:foo]",
            "request.headers[é]",
            "request.headers[:path]",
            "request.auth.claims[a]",
            "request.auth.claims[]",
            "request.auth.claims[a][]",
            "request.auth.claims",
            "request.auth.audiences",
            "source.ip",
            "destination.ip",
            "destination.port",
            "connection.sni",
            "experimental.envoy.filters.a[b]",
            "experimental.envoy.filters.a[]",
            "no.such.attribute",
        ] {
            rules.push(json!({ "when": [{ "key": key, "values": one, "notValues": one }] }));
        }
    }
    rules
}

/// Whatever came past validation, one refused filter would cost the node its whole listener.
#[test]
fn odd_policies_are_taken_by_the_proxy() {
    let case = Case::named("protocols-inbound");
    let folder = std::env::var_os("ENVOY_BOOTSTRAPS").map(std::path::PathBuf::from);
    for action in ["ALLOW", "DENY", "AUDIT"] {
        // Only the chains of ports without a service, and only those of strict mode: each has all policies.
        let mut raw = vec![json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": { "name": "strict", "namespace": "default" }, "spec": { "mtls": { "mode": "STRICT" } },
        })];
        for (index, rule) in rules().iter().enumerate() {
            raw.push(policy(&format!("p{index}"), action, rule));
        }
        for odd in ODD {
            raw.push(json!({
                "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
                "metadata": { "name": format!("r{}", raw.len()), "namespace": "default" },
                "spec": { "jwtRules": [{
                    "issuer": odd, "jwks": odd, "audiences": [odd], "fromHeaders": [{ "name": odd, "prefix": odd }], "fromParams": [odd],
                    "fromCookies": [odd], "outputPayloadToHeader": odd, "outputClaimToHeaders": [{ "header": odd, "claim": odd }],
                }] },
            }));
        }
        let mesh = Mesh::build(&objects(&raw));
        let resources = translate(&mesh, &case.node);
        snapshot(&resources, action);
        if let Some(folder) = &folder {
            let stock = Node {
                stock_envoy: true,
                ..case.node.clone()
            };
            let text = bootstrap(&translate(&mesh, &stock)).to_string();
            std::fs::write(folder.join(format!("odd-{action}.json")), text).unwrap();
        }
    }
}

#[test]
fn the_narrowest_mode_of_mutual_tls_wins() {
    let peer = |namespace: &str, name: &str, spec: Value| {
        item(&json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": { "name": name, "namespace": namespace }, "spec": spec,
        }))
    };
    let mut objects = objects(&[]);
    let labels = [("app".to_owned(), "a".to_owned())].into();
    let none = Default::default();
    let mode =
        |objects: &mesh_model::Objects, port| Mesh::build(objects).mtls("default", &labels, port);
    assert_eq!(mode(&objects, 1), MtlsMode::Permissive);
    objects.upsert(peer(
        "istio-system",
        "mesh",
        json!({ "mtls": { "mode": "STRICT" } }),
    ));
    assert_eq!(mode(&objects, 1), MtlsMode::Strict);
    objects.upsert(peer(
        "default",
        "namespace",
        json!({ "mtls": { "mode": "UNSET" } }),
    ));
    assert_eq!(mode(&objects, 1), MtlsMode::Strict);
    objects.upsert(peer(
        "default",
        "namespace",
        json!({ "mtls": { "mode": "DISABLE" } }),
    ));
    assert_eq!(mode(&objects, 1), MtlsMode::Disable);
    let selector = json!({ "matchLabels": { "app": "a" } });
    let ports = json!({ "1": { "mode": "STRICT" }, "2": { "mode": "UNSET" } });
    objects.upsert(peer(
        "default",
        "workload",
        json!({ "selector": selector, "mtls": { "mode": "PERMISSIVE" }, "portLevelMtls": ports }),
    ));
    assert_eq!(mode(&objects, 1), MtlsMode::Strict);
    assert_eq!(mode(&objects, 2), MtlsMode::Permissive);
    let mesh = Mesh::build(&objects);
    assert_eq!(mesh.mtls("default", &none, 1), MtlsMode::Disable);
    assert_eq!(mesh.mtls("other", &labels, 1), MtlsMode::Strict);
}

/// A port of undeclared protocol takes requests, which the authorizer judges, and other connections, which pass one that speaks HTTP by (as in
/// Istio); the policy says so.
#[test]
fn an_authorizer_over_http_judges_the_requests_of_a_port_of_any_protocol() {
    let chains = |provider: &str, rule: Value| {
        let case = Case::named("protocols-inbound");
        let raw = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": { "name": "ask", "namespace": "default" },
            "spec": { "action": "CUSTOM", "provider": { "name": provider }, "rules": [rule] },
        });
        let mut all = case.objects;
        all.upsert(item(&raw));
        let place = json!({ "service": "default/server", "port": 80 });
        let config = json!({ "extensionProviders": [
            { "name": "web", "envoyExtAuthzHttp": place }, { "name": "rpc", "envoyExtAuthzGrpc": place },
        ] });
        all.set_mesh_config(mesh_api::mesh_config::MeshConfig::from_value(&config).unwrap());
        let resources = translate(&Mesh::build(&all), &case.node);
        let listeners = bootstrap(&resources)["static_resources"]["listeners"].clone();
        let listeners = listeners.as_array().unwrap();
        let inbound = listeners
            .iter()
            .find(|listener| listener["name"] == "virtualInbound")
            .unwrap();
        let of_port = inbound["filter_chains"].as_array().unwrap().iter();
        let of_port: Vec<(bool, bool)> = of_port
            .filter(|chain| chain["filter_chain_match"]["destination_port"] == 9999)
            .map(|chain| {
                let text = chain["filters"].to_string();
                (
                    text.contains("http_connection_manager"),
                    text.contains("ext_authz"),
                )
            })
            .collect();
        let problems: Vec<String> = resources.problems.iter().map(ToString::to_string).collect();
        (of_port, problems.join("\n"))
    };
    let (over_http, problems) = chains("web", json!({}));
    let kinds = |is_http: bool| over_http.iter().filter(move |(http, _)| *http == is_http);
    assert!(
        kinds(true).count() >= 2 && kinds(false).count() >= 2,
        "{over_http:?}"
    );
    assert!(over_http.iter().all(|(http, asked)| http == asked));
    assert!(
        problems.starts_with("Warning (AuthorizationPolicy default/ask spec.provider.name)")
            && problems.contains("(port 3306, 8080, 9999)")
            && !problems.contains("5000"),
        "{problems}"
    );
    let (over_grpc, problems) = chains("rpc", json!({}));
    assert!(over_grpc.iter().all(|(_, asked)| *asked), "{over_grpc:?}");
    assert_eq!(problems, "");
    let elsewhere = json!({ "to": [{ "operation": { "ports": ["5000"] } }] });
    assert_eq!(chains("web", elsewhere).1, "");
}
