//! Texts with Envoy's command operators (`%REQ(x-a)%`, "Access log format strings"), as header mutations and direct responses use them.
//! Operators that are not implemented are refused by name when the configuration is compiled.

use std::borrow::Cow;
use std::fmt::Write;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName};

use crate::error::{CompileError, Result};
use crate::peer::PeerTls;

/// What is known of an exchange when a text is made. What is not known (yet) stays unset.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facts<'a> {
    /// The request's headers.
    pub request: Option<&'a HeaderMap>,
    /// The response's headers.
    pub response: Option<&'a HeaderMap>,
    /// The response's trailers.
    pub trailers: Option<&'a HeaderMap>,
    /// The request's method.
    pub method: &'a str,
    /// Its path with the query.
    pub path: &'a str,
    /// Its authority.
    pub authority: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// `HTTP/1.1` and so on; empty for TCP.
    pub protocol: &'a str,
    /// Final status; 0 before there is one.
    pub status: u16,
    /// Response flags as Envoy writes them, `-` for none.
    pub flags: &'a str,
    /// The client's address.
    pub remote: Option<SocketAddr>,
    /// The address that the client connected to.
    pub local: Option<SocketAddr>,
    /// The endpoint.
    pub upstream_host: Option<SocketAddr>,
    /// The cluster.
    pub upstream_cluster: &'a str,
    /// The route's name.
    pub route: &'a str,
    /// SNI.
    pub server_name: &'a str,
    /// The client's connection in TLS.
    pub tls: Option<&'a PeerTls>,
    /// The proxy's host name.
    pub hostname: &'a str,
    /// When the request began.
    pub started: Option<SystemTime>,
    /// How long it has taken.
    pub duration: Option<Duration>,
    /// Bytes of the request's body.
    pub received: u64,
    /// Bytes of the response's body.
    pub sent: u64,
    /// Which try it is, from 1.
    pub attempts: u32,
}

/// A compiled text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Format(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(Box<str>),
    Operator(Operator, Option<usize>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Operator {
    Request(Source, Option<Source>),
    Response(HeaderName, Option<HeaderName>),
    Trailer(HeaderName),
    Address(Side, Shape),
    UpstreamCluster,
    Protocol,
    ResponseCode,
    ResponseFlags,
    RouteName,
    ServerName,
    Tls(TlsFact),
    Hostname,
    StartTime,
    Duration,
    BytesReceived,
    BytesSent,
    Attempts,
}

/// What is known of the client's connection in TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TlsFact {
    PeerUris,
    PeerDns,
    PeerSubject,
    PeerIssuer,
    PeerSerial,
    PeerHash,
    PeerCertificate,
    LocalUris,
    LocalDns,
    LocalSubject,
    Version,
    Cipher,
}

impl TlsFact {
    fn value(self, tls: &PeerTls) -> Cow<'_, str> {
        let joined = |names: &[Box<str>]| Cow::Owned(names.join(","));
        match self {
            Self::PeerUris => joined(&tls.uri_sans),
            Self::PeerDns => joined(&tls.dns_sans),
            Self::PeerSubject => (&*tls.subject).into(),
            Self::PeerIssuer => (&*tls.issuer).into(),
            Self::PeerSerial => (&*tls.serial).into(),
            Self::PeerHash => (&*tls.sha256).into(),
            Self::PeerCertificate => tls.certificate_encoded().unwrap_or_default().into(),
            Self::LocalUris => joined(&tls.local_uri_sans),
            Self::LocalDns => joined(&tls.local_dns_sans),
            Self::LocalSubject => (&*tls.local_subject).into(),
            Self::Version => tls.version.into(),
            Self::Cipher => tls.cipher.into(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Method,
    Path,
    Authority,
    Scheme,
    Field(HeaderName),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Remote,
    Local,
    Upstream,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Whole,
    Ip,
    Port,
}

impl Format {
    /// Compiles a text; `%%` is one percent sign.
    pub fn compile(text: &str) -> Result<Self> {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('%') {
            plain.push_str(rest.get(..at).unwrap_or_default());
            let tail = rest.get(at + 1..).unwrap_or_default();
            if let Some(after) = tail.strip_prefix('%') {
                plain.push('%');
                rest = after;
                continue;
            }
            let (command, after) = split_command(tail).ok_or_else(|| {
                CompileError::new("format", format!("{text:?} has a % without its partner"))
            })?;
            if !plain.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut plain).into()));
            }
            parts.push(compile_command(command)?);
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(Part::Text(plain.into()));
        }
        Ok(Self(parts))
    }

    /// The text, where it has no operators.
    pub fn literal(&self) -> Option<&str> {
        match self.0.as_slice() {
            [] => Some(""),
            [Part::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// Does it look at the request's headers?
    pub fn reads_request(&self) -> bool {
        self.0
            .iter()
            .any(|part| matches!(part, Part::Operator(Operator::Request(..), _)))
    }

    /// Does it look at this header, of the request or the response?
    pub(crate) fn reads_header(&self, name: &HeaderName) -> bool {
        let field = |source: &Source| matches!(source, Source::Field(field) if field == name);
        self.0.iter().any(|part| match part {
            Part::Operator(Operator::Request(main, other), _) => {
                field(main) || other.as_ref().is_some_and(field)
            }
            Part::Operator(Operator::Response(main, other), _) => {
                main == name || other.as_ref() == Some(name)
            }
            _ => false,
        })
    }

    /// The text. `missing` stands where something is not known: `-` in logs and bodies, nothing in headers.
    pub fn render(&self, facts: &Facts<'_>, missing: &str) -> String {
        let mut out = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Operator(operator, most) => {
                    match operator.value(facts).filter(|value| !value.is_empty()) {
                        Some(value) => out.push_str(cut(&value, *most)),
                        None => out.push_str(missing),
                    }
                }
            }
        }
        out
    }
}

/// At most so many bytes, ending between characters.
fn cut(value: &str, most: Option<usize>) -> &str {
    let most = most.unwrap_or(value.len()).min(value.len());
    (0..=most)
        .rev()
        .find_map(|end| value.get(..end))
        .unwrap_or_default()
}

/// The command up to its closing percent sign, which does not count inside parentheses.
fn split_command(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0_i32;
    let at = text.bytes().position(|byte| {
        match byte {
            b'(' => depth += 1,
            b')' => depth -= 1,
            _ => {}
        }
        byte == b'%' && depth <= 0
    })?;
    Some((text.get(..at)?, text.get(at + 1..)?))
}

/// `NAME`, `NAME(argument)` or `NAME(argument):length`.
fn compile_command(command: &str) -> Result<Part> {
    let broken = || CompileError::new("format", format!("%{command}% cannot be read"));
    let (name, argument, length) = match command.split_once('(') {
        None => match command.split_once(':') {
            Some((name, length)) => (name, None, Some(length)),
            None => (command, None, None),
        },
        Some((name, rest)) => {
            let (argument, tail) = rest.rsplit_once(')').ok_or_else(broken)?;
            let length = match tail {
                "" => None,
                tail => Some(tail.strip_prefix(':').ok_or_else(broken)?),
            };
            (name, Some(argument), length)
        }
    };
    let most = length
        .map(|length| length.parse().map_err(|_| broken()))
        .transpose()?;
    Ok(Part::Operator(Operator::compile(name, argument)?, most))
}

impl Operator {
    fn compile(name: &str, argument: Option<&str>) -> Result<Self> {
        use Shape::{Ip, Port, Whole};
        use Side::{Local, Remote, Upstream};
        let refuse = || {
            let argument = argument.map(|a| format!("({a})")).unwrap_or_default();
            CompileError::unsupported(format!("the operator %{name}{argument}%"))
        };
        if let Some(argument) = argument {
            return match name {
                "REQ" => {
                    let (main, other) = pair(argument);
                    Ok(Self::Request(
                        Source::compile(main)?,
                        other.map(Source::compile).transpose()?,
                    ))
                }
                "RESP" => {
                    let (main, other) = pair(argument);
                    Ok(Self::Response(
                        header_name(main)?,
                        other.map(header_name).transpose()?,
                    ))
                }
                "TRAILER" => Ok(Self::Trailer(header_name(argument)?)),
                _ => Err(refuse()),
            };
        }
        Ok(match name {
            // No proxy protocol and no trusted hops: the direct address is the remote address.
            "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => {
                Self::Address(Remote, Whole)
            }
            "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT"
            | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => Self::Address(Remote, Ip),
            "DOWNSTREAM_REMOTE_PORT" | "DOWNSTREAM_DIRECT_REMOTE_PORT" => {
                Self::Address(Remote, Port)
            }
            "DOWNSTREAM_LOCAL_ADDRESS" => Self::Address(Local, Whole),
            "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Self::Address(Local, Ip),
            "DOWNSTREAM_LOCAL_PORT" => Self::Address(Local, Port),
            "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Self::Address(Upstream, Whole),
            "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Self::Address(Upstream, Ip),
            "UPSTREAM_REMOTE_PORT" => Self::Address(Upstream, Port),
            "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Self::UpstreamCluster,
            "PROTOCOL" => Self::Protocol,
            "RESPONSE_CODE" => Self::ResponseCode,
            "RESPONSE_FLAGS" => Self::ResponseFlags,
            "ROUTE_NAME" => Self::RouteName,
            "REQUESTED_SERVER_NAME" => Self::ServerName,
            "DOWNSTREAM_PEER_URI_SAN" => Self::Tls(TlsFact::PeerUris),
            "DOWNSTREAM_PEER_DNS_SAN" => Self::Tls(TlsFact::PeerDns),
            "DOWNSTREAM_PEER_SUBJECT" => Self::Tls(TlsFact::PeerSubject),
            "DOWNSTREAM_PEER_ISSUER" => Self::Tls(TlsFact::PeerIssuer),
            "DOWNSTREAM_PEER_SERIAL" => Self::Tls(TlsFact::PeerSerial),
            "DOWNSTREAM_PEER_FINGERPRINT_256" => Self::Tls(TlsFact::PeerHash),
            "DOWNSTREAM_PEER_CERT" => Self::Tls(TlsFact::PeerCertificate),
            "DOWNSTREAM_LOCAL_URI_SAN" => Self::Tls(TlsFact::LocalUris),
            "DOWNSTREAM_LOCAL_DNS_SAN" => Self::Tls(TlsFact::LocalDns),
            "DOWNSTREAM_LOCAL_SUBJECT" => Self::Tls(TlsFact::LocalSubject),
            "DOWNSTREAM_TLS_VERSION" => Self::Tls(TlsFact::Version),
            "DOWNSTREAM_TLS_CIPHER" => Self::Tls(TlsFact::Cipher),
            "HOSTNAME" => Self::Hostname,
            "START_TIME" => Self::StartTime,
            "DURATION" => Self::Duration,
            "BYTES_RECEIVED" => Self::BytesReceived,
            "BYTES_SENT" => Self::BytesSent,
            "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Self::Attempts,
            _ => return Err(refuse()),
        })
    }

    fn value<'a>(&'a self, facts: &Facts<'a>) -> Option<Cow<'a, str>> {
        let number = |n: u64| Some(Cow::Owned(n.to_string()));
        match self {
            Self::Request(main, other) => main
                .value(facts)
                .or_else(|| other.as_ref().and_then(|other| other.value(facts))),
            Self::Response(main, other) => {
                let headers = facts.response?;
                field(headers, main).or_else(|| field(headers, other.as_ref()?))
            }
            Self::Trailer(name) => field(facts.trailers?, name),
            Self::Address(side, shape) => {
                let address = match side {
                    Side::Remote => facts.remote,
                    Side::Local => facts.local,
                    Side::Upstream => facts.upstream_host,
                }?;
                Some(Cow::Owned(match shape {
                    Shape::Whole => address.to_string(),
                    Shape::Ip => address.ip().to_string(),
                    Shape::Port => address.port().to_string(),
                }))
            }
            Self::UpstreamCluster => Some(facts.upstream_cluster.into()),
            Self::Protocol => Some(facts.protocol.into()),
            Self::ResponseCode => number(facts.status.into()),
            Self::ResponseFlags => Some(facts.flags.into()),
            Self::RouteName => Some(facts.route.into()),
            Self::ServerName => Some(facts.server_name.into()),
            Self::Tls(fact) => Some(fact.value(facts.tls?)),
            Self::Hostname => Some(facts.hostname.into()),
            Self::StartTime => Some(Cow::Owned(timestamp(facts.started?))),
            Self::Duration => number(u64::try_from(facts.duration?.as_millis()).ok()?),
            Self::BytesReceived => number(facts.received),
            Self::BytesSent => number(facts.sent),
            Self::Attempts => number(facts.attempts.into()),
        }
    }
}

impl Source {
    fn compile(name: &str) -> Result<Self> {
        Ok(match name.to_ascii_lowercase().as_str() {
            ":method" => Self::Method,
            ":path" => Self::Path,
            ":authority" | "host" => Self::Authority,
            ":scheme" => Self::Scheme,
            name => Self::Field(header_name(name)?),
        })
    }

    fn value<'a>(&self, facts: &Facts<'a>) -> Option<Cow<'a, str>> {
        let text = match self {
            Self::Method => facts.method,
            Self::Path => facts.path,
            Self::Authority => facts.authority,
            Self::Scheme => facts.scheme,
            Self::Field(name) => return field(facts.request?, name),
        };
        (!text.is_empty()).then_some(Cow::Borrowed(text))
    }
}

fn pair(argument: &str) -> (&str, Option<&str>) {
    match argument.split_once('?') {
        Some((main, other)) => (main, Some(other)),
        None => (argument, None),
    }
}

fn header_name(name: &str) -> Result<HeaderName> {
    name.parse()
        .map_err(|_| CompileError::new("format", format!("{name:?} is not a header name")))
}

/// The first value, as Envoy takes it.
fn field<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    Some(String::from_utf8_lossy(headers.get(name)?.as_bytes()))
}

/// ISO 8601 with milliseconds in UTC, Envoy's default for times.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let mut out = String::with_capacity(24);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let millis = since.subsec_millis();
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z"
    );
    out
}

/// Year, month and day of a number of days since 1970-01-01 in the Gregorian calendar: 400 years have 146,097 days, and years that begin
/// in March have their leap day at the end.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let march = (5 * of_year + 2) / 153;
    let month = if march < 10 { march + 3 } else { march - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    (year, month, of_year - (153 * march + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(text: &str, facts: &Facts<'_>) -> String {
        Format::compile(text).expect(text).render(facts, "-")
    }

    #[test]
    fn certificates_have_operators() {
        let tls = PeerTls {
            uri_sans: vec!["spiffe://a".into(), "spiffe://b".into()],
            subject: "CN=x".into(),
            version: "TLSv1.3",
            ..PeerTls::default()
        };
        let facts = Facts {
            tls: Some(&tls),
            ..Facts::default()
        };
        let text = "%DOWNSTREAM_PEER_URI_SAN% %DOWNSTREAM_PEER_SUBJECT% %DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_PEER_DNS_SAN%";
        assert_eq!(render(text, &facts), "spiffe://a,spiffe://b CN=x TLSv1.3 -");
        assert_eq!(render(text, &Facts::default()), "- - - -");
    }

    #[test]
    fn operators_are_replaced() {
        let mut request = HeaderMap::new();
        request.insert("x-user", "jason".parse().expect("a value"));
        let facts = Facts {
            request: Some(&request),
            method: "GET",
            path: "/a?b",
            remote: Some(([10, 0, 0, 1], 4000).into()),
            flags: "-",
            status: 503,
            started: Some(UNIX_EPOCH + Duration::from_millis(1_700_000_000_123)),
            ..Facts::default()
        };
        for (text, expected) in [
            ("plain", "plain"),
            ("100%%", "100%"),
            ("%REQ(X-User)%", "jason"),
            ("%REQ(x-none?x-user)%!", "jason!"),
            ("%REQ(x-user):3%", "jas"),
            (
                "%REQ(:METHOD)% %REQ(:path)% from %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
                "GET /a?b from 10.0.0.1",
            ),
            ("%DOWNSTREAM_REMOTE_ADDRESS%", "10.0.0.1:4000"),
            ("%RESPONSE_CODE%/%RESPONSE_FLAGS%", "503/-"),
            ("%START_TIME%", "2023-11-14T22:13:20.123Z"),
            ("a%REQ(x-none)%b", "a-b"),
        ] {
            assert_eq!(render(text, &facts), expected, "{text}");
        }
        let none = Format::compile("%REQ(x-none)%").expect("a format");
        assert_eq!(none.render(&facts, ""), "");
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for text in [
            "%FILTER_STATE(a:b)%",
            "%DYNAMIC_METADATA(a)%",
            "%NOPE%",
            "%REQ(a b)%",
            "50%",
            "%REQ(x",
        ] {
            let error = Format::compile(text).expect_err(text).to_string();
            assert!(!error.is_empty());
        }
        let error = Format::compile("%FILTER_STATE(a:b)%").expect_err("refused");
        assert!(error.to_string().contains("%FILTER_STATE(a:b)%"), "{error}");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_819), (2027, 1, 1));
    }
}
