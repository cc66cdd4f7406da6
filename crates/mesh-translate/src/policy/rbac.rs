//! RBAC filters. The generated types keep policies in hash maps, whose order changes from run to run, so these have ordered ones; field numbers as
//! published in `envoy/config/rbac/v3/rbac.proto` and the filters' own files.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::rbac::v3::permission::Rule as PermissionRule;
use envoy_types::pb::envoy::config::rbac::v3::principal::Identifier;
use envoy_types::pb::envoy::config::rbac::v3::{Permission, Policy, Principal};
use envoy_types::pb::google::protobuf::Any;
use mesh_model::{AuthorizationPolicy, Mesh};
use prost::Message;

use super::rule::{self, Context};

pub(super) const HTTP_NAME: &str = "envoy.filters.http.rbac";
pub(super) const NETWORK_NAME: &str = "envoy.filters.network.rbac";
/// Prefix of the network filter's statistics.
const NETWORK_STATS: &str = "tcp.";
/// Added to the names of rules whose provider can't be had: what they match is refused.
const BAD_CUSTOM: &str = "-deny-due-to-bad-CUSTOM-action";

/// What a match means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Allow,
    Deny,
    Log,
}

impl Verdict {
    /// Prefix of metadata and statistics of rules that are tried out.
    pub(super) fn dry_run_prefix(self) -> &'static str {
        match self {
            Self::Allow => "istio_dry_run_allow_",
            Self::Deny => "istio_dry_run_deny_",
            Self::Log => "",
        }
    }
}

/// `envoy.config.rbac.v3.RBAC`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Rules {
    /// 0 allows, 1 denies, 2 logs.
    #[prost(int32, tag = "1")]
    action: i32,
    #[prost(btree_map = "string, message", tag = "2")]
    policies: BTreeMap<String, Policy>,
}

impl Rules {
    /// The rules of policies; names begin with `prefix`.
    pub(super) fn of(
        mesh: &Mesh,
        policies: &[&AuthorizationPolicy],
        verdict: Verdict,
        tcp: bool,
        prefix: &str,
    ) -> Self {
        let mut rules = Self {
            action: match verdict {
                Verdict::Allow => 0,
                Verdict::Deny => 1,
                Verdict::Log => 2,
            },
            policies: BTreeMap::new(),
        };
        for policy in policies {
            let namespace = &policy.key.namespace;
            let context = Context {
                mesh,
                namespace,
                tcp,
                strict: verdict == Verdict::Allow,
            };
            let name = |index: usize| {
                format!(
                    "{prefix}ns[{namespace}]-policy[{}]-rule[{index}]",
                    policy.key.name
                )
            };
            for (index, given) in policy.rules.iter().enumerate() {
                if let Some(made) = rule::policy(given, &context) {
                    rules.policies.insert(name(index), made);
                }
            }
            if policy.rules.is_empty() {
                rules.policies.insert(name(0), never());
            }
        }
        rules
    }

    /// The same rules under names that say why what they match is refused.
    pub(super) fn refusing(self) -> Self {
        let renamed = |(name, policy): (String, Policy)| (format!("{name}{BAD_CUSTOM}"), policy);
        Self {
            policies: self.policies.into_iter().map(renamed).collect(),
            ..self
        }
    }
}

/// A rule that nothing matches: of an ALLOW policy without rules, which so allows nothing.
fn never() -> Policy {
    let any_permission = Permission {
        rule: Some(PermissionRule::Any(true)),
    };
    let any_principal = Principal {
        identifier: Some(Identifier::Any(true)),
    };
    Policy {
        permissions: vec![Permission {
            rule: Some(PermissionRule::NotRule(Box::new(any_permission))),
        }],
        principals: vec![Principal {
            identifier: Some(Identifier::NotId(Box::new(any_principal))),
        }],
        ..Policy::default()
    }
}

/// `envoy.extensions.filters.http.rbac.v3.RBAC`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct HttpRbac {
    #[prost(message, optional, tag = "1")]
    rules: Option<Rules>,
    #[prost(message, optional, tag = "2")]
    shadow_rules: Option<Rules>,
    #[prost(string, tag = "3")]
    shadow_rules_stat_prefix: String,
}

/// `envoy.extensions.filters.network.rbac.v3.RBAC`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct NetworkRbac {
    #[prost(message, optional, tag = "1")]
    rules: Option<Rules>,
    #[prost(message, optional, tag = "2")]
    shadow_rules: Option<Rules>,
    #[prost(string, tag = "3")]
    stat_prefix: String,
    #[prost(string, tag = "5")]
    shadow_rules_stat_prefix: String,
}

impl HttpRbac {
    /// The prefix is sent only where there are rules to try out.
    pub(super) fn new(rules: Option<Rules>, shadow: Option<Rules>, prefix: &str) -> Self {
        Self {
            rules,
            shadow_rules_stat_prefix: shadow.as_ref().map_or("", |_| prefix).to_owned(),
            shadow_rules: shadow,
        }
    }

    pub(super) fn any(&self) -> Any {
        let value = self.encode_to_vec();
        Any {
            type_url: "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC".to_owned(),
            value,
        }
    }
}

impl NetworkRbac {
    /// The prefix is sent only where there are rules to try out.
    pub(super) fn new(rules: Option<Rules>, shadow: Option<Rules>, prefix: &str) -> Self {
        Self {
            rules,
            stat_prefix: NETWORK_STATS.to_owned(),
            shadow_rules_stat_prefix: shadow.as_ref().map_or("", |_| prefix).to_owned(),
            shadow_rules: shadow,
        }
    }

    pub(super) fn any(&self) -> Any {
        let value = self.encode_to_vec();
        Any {
            type_url: "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC"
                .to_owned(),
            value,
        }
    }
}
