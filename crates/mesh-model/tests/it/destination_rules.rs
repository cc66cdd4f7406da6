//! Which rule holds for whom, and what of it.

use mesh_api::networking::destination_rule::{ClientTlsMode, ProxyProtocolVersion};
use mesh_model::{DestinationRule, Mesh, Node, Severity};
use serde_json::json;

use super::mesh;

const HOST: &str = "a.prod.svc.cluster.local";
const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: { name: a, namespace: prod }\nspec: { clusterIP: 10.96.0.1, ports: [{ name: http, port: 80 }] }\n---\n";

fn rule(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{ name: {name}, namespace: {namespace}, creationTimestamp: \"2026-01-01T00:00:00Z\" }}\nspec: {{ host: {HOST}, {spec} }}\n---\n"
    )
}

fn node(namespace: &str, app: &str) -> Node {
    Node::from_xds_id(
        &format!("sidecar~10.244.0.9~client.{namespace}~{namespace}.svc.cluster.local"),
        &json!({ "LABELS": { "app": app } }),
    )
    .unwrap()
}

fn connections(rule: &DestinationRule) -> i32 {
    let pool = rule.policy("", 80).connection_pool;
    pool.and_then(|pool| pool.tcp.as_ref())
        .map_or(0, |tcp| tcp.max_connections)
}

fn limit(connections: u32) -> String {
    format!("trafficPolicy: {{ connectionPool: {{ tcp: {{ maxConnections: {connections} }} }} }}")
}

fn found(mesh: &Mesh, namespace: &str, app: &str) -> Option<(Vec<String>, i32)> {
    let rule = mesh.destination_rule_for(HOST, &node(namespace, app))?;
    let names = rule.keys.iter().map(|key| key.name.clone()).collect();
    Some((names, connections(rule)))
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_selector_makes_a_rule_for_some_clients_of_its_namespace() {
    let selected = format!(
        "workloadSelector: {{ matchLabels: {{ app: web }} }}, exportTo: [\".\"], {}",
        limit(1)
    );
    let mesh = mesh(
        &[
            SERVICE.to_owned(),
            rule("everyone", "prod", &limit(2)),
            rule("some", "client", &selected),
        ]
        .concat(),
    );
    assert_eq!(found(&mesh, "client", "web"), Some((names(&["some"]), 1)));
    assert_eq!(
        found(&mesh, "client", "other"),
        None,
        "the client's namespace has rules for the host, and none of them is for this client"
    );
    assert_eq!(
        found(&mesh, "elsewhere", "web"),
        Some((names(&["everyone"]), 2))
    );
}

#[test]
fn selected_clients_get_what_both_rules_say() {
    let selected = "workloadSelector: { matchLabels: { app: web } }, exportTo: [\".\"], subsets: [{ name: v2 }]";
    let mesh = mesh(
        &[
            SERVICE.to_owned(),
            rule("a", "prod", &format!("exportTo: [\".\"], {}", limit(3))),
            rule("b", "prod", selected),
        ]
        .concat(),
    );
    let web = mesh
        .destination_rule_for(HOST, &node("prod", "web"))
        .unwrap();
    assert!(web.subsets.contains_key("v2"));
    let other = mesh
        .destination_rule_for(HOST, &node("prod", "other"))
        .unwrap();
    assert_eq!(connections(other), 3);
    assert!(mesh.problems().is_empty(), "{:?}", mesh.problems());
}

#[test]
fn rules_that_others_see_do_not_merge_into_private_ones() {
    let mesh = mesh(
        &[
            SERVICE.to_owned(),
            rule("a-public", "prod", &limit(1)),
            rule(
                "b-private",
                "prod",
                "exportTo: [\".\"], subsets: [{ name: v1 }]",
            ),
        ]
        .concat(),
    );
    let outside = mesh
        .destination_rule_for(HOST, &node("elsewhere", "x"))
        .unwrap();
    assert_eq!((connections(outside), outside.subsets.len()), (1, 0));
    assert_eq!(mesh.destination_rules(HOST, "prod").len(), 2);
}

#[test]
fn clients_in_the_root_namespace_prefer_the_services_rules() {
    let mesh_wide = rule("wide", "istio-system", &limit(1));
    let of_service = rule("own", "prod", &limit(2));
    let private = rule(
        "private",
        "istio-system",
        &format!("exportTo: [\".\"], {}", limit(3)),
    );
    let both = mesh(&[SERVICE, &mesh_wide, &of_service].concat());
    assert_eq!(
        found(&both, "istio-system", "gateway"),
        Some((names(&["own"]), 2))
    );
    let with_private = mesh(&[SERVICE, &private, &of_service].concat());
    assert_eq!(
        found(&with_private, "istio-system", "gateway"),
        Some((names(&["private"]), 3))
    );
    let alone = mesh(&[SERVICE, &mesh_wide].concat());
    assert_eq!(
        found(&alone, "istio-system", "gateway"),
        Some((names(&["wide"]), 1))
    );
}

#[test]
fn settings_of_ports_replace_and_those_of_subsets_override_part_by_part() {
    let spec = "trafficPolicy: { connectionPool: { tcp: { maxConnections: 1 } }, outlierDetection: { interval: 3s }, retryBudget: { percent: 5 }, \
                portLevelSettings: [{ port: { number: 81 }, connectionPool: { tcp: { maxConnections: 2 } } }] }, \
                subsets: [{ name: s, trafficPolicy: { connectionPool: { tcp: { maxConnections: 3 } } } }]";
    let mesh = mesh(&[SERVICE, &rule("r", "prod", spec)].concat());
    let rule = mesh.destination_rule(HOST, "prod").unwrap();
    let seen = |subset: &str, port: u16| {
        let policy = rule.policy(subset, port);
        let tcp = policy.connection_pool.and_then(|pool| pool.tcp.as_ref());
        (
            tcp.map_or(0, |tcp| tcp.max_connections),
            policy.outlier_detection.is_some(),
            policy.retry_budget.is_some(),
        )
    };
    assert_eq!(seen("", 80), (1, true, true));
    assert_eq!(seen("", 81), (2, false, true));
    assert_eq!(seen("s", 80), (3, true, true));
    assert_eq!(seen("s", 81), (3, false, true));
}

#[test]
fn tunnels_and_proxy_headers_are_the_hosts_or_the_subsets() {
    let spec = "trafficPolicy: { tunnel: { targetHost: a.example, targetPort: 1 }, proxyProtocol: { version: V2 }, \
                portLevelSettings: [{ port: { number: 81 }, tls: { mode: DISABLE } }] }, \
                subsets: [{ name: own, trafficPolicy: { tunnel: { targetHost: b.example, targetPort: 2 }, proxyProtocol: {} } }, \
                { name: plain, labels: { a: b } }]";
    let mesh = mesh(&[SERVICE, &rule("r", "prod", spec)].concat());
    assert_eq!(mesh.problems(), []);
    let rule = mesh.destination_rule(HOST, "prod").unwrap();
    let tunnel = |subset| rule.tunnel(subset).map(|tunnel| tunnel.target_port);
    assert_eq!(tunnel(""), Some(1));
    assert_eq!(tunnel("own"), Some(2));
    assert_eq!((tunnel("plain"), tunnel("unknown")), (None, None));
    let version = |subset, port| {
        let given = rule.policy(subset, port).proxy_protocol;
        given.map(|given| given.version)
    };
    assert_eq!(version("", 80), Some(ProxyProtocolVersion::V2));
    assert_eq!(version("plain", 80), Some(ProxyProtocolVersion::V2));
    assert_eq!(version("", 81), None);
    assert_eq!(version("own", 81), Some(ProxyProtocolVersion::V1));
}

#[test]
fn what_is_not_applied_is_named() {
    let spec = "trafficPolicy: { tls: { mode: SIMPLE }, \
                loadBalancer: { backendUtilization: {} }, outlierDetection: { outlierDetectionHttpErrorCodes: [429] }, \
                portLevelSettings: [{ port: { number: 81 }, tls: { mode: ISTIO_MUTUAL, credentialName: x } }, { loadBalancer: { simple: RANDOM } }] }, \
                subsets: [{ name: s, trafficPolicy: { tls: { mode: DISABLE } } }]";
    let mesh = mesh(&[SERVICE, &rule("r", "prod", spec)].concat());
    let problems: Vec<_> = mesh
        .problems()
        .iter()
        .map(|problem| (problem.field.as_str(), problem.severity))
        .collect();
    let warning = Severity::Warning;
    assert_eq!(
        problems,
        [
            (
                "spec.trafficPolicy.loadBalancer.backendUtilization",
                warning
            ),
            (
                "spec.trafficPolicy.outlierDetection.outlierDetectionHttpErrorCodes",
                warning
            ),
            (
                "spec.trafficPolicy.portLevelSettings[0].tls.credentialName",
                warning
            ),
            (
                "spec.trafficPolicy.portLevelSettings[1].port",
                Severity::Error
            ),
        ]
    );
    let rule = mesh.destination_rule(HOST, "prod").unwrap();
    let mode = |subset: &str, port: u16| rule.policy(subset, port).tls.unwrap().mode;
    assert_eq!(mode("", 80), ClientTlsMode::Simple);
    assert_eq!(mode("s", 80), ClientTlsMode::Disable);
    assert_eq!(mode("", 81), ClientTlsMode::IstioMutual);
}
