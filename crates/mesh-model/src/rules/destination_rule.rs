//! DestinationRules: how traffic to a host is treated once routing has chosen it.

use std::collections::BTreeMap;

use mesh_api::networking::destination_rule::{
    ClientTlsSettings, ConnectionPoolSettings, LoadBalancerSettings, OutlierDetection,
    PortTrafficPolicy, ProxyProtocol, RetryBudget, TrafficPolicy, TunnelSettings,
};

use crate::service::contains_labels;
use crate::{ObjectKey, Visibility};

/// DestinationRules of one namespace for one host, merged: subsets of all of them, the first trafficPolicy.
#[derive(Debug, Clone, PartialEq)]
pub struct DestinationRule {
    /// The objects, oldest first.
    pub keys: Vec<ObjectKey>,
    /// Full name of the service, or a wildcard.
    pub host: String,
    /// Who sees it.
    pub visibility: Visibility,
    /// Labels of the clients that it is for, all of its own namespace; `None` is everyone who sees it.
    pub selector: Option<BTreeMap<String, String>>,
    /// Policy for the whole host; what is not applied is taken out.
    pub policy: Option<TrafficPolicy>,
    /// Subsets by name.
    pub subsets: BTreeMap<String, Subset>,
}

/// A named part of a service's endpoints.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Subset {
    /// Labels that the endpoint's pod must have.
    pub labels: BTreeMap<String, String>,
    /// Policy that overrides the host's, part by part.
    pub policy: Option<TrafficPolicy>,
}

/// What holds for one port of a host or subset.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Policy<'a> {
    /// How an endpoint is chosen.
    pub load_balancer: Option<&'a LoadBalancerSettings>,
    /// Limits and timeouts of connections.
    pub connection_pool: Option<&'a ConnectionPoolSettings>,
    /// When a failing endpoint is set aside.
    pub outlier_detection: Option<&'a OutlierDetection>,
    /// TLS toward the endpoint.
    pub tls: Option<&'a ClientTlsSettings>,
    /// Limit of concurrent retries.
    pub retry_budget: Option<&'a RetryBudget>,
    /// What endpoints are told of the client.
    pub proxy_protocol: Option<&'a ProxyProtocol>,
}

impl DestinationRule {
    /// The policy for a subset (empty, or of an unknown name, for the whole host) and port, as Istio merges it: settings of a port replace load
    /// balancer, pool, outlier detection and TLS as a whole, so that what they leave out is at its default; what a subset sets overrides the
    /// host's part by part. Where the host has settings for the port, its `proxyProtocol` does not hold there, a subset's does.
    pub fn policy(&self, subset: &str, port: u16) -> Policy<'_> {
        let mut merged = Policy::default();
        merged.override_with(self.policy.as_ref(), port);
        if let Some(policy) = &self.policy
            && settings_of(policy, port).is_some()
        {
            merged.proxy_protocol = None;
        }
        let of_subset = self.subsets.get(subset);
        merged.override_with(of_subset.and_then(|subset| subset.policy.as_ref()), port);
        merged
    }

    /// The tunnel in which connections go to a subset (empty for the whole host). A subset has its own or none: Istio does not fall back to the
    /// host's, and settings of ports say nothing about it (pilot/pkg/networking/core/tunnelingconfig).
    pub fn tunnel(&self, subset: &str) -> Option<&TunnelSettings> {
        let policy = match subset {
            "" => self.policy.as_ref(),
            name => self.subsets.get(name)?.policy.as_ref(),
        };
        policy?.tunnel.as_ref()
    }

    /// True if the rule is for clients with these labels in this namespace and names them.
    pub(crate) fn selects(&self, labels: &BTreeMap<String, String>, namespace: &str) -> bool {
        let own = self.keys.iter().any(|key| key.namespace == namespace);
        own && self
            .selector
            .as_ref()
            .is_some_and(|selector| contains_labels(labels, selector))
    }
}

impl<'a> Policy<'a> {
    fn override_with(&mut self, given: Option<&'a TrafficPolicy>, port: u16) {
        let Some(given) = given else {
            return;
        };
        self.load_balancer = given.load_balancer.as_ref().or(self.load_balancer);
        self.connection_pool = given.connection_pool.as_ref().or(self.connection_pool);
        self.outlier_detection = given.outlier_detection.as_ref().or(self.outlier_detection);
        self.tls = given.tls.as_ref().or(self.tls);
        self.retry_budget = given.retry_budget.as_ref().or(self.retry_budget);
        self.proxy_protocol = given.proxy_protocol.as_ref().or(self.proxy_protocol);
        if let Some(settings) = settings_of(given, port) {
            self.load_balancer = settings.load_balancer.as_ref();
            self.connection_pool = settings.connection_pool.as_ref();
            self.outlier_detection = settings.outlier_detection.as_ref();
            self.tls = settings.tls.as_ref();
        }
    }
}

/// What a policy says of one port.
fn settings_of(policy: &TrafficPolicy, port: u16) -> Option<&PortTrafficPolicy> {
    policy.port_level_settings.iter().find(|settings| {
        settings
            .port
            .as_ref()
            .is_some_and(|selector| selector.number == u32::from(port))
    })
}
