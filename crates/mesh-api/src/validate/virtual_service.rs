//! Rules for VirtualService.

mod http;
mod shadow;

pub use http::is_retry_condition;

use crate::StringMatch;
use crate::networking::VirtualService;
use crate::networking::virtual_service::{Destination, RouteDestination};

use super::{Check, Validate, names};

/// Name that stands for all sidecars in a list of gateways.
const MESH: &str = "mesh";

impl Validate for VirtualService {
    fn validate(&self, check: &mut Check) {
        names::export_to(&self.export_to, false, check);
        if self.hosts.is_empty() {
            delegate(self, check);
        } else {
            hosts(self, check);
        }
        check.each("gateways", &self.gateways, |check, name| {
            gateway(name, check)
        });
        if self.http.is_empty() && self.tls.is_empty() && self.tcp.is_empty() {
            check.warn("no http, tls or tcp rules, so it does nothing");
        }
        let in_mesh =
            self.gateways.is_empty() || self.gateways.iter().any(|gateway| gateway == MESH);
        check.each("http", &self.http, |check, route| {
            http::route(route, self, in_mesh, check)
        });
        shadow::find(&self.http, check);
        check.each("tls", &self.tls, |check, route| {
            check.require(
                !route.matches.is_empty(),
                "match",
                "a TLS rule needs a match with sniHosts",
            );
            check.each("match", &route.matches, |check, entry| {
                check.require(
                    !entry.sni_hosts.is_empty(),
                    "sniHosts",
                    "server names are needed",
                );
                check.each("sniHosts", &entry.sni_hosts, |check, name| {
                    sni_host(name, &self.hosts, check)
                });
                subnets("destinationSubnets", &entry.destination_subnets, check);
                names::labels("sourceLabels", &entry.source_labels, check);
            });
            destinations(&route.route, check);
        });
        check.each("tcp", &self.tcp, |check, route| {
            check.each("match", &route.matches, |check, entry| {
                subnets("destinationSubnets", &entry.destination_subnets, check);
                names::labels("sourceLabels", &entry.source_labels, check);
            });
            destinations(&route.route, check);
        });
    }
}

fn delegate(service: &VirtualService, check: &mut Check) {
    for (field, empty) in [
        ("gateways", service.gateways.is_empty()),
        ("tls", service.tls.is_empty()),
        ("tcp", service.tcp.is_empty()),
    ] {
        check.require(empty, field, "a VirtualService without hosts is a delegate, which has http rules only; write hosts, or leave this out");
    }
    if service.http.is_empty() {
        check.error_at("hosts", "at least one host is needed");
    }
}

fn hosts(service: &VirtualService, check: &mut Check) {
    let in_mesh =
        service.gateways.is_empty() || service.gateways.iter().any(|gateway| gateway == MESH);
    for (index, host) in service.hosts.iter().enumerate() {
        check.at(&format!("hosts[{index}]"), |check| {
            if let Err(message) = names::wildcard_host(host) {
                check.error(message);
            }
            if host == "*" && in_mesh {
                check.error("\"*\" can't be routed for all sidecars; name hosts, or name gateways without \"mesh\"");
            }
            let overlap = service.hosts[..index].iter().find(|other| names::hosts_overlap(other, host));
            if let Some(other) = overlap {
                check.error(format!("{host:?} overlaps with {other:?}; keep one of them"));
            }
        });
    }
}

fn gateway(name: &str, check: &mut Check) {
    let parts: Vec<&str> = name.split('/').collect();
    match parts.as_slice() {
        [name] if names::is_dns_label(name) => {}
        [name] if names::is_fqdn(name) => {
            check.warn(format!("{name:?} is an old form; write namespace/name"))
        }
        [namespace, name]
            if (names::is_dns_label(namespace) || *namespace == ".")
                && names::is_dns_subdomain(name) => {}
        _ => check.error(format!(
            "{name:?} is not a gateway; write name or namespace/name"
        )),
    }
}

fn sni_host(name: &str, hosts: &[String], check: &mut Check) {
    if name.parse::<std::net::IpAddr>().is_ok() {
        return check.warn(format!(
            "{name:?} is an address; clients send no server name for addresses"
        ));
    }
    if let Err(message) = names::wildcard_host(name) {
        check.error(message);
    } else if !hosts.iter().any(|host| names::host_covers(host, name)) {
        check.error(format!(
            "{name:?} is none of this object's hosts; add it to hosts"
        ));
    }
}

fn subnets(field: &str, list: &[String], check: &mut Check) {
    check.each(field, list, |check, subnet| {
        if let Err(message) = names::cidr(subnet) {
            check.error(message);
        }
    });
}

/// Destinations of a TCP or TLS rule.
fn destinations(list: &[RouteDestination], check: &mut Check) {
    check.require(!list.is_empty(), "route", "a rule needs a destination");
    check.each("route", list, |check, entry| {
        check.at("destination", |check| {
            destination(&entry.destination, check)
        });
    });
    weights(list.iter().map(|entry| entry.weight), check);
}

/// Weights are not negative, and not all zero where they matter.
fn weights(list: impl Iterator<Item = i32>, check: &mut Check) {
    let mut total = 0i64;
    let mut count = 0usize;
    for (index, weight) in list.enumerate() {
        check.require(
            weight >= 0,
            &format!("route[{index}].weight"),
            "a weight can't be negative",
        );
        total += i64::from(weight);
        count += 1;
    }
    check.require(
        count < 2 || total > 0,
        "route",
        "with several destinations at least one weight has to be above 0",
    );
}

fn destination(destination: &Destination, check: &mut Check) {
    check.at("host", |check| match destination.host.as_str() {
        "" => check.error("a destination needs a host"),
        host if host.contains('*') => check.error(format!(
            "{host:?} has a wildcard; a destination is one host"
        )),
        host => {
            if let Err(message) = names::wildcard_host(host) {
                check.error(message);
            }
        }
    });
    if !destination.subset.is_empty() {
        check.require(
            names::is_dns_label(&destination.subset),
            "subset",
            "not a name: lower-case letters, digits and '-'",
        );
    }
    if let Some(port) = &destination.port {
        names::port(port.number, "port.number", check);
    }
}

/// A match that has to have a value.
fn string_match(value: Option<&StringMatch>, field: &str, check: &mut Check) {
    match value {
        Some(StringMatch::Present) => check.error_at(field, "empty; write exact, prefix or regex"),
        Some(value) => check.at(field, |check| pattern(value, check)),
        None => {}
    }
}

/// The pattern of a match, where presence is fine.
fn pattern(value: &StringMatch, check: &mut Check) {
    match value {
        StringMatch::Regex(regex) => check.at("regex", |check| names::regex(regex, check)),
        StringMatch::Prefix(prefix) if prefix.is_empty() => {
            check.error_at("prefix", "an empty prefix matches everything; leave it out")
        }
        _ => {}
    }
}
