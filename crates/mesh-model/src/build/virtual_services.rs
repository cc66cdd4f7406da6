//! VirtualServices: names made absolute, references checked, parts that are not applied taken out.

mod delegates;
mod destinations;
mod http;
mod l4;
mod size;

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::networking::VirtualService as Spec;
use mesh_api::validate::is_about_claims;
use mesh_api::{AnyObject, Object};

use self::delegates::Delegates;
use self::destinations::Context;
use super::created;
use crate::problem::Reporter;
use crate::rules::{MESH_GATEWAY, VirtualService};
use crate::{Gateway, Mesh, ObjectKey, Objects, Problem, Severity, Visibility, hostname};

pub(crate) fn build(
    objects: &Objects,
    mesh: &Mesh,
    problems: &mut Vec<Problem>,
) -> Vec<Arc<VirtualService>> {
    let gateways: BTreeMap<String, &Gateway> = mesh
        .gateways
        .iter()
        .map(|gateway| (gateway.reference(), gateway.as_ref()))
        .collect();
    let mut delegates = Delegates::read(objects, mesh, problems);
    let mut rules = Vec::new();
    for (key, object) in &objects.istio {
        if let AnyObject::VirtualService(object) = object.as_ref()
            && !object.spec.hosts.is_empty()
        {
            let mut report = Reporter::new(key, problems);
            let mut rule = virtual_service(key, object, mesh, &mut delegates, &mut report);
            size::check(&mut rule, mesh, &mut report);
            check_gateways(&rule, objects, &gateways, &mut report);
            check_connections(&rule, mesh, &mut report);
            check_claims(&object.spec, &rule, &mut report);
            check_ownership(&rule, mesh, &mut report);
            rules.push(Arc::new(rule));
        }
    }
    delegates.report_unused(problems);
    rules.sort_by(|a, b| (a.created, &a.key).cmp(&(b.created, &b.key)));
    report_conflicts(&rules, problems);
    rules
}

fn virtual_service(
    key: &ObjectKey,
    object: &Object<Spec>,
    mesh: &Mesh,
    delegates: &mut Delegates,
    report: &mut Reporter<'_>,
) -> VirtualService {
    let spec = &object.spec;
    let context = Context {
        namespace: &key.namespace,
        mesh,
        delegate: false,
    };
    let hosts = hosts(spec, key, mesh, report);
    let http = http::rules(&spec.http, &context, report);
    VirtualService {
        key: key.clone(),
        created: created(&object.meta),
        gateways: if spec.gateways.is_empty() {
            vec![MESH_GATEWAY.to_owned()]
        } else {
            gateway_names(&spec.gateways, &key.namespace)
        },
        visibility: visibility(spec, key, mesh),
        http: delegates.expand(http, &key.namespace, report),
        tls: l4::tls_rules(&spec.tls, &hosts, &context, report),
        tcp: l4::tcp_rules(&spec.tcp, &context, report),
        hosts,
    }
}

fn visibility(spec: &Spec, key: &ObjectKey, mesh: &Mesh) -> Visibility {
    Visibility::parse(
        spec.export_to.iter().map(String::as_str),
        &mesh.config.default_virtual_service_export_to,
        &key.namespace,
    )
}

/// Makes hosts absolute; those that no virtual host can have are left out.
fn hosts(spec: &Spec, key: &ObjectKey, mesh: &Mesh, report: &mut Reporter<'_>) -> Vec<String> {
    let mut hosts = Vec::new();
    for (index, host) in spec.hosts.iter().enumerate() {
        let host = hostname::absolute(host, &key.namespace, &mesh.domain);
        if hostname::is_valid(&host) {
            hosts.push(host);
        } else {
            let message = format!(
                "{host:?} is not a host; a wildcard is its whole first label. The host is left out"
            );
            report.report(
                Severity::Error,
                Some("IST0106"),
                format!("spec.hosts[{index}]"),
                message,
            );
        }
    }
    hosts
}

/// Makes names of gateways absolute: `name` and `./name` belong to the namespace of the rule; `name.namespace` and what may follow it is an old form.
fn gateway_names(names: &[String], namespace: &str) -> Vec<String> {
    let absolute = |name: &String| match name.split_once('/') {
        _ if name == MESH_GATEWAY => name.clone(),
        Some((".", name)) => format!("{namespace}/{name}"),
        Some(_) => name.clone(),
        None => {
            let mut labels = name.splitn(3, '.');
            let name = labels.next().unwrap_or_default();
            let of = labels.next().unwrap_or(namespace);
            format!("{of}/{name}")
        }
    };
    names.iter().map(absolute).collect()
}

/// Gateways have to exist and to serve at least one of the hosts.
fn check_gateways(
    rule: &VirtualService,
    objects: &Objects,
    gateways: &BTreeMap<String, &Gateway>,
    report: &mut Reporter<'_>,
) {
    for (index, name) in rule
        .gateways
        .iter()
        .enumerate()
        .filter(|(_, name)| *name != MESH_GATEWAY)
    {
        let field = format!("spec.gateways[{index}]");
        let Some(gateway) = gateways.get(name) else {
            report.not_found(
                field,
                format!("there is no Gateway {name}; nothing is routed there"),
            );
            continue;
        };
        // A gateway of which no server is applied has said so itself.
        let all_applied = match name.split_once('/').and_then(|(namespace, name)| {
            objects
                .istio
                .get(&ObjectKey::new("Gateway", namespace, name))
        }) {
            Some(object) => {
                matches!(object.as_ref(), AnyObject::Gateway(object) if object.spec.servers.len() == gateway.servers.len())
            }
            None => false,
        };
        for (host_index, host) in rule.hosts.iter().enumerate() {
            if all_applied && !serves(gateway, host, &rule.key.namespace) {
                let message = format!(
                    "no server of Gateway {name} has host {host}; requests for it get 404 there"
                );
                report.report(
                    Severity::Warning,
                    Some("IST0132"),
                    format!("spec.hosts[{host_index}]"),
                    message,
                );
            }
        }
    }
}

fn serves(gateway: &Gateway, host: &str, namespace: &str) -> bool {
    let hosts = gateway.servers.iter().flat_map(|server| &server.hosts);
    hosts
        .filter(|(only, _)| only.as_deref().is_none_or(|only| only == namespace))
        .any(|(_, served)| hostname::intersection(served, host).is_some())
}

/// Rules that sidecars of every namespace apply to services of another one: allowed, as in Istio, but nothing that should go unseen.
fn check_ownership(rule: &VirtualService, mesh: &Mesh, report: &mut Reporter<'_>) {
    let own = &rule.key.namespace;
    let is_private = rule.visibility.is_only(own);
    if is_private || !rule.is_bound_to(MESH_GATEWAY) || *own == mesh.config.root_namespace {
        return;
    }
    for (index, host) in rule.hosts.iter().enumerate() {
        let mut covered = match mesh.services.get(host) {
            Some(service) => vec![service],
            None if hostname::is_wildcard(host) => mesh
                .services
                .iter()
                .filter(|(name, _)| hostname::covers(host, name))
                .map(|(_, service)| service)
                .collect(),
            None => Vec::new(),
        };
        covered.retain(|service| service.namespace != *own);
        if let Some(service) = covered.first() {
            let message = format!(
                "{} belongs to namespace {}, and clients of other namespaces than {own} see this rule too; write exportTo: [\".\"] if it is meant for {own}, or let the owner of the service write it",
                service.host, service.namespace
            );
            report.report(
                Severity::Warning,
                None,
                format!("spec.hosts[{index}]"),
                message,
            );
        }
    }
}

/// Rules for TLS and TCP are on the listeners of services in sidecars: without a service there is no listener.
fn check_connections(rule: &VirtualService, mesh: &Mesh, report: &mut Reporter<'_>) {
    // Rules that are for gateways too often name hosts that only clients outside know.
    let sidecars_only = rule.gateways.iter().all(|name| name == MESH_GATEWAY);
    let any_service = || {
        let mut services = mesh.services.keys();
        services.any(|service| {
            rule.hosts
                .iter()
                .any(|host| hostname::covers(host, service))
        })
    };
    if sidecars_only && !(rule.tls.is_empty() && rule.tcp.is_empty()) && !any_service() {
        let message = "no service has any of these names; tls and tcp rules have no effect";
        report.not_found("spec.hosts", message);
    }
}

/// Tokens are judged at gateways: in a sidecar that sends a request nothing is known of its token. Validation refuses such a rule.
fn check_claims(spec: &Spec, rule: &VirtualService, report: &mut Reporter<'_>) {
    if !rule.is_bound_to(MESH_GATEWAY) {
        return;
    }
    for (index, http) in spec.http.iter().enumerate() {
        for (place, item) in http.matches.iter().enumerate() {
            let mut names = item.headers.keys().chain(item.without_headers.keys());
            if let Some(name) = names.find(|name| is_about_claims(name)) {
                let message = format!(
                    "{name}: claims of tokens are known at gateways only; for clients inside the mesh no token has the claim. Write gateways without \"mesh\""
                );
                let field = format!("spec.http[{index}].match[{place}].headers");
                report.report(Severity::Warning, None, field, message);
            }
        }
    }
}

/// In sidecars only the HTTP rules of the oldest object for a host count; those for TLS and TCP are joined.
fn report_conflicts(rules: &[Arc<VirtualService>], problems: &mut Vec<Problem>) {
    let mut first: BTreeMap<&str, Vec<&VirtualService>> = BTreeMap::new();
    let in_sidecars = rules
        .iter()
        .filter(|rule| rule.is_bound_to(MESH_GATEWAY) && !rule.http.is_empty());
    for rule in in_sidecars {
        for (index, host) in rule.hosts.iter().enumerate() {
            let others = first.entry(host).or_default();
            let rival = others.iter().find(|other| {
                other.key != rule.key && overlap(&other.visibility, &rule.visibility)
            });
            if let Some(rival) = rival {
                let message = format!(
                    "{} is for host {host} too and older; in sidecars that one counts, this one has no effect on the host",
                    rival.key
                );
                Reporter::new(&rule.key, problems).report(
                    Severity::Error,
                    Some("IST0109"),
                    format!("spec.hosts[{index}]"),
                    message,
                );
            }
            others.push(rule);
        }
    }
}

fn overlap(a: &Visibility, b: &Visibility) -> bool {
    match (a, b) {
        (Visibility::All, Visibility::All) => true,
        (Visibility::All, Visibility::Namespaces(names))
        | (Visibility::Namespaces(names), Visibility::All) => !names.is_empty(),
        (Visibility::Namespaces(a), Visibility::Namespaces(b)) => !a.is_disjoint(b),
    }
}
