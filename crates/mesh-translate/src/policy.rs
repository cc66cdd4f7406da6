//! Who may do what: from AuthorizationPolicies and RequestAuthentications to filters (pilot/pkg/security in Istio).

use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType as HttpConfigType;
use envoy_types::pb::google::protobuf::Any;
use mesh_api::security::authorization_policy::Action;
use mesh_model::{AuthorizationPolicy, Mesh, Node};

use crate::resources::Resources;
use rbac::{HttpRbac, NetworkRbac, Rules, Verdict};

mod custom;
mod jwt;
mod matcher;
mod principals;
mod rbac;
mod rule;

pub(crate) use matcher::claim;

/// Filters that are in every chain of a node through which requests come in.
pub(crate) struct Policies<'a> {
    pub(crate) http: Vec<HttpFilter>,
    tcp: Vec<Filter>,
    /// Policies whose authorizer judges requests, but not connections.
    requests_only: Vec<&'a AuthorizationPolicy>,
}

impl<'a> Policies<'a> {
    /// What the mesh says for a node; what can't be done is noted, and refused instead of let through.
    pub(crate) fn of(mesh: &'a Mesh, node: &Node, resources: &mut Resources) -> Self {
        let all = mesh.authorization_policies(node);
        let of_action = |action: Action| -> Vec<&'a AuthorizationPolicy> {
            let found = all.iter().copied();
            let found = found.filter(|policy| policy.action == action);
            found.map(AsRef::as_ref).collect()
        };
        let mut policies = Self {
            http: Vec::new(),
            tcp: Vec::new(),
            requests_only: Vec::new(),
        };
        custom::add(
            mesh,
            node,
            &of_action(Action::Custom),
            &mut policies,
            resources,
        );
        policies.http.extend(jwt::filter(mesh, node));
        for (action, verdict) in [
            (Action::Audit, Verdict::Log),
            (Action::Deny, Verdict::Deny),
            (Action::Allow, Verdict::Allow),
        ] {
            policies.add(mesh, &of_action(action), verdict);
        }
        policies
    }

    fn add(&mut self, mesh: &Mesh, policies: &[&AuthorizationPolicy], verdict: Verdict) {
        if policies.is_empty() {
            return;
        }
        let rules = |tcp: bool, dry_run: bool| {
            let chosen: Vec<_> = policies
                .iter()
                .copied()
                .filter(|policy| policy.dry_run == dry_run)
                .collect();
            (!chosen.is_empty()).then(|| Rules::of(mesh, &chosen, verdict, tcp, ""))
        };
        let http = HttpRbac::new(
            rules(false, false),
            rules(false, true),
            verdict.dry_run_prefix(),
        );
        self.push_http(rbac::HTTP_NAME, http.any());
        let tcp = NetworkRbac::new(
            rules(true, false),
            rules(true, true),
            verdict.dry_run_prefix(),
        );
        self.push_tcp(rbac::NETWORK_NAME, tcp.any());
    }

    fn push_http(&mut self, name: &str, config: Any) {
        self.http.push(http_filter(name, config));
    }

    fn push_tcp(&mut self, name: &str, config: Any) {
        self.tcp.push(Filter {
            name: name.to_owned(),
            config_type: Some(ConfigType::TypedConfig(config)),
        });
    }

    /// Says of policies whose authorizer judges requests only that connections to these ports, as far as they are not HTTP, pass it by: so it is in
    /// Istio, and nobody should have to find it out.
    pub(crate) fn warn_of_connections(&self, ports: &[u16], resources: &mut Resources) {
        for policy in &self.requests_only {
            let passed = ports.iter().filter(|port| custom::concerns(policy, **port));
            let passed: Vec<String> = passed.map(u16::to_string).collect();
            if passed.is_empty() {
                continue;
            }
            let message = format!(
                "provider {:?} speaks HTTP and judges requests only: connections that are not HTTP pass it by (port {}). Use envoyExtAuthzGrpc, refuse them by a DENY policy, or declare the port's protocol as HTTP (appProtocol)",
                policy.provider,
                passed.join(", ")
            );
            resources.warn(&policy.key, "spec.provider.name", message);
        }
    }

    /// Puts the filters for connections before those of a chain that passes bytes on.
    pub(crate) fn guard(&self, mut chain: FilterChain) -> FilterChain {
        chain.filters.splice(0..0, self.tcp.iter().cloned());
        chain
    }
}

fn http_filter(name: &str, config: Any) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(HttpConfigType::TypedConfig(config)),
        ..HttpFilter::default()
    }
}
