//! Mutual TLS between two proxies, TLS of gateways and to servers outside.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::Http2ProtocolOptions;
use envoy_types::pb::envoy::config::listener::v3::listener_filter::ConfigType as FilterConfig;
use envoy_types::pb::envoy::config::listener::v3::{FilterChainMatch, Listener, ListenerFilter};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    ForwardClientCertDetails, SetCurrentClientCertDetails,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::google::protobuf::Any;
use mesh_proxy::secrets::{MESH_ROOTS, Secret};
use mesh_routing::XdsState;

use crate::config::{
    action, cluster, http_listener, prefix, route_to, state, table, tcp_listener, yes,
};
use crate::pki::{Pki, agent_secret, client, inline, mesh_context, own, server};
use crate::stage::{App, Client, Proxy, Reply, free_port, wait};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";
const SNI: &str = "outbound_.9080_._.reviews.default.svc.cluster.local";

fn tls_inspector() -> ListenerFilter {
    let kind = "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector";
    ListenerFilter {
        name: "envoy.filters.listener.tls_inspector".to_owned(),
        config_type: Some(FilterConfig::TypedConfig(Any {
            type_url: format!("type.googleapis.com/{kind}"),
            value: Vec::new(),
        })),
        ..ListenerFilter::default()
    }
}

/// As Istio's inbound chains: mutual TLS of the mesh, and plain text where `permissive`.
fn inbound(mut listener: Listener, permissive: bool) -> Listener {
    listener.traffic_direction = 1;
    listener.listener_filters = vec![tls_inspector()];
    let plain = listener.filter_chains[0].clone();
    let mut tls = plain.clone();
    tls.name = "tls".to_owned();
    let protocols = ["istio", "istio-peer-exchange", "istio-http/1.1", "istio-h2"];
    tls.filter_chain_match = Some(FilterChainMatch {
        transport_protocol: "tls".to_owned(),
        application_protocols: protocols.map(str::to_owned).into(),
        ..FilterChainMatch::default()
    });
    tls.transport_socket = server(mesh_context(&["h2", "http/1.1"], &[]), true);
    listener.filter_chains = vec![tls];
    if permissive {
        let mut plain = plain;
        plain.filter_chain_match = Some(FilterChainMatch {
            transport_protocol: "raw_buffer".to_owned(),
            ..FilterChainMatch::default()
        });
        listener.filter_chains.push(plain);
    }
    listener
}

fn details(manager: &mut HttpConnectionManager) {
    manager.forward_client_cert_details = ForwardClientCertDetails::AppendForward as i32;
    manager.set_current_client_cert_details = Some(SetCurrentClientCertDetails {
        subject: yes(),
        dns: true,
        uri: true,
        ..SetCurrentClientCertDetails::default()
    });
}

fn to_sidecar(at: SocketAddr, alpn: &[&str], peers: &[&str]) -> Cluster {
    let mut cluster = cluster("server", &[at]);
    cluster.transport_socket = client(mesh_context(alpn, peers), SNI);
    cluster
}

fn web(at: SocketAddr, clusters: Vec<Cluster>) -> XdsState {
    let routes = table(vec![route_to(prefix("/"), action(&clusters[0].name))]);
    state(vec![http_listener(at, |_| {})], routes, clusters)
}

fn inbound_state(at: SocketAddr, app: SocketAddr, permissive: bool) -> XdsState {
    let routes = table(vec![route_to(prefix("/"), action("app"))]);
    let listener = inbound(http_listener(at, details), permissive);
    state(vec![listener], routes, vec![cluster("app", &[app])])
}

fn stat(proxy: &Proxy, name: &str) -> u64 {
    let all = proxy.shared.listeners.values();
    let fits = |(stat, _): &&(String, u64)| stat.ends_with(name);
    all.iter().filter(fits).map(|(_, value)| value).sum()
}

struct Pair {
    pki: Pki,
    app: App,
    server: Proxy,
    client: Proxy,
    /// Where the client's proxy listens.
    at: SocketAddr,
    /// Where the server's proxy listens.
    inbound: SocketAddr,
}

fn pair(permissive: bool, alpn: &[&str], change: impl FnOnce(&mut Cluster)) -> Pair {
    let pki = Pki::new("root");
    let app = App::start("app");
    let (inbound, at) = (free_port(), free_port());
    let server = Proxy::start(&inbound_state(inbound, app.address, permissive));
    pki.enrol(&server.shared, SERVER);
    let mut cluster = to_sidecar(inbound, alpn, &[SERVER]);
    change(&mut cluster);
    let client = Proxy::start(&web(at, vec![cluster]));
    pki.enrol(&client.shared, CLIENT);
    Pair {
        pki,
        app,
        server,
        client,
        at,
        inbound,
    }
}

#[test]
fn two_sidecars_speak_mutual_tls() {
    let pair = pair(false, &["istio-http/1.1", "istio", "http/1.1"], |_| {});
    let mut client = Client::connect(pair.at);
    for i in 0..3 {
        let reply = client.get(
            &format!("/{i}"),
            "x-forwarded-client-cert: By=forged;URI=spiffe://forged\r\n",
        );
        assert_eq!(reply.status, 200, "{}", reply.body);
        let line = "x-forwarded-client-cert: By=spiffe://cluster.local/ns/default/sa/server;Hash=";
        assert!(reply.body.contains(line), "{}", reply.body);
        assert!(
            reply.body.contains(&format!("Subject=\"\";URI={CLIENT}\n"))
                || reply.body.contains(&format!(";URI={CLIENT}\n")),
            "{}",
            reply.body
        );
        assert!(!reply.body.contains("forged"), "{}", reply.body);
    }
    assert_eq!(stat(&pair.server, "ssl.handshake"), 1, "one connection");
    let labels = [
        "reporter=\"destination\"",
        "connection_security_policy=\"mutual_tls\"",
        &format!("source_principal=\"{CLIENT}\""),
        &format!("destination_principal=\"{SERVER}\""),
    ];
    wait(|| pair.server.metric("istio_requests_total", &labels) == 3.0);
    let labels = [
        "reporter=\"source\"",
        "connection_security_policy=\"unknown\"",
        &format!("source_principal=\"{CLIENT}\""),
        &format!("destination_principal=\"{SERVER}\""),
    ];
    wait(|| pair.client.metric("istio_requests_total", &labels) == 3.0);
}

#[test]
fn http2_inside_tls() {
    let pair = pair(false, &["istio-h2", "istio", "h2"], |cluster| {
        cluster.http2_protocol_options = Some(Http2ProtocolOptions::default());
    });
    let reply = Client::connect(pair.at).get("/x", "");
    assert_eq!(reply.status, 200, "{}", reply.body);
    let mut client = Client::connect(pair.at);
    client.send("POST /y HTTP/1.1\r\nHost: app.test\r\nContent-Length: 100000\r\n\r\n");
    client.send(&"b".repeat(100_000));
    let reply = client.reply().expect("a reply");
    assert!(reply.body.len() > 100_000, "the body came back");
    assert_eq!(stat(&pair.server, "ssl.handshake"), 1, "one connection");
}

#[test]
fn strict_refuses_plain_text_and_strangers() {
    let pair = pair(false, &["istio", "http/1.1"], |_| {});
    let before = stat(&pair.server, "no_filter_chain_match");
    let mut plain = Client::connect(pair.inbound);
    plain.send("GET / HTTP/1.1\r\nHost: app.test\r\n\r\n");
    assert!(plain.is_closed(), "no answer in plain text");
    wait(|| stat(&pair.server, "no_filter_chain_match") > before);
    // A client of another mesh.
    let stranger = Pki::new("another root");
    let (chain_pem, key_pem) = stranger.issue(&[CLIENT]);
    let certificate = Secret::Certificate {
        chain_pem,
        key_pem: key_pem.into(),
    };
    let secrets = &pair.client.shared.secrets;
    secrets.set("default", certificate).expect("a certificate");
    let reply = Client::connect(pair.at).get("/", "");
    assert_eq!(reply.status, 503, "{}", reply.body);
    wait(|| stat(&pair.server, "ssl.fail_verify_error") >= 1);
    assert_eq!(
        pair.app.connections.load(Ordering::Relaxed),
        0,
        "nothing reached the application"
    );
}

/// From DISABLE to STRICT: nothing was proved on the old connection, so it ends after one more answer.
#[test]
fn an_open_connection_does_not_pass_to_a_chain_that_asks_for_more() {
    let pki = Pki::new("root");
    let (at, app) = (free_port(), App::start("app"));
    let routes = || table(vec![route_to(prefix("/"), action("app"))]);
    let clusters = || vec![cluster("app", &[app.address])];
    let plain = http_listener(at, details);
    let mut strict = inbound(http_listener(at, details), false);
    strict.filter_chains[0].name = plain.filter_chains[0].name.clone();
    let server = Proxy::start(&state(vec![plain.clone()], routes(), clusters()));
    pki.enrol(&server.shared, SERVER);
    let mut open = Client::connect(at);
    assert_eq!(open.get("/", "").status, 200);
    server.publish(&state(vec![plain], routes(), clusters()));
    let same = open.get("/", "");
    assert_eq!((same.status, same.header("connection")), (200, None));
    server.publish(&state(vec![strict], routes(), clusters()));
    wait(|| {
        let mut plain = Client::connect(at);
        plain.send("GET / HTTP/1.1\r\nHost: app.test\r\n\r\n");
        plain.reply().is_none()
    });
    let last = open.get("/", "");
    assert_eq!(
        (last.status, last.header("connection")),
        (200, Some("close"))
    );
    assert!(open.is_closed());
}

#[test]
fn permissive_takes_both() {
    let pair = pair(true, &["istio", "http/1.1"], |_| {});
    assert_eq!(Client::connect(pair.at).get("/", "").status, 200);
    let header = "x-forwarded-client-cert: URI=spiffe://forged\r\n";
    let reply = Client::connect(pair.inbound).get("/", header);
    assert_eq!(reply.status, 200);
    assert!(!reply.body.contains("forged"), "{}", reply.body);
    let labels = [
        "connection_security_policy=\"none\"",
        "source_principal=\"unknown\"",
    ];
    wait(|| pair.server.metric("istio_requests_total", &labels) == 1.0);
}

#[test]
fn a_server_with_another_identity_gets_nothing() {
    let pair = pair(false, &["istio", "http/1.1"], |_| {});
    let other = "spiffe://cluster.local/ns/default/sa/other";
    pair.pki.enrol(&pair.server.shared, other);
    let reply = Client::connect(pair.at).get("/", "");
    assert_eq!(reply.status, 503);
    assert!(
        reply.body.contains(
            "reset reason: remote connection failure, transport failure reason: TLS_error:|CERTIFICATE_VERIFY_FAILED"
        ),
        "{}",
        reply.body
    );
    assert_eq!(pair.app.connections.load(Ordering::Relaxed), 0);
    let labels = ["response_flags=\"UF,URX\""];
    let flags = pair.client.metric("istio_requests_total", &labels)
        + pair
            .client
            .metric("istio_requests_total", &["response_flags=\"UF\""]);
    assert_eq!(flags, 1.0);
}

#[test]
fn without_a_certificate_nothing_is_sent() {
    let app = App::start("app");
    let (inbound, at) = (free_port(), free_port());
    let server = Proxy::start(&inbound_state(inbound, app.address, false));
    let client = Proxy::start(&web(at, vec![to_sidecar(inbound, &["istio"], &[SERVER])]));
    let reply = Client::connect(at).get("/", "");
    assert_eq!(reply.status, 503, "{}", reply.body);
    Pki::new("root").enrol(&client.shared, CLIENT);
    let reply = Client::connect(at).get("/", "");
    assert_eq!(reply.status, 503, "{}", reply.body);
    wait(|| stat(&server, "downstream_context_secrets_not_ready") >= 1);
}

/// An application that sends back what it got once the client has closed its half.
fn echo_at_end() -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = socket.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in socket.incoming() {
            let mut stream = stream.expect("a connection");
            std::thread::spawn(move || {
                let mut all = Vec::new();
                if stream.read_to_end(&mut all).is_ok() {
                    all.reverse();
                    let _ = stream.write_all(&all);
                }
            });
        }
    });
    address
}

#[test]
fn tcp_through_mutual_tls_keeps_half_close() {
    let pki = Pki::new("root");
    let (inner, at) = (free_port(), free_port());
    let listener = inbound(tcp_listener(inner, "app"), false);
    let app = cluster("app", &[echo_at_end()]);
    let server = Proxy::start(&state(vec![listener], table(Vec::new()), vec![app]));
    pki.enrol(&server.shared, SERVER);
    let client = Proxy::start(&state(
        vec![tcp_listener(at, "server")],
        table(Vec::new()),
        vec![to_sidecar(inner, &["istio"], &[SERVER])],
    ));
    pki.enrol(&client.shared, CLIENT);
    let mut stream = TcpStream::connect(at).expect("a connection");
    let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
    stream.write_all(&sent).expect("written");
    stream.shutdown(Shutdown::Write).expect("half-closed");
    let mut received = Vec::new();
    stream.read_to_end(&mut received).expect("read");
    received.reverse();
    assert!(received == sent, "{} bytes came back", received.len());
    let labels = [
        "connection_security_policy=\"mutual_tls\"",
        &format!("source_principal=\"{CLIENT}\""),
    ];
    wait(|| server.metric("istio_tcp_received_bytes_total", &labels) == 1_000_000.0);
}

/// As under load: requests on new and old connections while certificates change.
#[test]
fn rotation_under_load_loses_nothing() {
    let pair = pair(false, &["istio", "http/1.1"], |_| {});
    let (stop, done) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let load: Vec<_> = (0..4)
        .map(|_| {
            let (stop, done, at) = (stop.clone(), done.clone(), pair.at);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let mut client = Client::connect(at);
                    for _ in 0..20 {
                        let Reply { status, body, .. } = client.get("/", "");
                        assert_eq!(status, 200, "{body}");
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    let next = |wanted: usize| {
        let before = done.load(Ordering::Relaxed);
        wait(|| done.load(Ordering::Relaxed) >= before + wanted);
    };
    for _ in 0..20 {
        pair.pki.enrol(&pair.server.shared, SERVER);
        pair.pki.enrol(&pair.client.shared, CLIENT);
        next(20);
    }
    // The root: first both are trusted, then certificates come from the new one, then the old one goes.
    let renewed = Pki::new("the next root");
    let both = format!("{}{}", pair.pki.root_pem, renewed.root_pem);
    let sides = [(&pair.server, SERVER), (&pair.client, CLIENT)];
    for (proxy, _) in sides {
        let roots = Secret::trust(both.clone());
        proxy.shared.secrets.set(MESH_ROOTS, roots).expect("roots");
    }
    next(20);
    for (proxy, identity) in sides {
        let (chain_pem, key_pem) = renewed.issue(&[identity]);
        let certificate = Secret::Certificate {
            chain_pem,
            key_pem: key_pem.into(),
        };
        let secrets = &proxy.shared.secrets;
        secrets.set("default", certificate).expect("a certificate");
        next(20);
    }
    for (proxy, _) in sides {
        let roots = Secret::trust(renewed.root_pem.clone());
        proxy.shared.secrets.set(MESH_ROOTS, roots).expect("roots");
        next(20);
    }
    stop.store(true, Ordering::Relaxed);
    for thread in load {
        thread.join().expect("no request failed");
    }
}

/// A gateway's listener with these certificates.
fn gateway(
    at: SocketAddr,
    certificates: Vec<pb::TlsCertificate>,
    change: impl FnOnce(&mut pb::CommonTlsContext),
    require: bool,
) -> XdsState {
    let mut context = pb::CommonTlsContext {
        tls_certificates: certificates,
        alpn_protocols: vec!["h2".to_owned(), "http/1.1".to_owned()],
        ..pb::CommonTlsContext::default()
    };
    change(&mut context);
    let mut listener = http_listener(at, details);
    listener.filter_chains[0].transport_socket = server(context, require);
    let app = App::start("app");
    let routes = table(vec![route_to(prefix("/"), action("app"))]);
    state(vec![listener], routes, vec![cluster("app", &[app.address])])
}

/// The proxy as a client of TLS servers: what it sends to `at` goes to `to` in TLS.
fn origination(
    at: SocketAddr,
    to: SocketAddr,
    context: pb::CommonTlsContext,
    sni: &str,
) -> XdsState {
    let mut upstream = cluster("server", &[to]);
    upstream.transport_socket = client(context, sni);
    web(at, vec![upstream])
}

fn trusting(root: &str) -> pb::CommonTlsContext {
    let context = pb::CertificateValidationContext {
        trusted_ca: inline(root),
        ..pb::CertificateValidationContext::default()
    };
    pb::CommonTlsContext {
        validation_context_type: Some(ValidationContextType::ValidationContext(context)),
        ..pb::CommonTlsContext::default()
    }
}

#[test]
fn a_gateway_presents_the_certificate_of_the_name() {
    let pki = Pki::new("public");
    let certificates = vec![
        own(&pki.issue(&["a.example.com"])),
        own(&pki.issue(&["*.example.org"])),
    ];
    let at = free_port();
    let _gateway = Proxy::start(&gateway(at, certificates, |_| {}, false));
    let ask = |sni: &str, wanted: &str| {
        let outside = free_port();
        let mut context = trusting(&pki.root_pem);
        if let Some(ValidationContextType::ValidationContext(context)) =
            &mut context.validation_context_type
        {
            #[allow(deprecated)]
            context.match_subject_alt_names.push(
                envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher {
                    match_pattern: Some(
                        envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern::Exact(
                            wanted.to_owned(),
                        ),
                    ),
                    ..Default::default()
                },
            );
        }
        let proxy = Proxy::start(&origination(outside, at, context, sni));
        let reply = Client::connect(outside).get("/", "");
        drop(proxy);
        reply.status
    };
    assert_eq!(ask("a.example.com", "a.example.com"), 200);
    assert_eq!(ask("b.example.org", "b.example.org"), 200, "by a wildcard");
    assert_eq!(ask("elsewhere.test", "a.example.com"), 200, "the first");
    assert_eq!(ask("a.example.com", "b.example.org"), 503, "another's");
}

#[test]
fn a_gateway_asks_clients_for_certificates() {
    let pki = Pki::new("public");
    let clients = Pki::new("clients");
    let start = |require: bool| {
        let at = free_port();
        let root = clients.root_pem.clone();
        let change = |context: &mut pb::CommonTlsContext| {
            context.validation_context_type = trusting(&root).validation_context_type;
        };
        let certificates = vec![own(&pki.issue(&["a.example.com"]))];
        (
            at,
            Proxy::start(&gateway(at, certificates, change, require)),
        )
    };
    let ask = |at: SocketAddr, certificate: Option<(String, String)>| {
        let outside = free_port();
        let mut context = trusting(&pki.root_pem);
        context.tls_certificates = certificate.iter().map(own).collect();
        let proxy = Proxy::start(&origination(outside, at, context, "a.example.com"));
        let reply = Client::connect(outside).get("/", "");
        drop(proxy);
        reply
    };
    let good = || Some(clients.issue(&["client.example.com"]));
    let bad = || Some(Pki::new("others").issue(&["client.example.com"]));
    let (mutual, gateway) = start(true);
    let reply = ask(mutual, good());
    assert_eq!(reply.status, 200);
    assert!(
        reply.body.contains("DNS=client.example.com"),
        "{}",
        reply.body
    );
    assert_eq!(ask(mutual, None).status, 503);
    assert_eq!(ask(mutual, bad()).status, 503);
    assert!(stat(&gateway, "ssl.fail_verify_no_cert") >= 1);
    let (optional, gateway) = start(false);
    assert_eq!(ask(optional, good()).status, 200);
    let reply = ask(optional, None);
    assert_eq!(reply.status, 200);
    assert!(
        !reply.body.contains("x-forwarded-client-cert"),
        "{}",
        reply.body
    );
    assert!(
        reply.body.contains("x-forwarded-proto: http"),
        "{}",
        reply.body
    );
    assert_eq!(ask(optional, bad()).status, 503);
    assert_eq!(stat(&gateway, "ssl.no_certificate"), 1);
}

#[test]
fn a_certificate_that_was_called_back_is_refused() {
    let pki = Pki::new("public");
    let clients = Pki::new("clients");
    let at = free_port();
    let change = |context: &mut pb::CommonTlsContext| {
        let trust = pb::CertificateValidationContext {
            trusted_ca: inline(&clients.root_pem),
            crl: inline(&clients.revoke(7)),
            ..pb::CertificateValidationContext::default()
        };
        context.validation_context_type = Some(ValidationContextType::ValidationContext(trust));
    };
    let certificates = vec![own(&pki.issue(&["a.example.com"]))];
    let gateway = Proxy::start(&gateway(at, certificates, change, true));
    let ask = |serial: u64| {
        let outside = free_port();
        let mut context = trusting(&pki.root_pem);
        context.tls_certificates = vec![own(&clients.issue_numbered("a.client", serial))];
        let proxy = Proxy::start(&origination(outside, at, context, "a.example.com"));
        let reply = Client::connect(outside).get("/", "");
        drop(proxy);
        reply.status
    };
    assert_eq!(ask(6), 200);
    assert_eq!(ask(7), 503);
    assert!(stat(&gateway, "ssl.fail_verify_error") >= 1);
}

/// A raw client that keeps what it needs to resume sessions.
struct RawClient(Arc<rustls::ClientConfig>);

impl RawClient {
    fn new(pki: &Pki) -> Self {
        let roots = mesh_identity::tls::roots(&pki.root_pem).expect("roots");
        let (chain, key) = pki.issue(&[CLIENT]);
        let key = mesh_identity::tls::certified_key(&chain, &key).expect("a key");
        let resolver = rustls::sign::SingleCertAndKey::from(key);
        let provider = mesh_identity::tls::provider();
        let trust = mesh_identity::verify::Trust {
            roots,
            revoked: Vec::new(),
            names: None,
        };
        let verifier = trust
            .of_servers(&provider, false, false)
            .expect("a verifier");
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(resolver));
        config.alpn_protocols = vec![b"istio".to_vec(), b"http/1.1".to_vec()];
        Self(Arc::new(config))
    }

    /// A request on a new connection; was its session an earlier one? `None` where the server closed.
    fn ask(&self, at: SocketAddr) -> Option<bool> {
        let name = rustls_pki_types::ServerName::try_from("reviews").expect("a name");
        let mut session = rustls::ClientConnection::new(self.0.clone(), name).expect("a client");
        let mut socket = TcpStream::connect(at).expect("a connection");
        let timeout = Some(Duration::from_secs(10));
        socket.set_read_timeout(timeout).expect("a timeout");
        let mut stream = rustls::Stream::new(&mut session, &mut socket);
        let request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        stream.write_all(request).ok()?;
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply);
        reply
            .starts_with(b"HTTP/1.1 200")
            .then(|| session.handshake_kind() == Some(rustls::HandshakeKind::Resumed))
    }
}

#[test]
fn sessions_are_resumed_until_the_trust_changes() {
    let pair = pair(false, &["istio"], |_| {});
    let client = RawClient::new(&pair.pki);
    assert_eq!(client.ask(pair.inbound), Some(false), "the first");
    assert_eq!(client.ask(pair.inbound), Some(true), "resumed");
    // The server's own certificate changes, the trust does not.
    pair.pki.enrol(&pair.server.shared, SERVER);
    assert_eq!(client.ask(pair.inbound), Some(true), "still the same trust");
    // One more root: what was resumed has to be verified again.
    let other = Pki::new("another root");
    let secrets = &pair.server.shared.secrets;
    let both = format!("{}{}", pair.pki.root_pem, other.root_pem);
    secrets.set(MESH_ROOTS, Secret::trust(both)).expect("roots");
    assert_eq!(client.ask(pair.inbound), Some(false), "verified again");
    assert_eq!(client.ask(pair.inbound), Some(true), "resumed");
    // The client's root goes: its session does not outlive it.
    let roots = Secret::trust(other.root_pem.clone());
    secrets.set(MESH_ROOTS, roots).expect("roots");
    assert_eq!(client.ask(pair.inbound), None, "not trusted any more");
}

#[test]
fn a_session_does_not_outlive_the_clients_certificate() {
    let pair = pair(false, &["istio"], |_| {});
    let client = {
        let mut client = RawClient::new(&pair.pki);
        let (chain, key) = pair.pki.issue_until(&[CLIENT], Duration::from_secs(3));
        let key = mesh_identity::tls::certified_key(&chain, &key).expect("a key");
        let config = Arc::make_mut(&mut client.0);
        config.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(key));
        client
    };
    assert_eq!(client.ask(pair.inbound), Some(false), "the first");
    assert_eq!(client.ask(pair.inbound), Some(true), "resumed");
    wait(|| client.ask(pair.inbound).is_none());
}

/// Endpoints with the trait are spoken to in TLS, others in plain text.
#[test]
fn the_endpoint_says_how_it_is_spoken_to() {
    use envoy_types::pb::envoy::config::cluster::v3::cluster::TransportSocketMatch;
    use envoy_types::pb::google::protobuf::value::Kind;
    use envoy_types::pb::google::protobuf::{Struct, Value};
    let mode = Struct {
        fields: [(
            "tlsMode".to_owned(),
            Value {
                kind: Some(Kind::StringValue("istio".to_owned())),
            },
        )]
        .into(),
    };
    let plain = App::start("plain");
    let pair = pair(false, &["istio", "http/1.1"], |cluster| {
        let socket = cluster.transport_socket.take();
        cluster.transport_socket_matches = vec![TransportSocketMatch {
            name: "tlsMode-istio".to_owned(),
            r#match: Some(mode.clone()),
            transport_socket: socket,
        }];
        let endpoints = &mut cluster.load_assignment.as_mut().expect("some").endpoints[0];
        let mut other = endpoints.lb_endpoints[0].clone();
        if let Some(metadata) = &mut endpoints.lb_endpoints[0].metadata {
            let section = "envoy.transport_socket_match".to_owned();
            metadata.filter_metadata.insert(section, mode.clone());
        }
        other.host_identifier = cluster_endpoint(plain.address);
        endpoints.lb_endpoints.push(other);
    });
    let mut seen: Vec<String> = (0..4)
        .map(|_| {
            let reply = Client::connect(pair.at).get("/", "");
            assert_eq!(reply.status, 200, "{}", reply.body);
            reply.header("x-app").expect("a name").to_owned()
        })
        .collect();
    seen.sort();
    assert_eq!(seen, ["app", "app", "plain", "plain"]);
    assert_eq!(stat(&pair.server, "ssl.handshake"), 1);
}

fn cluster_endpoint(
    at: SocketAddr,
) -> Option<envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier> {
    let mut other = cluster("other", &[at]);
    let endpoints = &mut other.load_assignment.as_mut()?.endpoints;
    endpoints[0].lb_endpoints[0].host_identifier.take()
}

#[test]
fn what_rustls_does_not_have_is_refused_by_name() {
    let at = free_port();
    let refused = |change: &dyn Fn(&mut pb::CommonTlsContext)| {
        let mut context = mesh_context(&["h2"], &[]);
        change(&mut context);
        let mut listener = http_listener(at, |_| {});
        listener.filter_chains[0].transport_socket = server(context, true);
        let routes = table(Vec::new());
        let (_, refused) = mesh_routing::compile(&state(vec![listener], routes, Vec::new()), None);
        refused
            .first()
            .map_or_else(String::new, |r| r.message.clone())
    };
    let params = |context: &mut pb::CommonTlsContext, params: pb::TlsParameters| {
        context.tls_params = Some(params);
    };
    assert_eq!(refused(&|_| {}), "");
    let text = refused(&|context| {
        let cipher_suites = vec!["ECDHE-RSA-AES128-SHA".to_owned()];
        let more = pb::TlsParameters {
            cipher_suites,
            ..Default::default()
        };
        params(context, more);
    });
    assert!(
        text.contains("\"ECDHE-RSA-AES128-SHA\" is not implemented"),
        "{text}"
    );
    let text = refused(&|context| {
        let more = pb::TlsParameters {
            tls_minimum_protocol_version: 1,
            ..Default::default()
        };
        params(context, more);
    });
    assert!(text.contains("TLSv1_2 is the oldest"), "{text}");
    let text = refused(&|context| {
        let more = pb::TlsParameters {
            ecdh_curves: vec!["P-521".to_owned()],
            ..Default::default()
        };
        params(context, more);
    });
    assert!(text.contains("\"P-521\" is not implemented"), "{text}");
    let istio = refused(&|context| {
        let suites = [
            "ECDHE-ECDSA-AES256-GCM-SHA384",
            "AES256-GCM-SHA384",
            "AES128-GCM-SHA256",
        ];
        let more = pb::TlsParameters {
            cipher_suites: suites.map(str::to_owned).into(),
            ecdh_curves: vec!["X25519MLKEM768".to_owned(), "X25519".to_owned()],
            tls_minimum_protocol_version: 3,
            tls_maximum_protocol_version: 4,
            ..Default::default()
        };
        params(context, more);
    });
    assert_eq!(istio, "");
    let _ = agent_secret("unused");
}

#[test]
fn a_handshake_that_stalls_ends() {
    let pki = Pki::new("root");
    let (at, app) = (free_port(), App::start("app"));
    let mut listener = inbound(http_listener(at, details), false);
    listener.filter_chains[0].transport_socket_connect_timeout =
        Some(envoy_types::pb::google::protobuf::Duration {
            seconds: 0,
            nanos: 200_000_000,
        });
    let routes = table(vec![route_to(prefix("/"), action("app"))]);
    let clusters = vec![cluster("app", &[app.address])];
    let proxy = Proxy::start(&state(vec![listener], routes, clusters));
    pki.enrol(&proxy.shared, SERVER);
    let config = RawClient::new(&pki).0;
    let name = rustls_pki_types::ServerName::try_from("reviews").expect("a name");
    let mut session = rustls::ClientConnection::new(config, name).expect("a client");
    let mut hello = Vec::new();
    session.write_tls(&mut hello).expect("a ClientHello");
    let mut client = Client::connect(at);
    client.0.write_all(&hello).expect("written");
    // The server's part of the handshake comes, and then nothing more.
    let mut all = Vec::new();
    client
        .0
        .read_to_end(&mut all)
        .expect("the end, not a timeout");
    assert!(!all.is_empty(), "the server answered");
    wait(|| stat(&proxy, "transport_socket_connect_timeout") == 1);
}

#[test]
fn certificates_in_files_follow_the_files() {
    let pki = Pki::new("public");
    let place = tempfile::tempdir().expect("a directory");
    let path = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let write = |names: &[&str]| {
        let (chain, key) = pki.issue(names);
        std::fs::write(path("key.pem"), key).expect("written");
        std::fs::write(path("chain.pem"), chain).expect("written");
    };
    write(&["before.example.com"]);
    let file = |name: &str| {
        Some(envoy_types::pb::envoy::config::core::v3::DataSource {
            specifier: Some(
                envoy_types::pb::envoy::config::core::v3::data_source::Specifier::Filename(path(
                    name,
                )),
            ),
            ..Default::default()
        })
    };
    let certificate = pb::TlsCertificate {
        certificate_chain: file("chain.pem"),
        private_key: file("key.pem"),
        ..pb::TlsCertificate::default()
    };
    let at = free_port();
    let gateway = Proxy::start(&gateway(at, vec![certificate], |_| {}, false));
    let shared = gateway.shared.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(mesh_proxy::secrets::files::watch(shared));
    });
    let outside = free_port();
    let mut state = origination(outside, at, trusting(&pki.root_pem), "");
    let ask = |state: &XdsState, name: &str| {
        let mut context = trusting(&pki.root_pem);
        #[allow(deprecated)]
        if let Some(ValidationContextType::ValidationContext(context)) =
            &mut context.validation_context_type
        {
            let exact = crate::pki::exact(name);
            context.match_subject_alt_names.push(exact);
        }
        let mut state = state.clone();
        let mut upstream = cluster("server", &[at]);
        upstream.transport_socket = client(context, "");
        state
            .clusters
            .insert("server".to_owned(), Arc::new(upstream));
        state
    };
    let before = ask(&state, "before.example.com");
    let proxy = Proxy::start(&before);
    wait(|| Client::connect(outside).get("/", "").status == 200);
    write(&["after.example.com"]);
    state = ask(&before, "after.example.com");
    proxy.publish(&state);
    wait(|| Client::connect(outside).get("/", "").status == 200);
}
