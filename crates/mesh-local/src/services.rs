//! Services with their ready endpoints, kept current by watches: what the service network, DNS and the host's ports are made from.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Namespace and name.
pub type Name = (String, String);

/// What follows a first change within this time is taken together.
const COALESCE: Duration = Duration::from_millis(10);

/// How long a client keeps its endpoint when the Service does not say (Kubernetes, `ClientIPConfig`: three hours).
const AFFINITY: Duration = Duration::from_secs(10_800);

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The name; empty for the only port of a Service.
    pub name: String,
    /// The port of the Service.
    pub port: u16,
    /// The transport protocol.
    pub transport: Transport,
    /// The port on every node's address, for NodePort and LoadBalancer.
    pub node_port: Option<u16>,
    /// Ready endpoints: address and target port, sorted.
    pub endpoints: Vec<(Ipv4Addr, u16)>,
}

/// A pod behind a headless Service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Host {
    /// The pod's address.
    pub address: Ipv4Addr,
    /// The name that the pod has below the Service's, where it has one.
    pub hostname: Option<String>,
}

/// How a Service is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// By its cluster address.
    Cluster,
    /// Also by a port of the node.
    NodePort,
    /// Also by a load balancer, here the host.
    LoadBalancer,
}

/// A Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// How it is reached.
    pub kind: Kind,
    /// The cluster address; `None` for headless Services and external names.
    pub address: Option<Ipv4Addr>,
    /// The name that it is an alias of.
    pub external_name: Option<String>,
    /// The ports.
    pub ports: Vec<Port>,
    /// The ready pods behind it, sorted.
    pub hosts: Vec<Host>,
    /// How long after its last connection a client keeps its endpoint (`sessionAffinity: ClientIP`); `None`: it does not.
    pub affinity: Option<Duration>,
}

/// All Services. Never changes after it is published.
pub type Table = BTreeMap<Name, Entry>;

/// Watches until `shutdown`; a new table is published at once for the first change after a quiet moment.
pub fn watch(client: Client, shutdown: CancellationToken) -> watch::Receiver<Arc<Table>> {
    let (sender, receiver) = watch::channel(Arc::new(Table::new()));
    tokio::spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = keep(client, sender) => {}
        }
    });
    receiver
}

#[derive(Default)]
struct Objects {
    services: BTreeMap<Name, Service>,
    slices: BTreeMap<Name, EndpointSlice>,
}

async fn keep(client: Client, sender: watch::Sender<Arc<Table>>) {
    let services = watcher(
        Api::<Service>::all(client.clone()),
        watcher::Config::default(),
    )
    .default_backoff();
    let slices = watcher(
        Api::<EndpointSlice>::all(client),
        watcher::Config::default(),
    )
    .default_backoff();
    let mut services = std::pin::pin!(services);
    let mut slices = std::pin::pin!(slices);
    let mut objects = Objects::default();
    let (mut fresh_services, mut fresh_slices) = (BTreeMap::new(), BTreeMap::new());
    let mut pending = false;
    loop {
        let quiet = tokio::time::sleep(COALESCE);
        tokio::select! {
            Some(event) = services.next() => {
                pending |= take("Services", event, &mut objects.services, &mut fresh_services);
            }
            Some(event) = slices.next() => {
                pending |= take("EndpointSlices", event, &mut objects.slices, &mut fresh_slices);
            }
            () = quiet, if pending => {
                pending = false;
                let table = table(&objects.services, &objects.slices);
                sender.send_if_modified(|current| {
                    let changed = **current != table;
                    if changed {
                        *current = Arc::new(table);
                    }
                    changed
                });
            }
            else => return,
        }
    }
}

/// Takes one event in; a whole new list replaces what was known when it is complete.
fn take<K: ResourceExt>(
    what: &str,
    event: Result<Event<K>, watcher::Error>,
    known: &mut BTreeMap<Name, K>,
    fresh: &mut BTreeMap<Name, K>,
) -> bool {
    let key = |object: &K| (object.namespace().unwrap_or_default(), object.name_any());
    match event {
        Ok(Event::Apply(object)) => {
            known.insert(key(&object), object);
            true
        }
        Ok(Event::Delete(object)) => known.remove(&key(&object)).is_some(),
        Ok(Event::Init) => {
            fresh.clear();
            false
        }
        Ok(Event::InitApply(object)) => {
            fresh.insert(key(&object), object);
            false
        }
        Ok(Event::InitDone) => {
            *known = std::mem::take(fresh);
            true
        }
        Err(error) => {
            tracing::warn!(%error, "watching {what} failed; it is tried again");
            false
        }
    }
}

/// The table of these objects.
fn table(services: &BTreeMap<Name, Service>, slices: &BTreeMap<Name, EndpointSlice>) -> Table {
    let mut by_service: BTreeMap<Name, Vec<&EndpointSlice>> = BTreeMap::new();
    for ((namespace, _), slice) in slices {
        if let Some(service) = slice.labels().get("kubernetes.io/service-name") {
            by_service
                .entry((namespace.clone(), service.clone()))
                .or_default()
                .push(slice);
        }
    }
    let entry = |name: &Name, service| {
        (
            name.clone(),
            entry(service, by_service.get(name).map_or(&[], Vec::as_slice)),
        )
    };
    services
        .iter()
        .map(|(name, service)| entry(name, service))
        .collect()
}

fn entry(service: &Service, slices: &[&EndpointSlice]) -> Entry {
    let spec = service.spec.clone().unwrap_or_default();
    let kind = match spec.type_.as_deref() {
        Some("LoadBalancer") => Kind::LoadBalancer,
        Some("NodePort") => Kind::NodePort,
        _ => Kind::Cluster,
    };
    let ports = spec
        .ports
        .unwrap_or_default()
        .into_iter()
        .filter_map(|port| {
            let transport = match port.protocol.as_deref() {
                None | Some("TCP") => Transport::Tcp,
                Some("UDP") => Transport::Udp,
                // SCTP needs no more than a kernel module and a rule, but nobody here speaks it.
                Some(_) => return None,
            };
            let name = port.name.unwrap_or_default();
            Some(Port {
                endpoints: endpoints(slices, &name),
                port: u16::try_from(port.port).ok()?,
                node_port: port
                    .node_port
                    .and_then(|p| u16::try_from(p).ok())
                    .filter(|p| *p != 0),
                transport,
                name,
            })
        });
    Entry {
        kind,
        address: spec.cluster_ip.as_deref().and_then(|ip| ip.parse().ok()),
        external_name: (spec.type_.as_deref() == Some("ExternalName"))
            .then_some(spec.external_name)
            .flatten(),
        ports: ports.collect(),
        hosts: hosts(slices),
        affinity: (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
            let seconds = spec
                .session_affinity_config
                .and_then(|c| c.client_ip?.timeout_seconds);
            seconds
                .and_then(|s| u64::try_from(s).ok())
                .map_or(AFFINITY, Duration::from_secs)
        }),
    }
}

/// The ready addresses of a slice with the pods' host names. No condition means ready (Kubernetes, EndpointConditions).
fn ready(slice: &EndpointSlice) -> impl Iterator<Item = (Ipv4Addr, Option<&String>)> {
    let endpoints = slice.endpoints.iter().flatten();
    let ready = endpoints.filter(|endpoint| {
        endpoint
            .conditions
            .as_ref()
            .and_then(|c| c.ready)
            .unwrap_or(true)
    });
    ready.flat_map(|endpoint| {
        let addresses = endpoint
            .addresses
            .iter()
            .filter_map(|address| address.parse().ok());
        addresses.map(|address| (address, endpoint.hostname.as_ref()))
    })
}

fn endpoints(slices: &[&EndpointSlice], port_name: &str) -> Vec<(Ipv4Addr, u16)> {
    let mut found = Vec::new();
    for slice in slices {
        let ports = slice.ports.iter().flatten();
        let ports = ports.filter(|port| port.name.as_deref().unwrap_or_default() == port_name);
        for port in ports.filter_map(|port| u16::try_from(port.port?).ok()) {
            found.extend(ready(slice).map(|(address, _)| (address, port)));
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

fn hosts(slices: &[&EndpointSlice]) -> Vec<Host> {
    let all = slices.iter().flat_map(|slice| ready(slice));
    let mut hosts: Vec<Host> = all
        .map(|(address, hostname)| Host {
            address,
            hostname: hostname.cloned(),
        })
        .collect();
    hosts.sort();
    hosts.dedup();
    hosts
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_ready_endpoints_of_the_port_count() {
        let service: Service = serde_json::from_value(json!({
            "metadata": {"name": "a", "namespace": "n"},
            "spec": {"clusterIP": "10.96.1.2", "type": "NodePort", "sessionAffinity": "ClientIP", "ports": [
                {"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080}, {"name": "dns", "port": 53, "protocol": "UDP"}]},
        }))
        .unwrap();
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "a-1", "namespace": "n", "labels": {"kubernetes.io/service-name": "a"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}],
            "endpoints": [
                {"addresses": ["10.244.0.9"], "conditions": {"ready": true}},
                {"addresses": ["10.244.0.8"], "conditions": {}},
                {"addresses": ["10.244.0.7"], "conditions": {"ready": false}}],
        }))
        .unwrap();
        let name = ("n".to_owned(), "a".to_owned());
        let table = table(
            &[(name.clone(), service)].into(),
            &[(name.clone(), slice)].into(),
        );
        let entry = &table[&name];
        assert_eq!(entry.kind, Kind::NodePort);
        assert_eq!(entry.affinity, Some(AFFINITY));
        assert_eq!(
            entry.ports[0].endpoints,
            [
                ("10.244.0.8".parse().unwrap(), 8080),
                ("10.244.0.9".parse().unwrap(), 8080)
            ]
        );
        assert_eq!(
            (entry.ports[1].transport, entry.ports[1].endpoints.len()),
            (Transport::Udp, 0)
        );
        assert_eq!(entry.hosts.len(), 2);
    }
}
