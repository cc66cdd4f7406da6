//! Kubernetes Services joined with their EndpointSlices and pods.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::core::{self, EndpointSlice, IntOrString};

use super::created;
use crate::objects::{Name, Objects};
use crate::service::{Endpoint, Health, Service, ServicePort, TargetPort, Workload};
use crate::{Mesh, Protocol, Visibility, hostname};

/// Annotation that says which namespaces see a service.
const EXPORT_TO: &str = "networking.istio.io/exportTo";

pub(crate) fn build(objects: &Objects, mesh: &Mesh) -> BTreeMap<String, Arc<Service>> {
    let mut slices: BTreeMap<Name, Vec<&EndpointSlice>> = BTreeMap::new();
    for slice in objects.slices.values() {
        if let Some(service) = slice.service_name() {
            slices
                .entry((slice.meta.namespace.clone(), service.to_owned()))
                .or_default()
                .push(slice);
        }
    }
    let join = Join::new(mesh);
    let mut services = BTreeMap::new();
    for (name, object) in &objects.services {
        let mut service = service(object, mesh);
        let none = Vec::new();
        service.endpoints = join.endpoints(&service, slices.get(name).unwrap_or(&none));
        services.insert(service.host.clone(), Arc::new(service));
    }
    services
}

fn service(object: &core::Service, mesh: &Mesh) -> Service {
    let meta = &object.meta;
    let spec = &object.spec;
    let exported = meta
        .annotations
        .get(EXPORT_TO)
        .map(String::as_str)
        .unwrap_or_default();
    let external_name = (spec.service_type == "ExternalName").then(|| {
        spec.external_name
            .trim_end_matches('.')
            .to_ascii_lowercase()
    });
    Service {
        host: hostname::service_fqdn(&meta.name, &meta.namespace, &mesh.domain),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        created: created(meta),
        addresses: addresses(spec),
        headless: object.is_headless(),
        external_name,
        selector: spec.selector.clone(),
        ports: spec.ports.iter().filter_map(port).collect(),
        visibility: Visibility::parse(
            exported.split(','),
            &mesh.config.default_service_export_to,
            &meta.namespace,
        ),
        endpoints: BTreeMap::new(),
    }
}

fn addresses(spec: &core::ServiceSpec) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = Vec::new();
    for address in std::iter::once(&spec.cluster_ip)
        .chain(&spec.cluster_ips)
        .filter_map(|address| address.parse().ok())
    {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// UDP ports are left to the kernel, SCTP ones too.
fn port(port: &core::ServicePort) -> Option<ServicePort> {
    if !port.protocol.is_empty() && !port.protocol.eq_ignore_ascii_case("TCP") {
        return None;
    }
    let target = match &port.target_port {
        Some(IntOrString::Int(number)) if *number > 0 => {
            TargetPort::Number(u16::try_from(*number).ok()?)
        }
        Some(IntOrString::String(name)) if !name.is_empty() => name
            .parse()
            .map_or_else(|_| TargetPort::Name(name.clone()), TargetPort::Number),
        _ => TargetPort::Number(port.port),
    };
    Some(ServicePort {
        number: port.port,
        name: port.name.clone(),
        protocol: Protocol::of_port(
            &port.protocol,
            port.app_protocol.as_deref(),
            &port.name,
            port.port,
        ),
        target,
    })
}

/// What endpoints are joined with.
struct Join<'a> {
    mesh: &'a Mesh,
    by_address: BTreeMap<IpAddr, &'a Arc<Workload>>,
}

impl<'a> Join<'a> {
    fn new(mesh: &'a Mesh) -> Self {
        let by_address = mesh
            .workloads
            .values()
            .filter_map(|workload| Some((workload.address?, workload)))
            .collect();
        Self { mesh, by_address }
    }

    /// Endpoints per service port, ordered by address; an endpoint that several slices hold (while it moves) counts once, ready first.
    fn endpoints(
        &self,
        service: &Service,
        slices: &[&EndpointSlice],
    ) -> BTreeMap<u16, Vec<Endpoint>> {
        let mut by_port: BTreeMap<u16, Vec<Endpoint>> = BTreeMap::new();
        for slice in slices.iter().filter(|slice| slice.address_type != "FQDN") {
            for port in &service.ports {
                let Some(number) = endpoint_port(slice, port) else {
                    continue;
                };
                let found = slice
                    .endpoints
                    .iter()
                    .filter_map(|endpoint| self.endpoint(slice, endpoint, number));
                by_port.entry(port.number).or_default().extend(found);
            }
        }
        for endpoints in by_port.values_mut() {
            endpoints.sort_by_key(|endpoint| (endpoint.address, endpoint.port, endpoint.health));
            endpoints.dedup_by_key(|endpoint| (endpoint.address, endpoint.port));
        }
        by_port
    }

    /// `None` for endpoints that take no traffic at all.
    fn endpoint(
        &self,
        slice: &EndpointSlice,
        endpoint: &core::Endpoint,
        port: u16,
    ) -> Option<Endpoint> {
        let conditions = &endpoint.conditions;
        let draining = conditions.terminating == Some(true) && conditions.serving == Some(true);
        let health = match (conditions.is_ready(), draining) {
            (true, _) => Health::Ready,
            (false, true) => Health::Draining,
            (false, false) => return None,
        };
        let address: IpAddr = endpoint.addresses.first()?.parse().ok()?;
        let pod = endpoint
            .target_ref
            .as_ref()
            .filter(|target| target.kind == "Pod");
        let workload = match pod {
            Some(target) => {
                let namespace = if target.namespace.is_empty() {
                    &slice.meta.namespace
                } else {
                    &target.namespace
                };
                self.mesh.workload(namespace, &target.name)
            }
            None => self.by_address.get(&address).copied(),
        };
        let locality = workload
            .map(|workload| workload.locality.clone())
            .unwrap_or_default();
        Some(Endpoint {
            address,
            port,
            health,
            locality,
            workload: workload.cloned(),
        })
    }
}

/// The number of a service port on the endpoints of a slice: ports of slices have the names of the service's ports.
fn endpoint_port(slice: &EndpointSlice, port: &ServicePort) -> Option<u16> {
    let tcp = |protocol: &str| protocol.is_empty() || protocol.eq_ignore_ascii_case("TCP");
    let found = slice
        .ports
        .iter()
        .find(|candidate| candidate.name == port.name && tcp(&candidate.protocol))?;
    found.port.filter(|number| *number != 0)
}
