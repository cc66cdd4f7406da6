//! DNS for the application, where its queries are captured (`ISTIO_META_DNS_CAPTURE`): names of the mesh are answered from the table that the
//! control plane sends, everything else is asked of the pod's own resolvers, and their answers go back as they are.
//!
//! The semantics are those of Istio's agent (`pkg/dns/client`). [`names`] decides and is pure; here it is served.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::serialize::binary::{BinEncodable as _, BinEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use socket2::SockRef;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use crate::options::ProxyOptions;
use crate::run::RunError;
use crate::serve::open;
use crate::shared::Shared;

mod forward;
pub(crate) mod names;

use forward::Transport;
use names::Names;

/// Queries that are forwarded at once; more fail.
const MAX_FORWARDS: usize = 256;
/// TCP connections that are served at once; more wait.
const MAX_STREAMS: usize = 256;
/// A client over TCP may be silent for this long.
const STREAM_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest query over UDP that is read, in bytes.
const LARGEST_QUERY: usize = 4096;

/// Where queries come in and where they go on to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsOptions {
    /// Where to listen, UDP and TCP (`DNS_PROXY_ADDR`, 127.0.0.1:15053; ::1 where the pod has a resolver of IPv6).
    pub listen: Vec<SocketAddr>,
    /// The pod's resolvers, asked in turn.
    pub resolvers: Vec<SocketAddr>,
    /// Domains that the application's resolver puts behind names, the first one first.
    pub search: Vec<String>,
}

impl DnsOptions {
    /// From the text of `/etc/resolv.conf` (resolv.conf(5)); `listen` is what `DNS_PROXY_ADDR` says.
    ///
    /// # Errors
    /// `listen` is no address and port; the text says why.
    pub fn read(resolv_conf: &str, listen: Option<&str>) -> Result<Self, String> {
        let mut resolvers = Vec::new();
        let mut search = Vec::new();
        for line in resolv_conf.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let address = words.next().and_then(|word| word.parse().ok());
                    resolvers.extend(address.map(|ip| SocketAddr::new(ip, 53)));
                }
                // The last one counts.
                Some("search" | "domain") => search = words.map(str::to_owned).collect(),
                _ => {}
            }
        }
        let (host, port) = match listen.map(|text| text.rsplit_once(':')) {
            None => ("localhost", "15053"),
            Some(Some(parts)) => parts,
            Some(None) => return Err("is not HOST:PORT, such as localhost:15053".to_owned()),
        };
        let port: u16 = port
            .parse()
            .map_err(|_| format!("{port:?} is not a port"))?;
        let listen = if host == "localhost" {
            let v6 = resolvers.iter().any(SocketAddr::is_ipv6);
            let v4 = !v6 || resolvers.iter().any(SocketAddr::is_ipv4);
            let v4 = v4.then_some(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
            let v6 = v6.then_some(SocketAddr::from((Ipv6Addr::LOCALHOST, port)));
            v4.into_iter().chain(v6).collect()
        } else {
            let ip = host.trim_start_matches('[').trim_end_matches(']');
            let ip = ip
                .parse()
                .map_err(|_| format!("{host:?} is neither localhost nor an IP address"))?;
            vec![SocketAddr::new(ip, port)]
        };
        Ok(Self {
            listen,
            resolvers,
            search,
        })
    }
}

/// What is counted, by the names of Istio's agent.
#[derive(Debug, Default)]
pub struct DnsCounters {
    requests: Counter<u64, AtomicU64>,
    upstream: Counter<u64, AtomicU64>,
    failures: Counter<u64, AtomicU64>,
}

impl DnsCounters {
    /// Adds them to the metrics.
    pub fn register(&self, registry: &mut Registry) {
        for (name, help, counter) in [
            ("requests", "DNS queries of the application", &self.requests),
            (
                "upstream_requests",
                "DNS queries that were forwarded to the pod's resolvers",
                &self.upstream,
            ),
            (
                "upstream_failures",
                "DNS queries that no resolver answered",
                &self.failures,
            ),
        ] {
            registry.register(format!("istio_agent_dns_{name}"), help, counter.clone());
        }
    }
}

struct Server {
    shared: Arc<Shared>,
    options: DnsOptions,
    control_plane: Vec<String>,
    forwards: Semaphore,
    streams: Arc<Semaphore>,
}

/// Opens the ports and answers until the runtime ends. Nothing happens where queries are not captured.
///
/// # Errors
/// A port can't be had.
pub fn start(shared: &Arc<Shared>) -> Result<(), RunError> {
    let Some(options) = shared.options.dns.clone() else {
        return Ok(());
    };
    let addresses = options.listen.clone();
    let server = Rc::new(Server {
        shared: shared.clone(),
        options,
        control_plane: control_plane(&shared.options),
        forwards: Semaphore::new(MAX_FORWARDS),
        streams: Arc::new(Semaphore::new(MAX_STREAMS)),
    });
    for address in addresses {
        let stream = open(address).map_err(|source| RunError::Port {
            port: "DNS",
            source,
        })?;
        let datagram = std::net::UdpSocket::bind(address)
            .and_then(|socket| socket.set_nonblocking(true).map(|()| socket))
            .map_err(|source| RunError::Datagrams { address, source })?;
        let datagram = Rc::new(UdpSocket::from_std(datagram)?);
        if let Some(mark) = shared.mark {
            // By it the capture rules know the agent's answers, where they can't go by its user.
            SockRef::from(&*datagram).set_mark(mark)?;
        }
        tokio::task::spawn_local(datagrams(datagram, server.clone()));
        tokio::task::spawn_local(streams(TcpListener::from_std(stream)?, server.clone()));
    }
    Ok(())
}

/// Hosts of the control plane and the authority. This process has to find them before there is a table, and where capture goes by a mark, what its
/// C library asks comes here too.
fn control_plane(options: &ProxyOptions) -> Vec<String> {
    let authority = options.identity.as_ref().map(|own| &own.authority);
    let addresses = options.discovery.iter().chain(authority);
    let host = |address: &String| {
        let host = address
            .rsplit_once(':')
            .map_or(address.as_str(), |(host, _)| host);
        names::plain(host)
    };
    addresses.map(host).collect()
}

/// Is this one of the hosts, or what a search domain makes of one?
fn is_one_of(name: &str, hosts: &[String]) -> bool {
    hosts.iter().any(|host| {
        name.strip_prefix(host.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

/// What is to be done with a query.
enum Verdict {
    Answer(Message),
    Forward,
    /// It deserves no answer.
    Drop,
}

impl Server {
    fn judge(&self, query: &Message) -> Verdict {
        if query.metadata.message_type != MessageType::Query {
            return Verdict::Drop;
        }
        self.shared.dns.requests.inc();
        if query.metadata.op_code != OpCode::Query {
            return Verdict::Answer(names::failure(query, ResponseCode::NotImp));
        }
        if query.queries.len() != 1 {
            return Verdict::Answer(names::failure(query, ResponseCode::FormErr));
        }
        let Some(names) = self.shared.names.load_full() else {
            let asked = names::plain(&query.queries[0].name().to_ascii());
            if is_one_of(&asked, &self.control_plane) {
                return Verdict::Forward;
            }
            return Verdict::Answer(names::failure(query, ResponseCode::ServFail));
        };
        match names.answer(query) {
            Some(answer) => Verdict::Answer(answer),
            None => Verdict::Forward,
        }
    }

    /// The bytes that answer a query, which fit into what the client takes.
    async fn respond(&self, bytes: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let query = Message::from_vec(bytes).ok()?;
        let size = match transport {
            Transport::Udp => usize::from(query.max_payload()),
            Transport::Tcp => usize::from(u16::MAX),
        };
        match self.judge(&query) {
            Verdict::Drop => None,
            Verdict::Answer(message) => encode(&message, size),
            Verdict::Forward => {
                self.shared.dns.upstream.inc();
                let forwarded = match self.forwards.try_acquire() {
                    Ok(_permit) => {
                        let resolvers = &self.options.resolvers;
                        forward::ask(resolvers, bytes, transport, self.shared.mark).await
                    }
                    Err(_) => None,
                };
                forwarded.or_else(|| {
                    self.shared.dns.failures.inc();
                    encode(&names::failure(&query, ResponseCode::ServFail), size)
                })
            }
        }
    }
}

/// RFC 1035 section 4.2.1: what does not fit is cut off, and the client asks again over TCP.
fn encode(answer: &Message, size: usize) -> Option<Vec<u8>> {
    let bytes = answer.to_vec().ok()?;
    if bytes.len() <= size {
        return Some(bytes);
    }
    // What fits is there, for clients that don't ask again; the encoder says that there is more.
    let mut cut = Vec::with_capacity(size);
    let mut encoder = BinEncoder::new(&mut cut);
    encoder.set_max_size(u16::try_from(size).unwrap_or(u16::MAX));
    answer.emit(&mut encoder).ok()?;
    Some(cut)
}

async fn datagrams(socket: Rc<UdpSocket>, server: Rc<Server>) {
    let mut buffer = vec![0; LARGEST_QUERY];
    loop {
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else {
            // An ICMP error for an earlier answer.
            continue;
        };
        let (query, socket, server) = (buffer[..length].to_vec(), socket.clone(), server.clone());
        tokio::task::spawn_local(async move {
            if let Some(answer) = server.respond(&query, Transport::Udp).await {
                // A client that has gone needs no answer.
                let _ = socket.send_to(&answer, peer).await;
            }
        });
    }
}

async fn streams(listener: TcpListener, server: Rc<Server>) {
    loop {
        // Beyond the limit connections wait in the system's queue.
        let Ok(place) = server.streams.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let server = server.clone();
                tokio::task::spawn_local(async move {
                    serve_stream(stream, &server).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a DNS connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// RFC 1035 section 4.2.2: each message has its length before it.
async fn serve_stream(mut stream: TcpStream, server: &Server) {
    let exchange = async |stream: &mut TcpStream| -> std::io::Result<()> {
        let length = stream.read_u16().await?;
        let mut query = vec![0; usize::from(length)];
        stream.read_exact(&mut query).await?;
        let answer = server.respond(&query, Transport::Tcp).await;
        let answer = answer.ok_or(std::io::ErrorKind::InvalidData)?;
        forward::write(stream, &answer).await
    };
    // Until the client goes, says nothing for a while, or says what no client says.
    while let Ok(Ok(())) = tokio::time::timeout(STREAM_TIMEOUT, exchange(&mut stream)).await {}
}

/// `/debug/ndsz`: the table as the control plane sent it.
pub fn table(shared: &Shared) -> Option<serde_json::Value> {
    shared.names.load().as_ref().map(|names| names.to_json())
}

/// Takes the table that the control plane sent; an empty one where it has none for us.
///
/// # Errors
/// The message does not decode.
pub fn take(shared: &Shared, value: &[u8]) -> Result<(), String> {
    let names = Names::decode(value, &shared.options)?;
    shared.names.store(Some(Arc::new(names)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::options::Role;

    #[test]
    fn the_control_plane_is_found_without_a_table() {
        let config = r#"{"discoveryAddress":"Istiod.istio-system.svc:15012"}"#;
        let vars = [
            ("PROXY_CONFIG", config),
            ("CA_ADDR", "authority.test:15012"),
        ];
        let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let vars = BTreeMap::from(vars);
        let options = ProxyOptions::from_vars(Role::Sidecar, vars, Path::new("/nowhere"));
        let hosts = control_plane(&options.expect("options"));
        for name in [
            "istiod.istio-system.svc",
            "istiod.istio-system.svc.cluster.local",
            "authority.test.default.svc.cluster.local",
        ] {
            assert!(is_one_of(name, &hosts), "{name}");
        }
        for name in ["istiod", "istiod.istio-system.svcs", "a.authority.test"] {
            assert!(!is_one_of(name, &hosts), "{name}");
        }
    }

    #[test]
    fn the_pods_resolver_settings_are_read() {
        let text = "# a comment\nsearch gone.test\nnameserver 10.96.0.10\n\nnameserver junk\nsearch a.test b.test\noptions ndots:5\n";
        let options = DnsOptions::read(text, None).expect("options");
        let expected = DnsOptions {
            listen: vec!["127.0.0.1:15053".parse().expect("an address")],
            resolvers: vec!["10.96.0.10:53".parse().expect("an address")],
            search: ["a.test", "b.test"].map(str::to_owned).to_vec(),
        };
        assert_eq!(options, expected);
        let listen = |text: &str, address| {
            let options = DnsOptions::read(text, address).expect("options");
            options
                .listen
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            listen("nameserver fd00::1\nnameserver 10.0.0.1", None),
            ["127.0.0.1:15053", "[::1]:15053"]
        );
        assert_eq!(listen("nameserver fd00::1", None), ["[::1]:15053"]);
        assert_eq!(listen("", Some("localhost:53")), ["127.0.0.1:53"]);
        assert_eq!(listen("", Some("[fd00::2]:53")), ["[fd00::2]:53"]);
        for wrong in ["15053", "localhost:dns", "elsewhere.test:53"] {
            assert!(DnsOptions::read("", Some(wrong)).is_err(), "{wrong}");
        }
    }
}
