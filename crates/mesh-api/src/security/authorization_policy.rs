//! AuthorizationPolicy: who may do what.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{LabelSelector, PolicyTargetReference};

/// Who may do what with some workloads.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AuthorizationPolicy {
    /// Workloads; none is all of the namespace.
    pub selector: Option<LabelSelector>,
    /// Target instead of workloads, older form.
    pub target_ref: Option<PolicyTargetReference>,
    /// Targets instead of workloads.
    pub target_refs: Vec<PolicyTargetReference>,
    /// Rules, of which one has to match.
    pub rules: Vec<Rule>,
    /// What happens on a match.
    pub action: Action,
    /// Who decides (CUSTOM).
    pub provider: Option<ExtensionProvider>,
}

/// What happens on a match.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Action {
    /// Allowed; all else is refused.
    #[default]
    Allow,
    /// Refused.
    Deny,
    /// Logged.
    Audit,
    /// Asked of the provider.
    Custom,
}

/// An external authorizer of the mesh configuration.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ExtensionProvider {
    /// Its name.
    pub name: String,
}

/// Sources, operations and conditions; each part that is given has to match.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Rule {
    /// Sources, of which one has to match.
    pub from: Vec<From>,
    /// Operations, of which one has to match.
    pub to: Vec<To>,
    /// Conditions, all of which have to match.
    pub when: Vec<Condition>,
}

/// A source.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct From {
    /// The source.
    pub source: Option<Source>,
}

/// Where a request comes from; all parts have to match.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Source {
    /// Peer identities.
    pub principals: Vec<String>,
    /// Not these.
    pub not_principals: Vec<String>,
    /// Identities from tokens, `issuer/subject`.
    pub request_principals: Vec<String>,
    /// Not these.
    pub not_request_principals: Vec<String>,
    /// Namespaces of peers.
    pub namespaces: Vec<String>,
    /// Not these.
    pub not_namespaces: Vec<String>,
    /// Service accounts of peers, `[namespace/]name`.
    pub service_accounts: Vec<String>,
    /// Not these.
    pub not_service_accounts: Vec<String>,
    /// Trust domains of peers.
    pub trust_domains: Vec<String>,
    /// Not these.
    pub not_trust_domains: Vec<String>,
    /// Peer addresses.
    pub ip_blocks: Vec<String>,
    /// Not these.
    pub not_ip_blocks: Vec<String>,
    /// Client addresses after X-Forwarded-For.
    pub remote_ip_blocks: Vec<String>,
    /// Not these.
    pub not_remote_ip_blocks: Vec<String>,
}

/// An operation.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct To {
    /// The operation.
    pub operation: Option<Operation>,
}

/// What a request does; all parts have to match.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Operation {
    /// Hosts.
    pub hosts: Vec<String>,
    /// Not these.
    pub not_hosts: Vec<String>,
    /// Ports.
    pub ports: Vec<String>,
    /// Not these.
    pub not_ports: Vec<String>,
    /// Methods.
    pub methods: Vec<String>,
    /// Not these.
    pub not_methods: Vec<String>,
    /// Paths, or templates with `{*}` and `{**}`.
    pub paths: Vec<String>,
    /// Not these.
    pub not_paths: Vec<String>,
}

/// A condition on an attribute.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["key"]))]
pub struct Condition {
    /// Attribute, such as `request.headers[x]`.
    pub key: String,
    /// Values, of which one has to match.
    pub values: Vec<String>,
    /// Not these.
    pub not_values: Vec<String>,
}
