//! TCP and TLS rules: filter chains that pass connections on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::listener::v3::{FilterChain, FilterChainMatch};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::weighted_cluster::ClusterWeight;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::{
    ClusterSpecifier, TunnelingConfig, WeightedCluster,
};
use mesh_api::networking::virtual_service::{
    L4MatchAttributes, RouteDestination, TcpRoute, TlsMatchAttributes,
};
use mesh_model::{
    GatewayServer, Protocol, Service, ServicePort, VirtualService, hostname,
};

use crate::listener::{tcp_proxy, tcp_proxy_chain};
use crate::pb::uint32;
use crate::route::Client;
use crate::virtual_host::Rules;
use crate::{cluster, metadata, names};

/// The chains of a service port on a sidecar. Only the last one may be without conditions.
pub(crate) fn outbound(
    rules: &Rules<'_>,
    service: &Service,
    port: &ServicePort,
) -> Vec<FilterChain> {
    let client = rules.client(port.number);
    let of_service = rules.for_connections(&service.host);
    let chains = match port.protocol {
        Protocol::Tls | Protocol::Https => tls_chains(of_service, &client),
        _ => tcp_chains(of_service, &client),
    };
    // Where TLS rules are for this client, a server name that none of them has goes nowhere.
    let is_tls = matches!(port.protocol, Protocol::Tls | Protocol::Https);
    let complete = match chains.last() {
        Some(last) => is_tls || last.filter_chain_match.is_none(),
        None => false,
    };
    if complete {
        return chains;
    }
    let cluster = names::outbound_cluster(port.number, "", &service.host);
    let mut proxy = tcp_proxy(&cluster);
    cluster::set_tcp_policy(
        &mut proxy,
        client.mesh,
        client.node,
        &service.host,
        "",
        port.number,
    );
    proxy.tunneling_config = tunnel(&client, &service.host, "");
    let own = tcp_proxy_chain(None, &proxy);
    chains.into_iter().chain([own]).collect()
}

/// One chain per condition with server names; a name that an earlier chain has is left out, since Envoy refuses equal conditions.
fn tls_chains<'a>(
    rules: impl Iterator<Item = &'a VirtualService>,
    client: &Client<'_>,
) -> Vec<FilterChain> {
    let mut conditions = Conditions::default();
    let mut chains = Vec::new();
    for rule in rules {
        for tls in &rule.tls {
            for item in tls.matches.iter().filter(|item| client.admits_tls(item)) {
                let free = conditions.take(&item.sni_hosts, &item.destination_subnets);
                chains.extend(
                    free.into_iter()
                        .map(|matched| chain(matched, &tls.route, rule, client)),
                );
            }
        }
    }
    // Behind the chain that takes everything nothing more is needed, and it has to come last.
    chains.sort_by_key(|chain| chain.filter_chain_match.is_none());
    chains
}

/// One chain per rule up to the first that takes every destination.
fn tcp_chains<'a>(
    rules: impl Iterator<Item = &'a VirtualService>,
    client: &Client<'_>,
) -> Vec<FilterChain> {
    let mut conditions = Conditions::default();
    let mut chains = Vec::new();
    for rule in rules {
        for tcp in &rule.tcp {
            let Some(subnets) = destinations(tcp, client) else {
                continue;
            };
            for matched in conditions.take(&[], &subnets) {
                let last = matched == FilterChainMatch::default();
                chains.push(chain(matched, &tcp.route, rule, client));
                if last {
                    return chains;
                }
            }
        }
    }
    chains
}

/// The destinations that a rule is for, none being all of them; `None` if it is not for this client.
fn destinations(rule: &TcpRoute, client: &Client<'_>) -> Option<Vec<String>> {
    if rule.matches.is_empty() {
        return Some(Vec::new());
    }
    let mut subnets = Vec::new();
    let mut any = false;
    for item in rule.matches.iter().filter(|item| client.admits_tcp(item)) {
        any = true;
        if item.destination_subnets.is_empty() {
            return Some(Vec::new());
        }
        subnets.extend(item.destination_subnets.iter().cloned());
    }
    any.then_some(subnets)
}

/// The only chain of a gateway's TCP port: the first rule that is for it.
pub(crate) fn gateway_tcp<'a>(
    rules: impl Iterator<Item = &'a VirtualService>,
    server: &GatewayServer,
    client: &Client<'_>,
) -> Option<FilterChain> {
    rules
        .filter(|rule| shares_host(server, rule))
        .find_map(|rule| {
            let for_server = |item: &L4MatchAttributes| client.is_at(&item.gateways, item.port);
            let route = rule
                .tcp
                .iter()
                .find(|tcp| tcp.matches.is_empty() || tcp.matches.iter().any(for_server))?;
            Some(chain(
                FilterChainMatch::default(),
                &route.route,
                rule,
                client,
            ))
        })
}

/// The chains of a gateway's port that passes TLS on, by server name. Several servers of one port share `taken`.
pub(crate) fn gateway_tls<'a>(
    rules: impl Iterator<Item = &'a VirtualService>,
    server: &GatewayServer,
    client: &Client<'_>,
    taken: &mut Conditions,
) -> Vec<FilterChain> {
    let mut chains = Vec::new();
    for rule in rules.filter(|rule| shares_host(server, rule)) {
        for tls in &rule.tls {
            let for_server = |item: &&TlsMatchAttributes| client.is_at(&item.gateways, item.port);
            for item in tls.matches.iter().filter(for_server) {
                let free = taken.take(&item.sni_hosts, &[]);
                chains.extend(
                    free.into_iter()
                        .map(|matched| chain(matched, &tls.route, rule, client)),
                );
            }
        }
    }
    chains
}

fn shares_host(server: &GatewayServer, rule: &VirtualService) -> bool {
    let allowed = server.hosts.iter().filter(|(namespace, _)| {
        namespace
            .as_deref()
            .is_none_or(|only| only == rule.key.namespace)
    });
    allowed
        .flat_map(|(_, served)| {
            rule.hosts
                .iter()
                .map(move |host| hostname::intersection(served, host))
        })
        .any(|shared| shared.is_some())
}

/// Conditions of the chains of one listener, none of which may come twice.
#[derive(Default)]
pub(crate) struct Conditions {
    /// Server name (empty for any) and range (empty for any).
    taken: BTreeSet<(String, String)>,
}

impl Conditions {
    /// The conditions for server names and destinations, without those that were given away before: nothing if all of them were, more than one
    /// where names differ in what is left.
    pub(crate) fn take(&mut self, names: &[String], subnets: &[String]) -> Vec<FilterChainMatch> {
        let any = [String::new()];
        let any_name = names.is_empty() || names.iter().any(|name| name == "*");
        let names = if any_name { &any[..] } else { names };
        let ranges = if subnets.is_empty() {
            &any[..]
        } else {
            subnets
        };
        let mut by_ranges: BTreeMap<Vec<&String>, Vec<String>> = BTreeMap::new();
        for name in names {
            let free: Vec<&String> = ranges
                .iter()
                .filter(|range| self.taken.insert((name.clone(), (*range).clone())))
                .collect();
            if !free.is_empty() {
                by_ranges.entry(free).or_default().push(name.clone());
            }
        }
        let matches = by_ranges
            .into_iter()
            .map(|(ranges, names)| FilterChainMatch {
                server_names: if any_name { Vec::new() } else { names },
                prefix_ranges: ranges.into_iter().filter_map(|range| cidr(range)).collect(),
                ..FilterChainMatch::default()
            });
        matches.collect()
    }
}

/// `10.1.0.0/16` or an address; nothing for the empty text that stands for any.
fn cidr(text: &str) -> Option<CidrRange> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, length.parse::<u8>().ok()),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let whole = if address.is_ipv4() { 32 } else { 128 };
    Some(CidrRange {
        address_prefix: address.to_string(),
        prefix_len: uint32(length.unwrap_or(whole)),
    })
}

/// A chain that passes connections on as a rule says.
fn chain(
    matched: FilterChainMatch,
    routes: &[RouteDestination],
    rule: &VirtualService,
    client: &Client<'_>,
) -> FilterChain {
    let mut proxy = if let [only] = routes {
        let cluster = client.cluster(&only.destination);
        tcp_proxy(&cluster)
    } else {
        TcpProxy {
            stat_prefix: format!("{}.{}", rule.key.name, rule.key.namespace),
            cluster_specifier: Some(ClusterSpecifier::WeightedClusters(weighted(routes, client))),
            ..TcpProxy::default()
        }
    };
    // Of several destinations the first says how connections are kept.
    if let Some(first) = routes.first() {
        let (host, port) = client.target(&first.destination);
        cluster::set_tcp_policy(
            &mut proxy,
            client.mesh,
            client.node,
            host,
            &first.destination.subset,
            port,
        );
        // The tunnel is the listener's: with several destinations only what holds for the whole host can be meant (as in Istio).
        let subset = match routes {
            [only] => &only.destination.subset,
            _ => "",
        };
        proxy.tunneling_config = tunnel(client, host, subset);
    }
    let matched = (matched != FilterChainMatch::default()).then_some(matched);
    FilterChain {
        metadata: metadata::single("config", metadata::config_path(&rule.key)),
        ..tcp_proxy_chain(matched, &proxy)
    }
}

/// The tunnel in which connections to a host or subset go, as its DestinationRule says.
fn tunnel(client: &Client<'_>, host: &str, subset: &str) -> Option<TunnelingConfig> {
    let rule = client.mesh.destination_rule_for(host, client.node)?;
    let given = rule.tunnel(subset)?;
    let hostname = match given.target_host.parse::<IpAddr>() {
        Ok(IpAddr::V6(address)) => format!("[{address}]:{}", given.target_port),
        _ => format!("{}:{}", given.target_host, given.target_port),
    };
    Some(TunnelingConfig {
        hostname,
        use_post: given.protocol == "POST",
        ..TunnelingConfig::default()
    })
}

/// Destinations of weight 0 get nothing.
fn weighted(routes: &[RouteDestination], client: &Client<'_>) -> WeightedCluster {
    let clusters = routes.iter().filter(|route| route.weight > 0);
    WeightedCluster {
        clusters: clusters
            .map(|route| ClusterWeight {
                name: client.cluster(&route.destination),
                weight: route.weight.unsigned_abs(),
                ..ClusterWeight::default()
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(list: &[&str]) -> Vec<String> {
        list.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn no_condition_is_given_twice() {
        let mut conditions = Conditions::default();
        let names = |matches: Vec<FilterChainMatch>| {
            let names = matches.into_iter().map(|matched| matched.server_names);
            names.collect::<Vec<_>>()
        };
        assert_eq!(
            names(conditions.take(&texts(&["a", "b"]), &[])),
            [["a", "b"]]
        );
        assert_eq!(names(conditions.take(&texts(&["b", "c"]), &[])), [["c"]]);
        assert!(conditions.take(&texts(&["a"]), &[]).is_empty());
        // The same name at a narrower destination is another condition.
        let narrow = conditions.take(&texts(&["a"]), &texts(&["10.0.0.0/8"]));
        assert_eq!(narrow[0].prefix_ranges.len(), 1);
        let both = texts(&["10.0.0.0/8", "11.0.0.0/8"]);
        let differ = names(conditions.take(&texts(&["a", "d"]), &both));
        assert_eq!(differ.concat().len(), 2, "{differ:?}");
        assert_eq!(
            conditions.take(&texts(&["*", "x"]), &[]),
            [FilterChainMatch::default()]
        );
        assert!(conditions.take(&[], &[]).is_empty());
    }

    #[test]
    fn an_address_is_a_range_of_one() {
        let range = cidr("10.1.2.3").unwrap();
        assert_eq!(range.prefix_len, uint32(32u32));
        assert_eq!(cidr("fd00::/8").unwrap().prefix_len, uint32(8u32));
        assert_eq!(cidr(""), None);
    }
}
