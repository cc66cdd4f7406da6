//! Which protocol a port speaks.

/// Protocol of a service port, as far as it was declared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// HTTP/1.1.
    Http,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC.
    Grpc,
    /// gRPC-Web.
    GrpcWeb,
    /// TLS that carries HTTP; routed by server name.
    Https,
    /// TLS; routed by server name.
    Tls,
    /// Plain bytes, databases among them.
    Tcp,
    /// Datagrams; left to the kernel.
    Udp,
    /// Not declared: found out from the first bytes of a connection.
    Auto,
}

/// Ports whose servers speak first, so that looking at the client's first bytes would wait for ever.
const SERVER_FIRST_PORTS: [u16; 4] = [25, 53, 3306, 27017];

impl Protocol {
    /// Istio's protocol selection: UDP transport first; then appProtocol, which replaces the port's name; then the name up to its first `-`;
    /// then well-known server-first ports are TCP; all else is found out.
    pub fn of_port(
        transport: &str,
        app_protocol: Option<&str>,
        port_name: &str,
        number: u16,
    ) -> Self {
        if transport.eq_ignore_ascii_case("UDP") {
            return Self::Udp;
        }
        let declared = match app_protocol.filter(|value| !value.is_empty()) {
            Some(value) => Self::of_app_protocol(value),
            None => Self::of_name(port_name),
        };
        declared.unwrap_or(if SERVER_FIRST_PORTS.contains(&number) {
            Self::Tcp
        } else {
            Self::Auto
        })
    }

    fn of_app_protocol(value: &str) -> Option<Self> {
        match value.to_ascii_lowercase().as_str() {
            "kubernetes.io/h2c" => Some(Self::Http2),
            "kubernetes.io/ws" => Some(Self::Http),
            "kubernetes.io/wss" => Some(Self::Https),
            other => Self::of_name(other),
        }
    }

    /// Protocol by the part of a name before its first `-`; the names of Gateway servers are read in the same way.
    pub fn of_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        if name == "grpc-web" || name.starts_with("grpc-web-") {
            return Some(Self::GrpcWeb);
        }
        match name.split('-').next().unwrap_or_default() {
            "http" => Some(Self::Http),
            "http2" => Some(Self::Http2),
            "grpc" => Some(Self::Grpc),
            "https" => Some(Self::Https),
            "tls" => Some(Self::Tls),
            "tcp" | "mongo" | "mysql" | "redis" | "hbone" => Some(Self::Tcp),
            "udp" => Some(Self::Udp),
            _ => None,
        }
    }

    /// True where requests are routed one by one.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// True where the connection to the endpoint is HTTP/2.
    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// True where connections are passed on whole.
    pub fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp | Self::Tls | Self::Https)
    }

    /// Name as Istio shows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "HTTP",
            Self::Http2 => "HTTP2",
            Self::Grpc => "GRPC",
            Self::GrpcWeb => "GRPC-Web",
            Self::Https => "HTTPS",
            Self::Tls => "TLS",
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Auto => "UnsupportedProtocol",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selects_as_istio_does() {
        for (transport, app, name, number, expected) in [
            ("TCP", None, "http", 80, Protocol::Http),
            ("", None, "HTTP-web", 80, Protocol::Http),
            ("TCP", None, "http2-x", 80, Protocol::Http2),
            ("TCP", None, "grpc-web", 80, Protocol::GrpcWeb),
            ("TCP", None, "grpc-web-x", 80, Protocol::GrpcWeb),
            ("TCP", None, "grpc-x", 80, Protocol::Grpc),
            ("TCP", None, "mongo-db", 1, Protocol::Tcp),
            ("TCP", None, "https", 443, Protocol::Https),
            ("TCP", None, "web", 8080, Protocol::Auto),
            ("TCP", None, "", 3306, Protocol::Tcp),
            ("TCP", None, "http", 3306, Protocol::Http),
            ("TCP", Some("http2"), "tcp-x", 80, Protocol::Http2),
            ("TCP", Some("kubernetes.io/h2c"), "", 80, Protocol::Http2),
            ("TCP", Some("kubernetes.io/wss"), "", 80, Protocol::Https),
            ("TCP", Some("unknown.example/x"), "http", 80, Protocol::Auto),
            ("UDP", Some("http"), "http", 80, Protocol::Udp),
        ] {
            assert_eq!(
                Protocol::of_port(transport, app, name, number),
                expected,
                "{transport} {app:?} {name} {number}"
            );
        }
    }
}
