//! Rules for ServiceEntry, WorkloadEntry, WorkloadGroup and ProxyConfig.

use std::collections::HashSet;

use crate::networking::service_entry::{Resolution, ServicePort};
use crate::networking::workload_group::ReadinessProbe;
use crate::networking::{ProxyConfig, ServiceEntry, WorkloadEntry, WorkloadGroup};

use super::{Check, Validate, names};

impl Validate for ServiceEntry {
    fn validate(&self, check: &mut Check) {
        check.require(
            !self.hosts.is_empty(),
            "hosts",
            "a ServiceEntry needs at least one host",
        );
        check.each("hosts", &self.hosts, |check, host| match host.as_str() {
            "*" => check.error(
                "\"*\" would stand for every host there is; name a domain, such as *.example.com",
            ),
            host => {
                if let Err(message) = names::wildcard_host(host) {
                    check.error(message);
                }
            }
        });
        check.each("addresses", &self.addresses, |check, address| {
            if let Err(message) = names::cidr(address) {
                check.error(message);
            } else if address.contains('/')
                && !matches!(self.resolution, Resolution::None | Resolution::Static)
            {
                check.error("a block of addresses goes with resolution NONE or STATIC only");
            }
        });
        for (field, length, limit) in [
            ("hosts", self.hosts.len(), 256),
            ("addresses", self.addresses.len(), 256),
            ("ports", self.ports.len(), 256),
            ("endpoints", self.endpoints.len(), 4096),
        ] {
            check.require(
                length <= limit,
                field,
                &format!("{length} entries; at most {limit} are allowed"),
            );
        }
        service_ports(self, check);
        protocols(self, check);
        service_endpoints(self, check);
        check.part("workloadSelector", &self.workload_selector);
        names::export_to(&self.export_to, true, check);
    }
}

fn service_ports(entry: &ServiceEntry, check: &mut Check) {
    let mut numbers = HashSet::new();
    let mut port_names = HashSet::new();
    check.each("ports", &entry.ports, |check, port| {
        names::port(port.number, "number", check);
        check.require(!port.name.is_empty(), "name", "a port needs a name");
        check.require(
            numbers.insert(port.number),
            "number",
            "this number is there twice",
        );
        check.require(
            port_names.insert(&port.name),
            "name",
            "this name is there twice",
        );
        if port.target_port != 0 {
            names::port(port.target_port, "targetPort", check);
        }
        names::protocol(&port.protocol, "protocol", check);
    });
}

/// Hosts that share addresses are told apart by what requests and handshakes say.
fn protocols(entry: &ServiceEntry, check: &mut Check) {
    let named = |port: &ServicePort| {
        let protocol = port.protocol.to_ascii_uppercase();
        matches!(
            protocol.as_str(),
            "HTTP" | "HTTP2" | "HTTPS" | "TLS" | "GRPC" | "GRPC-WEB" | "HTTP_PROXY"
        )
    };
    let dynamic = entry.resolution == Resolution::DynamicDns;
    let several = entry.hosts.len() > 1 && entry.resolution != Resolution::None;
    check.each("ports", &entry.ports, |check, port| {
        let protocol = port.protocol.to_ascii_uppercase();
        if dynamic && !matches!(protocol.as_str(), "HTTP" | "HTTP2" | "GRPC" | "TLS") {
            check.error_at(
                "protocol",
                "DYNAMIC_DNS finds the host in the request or handshake: HTTP, HTTP2, GRPC or TLS",
            );
        } else if several && !named(port) {
            check.error_at("protocol", "with several hosts a port needs a protocol that names the host (HTTP, HTTP2, GRPC, HTTPS or TLS), or resolution NONE");
        }
    });
}

fn service_endpoints(entry: &ServiceEntry, check: &mut Check) {
    let wildcard = entry.hosts.iter().any(|host| host.contains('*'));
    if entry.workload_selector.is_some() && !entry.endpoints.is_empty() {
        check.error_at(
            "endpoints",
            "endpoints and workloadSelector exclude each other",
        );
    }
    match entry.resolution {
        Resolution::None => check.require(
            entry.endpoints.is_empty(),
            "endpoints",
            "resolution NONE takes no endpoints",
        ),
        Resolution::Dns | Resolution::DnsRoundRobin if wildcard && entry.endpoints.is_empty() => {
            check.error_at("endpoints", "a wildcard host can't be resolved; list endpoints, or use resolution NONE or DYNAMIC_DNS");
        }
        Resolution::DnsRoundRobin => check.require(
            entry.endpoints.len() <= 1,
            "endpoints",
            "DNS_ROUND_ROBIN takes one endpoint",
        ),
        Resolution::DynamicDns => {
            check.require(wildcard, "hosts", "DYNAMIC_DNS is for wildcard hosts");
            check.require(
                entry.endpoints.is_empty(),
                "endpoints",
                "DYNAMIC_DNS takes no endpoints",
            );
            check.require(
                entry.addresses.is_empty(),
                "addresses",
                "DYNAMIC_DNS takes no addresses",
            );
        }
        _ => {}
    }
    check.each("endpoints", &entry.endpoints, |check, endpoint| {
        endpoint.validate(check);
        for name in endpoint.ports.keys() {
            let known = entry.ports.iter().any(|port| port.name == *name);
            check.require(
                known,
                &format!("ports[{name}]"),
                "no port of this object has the name",
            );
        }
        let resolved = matches!(
            entry.resolution,
            Resolution::Dns | Resolution::DnsRoundRobin
        );
        if resolved && endpoint.address.starts_with("unix://") {
            check.error_at(
                "address",
                "a unix socket can't be resolved; use resolution STATIC",
            );
        }
        let literal = endpoint.address.parse::<std::net::IpAddr>().is_ok()
            || endpoint.address.starts_with("unix://");
        if entry.resolution == Resolution::Static && !literal {
            check.error_at(
                "address",
                "resolution STATIC needs an IP address or a unix socket",
            );
        }
        if endpoint.address.starts_with("unix://") && entry.ports.len() != 1 {
            check.error_at(
                "address",
                "a unix socket goes with exactly one service port",
            );
        }
    });
}

impl Validate for WorkloadEntry {
    fn validate(&self, check: &mut Check) {
        if self.address.is_empty() && self.network.is_empty() {
            check.error_at("address", "an address or a network is needed");
        } else if let Some(path) = self.address.strip_prefix("unix://") {
            check.require(
                path.starts_with('/') || path.starts_with('@'),
                "address",
                "a unix socket is unix:///path or unix://@name",
            );
            check.require(self.ports.is_empty(), "ports", "a unix socket has no ports");
        } else if !self.address.is_empty()
            && self.address.parse::<std::net::IpAddr>().is_err()
            && !names::is_fqdn(&self.address)
        {
            check.error_at(
                "address",
                format!(
                    "{:?} is not an IP address, a host name or a unix socket",
                    self.address
                ),
            );
        }
        workload_parts(self, check);
    }
}

fn workload_parts(entry: &WorkloadEntry, check: &mut Check) {
    for (name, port) in &entry.ports {
        names::port(*port, &format!("ports[{name}]"), check);
    }
    names::labels("labels", &entry.labels, check);
}

impl Validate for WorkloadGroup {
    fn validate(&self, check: &mut Check) {
        match &self.template {
            None => check.error_at("template", "a WorkloadGroup needs a template"),
            Some(template) => check.at("template", |check| workload_parts(template, check)),
        }
        names::labels("metadata.labels", &self.metadata.labels, check);
        if let Some(probe) = &self.probe {
            let given = [
                probe.http_get.is_some(),
                probe.tcp_socket.is_some(),
                probe.exec.is_some(),
                probe.grpc.is_some(),
            ];
            let count = given.iter().filter(|given| **given).count();
            check.require(
                count == 1,
                "probe",
                "exactly one of httpGet, tcpSocket, exec and grpc has to be given",
            );
            check.at("probe", |check| readiness(probe, check));
        }
    }
}

fn readiness(probe: &ReadinessProbe, check: &mut Check) {
    for (field, value) in [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("periodSeconds", probe.period_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ] {
        check.require(value >= 0, field, "can't be negative");
    }
    if let Some(get) = &probe.http_get {
        names::port(get.port, "httpGet.port", check);
        check.require(
            matches!(get.scheme.as_str(), "" | "HTTP" | "HTTPS"),
            "httpGet.scheme",
            "HTTP or HTTPS",
        );
    }
    if let Some(socket) = &probe.tcp_socket {
        names::port(socket.port, "tcpSocket.port", check);
    }
    if let Some(exec) = &probe.exec {
        check.require(
            !exec.command.is_empty(),
            "exec.command",
            "a command is needed",
        );
    }
}

impl Validate for ProxyConfig {
    fn validate(&self, check: &mut Check) {
        check.part("selector", &self.selector);
        check.require(
            self.concurrency.unwrap_or(0) >= 0,
            "concurrency",
            "a number of threads can't be negative",
        );
    }
}
