//! Rules with every name made absolute.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_api::networking::gateway::ServerTlsSettings;
use mesh_api::networking::virtual_service::{HttpRoute, TcpRoute, TlsRoute};

use crate::{ObjectKey, Visibility};

pub use destination_rule::{DestinationRule, Policy, Subset};
pub use envoy_filter::{EnvoyFilter, EnvoyPatch, VersionPattern};
pub use security::{
    AuthorizationPolicy, KeySource, MtlsMode, NamespaceMtls, PeerAuthentication,
    RequestAuthentication, Scope,
};

mod destination_rule;
mod envoy_filter;
mod security;

/// The name that stands for all sidecars in a list of gateways.
pub const MESH_GATEWAY: &str = "mesh";

/// A VirtualService. Hosts and destinations are full names, gateways are `namespace/name` or [`MESH_GATEWAY`], ports of destinations are filled in
/// where the service has exactly one; parts that are not applied are reported and taken out.
#[derive(Debug, Clone, PartialEq)]
pub struct VirtualService {
    /// The object.
    pub key: ObjectKey,
    /// When it was created, in seconds since 1970 (0 if unknown); of two for the same host the older wins.
    pub created: i64,
    /// Hosts, lower case.
    pub hosts: Vec<String>,
    /// Gateways that apply it; never empty.
    pub gateways: Vec<String>,
    /// Who sees it.
    pub visibility: Visibility,
    /// HTTP rules in order; in the place of those that delegate stand the delegates' own.
    pub http: Vec<HttpRoute>,
    /// Rules for TLS that is passed through.
    pub tls: Vec<TlsRoute>,
    /// Rules for other TCP.
    pub tcp: Vec<TcpRoute>,
}

impl VirtualService {
    /// True if a gateway (`namespace/name`, or [`MESH_GATEWAY`]) applies it.
    pub fn is_bound_to(&self, gateway: &str) -> bool {
        self.gateways.iter().any(|name| name == gateway)
    }
}

/// A Gateway: ports and hosts that the selected proxies serve.
#[derive(Debug, Clone, PartialEq)]
pub struct Gateway {
    /// The object.
    pub key: ObjectKey,
    /// When it was created, in seconds since 1970 (0 if unknown).
    pub created: i64,
    /// Labels of the proxies that serve it; empty selects all.
    pub selector: BTreeMap<String, String>,
    /// Servers that this version serves; the others are reported.
    pub servers: Vec<GatewayServer>,
}

/// One port of a Gateway with its hosts.
#[derive(Debug, Clone, PartialEq)]
pub struct GatewayServer {
    /// Number, as clients of the gateway's Service see it.
    pub port: u16,
    /// Name of the port.
    pub name: String,
    /// Address to listen on; `None` is all.
    pub bind: Option<IpAddr>,
    /// What is done with connections.
    pub mode: ServerMode,
    /// How TLS is ended, where the mode says that it is; what can't be applied is reported and taken out.
    pub tls: Option<ServerTlsSettings>,
    /// Hosts: the namespace whose VirtualServices may bind (`None`: any) and the name, wildcards allowed.
    pub hosts: Vec<(Option<String>, String)>,
}

/// What a gateway's server does with connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerMode {
    /// Routes HTTP requests, or answers each with a redirect to https.
    Http {
        /// Answer with the redirect.
        https_redirect: bool,
    },
    /// Ends TLS and routes HTTP requests.
    Https,
    /// Ends TLS and passes bytes on.
    TlsTermination,
    /// Passes TLS on, by server name.
    TlsPassthrough,
    /// Passes mutual TLS of the mesh on to the cluster that the server name says.
    AutoPassthrough,
    /// Passes bytes on.
    Tcp,
}

impl ServerMode {
    /// True if two servers can be on one port.
    pub fn shares_port_with(self, other: Self) -> bool {
        let plain = matches!((self, other), (Self::Http { .. }, Self::Http { .. }));
        plain || (self.is_tls() && other.is_tls())
    }

    /// True if connections begin with TLS.
    pub fn is_tls(self) -> bool {
        match self {
            Self::Https | Self::TlsTermination | Self::TlsPassthrough | Self::AutoPassthrough => {
                true
            }
            Self::Http { .. } | Self::Tcp => false,
        }
    }
}

impl Gateway {
    /// `namespace/name`, as VirtualServices refer to it.
    pub fn reference(&self) -> String {
        format!("{}/{}", self.key.namespace, self.key.name)
    }
}
