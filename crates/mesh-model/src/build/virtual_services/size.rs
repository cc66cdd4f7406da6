//! What the rules of a VirtualService come to in the route tables of proxies, and how much of that one object may make.

use mesh_api::networking::virtual_service::HttpRoute;

use crate::problem::Reporter;
use crate::rules::{MESH_GATEWAY, VirtualService};
use crate::{Mesh, Severity, hostname};

/// Destinations in all routes of all virtual hosts that one VirtualService may come to; a proxy's table holds each of them, at about one KiB.
/// The largest object that a Kubernetes API takes could make 160 million.
pub(super) const MOST: usize = 100_000;

/// Destinations in the routes of a rule: one route for each condition, in each all destinations.
pub(super) fn of_rule(rule: &HttpRoute) -> usize {
    let destinations = rule.route.len() + rule.mirrors.len() + usize::from(rule.mirror.is_some());
    rule.matches
        .len()
        .max(1)
        .saturating_mul(destinations.max(1))
}

/// Takes the HTTP rules out where they come to too much.
pub(super) fn check(rule: &mut VirtualService, mesh: &Mesh, report: &mut Reporter<'_>) {
    let routes = rule.http.iter().map(of_rule).fold(0, usize::saturating_add);
    // The hosts of a gateway share their routes, those of sidecars have one list each.
    let hosts = match rule.is_bound_to(MESH_GATEWAY) {
        true => virtual_hosts(rule, mesh),
        false => 1,
    };
    if routes.saturating_mul(hosts) <= MOST {
        return;
    }
    let message = format!(
        "these rules come to {routes} destinations (for each condition all destinations) on {hosts} hosts, more than the {MOST} that one VirtualService may come to; none of them has effect. Divide the object, or take out hosts, conditions or destinations"
    );
    report.report(Severity::Error, Some("IST0106"), "spec.http", message);
    rule.http.clear();
}

/// Virtual hosts in a sidecar's table of one port.
fn virtual_hosts(rule: &VirtualService, mesh: &Mesh) -> usize {
    let of_host = |host: &String| match hostname::is_wildcard(host) {
        true => {
            let services = mesh.services.keys();
            services
                .filter(|service| hostname::covers(host, service))
                .count()
                .max(1)
        }
        false => 1,
    };
    rule.hosts.iter().map(of_host).sum()
}
