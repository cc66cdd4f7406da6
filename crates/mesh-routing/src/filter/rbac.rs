//! Role based access control: the `envoy.filters.http.rbac` and `envoy.filters.network.rbac` filters
//! (`envoy.config.rbac.v3`).
//!
//! Conditions are compiled to matchers; judging a request neither allocates nor locks.

mod rule;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::config::rbac::v3::rbac::Action as PbAction;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3 as http;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3 as network;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::rbac::EnforcementType;

use crate::dynamic::Dynamic;
use crate::error::{CompileError, Result, Within, every_field};
use crate::peer::PeerTls;
use crate::route::RequestView;
use rule::Rule;

/// Where the findings of shadow rules are kept for later filters.
pub const HTTP_SECTION: &str = "envoy.filters.http.rbac";
/// The same for connections.
pub const NETWORK_SECTION: &str = "envoy.filters.network.rbac";

/// A compiled HTTP `RBAC` filter, or what a route says in its place.
#[derive(Debug, Default)]
pub struct Rbac {
    /// What is enforced; `None` lets everything pass.
    pub rules: Option<Engine>,
    /// What is only judged.
    pub shadow: Option<Shadow>,
    /// Statistics of the rules, as `http.PREFIX.rbac.`.
    pub stats: Box<str>,
    /// Statistics for each policy, too.
    pub each_policy: bool,
}

/// A compiled network `RBAC` filter.
#[derive(Debug)]
pub struct ConnectionRbac {
    /// What is enforced; `None` lets everything pass.
    pub rules: Option<Engine>,
    /// What is only judged.
    pub shadow: Option<Shadow>,
    /// Statistics, as `PREFIXrbac.`.
    pub stats: Box<str>,
    /// A refused connection is closed only after this.
    pub delay: Option<std::time::Duration>,
}

/// Rules that change nothing but statistics and metadata.
#[derive(Debug)]
pub struct Shadow {
    /// The rules.
    pub rules: Engine,
    /// The first part of names in statistics and metadata, as `istio_dry_run_allow_`.
    pub prefix: Box<str>,
}

/// A set of policies and what a match means.
#[derive(Debug)]
pub struct Engine {
    /// What a match means.
    pub action: Action,
    /// In the order of their names, which is that of judging.
    policies: Vec<Policy>,
    forwarded: bool,
}

/// What a match means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Allowed where one matches, refused where none does.
    Allow,
    /// Refused where one matches.
    Deny,
    /// Always allowed; a match is noted for the log.
    Log,
}

#[derive(Debug)]
struct Policy {
    name: Arc<str>,
    permissions: Vec<Rule>,
    principals: Vec<Rule>,
}

/// What is known of a request or connection.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The request; `None` for a connection that is judged by itself.
    pub request: Option<&'a RequestView<'a>>,
    /// The other side of the connection.
    pub direct: IpAddr,
    /// The client, as far as proxies before us tell (`x-forwarded-for`); `direct` where nobody tells.
    pub remote: IpAddr,
    /// Where the connection was going.
    pub destination: SocketAddr,
    /// Server name that the client asked for; empty without one.
    pub server_name: &'a str,
    /// What the TLS handshake has shown; `None` for plain text.
    pub tls: Option<&'a PeerTls>,
    /// What filters before have found out.
    pub metadata: Option<&'a Dynamic>,
}

/// What an [`Engine`] says.
#[derive(Debug, Clone, Copy)]
pub struct Verdict<'a> {
    /// May it pass?
    pub allowed: bool,
    /// The policy that matched first.
    pub policy: Option<&'a Arc<str>>,
}

impl Rbac {
    pub(crate) fn compile(m: &http::Rbac) -> Result<Self> {
        every_field!(m, http::Rbac,
            used { rules, shadow_rules, shadow_rules_stat_prefix, rules_stat_prefix, track_per_rule_stats }
            irrelevant {}
            refused { matcher, shadow_matcher });
        Ok(Self {
            rules: Engine::optional(m.rules.as_ref()).within("rules")?,
            shadow: Shadow::compile(m.shadow_rules.as_ref(), &m.shadow_rules_stat_prefix)?,
            stats: m.rules_stat_prefix.as_str().into(),
            each_policy: m.track_per_rule_stats,
        })
    }

    /// What a route says; without settings the filter is off for it.
    pub(crate) fn compile_route(m: &http::RbacPerRoute) -> Result<Self> {
        every_field!(m, http::RbacPerRoute, used { rbac } irrelevant {} refused {});
        match &m.rbac {
            Some(rbac) => Self::compile(rbac).within("rbac"),
            None => Ok(Self::default()),
        }
    }

    /// Does it do anything?
    pub fn acts(&self) -> bool {
        self.rules.is_some() || self.shadow.is_some()
    }

    /// Does a rule ask for [`Facts::remote`]?
    pub fn reads_forwarded(&self) -> bool {
        let shadow = self.shadow.as_ref().map(|shadow| &shadow.rules);
        self.rules
            .iter()
            .chain(shadow)
            .any(|engine| engine.forwarded)
    }
}

impl ConnectionRbac {
    /// `None` where it does nothing.
    pub(crate) fn compile(m: &network::Rbac) -> Result<Option<Self>> {
        every_field!(m, network::Rbac,
            used { rules, shadow_rules, shadow_rules_stat_prefix, stat_prefix, enforcement_type, delay_deny }
            irrelevant {}
            refused { matcher, shadow_matcher });
        // What a connection is judged by does not change while it lasts.
        if EnforcementType::try_from(m.enforcement_type).is_err() {
            return Err(CompileError::new("enforcement_type", "is unknown"));
        }
        let rbac = Self {
            rules: Engine::optional(m.rules.as_ref()).within("rules")?,
            shadow: Shadow::compile(m.shadow_rules.as_ref(), &m.shadow_rules_stat_prefix)?,
            stats: m.stat_prefix.as_str().into(),
            delay: crate::error::nonzero_duration("delay_deny", m.delay_deny.as_ref())?,
        };
        let shadow = rbac.shadow.as_ref().map(|shadow| &shadow.rules);
        let mut policies = rbac.rules.iter().chain(shadow).flat_map(|e| &e.policies);
        if let Some(policy) = policies.find(|policy| policy.has(Rule::reads_headers)) {
            let at = format!("policies[{:?}]", policy.name);
            return Err(CompileError::new(
                at,
                "asks for a header; connections have none",
            ));
        }
        let acts = rbac.rules.is_some() || rbac.shadow.is_some();
        Ok(acts.then_some(rbac))
    }
}

impl Shadow {
    fn compile(rules: Option<&pb::Rbac>, prefix: &str) -> Result<Option<Self>> {
        let rules = Engine::optional(rules).within("shadow_rules")?;
        Ok(rules.map(|rules| Self {
            rules,
            prefix: prefix.into(),
        }))
    }
}

impl Engine {
    fn optional(m: Option<&pb::Rbac>) -> Result<Option<Self>> {
        m.map(Self::compile).transpose()
    }

    /// Compiles the message.
    pub fn compile(m: &pb::Rbac) -> Result<Self> {
        every_field!(m, pb::Rbac, used { action, policies } irrelevant {} refused { audit_logging_options });
        let action = match PbAction::try_from(m.action) {
            Ok(PbAction::Allow) => Action::Allow,
            Ok(PbAction::Deny) => Action::Deny,
            Ok(PbAction::Log) => Action::Log,
            Err(_) => return Err(CompileError::new("action", "is unknown")),
        };
        // Envoy keeps them in a sorted map; the first that matches is the one that is named.
        let mut names: Vec<&String> = m.policies.keys().collect();
        names.sort_unstable();
        let mut policies = Vec::with_capacity(names.len());
        for name in names {
            let policy = Policy::compile(name, &m.policies[name]);
            policies.push(policy.within(format_args!("policies[{name:?}]"))?);
        }
        Ok(Self {
            action,
            forwarded: policies.iter().any(|p| p.has(Rule::reads_forwarded)),
            policies,
        })
    }

    /// Judges a request or connection.
    pub fn judge(&self, facts: &Facts<'_>) -> Verdict<'_> {
        let found = self.policies.iter().find(|policy| policy.matches(facts));
        let allowed = match self.action {
            Action::Allow => found.is_some(),
            Action::Deny => found.is_none(),
            Action::Log => true,
        };
        Verdict {
            allowed,
            policy: found.map(|policy| &policy.name),
        }
    }
}

impl Policy {
    fn compile(name: &str, m: &pb::Policy) -> Result<Self> {
        every_field!(m, pb::Policy,
            used { permissions, principals }
            // Only for conditions, which are refused.
            irrelevant { cel_config }
            refused { condition, checked_condition });
        let mut permissions = Vec::with_capacity(m.permissions.len());
        for (i, permission) in m.permissions.iter().enumerate() {
            let at = format!("permissions[{i}]");
            permissions.push(Rule::permission(permission, 0).within(at)?);
        }
        let mut principals = Vec::with_capacity(m.principals.len());
        for (i, principal) in m.principals.iter().enumerate() {
            let at = format!("principals[{i}]");
            principals.push(Rule::principal(principal, 0).within(at)?);
        }
        if permissions.is_empty() || principals.is_empty() {
            return Err(CompileError::new(
                "policies",
                "a policy needs a permission and a principal (any: true stands for all)",
            ));
        }
        Ok(Self {
            name: name.into(),
            permissions,
            principals,
        })
    }

    fn matches(&self, facts: &Facts<'_>) -> bool {
        self.permissions.iter().any(|rule| rule.matches(facts))
            && self.principals.iter().any(|rule| rule.matches(facts))
    }

    /// Does one of its conditions have this property?
    fn has(&self, property: fn(&Rule) -> bool) -> bool {
        let mut all = self.permissions.iter().chain(&self.principals);
        all.any(|rule| rule.has(property))
    }
}
