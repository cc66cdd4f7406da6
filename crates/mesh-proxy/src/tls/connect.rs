//! The client's side of a handshake.

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use mesh_identity::verify::CertificateNames;
use mesh_routing::cluster::ClusterConfig;
use mesh_routing::filter::alpn::Protocols;
use mesh_routing::tls::ClientTls;
use rustls::HandshakeKind;
use rustls_pki_types::{DnsName, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, TlsStream};

use super::HandshakeError;
use super::wire::{Rewound, Wire};
use crate::pool::Ends;
use crate::report::principals::Principals;
use crate::shared::Shared;

/// What a request wants of the connection that it goes out on. Connections are shared only among requests that want the same.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// The client that a PROXY protocol header tells of, where the cluster has one.
    pub ends: Option<Rc<Ends>>,
    /// Application protocols instead of the cluster's.
    pub alpn: Option<Protocols>,
    /// The server name to ask for instead of the cluster's.
    pub server_name: Option<Arc<str>>,
    /// The address that the connection is to come from instead of ours.
    pub source: Option<Source>,
}

/// A client's address on our side of a connection to an endpoint (Envoy's listener filter `original_src`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The address; the port is another one.
    pub ip: IpAddr,
    /// The mark of the socket, 0 for none, by which the endpoint's answers are led back here.
    pub mark: u32,
}

impl Wish {
    /// Does the other one want the same handshake?
    pub fn has_handshake_of(&self, other: &Self) -> bool {
        let same_alpn = match (&self.alpn, &other.alpn) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
            _ => false,
        };
        same_alpn && self.server_name == other.server_name && self.source == other.source
    }
}

/// A connection in TLS.
pub struct Connected {
    /// It.
    pub wire: Wire,
    /// What both sides have proved.
    pub principals: Option<Arc<Principals>>,
    /// An earlier session was resumed.
    pub resumed: bool,
}

/// An endpoint's side of what is asked for.
pub struct Target<'a> {
    /// The settings.
    pub settings: &'a Arc<ClientTls>,
    /// The cluster.
    pub config: &'a ClusterConfig,
    /// The endpoint's host name, empty where it has none.
    pub hostname: &'a str,
    /// Its address, which stands for the name where none is asked for.
    pub address: IpAddr,
}

impl Target<'_> {
    fn server_name(&self, wish: &Wish) -> ServerName<'static> {
        let address = ServerName::IpAddress(self.address.into());
        let name = match &wish.server_name {
            Some(name) => name,
            None if !self.settings.sni.is_empty() => &*self.settings.sni,
            None if self.settings.host_sni => self.hostname,
            None => "",
        };
        if let Ok(ip) = name.parse::<IpAddr>() {
            return ServerName::IpAddress(ip.into());
        }
        DnsName::try_from(name.to_ascii_lowercase()).map_or(address, ServerName::DnsName)
    }

    /// Runs the handshake.
    pub async fn connect(
        &self,
        shared: &Shared,
        stream: TcpStream,
        wish: &Wish,
    ) -> Result<Connected, HandshakeError> {
        let validate = self.config.transports.names.validate || self.settings.validate_sni;
        let context = shared
            .contexts
            .client(self.settings, validate, &shared.secrets)?;
        let connector = TlsConnector::from(context.config.clone());
        let stream = Rewound::new(Bytes::new(), stream);
        let name = self.server_name(wish);
        let connecting = match &wish.alpn {
            Some(protocols) => {
                let owned = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
                connector.with_alpn(owned).connect(name, stream)
            }
            None => connector.connect(name, stream),
        };
        let stream = connecting.await?;
        let session = stream.get_ref().1;
        let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
        let leaf = session.peer_certificates().and_then(<[_]>::first);
        let names = leaf.and_then(|leaf| CertificateNames::of(leaf).ok());
        let local = context.local.uri_sans.first().map(|uri| &**uri);
        let remote = names.as_ref().and_then(|names| names.uri.first());
        // Of a server that is no workload nothing is told.
        let principals = remote.map(|remote| Principals::of(local, Some(remote)));
        Ok(Connected {
            wire: Wire::Tls(Box::new(TlsStream::Client(stream))),
            principals,
            resumed,
        })
    }
}

/// Envoy's form of what went wrong (`transport failure reason`).
pub fn failure_reason(error: &HandshakeError) -> String {
    let what = match error.tls() {
        Some(rustls::Error::InvalidCertificate(reason)) => {
            format!("CERTIFICATE_VERIFY_FAILED: {reason}")
        }
        Some(rustls::Error::AlertReceived(alert)) => format!("TLSV1_ALERT: {alert:?}"),
        _ => error.to_string(),
    };
    format!("TLS_error:|{what}:TLS_error_end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istios_server_names_are_names() {
        let name = "outbound_.9080_._.reviews.default.svc.cluster.local";
        assert!(DnsName::try_from(name).is_ok());
        assert!(DnsName::try_from("outbound_.9080_.v1_.reviews.default.svc.cluster.local").is_ok());
    }
}
