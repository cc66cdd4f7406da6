//! What the authorization service is told (`envoy.service.auth.v3`, Envoy: `CheckRequestUtils`).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::SystemTime;

use envoy_types::pb::envoy::config::core::v3::address::Address as Kind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{
    Address, HeaderMap as PbHeaders, HeaderValue as PbHeader, Metadata, SocketAddress,
};
use envoy_types::pb::envoy::service::auth::v3::attribute_context::{
    HttpRequest, Peer, Request as PbRequest, TlsSession,
};
use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest};
use envoy_types::pb::google::protobuf::Timestamp;
use http::header::{CONTENT_LENGTH, HOST};
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Request as HttpMessage, Uri, Version, request};
use mesh_routing::dynamic::Dynamic;
use mesh_routing::filter::ext_authz::{
    AuthorizationHttp, ConnectionExtAuthz, ExtAuthz, ExtAuthzPerRoute,
};

use super::verdict::Verdict;
use super::{Notes, Part, Request};
use crate::body::RequestBody;
use crate::filter::call::{self, CallError};
use crate::http::view;
use crate::listener::Downstream;

const PARTIAL: HeaderName = HeaderName::from_static("x-envoy-auth-partial-body");
/// By this header an HTTP service says which headers the endpoint is not to get.
const SERVICE: &str = "x-envoy-downstream-service-cluster";
/// Longer answers of HTTP services are not read.
const LONGEST_ANSWER: usize = 64 * 1024;

impl Request<'_> {
    pub(super) fn question(
        &self,
        filter: &ExtAuthz,
        route: Option<&ExtAuthzPerRoute>,
        parts: &request::Parts,
        part: Option<Part>,
        notes: &Notes,
    ) -> CheckRequest {
        let connection = &self.exchange.connection;
        let mut source = source(connection, filter.with_certificate);
        let service = parts.headers.get(SERVICE).and_then(|v| v.to_str().ok());
        source.service = service.unwrap_or("").to_owned();
        let since = self.exchange.started.elapsed();
        CheckRequest {
            attributes: Some(AttributeContext {
                source: Some(source),
                destination: Some(destination(connection)),
                request: Some(PbRequest {
                    time: SystemTime::now().checked_sub(since).map(timestamp),
                    http: Some(self.http_request(filter, parts, part)),
                }),
                context_extensions: route.map_or_else(HashMap::new, |r| r.context.clone()),
                metadata_context: context(&filter.metadata, notes.metadata.as_deref()),
                route_metadata_context: None,
                tls_session: tls_session(connection, filter.with_tls_session),
            }),
        }
    }

    fn http_request(
        &self,
        filter: &ExtAuthz,
        parts: &request::Parts,
        part: Option<Part>,
    ) -> HttpRequest {
        let view = view(self.exchange, parts);
        let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        let mut list: Vec<(String, String)> = Vec::with_capacity(parts.headers.len() + 5);
        for (name, value) in [
            (":authority", view.host),
            (":path", view.path_and_query),
            (":method", view.method),
            (":scheme", view.scheme),
        ] {
            if filter.sends(name) {
                list.push((name.to_owned(), value.to_owned()));
            }
        }
        for (name, value) in &parts.headers {
            if *name != HOST && *name != PARTIAL && filter.sends(name.as_str()) {
                list.push((name.as_str().to_owned(), text(value)));
            }
        }
        if let Some(part) = &part {
            list.push((PARTIAL.as_str().to_owned(), part.partial.to_string()));
        }
        // What has come so far, as Envoy counts it: nothing, unless the body was waited for.
        let size = part.as_ref().map_or(0, |part| {
            let length = parts.headers.get(CONTENT_LENGTH);
            let announced = length.and_then(|v| v.to_str().ok()?.parse().ok());
            announced.unwrap_or(i64::try_from(part.bytes.len()).unwrap_or(i64::MAX))
        });
        let mut http = HttpRequest {
            id: format!("{}", self.exchange.random),
            method: view.method.to_owned(),
            path: view.path_and_query.to_owned(),
            host: view.host.to_owned(),
            scheme: view.scheme.to_owned(),
            size,
            protocol: protocol(self.exchange.version).to_owned(),
            ..HttpRequest::default()
        };
        match filter.raw_headers {
            true => {
                let headers = list.into_iter().map(|(key, value)| PbHeader {
                    key,
                    raw_value: value.into_bytes(),
                    ..PbHeader::default()
                });
                http.header_map = Some(PbHeaders {
                    headers: headers.collect(),
                });
            }
            false => http.headers = joined(list),
        }
        if let Some(part) = part {
            let as_bytes = filter.body.is_some_and(|limit| limit.as_bytes);
            match String::from_utf8(part.bytes.to_vec()) {
                Ok(text) if !as_bytes => http.body = text,
                Ok(text) => http.raw_body = text.into_bytes(),
                Err(error) if as_bytes => http.raw_body = error.into_bytes(),
                Err(error) => http.body = String::from_utf8_lossy(error.as_bytes()).into_owned(),
            }
        }
        http
    }

    /// Asks an HTTP service by a request like the client's.
    pub(super) async fn ask_http(
        &self,
        filter: &ExtAuthz,
        service: &AuthorizationHttp,
        parts: &request::Parts,
        part: Part,
    ) -> Result<Verdict, String> {
        let view = view(self.exchange, parts);
        let path = match &service.path_override {
            Some(path) => path.to_string(),
            None => format!("{}{}", service.path_prefix, view.path_and_query),
        };
        let path = PathAndQuery::try_from(path).map_err(|_| "the path is none".to_owned())?;
        let length = part.bytes.len();
        let body = match length {
            0 => RequestBody::empty(Rc::default()),
            _ => RequestBody::whole(part.bytes),
        };
        let mut question = HttpMessage::new(body);
        *question.method_mut() = parts.method.clone();
        *question.uri_mut() = Uri::from(path);
        let headers = question.headers_mut();
        for (name, value) in &parts.headers {
            if *name != HOST && *name != CONTENT_LENGTH && filter.sends(name.as_str()) {
                headers.append(name.clone(), value.clone());
            }
        }
        headers.insert(HOST, self.exchange.authority.clone());
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        if length > 0 {
            let partial = HeaderValue::from_static(if part.partial { "true" } else { "false" });
            headers.insert(PARTIAL, partial);
        }
        for (name, value) in &service.headers {
            headers.insert(name.clone(), value.clone());
        }
        let worker = &self.exchange.connection.worker;
        let cluster = &service.service.cluster;
        match call::whole(worker, self.snapshot, cluster, question, LONGEST_ANSWER).await {
            Ok((head, body)) => Verdict::of_http(&service.out, &head, body),
            // The client chose the host: what cannot be asked because of it is no outage, through which a filter that fails open lets it.
            Err(CallError::Authority) => Ok(Verdict::unaskable()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Values of one name in one text, as Envoy's headers have them.
fn joined(list: Vec<(String, String)>) -> HashMap<String, String> {
    let mut map: HashMap<String, String> = HashMap::with_capacity(list.len());
    for (name, value) in list {
        match map.get_mut(&name) {
            Some(known) => {
                known.push(',');
                known.push_str(&value);
            }
            None => {
                map.insert(name, value);
            }
        }
    }
    map
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    }
}

/// What is told about a connection that is judged by itself.
pub(super) fn about_connection(
    connection: &Rc<Downstream>,
    filter: &ConnectionExtAuthz,
    notes: &Notes,
) -> CheckRequest {
    CheckRequest {
        attributes: Some(AttributeContext {
            source: Some(source(connection, filter.with_certificate)),
            destination: Some(destination(connection)),
            metadata_context: context(&filter.metadata, notes.metadata.as_deref()),
            tls_session: tls_session(connection, filter.with_tls_session),
            ..AttributeContext::default()
        }),
    }
}

fn source(connection: &Downstream, with_certificate: bool) -> Peer {
    let tls = connection.tls.as_ref();
    let certificate = tls.filter(|_| with_certificate);
    Peer {
        address: Some(address(connection.remote)),
        principal: tls.map_or_else(String::new, |tls| {
            name(&tls.uri_sans, &tls.dns_sans, &tls.subject)
        }),
        certificate: certificate
            .and_then(|tls| tls.certificate_encoded())
            .unwrap_or_default(),
        ..Peer::default()
    }
}

fn destination(connection: &Downstream) -> Peer {
    let tls = connection.tls.as_ref();
    Peer {
        address: Some(address(connection.destination)),
        principal: tls.map_or_else(String::new, |tls| {
            name(&tls.local_uri_sans, &tls.local_dns_sans, &tls.local_subject)
        }),
        ..Peer::default()
    }
}

/// The first URI name, else the first DNS name, else the subject.
fn name(uris: &[Box<str>], dns: &[Box<str>], subject: &str) -> String {
    let first = uris.first().or(dns.first());
    first.map_or(subject, |name| &**name).to_owned()
}

fn address(address: SocketAddr) -> Address {
    Address {
        address: Some(Kind::SocketAddress(SocketAddress {
            address: address.ip().to_string(),
            port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
            ..SocketAddress::default()
        })),
    }
}

fn tls_session(connection: &Downstream, wanted: bool) -> Option<TlsSession> {
    let tls = connection.tls.as_ref().filter(|_| wanted)?;
    Some(TlsSession {
        sni: tls.sni.as_deref().unwrap_or("").to_owned(),
    })
}

fn context(wanted: &[Box<str>], known: Option<&Dynamic>) -> Option<Metadata> {
    let section = |name: &str| {
        let fields = known?.section(name)?.clone();
        Some((name.to_owned(), fields))
    };
    Some(Metadata {
        filter_metadata: wanted.iter().filter_map(|name| section(name)).collect(),
        ..Metadata::default()
    })
}

fn timestamp(at: SystemTime) -> Timestamp {
    let since = at
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        // Below a thousand million.
        nanos: since.subsec_nanos() as i32,
    }
}
