use mesh_api::networking::destination_rule::SimpleLb;
use mesh_model::{DestinationRule, Mesh, Severity};

use super::{item, mesh, objects};

fn destination_rule(name: &str, namespace: &str, host: &str, extra: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec: {{ host: {host:?}, {extra} }}\n---\n"
    )
}

/// The algorithm for a subset and port; LEAST_REQUEST, the default, where none is given.
fn balancer(rule: &DestinationRule, subset: &str, port: u16) -> SimpleLb {
    let given = rule.policy(subset, port).load_balancer;
    match given.and_then(|settings| settings.simple) {
        None | Some(SimpleLb::LeastConn) => SimpleLb::LeastRequest,
        Some(simple) => simple,
    }
}

fn service(name: &str, namespace: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec: {{ clusterIP: 10.96.0.1, ports: [{{ name: http, port: 80 }}] }}\n---\n"
    )
}

#[test]
fn destination_rules_are_looked_up_client_first_then_service_then_root() {
    let lb = |simple: &str| format!("trafficPolicy: {{ loadBalancer: {{ simple: {simple} }} }}");
    let host = "a.prod.svc.cluster.local";
    let text = [
        service("a", "prod"),
        destination_rule("client", "client", host, &lb("RANDOM")),
        destination_rule("service", "prod", "a", &lb("ROUND_ROBIN")),
        destination_rule(
            "private",
            "hidden",
            host,
            &format!("exportTo: [other], {}", lb("RANDOM")),
        ),
        destination_rule("root-wide", "istio-system", "*.local", &lb("LEAST_CONN")),
        destination_rule(
            "root-narrow",
            "istio-system",
            "*.prod.svc.cluster.local",
            &lb("RANDOM"),
        ),
    ]
    .concat();
    let mesh = mesh(&text);
    let found = |host: &str, client: &str| {
        mesh.destination_rule(host, client)
            .map(|rule| (rule.keys[0].name.clone(), balancer(rule, "", 80)))
    };
    assert_eq!(
        found(host, "client"),
        Some(("client".to_owned(), SimpleLb::Random))
    );
    assert_eq!(
        found(host, "elsewhere"),
        Some(("service".to_owned(), SimpleLb::RoundRobin))
    );
    assert_eq!(
        found(host, "hidden"),
        Some(("service".to_owned(), SimpleLb::RoundRobin)),
        "not exported to its own namespace"
    );
    assert_eq!(
        found("b.prod.svc.cluster.local", "elsewhere"),
        Some(("root-narrow".to_owned(), SimpleLb::Random))
    );
    assert_eq!(
        found("b.test.svc.cluster.local", "elsewhere"),
        Some(("root-wide".to_owned(), SimpleLb::LeastRequest))
    );
    assert_eq!(found("example.com", "elsewhere"), None);
}

#[test]
fn policies_of_ports_and_subsets_override() {
    let policy = "trafficPolicy: { loadBalancer: { simple: RANDOM }, portLevelSettings: [{ port: { number: 81 }, loadBalancer: { simple: ROUND_ROBIN } }, { port: { number: 82 } }] }, \
                  subsets: [{ name: plain }, { name: own, trafficPolicy: { loadBalancer: { simple: LEAST_REQUEST } } }]";
    let mesh = mesh(
        &[
            service("a", "prod"),
            destination_rule("x", "prod", "a", policy),
        ]
        .concat(),
    );
    let rule = mesh
        .destination_rule("a.prod.svc.cluster.local", "prod")
        .unwrap();
    assert_eq!(balancer(rule, "", 80), SimpleLb::Random);
    assert_eq!(balancer(rule, "plain", 81), SimpleLb::RoundRobin);
    assert_eq!(
        balancer(rule, "", 82),
        SimpleLb::LeastRequest,
        "settings of a port replace the policy"
    );
    assert_eq!(balancer(rule, "own", 81), SimpleLb::LeastRequest);
}

#[test]
fn rules_of_one_host_merge_whatever_their_order() {
    let first = destination_rule(
        "a",
        "prod",
        "a",
        "subsets: [{ name: v1, labels: { version: v1 } }]",
    );
    let second = destination_rule(
        "b",
        "prod",
        "a.prod.svc.cluster.local",
        "trafficPolicy: { loadBalancer: { simple: RANDOM } }, subsets: [{ name: v2 }, { name: v1, labels: { version: other } }]",
    );
    let forward = mesh(&[first.as_str(), &second].concat());
    let backward = mesh(&[second.as_str(), &first].concat());
    assert_eq!(forward, backward);
    let rule = forward
        .destination_rule("a.prod.svc.cluster.local", "prod")
        .unwrap();
    assert_eq!(rule.subsets.keys().collect::<Vec<_>>(), ["v1", "v2"]);
    assert_eq!(rule.subsets["v1"].labels["version"], "v1");
    assert_eq!(balancer(rule, "v2", 80), SimpleLb::Random);
}

#[test]
fn visibility_and_gateways_of_virtual_services() {
    let rule = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: r, namespace: prod }\n\
                spec: { hosts: [a], exportTo: [\".\"], gateways: [mesh, gw, other/gw], http: [{ route: [{ destination: { host: a } }] }] }\n---\n";
    let mesh = mesh(&[service("a", "prod"), rule.to_owned()].concat());
    assert_eq!(mesh.sidecar_virtual_services("prod").count(), 1);
    assert_eq!(mesh.sidecar_virtual_services("test").count(), 0);
    assert_eq!(mesh.gateway_virtual_services("prod/gw", "prod").count(), 1);
    assert_eq!(mesh.gateway_virtual_services("other/gw", "prod").count(), 1);
    assert_eq!(mesh.gateway_virtual_services("gw", "prod").count(), 0);
    let rule = mesh.sidecar_virtual_services("prod").next().unwrap();
    assert_eq!(rule.hosts, ["a.prod.svc.cluster.local"]);
    assert_eq!(
        rule.http[0].route[0]
            .destination
            .port
            .as_ref()
            .unwrap()
            .number,
        80,
        "the only port is filled in"
    );
    let missing: Vec<_> = mesh
        .problems()
        .iter()
        .map(|problem| (problem.field.as_str(), problem.severity, problem.code))
        .collect();
    assert_eq!(
        missing,
        [
            ("spec.gateways[1]", Severity::Error, Some("IST0101")),
            ("spec.gateways[2]", Severity::Error, Some("IST0101"))
        ]
    );
}

#[test]
fn one_bad_object_does_not_stop_the_others() {
    let bad = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: bad, namespace: prod }\n\
               spec: { hosts: [\"a*b\", \"\"], http: [{ match: [{ uri: { regex: \"[\" } }], route: [{ destination: { host: a } }] }, {}, { route: [{ destination: { host: a }, weight: -1 }] }] }\n---\n";
    let mut objects = objects(&[service("a", "prod"), bad.to_owned()].concat());
    let good = destination_rule("good", "prod", "a", "subsets: [{ name: v1 }]");
    objects.upsert(item(&mesh_api::yaml::documents(&good, "good").unwrap()[0]));
    let mesh = Mesh::build(&objects);
    assert!(
        mesh.destination_rule("a.prod.svc.cluster.local", "prod")
            .is_some()
    );
    let rule = mesh.sidecar_virtual_services("prod").next().unwrap();
    assert_eq!((rule.hosts.len(), rule.http.len()), (0, 0));
    let fields: Vec<_> = mesh
        .problems()
        .iter()
        .map(|problem| problem.field.as_str())
        .collect();
    assert_eq!(
        fields,
        [
            "spec.hosts[0]",
            "spec.hosts[1]",
            "spec.http[0].match[0].uri.regex",
            "spec.http[1]",
            "spec.http[2].route"
        ]
    );
}

/// Rules that come to more than a proxy's table may hold are refused as a whole, with the count; others go on.
#[test]
fn rules_of_one_object_have_a_limit() {
    let rules = |name: &str, hosts: usize, rules: usize, conditions: usize, gateway: &str| {
        let hosts: Vec<String> = (0..hosts).map(|i| format!("h{i}.example.com")).collect();
        let conditions: Vec<String> = (0..conditions)
            .map(|i| format!("{{ uri: {{ exact: /{i} }} }}"))
            .collect();
        let rule = format!(
            "{{ match: [{}], route: [{{ destination: {{ host: a }} }}] }}",
            conditions.join(", ")
        );
        format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: {name}, namespace: prod }}\nspec: {{ hosts: [{}], gateways: [{gateway}], http: [{}] }}\n---\n",
            hosts.join(", "),
            vec![rule; rules].join(", ")
        )
    };
    let text = [
        service("a", "prod"),
        rules("many-hosts", 101, 10, 100, "mesh"),
        rules("fits", 100, 10, 100, "mesh"),
        rules("shared-by-hosts", 200, 10, 100, "g"),
    ]
    .concat();
    let mesh = mesh(&text);
    let kept = |name: &str| {
        let sidecars = mesh.sidecar_virtual_services("prod");
        let mut all = sidecars.chain(mesh.gateway_virtual_services("prod/g", "prod"));
        all.find(|rule| rule.key.name == name).unwrap().http.len()
    };
    assert_eq!(kept("many-hosts"), 0);
    assert_eq!(kept("fits"), 10);
    assert_eq!(kept("shared-by-hosts"), 10);
    let found: Vec<_> = mesh
        .problems()
        .iter()
        .filter(|problem| problem.field == "spec.http")
        .collect();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].severity, Severity::Error);
    assert!(
        found[0].message.contains("1000 destinations") && found[0].message.contains("101 hosts"),
        "{}",
        found[0].message
    );
}

/// A delegate multiplies the conditions of its roots: that is counted before it is done.
#[test]
fn delegates_have_the_same_limit() {
    let conditions = |count: usize| -> String {
        let all: Vec<String> = (0..count)
            .map(|i| format!("{{ headers: {{ x-{i}: {{ exact: z }} }} }}"))
            .collect();
        all.join(", ")
    };
    let text = format!(
        "{}apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: root, namespace: prod }}\nspec: {{ hosts: [a], http: [{{ match: [{}], delegate: {{ name: part }} }}, {{ route: [{{ destination: {{ host: a }} }}] }}] }}\n---\n\
         apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: part, namespace: prod }}\nspec: {{ http: [{{ match: [{}], route: [{{ destination: {{ host: a }} }}] }}] }}\n",
        service("a", "prod"),
        conditions(400),
        conditions(400),
    );
    let mesh = mesh(&text);
    let root = mesh.sidecar_virtual_services("prod").next().unwrap();
    assert_eq!(root.http.len(), 1, "what does not delegate stays");
    let found = mesh
        .problems()
        .iter()
        .find(|problem| problem.field == "spec.http[0].delegate")
        .unwrap();
    assert!(found.message.contains("100000"), "{}", found.message);
}
